"""Rows out of every kind of file, and what is said of a file that cannot be read."""

import bz2
import csv
import gzip
import io
import json
import lzma
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
        DataError, match=r"two has the splits \['held_out', 'train'\], and no 'test'; name one of them \(--split\)"
    ):
        read_rows(tmp_path / "two", split="test")
    with pytest.raises(DataError, match="one has no splits, so there is no 'test'"):
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
        ("r.jsonl", '{"a": 1}'.encode("utf-16-le"), r"r\.jsonl is no UTF-8: it looks like UTF-16 without its mark"),
        ("r.jsonl", b"\xff\xfe{\0\"", r"r\.jsonl begins as UTF-16 and is damaged: .* Write it as UTF-8"),
        ("r.jsonl", gzip.compress(b"{}", mtime=0), r"r\.jsonl is compressed with gzip; name it r\.jsonl\.gz\."),
        ("r.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:20], r"r\.jsonl\.gz is no \.gz file, or is damaged: "),
        ("r.jsonl.gz", b"{}", r"r\.jsonl\.gz is no \.gz file, or is damaged: "),
        ("r.jsonl.gz", gzip.compress(b'{"a": 1}\n{', mtime=0), r"r\.jsonl\.gz, line 2: not JSON"),
        ("r.parquet.gz", b"", r"r\.parquet\.gz: rows are read from files that end in .*compressed \(\.jsonl\.gz\)"),
        ("r.gz", b"", r"r\.gz: rows are read from files that end in "),
        ("r.jsonl", b"[1]", r"line 1: a row is an object, got list \[1\]"),
        ("r.jsonl", b"[" * 100_000, "line 1: nested too deeply"),
        ("r.jsonl", b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "line 1: nested more than 64 levels deep"),
        ("r.jsonl", b'{"a": 1' + b"0" * 5000 + b"}", "line 1: .*4300 digits"),
        ("r.jsonl", b'{"a": {"__png__": "AAAA"}}', "line 1: cannot identify image file"),
        ("r.jsonl", b'{"a": {"__draw__": {"value": 1, "record": 2}}}', "line 1: a draw has a value, a record"),
        ("r.jsonl", b'{"a": {"__draw__": 3}}', "line 1: "),
        ("r.json", b'[{"a": 1}, 5]', r"r\.json, row 1: a row is an object, got int 5"),
        ("r.json", b'[{"a": 1}', r"r\.json: not JSON"),
        ("r.json", b'{\n"a": 1,\n}', r"r\.json: not JSON: .* at line 3, character 1"),
        ("r.json", b'{"prompt": ["a", "b"], "chosen": ["c", "d"]}', r"one object of whole columns, \['chosen', '"),
        ("r.json", b'{"prompt": {"0": "a"}, "chosen": {"0": "c"}}', "one object of whole columns.*orient='records'"),
        ("r.csv", b"a;b,c\n1;2,3\n", r"r\.csv: what parts its columns cannot be told: comma and semicolon both could"),
        ("r.csv", b"a,b\n\xe9,1\n", r"r\.csv, line 2: not UTF-8 \(byte 0xe9\)\. Write the file as UTF-8"),
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


MESSAGES = [{"role": "user", "content": "it's [\n1]"}, {"role": "assistant", "content": 'a "b", {c}'}]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv"])
def test_compressed_files(tmp_path, form, ending):
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending]
    rows = [{"prompt": "ü", "chosen": "a"}, {"prompt": "r", "chosen": "b"}]
    table = "".join("\t,"[form == "csv"].join(cells) + "\n" for cells in [rows[0].keys(), *(r.values() for r in rows)])
    text = {"jsonl": lines(rows), "json": json.dumps(rows), "csv": table, "tsv": table}[form]
    found = read_rows(write(tmp_path / f"r.{form}{ending}", compress(text.encode())))
    assert found == rows
    assert found[1].place == {"jsonl": "line 2", "json": "row 1"}.get(form, "line 3")
    assert found[0].folder == tmp_path


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_whose_mark_says_the_encoding(tmp_path, encoding, end):
    text = lines(ROWS).replace("\n", end)
    assert read_rows(write(tmp_path / "r.jsonl", text.encode(encoding))) == ROWS
    table = f"prompt,chosen{end}ü,b{end}"
    assert read_rows(write(tmp_path / "r.csv", table.encode(encoding))) == [{"prompt": "ü", "chosen": "b"}]


