"""The demo end to end in its quick mode, and the task functions that its numbers rest on."""

import json
import random
import sys
from pathlib import Path

import numpy
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/ is no installed package

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from examples import demo, draft_and_refine
from examples.experiment import paired_bootstrap, repeat
from examples.tasks import ordered_digits, sorted_letters
from examples.tasks.cache import cached
from examples.tasks.ordered_digits import Digits, Illustrator, Judge
from sysdag import System


@pytest.mark.parametrize(
    ("digits", "ascending", "consistent", "score"),
    [
        ([1, 4, 7], True, True, 1.0),
        ([1, 4, 7], False, False, -1.0),
        ([9, 4, 3], False, True, 1 - 4 / 9),
        ([0, 1, 9], True, True, 1 - 7 / 9),
        ([1, 4, 4], True, False, -0.5),
        ([5, 2, 7], True, False, -0.5),
        ([3, 3, 3], True, False, -1.0),
        ([1, 4], True, False, -1.0),
        ([1, 2, 3, 4], True, False, -1.0),
        ([], True, False, -1.0),
    ],
)
def test_order_and_preference_score(digits, ascending, consistent, score):
    assert ordered_digits.in_order(digits, ascending) is consistent
    assert ordered_digits.preference_score(digits, ascending) == pytest.approx(score)


def test_every_prompt_asks_for_one_order():
    prompts = ordered_digits.prompts()
    assert len(set(prompts)) == len(prompts) == 5 * 5 * 4 * 12 * 5
    phrases = ordered_digits.ASCENDING + ordered_digits.DESCENDING
    for prompt in prompts[::7]:
        (phrase,) = [phrase for phrase in phrases if phrase in prompt]
        assert ordered_digits.is_ascending(prompt) is (phrase in ordered_digits.ASCENDING)


def test_heldout_prompts_are_not_trained_on():
    training, heldout = ordered_digits.split_prompts(seed=1, train=50, heldout=40)
    assert (len(training), len(heldout)) == (50, 40)
    assert not set(training) & set(heldout)
    training, heldout = sorted_letters.split_questions(seed=1, train=50, heldout=40)
    assert (len(training), len(heldout)) == (50, 40)
    assert not {sorted_letters.solve(q) for q in training} & {sorted_letters.solve(q) for q in heldout}


def test_demonstrations_are_in_order_unless_disordered():
    rng = random.Random(0)
    for prompt in ordered_digits.prompts()[::211]:
        words = ordered_digits.demonstration(prompt, rng, disorder=0.0).split(" ; ")
        digits = [ordered_digits.DIGIT_OF[word] for word in words]
        assert ordered_digits.in_order(digits, ordered_digits.is_ascending(prompt))


def test_illustrator_muddles_words_as_often_as_it_says():
    illustrator, rng = Illustrator.make(seed=0), random.Random(0)
    assert sorted(illustrator.clarity.values()) == [0.5] * 7 + [0.6] * 6 + [1.0] * 7
    for word, clarity in illustrator.clarity.items():
        shown = [illustrator.depict(word, rng) for _ in range(400)]
        meant = ordered_digits.DIGIT_OF[word]
        assert numpy.mean([digit == meant for digit in shown]) == pytest.approx(clarity, abs=0.1)
        assert set(shown) <= {meant, illustrator.mistaken_for[word]}


def test_judge_reads_images_that_it_was_not_fitted_on():
    digits = Digits.load(seed=0)
    sizes = [len(labels) for _, labels in (digits.drawn, digits.judged, digits.audited)]
    assert sizes == [898, 449, 450]
    images, labels = digits.drawn
    drawn = ((images[:300] + 1) * 127.5).round().astype(numpy.uint8)
    judge = Judge(*digits.judged)
    read = judge.read([*([image] for image in drawn), []])
    assert read[-1] == []
    assert numpy.mean([run[0] == label for run, label in zip(read[:300], labels[:300], strict=True)]) > 0.95
    assert judge.read([list(drawn[:2]), list(drawn[2:3])]) == [[read[0][0], read[1][0]], [read[2][0]]]


