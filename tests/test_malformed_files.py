"""Thousands of damaged files: each is an error that says so, or rows that are what they are; never another exception.

Hypothesis chooses the damage and seeds it; a damaged file is made by `random`, which is faster than drawing its bytes.
"""

import io
import json
import random
from collections import Counter

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import char_tokenizer, llama
from tiny_diffusion import plain_unet, scheduler_of

from sysdag import DataError, Input, System, node
from sysdag.components import CausalLM, Diffusion, Tabular
from sysdag.data.encoding import encode_pairs
from sysdag.data.preferences import PreferencePair
from sysdag.data.validation import validate_rows
from sysdag.files.encoding import encode_value
from sysdag.traces.cells import Draw
from sysdag.traces.pairs import write_pairs
from sysdag.traces.readers import read_all, read_rows
from sysdag.traces.row_format import encode_row_value
from sysdag.traces.trace import Trace

PROMPT = Input("prompt")


@node(CausalLM(llama(max_position_embeddings=16), char_tokenizer(), max_new_tokens=4))
def caption(prompt):
    return prompt


@node
def parts(caption) -> list:
    return list(caption)


@node(Diffusion(plain_unet(sample_size=2), scheduler=scheduler_of("epsilon")))
def image(parts):
    return None


@node(Tabular({None: {"s": 0.5, 7: 0.5}}))
def route(prompt):
    return None


PLAN = System(PROMPT >> caption >> parts, parts.each() >> image, PROMPT >> route).compile()