@pytest.mark.parametrize(
    ("text", "expected", "places"),
    [
        (json.dumps({"data": ROWS}), ROWS, ["row 0", "row 1"]),
        (json.dumps({"version": "1", "data": ROWS}, indent=1), ROWS, ["row 0", "row 1"]),
        (json.dumps(ROWS[0]), ROWS[:1], ["line 1"]),
        ("\n" + json.dumps(ROWS[0], indent=1), ROWS[:1], ["line 2"]),
        ("\n\n".join(json.dumps(row, indent=1) for row in ROWS), ROWS, ["line 1", "line 8"]),
        # One row, though it holds lists: of messages, or beside a text.
        (
            json.dumps({"chosen": MESSAGES, "rejected": MESSAGES}),
            [{"chosen": MESSAGES, "rejected": MESSAGES}],
            ["line 1"],
        ),
        (json.dumps({"x": "a", "data": [1]}), [{"x": "a", "data": [1]}], ["line 1"]),
        (json.dumps({"data": [{"a": 1}], "chosen": "c"}), [{"data": [{"a": 1}], "chosen": "c"}], ["line 1"]),
    ],
)
def test_whatever_json_holds(tmp_path, text, expected, places):
    found = read_rows(write(tmp_path / "r.json", text))
    assert found == expected
    assert [row.place for row in found] == places


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.csv", "prompt;chosen\nq, r;a\n"),
        ("r.csv", "prompt\tchosen\nq, r\ta\n"),
        ("r.csv", "prompt|chosen\nq, r|a\n"),
        ("r.tsv", 'prompt,chosen\n"q, r",a\n'),
        ("r.csv", '"prompt";"chosen"\n"q, r";"a"\n'),
        ("r.csv", 'prompt,chosen\n"q, r",a\n'),
    ],
)
def test_the_delimiter_is_found(tmp_path, name, text):
    assert read_rows(write(tmp_path / name, text)) == [{"prompt": "q, r", "chosen": "a"}]


def test_the_delimiter_that_all_rows_have(tmp_path):
    """The header has columns by two delimiters, the rows by one."""
    assert read_rows(write(tmp_path / "r.csv", "a;b,c\n1;2\n3;4\n")) == [{"a": "1", "b,c": "2"}, {"a": "3", "b,c": "4"}]
    assert read_rows(write(tmp_path / "r.csv", "a,b\n1;x,2\n")) == [{"a": "1;x", "b": "2"}]
    assert read_rows(write(tmp_path / "r.csv", "question\na;b\n")) == [{"question": "a;b"}]


def csv_of(cell):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["prompt", "chosen"], ["q", cell]])
    return text.getvalue()


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (json.dumps(MESSAGES), MESSAGES),
        (json.dumps(MESSAGES, indent=2), MESSAGES),
        (repr(MESSAGES), MESSAGES),
        (json.dumps([{**MESSAGES[0], "name": None}]), MESSAGES[:1]),
        (str(numpy.array(MESSAGES[:1], dtype=object)), MESSAGES[:1]),
        (json.dumps([{"from": "human", "value": "q"}]), [{"from": "human", "value": "q"}]),
        (json.dumps({"from": "gpt", "value": "q"}), {"from": "gpt", "value": "q"}),
        # Texts, though they look like JSON.
        ('[{"city": "Paris"}]', '[{"city": "Paris"}]'),
        ('{"content": "x"}', '{"content": "x"}'),
        ("[1, 2]", "[1, 2]"),
        ("3.14", "3.14"),
        ("", ""),
    ],
)
def test_cells_that_hold_messages(tmp_path, cell, expected):
    assert read_rows(write(tmp_path / "r.csv", csv_of(cell))) == [{"prompt": "q", "chosen": expected}]


def test_messages_as_numpy_prints_them_are_refused(tmp_path):
    for cell in (str(numpy.array(MESSAGES, dtype=object)), json.dumps(MESSAGES)[:-3]):
        found = read_all(write(tmp_path / "r.csv", csv_of(cell) + "r,b\n"))
        assert found.rows == [{"prompt": "r", "chosen": "b"}]
        ((place, text),) = found.damaged
        assert place == "line 2"
        assert text.startswith("column 'chosen' holds chat messages that are no JSON, as numpy or another program")
        assert "Write them as JSON (json.dumps), or write the file as JSON lines or Parquet." in text


def test_csv_as_pandas_writes_and_reads_it(tmp_path):
    frame = pandas.DataFrame(
        {"prompt": ["q\nr", "s"], "chosen": [json.dumps(MESSAGES), "b"], "rejected": ["c", None], "score": [0.5, None]}
    )
    frame.to_csv(tmp_path / "r.csv", encoding="utf-8-sig")
    assert read_rows(tmp_path / "r.csv") == [
        {"": "0", "prompt": "q\nr", "chosen": MESSAGES, "rejected": "c", "score": "0.5"},
        {"": "1", "prompt": "s", "chosen": "b", "rejected": "", "score": ""},
    ]


def test_null_members_of_messages_are_not_there(tmp_path):
    """A file of columns gives every message the keys that any of them has."""
    rows = [
        {"chosen": [{"role": "user", "content": "q", "tool_calls": None}, {"role": "assistant", "content": "a"}]},
        {"chosen": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "x": 1}}]}]},
    ]
    expected = [
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "x": 1}}]}]},
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "r.parquet")
    assert read_rows(tmp_path / "r.parquet") == expected
    assert read_rows(write(tmp_path / "r.jsonl", lines(rows))) == expected
    assert rows_of(datasets.Dataset.from_list(rows)) == expected
    plain = {"x": {"a": None}, "y": [None, {"b": None}], "z": None}
    assert read_rows(write(tmp_path / "r.jsonl", lines([plain]))) == [plain]


