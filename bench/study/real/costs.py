"""What one step costs on the pretrained model and real pairs: sysdag, TRL's DPOTrainer and the straightforward step.

The same pairs, drafts and adapters for all, moved away from their start; seconds are of scoring and gradients without
the optimizer's update, taken in turns. Before anything is timed, loss and gradients in fp64 must agree to 1e-4 of the
largest gradient. Peak memory is of one step beyond what was there after a first one, in a process of its own. *Passes*
are those of tokens through a trunk, a backward one more each; the floor has each distinct beginning of a text once, in
one pass forward by the reference and one forward and backward by the policy.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.counts import floors
from bench.step_systems import TrlStep, move, our_name, straightforward_step
from bench.study.real import models
from bench.study.real.reward import SIDES
from bench.study.real.setting import BETA, Size
from bench.study.real.sources import Sources, read_pairs
from sysdag.components import CausalLM
from sysdag.data import encode_pairs
from sysdag.engine import SystemModel, accumulate_gradients
from sysdag.objectives import Candidates, EngineOptions, MonteCarlo, ObjectiveOptions

VERSION = 2
SIZES = {"cpu": 2, "gpu": 16, "quick": 2}  # pairs of a step
REPEATS = {"cpu": 3, "gpu": 5, "quick": 1}
HALF_REPEATS = {"cpu": 1, "gpu": 5, "quick": 1}  # a CPU without arithmetic for bf16 takes eight times as long


@dataclass(frozen=True)
class Measured:
    """A row.

    Attributes:
        outline: one of `models.OUTLINES`.
        candidates: of Sampling; 0 for Direct.
        dtype: of the base model's weights; adapters are in fp32.
    """

    outline: str
    candidates: int = 0
    dtype: torch.dtype = torch.float32


SYSTEMS = {
    "one model, DPO": Measured("one node"),
    "draft -> refine, Direct": Measured("draft -> refine"),
    **{f"draft -> refine, Sampling, k = {k}": Measured("draft -> refine", k) for k in (2, 4)},
    "one model, DPO, bf16": Measured("one node", dtype=torch.bfloat16),
}
OURS, SMALL, PLAIN, TRL = "sysdag", "sysdag, 512 tokens at once", "straightforward", "TRL"
MICRO_BATCH_TOKENS = {OURS: EngineOptions().micro_batch_tokens, SMALL: 512}
FLOOR = "floor"


class GivenDrafts(MonteCarlo):
    """The same k texts for every prompt."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__(num_candidates=len(texts))
        self.texts = texts

    def paths(self, plan: Any, rows: Any, latents: Any, generator: Any) -> Candidates:
        prompt = tuple(p for p in range(len(rows)) for _ in self.texts)
        drafts = plan.system["draft"].component.observe([text for _ in range(len(rows)) for text in self.texts])
        return Candidates(rows.select(prompt).updated({"draft": drafts}), prompt)


