"""The study in miniature: what its cells keep, how its tables are made of them, and one table from end to end."""

import csv
import dataclasses
import itertools
import json
import random

import numpy
import pytest
import torch

pytest.importorskip("sklearn")

from scipy import stats

from bench import study
from bench.study import cells, choices, diamond, illustrated, letters, loops, run_table, task
from bench.study.cells import Cell, CellError, results, run_cells
from bench.study.compare import RATES, TUNING_SEED, Comparison, Variant, best_rates, rows
from bench.study.loops import first_wrong, mended
from bench.study.tables import TABLES
from bench.study.worlds import DigitWorld, ShapeWorld
from examples.tasks.ordered_digits import in_order, preference_score
from examples.tasks.sorted_letters import solve
from sysdag.components import Tabular
from sysdag.components.diffusion.images import to_pil


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    """This process keeps its threads and its logs."""
    monkeypatch.setattr(cells, "quieten", lambda: None)


def cells_of(table, size="full"):
    rates = {variant.name: 1.0 for variant in table.variants if variant.trains}
    return list(table.cells(size, rates).values())


def test_a_cell_is_computed_once_and_a_failure_keeps_the_others(tmp_path, monkeypatch):
    computed = []

    def align(cache, *, seed):
        computed.append(seed)
        if seed == 1:
            raise ValueError("no such seed")
        return {"seed": seed}

    monkeypatch.setattr(letters, "align", align)
    some = [Cell(function="letters:align", options={"seed": seed}) for seed in (0, 1, 2, 0)]
    with pytest.raises(CellError, match=r"1 of 3 cells failed(.|\n)*'seed': 1(.|\n)*no such seed"):
        run_cells(some, tmp_path, workers=1, title="t")
    run_cells([some[0], some[2]], tmp_path, workers=1, title="t")
    assert computed == [0, 1, 2]
    assert results([some[2], some[0]], tmp_path) == [{"seed": 2}, {"seed": 0}]
    monkeypatch.setattr(letters, "VERSION", "another")
    run_cells([some[0]], tmp_path, workers=1, title="t")
    assert computed == [0, 1, 2, 0]


def test_tuning_takes_the_best_validation_score_of_every_row_alike():
    table = TABLES["draft-refine"]
    tuned = table.tuning_cells("full")
    assert {name for name, _ in tuned} == {variant.name for variant in table.variants if variant.trains}
    assert all(cell.options["seed"] == TUNING_SEED for cell in tuned.values())
    for name in {name for name, _ in tuned}:
        assert sorted(rate for other, rate in tuned if other == name) == sorted(RATES)
    found = {("a", 1.0): [[0.1, 0.4]], ("a", 3.0): [[0.1, 0.3]], ("b", 1.0): [[0.2], [0.5]], ("b", 3.0): [[0.4], [0.4]]}
    found |= {("c", rate): found["b", rate] for rate in (1.0, 3.0)}
    variants = [Variant(name=name, options={}, staged=name == "c") for name in "abc"]
    as_results = {key: {"curves": [{"validation": v} for v in values]} for key, values in found.items()}
    assert best_rates(variants, as_results) == {"a": 1.0, "b": 3.0, "c": 1.0}


def test_rows_are_means_over_seeds_with_paired_tests():
    values = {"x": [0.5, 0.7, 0.6], "y": [0.4, 0.65, 0.4]}
    table = Comparison(
        name="t", function="letters:align", metrics=["m"], reference="x", seeds=3,
        variants=[Variant(name=name, options={}, trains=False) for name in values],
    )  # fmt: skip
    found = {
        (name, seed): {"heldout": {"m": [value - 0.1, value + 0.1]}, "curves": []}
        for name, of_seed in values.items()
        for seed, value in enumerate(of_seed)
    }
    x, y = rows(table, found, {})
    assert (x["seeds"], x["prompts"], "p" in x) == (3, 2, False)
    assert x["mean"] == pytest.approx(0.6)
    low, high = stats.t.interval(0.95, 2, 0.6, stats.sem(values["x"]))
    assert (x["low"], x["high"]) == (pytest.approx(low), pytest.approx(high))
    assert y["difference"] == pytest.approx(numpy.mean(values["y"]) - 0.6)
    assert y["p"] == pytest.approx(stats.ttest_rel(values["y"], values["x"]).pvalue)


