"""The study's document says what its CSVs say."""

import csv

import numpy
import pytest

pytest.importorskip("matplotlib")

from scipy import stats

from bench.measure import RESULTS
from bench.study import PAGE, README, document, figures, write
from bench.study.compare import Comparison, Variant, curves, rows
from bench.study.document import Results, written
from bench.study.tables import LOSSES, TABLES
from bench.study.written import Table

JOINT, SEPARATE = [0.85, 0.9, 0.83], [0.8, 0.82, 0.81]


@pytest.fixture
def folder(tmp_path):
    """`draft-refine` with two methods on three seeds, as the study writes it."""
    table = Comparison(
        name="draft-refine", function="letters:align", metrics=["exact", "quality", "draft share"], reference="joint",
        seeds=3,
        variants=[Variant(name=name, options={}) for name in ("joint", "separate")],
    )  # fmt: skip
    found = {}
    for name, values in {"joint": JOINT, "separate": SEPARATE}.items():
        for seed, value in enumerate(values):
            margins = {"nodes/draft/rewards/margins": (4.0, 2.0), "nodes/answer/rewards/margins": (1.5, 0.5)}
            logs = [{"step": step} | {k: of[i] for k, of in margins.items()} for i, step in enumerate((4, 8))]
            curve = {"steps": [0, 8], "validation": [0.5, value], "logs": logs, "cpu_seconds": 10.0, "best_step": 8}
            parts = 2 if name == "separate" else 1
            found[name, seed] = {"heldout": {"exact": [value], "quality": [value]}, "curves": [curve] * parts}
    write(tmp_path / "draft-refine.csv", [row | {"machine": "a machine"} for row in rows(table, found, {"joint": 3.0})])
    write(tmp_path / "draft-refine-curves.csv", curves(table, found))
    return tmp_path


def test_figures_in_the_text_are_those_of_the_table(folder):
    results = Results(folder)
    low, high = stats.t.interval(0.95, 2, numpy.mean(JOINT) * 100, stats.sem(JOINT) * 100)
    assert written(results, "{{mean draft-refine | joint | exact}}") == f"86.0 ± {(high - low) / 2:.1f}"
    difference = (numpy.array(JOINT) - SEPARATE) * 100
    low, high = stats.t.interval(0.95, 2, difference.mean(), stats.sem(difference))
    p = stats.ttest_rel(JOINT, SEPARATE).pvalue
    minus = "\N{MINUS SIGN}"
    assert written(results, "{{difference draft-refine | separate | joint | exact}}") == (
        f"{minus}5.0 [{-high:.1f}, {-low:.1f}], p = {p:.2f}".replace("[-", f"[{minus}").replace(" -", f" {minus}")
    )
    assert written(results, "{{mean draft-refine | joint | draft share}} %, {{machine}}") == "75.0 ± 0.0 %, a machine"


def test_a_claim_holds_only_where_the_interval_leaves_no_doubt(folder):
    results = Results(folder)
    rows = results.tables["draft-refine"].found
    for ours, verdict in (([0.9, 0.91, 0.92], "held"), ([0.7, 0.72, 0.7], "the reverse"), ([0.9, 0.7, 0.8], "open")):
        rows["joint", "exact"].update({f"seed {seed}": value for seed, value in enumerate(ours)})
        assert written(results, "{{claim draft-refine | joint | separate | exact}}") == verdict


def test_a_table_shows_every_method_with_what_is_asked(folder):
    table = Table(folder / "draft-refine.csv")
    table.found.pop(("joint", "best step"))
    lines = table.markdown(["exact", "best step"], ["cpu_seconds", "rate"], "joint").split("\n")
    assert lines[0] == "|  | exact, % | best step | exact against joint | training, CPU s | rate |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| joint", "| separate"]
    assert lines[2].endswith("|  |  | 10 | 3 |")
    assert "coverage" not in table.markdown(["exact"], ["coverage"])
    assert lines[3].endswith("| 16 ± 0 | \N{MINUS SIGN}5.0 (p = 0.10) | 20 |  |")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{median draft-refine | joint | exact}}", "is none of table, mean"),
        ("{{mean drafts | joint | exact}}", "names no table"),
        ("{{mean draft-refine | jiont | exact}}", "jiont.*not in the table"),
    ],
)
def test_a_placeholder_that_means_nothing_is_an_error(folder, text, problem):
    with pytest.raises(ValueError, match=problem):
        written(Results(folder), text)


def test_what_was_not_measured_is_said_to_be_so(folder):
    assert written(Results(folder), "{{mean noise | DPO, 0% flipped | exact}}") == document.NOT_MEASURED