def test_every_type_that_parquet_has_for_a_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["a", None, "a"]
    columns = {
        "dictionary": pyarrow.array(texts).dictionary_encode(),
        "large": pyarrow.array(texts, pyarrow.large_string()),
        "view": pyarrow.array(texts, pyarrow.string_view()),
        "nothing": pyarrow.nulls(3),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "r.parquet")
    whole = {name: "a" for name in list(columns)[:3]}
    assert read_rows(tmp_path / "r.parquet") == [whole, {}, whole]


README = """---
license: mit
configs:
- config_name: pairs
  data_files:
  - split: train
    path: data/train-*.jsonl.gz
  - split: held_out
    path: data/held_out.jsonl.gz
- config_name: other
  data_files: other/*.jsonl
---
# About
"""


@pytest.fixture
def cloned(tmp_path, monkeypatch):
    """A data set's folder as it lies on the Hub, with two configurations."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "other").mkdir()
    (folder / "README.md").write_text(README)
    for number in range(2):
        text = lines([{"prompt": f"{number}{line}"} for line in range(2)]).encode()
        write(folder / "data" / f"train-{number}.jsonl.gz", gzip.compress(text))
    write(folder / "data" / "held_out.jsonl.gz", gzip.compress(b'{"prompt": "h"}\n'))
    write(folder / "other" / "a.jsonl", '{"prompt": "o"}\n')
    return folder


def test_a_cloned_data_set(cloned):
    pairs = f"{cloned}:pairs"
    found = read_rows(pairs)
    assert [row["prompt"] for row in found] == ["00", "01", "10", "11"]
    assert [row.place for row in found][2:] == ["data/train-1.jsonl.gz, line 1", "data/train-1.jsonl.gz, line 2"]
    assert found[0].folder == cloned / "data"
    assert read_rows(pairs, split="held_out") == [{"prompt": "h"}]
    assert [row["prompt"] for row in read_rows(pairs, split="train[1:3]")] == ["01", "10"]
    assert read_rows(f"{cloned}:other") == [{"prompt": "o"}]
    with pytest.raises(DataError, match=r"set has the splits \['held_out', 'train'\], and no 'test'; name one of them"):
        read_rows(pairs, split="test")
    for name, which in (("", "none of them was named"), (":none", "no 'none'")):
        with pytest.raises(
            DataError,
            match=rf"set has the configurations \['other', 'pairs'\], and {which}; name one of them as .*:other",
        ):
            read_rows(f"{cloned}{name}")
    write(cloned / "data" / "train-0.jsonl.gz", gzip.compress(b'{"prompt": 1}\n{'))
    with pytest.raises(DataError, match=r"set:pairs, data/train-0\.jsonl\.gz, line 2: not JSON"):
        read_rows(pairs)


def test_a_cloned_data_set_of_one_configuration(cloned):
    (cloned / "README.md").write_text(README.partition("- config_name: other")[0] + "---\n")
    assert [row["prompt"] for row in read_rows(cloned)] == ["00", "01", "10", "11"]
    (cloned / "README.md").write_text(README.replace("held_out.jsonl.gz", "held_out.csv"))
    write(cloned / "data" / "held_out.csv", "prompt\nh\n")
    with pytest.raises(DataError, match="set cannot be loaded as a dataset: Couldn't infer the same data file format"):
        read_rows(cloned)


def test_options_of_a_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cases = {
        "csv": ('sep: "|"', "prompt,chosen|b\n1,2|3\n", [{"prompt,chosen": "1,2", "b": "3"}]),
        "json": ("field: pairs", '{"pairs": [{"prompt": "q"}], "data": [{"prompt": "r"}]}', [{"prompt": "q"}]),
    }
    for form, (option, text, expected) in cases.items():
        folder = tmp_path / form
        folder.mkdir()
        write(folder / f"a.{form}", text)
        readme = f'---\nconfigs:\n- config_name: default\n  data_files: "*.{form}"\n  {option}\n---\n'
        write(folder / "README.md", readme)
        assert read_rows(folder) == expected


def test_a_folder_of_files_without_a_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        pandas.DataFrame(NESTED).drop(columns="image").to_parquet(folder / f"{split}-00000-of-00001.parquet")
    expected = [{key: value for key, value in row.items() if key != "image"} for row in WANTED]
    assert read_rows(folder) == read_rows(folder, split="test") == expected


def test_forms_that_only_datasets_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "a.txt", "q\nr\n")
    assert read_rows(folder) == [{"text": "q"}, {"text": "r"}]
