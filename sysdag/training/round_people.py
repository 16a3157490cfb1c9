"""Preferences of a round by people: the loop waits at the label page until every pair has a label."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sysdag.errors import LabelError
from sysdag.labelling.export import export
from sysdag.labelling.session import open_labels
from sysdag.labelling.store import LabelStore
from sysdag.labelling.summary import summarize
from sysdag.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class People:
    """People judge, on the page of `sysdag label`.

    Attributes:
        annotator: whose queue the page opens; by default it asks.
        port: as that of `sysdag label`.
        pairs_per_input: at most so many pairs of runs of an input; all by default.
        browser: whether the page is opened in a browser.
    """

    annotator: str | None = None
    port: int | None = None
    pairs_per_input: int | None = None
    browser: bool = True

    def check(self) -> None:
        """Refuses an installation that cannot show the page, before anything is sampled."""
        for package in ("fastapi", "uvicorn"):
            if importlib.util.find_spec(package) is None:
                raise LabelError(f'People judge on the label page, which needs {package}: pip install "sysdag[label]".')


def labelled_rows(
    people: People, trace: Trace, database: Path, outputs: Sequence[str], *, seed: int, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], str]:
    """The preferences about a round's runs, once every pair has a label; until then this serves the page.

    Labels may come from elsewhere, too: `sysdag label` on the same runs and database.

    Returns:
        Rows for training, and what became of the labels in words.

    Raises:
        KeyboardInterrupt: if Ctrl-C ended the page before the last label; what is labelled is kept.
    """
    with open_labels(
        trace, database, outputs=outputs, seed=seed, pairs_per_input=people.pairs_per_input, overlap=0
    ) as store:
        if not is_complete(store):
            from sysdag.labelling.server import serve

            serve(
                store, trace, port=people.port, annotator=people.annotator, browser=people.browser,
                announce=lambda link: say(
                    f"Waiting for people: {summarize(store)}.\nLabels go to {database}; the rounds go on by themselves "
                    f"when every pair has one. Open this link, which lets you in; Ctrl-C ends.\n\n    {link}\n"
                ),
                until=lambda: is_complete(store),
            )  # fmt: skip
        if not is_complete(store):
            left = summarize(store)
            raise KeyboardInterrupt(
                f"{left.labelled} of {left.pairs} pairs have a label, which are kept in {database}; the same command "
                "goes on."
            )
        found = export(store, trace)
        return found.rows, str(found)


def is_complete(store: LabelStore) -> bool:
    """Whether every pair has a label, or was skipped by everyone who was shown it."""
    return {label.pair for label in store.labels()} >= set(range(len(store.pairs())))
