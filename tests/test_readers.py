"""Rows out of every kind of file, and what is said of a file that cannot be read."""

import csv
import io
import json
import pickle
import re

import datasets
import numpy
import pandas
import pytest
from PIL import Image

from sysdag.errors import DataError
from sysdag.traces.cells import Draw
from sysdag.traces.dataset_rows import rows_of
from sysdag.traces.readers import read_all, read_rows

ROWS = [
    {"prompt": "größer", "chosen": "a\nb", "rejected": "", "n": 1},
    {"prompt": [{"role": "user", "content": "q"}], "chosen": 'say "x", y', "rejected": "c", "n": 2},
]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.ndjson"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \r\n"])
def test_json_lines(tmp_path, name, start):
    assert read_rows(write(tmp_path / name, start + lines(ROWS))) == ROWS
    assert read_rows(write(tmp_path / name, start + lines(ROWS).strip().replace("\n", "\r\n"))) == ROWS


def test_a_json_array(tmp_path):
    path = write(tmp_path / "r.json", "\ufeff " + json.dumps(ROWS, indent=2))
    found = read_rows(path)
    assert found == ROWS
    assert [row.place for row in found] == ["row 0", "row 1"]


def test_rows_know_their_line_and_folder(tmp_path):
    path = write(tmp_path / "r.jsonl", "\n" + lines(ROWS[:1]) + "\n" + lines(ROWS[1:]))
    found = read_rows(path)
    assert [row.place for row in found] == ["line 2", "line 4"]
    assert found[0].folder == tmp_path
    assert pickle.loads(pickle.dumps(found[0])).place == "line 2"


def test_csv(tmp_path):
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([["prompt", "chosen", "rejected"], ["q, r", "a\nb", 'say "x"'], [], ["ü" * 200_000, "", "d"]])
    limit = csv.field_size_limit()
    found = read_rows(write(tmp_path / "r.csv", "\ufeff" + text.getvalue()))
    assert found == [
        {"prompt": "q, r", "chosen": "a\nb", "rejected": 'say "x"'},
        {"prompt": "ü" * 200_000, "chosen": "", "rejected": "d"},
    ]
    assert [row.place for row in found] == ["line 2", "line 5"]
    assert csv.field_size_limit() == limit
    assert read_rows(write(tmp_path / "r.tsv", "a\tb\n1\t2,3\n")) == [{"a": "1", "b": "2,3"}]


def test_csv_names_intermediates_with_a_dot(tmp_path):
    text = "x,chosen,rejected,chosen_intermediates.draft,chosen_intermediates.pick,a.b\n1,2,3,4,5,6\n"
    assert read_rows(write(tmp_path / "r.csv", text)) == [
        {"x": "1", "chosen": "2", "rejected": "3", "chosen_intermediates": {"draft": "4", "pick": "5"}, "a.b": "6"}
    ]


