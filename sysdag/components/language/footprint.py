"""The memory of a language model's part in a training step, from its config alone: no weights are loaded.

The model is built of fake tensors, which have shapes and devices and no numbers, and one micro-batch is scored on it;
autograd then says what its graph would save, kernel by kernel as the device would choose them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sysdag.components import acceleration, adapter
from sysdag.components.footprint import Footprint, bytes_of, make_fake
from sysdag.components.language import key_value_slabs, packed_inputs, trie_pieces
from sysdag.components.language.language_head import TokenScorer
from sysdag.components.memory import SavedBytes
from sysdag.components.precision import optimizer_bytes

if TYPE_CHECKING:
    from peft import PeftConfig

_TILE = {"cpu": 8 << 20, "cuda": 192 << 20}  # of logits, in `linear_logprob`; on a GPU with what they are folded into


def of_language_model(
    auto_class: Any,
    config: Any,
    dtype: torch.dtype,
    peft_config: PeftConfig | None,
    *,
    tokens: int,
    labels: int,
    trains: bool,
    checkpoints: bool,
    device: str,
    constrained: bool = False,
) -> Footprint:
    """A language model's.

    Args:
        auto_class: of transformers, which makes such a model of its config.
        config: of transformers.
        tokens: of a micro-batch, packed into one row.
        labels: how many of them are scored.
        trains: False for a model that is frozen.
        checkpoints: whether it recomputes its activations (gradient checkpointing).
        device: `cpu` or `cuda`, whose kernels are assumed.
        constrained: whether a grammar constrains the logits, for which all of them are made.
    """

    def constrain(logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool), -torch.inf)

    def score(model: Any) -> None:
        inputs = {
            "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
            "attention_mask": packed_inputs.tries_mask(
                model,
                torch.zeros(1, tokens, dtype=torch.int64),
                trie_pieces.one_branch(tokens - labels, tokens),
                torch.device(device),
            ),
            "position_ids": torch.zeros(1, tokens, dtype=torch.int64),
        }
        rows = torch.zeros(labels, dtype=torch.int64)
        TokenScorer(model, is_checked=True)(inputs, rows, rows, constrain if constrained else None)

    found = of_model(
        auto_class, config, dtype, peft_config, score, trains=trains, checkpoints=checkpoints, device=device
    )
    if not constrained:
        return found
    # All logits and, backward, their gradient; of the labels' rows a log-softmax in fp32 and its gradient.
    vocabulary = config.get_text_config(decoder=True).vocab_size
    logits = vocabulary * (tokens * dtype.itemsize + 2 * labels * torch.float32.itemsize)
    return replace(found, working=found.working + logits)


def of_model(
    auto_class: Any,
    config: Any,
    dtype: torch.dtype,
    peft_config: PeftConfig | None,
    score: Callable[[Any], None],
    *,
    trains: bool,
    checkpoints: bool,
    device: str,
) -> Footprint:
    """A language model's whose micro-batch is what `score` does.

    Args:
        auto_class: of transformers, which builds the model of its config.
        score: scores one micro-batch with the model, whose tensors are fake.
        trains, checkpoints, device: see `of_language_model`.
    """
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype)
        base = sum(bytes_of(parameter) for parameter in model.parameters())
        if peft_config is not None:
            adapter.attach(model, peft_config)
    if not trains:
        model.requires_grad_(False)
    model.train()
    if checkpoints and trains:
        acceleration.enable_checkpointing(model, {"use_reentrant": False})
    with FakeTensorMode(), torch.device(device):
        make_fake(model)
        saved = SavedBytes()
        with saved if trains else contextlib.nullcontext(), torch.set_grad_enabled(trains):
            score(model)
        head = model.get_output_embeddings().weight
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = sum(bytes_of(parameter) for parameter in model.parameters())
        return Footprint(
            weights=weights,
            base=0 if peft_config is None else base,
            trained=sum(map(bytes_of, trained)),
            optimizer=optimizer_bytes(trained),
            reference=weights if trained and peft_config is None else 0,
            graph=saved.total,
            working=_TILE[device] + (bytes_of(head) if head.requires_grad else 0),
        )


def of_decoding(auto_class: Any, config: Any, dtype: torch.dtype, *, rows: int, longest: int, device: str) -> int:
    """Bytes that decoding rows of at most so many tokens side by side takes beside the weights.

    Slabs of keys and values, those of one layer twice while rows enter or room is made; states; and three copies of
    the logits. What reads the prompts takes less, as a rule.
    """
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype).eval()
    read = 8
    with FakeTensorMode(), torch.device(device), torch.no_grad():
        make_fake(model)
        output = model(input_ids=torch.zeros(1, read, dtype=torch.int64), use_cache=True)
        cache, vocabulary = getattr(output, "past_key_values", None), output.logits.shape[-1]
        grows, stays = [0], 0
        for layer in getattr(cache, "layers", ()):
            tensors = [
                part for part in (getattr(layer, "keys", None), getattr(layer, "values", None)) if part is not None
            ]
            grows.append(sum(map(bytes_of, tensors)) // read)
            states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
            stays += sum(bytes_of(state) for state in states if state is not None)
        logits = 3 * vocabulary * torch.float32.itemsize
    return rows * ((longest + key_value_slabs.ROOM) * (sum(grows) + max(grows)) + stays + logits)