def test_a_second_part_of_a_training_goes_on_where_the_first_ended():
    parts = {"0": {0: 0.1, 8: 0.2}, "1": {0: 0.2, 8: 0.4, 16: 0.3}}
    curve = [
        {"part": part, "seed": seed, "step": str(step), "validation": str(value + int(seed))}
        for seed in "01"
        for part, values in parts.items()
        for step, value in values.items()
    ]
    steps, values = figures.by_step(curve)
    assert steps.tolist() == [0, 8, 16, 24]
    assert values == pytest.approx(numpy.array([[0.1, 0.2, 0.4, 0.3], [1.1, 1.2, 1.4, 1.3]]))


def test_every_figure_is_drawn_alike_from_the_same_tables(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(document.LEARNING, "draft-refine", {"both": document.of_methods("joint", "separate")})
    monkeypatch.setitem(document.ESTIMATES, "draft-refine", ("exact", "quality"))
    names = {"draft-refine.svg", "draft-refine-curves.svg"}
    for where in ("one", "two"):
        Results(folder).draw(tmp_path / where)
        assert {path.name for path in (tmp_path / where).iterdir()} == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert b"separate" in (tmp_path / "one" / name).read_bytes()


def test_sweeps_and_loops_are_drawn_from_their_tables(folder, tmp_path):
    """The names of the study's own rows, with figures that do not matter here."""
    some = (folder / "draft-refine.csv").read_text().split("\n")
    for name in ("noise", "misled-drafts", "critic-loop-1", "critic-loop-2"):
        lines = [
            line.replace("joint", f'"{variant.name}"')
            for variant in TABLES[name].variants
            for line in some
            if line.startswith("joint,")
        ]
        lines += [line.replace(",quality,", ",draft exact,") for line in lines]
        (folder / f"{name}.csv").write_text("\n".join([some[0], *lines]) + "\n")
    results = Results(folder)
    for name in ("draft-refine", "draft-refine-curves"):
        results.figures.pop(name)
    results.draw(tmp_path / "drawn")
    drawn = {path.stem: path.read_text() for path in (tmp_path / "drawn").iterdir()}
    assert drawn.keys() == {"noise", "misled-drafts", "critic-loop"}
    assert all(f"<!-- {loss} -->" in drawn["noise"] for loss in LOSSES)
    assert all(f"<!-- {method}, robust -->" in drawn["misled-drafts"] for method in ("joint", "direct"))
    assert all(f"<!-- {method} -->" in drawn["critic-loop"] for method in ("before", "naive", "unrolled"))


def test_outcomes_are_drawn_against_what_was_logged_first(folder, tmp_path):
    """Points of the methods that logged it, one of two that are equal; their rank correlation, by hand for four."""
    coverage = {"joint": 0.9, "Monte Carlo, k = 2": 0.5, "Monte Carlo, k = 4": 0.7, "Monte Carlo, k = 8": 0.6}
    exact = {"joint": 0.8, "Monte Carlo, k = 2": 0.6, "Monte Carlo, k = 4": 0.9, "Monte Carlo, k = 8": 0.7}
    for values in (coverage, exact):
        values["again"] = values["joint"]
    lines = ["method,metric,mean,low,high,seed 0,seed 1", "direct,exact,0.1,0,0.2,0,0.2"]
    lines += [f'"{name}",exact,{value},0,1,0,1' for name, value in exact.items()]
    (folder / "candidates.csv").write_text("\n".join(lines) + "\n")
    lines = ["method,part,seed,step,validation,candidates/coverage"]
    for seed, more in enumerate((-0.1, 0.1)):
        lines += [f"direct,0,{seed},8,0.1,"]
        for name, value in coverage.items():
            lines += [f'"{name}",0,{seed},0,0.1,', f'"{name}",0,{seed},8,0.1,{value + more}']
            lines += [f'"{name}",0,{seed},16,0.1,{1 - value}']
    (folder / "candidates-curves.csv").write_text("\n".join(lines) + "\n")
    results = Results(folder)
    assert written(results, "{{correlation candidates | candidates/coverage | exact}}") == "+0.80 over 4 rows"
    results.figures["candidates-coverage"](tmp_path / "drawn.svg")
    drawn = (tmp_path / "drawn.svg").read_text()
    assert [drawn.count(f"<!-- {text} -->") for text in ("Monte Carlo", "again", "direct")] == [1, 1, 0]


def test_the_page_is_what_its_csvs_and_its_text_say():
    results = Results(RESULTS / "study")
    assert PAGE.read_text() == written(results, document.TEMPLATE.read_text()), "python -m bench study --document-only"
    readme = README.read_text()
    assert document.in_readme(readme, RESULTS / "study") == readme
    for name in results.tables:
        with (RESULTS / "study" / f"{name}.csv").open() as file:
            assert {row["seeds"] for row in csv.DictReader(file)} <= {"3", "5"}
