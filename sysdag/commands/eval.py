"""`sysdag eval`: how much better a system is than another, or than the responses that a dataset prefers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sysdag.commands import judge_options
from sysdag.commands.arguments import RenameOption, ShapeOption, SplitOption, reading
from sysdag.commands.files import check_output, naming
from sysdag.commands.given import refuse
from sysdag.errors import DataError, JudgeError, SysdagError

if TYPE_CHECKING:
    from sysdag.components.component import Component
    from sysdag.evaluation.measures import Matched
    from sysdag.graph.plan import Plan
    from sysdag.graph.variables import Node

_OF_SAMPLING = ("against", "runs", "batch_size", "device", "limit", "split", "rename", "shape", "keep_traces")


def evaluate(
    context: typer.Context,
    by: judge_options.By,
    system: Annotated[
        str | None,
        typer.Argument(metavar="SYSTEM", help="SYSTEM.py:name, package.module:name, or a saved system's folder."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA", help="Held-out rows: inputs or preferences, in a file, a datasets folder, or on the Hub."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="SYSTEM2|chosen", help="A system that runs on the same rows, or the rows' `chosen`."),
    ] = None,
    traces: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="FILE FILE2", help="Instead of all that: the traces of both, .jsonl or .parquet."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn, and of the bootstrap.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Runs that go through a system together.")] = 16,
    device: Annotated[
        str, typer.Option(help="Where models are put: auto (a GPU where there is one), cpu, cuda:0, ...")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    split: SplitOption = "train",
    rename: RenameOption = None,
    shape: ShapeOption = None,
    keep_traces: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the runs there as they are made; a later command goes on behind."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Of scores: from which on a run is a success, for McNemar's exact test.")
    ] = None,
    margin: Annotated[float, typer.Option(min=0, help="Of scores: a smaller difference is a tie.")] = 0.0,
    confidence: Annotated[float, typer.Option(min=0.01, max=0.999, help="Of the intervals.")] = 0.95,
    output: Annotated[Path | None, typer.Option(help="Write figures and comparisons as JSON.")] = None,
    node: judge_options.Nodes = None,
    holds: judge_options.Holds = judge_options.Kind.scores,
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
    """Win rate of a system against another one or against a dataset's `chosen`, with intervals and exact tests.

    Both run on the same rows. A scoring function gives mean scores and their paired difference, too, and with
    --threshold shares of successes. Function judges also see the rows' other columns, as a reference answer.
    """
    _check(context, system, data, against, traces)
    options = reading(split, rename, shape)
    if output is not None and output.suffix != ".json":
        raise typer.BadParameter(f"--output {output}: its ending must be .json.")
    check_output("--output", output, [] if data is None else [data])
    if keep_traces is not None and keep_traces.is_file():
        raise SysdagError(f"--keep-traces {keep_traces} is a file; name a folder.")
    judge = judge_options.reading(context, judge_options.chosen_judge(context, output, traces or [Path(data or "")]))

    from sysdag.evaluation.judges import ColumnScore
    from sysdag.evaluation.measures import SEED_OF_THE_OTHER, check_options, evaluate, evaluation_record
    from sysdag.files.atomic import write_text

    check_options(judge, threshold=threshold, margin=margin)
    if traces is None and isinstance(judge, ColumnScore):
        raise JudgeError(
            f"--by {by}: a run that is sampled now has no column of scores. Name FILE.py:function or an "
            "endpoint's URL, or evaluate scored traces (--traces)."
        )
    if traces is not None:
        matched, outputs = _from_traces(traces, node)
        names = traces[0].stem, traces[1].stem if traces[0].stem != traces[1].stem else "the other"
        sources: dict[str, Any] = {"traces": [str(path) for path in traces]}
    else:
        assert system is not None
        assert data is not None
        assert against is not None
        matched, outputs = _sampled(
            system, data, against, node, reading=options, limit=limit, keep=keep_traces, runs=runs, seed=seed,
            batch_size=batch_size, device=device,
        )  # fmt: skip
        names = system, against
        sources = {
            "system": system, "against": against, "data": data, **options, "limit": limit, "runs": runs,
            "batch_size": batch_size, "seeds": [seed, seed + SEED_OF_THE_OTHER],
        }  # fmt: skip
    for count, name in zip(matched.unmatched, names, strict=True):
        if count:
            typer.echo(f"{count} runs of {name} are left out: the other has no run of the same inputs.", err=True)
    found = evaluate(judge, matched, outputs, threshold=threshold, margin=margin, confidence=confidence, seed=seed)
    if output is not None:
        facts = evaluation_record(found, judge, outputs, sources=sources, seed=seed, margin=margin)
        write_text(output, json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    typer.echo(found.table(*names))


def _check(
    context: typer.Context, system: str | None, data: str | None, against: str | None, traces: tuple[Path, Path] | None
) -> None:
    if traces is None:
        if system is None or data is None or against is None:
            raise typer.BadParameter("Give SYSTEM, DATA and --against SYSTEM2 or --against chosen; or --traces A B.")
        return
    if system is not None:
        raise typer.BadParameter("--traces stand instead of SYSTEM and DATA; give one or the other.")
    refuse(context, _OF_SAMPLING, "belongs to sampling; --traces are there already.")


def _from_traces(paths: tuple[Path, Path], nodes: list[str] | None) -> tuple[Matched, tuple[str, ...]]:
    from sysdag.evaluation.measures import match
    from sysdag.traces.pairs import output_names
    from sysdag.traces.trace import Trace

    first, second = (Trace.load(path) for path in paths)
    outputs = output_names(first, nodes)
    if missing := [name for name in outputs if name not in second.cells]:
        raise DataError(
            f"{paths[1]} has no values of {missing[0]!r}, which is judged; its nodes are {sorted(second.cells)}. Name "
            "nodes that both have (--node)."
        )
    return match(first, second), outputs


def _refuse_shared(first: str, second: str, plan: Plan, other: Plan) -> None:
    """Refuses two systems that are one, or that have weights in common: they would not be compared with each other."""
    folders = [Path(spec).resolve() for spec in (first, second)]
    if plan.system is other.system or (folders[0] == folders[1] and folders[0].is_dir()):
        raise DataError(
            f"{first} and --against {second} are one and the same system, so whichever wins does so by chance. Name "
            "another one, as the folder it was saved to before training."
        )
    if any(folder.is_dir() for folder in folders):
        return  # what is read from a folder is nobody else's
    theirs = [(n.name, n.component) for n in other.system.nodes if n.is_random and _has_weights(n.component)]
    for n in plan.system.nodes:
        if n.is_random and _has_weights(n.component) and any(_share(n, *each) for each in theirs):
            raise DataError(
                f"{first} and --against {second} share the weights of node {n.name!r}, {n.component!r}: what trained "
                "one has trained the other. Give each a component of its own (system.with_components), or name the "
                "folders that they were saved to."
            )


def _share(node: Node, name: str, component: Component) -> bool:
    """Whether two components are one, or train the same tensors of one model."""
    if node.component is component:
        return True
    from sysdag.execution.batches import load

    load(node.name, node.component, None)
    load(name, component, None)
    own = {id(parameter) for parameter in node.component.own_parameters().values()}
    return any(id(parameter) in own for parameter in component.own_parameters().values())


def _has_weights(component: Component) -> bool:
    """Whether it may have some; nothing is loaded for the answer."""
    from sysdag.components.component import Component

    return type(component).module is not Component.module


def _sampled(
    system: str,
    data: str,
    against: str,
    nodes: list[str] | None,
    *,
    reading: dict[str, Any],
    limit: int | None,
    keep: Path | None,
    runs: int,
    seed: int,
    **options: Any,
) -> tuple[Matched, tuple[str, ...]]:
    from sysdag.evaluation.evaluation_runs import chosen_runs, held_out, sample_runs
    from sysdag.evaluation.measures import SEED_OF_THE_OTHER, match
    from sysdag.saving.loading import load_system
    from sysdag.traces.readers import read_rows

    plan = load_system(system).compile()
    other = None if against == "chosen" else load_system(against).compile()
    if other is not None:
        _refuse_shared(system, against, plan, other)
    outputs = tuple(nodes or plan.system.outputs)
    for spec, each in ((system, plan), (against, other)):
        if each is not None and (missing := [name for name in outputs if name not in each.order]):
            raise DataError(
                f"{spec} has no node {missing[0]!r}, which is judged; its nodes are {list(each.order)}. Name nodes "
                "that both systems have (--node)."
            )
    rows = read_rows(data, **reading)[:limit]
    with naming(data):
        given = held_out(plan, rows, distinct=other is not None)
    if other is None:
        second = chosen_runs(plan, given, runs=runs)
        if missing := [name for name in outputs if name not in second.cells]:
            raise DataError(f"{data}: the chosen responses have no value of {missing[0]!r}, which is judged.")
    elif {each.name for each in other.system.inputs} != set(given.inputs):
        reads = sorted(each.name for each in other.system.inputs)
        raise DataError(
            f"{against} reads {reads}, and {system} {sorted(given.inputs)}; both have to run on the same inputs."
        )
    paths = (keep / "system.jsonl", keep / "against.jsonl") if keep else (None, None)
    first = sample_runs(plan, given, runs=runs, seed=seed, keep=paths[0], **options)
    if other is not None:
        second = sample_runs(other, given, runs=runs, seed=seed + SEED_OF_THE_OTHER, keep=paths[1], **options)
    return match(first, second), outputs