class RealStep:
    """One system, ready to be computed in each way on the same models and data.

    Args:
        system: of `SYSTEMS`.
        size: of `SIZES`.
    """

    def __init__(self, cache: Path, system: str, size: str, with_trl: bool) -> None:
        sources = Sources.kept(cache)
        measured = SYSTEMS[system]
        outline, candidates = measured.outline, measured.candidates
        rows = read_pairs(sources.pairs[0])
        random.Random(0).shuffle(rows)
        pairs, others = rows[: SIZES[size]], rows[SIZES[size] :]
        drafts = [each["chosen"] for each in others[: max(candidates, 2 * len(pairs))]]
        load = partial(models.load, dtype=measured.dtype)
        made = models.adapted(models.OUTLINES[outline], sources.model, sources.device, Size().lengths, 0, loads=load)
        objective = "sampling" if candidates else "direct"
        self.model = SystemModel(
            made.compile(), ObjectiveOptions(objective=objective, beta=BETA), None,
            GivenDrafts(drafts[:candidates]) if candidates else None, EngineOptions(engine="two_pass"),
        ).to(sources.device)  # fmt: skip
        self.model.move_references(torch.device(sources.device))
        for component in self.model.components.values():
            move(component.module)
        if outline != "one node" and not candidates:
            pairs = [
                row | {f"{side}_intermediates": {"draft": drafts[2 * at + place]} for place, side in enumerate(SIDES)}
                for at, row in enumerate(pairs)
            ]
        self.pairs = encode_pairs(self.model.plan, pairs, objective)
        self.trl: TrlStep | None = None
        if with_trl:
            (policy,) = self.model.components.values()
            assert isinstance(policy, CausalLM)
            rows = [trl_row(row, policy.tokenizer) for row in pairs]
            self.trl = TrlStep(policy, rows, lambda: load(sources.model, sources.device)[0], models.lora())

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=False)
        if self.trl is not None:
            self.trl.trainer.model.zero_grad(set_to_none=False)

    def run(self, way: str) -> Tensor:
        """Adds the step's gradients and returns its loss."""
        if way == PLAIN:
            return straightforward_step(self.model, self.pairs)
        if way == TRL:
            assert self.trl is not None
            return self.trl()
        self.model.budget.max_tokens = MICRO_BATCH_TOKENS[way]
        output = self.model(self.pairs)
        accumulate_gradients(self.model, output)
        return output.loss.detach()

    def gradients(self, way: str) -> dict[str, Tensor]:
        """By our names."""
        if way == TRL and self.trl is not None:
            theirs = self.trl.trainer.model.named_parameters()
            return {f"policies.answer.{our_name(n)}": p.grad.clone() for n, p in theirs if p.grad is not None}
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def weights(self) -> list[torch.nn.Module]:
        """The modules of all ways."""
        modules = [component.module for component in self.model.components.values()]
        return modules if self.trl is None else [*modules, self.trl.trainer.model]

    @contextlib.contextmanager
    def in_fp64(self) -> Iterator[None]:
        """All weights in fp64 for a while, then each in its own dtype again; no gradients before and after."""
        configs = [(module.config, module.config.dtype) for module in self.weights()]
        parameters = [(p, p.dtype) for module in self.weights() for p in module.parameters()]
        wide = torch.float64
        try:
            _cast([(config, wide) for config, _ in configs], [(parameter, wide) for parameter, _ in parameters])
            yield
        finally:
            _cast(configs, parameters)

    def seen(self, ways: Sequence[str]) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
        """Loss and gradients by way."""
        found = {}
        for way in ways:
            self.clear()
            found[way] = self.run(way), self.gradients(way)
        return found

    def passes(self, way: str) -> int:
        """Tokens through a trunk; each with a graph counts twice, for its way back."""
        if way == FLOOR:
            return floors(self.model, self.pairs)["floor_tokens"] * 3 // 2
        seen: list[int] = []

        def look_up(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.append(given[0].numel() * (2 if torch.is_grad_enabled() else 1))

        embeddings = {id(found): found for module in self.weights() if (found := module.get_input_embeddings())}
        hooks = [embedding.register_forward_pre_hook(look_up) for embedding in embeddings.values()]
        try:
            self.clear()
            self.run(way)
        finally:
            for hook in hooks:
                hook.remove()
        return sum(seen)

    def check(self, others: Sequence[str]) -> None:
        """The gate: loss and gradients of sysdag's step against those of other ways.

        In fp64: what products of 30 layers round in fp32 differs with their shapes by more than the gate allows. Where
        weights are in bf16, sysdag's gradients in bf16 are besides at most twice as far from those in fp64 as the
        straightforward step's.
        """
        pairs = self.pairs
        if TRL not in others:  # all graphs of several pairs and candidates in fp64 are more than a machine has
            self.pairs = pairs[:1]
        with self.in_fp64():
            exact = self.seen((OURS, *others))
        for way in others:
            measure.gate_step("real pairs", way, exact[OURS], exact[way])
        if any(parameter.dtype == torch.bfloat16 for parameter in self.model.parameters()):
            (_, truth), seen = exact[OURS], self.seen((OURS, PLAIN))
            rounded = {way: measure.gradient_error(found, truth) for way, (_, found) in seen.items()}
            if not rounded[OURS] <= 2 * rounded[PLAIN]:
                raise SystemExit(
                    f"real pairs in bf16: gradients {rounded[OURS]:.2g} of the largest off, {PLAIN} "
                    f"{rounded[PLAIN]:.2g}; no speed is reported for a wrong result."
                )
        self.pairs = pairs


def _cast(configs: Sequence[tuple[Any, torch.dtype]], parameters: Sequence[tuple[Tensor, torch.dtype]]) -> None:
    for config, dtype in configs:
        config.dtype = dtype
    for parameter, dtype in parameters:
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)


def trl_row(row: Mapping[str, str], tokenizer: Any) -> dict[str, str]:
    """The conversation of the system's node as texts: with messages TRL would score what the template writes behind
    the end of the turn, too (a newline in ChatML)."""
    prompt = tokenizer.apply_chat_template(models.said(row["question"]), add_generation_prompt=True, tokenize=False)
    return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}


def ways(system: str) -> list[str]:
    small = [SMALL] if SYSTEMS[system].candidates else []  # else no micro-batch is so large
    return [OURS, *small, PLAIN, *([TRL] if SYSTEMS[system].outline == "one node" else [])]


def peak(cache: str, system: str, size: str, way: str) -> None:
    """Prints the MiB of one step beyond what is there after a first one; for a process of its own."""
    torch.set_num_threads(1)
    step = RealStep(Path(cache), system, size, with_trl=way == TRL)
    step.run(way)
    step.clear()
    with measure.PeakMemory(Sources.kept(Path(cache)).device) as memory:
        step.run(way)
    print(memory.mib)


def steps(cache: Path, *, method: str, seed: int, size: str, model: str, pairs: str) -> dict[str, Any]:
    """One system in every way.

    Args:
        method: of `SYSTEMS`.
        seed: must be 0: there is one run.
        size: of `SIZES`.
        model, pairs: what tells these rows from those of another model and other data.
    """
    step = RealStep(cache, method, size, with_trl=TRL in ways(method))
    step.check(ways(method)[1:])
    repeats = (HALF_REPEATS if SYSTEMS[method].dtype == torch.bfloat16 else REPEATS)[size]
    timed = measure.interleave(
        {way: partial(step.run, way) for way in ways(method)}, repeats, before=step.clear, warmup=1
    )
    found: dict[str, list[float]] = {f"{way}, seconds": list(each.seconds) for way, each in timed.items()}
    for way in ways(method):
        code = f"from bench.study.real.costs import peak; peak({str(cache)!r}, {method!r}, {size!r}, {way!r})"
        found[f"{way}, MiB"] = [measure.peak_in_a_process(code)]
    for way in (*ways(method), FLOOR) if SYSTEMS[method].dtype == torch.float32 else ():  # which passes do not know
        found[f"{way}, passes"] = [step.passes(way)]
    return {"values": found}
