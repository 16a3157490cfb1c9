"""`sysdag judge`: from traces to preference pairs, by a function, a language model or scores that are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sysdag.commands import judge_options
from sysdag.commands.files import check_output
from sysdag.commands.given import refuse
from sysdag.errors import JudgeError

if TYPE_CHECKING:
    from sysdag.traces.trace import Trace


def judge(
    context: typer.Context,
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACES", help="Traces that sysdag sample wrote, .jsonl or .parquet.")
    ],
    by: judge_options.By,
    output: Annotated[
        Path | None, typer.Option(help="The file of preference pairs to write, ending in .jsonl or .parquet.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the traces with their scores as a column, .jsonl or .parquet."),
    ] = None,
    score_name: Annotated[str, typer.Option(help="For --scores: the column's name.")] = "score",
    pairs_per_prompt: Annotated[int, typer.Option(min=1, help="Pairs of each prompt, at most.")] = 1,
    margin: Annotated[float, typer.Option(min=0, help="Least difference of the scores of a pair.")] = 0.0,
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
    """Rank the runs of each prompt and write preference pairs: best against worst, second best against second worst.

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
        refuse(context, ("pairs_per_prompt", "margin"), "is about pairs, and there is no --output for them.")
    if scores is None:
        refuse(context, ("score_name",), "names the column of --scores, which is not given.")
    chosen = judge_options.chosen_judge(context, output or scores, [*traces, *filter(None, (output, scores))])

    from sysdag.evaluation.judges import ScoringJudge
    from sysdag.evaluation.measures import check_options
    from sysdag.evaluation.ranking import choose_pairs, judge_runs
    from sysdag.evaluation.verdicts import consistency
    from sysdag.saving.loading import load_system
    from sysdag.traces.pairs import output_names, preference_row, write_pairs

    check_options(chosen, margin=margin)
    if isinstance(chosen, ScoringJudge):
        refuse(context, ("comparisons",), f"belongs to a judge that compares; {chosen.name} gives scores.")
    trace = read_traces(traces)
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
    found = choose_pairs(trace, judged, outputs, pairs_per_prompt=pairs_per_prompt, margin=margin)
    if not found.pairs:
        raise JudgeError(f"{output} is not written: {found}")
    write_pairs(output, [preference_row(trace, *pair, outputs) for pair in found.pairs])
    typer.echo(str(found))
    typer.echo(f"Wrote them to {output}.", err=True)


def read_traces(paths: list[Path]) -> Trace:
    """The runs of several files, one after the other.

    Raises:
        DataError: for a file that cannot be read, or whose names are not the first one's.
    """
    from sysdag.traces.trace import Trace

    return Trace.concatenate([Trace.load(path) for path in paths])
