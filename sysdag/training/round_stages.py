"""The stages of a round, each from files to files by what the command of its name does."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from sysdag.errors import DataError, JudgeError, OptionError
from sysdag.evaluation.evaluation_runs import HeldOut, held_out, sample_runs
from sysdag.evaluation.judges import Judge, ScoringJudge
from sysdag.evaluation.labels import label_runs
from sysdag.evaluation.measures import SEED_OF_THE_OTHER, check_options, evaluate, evaluation_record, match
from sysdag.evaluation.ranking import Judged, choose_pairs, judge_runs
from sysdag.evaluation.verdicts import consistency
from sysdag.execution.batches import Runs
from sysdag.execution.trace_file import identity
from sysdag.files.atomic import write_text
from sysdag.files.encoding import encode_json
from sysdag.graph.plan import Plan
from sysdag.graph.system import System
from sysdag.objectives.loss_checks import check_losses
from sysdag.objectives.strategy_options import strategy_options
from sysdag.saving.loading import load_system
from sysdag.traces.pairs import preference_row, write_pairs
from sysdag.traces.readers import read_rows
from sysdag.traces.trace import Trace
from sysdag.traces.unpaired import unpaired_row
from sysdag.training.job import train
from sysdag.training.round_judging import judge_facts, judge_of, with_scores
from sysdag.training.round_options import RoundOptions
from sysdag.training.round_people import People, labelled_rows
from sysdag.training.series import comparable, last_checkpoint
from sysdag.training.train_options import TrainJob

RUNS, PAIRS, MIXED = "runs.jsonl", "pairs.jsonl", "train.jsonl"
HELDOUT, EVALUATION, LABELS = "heldout.jsonl", "eval.json", "labels.sqlite"
_UNFINISHED = "unfinished-"


class NoPairs(JudgeError):
    """A round's runs gave no preference."""


