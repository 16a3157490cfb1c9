"""Rows as the pairs or unpaired runs that are trained on: the rows that `sysdag.data.validation` keeps."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sysdag.data.checks import DROPPED, NOTED, Wanted, check_row
from sysdag.data.columns import advice_on, told_unread, unread_columns
from sysdag.data.preferences import Feedback, PreferencePair, Problem
from sysdag.data.row_encoding import encode_row
from sysdag.errors import DataError
from sysdag.graph.plan import Objective, Plan
from sysdag.traces.dataset_rows import rows_of
from sysdag.traces.rows import number_of

logger = logging.getLogger(__name__)


def encode_rows(
    plan: Plan,
    rows: Iterable[Mapping[str, Any]],
    objective: Objective,
    *,
    empty: str = "drop",
    wanted: Wanted | None = None,
) -> list[Feedback]:
    """Rows of feedback as pairs or unpaired runs that can be scored, those that `sysdag train` trains on.

    A pair's row holds the inputs by name (or `prompt`, for a system with one input), `chosen` and `rejected` (the
    output's value, or a dict by node for several outputs), and for Direct `chosen_intermediates` and
    `rejected_intermediates`, dicts by node of every other random node. An unpaired row, TRL's format for KTO, has one
    run: `output` (or `completion`) and, for Direct, `intermediates`; and `label`, whether it is desirable. A plate's
    value is a list. Values may be given as they are, or as the `Draw` (list of draws for a plate) that a sampled trace
    holds, which keeps the token ids that were sampled.

    TRL's formats are taken too: a completion may be a list of messages, a prompt one, which the node's function gets
    as it is; a pair's prompt may be implicit, the beginning that `chosen` and `rejected` share; and `tools` (a list of
    JSON schemas, or that as JSON text) and `chat_template_kwargs` (a dict) reach the chat templates of all nodes of the
    row. Columns `weight`, `margin` and `group`, where they are no inputs, are of the pair (see `PreferencePair`); the
    first and the last of the unpaired run, too.

    Rows that would teach nothing, or something else than they say, are dropped (see `sysdag.data.checks`); their
    number and the first of each kind are logged, and so are columns that no node reads.

    Args:
        rows: dicts (of a file: see `sysdag.traces.readers.read_rows`), or a dataset of the library `datasets`.
        empty: what becomes of rows whose chosen or desirable output is empty; `keep` teaches the model to say nothing
            there.
        wanted: of which kind they have to be; by default that of the first.

    Returns:
        All of one kind.

    Raises:
        DataError: naming the row and the node, and the file's line where the row knows it; or if no row is left.
        PlanError: for an `empty` that is neither `drop` nor `keep`.
    """
    found: list[Feedback] = []
    first: dict[str, Problem] = {}
    counts: Counter[str] = Counter()
    given = rows_of(rows)
    wanted = wanted or Wanted.of(plan, given)
    for place, row in enumerate(given):
        number = number_of(row, place)
        problems = check_row(plan, row, number, objective, empty, wanted)
        feedback = None
        if all(problem.kind in NOTED for problem in problems):
            feedback, wrong = encode_row(plan, row, number, objective)
            problems += wrong
        for problem in problems:
            if problem.kind not in (*DROPPED, *NOTED):
                raise DataError(f"{problem} {advice_on(plan, given)}".rstrip())
            first.setdefault(problem.kind, problem)
        counts.update({problem.kind for problem in problems})
        if feedback is not None:
            found.append(feedback)
    told = [f"{kind} ({counts[kind]} of {len(given)}): {problem}" for kind, problem in first.items()]
    if given and not found:
        raise DataError("No row is left. " + " ".join(told))
    if len(found) < len(given):
        logger.warning("%d of %d rows are dropped. %s", len(given) - len(found), len(given), " ".join(told))
    elif told:
        logger.warning("%s", " ".join(told))
    if unread := unread_columns(plan, given, objective):
        logger.warning("%s", told_unread(unread))
    return found


def encode_pairs(
    plan: Plan, rows: Iterable[Mapping[str, Any]], objective: Objective, *, empty: str = "drop"
) -> list[PreferencePair]:
    """As `encode_rows`, of pairs alone.

    Raises:
        DataError: for an unpaired row, too.
    """
    wanted = Wanted(unpaired=False, why="encode_rows takes rows of both kinds.")
    found = encode_rows(plan, rows, objective, empty=empty, wanted=wanted)
    return [pair for pair in found if isinstance(pair, PreferencePair)]
