"""Values of all kinds that can be stored, and when two of them are the same."""

import numpy
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image

from sysdag.traces.cells import Draw
from sysdag.traces.trace import Trace


def same(first, second) -> bool:
    """Equality of values that also compares types, array bytes, pixels and NaN; dicts' keys may be in another order."""
    if isinstance(first, Image.Image) and isinstance(second, Image.Image):
        return (first.mode, first.size, first.tobytes()) == (second.mode, second.size, second.tobytes())
    if isinstance(first, dict) and isinstance(second, dict):  # also of a subclass
        return len(first) == len(second) and all(key in second and same(first[key], second[key]) for key in first)
    if type(first) is not type(second):
        return False
    if isinstance(first, Trace):
        return all(
            list(getattr(first, part)) == list(getattr(second, part))
            and same(dict(getattr(first, part)), dict(getattr(second, part)))
            for part in ("inputs", "cells", "columns")
        )
    if isinstance(first, Draw):
        return all(same(getattr(first, name), getattr(second, name)) for name in ("value", "record", "log_prob"))
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, (numpy.ndarray, numpy.generic)):
        return (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())
    if isinstance(first, float):
        return repr(first) == repr(second)
    return first == second


text = st.text(st.characters(), max_size=8)  # half surrogates, too
whole = st.integers() | st.integers(-(2**2100), 2**2100)
images = st.builds(
    lambda mode, size, seed: Image.frombytes(
        mode, size, bytes((seed + 7 * at) % 256 for at in range(len(Image.new(mode, size).tobytes())))
    ),
    st.sampled_from(["1", "L", "RGB", "RGBA", "F"]),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(0, 255),
)
arrays = st_numpy.arrays(st.sampled_from(["float32", "int64", "bool", "<U2"]), st_numpy.array_shapes(max_side=2))
scalars = st.none() | st.booleans() | whole | st.floats() | text | st.binary(max_size=4)
special = images | arrays | arrays.map(lambda array: array.ravel()[0])
kinds = st.sampled_from(["__tuple__", "__draw__", "__json__", "__png__", "__dict__", "__unknown__", "bytes", "path"])
keys = text | st.integers() | st.tuples(st.integers(), text)
values = st.recursive(
    scalars | special,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(text | kinds, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=6,
)
log_probs = st.none() | st.floats() | st.integers(-5, 0)
records = st.just({}) | st.dictionaries(st.text(max_size=4), values, max_size=2)
draws = st.builds(Draw, values, records, log_probs)
plain_draws = st.builds(Draw, st.text(max_size=4), st.just({"token_ids": [1, 2], "finished": True}), st.floats())
plates = st.lists(draws, max_size=3).map(tuple)
plain_plates = st.lists(plain_draws, max_size=3).map(tuple)


def columns(rows: int):
    """A column of a trace: of one kind throughout, or of any."""
    kinds = [values, st.text(max_size=4), st.none() | st.text(max_size=4), st.integers(), st.floats(), st.booleans()]
    return st.sampled_from(kinds).flatmap(lambda kind: st.lists(kind, min_size=rows, max_size=rows))


def cells(rows: int):
    """A node's cells: draws, a plate's, or both."""
    kinds = [draws, plain_draws, plates, plain_plates, draws | plates]
    return st.sampled_from(kinds).flatmap(lambda kind: st.lists(kind, min_size=rows, max_size=rows))


traces = st.integers(1, 3).flatmap(
    lambda rows: st.builds(
        Trace,
        st.fixed_dictionaries({"x": columns(rows), "prompt": columns(rows)}),
        st.fixed_dictionaries({"a": cells(rows), "b[0]": cells(rows), "a.record": cells(rows)}),
        st.fixed_dictionaries({}, optional={"prompt": columns(rows), "score": columns(rows)}),
    )
)
