"""What a report draws: values of traces, charts, the graph."""

import base64
import io
import itertools
import json
import math
import re

import numpy
import pytest
import switched_systems
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_runs import system

from sysdag import Draw, Trace
from sysdag.reporting.charts import HEIGHT, WIDTH, Line, draw
from sysdag.reporting.formats import breadth
from sysdag.reporting.history import Series
from sysdag.reporting.layout import LETTER, lay_out
from sysdag.reporting.thinning import thin
from sysdag.reporting.topology import Topology
from sysdag.reporting.values import MOST_ELEMENTS, MOST_LETTERS, shown, shown_pair, side_by_side
from sysdag.saving.serialization import system_to_dict


def trace(answer, question):
    return Trace({"question": [question]}, {"answer": [Draw(answer)]})


def test_traces_of_other_prompts_are_not_compared():
    before, after = trace("one", "a"), trace("two", "b")
    (prompt,) = side_by_side({"before": before, "after": after}, 5)
    assert [step.after for step in prompt.steps] == [None]


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK", "F", "I;16"])
def test_images_of_any_mode(mode):
    found = shown(Image.new(mode, (400, 2)))
    assert found.kind == "image"
    assert Image.open(io.BytesIO(base64.b64decode(found.image.split(",")[1]))).size == (320, 2)


def test_long_values_are_cut_and_what_is_left_out_is_counted():
    assert shown("x" * (MOST_LETTERS + 1234)).note == "… 1,234 more characters"
    found = shown([str(number) for number in range(MOST_ELEMENTS + 5)])
    assert len(found.elements) == MOST_ELEMENTS
    assert found.note == "and 5 more elements"
    left, right = shown_pair("a " * 2000, "b " * 2000)
    assert [sort for sort, _ in left.words + right.words] == ["gone", "new"]


text_or_words = st.one_of(st.text(), st.lists(st.sampled_from(["a", "b", " ", ".", "the"])).map("".join))


@given(text_or_words, text_or_words)
def test_marked_texts_are_the_texts(before, after):
    left, right = shown_pair(before, after)
    assert "".join(text for _, text in left.words) == before
    assert "".join(text for _, text in right.words) == after
    same = [["".join(t for s, t in side.words if s == "same")] for side in (left, right)]
    assert same[0] == same[1]
    assert {sort for sort, _ in left.words} <= {"same", "gone"}
    assert {sort for sort, _ in right.words} <= {"same", "new"}


def test_lists_are_compared_element_by_element():
    left, right = shown_pair(["one", "two"], ["one", "three", "four"])
    assert [element.words for element in left.elements] == [(("same", "one"),), (("gone", "two"),)]
    assert [element.words for element in right.elements] == [
        (("same", "one"),), (("new", "three"),), (("new", "four"),)
    ]  # fmt: skip


values = st.lists(st.one_of(st.floats(-1e9, 1e9), st.just(math.nan)), min_size=1, max_size=300)


@given(values, st.integers(5, 60))
def test_thinning_keeps_the_extremes_and_the_ends(numbers, most):
    kept = thin(numbers, most)
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    assert kept[-1] == len(numbers) - 1
    assert len(kept) <= most
    finite = [value for value in numbers if math.isfinite(value)]
    left = [numbers[at] for at in kept if math.isfinite(numbers[at])]
    if finite:
        assert (min(left), max(left)) == (min(finite), max(finite))
    assert any(math.isnan(numbers[at]) for at in kept) == any(map(math.isnan, numbers))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1e30, 1e30).filter(lambda v: v == 0 or abs(v) > 1e-30), min_size=1, max_size=30), st.booleans()
)
def test_points_of_a_chart_lie_within_it(numbers, is_log):
    series = Series(tuple(range(0, 3 * len(numbers), 3)), tuple(numbers))
    chart = draw("t", "a", [Line("l", 0, series)], points=400, span=(0, series.steps[-1]), is_log=is_log)
    places = [tuple(map(float, part.split(" "))) for part in re.split("[ML]", chart.curves[0].path)[1:]]
    assert len(places) == len(numbers)
    for x, y in places:
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
    heights = [-y for _, y in places]
    assert all(heights[i] <= heights[j] + 0.11 for i, j in itertools.pairwise(numpy.argsort(numbers, kind="stable")))
    for tick in (*chart.x_ticks, *chart.y_ticks):
        assert -0.1 <= tick.at <= WIDTH


def test_what_is_not_finite_is_a_gap():
    series = Series((1, 2, 3, 4, 5), (1.0, 2.0, math.nan, 3.0, 4.0))
    chart = draw("t", "a", [Line("l", 0, series)], points=400, span=(1, 5))
    assert re.findall("[ML]", chart.curves[0].path) == ["M", "L", "M", "L"]
    assert chart.curves[0].values == "1 2 nan 3 4"
    assert chart.curves[0].steps == "1 1 1 1 1"
    assert draw("t", "a", [Line("l", 0, Series((1,), (math.nan,)))], points=400, span=(1, 5)) is None


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 9))
    names = [f"n{i}" for i in range(count)]
    pairs = [(a, b) for i, a in enumerate(["x", *names]) for b in names[i:]]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=20))
    return Topology.of(system(dict.fromkeys(names, "c"), edges, ("x",)))


