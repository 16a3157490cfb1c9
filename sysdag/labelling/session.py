"""The database of labels that belongs to traces: begun, or gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sysdag.errors import LabelError
from sysdag.labelling.pairing import fingerprint, pair_runs, single_runs
from sysdag.labelling.records import CHOICES, Collect, Settings
from sysdag.labelling.store import LabelStore
from sysdag.traces.pairs import output_names
from sysdag.traces.trace import Trace

DEFAULT_OVERLAP = 20


def open_labels(
    trace: Trace,
    database: str | Path,
    *,
    outputs: Sequence[str] | None = None,
    seed: int | None = None,
    pairs_per_input: int | None = None,
    overlap: int | None = None,
    collect: Collect | None = None,
) -> LabelStore:
    """The database of a trace's labels, begun where there is none.

    Args:
        outputs: the nodes that are compared; by default the last one.
        seed: of the order of pairs and of the sides; 0 by default.
        pairs_per_input: at most so many (of single runs, too); all by default.
        overlap: pairs that every annotator gets, the first ones; 20 by default. It may change later.
        collect: what annotators are asked for: `pairs` by default, or `thumbs` or `scores` of single runs.

    Raises:
        LabelError: if the database was begun for other traces or with another of the other options.
        DataError: if the trace lacks an output or offers nothing to compare.
    """
    found = fingerprint(trace)
    names = None if outputs is None else output_names(trace, outputs)
    if not LabelStore.is_begun(database):
        settings = Settings(
            traces_sha256=found,
            outputs=names or output_names(trace, None),
            seed=0 if seed is None else seed,
            pairs_per_input=pairs_per_input,
            overlap=DEFAULT_OVERLAP if overlap is None else overlap,
            collect=collect or "pairs",
        )
        if settings.collect not in CHOICES:
            raise LabelError(f"collect must be one of {', '.join(CHOICES)}, got {collect!r}.")
        if settings.collect == "pairs":
            pairing = pair_runs(trace, settings.outputs, seed=settings.seed, pairs_per_input=pairs_per_input)
        else:
            pairing = single_runs(trace, settings.outputs, seed=settings.seed, runs_per_input=pairs_per_input)
        return LabelStore.create(database, settings, pairing.pairs)
    store = LabelStore(database)
    try:
        _check(store, found, {"node": names, "seed": seed, "pairs-per-input": pairs_per_input, "collect": collect})
    except LabelError:
        store.close()
        raise
    if overlap is not None and overlap != store.settings.overlap:
        store.set_overlap(overlap)
    return store


def _check(store: LabelStore, traces_sha256: str, given: dict[str, object]) -> None:
    settings = store.settings
    if settings.traces_sha256 != traces_sha256:
        raise LabelError(
            f"{store.path} holds labels of other traces (SHA-256 {settings.traces_sha256[:12]}..., these have "
            f"{traces_sha256[:12]}...). Give the traces that it was begun with, or another --database."
        )
    begun = {
        "node": settings.outputs, "seed": settings.seed, "pairs-per-input": settings.pairs_per_input,
        "collect": settings.collect,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and value != begun[name]:
            raise LabelError(
                f"{store.path} was begun with --{name} {_option(begun[name])}, and {_option(value)} is asked for. "
                "Leave the option out to go on, or give another --database."
            )


def _option(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "all" if value is None else str(value)
