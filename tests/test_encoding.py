"""Values as JSON: what is read back is what was written, in type and in every bit."""

import collections
import enum
import json

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image

from sysdag.errors import DataError
from sysdag.files.encoding import decode_json, decode_value, encode_json, encode_value


def round_trip(value):
    return decode_value(json.loads(json.dumps(encode_value(value, "node"), allow_nan=False)))


DTYPES = ["bool", "int8", "uint64", "float16", "float32", "float64", "complex64", "<U5", "S3", "datetime64[ns]", ">i4"]


@pytest.mark.parametrize("dtype", [*DTYPES, [("a", "i4"), ("b", "f8")]], ids=str)
def test_arrays_of_every_dtype(dtype):
    for array in (numpy.zeros((2, 3), dtype), numpy.zeros((0, 2), dtype), numpy.zeros((), dtype)):
        found = round_trip(array)
        assert (type(found), found.dtype, found.shape) == (numpy.ndarray, array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
        found[...] = found  # a fresh array that can be written to


@settings(max_examples=150, deadline=None)
@given(st_numpy.arrays(st_numpy.scalar_dtypes(), st_numpy.array_shapes(min_dims=0, max_side=4)))
@example(numpy.array([numpy.nan, -0.0, numpy.inf], "float32"))
@example(numpy.array([0x7FC00001, 0xFFC12345], "uint32").view("float32"))  # NaNs of other bits
@example(numpy.asfortranarray(numpy.arange(6).reshape(2, 3)))
def test_arrays_bit_for_bit(array):
    found = round_trip(array)
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    for scalar in array.ravel()[:2]:
        found = round_trip(scalar)
        assert type(found) is type(scalar)
        assert numpy.asarray(found).tobytes() == numpy.asarray(scalar).tobytes()


@pytest.mark.parametrize("value", [2**2048, -(2**2048), 2**2048 - 1, 10**5000, [-(10**5000)]], ids=range(5))
def test_integers_of_more_digits_than_python_reads(value):
    assert round_trip(value) == value
    assert decode_json(json.loads(json.dumps(encode_json(value, "node")))) == value


def test_dicts_stand_for_themselves_in_plain_json():
    value = {"a": {"b": (1, {"__tuple__": [2]})}, "c": {3: 4}, "__x__": 0}
    data = encode_json(value, "node")
    assert data["a"]["b"] == {"__tuple__": [1, {"__dict__": {"__tuple__": [2]}}]}
    assert decode_json(json.loads(json.dumps(data))) == value
    assert decode_json({"__other__": [1]}) == {"__other__": [1]}
    with pytest.raises(ValueError, match="no known kind of value"):
        decode_value({"__other__": [1]})


@pytest.mark.parametrize("decode", [decode_value, decode_json])
def test_what_can_be_written_can_be_read_and_what_is_deeper_neither(decode):
    def nested(levels):
        value = 0
        for _ in range(levels // 2):
            value = [(value,)]
        return value

    encode = encode_value if decode is decode_value else encode_json
    assert decode(json.loads(json.dumps(encode(nested(64), "node")))) == nested(64)
    with pytest.raises(DataError, match="'node': a value is nested more than 64 levels deep"):
        encode(nested(66), "node")
    with pytest.raises(ValueError, match="nested more than 64 levels deep"):
        decode([[encode(nested(64), "node")]])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK", "YCbCr", "HSV", "LAB"])
@pytest.mark.parametrize("size", [(5, 3), (1, 1), (0, 2)])
def test_images_of_every_mode(mode, size):
    length = len(Image.new(mode, size).tobytes())
    image = Image.frombytes(mode, size, bytes((37 * at + 11) % 256 for at in range(length)))
    if mode == "P":
        image.putpalette([(5 * at) % 256 for at in range(768)])
    found = round_trip(image)
    assert (found.mode, found.size, found.tobytes()) == (image.mode, image.size, image.tobytes())
    if mode == "P":
        assert found.convert("RGB").tobytes() == image.convert("RGB").tobytes()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()))
@example("\ud83d\ude00")  # two lone surrogates, which JSON would merge into one character
@example("\u2028\u0085\x1c\r\n\0")
def test_any_text(text):
    assert round_trip(text) == text
    assert round_trip({text: text}) == {text: text}


def test_reserved_words_are_only_text():
    value = {"__tuple__": [1], "__dict__": {"__npy__": "x"}, "__float__": "nan"}
    assert round_trip(value) == value


def test_types_are_kept():
    value = {"t": (1, (2.0, [True, None])), 3: b"\x00\xff", (4, "k"): {}, None: -0.0}
    found = round_trip(value)
    assert found == value
    assert list(found) == list(value)
    assert repr(found) == repr(value)
    assert str(round_trip(float("-inf"))) == "-inf"
    assert repr(round_trip(2**200)) == repr(2**200)


class Label(enum.StrEnum):
    GOOD = "good"


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        {1},
        object(),
        1j,
        Label.GOOD,
        Point(1, 2),
        collections.OrderedDict(),
        numpy.array([object()]),
        numpy.array([(1, None)], [("a", "i4"), ("b", "O")]),
        numpy.array(["a"], numpy.dtypes.StringDType()),
        numpy.ma.masked_array([1, 2], [True, False]),
        [{"deep": ({2},)}],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_change_is_refused(value):
    with pytest.raises(DataError, match=r"'node': .* cannot be written .*without loss"):
        encode_value(value, "node")


@pytest.mark.parametrize("data", [{}, {"a": 1}, {"__set__": []}, {"__tuple__": [], "__dict__": {}}])
def test_unknown_kinds(data):
    with pytest.raises(ValueError, match="no known kind of value"):
        decode_value(data)