def test_every_table_has_its_reference_and_enough_seeds():
    for table in TABLES.values():
        assert table.reference in {variant.name for variant in table.variants}, table.name
        assert table.seeds >= (5 if table.name in ("draft-refine", "pictures-digits") else 3)
        keys = [cell.key for cell in cells_of(table)]
        assert len(set(keys)) == len(keys), f"{table.name}: two rows are the same cell"


@pytest.mark.parametrize("made", [letters.Letters, loops.CriticLoop, diamond.Diamond, choices.Retriever])
@pytest.mark.parametrize("seed", [0, 1, TUNING_SEED])
def test_prompts_are_disjoint_and_as_many_as_the_page_says(made, seed, tmp_path):
    """Disjoint as sets of letters: two orders of the same letters are one question to a model that counts them."""
    size = task.SIZES["full"]
    prompts = made(tmp_path, seed, size).prompts
    counts = {"training": size.training, "validation": size.validation, "heldout": size.heldout}
    assert {part: len(asked) for part, asked in prompts.items()} == counts
    assert size.heldout >= 200
    assert len({"".join(sorted(one)) for asked in prompts.values() for one in asked}) == sum(counts.values())


def test_every_key_is_meant_for_one_note(tmp_path):
    setting = choices.Retriever(tmp_path, 0, task.SIZES["full"])
    for key in itertools.chain.from_iterable(setting.prompts.values()):
        assert len(setting.holding(key)) == 1
        assert len(set(key) & set(setting.right(key))) == 3 == len(set(key)) - 1
    with pytest.raises(ValueError, match="seed 0: the notes give only 661 keys, 941 are needed"):
        _ = choices.Retriever(tmp_path, 0, task.Size(training=641)).prompts


def test_a_choice_takes_larger_steps_than_a_language_model(tmp_path, monkeypatch):
    monkeypatch.setattr(choices.Router, "models", lambda *_: {"answer": Tabular({"a": {"y": 1.0}})})
    made = choices.Router(tmp_path, 0, task.SIZES["quick"]).system()
    found = task.nodes(made, ["answer"], 3.0, {"route": 2.0})
    assert found["route"] == {"learning_rate": pytest.approx(0.3), "trainable": False}
    assert found["answer"] == {"learning_rate": pytest.approx(1.5e-3), "trainable": True}


@pytest.mark.parametrize("kind", ["size", "brightness", "hue"])
def test_a_shape_is_measured_as_it_was_drawn(kind):
    world, rng = ShapeWorld(0), random.Random(0)
    levels = [0, 3, 5, 8] * 5
    images = [to_pil(world.draw(kind, level, rng)) for level in levels]
    assert numpy.abs(world.seen([kind] * 20, images, annotator=False) - levels).max() < 0.6
    errors = world.seen([kind] * 20, images, annotator=True) - world.seen([kind] * 20, images, annotator=False)
    assert 0.2 < errors.std() < 0.9


def test_the_measuring_judge_of_digits_is_not_the_annotator():
    world = DigitWorld(0)
    seen = {annotator: world._judges[annotator] for annotator in (True, False)}
    assert seen[True] is not seen[False]
    shared = set(map(bytes, world._digits.judged[0])) & set(map(bytes, world._digits.audited[0]))
    assert not shared


def test_the_picture_rules_hold_for_levels_between_the_whole_ones():
    assert in_order([1.0, 2.0, 4.0], True)
    assert not in_order([1.0, 2.0, 4.0], False)
    assert not in_order([1.0, 1.4, 4.0], True)
    assert preference_score([0, 4, 8], True, 8) == 1.0
    assert preference_score([0, 1, 8], True, 8) == pytest.approx(1 - 6 / 8)
    assert preference_score([8, 1, 4], True, 8) == -0.5
    assert preference_score([8, 4, 0], True, 8) == preference_score([1, 2], True, 8) == -1


def test_a_critic_and_a_rewriter_that_do_as_they_should_sort_anything():
    rng = random.Random(0)
    for _ in range(50):
        asked = letters.random_question(rng)
        text = "".join(rng.sample(asked, len(asked)))
        for _ in range(len(asked)):
            text = mended(asked, text, first_wrong(asked, text))
        assert text == solve(asked)
        assert first_wrong(asked, text) == "="


TINY = {"base_steps": 6, "training": 6, "validation": 2, "heldout": 3, "steps": 2, "every": 1, "runs": 4}
CELLS = {
    "letters:align": ({"scale": "large", "method": "direct"}, "exact", 1),
    "pictures:align": ({"world": "shapes", "method": "separate"}, "three images", 2),
    "loops:align": ({"rounds": 2, "method": "naive"}, "exact", 1),
    "choices:align": ({"system": "router", "method": "joint"}, "right choice", 1),
    "diamond:align": ({"method": "direct"}, "exact", 1),
}


