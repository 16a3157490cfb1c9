"""Collecting human preferences between runs of a system, on a page that the machine serves to itself.

Layers, from the bottom up: `pairing` (which runs are compared), `store` (labels on the disk), `agreement` (its
statistics), `summary`, `export` (labels to preference rows), `view` (values as the page shows them), `guard` (who may
talk to the server), `app` (the server's routes), `session` (the database that belongs to traces), `serve`.

The page is plain HTML, JavaScript and CSS over FastAPI rather than Gradio. A label must be on the disk before the page
goes on, a second click or tab must not make a second label, and what models wrote must never run as HTML; that needs
say over each request, response header and key press, and Gradio keeps those to itself. It also loads fonts and scripts
from elsewhere by default, and its many dependencies would be those of a page with five buttons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.labelling.export import write_export
    from sysdag.labelling.server import serve
    from sysdag.labelling.session import open_labels
    from sysdag.labelling.summary import summarize

__all__ = ["open_labels", "serve", "summarize", "write_export"]
__getattr__ = exports(
    __name__,
    {"export": ["write_export"], "server": ["serve"], "session": ["open_labels"], "summary": ["summarize"]},
)
