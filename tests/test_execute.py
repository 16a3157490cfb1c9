import inspect
import math

import pytest
import torch

from sysdag import DataError, Draw, Input, PlanError, System, Trace, loop, node
from sysdag.components import Opaque, Tabular
from sysdag.execution.execute import fill, sample
from sysdag.execution.likelihood import log_probs

X = Input("x")
COIN = Tabular({"a": {"h": 0.9, "t": 0.1}, "b": {"h": 0.2, "t": 0.8}})
FLIP = Tabular({("a", "h"): {"u": 0.6, "v": 0.4}, ("a", "t"): {"u": 0.5, "v": 0.5},
                ("b", "h"): {"u": 0.1, "v": 0.9}, ("b", "t"): {"u": 0.7, "v": 0.3}})  # fmt: skip


@node(COIN)
def coin(x):
    return x


@node(FLIP)
def flip(x, coin):
    return x, coin


@node
def letters(coin) -> list:
    return ["a", "b"] if coin == "h" else ["b"]


@node(COIN, name="spread")
def spread(letters):
    return letters


PLAN = System(X >> coin, (X & coin) >> flip).compile()
PLATE = System(X >> coin, coin >> letters, letters.each() >> spread).compile()


def test_a_run_records_every_variable_and_scores_to_what_it_was_drawn_with():
    trace = PLAN.sample({"x": ["a", "b"] * 20}, seed=0)
    assert len(trace) == 40
    scored = PLAN.log_probs(trace)
    assert scored.keys() == {"coin", "flip"}
    for name, values in scored.items():
        assert values.tolist() == pytest.approx([cell.log_prob for cell in trace.cells[name]])
    for row, (x, c, f) in enumerate(zip(trace["x"], trace["coin"], trace["flip"], strict=True)):
        joint = {"a": {"h": 0.9, "t": 0.1}, "b": {"h": 0.2, "t": 0.8}}[x][c]
        joint *= (
            {("a", "h"): 0.6, ("a", "t"): 0.5, ("b", "h"): 0.1, ("b", "t"): 0.7}[x, c]
            if f == "u"
            else ({("a", "h"): 0.4, ("a", "t"): 0.5, ("b", "h"): 0.9, ("b", "t"): 0.3}[x, c])
        )
        assert float(sum(values[row] for values in scored.values()).exp()) == pytest.approx(joint)


def test_a_plate_runs_once_an_element_and_its_factor_is_the_sum():
    trace = PLATE.sample({"x": ["a", "b", "a", "b", "b"]}, seed=1)
    assert {len(values) for values in trace["spread"]} == {1, 2}
    probability = {("a", "h"): 0.9, ("a", "t"): 0.1, ("b", "h"): 0.2, ("b", "t"): 0.8}
    by_row = [
        sum(math.log(probability[pair]) for pair in zip(keys, values, strict=True))
        for keys, values in zip(trace["letters"], trace["spread"], strict=True)
    ]
    assert PLATE.log_probs(trace)["spread"].tolist() == pytest.approx(by_row, abs=1e-6)


def test_an_empty_plate_has_no_factor():
    @node
    def none(x) -> list:
        return []

    plan = System(X >> none, none.each() >> spread_of("none")).compile()
    trace = plan.sample({"x": ["a", "b"]}, seed=0)
    assert trace["spread"] == [[], []]
    assert plan.log_probs(trace)["spread"].tolist() == [0, 0]


def spread_of(parameter):
    def spread(**kwargs):
        return kwargs[parameter]

    spread.__signature__ = inspect.Signature([inspect.Parameter(parameter, inspect.Parameter.KEYWORD_ONLY)])
    return node(COIN, name="spread")(spread)


def test_the_score_of_a_row_does_not_depend_on_its_neighbours():
    trace = PLATE.sample({"x": ["a", "b", "a"]}, seed=3)
    whole = PLATE.log_probs(trace)
    shuffled = PLATE.log_probs(trace.select([2, 0, 1]))
    for name in whole:
        torch.testing.assert_close(whole[name][[2, 0, 1]], shuffled[name])
        torch.testing.assert_close(PLATE.log_probs(trace.select([1]))[name], whole[name][1:2])


def test_the_visits_of_a_loop_are_one_factor_each_under_one_set_of_weights():
    table = Tabular({"h": {"h": 0.3, "t": 0.7}, "t": {"h": 0.6, "t": 0.4}})

    @node(table)
    def turn(coin):
        return coin

    plan = System(X >> coin, loop(coin >> turn, carry={"coin": turn}, times=2)).compile()
    trace = Trace(
        {"x": ["a"]}, {"coin": COIN.observe(["h"]), "turn[0]": table.observe(["t"]), "turn[1]": table.observe(["t"])}
    )
    joint = sum(plan.log_probs(trace).values())
    assert float(joint.exp()) == pytest.approx(0.9 * 0.7 * 0.4)
    joint.sum().backward()
    log_table = table.module.logits.detach().log_softmax(-1).exp()
    expected = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64) - log_table
    torch.testing.assert_close(table.module.logits.grad, expected)
    table.module.logits.grad = None


