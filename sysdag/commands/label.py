"""`sysdag label`: what people say of runs, collected on a page that this machine serves to itself."""

from __future__ import annotations

import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sysdag.commands.files import check_output
from sysdag.commands.given import refuse
from sysdag.errors import SysdagError


class Collect(StrEnum):
    pairs = "pairs"
    thumbs = "thumbs"
    scores = "scores"


_OF_THE_PAGE = ("annotator", "port", "host", "allow_remote", "no_browser")


def label(
    context: typer.Context,
    traces: Annotated[
        Path, typer.Argument(metavar="TRACES", help="Runs that sysdag sample wrote: .jsonl or .parquet.")
    ],
    database: Annotated[Path, typer.Option(help="Where labels are kept; gone on with where it exists.")] = Path(
        "labels.sqlite"
    ),
    collect: Annotated[
        Collect | None,
        typer.Option(
            help="What annotators are asked for: which of two runs is better (pairs, the default), or of single runs "
            "whether they are good (thumbs), or how good from 1 to 5 (scores)."
        ),
    ] = None,
    annotator: Annotated[str | None, typer.Option(help="Whose queue opens; by default the page asks.")] = None,
    node: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What is compared; the last node by default. Repeatable."),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(min=0, help="Pairs (or runs) that every annotator gets, to tell agreement; 20 by default."),
    ] = None,
    pairs_per_input: Annotated[
        int | None, typer.Option(min=1, help="At most so many pairs (or single runs) of an input; all by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order of pairs and sides; 0 by default.")] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write what was labelled so far (.jsonl or .parquet) and end; replaces the file."),
    ] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Print progress and agreement, and end.")] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="8765 by default, or a free one where that is taken; 0: free.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; loopback only.")] = "127.0.0.1",
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let --host be one that other machines reach; not encrypted.")
    ] = False,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the link.")] = False,
) -> None:
    """Show runs, blinded, and record which of two is better, or of one whether or how good it is, until Ctrl-C.

    Every label is on the disk before the next pair shows. Annotators share a database; each has a queue. --export
    writes rows for sysdag train: preferences, or of thumbs unpaired rows; of scores it writes the scored runs, which
    sysdag judge --by score takes.
    """
    writes = export is not None or summary
    if writes:
        refuse(context, _OF_THE_PAGE, "belongs to the page, which --export and --summary do not open.")
    check_output("--export", export, [traces, database])
    if writes and not database.exists():
        raise SysdagError(f"There is no database {database}; label something first, or give --database.")
    for package in () if writes else ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise SysdagError(f'sysdag label needs {package}: pip install "sysdag[label]".')

    from sysdag.labelling.export import write_export
    from sysdag.labelling.session import open_labels
    from sysdag.labelling.summary import summarize
    from sysdag.traces.trace import Trace

    trace = Trace.load(traces)
    with open_labels(
        trace,
        database,
        outputs=node or None,
        seed=seed,
        pairs_per_input=pairs_per_input,
        overlap=overlap,
        collect=None if collect is None else collect.value,
    ) as store:
        if not writes:
            from sysdag.labelling.server import serve

            serve(
                store, trace, host=host, port=port, annotator=annotator, allow_remote=allow_remote,
                browser=not no_browser, announce=lambda link: _announce(link, database),
            )  # fmt: skip
        typer.echo(summarize(store))
        if export is not None:
            typer.echo(f"{export}: {write_export(store, trace, export)}.")


def _announce(link: str, database: Path) -> None:
    typer.echo(f"Labels go to {database}. Open this link, which lets you in; Ctrl-C ends.\n\n    {link}\n")