def test_named_kinds_in_json(tmp_path):
    image = {"__png__": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="}
    draw = {"__draw__": {"value": "a", "record": {"token_ids": [5, 1], "finished": True}, "log_prob": -1}}
    other = {"__unknown__": 1, "b": {"__tuple__": [1]}}
    (row,) = read_rows(
        write(tmp_path / "r.jsonl", lines([{"i": image, "b": {"__bytes__": "YQ=="}, "d": draw, "o": other}]))
    )
    assert row["i"].size == (1, 1)
    assert row["b"] == b"a"
    assert isinstance(row["d"], Draw)
    assert (row["d"].value, row["d"].record, row["d"].log_prob) == ("a", {"token_ids": [5, 1], "finished": True}, -1)
    assert row["o"] == {"__unknown__": 1, "b": (1,)}


PNG = io.BytesIO()
Image.new("L", (2, 2), 7).save(PNG, "PNG")
NESTED = [
    {"prompt": "p", "chosen_intermediates": {"a": "x"}, "image": {"bytes": PNG.getvalue(), "path": "a.png"}, "n": None},
    {"prompt": "q", "chosen_intermediates": {"b": [1, None]}, "image": {"bytes": None, "path": "b.png"}, "n": 3},
]
WANTED = [
    {"prompt": "p", "chosen_intermediates": {"a": "x"}, "image": PNG.getvalue()},
    {"prompt": "q", "chosen_intermediates": {"b": [1, None]}, "image": "b.png", "n": 3},
]


def test_parquet_without_what_its_structs_bring(tmp_path):
    pandas.DataFrame({key: pandas.Series([row[key] for row in NESTED], dtype=object) for key in NESTED[0]}).to_parquet(
        tmp_path / "r.parquet"
    )
    found = read_rows(tmp_path / "r.parquet")
    assert found == WANTED
    assert found[0].folder == tmp_path


def test_folders_of_datasets(tmp_path):
    data = datasets.Dataset.from_list(NESTED)
    data.save_to_disk(tmp_path / "one")
    assert read_rows(tmp_path / "one") == WANTED
    datasets.DatasetDict(train=data, held_out=data.select([1])).save_to_disk(tmp_path / "two")
    assert read_rows(tmp_path / "two", split="held_out") == WANTED[1:]
    with pytest.raises(
        DataError, match=r"two cannot be loaded as a dataset: it has the splits \['held_out', 'train'\]"
    ):
        read_rows(tmp_path / "two", split="test")
    with pytest.raises(DataError, match="it has no splits, so there is no 'test'"):
        read_rows(tmp_path / "one", split="test")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none cannot be loaded as a dataset: "):
        read_rows(tmp_path / "none")


def test_datasets_in_memory_keep_images_as_files():
    image = Image.fromarray(numpy.arange(4, dtype="uint8").reshape(2, 2))
    data = datasets.Dataset.from_dict(
        {"image": [image, image], "x": [{"a": 1, "b": None}] * 2},
        features=datasets.Features(
            {"image": datasets.Image(), "x": {"a": datasets.Value("int64"), "b": datasets.Value("string")}}
        ),
    )
    first, second = rows_of(data.select([1, 0]))
    assert first == second
    assert first["x"] == {"a": 1}
    assert Image.open(io.BytesIO(first["image"])).tobytes() == bytes(range(4))
    (streamed, _) = rows_of(data.to_iterable_dataset())
    assert streamed["x"] == {"a": 1}
    assert rows_of([1, 2]) == [1, 2]


def test_names_on_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[0] == "org/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist on the Hub.\nMore.")
        return datasets.Dataset.from_list(NESTED)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("org/data") == WANTED
    assert read_rows("org/data:en", split="test[:10]") == WANTED
    assert asked == [(("org/data", None), {"split": "train"}), (("org/data", "en"), {"split": "test[:10]"})]
    with pytest.raises(
        DataError, match=r"^org/none cannot be loaded as a dataset: Dataset 'org/none' doesn't exist on the Hub\.$"
    ):
        read_rows("org/none")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.jsonl", b'{"a": 1}\n\n{"a": }\n', r"r\.jsonl, line 3: not JSON: Expecting value at character 7"),
        ("r.jsonl", b'{"a": "\xff"}', r"line 1: not UTF-8 \(byte 0xff at 7\)"),
        ("r.jsonl", '{"a": 1}'.encode("utf-16"), r"line 1: not UTF-8 \(byte 0xff at 0\)"),
        ("r.jsonl", b"[1]", r"line 1: a row is an object, got list \[1\]"),
        ("r.jsonl", b"[" * 100_000, "line 1: nested too deeply"),
        ("r.jsonl", b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "line 1: nested more than 64 levels deep"),
        ("r.jsonl", b'{"a": 1' + b"0" * 5000 + b"}", "line 1: .*4300 digits"),
        ("r.jsonl", b'{"a": {"__png__": "AAAA"}}', "line 1: cannot identify image file"),
        ("r.jsonl", b'{"a": {"__draw__": {"value": 1, "record": 2}}}', "line 1: a draw has a value, a record"),
        ("r.jsonl", b'{"a": {"__draw__": 3}}', "line 1: "),
        ("r.json", b'[{"a": 1}, 5]', r"r\.json, row 1: a row is an object, got int 5"),
        ("r.json", b'[{"a": 1}', r"r\.json: not JSON"),
        ("r.csv", b"a,b\n1,2\n1,2,3\n", r"r\.csv, line 3: expected 2 cells, one for each of \['a', 'b'\], got 3"),
        ("r.csv", b"a,a\n", r"r\.csv, line 1: the header names a column twice"),
        ("r.csv", b'a,b\n1,"2\n', r"r\.csv, line 2: not CSV, and what follows is not read: unexpected end of data"),
        ("r.csv", b"a,b\n\n1,\xff\n", r"r\.csv, line 3: not UTF-8 \(byte 0xff\)"),
        ("r.parquet", b"PAR1", r"r\.parquet is no Parquet file, or is damaged: "),
        ("r.txt", b"a", r"r\.txt: rows are read from files that end in \.jsonl, "),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / name, data))


def test_what_is_not_there_is_named(tmp_path):
    for name in ("none.jsonl", "no/such/folder"):
        with pytest.raises(DataError, match=re.escape(f"There is no file, folder or dataset {tmp_path / name}.")):
            read_rows(tmp_path / name)
    path = write(tmp_path / "r.jsonl", lines(ROWS))
    with pytest.raises(DataError, match=r"r\.jsonl is one file, which has no split 'test'"):
        read_rows(path, split="test")


def test_every_damaged_line_is_told(tmp_path):
    found = read_all(write(tmp_path / "r.jsonl", '{"a": 1}\nnot\n{"a": 2}\n7\n'))
    assert found.rows == [{"a": 1}, {"a": 2}]
    assert [place for place, _ in found.damaged] == ["line 2", "line 4"]


def test_damaged_values_in_parquet_are_named(tmp_path):
    pandas.DataFrame({"a": [{"__json__": "1"}, {"__json__": "{"}]}).to_parquet(tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"r\.parquet, row 1, column 'a': "):
        read_rows(tmp_path / "r.parquet")


def test_a_file_without_rows(tmp_path):
    for name, data in (("r.jsonl", ""), ("r.json", "[]"), ("r.csv", ""), ("r.csv", "a,b\n")):
        assert read_rows(write(tmp_path / name, data)) == []


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r'needs the library datasets: pip install "sysdag\[data\]"'):
        read_rows("org/data")
