"""What becomes of labels: agreement, the summary, and preference rows."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from labelled_runs import runs
from sklearn.metrics import cohen_kappa_score

from sysdag import Input, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import Tabular
from sysdag.errors import DataError, LabelError
from sysdag.labelling.agreement import cohen_kappa, krippendorff_alpha
from sysdag.labelling.export import export, majority, write_export
from sysdag.labelling.session import open_labels
from sysdag.labelling.summary import summarize
from sysdag.traces.cells import Draw
from sysdag.traces.readers import read_rows

LABELS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=12)


def units(*lines):
    """Krippendorff's tables: a line an annotator, a column a unit, a dot where there is no label."""
    return [
        {str(name): label for name, label in enumerate(column) if label != "."} for column in zip(*lines, strict=True)
    ]


# Krippendorff (2011), Computing Krippendorff's alpha-reliability, sections A, B and C.
@pytest.mark.parametrize(
    ("lines", "alpha"),
    [
        (["0100000010", "1110010000"], 0.095),
        (["aabbdcccedda", "babbbccceddd"], 0.692),
        (["123321412...", "1233224125.3", ".3332342251.", "12332441251."], 0.743),
    ],
)
def test_alpha_is_that_of_the_published_tables(lines, alpha):
    table = units(*lines)
    assert krippendorff_alpha(table) == pytest.approx(alpha, abs=5e-4)
    assert krippendorff_alpha([unit for unit in table if len(unit) > 1]) == krippendorff_alpha(table)


def test_kappa_of_a_table_worked_out_by_hand():
    """50 proposals, both yes 20, both no 15, only the first yes 5, only the second yes 10: (0.7 - 0.5) / (1 - 0.5)."""
    first, second = "y" * 25 + "n" * 25, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)


@given(LABELS)
def test_kappa_is_scikit_learns(pairs):
    first, second = zip(*pairs, strict=True)
    found = cohen_kappa(first, second)
    if len({*first, *second}) == 1:
        assert found is None
    else:
        assert found == pytest.approx(cohen_kappa_score(first, second))


@given(LABELS, st.permutations("abc"))
def test_agreement_depends_on_no_names_and_no_order(pairs, renamed):
    assume(len({label for pair in pairs for label in pair}) > 1)
    names = dict(zip("abc", renamed, strict=True))
    first, second = zip(*pairs, strict=True)
    assert cohen_kappa(second, first) == pytest.approx(cohen_kappa(first, second))
    assert cohen_kappa([names[x] for x in first], [names[x] for x in second]) == pytest.approx(
        cohen_kappa(first, second)
    )
    table = [{"Ann": a, "Bob": b} for a, b in pairs]
    other = [{"Bob": names[a], "Ann": names[b]} for a, b in reversed(pairs)]
    assert krippendorff_alpha(other) == pytest.approx(krippendorff_alpha(table))
    if all(a == b for a, b in pairs):
        assert krippendorff_alpha(table) == cohen_kappa(first, second) == 1


def test_agreement_that_is_undefined():
    assert cohen_kappa([], []) is None
    assert cohen_kappa("aa", "aa") is None
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([{"Ann": "a"}, {"Bob": "b"}]) is None
    assert krippendorff_alpha([{"Ann": "a", "Bob": "a"}, {"Ann": "b"}]) is None
    with pytest.raises(DataError, match="got 1 and 2 labels"):
        cohen_kappa("a", "ab")


class Labelled:
    """A database whose labels are given by pair, as the row that is preferred."""

    def __init__(self, path, trace, **options):
        self.store = open_labels(trace, path, overlap=100, **options)
        self.number = 0

    def give(self, annotator, *wishes):
        """`first`, `second` (the pair's rows), `tie` or `skip`, for the pairs in their order."""
        pairs = self.store.pairs()
        for wish in wishes:
            task = self.store.queue(annotator).task
            if wish in ("first", "second"):
                wanted = pairs[task.pair][wish == "second"]
                wish = "left" if task.left == wanted else "right"
            self.number += 1
            self.store.label(annotator, task.pair, wish, f"request-{self.number}")


@pytest.fixture
def labelled(tmp_path):
    made = []

    def make(trace, **options):
        made.append(Labelled(tmp_path / "labels.sqlite", trace, **options))
        return made[-1]

    yield make
    for one in made:
        one.store.close()


def test_the_summary_of_two_annotators(labelled):
    given = labelled(runs(6))
    assert summarize(given.store).agreement is None
    assert str(summarize(given.store)) == "0 of 6 pairs labelled"
    given.give("Ann", "first", "first", "second", "tie", "skip")
    given.give("Bob", "first", "second", "second", "tie")
    given.store.undo("Bob", given.store.queue("Bob").last, "request-undo")
    found = summarize(given.store)
    assert (found.pairs, found.labelled, found.overlap) == (6, 4, 6)
    assert [(one.name, one.labels, one.choices["tie"], one.skipped, one.undone) for one in found.annotators] == [
        ("Ann", 4, 1, 1, 0), ("Bob", 3, 0, 0, 1),
    ]  # fmt: skip
    assert found.agreement.measure == "Cohen's kappa"
    assert (found.agreement.pairs, found.agreement.same) == (3, 2)
    assert found.agreement.value == pytest.approx(cohen_kappa("112", "122"))
    assert "Cohen's kappa: 0.400; agreed on 2 of 3 pairs with several labels" in str(found)
    left, low, high = found.left_share
    assert left == sum(one.choices["left"] for one in found.annotators) / 6
    assert low < left < high


