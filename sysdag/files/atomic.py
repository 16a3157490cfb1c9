"""Files and folders that are replaced whole: a process that dies while it writes leaves the old ones or the new ones.

What is new is written to `.saving` inside the folder that it belongs to. Renaming that to `.saved` is the moment from
which the new counts: readers look there first (`current`), and whoever writes next finishes the move.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sysdag.errors import SerializationError

SAVING, SAVED, _OLD = ".saving", ".saved", ".old"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_SIGNS = (
    "os error 28",
    "os error 27",
    "os error 122",
    "PytorchStreamWriter failed",
    "iostream error",
    "unexpected pos",
)


def prepare(folder: Path) -> Path:
    """An empty folder inside `folder` to write to; what an interrupted save left behind is finished or removed."""
    folder.mkdir(parents=True, exist_ok=True)
    finish(folder)
    temporary = folder / SAVING
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    return temporary


def commit(folder: Path) -> None:
    """Puts what was written since `prepare` in place of what `folder` has under the same names."""
    temporary = folder / SAVING
    for path in [*temporary.rglob("*"), temporary]:
        _synchronise(path)
    os.replace(temporary, folder / SAVED)
    _synchronise(folder)
    finish(folder)


def finish(folder: Path) -> None:
    """Ends a `commit` that was interrupted; does nothing where there is none. Files move after the folders.

    Another process that reads the folder may be finishing it at the same time.
    """
    saved = folder / SAVED
    if not saved.is_dir():
        return
    if saved.is_symlink():
        raise SerializationError(f"{saved} is a link, which no save leaves behind; remove it.")
    for path in sorted(saved.iterdir(), key=lambda path: (path.is_file(), path.name)):
        if path.suffix == _OLD:
            continue
        target = folder / path.name
        with contextlib.suppress(FileNotFoundError):
            if target.is_dir():
                os.replace(target, saved / f"{path.name}{_OLD}")
            os.replace(path, target)
    _synchronise(folder)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(saved)


def abandon(folder: Path) -> None:
    """Removes what was written since `prepare`."""
    shutil.rmtree(folder / SAVING, ignore_errors=True)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder; what is written to it goes into `folder` together, or not at all after an error."""
    existed = folder.exists()
    temporary = prepare(folder)
    try:
        yield temporary
        commit(folder)
    except BaseException:
        abandon(folder)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()
        raise


def write_text(file: Path, text: str) -> None:
    """Replaces a file as a whole; after an error the old one is as it was."""
    with replacing_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """Yields a path beside a file; what is written there replaces the file as a whole, or not at all after an error.

    Raises:
        SerializationError: where the disk does not take it; see `explaining_disk_errors`.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}{file.suffix}")
    advice = "Free some space there or write to another disk, and do it again."
    if file.exists():
        advice = f"The {file.name} that is there is as it was. {advice}"
    try:
        with explaining_disk_errors(file.name, file.parent, unfinished, advice):
            yield unfinished
            _synchronise(unfinished)
            os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def append_whole(opened: io.RawIOBase | io.FileIO, data: bytes) -> None:
    """Appends bytes to a file that was opened without a buffer, or leaves it as it was."""
    end = opened.seek(0, os.SEEK_END)
    try:
        written = 0
        while written < len(data):  # a full disk takes a part, and then says why
            written += opened.write(data[written:]) or 0
    except OSError:
        with contextlib.suppress(OSError):
            opened.truncate(end)
        raise


def current(folder: Path, name: str, last: str) -> Path:
    """Where the newest complete `name` of a folder is; a reader moves nothing.

    Args:
        last: the file that is moved into place last; while it is in `.saved`, what is there counts.
    """
    saved = folder / SAVED
    return saved / name if (saved / last).exists() and (saved / name).exists() else folder / name


def beside(path: Path, name: str, last: str) -> Path:
    """Where the newest complete `name` of a folder is, by the place `current` gave of something else in it."""
    return current(path.parent.parent if path.parent.name == SAVED else path.parent, name, last)


def _synchronise(path: Path) -> None:
    """Writes a file's or folder's content through to the disk, where the system can."""
    if os.name == "nt":  # folders cannot be opened there, and files only for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explaining_disk_errors(what: str, folder: Path, needed: int | Path, advice: str) -> Iterator[None]:
    """Turns a failed write into a message.

    Args:
        what: what is being written, as the start of a sentence.
        needed: bytes that it may take, at most; or where that is not known the file that is being written.
        advice: what is intact and what to do.

    Raises:
        SerializationError: naming the folder, the bytes needed and those free.
    """
    try:
        yield
    except Exception as error:
        cause = _disk_error(error)
        if cause is None:
            raise
        size = f"up to {mib(needed)}" if isinstance(needed, int) else f"more than {mib(_size(needed))}"
        code = cause.errno if isinstance(cause, OSError) else None
        reason = os.strerror(code) if code is not None and code in _DISK_ERRORS else first_line(cause)
        raise SerializationError(
            f"{what} could not be written to {folder}: {reason}. It needs {size}, and {free_beside(folder)} (a "
            f"quota or a limit on file sizes may allow less). {advice}"
        ) from error


def _disk_error(error: BaseException) -> BaseException | None:
    """The error of the disk that this one is, or came from."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in _DISK_ERRORS:
            return found
        if any(sign in str(found) for sign in _SIGNS) and not isinstance(found, SerializationError):
            return found
        found = found.__cause__ or found.__context__
    return None


def first_line(error: BaseException) -> str:
    """What it says, in a line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return text.strip().splitlines()[0].rstrip(".")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def free_beside(path: Path) -> str:
    """How much is free where a file is, or is to be, as a clause of a sentence."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    return f"{mib(shutil.disk_usage(there).free)} are free on that disk"


def mib(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
