"""What a loss without a reference saves: `python -m bench reference_free [--threads 2] [--repeats 5] [--csv]`.

SysDPO-Sampling of two language models (see `bench.step`) by `sigmoid`, which scores policy and reference, and by
`simpo`, which has no reference. `scored` counts the sequences that a step's first pass scores, `scoring` is the time of
that pass alone, as an evaluation takes it, `step` that of scores and gradients in two passes; `weights_mib` is what
policies and references hold, each tensor once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench import measure
from bench.step_systems import BETA, SIZES, Case, GivenPaths, build
from sysdag.components import CausalLM
from sysdag.data import encode_pairs
from sysdag.engine import SystemModel, accumulate_gradients
from sysdag.objectives import EngineOptions, ObjectiveOptions

BASELINE = "sigmoid"


class Trained:
    """One case under one loss."""

    def __init__(self, case: Case, loss: str) -> None:
        torch.manual_seed(0)
        system, rows = build(case)
        size, plan = SIZES[case.size], system.compile()
        options = ObjectiveOptions(objective="sampling", beta=BETA, loss_type=(loss,))
        engine = EngineOptions(engine="two_pass", micro_batch_tokens=size.micro_batch)
        self.model = SystemModel(plan, options, None, GivenPaths(case.candidates, size), engine)
        self.pairs = encode_pairs(plan, rows, "sampling")

    def score(self) -> None:
        with torch.no_grad():
            self.model(self.pairs)

    def step(self) -> None:
        accumulate_gradients(self.model, self.model(self.pairs))

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=False)

    def scored(self) -> int:
        """Sequences of a first pass; the searches for what a model can take are over by then."""
        log_prob, count = CausalLM.log_prob, 0

        def counting(component: CausalLM, inputs: Sequence[Any], draws: Sequence[Any]) -> Any:
            nonlocal count
            count += len(draws)
            return log_prob(component, inputs, draws)

        CausalLM.log_prob = counting  # type: ignore[method-assign]
        try:
            self.score()
        finally:
            CausalLM.log_prob = log_prob  # type: ignore[method-assign]
        return count

    def weights_mib(self) -> float:
        modules = [*self.model.components.values(), *self.model.references.values()]
        held = {p.data_ptr(): p.numel() * p.element_size() for m in modules if m.module for p in m.module.parameters()}
        return sum(held.values()) / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "reference_free", arguments, devices=["cpu"], threads=2, repeats=5)
    rows = []
    for lora in (False, True):
        case = Case("two LLMs", candidates=2, lora=lora)
        trained = {loss: Trained(case, loss) for loss in (BASELINE, "simpo")}

        def clear(trained: dict[str, Trained] = trained) -> None:
            for each in trained.values():
                each.clear()

        for what in ("score", "step"):
            times = measure.interleave(
                {loss: getattr(each, what) for loss, each in trained.items()}, options.repeats, before=clear, warmup=1
            )
            found = measure.rows(times, baseline=BASELINE, what=what, trained=case.trained, k=case.candidates)
            for row in found:
                row |= {"scored": trained[row["name"]].scored(), "weights_mib": trained[row["name"]].weights_mib()}
            rows += found
    measure.report("without a reference", rows, options.csv)
