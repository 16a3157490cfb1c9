import sqlite3
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_runs import runs, without_what_is_derived
from PIL import Image

from sysdag.errors import DataError, LabelError
from sysdag.labelling import store as store_module
from sysdag.labelling.pairing import fingerprint, pair_runs
from sysdag.labelling.session import open_labels
from sysdag.labelling.store import LabelStore
from sysdag.traces.cells import Draw
from sysdag.traces.trace import Trace

ANSWER = ("answer",)


@pytest.fixture
def opened(tmp_path):
    """Opens the same database of labels, again where asked; closes all at the end."""
    made = []

    def make(trace=None, **options):
        made.append(open_labels(trace or runs(), tmp_path / "labels.sqlite", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def rows(store, query):
    """What another process would read."""
    with sqlite3.connect(store.path) as database:
        found = database.execute(query).fetchall()
    database.close()
    return found


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=14),
    st.integers(0, 5),
    st.none() | st.integers(1, 2),
)
def test_pairs_are_all_different_runs_of_equal_inputs_and_every_input_comes_before_any_comes_again(runs, seed, most):
    trace = Trace({"x": [x for x, _ in runs]}, {"y": [Draw(y) for _, y in runs]})
    every = {
        frozenset((i, j)) for i in range(len(runs)) for j in range(i) if runs[i][0] == runs[j][0] and runs[i] != runs[j]
    }
    if not every:
        with pytest.raises(DataError, match="nothing to compare"):
            pair_runs(trace, ("y",), seed=seed)
        return
    found = pair_runs(trace, ("y",), seed=seed, pairs_per_input=most)
    assert found == pair_runs(trace, ("y",), seed=seed, pairs_per_input=most)
    assert len(set(map(frozenset, found.pairs))) == len(found.pairs)
    assert set(map(frozenset, found.pairs)) <= every
    turns, offered = [], Counter(runs[min(pair)][0] for pair in every)
    seen = Counter()
    for pair in found.pairs:
        turns.append(seen[runs[pair[0]][0]])
        seen[runs[pair[0]][0]] += 1
    assert turns == sorted(turns)
    assert seen == {x: min(count, most or count) for x, count in offered.items()}
    assert found.single == sum(count == 1 for count in Counter(x for x, _ in runs).values())


def test_seeds_differ_in_order_and_in_who_stands_first():
    trace = runs(20)
    orders = {pair_runs(trace, ANSWER, seed=seed).pairs for seed in range(5)}
    assert len(orders) == 5
    assert all({first % 2 for first, _ in order} == {0, 1} for order in orders)
    kept = {frozenset(pair_runs(runs(1, each=4), ANSWER, seed=seed, pairs_per_input=1).pairs[0]) for seed in range(40)}
    assert len(kept) == 6


def test_what_is_left_out_is_counted():
    trace = Trace({"x": ["a", "a", "a", "b"]}, {"y": [Draw("1"), Draw("1"), Draw("2"), Draw("1")]})
    found = pair_runs(trace, ("y",), seed=0)
    assert (len(found.pairs), found.identical, found.single) == (2, 1, 1)


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    trace = runs()
    for name in ("runs.jsonl", "runs.parquet"):
        trace.save(tmp_path / name)
        assert fingerprint(Trace.load(tmp_path / name)) == fingerprint(trace)
    scored = Trace(trace.inputs, trace.cells, {"score": [0.5] * len(trace)})
    assert fingerprint(scored) == fingerprint(trace)
    cells = list(trace.cells["answer"])
    cells[3] = Draw(cells[3].value, {"token_ids": [9]}, cells[3].log_prob)
    assert fingerprint(trace.updated({"answer": cells})) != fingerprint(trace)
    assert fingerprint(Trace({"query": trace["question"]}, trace.cells)) != fingerprint(trace)


def test_images_count_by_their_pixels(tmp_path):
    def of(colour):
        image = Image.new("P", (4, 4))
        image.putpalette([*colour] * 256)
        return Trace({"x": ["a"]}, {"y": [(Draw(image), Draw([image]))]})

    red, blue = of((255, 0, 0)), of((0, 0, 255))
    assert fingerprint(red) != fingerprint(blue)
    red.save(tmp_path / "red.jsonl")
    assert fingerprint(Trace.load(tmp_path / "red.jsonl")) == fingerprint(red)


def test_a_label_is_written_through_before_it_counts(opened):
    store = opened()
    assert store._one("PRAGMA journal_mode") == "wal"
    assert store._one("PRAGMA synchronous") == 2
    task = store.queue("Ann").task
    after = store.label(" Ann ", task.pair, "left", "request-1")
    assert rows(store, "SELECT annotator, pair, choice, left, right FROM labels") == [
        ("Ann", task.pair, "left", task.left, task.right)
    ]
    assert store.labels()[0].preferred == task.left
    assert (after.done, after.total) == (1, 5)
    assert after.task.pair != task.pair