def png(size=(2, 2), mode="L"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def rows():
    """Two rows that can be used: plain values, and draws."""
    text = Draw("ab", {"token_ids": [3, 4, 1], "finished": True}, -1.0)
    picture = Draw(Image.new("L", (2, 2)), {"latents": numpy.zeros((1, 2, 2), "float32")})
    plain = {
        "prompt": "a",
        "chosen": {"image": [png()], "route": "s"},
        "rejected": {"image": [png()] * 2, "route": "s"},
    }
    drawn = {"chosen": {"image": [picture] * 2, "route": Draw(7, {"index": 1})}, "rejected": plain["rejected"]}
    return [
        {**plain, "chosen_intermediates": {"caption": "a"}, "rejected_intermediates": {"caption": "ab"}},
        {"prompt": "b"}
        | drawn
        | {"chosen_intermediates": {"caption": text}, "rejected_intermediates": {"caption": "cd"}},
    ]


ENCODED = [{name: encode_row_value(value, name) for name, value in row.items()} for row in rows()]
TRACE = Trace(
    {"prompt": ["a", [1.5, None]]},
    {"caption": [rows()[1]["chosen_intermediates"]["caption"]] * 2, "image": [tuple(rows()[1]["chosen"]["image"]), ()]},
    {"score": [0.5, {"a": b"b"}]},
)


def deep(levels, value=0):
    for _ in range(levels):
        value = [value]
    return value


VALUES = [
    None,
    True,
    0,
    -1,
    10**30,
    1e308,
    "",
    " ",
    "a",
    "s",
    "\0",
    "\ud800",
    "a" * 100_000,
    [],
    [[]],
    {},
    [None],
    {"image": []},
    deep(40),
    deep(63),
    deep(64),
    deep(300),
    {"bytes": None, "path": None},
    {"role": "user", "content": "a"},
    [{"role": "assistant", "content": "ab"}],
    [{"role": "assistant", "content": None}],
    {"image": "none.png", "route": "s"},
    encode_row_value(png(), ""),
    encode_row_value(png((3, 1)), ""),
    encode_row_value(png(mode="RGB"), ""),
    encode_row_value(png()[:40], ""),
    {"__png__": "AAAA"},
    {"__png__": 5},
    {"__bytes__": "*"},
    {"__npy__": "k05VTVBZAQ=="},
    {"__image__": ["RGB", [2, 2], "AAAA"]},
    {"__image__": ["none", [-1, 2], ""]},
    {"__float__": "nan"},
    {"__int__": "0x" + "f" * 4000},
    {"__int__": "many"},
    {"__items__": [[[], 1]]},
    {"__items__": 3},
    {"__tuple__": 3},
    {"__dict__": []},
    {"__json__": "["},
    {"__json__": "[" * 5000},
    {"__utf8__": "gA=="},
    {"__draw__": None},
    {"__draw__": {}},
    {"__draw__": {"value": "a", "record": []}},
    {"__draw__": {"value": "a", "record": {"token_ids": [10**30]}}},
    {"__draw__": {"value": "a", "record": {"token_ids": [-1]}}},
    {"__draw__": {"value": 5, "record": {"token_ids": [3]}}},
    {"__draw__": {"value": "a", "record": {"latents": [0]}}},
    {"__draw__": {"value": "s", "record": {"index": "0"}}},
    {"__draw__": {"value": {"__draw__": {}}, "log_prob": "-1"}},
    {"__draw__": {"record": {"latents": encode_value(numpy.full((1, 2, 2), numpy.nan), "")}}},
    {"__draw__": {"record": {"latents": encode_value(numpy.zeros((1, 2, 2), "<U3"), "")}}},
    encode_value(numpy.zeros(3), ""),
    encode_value(numpy.float32(0.5), ""),
]
KEYS = ["prompt", "chosen", "rejected", "chosen_intermediates", "rejected_intermediates"]
INNER = ["caption", "image", "route", "parts", "none", "__draw__"]


def place(rng, data):
    """A dict somewhere in nested data, and one of its keys."""
    while True:
        keys = list(data)
        if not keys or rng.random() < 0.1:
            return data, rng.choice(KEYS + INNER)
        key = rng.choice(keys)
        if not isinstance(data[key], dict) or rng.random() < 0.4:
            return data, key
        data = data[key]


def with_values(rng, data):
    """A copy of some JSON with other values at some places."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.randint(1, 3)):
        holder, key = place(rng, rng.choice(data))
        if rng.random() < 0.2:
            holder.pop(key, None)
        else:
            value = json.loads(json.dumps(rng.choice(VALUES)))  # not the one that another change may be inside of
            holder[key] = [value] * rng.randint(1, 2) if rng.random() < 0.2 else value
    return data


def with_bytes(rng, raw):
    """A copy of some bytes with a few of them damaged."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(5):
            case 0:
                del raw[at:]
            case 1:
                raw[at : at + 1] = rng.choice(
                    [b"\xff", b"\0", b"\n", b"\r", b'"', b"{", b"]", b"\xef\xbb\xbf", b"\\ud800", b"\t"]
                )
            case 2:
                raw[at : at + rng.randint(1, 9)] = b""
            case 3:
                raw[at : at + 4] = rng.randbytes(4)
            case 4:
                raw[at:at] = raw[: rng.randint(0, 50)]
    return bytes(raw)


SNIPPETS = [
    b"",
    b"\n\n",
    b"\xef\xbb\xbf",
    b"[1]\n",
    b"null\n",
    b"7\n",
    b"NaN\n",
    b"-Infinity\n",
    b'"text"\n',
    b"{}\n",
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b'{"prompt": 1' + b"0" * 5000 + b"}\n",
    b'{"prompt": NaN, "chosen": Infinity}\n',
    b'{"a": 1, "a": 2}\n',
    b"\0\0\n",
    b"PAR1",
    b"a,b\n",
    b'{"prompt": "' + b"x" * 300_000 + b'"}\n',
    "\u2028\n".encode(),
    b"\xff\xfe[\0",
    b'"a\n',
    b"\x1f\x8b\x08\0",
]


def lines_of(data):
    return b"".join(json.dumps(row).encode() + b"\n" for row in data)


def damaged_text(rng, data, form):
    """A file of rows or of runs, damaged in its values, its bytes, or by what stands around it."""
    if rng.random() < 0.5:
        data = with_values(rng, data)
    if form == ".json":
        raw = json.dumps(data).encode()
    elif form == ".csv":
        names = list(data[0])
        cells = [[rng.choice([json.dumps(row.get(name)), "a", ""]) for name in names] for row in data]
        raw = "\r\n".join(
            ",".join(f'"{c}"' if rng.random() < 0.8 else c for c in row) for row in [names, *cells]
        ).encode()
    else:
        raw = lines_of(data)
    if rng.random() < 0.5:
        raw = with_bytes(rng, raw)
    if rng.random() < 0.3:
        at = rng.choice([0, len(raw)])
        raw = raw[:at] + rng.choice(SNIPPETS) + raw[at:]
    return raw.decode("utf-8", "replace").encode("utf-16") if rng.random() < 0.03 else raw


ODD_ARRAYS = [
    pyarrow.array([1, None]),
    pyarrow.array(["a", None]),
    pyarrow.array([b"\xff", b""]),
    pyarrow.array([0.5, float("nan")]),
    pyarrow.array([[1, None], []]),
    pyarrow.array([{"a": 1}, None]),
    pyarrow.array([{"bytes": png(), "path": None}] * 2),
    pyarrow.array([{"bytes": None, "path": "a.png"}, {"bytes": b"no", "path": "b"}]),
    pyarrow.array([None, None]),
    pyarrow.array([2**62, 0], pyarrow.timestamp("ms")),
    pyarrow.array([1, 2], pyarrow.duration("ns")),
    pyarrow.array(["1.5", "2"]).cast(pyarrow.decimal128(5, 2)),
    pyarrow.array(["a", "b"]).dictionary_encode(),
    pyarrow.array([{"__draw__": {"value": "a", "record": "{", "log_prob": 1.0}}] * 2),
    pyarrow.array([{"__draw__": {"value": "a", "record": '{"token_ids": [3]}', "log_prob": None}}] * 2),
    pyarrow.array([{"__json__": "5"}, {"__json__": "{"}]),
    pyarrow.array([{"image": [png()], "route": "s"}] * 2),
    pyarrow.array([True, False]),
    pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(numpy.array([0, 1, 2], "int32")), pyarrow.py_buffer(b"\xff\xfe")
    ),
]


