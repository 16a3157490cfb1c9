"""Python values as Arrow columns: which of them have a type of their own there, and the library where it is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sysdag.errors import DataError
from sysdag.files.encoding import is_text

_INT64 = range(-(2**63), 2**63)


def load_pyarrow(path: str | Path) -> Any:
    """The library pyarrow, with `pyarrow.parquet`, which reading or writing `path` needs.

    Raises:
        DataError: if it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f'{path}: Parquet needs pyarrow: pip install "sysdag[data]".') from error
    return pyarrow


def plain_type(values: Iterable[Any]) -> Any:
    """The Arrow type that keeps every value as it is (None is null); None if there is no such type.

    Texts, truth values, integers of 64 bits, floats and bytes have one, if all values are of one of these kinds.
    """
    import pyarrow

    given = [value for value in values if value is not None]
    kinds = {type(value) for value in given}
    if kinds == {str}:
        return pyarrow.large_string() if all(map(is_text, given)) else None
    if kinds == {int}:
        return pyarrow.int64() if all(value in _INT64 for value in given) else None
    simple: dict[type, Any] = {
        bool: pyarrow.bool_(),
        float: pyarrow.float64(),
        bytes: pyarrow.large_binary(),
    }
    return simple.get(next(iter(kinds))) if len(kinds) == 1 else None


def is_plain(kind: Any) -> bool:
    """Whether an Arrow type is one that `plain_type` gives, or lists of it; texts and bytes may be of short offsets."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return is_plain(kind.value_type)
    tests = (
        types.is_large_string, types.is_string, types.is_int64, types.is_boolean, types.is_float64,
        types.is_large_binary, types.is_binary,
    )  # fmt: skip
    return any(test(kind) for test in tests)


def read_parquet(path: Path) -> Any:
    """A Parquet file as a `pyarrow.Table`.

    Raises:
        DataError: if it is damaged, or is no Parquet file.
    """
    pyarrow = load_pyarrow(path)
    with path.open("rb") as file:  # a missing file is the system's error
        try:
            return pyarrow.parquet.ParquetFile(file).read()
        except Exception as error:  # what damaged bytes raise is not only Arrow's own errors
            raise DataError(f"{path} is no Parquet file, or is damaged: {_first_line(error)}.") from error


def write_parquet(path: Path, arrays: dict[str, Any], metadata: dict[bytes, str] | None = None) -> None:
    """Writes columns, at the given path itself."""
    import pyarrow.parquet

    table = pyarrow.table(arrays)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


def text_column(texts: Sequence[str | None]) -> Any:
    """A column of texts."""
    import pyarrow

    return pyarrow.array(texts, pyarrow.large_string())


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
