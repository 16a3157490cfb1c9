"""Rows of data for systems with switches: what is absent, what is refused, and rows that runs become."""

import pytest
from switched_systems import build

from sysdag import DataError, Input, System, node, switch
from sysdag.components import Tabular
from sysdag.data.branches import Run
from sysdag.data.encoding import encode_pairs
from sysdag.data.logs import logged_runs
from sysdag.data.validation import validate_rows
from sysdag.evaluation.evaluation_runs import HeldOut, chosen_runs
from sysdag.traces.cells import ABSENT, Draw
from sysdag.traces.pairs import preference_row, write_pairs
from sysdag.traces.readers import read_rows

MATH = {"route": "math"}
CODE = {"route": "code", "outline": "o"}


def row(chosen=MATH, rejected=CODE, **others):
    between = {"chosen_intermediates": chosen, "rejected_intermediates": rejected}
    return {"x": "a", "chosen": "u", "rejected": "v", **between, **others}


def problems(given, objective="direct", system=None):
    return [str(each) for each in validate_rows((system or build()).compile(), [given], objective).problems]


def test_intermediates_of_the_branch_that_was_taken_are_all_that_is_needed():
    plan = build().compile()
    for given in (row(), row({**MATH, "write": None, "outline": None, "solve": "u"})):
        assert problems(given) == []
        (pair,) = encode_pairs(plan, [given], "direct")
        assert pair.chosen.keys() == pair.rejected.keys() == {"route", "solve", "outline", "write"}
        assert [pair.chosen[name] is ABSENT for name in ("solve", "outline", "write")] == [False, True, True]
        assert [pair.rejected[name] is ABSENT for name in ("solve", "outline", "write")] == [True, False, False]
        assert (pair.chosen["solve"].value, pair.rejected["write"].value) == ("u", "v")
    keys = {encode_pairs(plan, [each], "direct")[0].key for each in (row(), row(CODE, CODE), row(MATH, MATH))}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (row({**MATH, "outline": "o"}), "Row 0, chosen, node 'outline': a value is given, but the branch that 'route' "
         "took is another; leave it out."),
        (row({**MATH, "write": "u"}), "Row 0, chosen, node 'write': a value is given, but the branch that"),
        (row({"route": "poetry"}), "Row 0, chosen: Node 'route': 'poetry' names no branch of the switch 'solution'; "
         "expected one of 'math', 'code'."),
        (row({"route": "code"}), "Row 0: chosen has no value of node 'outline', which direct needs"),
        (row({**MATH, "solve": "v"}), "Row 0, chosen, node 'solve': its value differs from chosen, which it is."),
        (row({"outline": "o"}), "chosen has no value of node 'route', which direct needs."),
        (row({**MATH, "solve": "w"}), "its value differs from chosen"),
        (row(chosen=MATH) | {"chosen": "w"}, "node 'solve': Tabular(2 keys, 2 values): 'w' is none of its values"),
    ],
)  # fmt: skip
def test_what_contradicts_the_router_is_refused(given, text):
    found = problems(given)
    assert any(text in each for each in found), found
    with pytest.raises(DataError):
        encode_pairs(build().compile(), [given], "direct")


def test_the_value_of_a_switch_inside_is_that_of_its_branch():
    plan = build(behind=True).compile()
    given = {"x": "a", "chosen": "s", "rejected": "t", "chosen_intermediates": {**MATH, "solution": "u"},
             "rejected_intermediates": {**CODE, "solution": "v", "write": "v"}}  # fmt: skip
    assert problems(given, system=plan.system) == []
    (pair,) = encode_pairs(plan, [given], "direct")
    assert (pair.chosen["solve"].value, pair.rejected["write"].value) == ("u", "v")
    assert "solution" not in pair.chosen
    given["rejected_intermediates"]["write"] = "u"
    (told,) = problems(given, system=plan.system)
    assert "node 'write': its value differs from that of the switch 'solution', which it is." in told


def test_without_its_router_a_row_is_told_of_the_router_alone():
    (only,) = problems(row({}))
    assert "chosen has no value of node 'route'" in only


def test_for_sampling_the_output_stands_for_every_branch():
    plan = build().compile()
    assert problems(row(), "sampling") == []
    (pair,) = encode_pairs(plan, [row()], "sampling")
    assert pair.chosen.keys() == {"solve", "write"}
    assert {name: draw.value for name, draw in pair.chosen.items()} == {"solve": "u", "write": "u"}
    (told,) = problems({"x": "a", "chosen": "w", "rejected": "u"}, "sampling")[:1]
    assert "'w' is none of its values" in told


def of_kind(x):
    return x["kind"]


def of_text(x):
    return x["text"]


def of_two_kinds():
    """x -> kind, which decides whether one or the other makes the value."""
    x = Input("x")
    tables = {"a": {"u": 0.5, "v": 0.5}}
    one, other = (node(Tabular(tables), name=name)(of_text) for name in ("one", "other"))
    kind = node(name="kind")(of_kind)
    return System(x >> [kind, one, other], switch(kind, {"1": one, "2": other}, name="value"))


