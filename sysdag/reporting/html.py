"""A report as one HTML file that asks for nothing else, and in which nothing that a model wrote can run.

Templates escape all they are given. Beyond that, the page's own policy allows the one style sheet and the one script
that it comes with, by their hashes, and images only inside the file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sysdag.errors import SysdagError
from sysdag.files import atomic
from sysdag.reporting import formats
from sysdag.reporting.page import Page, page
from sysdag.reporting.read import Run
from sysdag.reporting.series import Overview
from sysdag.reporting.settings import default_config
from sysdag.reporting.shares import DEFINITION

MOST_PROMPTS = 20


def write_report(
    runs: Sequence[Run], output: str | Path, *, most_prompts: int = MOST_PROMPTS, overview: Overview | None = None
) -> Page:
    """Writes the report of a run, or of several over each other, of which the first is told in full.

    Args:
        runs: what `sysdag.reporting.read.read_run` returned.
        output: the HTML file; an older one is replaced whole.
        most_prompts: of the traces, how many prompts are shown.
        overview: a table over trainings that belong together, see `sysdag.reporting.series`.

    Returns:
        what it says.

    Raises:
        SysdagError: if jinja2 is not installed.
    """
    found = page(
        runs, defaults=default_config() if runs[0].config else {}, most_prompts=most_prompts, overview=overview
    )
    output = Path(output)
    text = render(found)
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(output, text)
    return found


def render(found: Page) -> str:
    """The page as HTML."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise SysdagError('A report needs jinja2: pip install "sysdag[report]".') from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sysdag.reporting"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": formats.number, "percent": formats.percent}
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_hash(style)}'; script-src 'sha256-{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    context: dict[str, Any] = {
        "page": found,
        "policy": policy,
        "style": Markup(style),
        "script": Markup(script),
        "definition": DEFINITION,
        "labels": list(dict.fromkeys(metric.label for each in found.runs for metric in each.metrics)),
        "nodes": list(dict.fromkeys(name for each in found.runs for name in each.order)),
    }
    text = environment.get_template("report.html.j2").render(context)
    return text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair, which JSON may hold, has no form


def _asset(name: str) -> str:
    return resources.files("sysdag.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