def damaged_parquet(rng, raw):
    """A Parquet file with damaged bytes, or with other columns than are expected."""
    if rng.random() < 0.4:
        return with_bytes(rng, raw)
    table = pyarrow.parquet.read_table(io.BytesIO(raw))
    metadata = table.schema.metadata
    for _ in range(rng.randint(1, 3)):
        names = table.column_names
        if names and rng.random() < 0.5:
            at = rng.randrange(len(names))
            table = table.set_column(at, names[at], rng.choice(ODD_ARRAYS))
        elif names and rng.random() < 0.3:
            table = table.remove_column(rng.randrange(len(names)))
        else:
            name = rng.choice(KEYS + INNER)
            table = table.append_column(name, rng.choice(ODD_ARRAYS))
    if metadata and rng.random() < 0.2:
        metadata = {key: with_bytes(rng, value) for key, value in metadata.items()}
    file = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), file)
    return file.getvalue() if rng.random() < 0.8 else with_bytes(rng, file.getvalue())


def told(call):
    """What a call returns, or the one error that it may raise."""
    try:
        return call()
    except DataError as error:
        return error


def use_rows(path):
    """Reads, checks and encodes a file of rows; returns what became of it."""
    found = told(lambda: read_all(path))
    if isinstance(found, DataError):
        assert str(path) in str(found)
        assert str(told(lambda: read_rows(path))) == str(found)
        return "unreadable"
    report = validate_rows(PLAN, found.rows, "direct", damaged=found.damaged)
    assert report.rows == len(found.rows) + len(found.damaged)
    assert str(report)
    assert json.loads(json.dumps(report.to_dict()))["kept"] == len(report.kept)
    kept = encode_pairs(PLAN, [found.rows[number] for number in report.kept], "direct")
    assert all(isinstance(pair, PreferencePair) for pair in kept)
    pairs = told(lambda: encode_pairs(PLAN, read_rows(path), "direct"))
    if isinstance(pairs, DataError):
        assert len(report.kept) < report.rows
        return "refused"
    assert len(pairs) == report.rows - report.counts.get("empty", 0)  # which are left out, and said
    return "used" if pairs else "no rows"


def use_trace(path):
    trace = told(lambda: Trace.load(path))
    if isinstance(trace, DataError):
        assert str(path) in str(trace)
        return "refused"
    assert all(isinstance(trace[name], list) for name in (*trace.inputs, *trace.cells))
    trace.save(path)
    return "used"


def source(path, name, make):
    """The bytes of a file that one of the writers made."""
    make(path / name)
    return (path / name).read_bytes()


CASES = {  # form, and what at least a twentieth of its files must come to, so that the damage is neither total nor none
    "rows.jsonl": ("refused", "used"),
    "rows.json": ("refused", "used", "unreadable"),
    "rows.csv": ("refused", "unreadable"),
    "rows.parquet": ("refused", "unreadable"),
    "trace.jsonl": ("refused", "used"),
    "trace.parquet": ("refused", "used"),
}
EXAMPLES = 400  # of each case


@pytest.mark.parametrize("name", CASES)
def test_every_damaged_file_is_told_or_used(name, tmp_path):
    kind, _, ending = name.partition(".")
    path = tmp_path / name
    raw = source(tmp_path, name, TRACE.save if kind == "trace" else lambda to: write_pairs(to, rows())) if ending in (
        "jsonl", "parquet") else b""  # fmt: skip
    data = [json.loads(line) for line in raw.splitlines()] if ending == "jsonl" else ENCODED
    seen = Counter()

    # The same damage in every run: of other draws some come to a file less than is asked for below.
    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
    )
    @given(st.integers(0, 2**64))
    def check(seed):
        rng = random.Random(seed)
        damaged = damaged_parquet(rng, raw) if ending == "parquet" else damaged_text(rng, data, f".{ending}")
        path.write_bytes(damaged)
        seen[use_trace(path) if kind == "trace" else use_rows(path)] += 1

    check()
    assert seen.total() >= EXAMPLES
    assert all(seen[outcome] >= EXAMPLES / 20 for outcome in CASES[name]), seen


def test_the_files_can_be_used_before_they_are_damaged(tmp_path):
    for ending in ("jsonl", "parquet"):
        write_pairs(tmp_path / f"rows.{ending}", rows())
        assert use_rows(tmp_path / f"rows.{ending}") == "used"
        assert validate_rows(PLAN, read_rows(tmp_path / f"rows.{ending}"), "direct").kept == (0, 1)
        TRACE.save(tmp_path / f"trace.{ending}")
        assert use_trace(tmp_path / f"trace.{ending}") == "used"