def test_the_same_request_is_recorded_once_and_another_one_for_the_pair_is_refused(opened):
    store = opened()
    task = store.queue("Ann").task
    first = store.label("Ann", task.pair, "tie", "request-1")
    assert store.label("Ann", task.pair, "tie", "request-1") == first
    with pytest.raises(LabelError, match="another tab"):
        store.label("Ann", task.pair, "left", "request-2")
    with pytest.raises(LabelError, match="recorded with another content"):
        store.label("Ann", task.pair, "left", "request-1")
    with pytest.raises(LabelError, match="not shown to Bob"):
        store.label("Bob", task.pair, "left", "request-3")
    assert len(rows(store, "SELECT * FROM events")) == 1


def test_of_many_tabs_at_once_one_is_recorded(opened):
    stores = [opened(), opened()]  # two connections: two processes, as far as SQLite is concerned
    task = stores[0].queue("Ann").task
    start, refused = threading.Barrier(8), []

    def click(number):
        start.wait()
        try:
            stores[number % 2].label("Ann", task.pair, ("left", "right")[number % 2], f"request-{number}")
        except LabelError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=click, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    assert len(rows(stores[0], "SELECT * FROM events")) == 1


def test_undo_takes_the_last_label_back_and_keeps_the_history(opened):
    store = opened()
    first = store.queue("Ann")
    assert first.last is None
    second = store.label("Ann", first.task.pair, "left", "request-1")
    third = store.label("Ann", second.task.pair, "right", "request-2")
    with pytest.raises(LabelError, match="not your last"):
        store.undo("Ann", second.last, "request-3")
    undone = store.undo("Ann", third.last, "request-4")
    assert undone == second
    assert store.undo("Ann", third.last, "request-4") == second
    with pytest.raises(LabelError, match="not your last"):
        store.undo("Ann", third.last, "request-5")
    with pytest.raises(LabelError, match="not your last"):
        store.undo("Bob", second.last, "request-6")
    again = store.label("Ann", second.task.pair, "tie", "request-7")
    assert (again.done, again.task) == (2, third.task)
    assert [row[0] for row in rows(store, "SELECT choice FROM events ORDER BY id")] == ["left", "right", None, "tie"]
    assert [label.choice for label in store.labels()] == ["left", "tie"]
    assert store.undone() == {"Ann": 1}


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM events",
        "UPDATE events SET choice = 'right'",
        "INSERT INTO events (request, annotator, pair, choice, left, right, at) "
        "SELECT 'x', annotator, pair, 'tie', left, right, at FROM events",
    ],
)
def test_the_file_itself_refuses_to_lose_or_double_a_label(opened, statement):
    store = opened()
    store.label("Ann", store.queue("Ann").task.pair, "left", "request-1")
    with pytest.raises(sqlite3.IntegrityError, match="only appended|one label"):
        rows(store, statement)


def everything(store, annotator):
    """Labels all that an annotator gets, and tells the pairs."""
    pairs = []
    while (task := store.queue(annotator).task) is not None:
        pairs.append(task.pair)
        store.label(annotator, task.pair, "tie", f"{annotator}-{task.pair}-label")
    return pairs


def test_the_first_pairs_go_to_everyone_and_the_others_to_one_each(opened):
    store = opened(runs(10), overlap=4)
    for _ in range(6):
        for name in ("Ann", "Bob"):
            store.label(name, (pair := store.queue(name).task.pair), "left", f"{name}-{pair}-label")
    ann, bob = everything(store, "Ann"), everything(store, "Bob")
    by_name = {name: {label.pair for label in store.labels() if label.annotator == name} for name in ("Ann", "Bob")}
    assert by_name["Ann"] & by_name["Bob"] == {0, 1, 2, 3}
    assert by_name["Ann"] | by_name["Bob"] == set(range(10))
    assert len(ann) + len(bob) == 2 * 4 + 6 - 12
    assert store.queue("Cy").total == 4
    assert everything(store, "Cy") == [0, 1, 2, 3]


def test_progress_counts_what_nobody_else_has(opened):
    store = opened(runs(6), overlap=0)
    ann = store.queue("Ann")
    assert (ann.done, ann.total) == (0, 6)
    bob = store.queue("Bob")
    assert bob.task.pair != ann.task.pair
    assert (bob.done, bob.total) == (0, 5)
    store.label("Bob", bob.task.pair, "skip", "request-1")
    assert store.queue("Bob").done == 1
    assert store.queue("Ann").total == 5  # Bob holds the next one, and gave the skipped one back
    assert bob.task.pair in everything(store, "Ann")


