"""`sysdag report`: one HTML file about a training, or several over each other, and what its numbers say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sysdag.errors import SysdagError


def report(
    run: Annotated[Path, typer.Argument(help="The output_dir of a training, of rounds, or of a sweep.", metavar="RUN")],
    output: Annotated[Path | None, typer.Option(help="The HTML file; by default RUN/report.html.")] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Another training, drawn over the first. Repeat it for each."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=0, help="How many prompts of the traces are shown, at most.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """One self-contained HTML file about a training, and in words what its numbers say.

    It shows who earned the preference, the curves, runs before and after (of a training with log_traces), the
    configuration, and diagnoses. Of rounds and of a sweep it draws all trainings over each other, below one table. The
    file opens offline and asks for nothing else.
    """
    if output is not None and output.suffix not in (".html", ".htm"):
        raise typer.BadParameter(f"--output {output}: its ending must be .html.")
    absent = [package for package, module in (("jinja2", "jinja2"), ("pillow", "PIL")) if not _is_there(module)]
    if absent:
        raise SysdagError(f'A report needs {" and ".join(absent)}: pip install "sysdag[report]".')
    from sysdag.reporting.html import write_report
    from sysdag.reporting.series import overview_of, read_series_runs
    from sysdag.reporting.text import described

    place = output or run / "report.html"
    runs = read_series_runs(run)
    overview = overview_of(run, runs)
    runs += [each for folder in compare or () for each in read_series_runs(folder)]
    written = write_report(runs, place, most_prompts=prompts, overview=overview)
    if as_json:
        found: dict[str, Any] = {"report": str(place), "runs": [each.to_dict() for each in written.runs]}
        if overview is not None:
            found["overview"] = [dict(zip(overview.header, row, strict=True)) for row in overview.rows]
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for each in written.runs:
        typer.echo(described(each) + "\n")
    if overview is not None:
        typer.echo(f"{overview}\n")
    typer.echo(f"report: {place}")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