@settings(deadline=None, max_examples=60)
@given(graphs())
def test_boxes_do_not_overlap_and_arrows_point_down(topology):
    layout = lay_out(topology)
    level = {name: depth for depth, names in enumerate(topology.levels) for name in names}
    assert {box.name for box in layout.boxes} == {"x", *topology.component_of}
    assert len(layout.boxes) == len(level)
    for one, other in itertools.combinations(layout.boxes, 2):
        apart_x = abs(one.x - other.x) >= (one.width + other.width) / 2
        apart_y = abs(one.y - other.y) >= (one.height + other.height) / 2
        assert apart_x or apart_y
    for box in layout.boxes:
        assert box.width / 2 <= box.x <= layout.width - box.width / 2
        assert box.height / 2 <= box.y <= layout.height - box.height / 2
    assert all(level[parent] < level[child] for parent, child, _ in topology.edges)
    place = {box.name: box for box in layout.boxes}
    for arrow in layout.arrows:
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d", arrow.path)]
        xs, ys = numbers[::2], numbers[1::2]
        assert (xs[0], ys[0]) == (place[arrow.parent].x, place[arrow.parent].y + place[arrow.parent].height / 2)
        assert ys == sorted(ys)
        assert xs[-1] == place[arrow.child].x


def test_the_topology_of_a_recorded_system_is_that_of_its_plan():
    from trained_systems import two_llms

    from sysdag.saving.serialization import system_to_dict

    plan = two_llms().compile()
    topology = Topology.of(system_to_dict(plan.system))
    assert topology.levels == (("question",), *(tuple(names) for names in plan.levels))
    assert list(topology.component_of) == list(plan.order)
    assert {edge[:2] for edge in topology.edges} == {(edge.parent, edge.child) for edge in plan.system.edges}
    assert topology.outputs == tuple(plan.system.outputs)


def test_features_are_folded():
    vector = [0.125 * number for number in range(40)]
    found = shown(vector)
    assert (found.kind, found.folded) == ("text", "40 numbers: 0, 0.125, 0.25, …")
    assert json.loads(found.words[0][1]) == vector
    assert shown(numpy.ones((4, 5))).folded == "20 numbers of shape (4, 5): 1, 1, 1, …"
    before, after = shown_pair(vector, [*vector[:-1], 7.0])
    assert before.folded == found.folded
    assert json.loads(after.words[0][1])[-1] == 7.0
    for short in ([1.0, 2.0], ["a"] * 20, [True] * 20, "1, 2, 3", numpy.ones(3)):
        assert shown(short).folded == ""


@pytest.mark.parametrize("name", ["a", "W" * 30, "an_ordinary_name", "x" * 80, "\u56fe" * 30])
def test_no_text_is_wider_than_its_box(name):
    [box] = lay_out(Topology((name,), {}, (), (), ((name,),))).boxes
    assert LETTER * breadth(box.title) <= box.width - 12
    assert box.title == name or box.title.endswith("…")
    assert name.startswith(box.title.removesuffix("…"))
    assert box.squeezes("chosen \u22121.2e\u221210, rejected \u22123.4e\u221210") == (box.width < 200)
    assert not box.squeezes("input")


def test_branches_of_switches_are_drawn_from_their_router():
    plan = switched_systems.build(behind=True).compile()
    topology = Topology.of(system_to_dict(plan.system))
    assert ("route", "solution", False) not in topology.edges
    assert topology.beside == {("route", "solve"): "math", ("route", "outline"): "code"}
    assert {edge[:2] for edge in topology.edges} == {
        (edge.parent, edge.child) for edge in plan.system.edges if (edge.parent, edge.child) != ("route", "solution")
    }
    drawn = {(arrow.parent, arrow.child): arrow for arrow in lay_out(topology).arrows}
    box = next(box for box in lay_out(topology).boxes if box.name == "outline")
    arrow = drawn["route", "outline"]
    assert (arrow.beside, arrow.x) == ("code", box.x)
    assert arrow.y < box.y - box.height / 2
    assert drawn["outline", "write"].beside == ""


def test_runs_side_by_side_leave_out_what_did_not_run():
    plan = switched_systems.build().compile()
    trace = plan.sample({"x": ["a"] * 12}, seed=0)
    of_math, of_code = trace["route"].index("math"), trace["route"].index("code")
    before, after = trace.select([of_math, of_math]), trace.select([of_math, of_code])
    same, other = side_by_side({"before": before, "after": after}, 2)
    assert [step.node for step in same.steps] == ["route", "solve", "solution"]
    found = {step.node: step for step in other.steps}
    assert (found["solve"].before is None, found["solve"].after is None) == (False, True)
    assert (found["write"].before is None, found["write"].after is None) == (True, False)
    assert found["write"].changed
    (alone, _) = side_by_side({"after": after}, 2)
    assert [step.node for step in alone.steps] == ["route", "solve", "solution"]