def test_a_pair_that_lies_with_someone_else_is_free_again_later(opened, monkeypatch):
    store = opened(runs(1), overlap=0)
    task = store.queue("Ann").task
    assert store.queue("Bob").task is None
    monkeypatch.setattr(store_module, "_HELD", store_module.timedelta(0))
    assert store.queue("Bob").task.pair == task.pair
    store.label("Ann", task.pair, "left", "request-1")
    assert store.queue("Cy").task is None


def test_sides_are_drawn_by_the_seed_and_stay(opened):
    store = opened(runs(40), seed=3, overlap=40)
    shown = {}
    for name in ("Ann", "Bob"):
        while (task := store.queue(name).task) is not None:
            assert store.queue(name).task == task
            shown[name, task.pair] = task.left
            store.label(name, task.pair, "left", f"{name}-{task.pair}-label")
    first = dict(enumerate(left for left, _ in store.pairs()))
    swapped = {name: [shown[name, pair] != first[pair] for pair in first] for name in ("Ann", "Bob")}
    assert all(10 < sum(sides) < 30 for sides in swapped.values())
    assert swapped["Ann"] != swapped["Bob"]
    other = opened(seed=3, trace=runs(40))
    assert {(one.annotator, one.pair): one.left for one in other.labels()} == shown


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["Ann", "Bob", "Cy"]), st.sampled_from(["left", "right", "tie", "skip", "undo", "again"])
    ),
    max_size=40,
)


@settings(max_examples=25)
@given(OPERATIONS)
def test_the_database_is_what_its_history_says(tmp_path_factory, operations):
    path = tmp_path_factory.mktemp("labels") / "labels.sqlite"
    expected, history, last_call = {}, {}, None
    with open_labels(runs(6), path, overlap=2) as store:
        for number, (name, operation) in enumerate(operations):
            queue, request = store.queue(name), f"request-{number}"
            order = history.setdefault(name, [])
            if operation == "again":
                if last_call is not None:
                    last_call()  # a repeated request changes nothing
            elif operation == "undo":
                if order:
                    last_call = lambda n=name, i=queue.last, r=request: store.undo(n, i, r)
                    last_call()
                    del expected[name, order.pop()]
                else:
                    assert queue.last is None
            elif queue.task is not None:
                last_call = lambda n=name, p=queue.task.pair, c=operation, r=f"request-{number}": store.label(
                    n, p, c, r
                )
                last_call()
                order.append(queue.task.pair)
                expected[name, queue.task.pair] = operation
            found = {(label.annotator, label.pair): label.choice for label in store.labels()}
            assert found == expected
            assert store.queue(name).done == len(order)
    with LabelStore(path) as again:
        assert {(label.annotator, label.pair): label.choice for label in again.labels()} == expected


def test_a_database_goes_on_with_its_own_options(opened):
    first = opened(seed=7, outputs=["draft"], overlap=1, pairs_per_input=1)
    again = opened()
    assert again.settings == first.settings
    assert again.pairs() == first.pairs()
    assert opened(overlap=3).settings.overlap == 3
    assert opened().settings.overlap == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": runs(4)}, "labels of other traces"),
        ({"seed": 8}, "begun with --seed 7, and 8 is asked for"),
        ({"outputs": ["answer"]}, "begun with --node draft, and answer is asked for"),
        ({"pairs_per_input": 1}, "begun with --pairs-per-input all, and 1 is asked for"),
    ],
)
def test_a_database_of_something_else_is_refused_with_the_reason(opened, options, message):
    opened(seed=7, outputs=["draft"])
    with pytest.raises(LabelError, match=message):
        opened(**options)


def test_files_that_are_no_database_of_labels(tmp_path):
    text = tmp_path / "notes.sqlite"
    text.write_text("not a database at all, but long enough to be read as one " * 20)
    with pytest.raises(LabelError, match=r"notes.sqlite cannot be read .* \(file is not a database; give another"):
        open_labels(runs(), text)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()
    with pytest.raises(LabelError, match="foreign.sqlite is no database of labels"):
        open_labels(runs(), foreign)
    with pytest.raises(LabelError, match=r"foreign.sqlite exists"):
        LabelStore.create(foreign, None, [])
    with pytest.raises(LabelError, match="There is no database"):
        LabelStore(tmp_path / "none.sqlite")
    with pytest.raises(LabelError, match="cannot be made a database of labels"):
        open_labels(runs(), tmp_path / "no folder" / "labels.sqlite")