def test_the_summary_of_three_annotators_and_of_labels_that_are_all_alike(labelled):
    given = labelled(runs(4))
    given.give("Ann", "tie", "tie")
    given.give("Bob", "tie", "tie")
    assert summarize(given.store).agreement.value is None
    assert "Cohen's kappa: undefined, all labels are alike" in str(summarize(given.store))
    assert summarize(given.store).left_share is None
    given.give("Cy", "first", "tie", "tie")
    found = summarize(given.store).agreement
    assert (found.measure, found.pairs, found.same) == ("Krippendorff's alpha", 2, 1)
    assert found.value == pytest.approx(krippendorff_alpha(units("tt", "tt", "1t")))


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ([], (None, 0)), ([3], (3, 1)), ([3, 4], (None, 0)), ([3, 4, 3], (3, 2)), ([None, None, 3], (None, 2)),
        ([3, 3, 4, None], (None, 0)),
    ],
)  # fmt: skip
def test_the_majority_is_more_than_half(votes, winner):
    assert majority(votes) == winner


def test_export_resolves_annotators_and_counts_what_it_leaves_out(labelled):
    trace = runs(6)
    given = labelled(trace)
    given.give("Ann", "first", "first", "first", "tie", "skip")
    given.give("Bob", "second", "first", "first", "tie")
    given.give("Cy", "second", "first", "tie")
    given.give("Di", "second", "first", "tie")
    found = export(given.store, trace)
    assert [(row["labels"], row["agreeing"]) for row in found.rows] == [(4, 3), (4, 4)]
    assert (found.ties, found.disagreements, found.unlabelled) == (1, 1, 2)
    pairs = given.store.pairs()
    assert found.rows[0]["chosen"] is trace.cells["answer"][pairs[0][1]]
    assert found.rows[0]["rejected"] is trace.cells["answer"][pairs[0][0]]
    assert found.rows[1]["rejected"] is trace.cells["answer"][pairs[1][1]]
    assert found.rows[1]["chosen_intermediates"] == {"draft": trace.cells["draft"][pairs[1][0]]}
    assert str(found) == "2 preferences; left out: 1 ties, 1 disagreements, 2 pairs without a label"


def test_an_export_without_preferences_leaves_the_old_file(labelled, tmp_path):
    trace = runs(2)
    given = labelled(trace)
    given.give("Ann", "tie")
    path = tmp_path / "pairs.jsonl"
    path.write_text("old")
    with pytest.raises(LabelError, match="no preferences to export yet: 0 preferences; left out: 1 ties"):
        write_export(given.store, trace, path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_exported_draws_come_back_with_their_tokens(labelled, tmp_path, ending):
    trace = runs(3)
    given = labelled(trace)
    given.give("Ann", "first", "second")
    written = write_export(given.store, trace, tmp_path / f"pairs.{ending}")
    read = read_rows(tmp_path / f"pairs.{ending}")
    assert len(read) == len(written.rows) == 2
    for row, expected in zip(read, written.rows, strict=True):
        assert isinstance(row["chosen"], Draw)
        assert (row["chosen"].value, row["chosen"].record) == (expected["chosen"].value, expected["chosen"].record)
        assert row["rejected_intermediates"]["draft"].record == expected["rejected_intermediates"]["draft"].record
        assert (row["question"], row["labels"], row["agreeing"]) == (expected["question"], 1, 1)


def drafting_system():
    rows = {key: {"good": 0.5, "bad": 0.5} for key in ("p", "q")}
    x = Input("x")

    @node(Tabular(rows))
    def draft(x):
        return x

    @node(Tabular({key: {"yes": 0.5, "no": 0.5} for key in ("good", "bad")}))
    def answer(draft):
        return draft

    return System(x >> draft >> answer)


def test_a_step_of_training_learns_what_was_labelled(labelled, tmp_path):
    system = drafting_system()
    plan = system.compile()
    trace = plan.sample({"x": ["p", "q"] * 4}, seed=0)
    given = labelled(trace, outputs=["answer"])
    for wish in trace["answer"]:
        task = given.store.queue("Ann").task
        if task is None:
            break
        wish = "left" if trace["answer"][task.left] == "yes" else "right"
        given.store.label("Ann", task.pair, wish, f"request-{task.pair}")
    write_export(given.store, trace, tmp_path / "pairs.jsonl")
    rows = read_rows(tmp_path / "pairs.jsonl")
    assert rows
    assert all(row["chosen"].value == "yes" and row["rejected"].value == "no" for row in rows)
    args = SysDPOConfig(
        output_dir=str(tmp_path / "out"), objective="direct", beta=1.0, learning_rate=0.1, max_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, per_device_train_batch_size=len(rows), disable_tqdm=True,
    )  # fmt: skip
    SysDPOTrainer(model=system, args=args, train_dataset=rows).train()
    yes = torch.softmax(system["answer"].component.module["logits"].detach(), -1)[:, 0]
    assert yes.max() > 0.51
    assert yes.min() >= 0.5