def test_letters_are_sorted_swapped_and_mended():
    rng = random.Random(0)
    assert sorted_letters.solve("dbeca") == "abcde"
    assert {sorted_letters.swap_neighbours("abc", rng) for _ in range(50)} == {"bac", "acb"}
    drafts = [sorted_letters.demonstrated_draft("dbeca", rng) for _ in range(4000)]
    assert numpy.mean([draft == "abcde" for draft in drafts]) == pytest.approx(0.35, abs=0.03)
    assert numpy.mean([draft == "edcba" for draft in drafts]) == pytest.approx(0.30, abs=0.03)
    answers = [sorted_letters.demonstrated_answer("dbeca", "edcba", rng) for _ in range(4000)]
    assert numpy.mean([answer == "abcde" for answer in answers]) == pytest.approx(0.30, abs=0.03)
    assert set(answers) == {"abcde", "edcba"}


def test_paired_bootstrap():
    before = numpy.array([0.0, 1.0] * 50)
    assert paired_bootstrap(before, before, seed=0) == (0.0, 0.0)
    after = numpy.array([1.0, 1.0] * 50)
    # The mean difference is 0.5, its standard error sqrt(0.25 / 100) = 0.05.
    low, high = paired_bootstrap(before, after, seed=0)
    assert (low, high) == (pytest.approx(0.5 - 1.96 * 0.05, abs=0.02), pytest.approx(0.5 + 1.96 * 0.05, abs=0.02))


def test_repeat_keeps_runs_of_a_prompt_together():
    assert repeat({"prompt": ["a", "b"]}, 2) == {"prompt": ["a", "a", "b", "b"]}


def test_cache_builds_once_for_each_choice_of_options(tmp_path):
    built = []

    def model(folder, *, seed):
        built.append(seed)
        (folder / "weights").write_text(str(seed))

    folders = [cached(tmp_path, model, seed=seed) for seed in (0, 1, 0)]
    assert built == [0, 1]
    assert folders[0] == folders[2] != folders[1]
    assert [(folder / "weights").read_text() for folder in folders] == ["0", "1", "0"]


def test_prompts_of_draft_and_refine():
    assert draft_and_refine.draft("dbeca") == "dbeca:"
    assert draft_and_refine.answer("dbeca", "abced") == "dbeca,abced:"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["--quick", "--seed", "3", "--output", str(folder / "output"), "--cache", str(folder / "cache")]
    return folder / "output", demo.main(arguments)


@pytest.mark.slow
def test_quick_demo_writes_metrics_and_pictures(quick):
    output, metrics = quick
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert metrics["seed"] == 3
    assert metrics["quick"] is True
    assert list(metrics["experiments"]) == ["digits_in_order", "draft_and_refine"]
    for name, found in metrics["experiments"].items():
        assert 0 <= found["before"] <= 1
        assert 0 <= found["after"] <= 1
        assert found["difference"] == pytest.approx(found["after"] - found["before"])
        low, high = found["interval_95"]
        assert low <= found["difference"] <= high
        assert found["heldout_prompts"] == 8
        for picture in ("plan.png", "training.png"):
            assert (output / name / picture).read_bytes().startswith(b"\x89PNG")
    assert (output / "digits_in_order" / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert len((output / "draft_and_refine" / "samples.txt").read_text().splitlines()) == 1 + 8


@pytest.mark.slow
def test_quick_demo_saves_systems_that_load_again(quick):
    output, metrics = quick
    inputs = {
        "digits_in_order": {"prompt": ["draw three neat digits rising on paper"]},
        "draft_and_refine": {"question": ["dbeca"]},
    }
    for name, found in metrics["experiments"].items():
        assert found["reload_agrees"] is True
        plan = System.from_pretrained(output / name / "system").compile()
        first, again = (plan.sample(inputs[name], seed=5) for _ in range(2))
        for node in plan.order:
            assert demo.same(first[node], again[node])