@pytest.mark.release("the study is run by its authors, not by users")
@pytest.mark.parametrize("function", CELLS)
def test_every_system_is_trained_and_measured(function, tmp_path, monkeypatch):
    options, metric, trainings = CELLS[function]
    monkeypatch.setitem(task.SIZES, "quick", task.Size(**TINY))
    small = dataclasses.replace(illustrated.QUICK, **TINY | {"base_steps": 80}, diffusion_steps=6)
    monkeypatch.setitem(illustrated.SIZES, ("shapes", "quick"), small)
    one_layer = letters.SCALES["large"]._replace(model_options={"layers": 1}, device="cpu")
    monkeypatch.setitem(letters.SCALES, "large", one_layer)
    cell = Cell(function=function, options={**options, "seed": 0, "size": "quick"})
    run_cells([cell], tmp_path, workers=1, title=function)
    (found,) = results([cell], tmp_path)
    assert all(len(values) == TINY["heldout"] for values in found["heldout"].values())
    assert all(0 <= value <= 1 for value in found["heldout"][metric])
    assert [curve["steps"] for curve in found["curves"]] == [[0, 1, 2]] * trainings
    assert all(len(curve["logs"]) == 2 for curve in found["curves"])


@pytest.mark.release("the study is run by its authors, not by users")
@pytest.mark.parametrize(("method", "steps"), [("one training", [0, 6]), ("three rounds", [0, 2, 4, 6])])
def test_rounds_take_as_many_steps_as_one_training(method, steps, tmp_path):
    cell = Cell(function="rounds:align", options={"method": method, "seed": 0, "size": "quick"})
    run_cells([cell], tmp_path, workers=1, title=method)
    (found,) = results([cell], tmp_path)
    assert len(found["heldout"]["exact"]) == 8
    assert [curve["steps"] for curve in found["curves"]] == [steps]
    assert all(0 <= value <= 1 for value in found["curves"][0]["validation"])


def test_large_systems_have_longer_words_and_need_a_gpu(tmp_path, monkeypatch, capsys):
    large = letters.Letters(tmp_path, 0, task.SIZES["quick"], scale="large")
    assert {len(set(asked)) for part in large.prompts.values() for asked in part} == {8}
    assert large.name != letters.Letters(tmp_path, 0, task.SIZES["quick"]).name
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        study.main(["--tables", "draft-refine-large", "--cache", str(tmp_path)])
    assert ended.value.code == 2
    assert "draft-refine-large needs a CUDA device, and torch finds none" in capsys.readouterr().err


@pytest.mark.release("the study is run by its authors, not by users")
def test_a_table_from_end_to_end(tmp_path, monkeypatch):
    tiny = task.Size(base_steps=15, training=8, validation=2, heldout=4, steps=4, every=2, runs=4)
    monkeypatch.setitem(task.SIZES, "quick", tiny)
    names = ("before", "joint", "separate")
    table = Comparison(
        name="mini", function="letters:align", metrics=("exact", "quality", "win against chosen"), reference="joint",
        seeds=2, variants=[Variant(name=n, options={"method": n}, trains=n != "before") for n in names],
    )  # fmt: skip
    run_table(table, "quick", tmp_path / "cache", tmp_path, workers=1)
    with (tmp_path / "mini.csv").open() as file:
        found = {(row["method"], row["metric"]): row for row in csv.DictReader(file)}
    steps = {(name, "best step") for name in names if name != "before"}
    assert found.keys() == {(name, metric) for name in names for metric in table.metrics} | steps
    with (tmp_path / "mini-curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert {(row["method"], row["part"]) for row in curves} == {("joint", "0"), ("separate", "0"), ("separate", "1")}
    assert {row["step"] for row in curves} == {"0", "2", "4"}
    kept = {file: json.loads(file.read_text()) for file in (tmp_path / "cache" / "results").iterdir()}
    before = [one["result"] for one in kept.values() if one["options"]["method"] == "before"]
    mean = numpy.mean([numpy.mean(one["heldout"]["quality"]) for one in before])
    assert float(found["before", "quality"]["mean"]) == pytest.approx(mean, abs=1e-5)
    times = {file: file.stat().st_mtime_ns for file in kept}
    run_table(table, "quick", tmp_path / "cache", tmp_path, workers=1)
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "results").iterdir()}
