"""`sysdag judge`: from traces to rows for training, by a function, a language model or feedback that is there."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sysdag.commands import judge_options
from sysdag.commands.files import check_output
from sysdag.commands.given import refuse
from sysdag.errors import JudgeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sysdag.evaluation.judges import Judge
    from sysdag.evaluation.ranking import Judged
    from sysdag.traces.trace import Trace

_OF_PAIRS = ("pairs_per_prompt", "pairing", "weighting", "margin_scale")
_OF_ROWS = (*_OF_PAIRS, "margin", "rows", "threshold")


class Rows(StrEnum):
    pairs = "pairs"
    unpaired = "unpaired"


class Pairing(StrEnum):
    ends = "ends"
    all = "all"


class Weighting(StrEnum):
    prompt = "prompt"
    gap = "gap"


def judge(
    context: typer.Context,
    traces: Annotated[
        list[Path],
        typer.Argument(metavar="TRACES", help="Traces that sysdag sample or import wrote, .jsonl or .parquet."),
    ],
    by: judge_options.By,
    output: Annotated[
        Path | None, typer.Option(help="The file of rows for training to write, ending in .jsonl or .parquet.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the traces with their scores as a column, .jsonl or .parquet."),
    ] = None,
    score_name: Annotated[str, typer.Option(help="For --scores: the column's name.")] = "score",
    holds: judge_options.Holds = judge_options.Kind.scores,
    rows: Annotated[
        Rows, typer.Option(help="What --output gets: pairs of runs, or single runs with a label (as for KTO).")
    ] = Rows.pairs,
    pairing: Annotated[
        Pairing,
        typer.Option(
            help="Of pairs: best against worst and so on inwards, or every better run against every worse one."
        ),
    ] = Pairing.ends,
    pairs_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Pairs of each prompt, at most; by default 1, and with --pairing all all.")
    ] = None,
    weighting: Annotated[
        Weighting | None,
        typer.Option(
            help="Of pairs: write a column weight that sums to 1 for each prompt, in equal shares or by how far apart "
            "the scores or ranks are."
        ),
    ] = None,
    margin: Annotated[
        float,
        typer.Option(min=0, help="Least difference of the scores of a pair; or by how much a false label misses."),
    ] = 0.0,
    margin_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of pairs: write a column margin, so many times the difference of the scores; training reads it.",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Of unpaired rows: the score (or rank) from which on a run is labelled true."),
    ] = None,
    comparisons: Annotated[
        int,
        typer.Option(min=1, help="Of a judge that compares: comparisons of each prompt's runs at most; 15: all of 6."),
    ] = 15,
    node: judge_options.Nodes = None,
    system: Annotated[
        str | None,
        typer.Option(help="SYSTEM.py:name, package.module:name or a saved system's folder, whose outputs are judged."),
    ] = None,
    lower_is_better: judge_options.LowerIsBetter = False,
    model: judge_options.Model = None,
    api_key_env: judge_options.ApiKeyEnv = None,
    criteria: judge_options.Criteria = None,
    template: judge_options.Template = None,
    request: judge_options.Request = None,
    concurrency: judge_options.Concurrency = 8,
    timeout: judge_options.Timeout = 120.0,
    retries: judge_options.Retries = 6,
    cache: judge_options.Cache = None,
) -> None:
    """Rank the runs of each prompt and write preference pairs, or label single runs and write unpaired rows.

    A function score(run) gets a dict of the values of inputs and nodes; prefer(first, second) returns 1, 0 or -1, or
    the probability that the first is better. Judges that compare are asked in both orders, and a preference counts
    where both agree. What an endpoint answered is kept, so a judging that was cut off goes on where it was.
    """
    if output is None and scores is None:
        raise typer.BadParameter("Name --output for preference pairs, --scores for scored traces, or both.")
    if node and system:
        raise typer.BadParameter("--node and --system both name the nodes that are judged; give one of them.")
    for option, path in (("--output", output), ("--scores", scores)):
        if path is not None and path.suffix not in (".jsonl", ".parquet"):
            raise typer.BadParameter(f"{option} {path}: its ending must be .jsonl or .parquet.")
    if output is not None and scores is not None and output.resolve() == scores.resolve():
        raise typer.BadParameter(f"--output and --scores are both {output}; pairs and runs go to files of their own.")
    check_output("--output", output, traces)
    check_output("--scores", scores, traces)
    if output is None:
        refuse(context, _OF_ROWS, "is about rows for training, and there is no --output for them.")
    if rows is Rows.unpaired:
        refuse(context, _OF_PAIRS, "is about pairs, and --rows unpaired makes none.")
    else:
        refuse(context, ("threshold",), "is about labels: --rows unpaired.")
    if scores is None:
        refuse(context, ("score_name",), "names the column of --scores, which is not given.")
    files = [*traces, *filter(None, (output, scores))]
    chosen = judge_options.reading(context, judge_options.chosen_judge(context, output or scores, files))

    from sysdag.evaluation.judges import ScoringJudge
    from sysdag.evaluation.measures import check_options
    from sysdag.evaluation.ranking import judge_runs
    from sysdag.evaluation.verdicts import consistency
    from sysdag.saving.loading import load_system
    from sysdag.traces.pairs import NOT_CARRIED, output_names

    check_options(chosen, margin=margin, threshold=threshold)
    threshold = _threshold(context, chosen, rows, threshold, holds)
    if isinstance(chosen, ScoringJudge):
        refuse(context, ("comparisons",), f"belongs to a judge that compares; {chosen.name} gives scores.")
    else:
        refuse(context, ("margin_scale",), f"needs scores, and {chosen.name} compares two runs.")
    trace = _read_traces(traces, chosen)
    outputs = output_names(trace, load_system(system).outputs if system else node)
    if scores is not None and score_name != by and score_name in trace.columns:
        raise JudgeError(f"The traces have a column {score_name!r} already; name another one (--score-name).")
    judged = judge_runs(trace, chosen, outputs, comparisons=comparisons)
    if judged.verdicts:
        typer.echo(str(consistency(judged.verdicts)), err=True)
    if scores is not None:
        replace(trace, columns={**trace.columns, score_name: list(judged.scores)}).save(scores)
        typer.echo(f"Wrote {len(trace)} scored runs to {scores}.", err=True)
    if output is None:
        return
    if rows is Rows.unpaired:
        assert threshold is not None
        told = _write_unpaired(output, trace, judged, outputs, threshold=threshold, margin=margin)
    else:
        told = _write_pairs(
            output, trace, judged, outputs, pairs_per_prompt=pairs_per_prompt, margin=margin, pairing=pairing,
            weighting=weighting, margin_scale=margin_scale,
        )  # fmt: skip
    typer.echo(told)
    if left := sorted(NOT_CARRIED & trace.columns.keys() - {"prompt", "run", by}):
        typer.echo(
            f"Columns of the runs that would mean something else in rows, and stay behind: {', '.join(left)}.", err=True
        )
    typer.echo(f"Wrote them to {output}.", err=True)


def _threshold(
    context: typer.Context, judge: Judge, rows: Rows, threshold: float | None, holds: judge_options.Kind
) -> float | None:
    """From which score on a run is labelled true; None for pairs."""
    from sysdag.evaluation.judges import ScoringJudge

    if rows is Rows.pairs:
        return None
    if not isinstance(judge, ScoringJudge):
        raise JudgeError(
            f"{judge.name} compares runs with each other and says of none that it is good; --rows unpaired needs a "
            "column or a function of one run."
        )
    if holds is judge_options.Kind.thumbs:
        refuse(context, ("margin",), "belongs to scores and ranks; thumbs say which runs are good.")
        if threshold is not None:
            raise typer.BadParameter("--threshold belongs to scores and ranks; thumbs say which runs are good.")
        return 0.5
    if threshold is None:
        raise typer.BadParameter(
            "--rows unpaired needs --threshold, the score (or rank) from which on a run is good; or --holds thumbs."
        )
    return threshold


def _write_pairs(
    output: Path,
    trace: Trace,
    judged: Judged,
    outputs: Sequence[str],
    *,
    pairs_per_prompt: int | None,
    margin: float,
    pairing: Pairing,
    weighting: Weighting | None,
    margin_scale: float | None,
) -> str:
    """Writes preference pairs, and says what became of the runs."""
    from sysdag.evaluation.ranking import choose_pairs
    from sysdag.traces.pairs import preference_row, write_pairs

    found = choose_pairs(
        trace, judged, outputs, pairs_per_prompt=pairs_per_prompt, margin=margin, pairing=pairing.value
    )
    if not found.pairs:
        raise JudgeError(f"{output} is not written: {found}")
    made = [preference_row(trace, *pair, outputs) for pair in found.pairs]
    columns: dict[str, Sequence[float]] = {}
    if weighting is not None:
        columns["weight"] = found.weights(judged, weighting.value)
    if margin_scale is not None:
        columns["margin"] = [margin_scale * judged.gap(*pair) for pair in found.pairs]
    for name, values in columns.items():
        if name in trace.inputs:
            raise JudgeError(
                f"The system has an input {name!r}, so pairs cannot have a column of that name for training."
            )
        for row, value in zip(made, values, strict=True):
            row[name] = value
    write_pairs(output, made)
    return str(found)


def _write_unpaired(
    output: Path, trace: Trace, judged: Judged, outputs: Sequence[str], *, threshold: float, margin: float
) -> str:
    """Writes unpaired rows, and says what became of the runs."""
    from sysdag.evaluation.labels import label_runs
    from sysdag.traces.pairs import write_pairs
    from sysdag.traces.unpaired import unpaired_row

    found = label_runs(trace, judged, outputs, threshold=threshold, margin=margin)
    if not found.runs:
        raise JudgeError(f"{output} is not written: {found}")
    pairs = zip(found.runs, found.labels, strict=True)
    write_pairs(output, [unpaired_row(trace, run, label, outputs) for run, label in pairs])
    return str(found)


def _read_traces(paths: list[Path], judge: Judge) -> Trace:
    """The runs of several files, one after the other.

    Raises:
        DataError: for a file that cannot be read, or whose names are not the first one's.
        JudgeError: naming the file and run of a value that the judge cannot read in its column.
    """
    from sysdag.evaluation.judges import ColumnScore
    from sysdag.traces.trace import Trace

    parts = []
    for path in paths:
        parts.append(Trace.load(path))
        if isinstance(judge, ColumnScore):
            try:
                judge.known(parts[-1])
            except JudgeError as error:
                raise JudgeError(f"{path}: {error}") from error
    return Trace.concatenate(parts)
