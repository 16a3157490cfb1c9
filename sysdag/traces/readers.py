"""Rows out of JSON lines, JSON, CSV, Parquet (compressed or not), folders of data sets, or a name on the Hub.

Values are what `sysdag.traces.row_format` says: texts, numbers, lists and dicts as they stand, the named kinds of
`sysdag.files.encoding` (`{"__png__": ...}`, `{"__bytes__": ...}`), and draws. What is null in Parquet or in a dataset
is not there at all. Every row knows where it came from, so an error about it names the file's line.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sysdag.errors import DataError
from sysdag.files.arrow import read_parquet
from sysdag.traces.csv_rows import read_csv
from sysdag.traces.dataset_rows import rows_in_folder, rows_of_table, rows_on_hub
from sysdag.traces.json_rows import read_json, read_lines
from sysdag.traces.reshaping import renamed, reshaped
from sysdag.traces.rows import Row, Rows

FORMS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MARKS = {  # what a file of text begins with, and the encoding that it stands for; the longer ones first
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
_GZIP = b"\x1f\x8b"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def read_rows(
    source: str | Path, *, split: str = "train", rename: Mapping[str, str] | None = None, shape: str | None = None
) -> list[dict[str, Any]]:
    """The rows of a file, a folder or a dataset on the Hub.

    Args:
        source: a file by its ending (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`; those of text may be compressed:
            `.jsonl.gz`, `.bz2`, `.xz`), a folder that `save_to_disk` of `datasets` wrote, a data set's folder cloned
            from the Hub, or a name on the Hub. `org/name:configuration` and `folder:configuration` name one of
            several configurations.
        split: of a dataset that has splits.
        rename: for columns their other names, as `{"question": "prompt"}`; applied after `shape`.
        shape: of the files of a known data set, whose rows become `prompt`, `chosen` and `rejected`: one of
            `sysdag.traces.shapes.SHAPES`, as `helpsteer3`. A row that holds no preference (a tie) stays, and is
            dropped with its reason where rows are used.

    Raises:
        DataError: naming the file and its first line or row that cannot be read; a dataset that cannot be loaded; or
            columns that are not those of the shape, or not there to be renamed.
    """
    found = read_all(source, split=split, rename=rename, shape=shape)
    if found.damaged:
        place, text = found.damaged[0]
        raise DataError(f"{source}, {place}: {text}")
    return list(found.rows)


def read_all(
    source: str | Path, *, split: str = "train", rename: Mapping[str, str] | None = None, shape: str | None = None
) -> Rows:
    """As `read_rows`, with what is damaged line by line told beside the rows.

    Raises:
        DataError: if nothing can be read: another kind of file, a damaged Parquet file, no such dataset; or as
            `read_rows` for `shape` and `rename`.
    """
    found = _read(source, split)
    if shape is not None:
        found = reshaped(found, shape, str(source))
    if rename:
        found.rows = renamed(found.rows, rename, str(source))
    return found


def iterate_rows(
    source: str | Path, *, split: str = "train", rename: Mapping[str, str] | None = None, shape: str | None = None
) -> Iterator[Row]:
    """As `read_all`, row by row in order, with an empty row that has `damage` where a part could not be read.

    JSON lines are read as they are asked for; other forms, and rows that are renamed or reshaped, as a whole.
    """
    path = Path(source)
    is_plain = shape is None and not rename and split == "train" and path.is_file()
    if is_plain and _form(path) in (".jsonl", ".ndjson") and _is_utf8(path):
        for number, line in enumerate(_lines(path), start=1):
            yield from read_lines(line, path, number).in_order()
    else:
        yield from read_all(source, split=split, rename=rename, shape=shape).in_order()


def _is_utf8(path: Path) -> bool:
    """Whether a file of text begins as `_content` leaves it."""
    with _opened(path) as file:
        start = file.read(4)
    is_unnamed = path.suffix.lower() not in _OPEN and start.startswith(_GZIP)
    return not (is_unnamed or b"\0" in start[:2] or start.startswith(tuple(_MARKS)))


def _lines(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        yield from file


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file of text, decompressed as its ending says.

    Raises:
        DataError: where it is read, for a compressed file that is damaged.
    """
    with path.open("rb") as file:
        if (opened := _OPEN.get(path.suffix.lower())) is None:
            yield file
            return
        try:
            with opened(file) as inner:
                yield inner
        except Exception as error:  # of several types: EOFError, zlib.error, OSError, LZMAError
            raise DataError(f"{path} is no {path.suffix} file, or is damaged: {error}.") from error


def _read(source: str | Path, split: str) -> Rows:
    path = Path(source)
    folder, _, configuration = str(source).rpartition(":")
    if path.is_dir() or (folder and Path(folder).is_dir()):
        if path.is_dir():
            folder, configuration = str(source), ""
        return rows_in_folder(Path(folder), configuration, split, _read_part)
    if not path.exists():
        if _form(path) not in FORMS and _NAME.fullmatch(str(source)):
            return rows_on_hub(str(source), split)
        raise DataError(f"There is no file, folder or dataset {source}.")
    if _form(path) not in FORMS:
        raise DataError(
            f"{source}: rows are read from files that end in {', '.join(FORMS)}, of text also compressed (.jsonl.gz)."
        )
    if split != "train":
        raise DataError(f"{source} is one file, which has no split {split!r}; give the file of that split.")
    return _read_file(path, {})


def _form(path: Path) -> str:
    """The ending that says what a file holds, compressed or not; "" for Parquet, which compresses itself."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if endings and endings[-1] in _OPEN:
        return endings[0] if len(endings) == 2 and endings[0] != ".parquet" else ""
    return endings[-1] if endings else ""


def _read_part(path: Path, options: Mapping[str, Any]) -> Rows:
    """A file of a data set; NotImplementedError for a form that is not read here."""
    if _form(path) not in FORMS:
        raise NotImplementedError
    return _read_file(path, options)


def _read_file(path: Path, options: Mapping[str, Any]) -> Rows:
    """The rows of one file.

    Args:
        options: of a builder of `datasets`: `sep` or `delimiter` of CSV, `field` of JSON.
    """
    form = _form(path)
    if form == ".parquet":
        return Rows(rows_of_table(read_parquet(path), str(path), path.parent))
    raw = _content(path)
    if form in (".csv", ".tsv"):
        expected = "," if form == ".csv" else "\t"
        named = str(options.get("delimiter") or options.get("sep") or ",")
        is_certain = named != ","  # which is also what is said where nothing was
        return read_csv(raw, path, named if is_certain else expected, is_certain=is_certain)
    if form == ".json":
        return read_json(raw, path, member=options.get("field"))
    return read_lines(raw, path)


def _content(path: Path) -> bytes:
    """A file of text as UTF-8 without a mark.

    Raises:
        DataError: for a compressed file that is damaged or has no ending that says so, or another encoding.
    """
    with _opened(path) as file:
        raw = file.read()
    if path.suffix.lower() not in _OPEN and raw.startswith(_GZIP):
        raise DataError(f"{path} is compressed with gzip; name it {path.name}.gz.")
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), None)
    if encoding is None:
        if b"\0" in raw[:2] and raw[:2] != b"\0\0":
            raise DataError(f"{path} is no UTF-8: it looks like UTF-16 without its mark. Write it as UTF-8.")
        return raw
    if encoding == "utf-8-sig":
        return raw[3:]
    try:
        return raw.decode(encoding).encode("utf-8")
    except UnicodeError as error:
        raise DataError(f"{path} begins as {encoding.upper()} and is damaged: {error}. Write it as UTF-8.") from error