def test_routers_that_are_inputs_or_computed_decide_without_being_given():
    system = of_two_kinds()
    given = {"x": {"kind": "2", "text": "a"}, "chosen": "u", "rejected": "v"}
    for objective in ("direct", "sampling"):
        assert problems(given, objective, system) == []
        (pair,) = encode_pairs(system.compile(), [given], objective)
        assert pair.chosen["one"] is ABSENT
        assert pair.chosen["other"].value == "u"
    (told,) = problems({**given, "x": {"kind": "3", "text": "a"}}, "direct", system)[:1]
    assert "'3' names no branch of the switch 'value'" in told
    (told,) = problems({**given, "x": {}}, "direct", system)[:1]
    assert "node 'kind': its function fails on this row: KeyError: 'kind'" in told


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("objective", ["direct", "sampling"])
def test_rows_made_of_runs_are_read_back(tmp_path, ending, objective):
    plan = build().compile()
    trace = plan.sample({"x": ["a"] * 40}, seed=0)
    runs = list(zip(trace["route"], trace["solution"], strict=True))
    chosen, rejected = runs.index(("math", "u")), runs.index(("code", "v"))
    write_pairs(tmp_path / f"rows.{ending}", [preference_row(trace, chosen, rejected, ["solution"])] * 2)
    rows = read_rows(tmp_path / f"rows.{ending}")
    report = validate_rows(plan, rows, objective)
    assert report.is_usable
    assert report.unread == ()
    pair = encode_pairs(plan, rows, objective)[0]
    assert pair.chosen["solve"].record == trace.cells["solve"][chosen].record
    if objective == "direct":
        assert pair.chosen["write"] is ABSENT
        assert pair.rejected["outline"].record == trace.cells["outline"][rejected].record


def test_logs_and_chosen_answers_become_runs_with_absent_values():
    plan = build().compile()
    rows = [{"x": "a", "output": "u", "route": "math"}, {"x": "b", "output": "v", "route": "code", "outline": "p"}]
    trace = logged_runs(plan, rows).trace
    assert (trace["solve"], trace["write"], trace["outline"]) == (["u", None], [None, "v"], [None, "p"])
    assert trace.cells["write"][0] is ABSENT
    assert logged_runs(plan, [{"x": "a", "output": "u"}]).trace["solution"] == ["u"]  # nobody logged the route
    with pytest.raises(DataError, match="node 'outline' has a value, but another branch was taken"):
        logged_runs(plan, [{**rows[0], "outline": "o"}])
    with pytest.raises(DataError, match="'poem' names no branch"):
        logged_runs(plan, [{**rows[0], "route": "poem"}])
    given = HeldOut([row(), row(CODE)], {"x": ["a", "a"]}, {})
    runs = chosen_runs(plan, given)
    assert (runs["solve"], runs["write"], runs["solution"]) == (["u", None], [None, "u"], ["u", "u"])
    assert isinstance(runs.cells["solution"][1], Draw)


def test_a_row_that_a_routers_function_fails_on_is_named_and_skipped():
    plan = of_two_kinds().compile()
    rows = [{"x": {"text": "a", "kind": "1"}, "output": "u"}, {"x": {"text": "a"}, "output": "v"}]
    text = "node 'kind': its function fails on this row: KeyError: 'kind'"
    found = logged_runs(plan, rows, skip=True)
    assert (found.trace["one"], dict(found.bad)) == (["u"], {1: text})
    with pytest.raises(DataError, match=f"^Row 1: {text}$"):
        logged_runs(plan, rows)
    pairs = [{"x": each["x"], "chosen": "u", "rejected": "v"} for each in rows]
    with pytest.raises(DataError, match=f"^Row 1, {text}$"):
        chosen_runs(plan, HeldOut(pairs, {"x": [each["x"] for each in rows]}, {}))


def test_what_a_run_is_asked_reruns_no_function(monkeypatch):
    calls = []

    def counted(x):
        calls.append(x)
        return x["kind"]

    monkeypatch.setattr(f"{__name__}.of_kind", counted)
    run = Run(of_two_kinds().compile(), {"x": {"kind": "2"}}, {"value": "u"})
    before = len(calls)
    assert before
    assert (run.end_of("value"), run.possible_ends("value")) == ("other", ["other"])
    assert len(calls) == before


def test_empty_cells_of_csv_are_no_values_of_branches_that_were_not_taken(tmp_path):
    columns = "chosen_intermediates.route,chosen_intermediates.outline,rejected_intermediates.route,"
    lines = [f"x,chosen,rejected,{columns}rejected_intermediates.outline", "a,u,v,math,,code,o", "a,u,v,math,p,code,o"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    rows = read_rows(tmp_path / "rows.csv")
    assert problems(rows[0]) == []
    (told,) = problems(rows[1])
    assert "node 'outline': a value is given, but the branch that 'route' took is another" in told
