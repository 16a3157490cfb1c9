"""Rounds of sample, judge, pairs, train and eval, so that preferences are about what the system does now.

Preferences go stale: pairs of the system before training say little of what it does after. Training in rounds is the
iterative form of DPO. Each round starts from the last one's weights; what the reference is differs in the literature:
the system as the last round left it (Iterative RPO, Pang et al. 2024, arXiv 2404.19733; sDPO, Kim et al. 2024, arXiv
2403.19270), or the one that all rounds started from (RLHF Workflow, Dong et al. 2024, arXiv 2405.07863).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sysdag.errors import OptionError
from sysdag.saving.serialization import copy_system
from sysdag.training.job import Interrupted
from sysdag.training.round_options import RoundOptions
from sysdag.training.round_people import People
from sysdag.training.round_record import STAGES, RoundRecord
from sysdag.training.round_stages import NoPairs, Stages


@dataclass(frozen=True, kw_only=True)
class RoundsResult:
    """What rounds gave.

    Attributes:
        best: the round whose system is in `output_dir`; 0 is the system as it started.
        scores: on the held-out inputs, of the system as it started and after each round.
        stopped: why there is no further round.
        folder: `output_dir`.
    """

    best: int
    scores: Sequence[float]
    stopped: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Rounds(RoundOptions):
    """Rounds of sample -> judge -> pairs -> train -> eval on held-out inputs.

    The folder `output_dir` has one folder a round, `round-1`, `round-2`, ..., which is the `output_dir` of the round's
    training, and holds `runs.jsonl`, `pairs.jsonl`, `heldout.jsonl` and `eval.json`, too; `round-0` has the held-out
    runs of the system as it starts. `rounds.json` says which stages are done: a run that was cut off, in whatever
    stage, goes on there and leaves the same files. In the end the best round's system is in `output_dir` itself.

    Its options are those of `RoundOptions`, by keyword.
    """

    def check(self) -> str:
        """Checks options, system and data without loading weights; what would be done, in words."""
        stages = self._stages()
        judge = "people" if isinstance(self.judge, People) else stages.judge(None).name
        share = f", {self.earlier_share:.0%} of the pairs from earlier ones" if self.earlier_share else ""
        return (
            f"{self.rounds} rounds of {stages.inputs_of(1)} inputs, {self.runs} runs each, judged by {judge}; "
            f"evaluated on {len(stages.heldout.rows)} held-out inputs by {stages.eval_judge(None).name}; reference "
            f"{self.reference}{share}; output to {stages.folder}"
        )

    def run(self, say: Callable[[str], None] = print) -> RoundsResult:
        """Runs what is left to do.

        Args:
            say: takes what is told on the way.

        Raises:
            SysdagError: for what cannot be used, or fails; what is done stays, and a later call goes on there.
            OptionError: if `output_dir` holds rounds that were begun otherwise.
            KeyboardInterrupt: after Ctrl-C, with how to go on.
        """
        stages = self._stages()
        limits = {
            name: getattr(self, name) for name in ("rounds", "early_stopping_patience", "early_stopping_threshold")
        }
        record = RoundRecord(stages.folder, stages.identity(), limits)
        try:
            stopped = self._go_through(stages, record, say)
        except KeyboardInterrupt as error:
            told = "" if isinstance(error, Interrupted) else str(error)
            raise KeyboardInterrupt(told or "What is done stays; the same command goes on from there.") from error
        scores = _scores(record)
        best = _best(record)
        if (record.facts.get("best"), record.facts.get("stopped")) != (best, stopped):
            self._publish(stages, best)
        record.facts |= {"best": best, "stopped": stopped, "status": "finished"}
        record.save()
        say(_told(record, stages.folder))
        return RoundsResult(best=best, scores=scores, stopped=stopped, folder=stages.folder)

    def _stages(self) -> Stages:
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1:
            raise OptionError(f"{started} processes were started, and rounds run in one.")
        return Stages(self)

    def _go_through(self, stages: Stages, record: RoundRecord, say: Callable[[str], None]) -> str:
        """Does the stages that are not done; why there is no further round."""
        for number in range(self.rounds + 1):
            if number and (stopped := self._early_stop(record)):
                return stopped
            for name in STAGES if number else STAGES[-1:]:
                if name in record.of(number):
                    continue
                of = f"Round {number} of {self.rounds}" if number else "Before the first round"
                say(f"{of}: {name}; {record.time_left(number, name, self.rounds)}.")
                try:
                    with record.stage(number, name) as given:
                        given |= getattr(stages, f"do_{name}")(number, say)
                except NoPairs as none:
                    if number == 1:
                        raise
                    del record.rounds[number:]
                    return f"round {number} gave no pairs: {none}"
            if "score" not in record.facts:
                record.facts["score"] = stages.score_facts()
                record.save()
            say(f"Held-out {record.facts['score']['name']}: {record.of(number)['eval']['score']:.4g}.")
        return f"{self.rounds} rounds are done"

    def _early_stop(self, record: RoundRecord) -> str | None:
        patience = self.early_stopping_patience
        scores = [_sign(record) * score for score in _scores(record)]
        best, since = scores[0], 0
        for score in scores[1:]:
            better = score > best + self.early_stopping_threshold
            best, since = max(best, score), 0 if better else since + 1
        if patience is None or since < patience:
            return None
        return f"no better held-out score in {since} {'round' if since == 1 else 'rounds'}"

    def _publish(self, stages: Stages, best: int) -> None:
        if best:
            copy_system(stages.place(best), stages.folder)
        else:
            stages.start().save_pretrained(stages.folder)


def _scores(record: RoundRecord) -> list[float]:
    return [each["eval"]["score"] for each in record.rounds if "eval" in each]


def _sign(record: RoundRecord) -> int:
    return -1 if record.facts["score"]["lower_is_better"] else 1


def _best(record: RoundRecord) -> int:
    """The round with the best score, the earliest of equals."""
    scores = [_sign(record) * score for score in _scores(record)]
    return scores.index(max(scores))


def _told(record: RoundRecord, folder: Path) -> str:
    best, name = record.facts["best"], record.facts["score"]["name"]
    lines = [f"{'round':>7}  {name}"]
    for each in record.rounds:
        mark = "  best" if each["round"] == best else ""
        lines.append(f"{each['round'] or 'before':>7}  {each['eval']['score']:.4g}{mark}")
    what = f"round {best}" if best else "the system as it started: no round has a better score"
    return (
        "\n".join(lines)
        + f"\nEnded: {record.facts['stopped']}. The best is {what}; it is in {folder}: "
        + f"System.from_pretrained({str(folder)!r})."
    )
