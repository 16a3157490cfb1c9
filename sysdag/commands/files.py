"""What commands make sure of about the files that they are given, before they begin to work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from sysdag.errors import DataError, SysdagError


def check_output(option: str, path: Path | None, read: Iterable[str | Path] = ()) -> None:
    """Refuses a file that could not be written when the work is done, or whose writing would destroy what is read.

    Args:
        option: that names the file, for messages.
        path: the file; None is let through.
        read: what the command reads; a name that is no file (a dataset on the Hub) may be among it.

    Raises:
        SysdagError: naming the option, the path and what to do.
    """
    if path is None:
        return
    if path.is_dir():
        raise SysdagError(f"{option} {path} is a folder; name a file in it.")
    if any(path.resolve() == Path(source).resolve() for source in read):
        raise SysdagError(f"{option} {path} is a file that this command reads; write to another one.")
    if not path.parent.is_dir():
        raise SysdagError(f"{option} {path}: there is no folder {path.parent}; make it first, or write elsewhere.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise SysdagError(f"{option} {path}: the folder {path.parent} cannot be written to; write elsewhere.")


@contextlib.contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Context in which a `DataError` about a row names the file that the row is from."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
