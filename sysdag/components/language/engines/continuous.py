"""Completions drawn by transformers' continuous batching (`generate_batch`)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sysdag.components.language.completer import Completer
from sysdag.components.language.engines.draw_checks import difference
from sysdag.components.language.engines.teacher_forcing import read_tokens
from sysdag.errors import PlanError, RunError
from sysdag.traces.cells import Draw

_CHECKED_DRAWS = 2
_PAGE = 32  # tokens of a page of the cache
_BATCH_TOKENS = {"cpu": 512}  # of one forward pass; transformers' own number elsewhere


def sample_continuously(
    owner: str,
    completer: Completer,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seeds: Sequence[int],
) -> list[Draw]:
    """A draw for each prompt, as `Completer.sample`, though not the same one for the same seeds.

    transformers draws on behind a stop string; what follows it is cut off. Two of the draws are read by the model as it
    scores, since a model whose attention continuous batching does not know would be served wrongly without an error.

    Args:
        owner: the component, for errors.
        seeds: one a prompt; the draws depend on all of them together, as transformers has one for a batch.

    Raises:
        PlanError: for a model that transformers does not serve so.
        RunError: if it could not go on.
    """
    if not prompts:
        return []
    digest = hashlib.sha256(repr([int(seed) for seed in seeds]).encode()).digest()
    seed = int.from_bytes(digest[:4], "little") >> 1
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    with completer.decoding() as model, _left_as_it_was(model):
        outputs = _generate(owner, completer, model, prompts, sampling, seed)
    ends = set(completer.lm.eos_token_ids)
    rows: list[tuple[list[int], list[float]]] = []
    for output in outputs:
        ids = list(output.generated_tokens)
        end = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        if completer.stops is not None:
            end = completer.stops.first_end(ids[:end]) or end
        rows.append((ids[:end], list(output.logprobs[:end])))
    _check(owner, completer, prompts, rows, sampling)
    return [completer.draw(ids, sum(log_probs)) for ids, log_probs in rows]


def _generate(
    owner: str,
    completer: Completer,
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: dict[str, Any],
    seed: int,
) -> list[Any]:
    """transformers' output for each prompt."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    if not hasattr(model, "generate_batch"):
        raise PlanError(f"{owner}: {type(model).__name__} has no generate_batch. Use decoder='local'.")
    at_once = min(completer.batch_size or len(prompts), len(prompts))
    longest = max(map(len, prompts)) + completer.max_new_tokens
    generation = GenerationConfig(
        do_sample=True, max_new_tokens=completer.max_new_tokens, eos_token_id=list(completer.lm.eos_token_ids),
        pad_token_id=completer.lm.pad_token_id, temperature=sampling["temperature"], top_p=sampling["top_p"],
        top_k=sampling["top_k"] or 0, num_return_sequences=1,
    )  # fmt: skip
    batching: Any = ContinuousBatchingConfig(
        return_logprobs=True, seed=seed, max_requests_per_batch=at_once,
        num_blocks=(at_once + 1) * (-(-longest // _PAGE) + 1), max_batch_tokens=_BATCH_TOKENS.get(model.device.type),
    )  # fmt: skip
    setattr(batching, "page_size" if hasattr(batching, "page_size") else "block_size", _PAGE)  # as older releases say
    try:
        found = model.generate_batch(
            [list(prompt) for prompt in prompts], generation_config=generation, continuous_batching_config=batching
        )
    except (ValueError, NotImplementedError, AttributeError, TypeError, KeyError) as error:
        raise PlanError(
            f"{owner}: transformers' continuous batching does not serve {type(model).__name__} "
            f"({type(error).__name__}: {error}). Use decoder='local'."
        ) from error
    outputs = list(found.values())
    failed = [output.error for output in outputs if output.error is not None or not output.is_finished()]
    if failed or len(outputs) != len(prompts):
        raise RunError(
            f"{owner}: transformers' continuous batching finished {len(outputs) - len(failed)} of {len(prompts)} "
            f"completions with {type(model).__name__}: {next(filter(None, failed), 'no reason given')}. Use "
            "decoder='local'."
        )
    return outputs


def _check(
    owner: str,
    completer: Completer,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[tuple[list[int], list[float]]],
    sampling: dict[str, Any],
) -> None:
    places = sorted({0, len(rows) - 1})[:_CHECKED_DRAWS]
    with completer.decoding() as model:
        read = [read_tokens(model, prompts[place], rows[place][0], **sampling) for place in places]
        tolerance = 0.005 if model.dtype == torch.float32 else 0.1
    off, count = difference([rows[place][1] for place in places], read, ("proposal",))
    if not off <= tolerance:
        raise PlanError(
            f"{owner}: under transformers' continuous batching the log-probabilities of {type(model).__name__} are "
            f"{off:.3f} nats from its own, on the mean of {count} tokens, so it draws from another distribution. Use "
            "decoder='local'."
        )


@contextlib.contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """The attention that the model had, and torch's global random numbers, which transformers seeds anew."""
    attention = getattr(model.config, "_attn_implementation", None)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            if getattr(model.config, "_attn_implementation", None) != attention:
                model.set_attn_implementation(attention)