class Stages:
    """What each stage of rounds does.

    Args:
        rounds: what is asked for.

    Raises:
        SysdagError: for a system, data or judges that cannot be used.
    """

    def __init__(self, rounds: RoundOptions) -> None:
        self.rounds = rounds
        self.folder = Path(rounds.args.output_dir or "trainer_output")
        if self.folder.is_file():
            raise OptionError(f"output_dir {self.folder} is a file; name a folder.")
        self._outline = rounds.system if isinstance(rounds.system, System) else load_system(rounds.system)
        plan = self._outline.compile()
        plan.check(rounds.args.objective_options().objective)
        check_losses(plan, rounds.args.objective_options())
        self._outputs = tuple(plan.system.outputs)
        self._judged = tuple(rounds.nodes or self._outputs)
        if missing := [name for name in self._judged if name not in plan.order]:
            raise OptionError(f"nodes: the system has no node {missing[0]!r}; its nodes are {list(plan.order)}.")
        self._inputs = self._read(plan, rounds.inputs, rounds.split, "inputs")
        split = rounds.heldout_split or ("train" if _is_one_split(rounds.heldout) else "test")
        self.heldout = self._read(plan, rounds.heldout, split, "heldout")
        _refuse_shared(self._inputs, self.heldout)
        if not isinstance(rounds.judge, People):
            check_options(self.judge(None), threshold=rounds.label_threshold, margin=rounds.margin)
        check_options(self.eval_judge(None), threshold=rounds.threshold, margin=rounds.eval_margin)

    def _read(self, plan: Plan, source: Any, split: str, option: str) -> HeldOut:
        is_source = isinstance(source, (str, Path))
        rename, shape = self.rounds.rename, self.rounds.shape
        rows = read_rows(source, split=split, rename=rename, shape=shape) if is_source else list(source)
        try:
            return held_out(plan, rows, distinct=True)
        except DataError as error:
            raise DataError(f"{option}{f' {source}' if is_source else ''}: {error}") from error

    def place(self, number: int) -> Path:
        """The folder of a round."""
        return self.folder / f"round-{number}"

    def start(self) -> System:
        """The system as it starts, built anew."""
        return self._outline.fresh()

    def after(self, number: int) -> System:
        """The system as a round left it, built anew; number 0: as it starts."""
        return self._outline.load(self.place(number)) if number else self.start()

    def judge(self, output: Path | None) -> Judge:
        """Of the pairs; an endpoint's answers are kept beside `output`."""
        assert not isinstance(self.rounds.judge, People)
        return judge_of(self.rounds.judge, output)

    def eval_judge(self, output: Path | None) -> Judge:
        """Of the held-out runs."""
        chosen = self.rounds.eval_judge if self.rounds.eval_judge is not None else self.rounds.judge
        assert not isinstance(chosen, People)
        return judge_of(chosen, output)

    def identity(self) -> dict[str, Any]:
        """All that the files of rounds depend on, JSON-ready."""
        rounds = self.rounds
        names = (
            "reference", "earlier_share", "inputs_per_round", "pairs_per_prompt", "margin", "comparisons", "eval_runs",
            "threshold", "eval_margin", "confidence",
        )  # fmt: skip
        wanted = Runs(
            inputs=self._inputs.inputs, runs=rounds.runs, seed=rounds.seed, batch_size=rounds.batch_size
        )  # fmt: skip
        people = isinstance(rounds.judge, People)
        single = {} if rounds.label_threshold is None else {"label_threshold": rounds.label_threshold}
        return {
            **single,
            "sampling": identity(self._outline.compile(), wanted),
            **{name: getattr(rounds, name) for name in names},
            "nodes": list(self._judged),
            "inputs_sha256": _hash_of(self._inputs),
            "heldout_sha256": _hash_of(self.heldout),
            "judge": {"kind": "people"} if people else judge_facts(self.judge(None)),
            "eval_judge": judge_facts(self.eval_judge(None)),
            "candidates": None if rounds.candidates is None else strategy_options(rounds.candidates),
            "train": comparable(rounds.args),
        }

    def score_facts(self) -> dict[str, Any]:
        """What is measured on the held-out inputs."""
        judge = self.eval_judge(None)
        if isinstance(judge, ScoringJudge):
            return {"name": f"mean score by {judge.name}", "lower_is_better": judge.lower_is_better}
        return {"name": f"win rate against the start by {judge.name}", "lower_is_better": False}

    def inputs_of(self, number: int) -> int:
        """How many inputs a round samples on."""
        return len(self._chosen(number).rows)

    def _chosen(self, number: int) -> HeldOut:
        """The inputs of a round: the next ones of an order in which all have had their turn before any comes again."""
        given, count = self._inputs, self.rounds.inputs_per_round
        total = len(given.rows)
        if count is None or count >= total:
            return given
        places: list[int] = []
        first = (number - 1) * count
        for turn in range(first // total, (first + count - 1) // total + 1):
            order = list(range(total))
            random.Random(f"inputs {self.rounds.seed} {turn}").shuffle(order)
            places += order
        start = first % total
        rows = sorted(dict.fromkeys(places[start : start + count]))
        return HeldOut(
            [given.rows[row] for row in rows],
            {name: [column[row] for row in rows] for name, column in given.inputs.items()},
            {name: [column[row] for row in rows] for name, column in given.extras.items()},
        )

    def do_sample(self, number: int, say: Callable[[str], None]) -> dict[str, Any]:
        """Runs the system as the last round left it; writes `runs.jsonl`."""
        seed = self.rounds.seed + (number + 1) * SEED_OF_THE_OTHER
        trace = self._sampled(number - 1, self._chosen(number), self.place(number) / RUNS, self.rounds.runs, seed)
        return {"runs": len(trace), "seed": seed}

    def do_judge(self, number: int, say: Callable[[str], None]) -> dict[str, Any]:
        """Makes preferences of the runs; writes `pairs.jsonl`."""
        rounds, place = self.rounds, self.place(number) / PAIRS
        trace = Trace.load(self.place(number) / RUNS)
        given: dict[str, Any] = {}
        if isinstance(rounds.judge, People):
            database = self.place(number) / LABELS
            rows, told = labelled_rows(rounds.judge, trace, database, self._outputs, seed=rounds.seed, say=say)
        else:
            judge = self.judge(place)
            trace = with_scores(judge, trace, self.place(number) / RUNS)
            judged = judge_runs(trace, judge, self._judged, comparisons=rounds.comparisons)
            if judged.verdicts:
                say(str(consistency(judged.verdicts)))
            elif isinstance(judge, ScoringJudge):
                given["score"] = fmean(score for score in judged.scores if score is not None)
            rows, told = self._rows(trace, judged)
        say(told)
        if not rows:
            raise NoPairs(told)
        write_pairs(place, rows)
        return {"pairs": len(rows), **given}

    def _rows(self, trace: Trace, judged: Judged) -> tuple[list[dict[str, Any]], str]:
        """Rows for training of judged runs, and what became of these in words."""
        rounds = self.rounds
        if rounds.label_threshold is not None:
            labelled = label_runs(trace, judged, self._judged, threshold=rounds.label_threshold, margin=rounds.margin)
            runs = zip(labelled.runs, labelled.labels, strict=True)
            return [unpaired_row(trace, run, label, self._outputs) for run, label in runs], str(labelled)
        found = choose_pairs(
            trace, judged, self._judged, pairs_per_prompt=rounds.pairs_per_prompt, margin=rounds.margin
        )
        return [preference_row(trace, *pair, self._outputs) for pair in found.pairs], str(found)

    def do_train(self, number: int, say: Callable[[str], None]) -> dict[str, Any]:
        """Trains on the round's pairs and, by the share, on earlier ones; the round's folder gets the system."""
        folder = self.place(number)
        fresh, earlier = self._mixed(number)
        data = folder / (MIXED if earlier else PAIRS)
        if earlier:
            write_pairs(data, [*fresh, *earlier])
        args = copy.copy(self.rounds.args)
        args.output_dir, args.seed = str(folder), args.seed + number - 1
        args.resume_from_checkpoint = last_checkpoint(folder)
        fixed = self.rounds.reference == "fixed"
        job = TrainJob(
            system=self.after(0 if fixed else number - 1),
            weights=self.place(number - 1) if fixed and number > 1 else None,
            dataset=str(data),
            candidates=self.rounds.candidates,
            args=args,
        )
        trainer = train(job, say)
        assert trainer is not None  # no dry run
        steps = int(trainer.state.global_step)
        del trainer, job
        _free_memory()
        return {"fresh": len(fresh), "earlier": len(earlier), "steps": steps, "seed": args.seed}

    def _mixed(self, number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The pairs of a round, and those of earlier rounds that are trained on besides."""
        fresh = read_rows(self.place(number) / PAIRS)
        share = self.rounds.earlier_share
        before = [row for each in range(1, number) for row in read_rows(self.place(each) / PAIRS)] if share else []
        count = min(round(share / (1 - share) * len(fresh)), len(before))
        chosen = random.Random(f"earlier {self.rounds.seed} {number}").sample(range(len(before)), count)
        return fresh, [before[row] for row in sorted(chosen)]

    def do_eval(self, number: int, say: Callable[[str], None]) -> dict[str, Any]:
        """Runs the system as the round left it on the held-out inputs; writes `heldout.jsonl` and `eval.json`."""
        rounds, folder = self.rounds, self.place(number)
        seed = rounds.seed + (0 if number else SEED_OF_THE_OTHER)
        ours = self._sampled(number, self.heldout, folder / HELDOUT, rounds.eval_runs, seed)
        judge = self.eval_judge(folder / EVALUATION)
        ours = with_scores(judge, ours, folder / HELDOUT)
        if not number:
            return {"score": fmean(judge.scores(ours)) if isinstance(judge, ScoringJudge) else 0.5}
        start = self.place(0) / HELDOUT
        theirs = with_scores(judge, Trace.load(start), start)
        found = evaluate(
            judge, match(ours, theirs), self._judged, threshold=rounds.threshold, margin=rounds.eval_margin,
            confidence=rounds.confidence, seed=rounds.seed,
        )  # fmt: skip
        sources = {"traces": [f"round-{number}/{HELDOUT}", f"round-0/{HELDOUT}"]}
        facts = evaluation_record(
            found, judge, self._judged, sources=sources, seed=rounds.seed, margin=rounds.eval_margin
        )
        write_text(folder / EVALUATION, json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        measured = found.win_rate if found.scores is None else found.scores.first
        interval = None if measured.low != measured.low else [measured.low, measured.high]
        return {"score": measured.estimate, "interval": interval, "win_rate": found.win_rate.estimate}

    def _sampled(self, number: int, given: HeldOut, file: Path, runs: int, seed: int) -> Trace:
        """Runs of the system as a round left it, written to a file, whole; what was cut off goes on."""
        if not file.is_file():
            unfinished = file.with_name(f"{_UNFINISHED}{file.name}")
            trace = sample_runs(
                self.after(number).compile(), given, runs=runs, seed=seed, batch_size=self.rounds.batch_size,
                device=self.rounds.device, keep=unfinished,
            )  # fmt: skip
            trace.save(file)
            _free_memory()
        for left in file.parent.glob(f"{_UNFINISHED}{file.name}*"):
            left.unlink()
        return Trace.load(file)


def _is_one_split(source: Any) -> bool:
    return not isinstance(source, (str, Path)) or Path(source).is_file()


def _refuse_shared(inputs: HeldOut, heldout: HeldOut) -> None:
    """Refuses inputs that are sampled on and evaluated on."""
    known = {key: number for number, key in enumerate(_keys(inputs))}
    both = [(known[key], number) for number, key in enumerate(_keys(heldout)) if key in known]
    if both:
        raise DataError(
            f"{len(both)} held-out inputs are among those that pairs are sampled on, so their score would say nothing: "
            f"row {both[0][1]} of heldout is row {both[0][0]} of inputs. Leave them out of one of the two."
        )


def _keys(given: HeldOut) -> list[str]:
    names = sorted(given.inputs)
    return [
        json.dumps([encode_json(given.inputs[name][row], name) for name in names]) for row in range(len(given.rows))
    ]


def _hash_of(given: HeldOut) -> str:
    extras = json.dumps({name: encode_json(list(column), name) for name, column in sorted(given.extras.items())})
    return hashlib.sha256("\n".join([*_keys(given), extras]).encode()).hexdigest()


def _free_memory() -> None:
    """Lets the models of one stage go before those of the next are loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
