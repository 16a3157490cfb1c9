"""The options by which commands choose a judge, and the judge that they mean."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sysdag.commands.given import refuse
from sysdag.errors import OptionError

if TYPE_CHECKING:
    from sysdag.evaluation.judges import Judge


class Kind(StrEnum):
    scores = "scores"
    thumbs = "thumbs"
    ranks = "ranks"


By = Annotated[
    str,
    typer.Option(
        "--by",
        metavar="JUDGE",
        help="FILE.py:function or package.module:function (score(run), or prefer(first, second)); the URL of an "
        "OpenAI-compatible endpoint; or the name of a column of the traces that holds scores.",
    ),
]
Holds = Annotated[
    Kind,
    typer.Option(
        help="Of a column: what it holds. Thumbs are true or false, 1 or 0, +1 or -1, up or down; of ranks, 1 is the "
        "best of an input's runs. Empty cells are no feedback."
    ),
]
LowerIsBetter = Annotated[bool, typer.Option("--lower-is-better", help="Of scores: a smaller one is better.")]
Nodes = Annotated[
    list[str] | None,
    typer.Option("--node", metavar="NAME", help="A node that is judged; by default the outputs. Repeatable."),
]
Model = Annotated[str | None, typer.Option(help="Of an endpoint: the model, as the endpoint calls it.")]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Of an endpoint: the environment variable that holds its key, as OPENAI_API_KEY."
    ),
]
Criteria = Annotated[str | None, typer.Option(help="Of an endpoint: what makes a response better.")]
Template = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Of an endpoint: what the model is asked, with the places {first}, {second}, {inputs} and {criteria}. It "
        "must ask for a last line VERDICT: A, VERDICT: B or VERDICT: TIE.",
    ),
]
Request = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='Of an endpoint: options of each request over {"temperature": 0, "max_tokens": 1024}; null omits one.',
    ),
]
Concurrency = Annotated[int, typer.Option(min=1, help="Of an endpoint: requests at once.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Of an endpoint: seconds until a request has failed.")]
Retries = Annotated[int, typer.Option(min=0, help="Of an endpoint: tries after a failed one, 429 or 5xx.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Of an endpoint: its answers, not asked for again; by default beside the output."
    ),
]


def chosen_judge(context: typer.Context, output: Path | None, others: Iterable[Path] = ()) -> Judge:
    """The judge that a command's options name.

    Args:
        context: of a command that has the options of this module under their names in small letters.
        output: of the command; an endpoint's answers are kept beside it.
        others: files that answers must not be appended to.

    Raises:
        typer.BadParameter: for options that do not fit together.
        SysdagError: for a judge that is not there.
    """
    from sysdag.evaluation.judge_choice import OF_ENDPOINTS, JudgeChoice

    given: dict[str, Any] = context.params
    if not given["by"].startswith(("http://", "https://")):
        refuse(context, OF_ENDPOINTS, "belongs to an endpoint: --by http://...")
        return JudgeChoice(by=given["by"], lower_is_better=given["lower_is_better"]).judge(output, others)
    # typer before 0.29 converts paths for the command alone; in the context they are still text.
    paths = {name: None if given[name] is None else Path(given[name]) for name in ("cache", "template")}
    options = {name: given[name] for name in ("by", "lower_is_better", *OF_ENDPOINTS)}
    options["request"] = None if given["request"] is None else _options(given["request"])
    try:
        return JudgeChoice(**options | paths, spelling="--{}").judge(output, others)
    except OptionError as error:
        raise typer.BadParameter(str(error)) from error


def reading(context: typer.Context, judge: Judge) -> Judge:
    """The judge, which reads its column as `--holds` says.

    Raises:
        typer.BadParameter: for a judge that reads no column, and options that do not fit together.
    """
    from sysdag.evaluation.judges import ColumnScore

    if not isinstance(judge, ColumnScore):
        refuse(context, ("holds",), f"says what a column holds, and {judge.name} is none.")
        return judge
    holds = Kind(context.params["holds"])
    if holds is not Kind.scores:
        refuse(context, ("lower_is_better",), f"belongs to scores, and --holds {holds.value} says which are better.")
    return replace(judge, holds=holds.value)


def _options(request: str) -> dict[str, Any]:
    try:
        given = json.loads(request)
    except ValueError as error:
        raise typer.BadParameter(f"--request {request}: not JSON ({error}).") from error
    if not isinstance(given, dict):
        raise typer.BadParameter(
            f"--request {request}: expected a JSON object of options, without model, messages, stream and n."
        )
    return given
