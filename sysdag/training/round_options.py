"""What rounds are asked to do, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sysdag.errors import OptionError
from sysdag.evaluation.judge_choice import JudgeChoice
from sysdag.evaluation.judges import Judge
from sysdag.graph.system import System
from sysdag.objectives.candidates import CandidateStrategy
from sysdag.training.config import SysDPOConfig
from sysdag.training.round_people import People

REFERENCES = ("last_round", "fixed")


@dataclass(frozen=True, kw_only=True)
class RoundOptions:
    """The options of `Rounds`.

    Attributes:
        system: what is trained: `FILE.py:name`, `package.module:name`, a saved system's folder, or a system whose
            components can be built anew (see `System.fresh`).
        inputs: what it is sampled on: a source of rows (see `sysdag.traces.read_rows`), or rows.
        heldout: what it is evaluated on, likewise; inputs that are in both are refused.
        judge: of the runs of a round: its name and options, a judge, a function, or `People`.
        args: of each round's training; `output_dir` is the rounds'. The seed of round n is `args.seed` + n - 1.
        candidates: for `objective="sampling"`.
        rounds: how many, at most.
        reference: `last_round` moves it: each round's reference is the system as the last one left it. `fixed` keeps
            that of the first.
        earlier_share: share of a round's pairs that are of earlier rounds, drawn at random; in [0, 1). Earlier pairs
            are not judged again. Where there are fewer, all of them are taken.
        inputs_per_round: how many inputs a round samples on, others in each round until all have had their turn; all
            by default.
        seed: of sampling, choosing inputs and mixing.
        runs, batch_size, device: of sampling; see `sysdag sample`. The last two are those of evaluation, too.
        nodes: what a judge sees that does not see whole runs, and what has to differ in a pair; by default the outputs.
        pairs_per_prompt, margin, comparisons: see `sysdag judge`.
        label_threshold: where the loss takes single runs, from which score on one is desirable; `--threshold` of
            `sysdag judge --rows unpaired`. Runs that miss it by less than `margin` are left out.
        eval_judge: of the held-out runs; by default `judge`. One that scores gives the mean score, one that compares
            the win rate against the system as it starts.
        eval_runs, threshold, eval_margin, confidence: see `sysdag eval`.
        early_stopping_patience: end after so many rounds in a row without a better score; None never does.
        early_stopping_threshold: by how much a score has to be better for that.
        split, heldout_split, rename, shape: of `inputs` and `heldout`; see `sysdag.traces.read_rows`.

    Raises:
        OptionError: for an option out of range, or options that contradict each other.
    """

    system: str | System
    inputs: str | Path | Sequence[Mapping[str, Any]]
    heldout: str | Path | Sequence[Mapping[str, Any]]
    judge: JudgeChoice | Judge | Callable[..., Any] | People
    args: SysDPOConfig
    candidates: CandidateStrategy | None = None
    rounds: int = 3
    reference: Literal["last_round", "fixed"] = "last_round"
    earlier_share: float = 0.0
    inputs_per_round: int | None = None
    seed: int = 0
    runs: int = 4
    batch_size: int = 16
    device: str = "auto"
    nodes: Sequence[str] | None = None
    pairs_per_prompt: int = 1
    margin: float = 0.0
    comparisons: int = 15
    label_threshold: float | None = None
    eval_judge: JudgeChoice | Judge | Callable[..., Any] | None = None
    eval_runs: int = 1
    threshold: float | None = None
    eval_margin: float = 0.0
    confidence: float = 0.95
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    split: str = "train"
    heldout_split: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    shape: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("rounds", 1), ("runs", 1), ("batch_size", 1), ("inputs_per_round", 1), ("eval_runs", 1),
            ("pairs_per_prompt", 1), ("comparisons", 1), ("margin", 0), ("eval_margin", 0), ("seed", 0),
            ("early_stopping_patience", 1), ("early_stopping_threshold", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise OptionError(f"{name} must be {least} or more, got {value}.")
        if not 0 <= self.earlier_share < 1:
            raise OptionError(f"earlier_share must be in [0, 1), got {self.earlier_share}: some pairs are fresh.")
        if not 0 < self.confidence < 1:
            raise OptionError(f"confidence must be between 0 and 1, got {self.confidence}.")
        if self.reference not in REFERENCES:
            raise OptionError(f"reference must be one of {list(REFERENCES)}, got {self.reference!r}.")
        if self.reference == "fixed" and self.args.sync_ref_model:
            raise OptionError("reference 'fixed' stays as it is, and sync_ref_model moves it; choose one of them.")
        if self.reference == "fixed" and not self.args.objective_options().needs_reference:
            raise OptionError(f"reference 'fixed' has no use: {self.args.loss_type} is trained without a reference.")
        if isinstance(self.judge, People) and self.eval_judge is None:
            raise OptionError(
                "People judge the pairs of a round; name who judges the held-out runs (eval: by), as a function or an "
                "endpoint."
            )
        if isinstance(self.judge, People) and self.nodes:
            raise OptionError("nodes: people judge the outputs, about which the pairs are; leave it out.")
        self._check_rows()
        if isinstance(self.judge, People):
            self.judge.check()
        if self.args.resume_from_checkpoint is not None:
            raise OptionError("resume_from_checkpoint: rounds go on by themselves where they were cut off; leave it.")
        if self.args.load_best_model_at_end:
            raise OptionError(
                "load_best_model_at_end: a round's training has no evaluation of its own; rounds keep the best round."
            )
        if self.args.push_to_hub:
            raise OptionError("push_to_hub would push every round; push the best one: System.push_to_hub.")

    def _check_rows(self) -> None:
        """Pairs and single runs are made in ways of their own."""
        loss = self.args.loss_type
        if not self.args.objective_options().is_unpaired:
            if self.label_threshold is not None:
                raise OptionError(f"judge: threshold labels single runs, and {loss} is trained on pairs; leave it out.")
            return
        if isinstance(self.judge, People):
            raise OptionError(
                f"{loss} is trained on single runs with a label, and people judge pairs here. Collect thumbs by "
                "`sysdag label --collect thumbs` and train on them by `sysdag train`, or choose a loss of pairs."
            )
        if self.label_threshold is None or not math.isfinite(self.label_threshold):
            raise OptionError(
                f"{loss} is trained on single runs with a label: give the score from which on a run is desirable, a "
                f"finite number (judge: threshold), got {self.label_threshold}."
            )
        for name in ("pairs_per_prompt", "comparisons"):
            if getattr(self, name) != getattr(RoundOptions, name):
                raise OptionError(f"{name} is about pairs, and {loss} is trained on single runs; leave it out.")
