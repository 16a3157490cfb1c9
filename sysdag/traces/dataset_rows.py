"""Rows out of what the library `datasets` reads: its folders, a data set's folder cloned from the Hub, and the Hub."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sysdag.errors import DataError
from sysdag.files.hub import reaching
from sysdag.traces.row_format import from_arrow
from sysdag.traces.rows import Row, Rows

_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves in a folder


def rows_of(data: Any, folder: Path | None = None) -> list[Any]:
    """The rows of a `datasets.Dataset`, its images undecoded, or what its transform (`with_transform`) makes of them;
    those of any other iterable as they are.

    Raises:
        DataError: naming the column and row of a damaged value.
    """
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.Dataset) and data.format["type"] != "custom":
        return rows_of_table(data.with_format("arrow")[:], "the dataset", folder)
    if datasets is not None and isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
        return [Row({name: from_arrow(value) for name, value in row.items() if value is not None}) for row in data]
    return list(data)


def rows_of_table(table: Any, source: str, folder: Path | None) -> list[Row]:
    """The rows of an Arrow table; what is null is not there."""
    names = table.column_names
    if len(set(names)) < len(names):
        raise DataError(f"{source} has two columns of one name: {names}.")
    columns = {name: _column(table, name, source) for name in names}
    return [
        Row({name: column[row] for name, column in columns.items() if column[row] is not None}, folder=folder)
        for row in range(table.num_rows)
    ]


def _column(table: Any, name: str, source: str) -> list[Any]:
    values: list[Any] = []
    try:
        for element in table.column(name):
            values.append(from_arrow(element.as_py()))
    except Exception as error:  # whatever a damaged image or text raises, its place has to be named
        raise DataError(f"{source}, row {len(values)}, column {name!r}: {error}") from error
    return values


def rows_on_hub(source: str, split: str) -> Rows:
    """The rows of a data set on the Hub, `org/name` or `org/name:configuration`.

    Raises:
        DataError: for one that cannot be loaded.
    """
    name, _, configuration = source.partition(":")
    return Rows(
        rows_of(_asked(source, lambda datasets: datasets.load_dataset(name, configuration or None, split=split)))
    )


def rows_in_folder(
    folder: Path, configuration: str, split: str, read_file: Callable[[Path, dict[str, Any]], Rows]
) -> Rows:
    """The rows of a folder that `save_to_disk` wrote, or of a data set's folder as it lies on the Hub.

    Args:
        configuration: its name, where the folder's README.md has several; else "".
        read_file: reads a file of rows by the options of its format (`sep` of CSV, `field` of JSON).

    Raises:
        DataError: for a folder that is no data set, or a split or configuration that it has not; those are named.
    """
    if not any((folder / name).is_file() for name in _SAVED):
        return _cloned(folder, configuration, split, read_file)
    if configuration:
        raise DataError(f"{folder} was saved by datasets, and has no configuration {configuration!r}.")
    found = _asked(folder, lambda datasets: datasets.load_from_disk(str(folder)))
    if isinstance(found, dict):
        if split not in found:
            raise DataError(_no_split(folder, found, split))
        found = found[split]
    elif split != "train":
        raise DataError(f"{folder} has no splits, so there is no {split!r}; leave --split out.")
    return Rows(rows_of(found, folder))


def _no_split(folder: Path, splits: Any, split: str) -> str:
    return f"{folder} has the splits {sorted(map(str, splits))}, and no {split!r}; name one of them (--split)."


def _cloned(folder: Path, configuration: str, split: str, read_file: Callable[[Path, dict[str, Any]], Rows]) -> Rows:
    """`datasets` tells from the folder's README.md and names which files a split has; they are read one by one, so
    that rows keep their files' lines."""
    names = _asked(folder, lambda datasets: datasets.get_dataset_config_names(str(folder)))
    default = _asked(folder, lambda datasets: datasets.get_dataset_default_config_name(str(folder)))
    wanted = configuration or default
    if wanted not in names:
        which = "none of them was named" if not configuration else f"no {configuration!r}"
        raise DataError(
            f"{folder} has the configurations {sorted(names)}, and {which}; name one of them as "
            f"{folder}:{sorted(names)[0]}."
        )
    config = _asked(folder, lambda datasets: datasets.load_dataset_builder(str(folder), wanted)).config
    files = {str(name): [Path(file) for file in files] for name, files in (config.data_files or {}).items()}
    if split not in files:
        if not any(mark in split for mark in "[+"):
            raise DataError(_no_split(folder, files, split))
        return _loaded(folder, wanted, split)
    options = {name: getattr(config, name, None) for name in ("sep", "delimiter", "field")}
    found = Rows()
    for file in files[split]:
        try:
            part = read_file(file, options)
        except NotImplementedError:  # a form that only datasets reads, as a folder of images
            return _loaded(folder, wanted, split)
        if len(files[split]) > 1:
            name = file.relative_to(folder.resolve()) if file.is_relative_to(folder.resolve()) else file.name
            for number, row in enumerate(part.rows):
                row.place = f"{name}, {row.place or f'row {number}'}"
            part.damaged = [(f"{name}, {place}", text) for place, text in part.damaged]
        found.extend(part)
    return found


def _loaded(folder: Path, configuration: str, split: str) -> Rows:
    return Rows(
        rows_of(_asked(folder, lambda datasets: datasets.load_dataset(str(folder), configuration, split=split)), folder)
    )


def _asked(source: str | Path, call: Callable[[Any], Any]) -> Any:
    """What the library gives; whatever it raises is a `DataError` about the source."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'{source}: reading it needs the library datasets: pip install "sysdag[data]".') from error
    try:
        with reaching(str(source).partition(":")[0]):
            return call(datasets)
    except Exception as error:  # the library raises what a network, a file system or a parser may raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{source} cannot be loaded as a dataset: {reason}") from error
