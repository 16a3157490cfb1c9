"""Base models that were trained before are not trained again."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples import digits_in_order, draft_and_refine
from examples.tasks import base_models, builders, ordered_digits, sorted_letters

_SOURCES = (
    base_models, builders, ordered_digits, sorted_letters,
    digits_in_order.text.function, draft_and_refine.draft.function, draft_and_refine.answer.function,
)  # fmt: skip


def cached(root: Path, build: Callable[..., None], **options: Any) -> Path:
    """The folder that `build(folder, **options)` fills, built once for each choice of options and each state of the
    code that it depends on."""
    code = "".join(inspect.getsource(source) for source in _SOURCES)
    key = hashlib.sha256(f"{build.__name__}{sorted(options.items())}{code}".encode()).hexdigest()[:12]
    folder = root.resolve() / f"{build.__name__}-{key}"
    if not folder.exists():
        print(f"    training {build.__name__}", flush=True)
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        build(unfinished, **options)
        unfinished.rename(folder)
    return folder