def test_given_values_are_kept_and_the_rest_is_drawn():
    given = Trace({"x": ["a"] * 30}, {"coin": COIN.observe(["t"] * 30)})
    trace = sample(PLAN, given.inputs, seed=0, given=given)
    assert set(trace["coin"]) == {"t"}
    assert set(trace["flip"]) == {"u", "v"}


def test_deterministic_nodes_are_filled_in_as_far_as_their_parents_go():
    partial = Trace({"x": ["a", "b"]}, {"coin": COIN.observe(["h", "t"])})
    assert fill(PLATE, partial)["letters"] == [["a", "b"], ["b"]]
    assert "letters" not in fill(PLATE, Trace({"x": ["a"]}, {})).cells


def test_seeds():
    inputs = {"x": ["a", "b"] * 10}
    assert PLAN.sample(inputs, seed=4)["flip"] == PLAN.sample(inputs, seed=4)["flip"]
    assert PLAN.sample(inputs, seed=4)["flip"] != PLAN.sample(inputs, seed=5)["flip"]
    torch.manual_seed(7)
    first = PLAN.sample(inputs)["flip"]
    assert PLAN.sample(inputs)["flip"] != first
    torch.manual_seed(7)
    assert PLAN.sample(inputs)["flip"] == first
    with pytest.raises(PlanError, match="not both"):
        sample(PLAN, inputs, seed=1, generator=torch.Generator())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"each of \['x'\], got \[\]"),
        ({"x": ["a"], "y": ["b"]}, r"got \['x', 'y'\]"),
        (["a"], "got list"),
        ({"x": "a"}, "'x' must be a list with one value a row, got str"),
    ],
)
def test_wrong_inputs_are_named(inputs, message):
    with pytest.raises(PlanError, match=message):
        PLAN.sample(inputs)


def test_ragged_inputs_are_named():
    @node
    def both(x, y):
        return x + y

    plan = System((X & Input("y")) >> both).compile()
    with pytest.raises(PlanError, match=r"same number of rows, got {'x': 1, 'y': 2}"):
        plan.sample({"x": ["a"], "y": ["b", "c"]})


def test_errors_in_a_run_name_the_node_and_the_row():
    with pytest.raises(DataError, match="Node 'coin', row 1: .*no row for 'c'"):
        PLAN.sample({"x": ["a", "c"]})

    @node
    def divide(x):
        return 1 / x

    with pytest.raises(ZeroDivisionError) as error:
        System(X >> divide).compile().sample({"x": [1, 0]})
    assert error.value.__notes__ == ["In the function of node 'divide', row 1."]

    @node
    def text(x):
        return "no list"

    with pytest.raises(
        PlanError, match=r"text.each\(\) >> spread, row 0: a plate needs a list, but 'text' is str 'no list'"
    ):
        System(X >> text, text.each() >> spread_of("text")).compile().sample({"x": ["a"]})


def test_plates_of_different_lengths_are_named():
    @node
    def one(x) -> list:
        return ["a"]

    @node
    def two(x) -> list:
        return ["a", "b"]

    @node
    def pair(one, two):
        return one, two

    plan = System(X >> [one, two], (one.each() & two.each()) >> pair).compile()
    with pytest.raises(PlanError, match=r"Node 'pair', row 0: its plates have different lengths {'one': 1, 'two': 2}"):
        plan.sample({"x": ["a"]})


def test_only_exact_factors_have_log_probs():
    @node(Opaque(str.upper))
    def tool(coin):
        return coin

    plan = System(X >> coin, coin >> tool).compile()
    trace = plan.sample({"x": ["a"]}, seed=0)
    with pytest.raises(PlanError, match="Node 'tool'.*no exact likelihood.*'none'"):
        plan.log_probs(trace)
    assert log_probs(plan, trace, nodes=["coin"]).keys() == {"coin"}
    with pytest.raises(PlanError, match="no values of node 'coin'"):
        log_probs(plan, trace.only(["tool"]), nodes=["coin"])


def test_a_plate_with_another_number_of_draws_is_named():
    trace = PLATE.sample({"x": ["a"]}, seed=0)
    wrong = trace.updated({"spread": [(COIN.observe(["h"])[0],) * 3]})
    with pytest.raises(PlanError, match="Node 'spread', row 0: its plate has 2 elements, but the trace holds 3 values"):
        PLATE.log_probs(wrong)
    with pytest.raises(PlanError, match="the trace holds one value"):
        PLATE.log_probs(trace.updated({"spread": [Draw("h", {"index": 0})]}))