def test_a_newer_format_is_refused_and_an_empty_file_is_begun(tmp_path):
    path = tmp_path / "labels.sqlite"
    path.touch()  # what a process leaves that dies while it begins a database
    open_labels(runs(), path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 4")
    database.close()
    with pytest.raises(LabelError, match="format version 4, and this sysdag reads 3"):
        open_labels(runs(), path)


@pytest.mark.parametrize("name", ["", "  ", "x" * 81, "two\nlines", "half \ud83d"])
def test_names_that_are_none(opened, name):
    with pytest.raises(LabelError, match="is no name"):
        opened().queue(name)


def test_names_are_the_same_however_they_are_typed(opened):
    store = opened()
    store.queue("Zoe\u0308 ")
    store.queue(" Zo\u00eb")
    assert store.annotators() == ["Zo\u00eb"]


# What an annotator is shown, and how far that is, by looking at everything: the oracle of what is kept up.
TAKEN = """
    SELECT pair FROM assignments WHERE annotator = :me
    UNION
    SELECT shown.pair FROM assignments AS shown
    LEFT JOIN labels ON labels.annotator = shown.annotator AND labels.pair = shown.pair
    WHERE shown.annotator != :me AND shown.pair >= :overlap
    AND CASE WHEN labels.choice IS NULL THEN shown.at > :since ELSE labels.choice != 'skip' END
"""
UNLABELLED = """
    SELECT pair FROM assignments AS shown WHERE annotator = :me AND NOT EXISTS (SELECT 1 FROM labels WHERE
    labels.annotator = shown.annotator AND labels.pair = shown.pair) ORDER BY id LIMIT 1
"""


def expected_queue(store, annotator):
    """The pair to be shown, `done`, `total` and `last`."""
    overlap, since = store.settings.overlap, store_module._held_since()
    given = {"me": annotator, "overlap": overlap, "since": since}

    def one(query):
        with sqlite3.connect(store.path) as database:
            found = database.execute(query, given).fetchone()
        database.close()
        return None if found is None else found[0]

    pair = one(UNLABELLED)
    if pair is None:
        pair = one(f"SELECT id FROM pairs WHERE id NOT IN ({TAKEN}) ORDER BY id LIMIT 1")
    is_new = pair is not None and one(UNLABELLED) is None
    mine = one("SELECT count(*) FROM assignments WHERE annotator = :me") + is_new
    taken = one(f"SELECT count(*) FROM ({TAKEN})") + is_new
    total = mine + one("SELECT count(*) FROM pairs") - taken
    done = one("SELECT count(*) FROM labels WHERE annotator = :me")
    return pair, done, total, one("SELECT max(id) FROM labels WHERE annotator = :me")


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["Ann", "Bob", "Cy"]),
        st.sampled_from(["left", "left", "tie", "skip", "undo", "look", "an hour goes by", "overlap", "begin anew"]),
        st.integers(0, 8),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_what_is_kept_up_is_what_looking_at_everything_tells(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("labels") / "labels.sqlite"
    now = store_module.datetime(2026, 1, 1, tzinfo=store_module.UTC)

    class Clock(store_module.datetime):
        @classmethod
        def now(cls, zone=None):
            return now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "datetime", Clock)
        store = open_labels(runs(8), path, overlap=2)
        for number, (name, step, overlap) in enumerate(steps):
            now += store_module.timedelta(minutes=61 if step == "an hour goes by" else 1)
            expected = expected_queue(store, name)
            queue = store.queue(name)
            assert (queue.task and queue.task.pair, queue.done, queue.total, queue.last) == expected
            if step == "undo" and queue.last is not None:
                store.undo(name, queue.last, f"request-{number}")
            elif step in ("left", "tie", "skip") and queue.task is not None:
                store.label(name, queue.task.pair, step, f"request-{number}")
            elif step == "overlap":
                store.set_overlap(overlap)
            elif step == "begin anew":  # as a database of before, without what is derived
                store.close()
                without_what_is_derived(path)
                store = LabelStore(path)
        store.close()


@pytest.mark.parametrize("kind", ["label", "skip", "undo"])
def test_a_label_costs_the_same_however_many_there_are(tmp_path, kind):
    """In steps of SQLite's machine, which are the same on any computer."""
    with open_labels(runs(6000), tmp_path / "labels.sqlite", overlap=20) as store:
        store._database.execute("PRAGMA synchronous = OFF")
        spent = 0

        def count():
            nonlocal spent
            spent += 10

        task, costs = store.queue("me").task, []
        others = store.queue("another").task
        for number in range(3000):
            before = spent
            if number in range(40, 60) or number >= 2980:
                store._database.set_progress_handler(count, 10)
            if kind == "undo" and number % 3 == 2:
                queue = store.undo("me", store.queue("me").last, f"request-{number}")
            else:
                queue = store.label("me", task.pair, "skip" if kind == "skip" else "left", f"request-{number}")
            store._database.set_progress_handler(None, 10)
            costs.append(spent - before)
            task = queue.task
        early, late = sum(costs[40:60]), sum(costs[-20:])
        assert others.pair == 0
        assert 0 < late < 1.5 * early
