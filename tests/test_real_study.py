"""The real study in miniature, on a chat model that is built here."""

import csv
import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("trl")

from tiny import llama
from tokenizer_families import CHATML, IM, bytes_with

from bench import study
from bench.study.compare import RATES, TUNING_SEED
from bench.study.real import constraints, costs, demo, document, models, pairs, setting, store
from bench.study.real.command import about
from bench.study.real.constrained import Constrained
from bench.study.real.constraints import CONFLICTS, FUNCTION_WORDS, KINDS, demands
from bench.study.real.pairs import by_instruction, repeats
from bench.study.real.reports import reports
from bench.study.real.reward import ImplicitReward
from bench.study.real.sources import Sources, read_pairs
from bench.study.real.statistics import difference_of, mean_of
from bench.study.real.store import Found, Share, Store
from bench.study.real.tables import PHASES, TABLES
from sysdag import System, Trace
from sysdag.evaluation import cluster_bootstrap

PROMPTS = [f"Say {word}." for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    tokenizer = bytes_with(CHATML, IM, "<|im_end|>")
    made = llama(3, len(tokenizer), max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id, peaked=1.0)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs to train on and to measure on."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, prompts in (("train", PROMPTS[:5]), ("test", PROMPTS[5:])):
        rows = [{"prompt": p, "chosen": p[4:], "rejected": f"No {n}."} for p in prompts for n in range(2)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / f"{name}.jsonl") for name in ("train", "test")]


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    """This process keeps its threads and its logs."""
    monkeypatch.setattr(store, "quieten", lambda: None)


MET = {
    "at most": (constraints.at_most(3), ["One two three.", "don't go on"], ["One two three four.", "  "]),
    "at least": (constraints.at_least(3), ["One two three."], ["one, two"]),
    "sentences": (
        constraints.exactly(2), ["It is 3.5 km. Go!", "Really?! Yes", "One... two."], ["One.", "A. B. C.", "No end"],
    ),
    "use": (constraints.use("time"), ["Time flies.", "in no time!"], ["Sometimes.", "times"]),
    "avoid": (constraints.avoid("the"), ["Then other.", "a the\u00e2tre"], ["The end", "on the"]),
    "no commas": (constraints.no_commas(), ["one; two"], ["one, two"]),
    "small": (constraints.lowercase(), ["all small 3."], ["All small"]),
    "capitals": (constraints.capitals(), ["ALL BIG 3."], ["ALL BIg"]),
    "list": (
        constraints.listed(2), ["- a\n- b", "* a\n\n- b\n"], ["- a\n- b\n- c", "Here:\n- a\n- b", "-a\n-b"],
    ),
    "quoted": (constraints.quoted(), ['"Yes, it is."', ' "a" '], ["'a'", '"a', '""', '"']),
    "beginning": (constraints.begins("Well"), ["Well, yes", '"WELL"'], ["Wells", "Oh well"]),
    "ending": (constraints.ends("good luck"), ["So: good luck!", "GOOD LUCK"], ["good luck, all", "luck"]),
    "order": (
        constraints.in_order("small", "large"), ["Small, then large."], ["large small", "small", "small large small"],
    ),
    "language": (
        constraints.in_language("French"),
        ["Le chat est dans la maison avec les enfants."], ["The cat is in the house with the children.", "Hm"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MET)
def test_a_constraint_holds_of_what_it_asks_for_alone(name):
    constraint, right, wrong = MET[name]
    assert [constraint.met(text) for text in right] == [True] * len(right)
    assert [constraint.met(text) for text in [*wrong, ""]] == [False] * (len(wrong) + 1)


def test_a_report_holds_what_is_asked_of_it_and_no_two_are_alike():
    parts = reports(300, 100, 200)
    assert [len(part) for part in parts.values()] == [300, 100, 200]
    every = list(itertools.chain.from_iterable(parts.values()))
    assert len({report.text for report in every}) == 600
    for report in every:
        facts = [constraint for constraint in report.constraints if constraint.asks.startswith("Name the")]
        assert len(facts) == 2
        assert all(constraint.met(report.text) for constraint in facts)
        assert not any(constraint.met(report.question) for constraint in facts)
        assert all(constraint.asks in report.question for constraint in report.constraints)


@pytest.mark.parametrize(("text", "name"), [
    ("You should go to the market and buy bread for your family.", "English"),
    ("Los perros corren por el parque y las flores son para una amiga.", "Spanish"),
    ("Les enfants jouent dans le jardin avec une balle pour vous.", "French"),
    ("Die Kinder spielen im Garten und der Hund ist nicht auf der Wiese.", "German"),
    ("12 + 30 = 42", ""),
])  # fmt: skip
def test_a_language_is_known_by_its_frequent_words(text, name):
    assert constraints.language(text) == name


def test_no_frequent_word_is_of_two_languages():
    listed = [word for words in FUNCTION_WORDS.values() for word in words.split()]
    assert len(set(listed)) == len(listed)


def test_instructions_are_many_disjoint_and_the_same_each_time():
    parts = demands(300, 100, 200)
    assert [len(part) for part in parts.values()] == [300, 100, 200]
    topics = [{demand.topic for demand in part} for part in parts.values()]
    assert not any(a & b for a, b in itertools.combinations(topics, 2))
    texts = [demand.text for part in parts.values() for demand in part]
    assert len(set(texts)) == 600
    assert texts == [demand.text for part in demands(300, 100, 200).values() for demand in part]
    seen = {constraint.kind for part in parts.values() for demand in part for constraint in demand.constraints}
    assert seen == set(KINDS)
    for demand in itertools.chain.from_iterable(parts.values()):
        kinds = [constraint.kind for constraint in demand.constraints]
        assert len(kinds) in (2, 3)
        assert not any(frozenset(pair) in CONFLICTS for pair in itertools.combinations(kinds, 2))
        assert all(constraint.asks in demand.text for constraint in demand.constraints)
    with pytest.raises(ValueError, match=r"training: \d+ instructions can be made, 3000 are needed"):
        demands(3000, 10, 10)


def test_a_demand_is_judged_by_the_share_of_its_constraints():
    asked = [constraints.at_most(3), constraints.use("rain"), constraints.begins("Well")]
    demand = constraints.Demand("rain", "...", asked)
    assert [demand.share(text) for text in ("Well, rain", "rain", "Oh", "")] == [1, 2 / 3, 1 / 3, 0]


def test_rows_that_are_no_pairs_are_named_and_long_ones_left_out(tmp_path):
    file = tmp_path / "pairs.jsonl"
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    file.write_text(
        "\n".join(json.dumps(row) for row in (good, good | {"chosen": "a" * 301}, good | {"prompt": "q" * 241}))
    )
    assert read_pairs(file) == [{"question": "q", "chosen": "a", "rejected": "b"}]
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | {"rejected": None}))
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 2: 'rejected' must be a text, got None"):
        read_pairs(file)
    file.write_text(json.dumps(good | {"chosen": ""}))
    with pytest.raises(ValueError, match="no pair has a prompt of up to 240"):
        read_pairs(file)


def moved(system):
    """The system after its adapters took a step somewhere."""
    noise = torch.Generator().manual_seed(5)
    for node in system.nodes:
        for parameter in node.component.own_parameters().values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
    return system


def test_what_every_training_starts_from_is_validated_once(model, files, tmp_path, monkeypatch):
    Sources(model=str(model), pairs=files).keep(tmp_path)
    asked = []
    monkeypatch.setattr(Constrained, "validate", lambda self, system: asked.append(system) or float(len(asked)))
    first, other = (Constrained(tmp_path, seed, setting.QUICK) for seed in (0, 1))
    assert [first.validated(first.system()), other.validated(other.system("draft -> refine"))] == [1.0, 1.0]
    assert first.validated(first.system("one node")) == 2.0
    assert first.validated(moved(first.system())) == 3.0
    assert first.validated(moved(first.system())) == 4.0
    assert Constrained(tmp_path, 0, replace(setting.QUICK, choosing=1)).validated(first.system()) == 5.0


def test_the_implicit_reward_is_that_of_a_plain_computation(model, tmp_path):
    """Over the same drafts, from transformers' own logits: each text behind its prompt, one at a time."""
    lengths = setting.QUICK.lengths
    base = models.adapted(models.OUTLINES["draft -> refine"], str(model), "cpu", lengths, 0)
    ours = moved(models.adapted(models.OUTLINES["draft -> refine"], str(model), "cpu", lengths, 1))
    rows = [{"question": q, "chosen": c, "rejected": "No."} for q, c in (("a?", "Yes."), ("b?", "Ab"), ("a?", "So"))]
    reward = ImplicitReward(rows, drafts=3, beta=0.5)
    reward.prepare(base, tmp_path / "kept")
    drafts = reward._drafts(tmp_path / "kept")

    @torch.no_grad()
    def log_prob(system, name, prompt, ids):
        component = system[name].component
        tokens = component.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        with component.lm.at_work() as module:
            logits = module(torch.tensor([[*tokens, *ids]])).logits[0, len(tokens) - 1 : -1]
        return float(logits.double().log_softmax(-1)[range(len(ids)), ids].sum())

    def of(row, side):
        tokenizer = ours["answer"].component.tokenizer
        ids = [*tokenizer(row[side]).input_ids, tokenizer.eos_token_id]
        q, p = [], []
        for at, asked in enumerate(drafts["question"]):
            if asked == row["question"]:
                draft, drawn = drafts["draft"][at], drafts.cells["draft"][at].record["token_ids"]
                read = models.answer.function(asked, draft)
                own, theirs = (log_prob(s, "draft", models.draft.function(asked), drawn) for s in (ours, base))
                q.append(log_prob(base, "answer", read, ids))
                p.append(own - theirs + log_prob(ours, "answer", read, ids))
        assert len(p) == 3
        return math.log(sum(map(math.exp, p))) - math.log(sum(map(math.exp, q)))

    expected = [0.5 * (of(row, "chosen") - of(row, "rejected")) for row in rows]
    assert max(map(abs, expected)) > 0.05
    assert reward.margins(ours, tmp_path / "kept").tolist() == pytest.approx(expected, abs=1e-4)
    assert reward.margins(base, tmp_path / "kept").tolist() == pytest.approx([0] * 3, abs=1e-6)


def test_means_are_of_instructions_and_repetitions_are_seen():
    assert by_instruction(torch.tensor([1.0, 0.0, 0.5]).numpy(), ["a", "b", "a"]) == [0.75, 0.0]
    assert repeats("it is so good that it is so good")
    assert not repeats("it is so good that it is so bad")


def found(values, **row):
    return Found({name: str(value) for name, value in row.items()}, values)


def test_the_plan_tunes_every_row_alike_and_ends_at_the_tuned_rates():
    table, about = TABLES["preferences"], {"model": "m", "size": "cpu", "pairs": "x"}
    look, tuning, nothing = (table.planned(phase, about, {}, "cpu") for phase in PHASES)
    assert [cell.options["method"] for cell in look[:2]] == ["one node", "joint"]
    assert {cell.options["method"] for cell in look} == set(table.methods)
    assert {cell.options["seed"] for cell in look} == {0}
    assert nothing == []
    trained = set(table.methods) - set(table.untrained) - set(table.tuned_as)
    assert {cell.options["method"] for cell in tuning} == trained
    assert {cell.options["seed"] for cell in tuning} == {TUNING_SEED}
    assert len(tuning) == len(RATES) * len(trained)
    scores = {1 / 3: -0.6, 1.0: -0.69, 3.0: -0.7}
    there = {cell.key: found({"validation": [scores[cell.options["rate"]]]}) for cell in tuning}
    assert table.planned("seeds", about, dict(list(there.items())[1:]), "cpu") == []
    then = table.planned("seeds", about, there, "cpu")
    assert len(then) == 3 * len(table.methods)
    assert all(cell.options.get("rate", 1 / 3) == 1 / 3 for cell in then)
    assert table.rate("joint, Monte Carlo, k = 2", about, there) == 1 / 3
    untuned = look[1]
    shown = table.shown(about, there | {untuned.key: found({"accuracy": [0.5]})})
    assert shown["joint"][0].values == {"accuracy": [0.5]}
    tuned = next(cell for cell in then if cell.options["method"] == "joint")
    shown = table.shown(about, there | {untuned.key: found({"accuracy": [0.5]}), tuned.key: found({"accuracy": [1.0]})})
    assert shown["joint"][0].values == {"accuracy": [1.0]}


def test_of_several_trainings_the_last_decides_where_each_goes_on_from_the_one_before():
    table, about = TABLES["preferences"], {"model": "m", "size": "cpu", "pairs": "x"}
    parts = {1 / 3: [-0.3, -0.6], 1.0: [-0.5, -0.5], 3.0: [-0.4, -0.4]}
    for method, rate in (("separate", 3.0), ("stage by stage", 3.0)):
        there = {table.cell(method, TUNING_SEED, each, about).key: found({"validation": parts[each]}) for each in RATES}
        assert table.tuned(method, about, there) == rate
    parts[1 / 3] = [-0.1, -0.6]
    there = {table.cell("separate", TUNING_SEED, r, about).key: found({"validation": parts[r]}) for r in RATES}
    assert table.tuned("separate", about, there) == 1 / 3


@pytest.mark.parametrize("workers", [0, 2])
def test_cells_are_kept_one_by_one_and_a_failure_keeps_the_others(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ProcessPoolExecutor", lambda count, **_: ThreadPoolExecutor(count))
    computed = []

    def align(cache, *, method, seed, **about):
        computed.append(method)
        if method == "separate":
            raise ValueError("no such thing")
        return {"values": {"accuracy": [float(len(method)), 0.0]}}

    monkeypatch.setattr(pairs, "align", align)
    table, about, kept = TABLES["preferences"], {"model": "m"}, Store(tmp_path, "preferences")
    cells = [table.cell(method, 0, 1.0, about) for method in ("joint", "separate", "prompting")]
    assert store.run(kept, [*cells, cells[0]], tmp_path, Share(cells=1), workers) == []
    (failed,) = store.run(kept, cells, tmp_path, Share(), workers)
    assert "'method': 'separate'" in failed
    assert "no such thing" in failed
    assert sorted(computed) == ["joint", "prompting", "separate"]
    found = kept.found()
    assert [found[cells[at].key].values["accuracy"] for at in (0, 2)] == [[5.0, 0.0], [9.0, 0.0]]
    assert [row.row["method"] for row in found.values()] == ["joint", "prompting"]
    assert float(found[cells[0].key].row["mean"]) == 2.5


def test_a_share_ends_by_number_and_by_time():
    assert [Share(cells=2).take() for _ in range(2)] == [True, True]
    two = Share(cells=2)
    assert [two.take() for _ in range(3)] == [True, True, False]
    assert not Share(until=0).take()


@pytest.mark.parametrize("system", [name for name in costs.SYSTEMS if not name.endswith("k = 4")])
def test_a_step_is_that_of_others_before_it_is_timed(system, model, files, tmp_path):
    """TRL's loss and gradients for one model, not those of other pairs; those of plain padded batches for two."""
    Sources(model=str(model), pairs=files).keep(tmp_path)
    step = costs.RealStep(tmp_path, system, "quick", with_trl=costs.TRL in costs.ways(system))
    step.check(costs.ways(system)[1:])
    assert {p.dtype for p in step.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in step.model.parameters() if not p.requires_grad} == {costs.SYSTEMS[system].dtype}
    step.pairs = step.pairs[::-1][:1]
    if costs.TRL in costs.ways(system):
        with pytest.raises(SystemExit, match="no speed is reported for a wrong result"):
            step.check([costs.TRL])


def test_an_interval_is_of_instructions_and_of_seeds():
    """Of one seed as the paired bootstrap has it; what only seeds differ in widens it."""
    values = {0: [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]}
    assert mean_of(values) == cluster_bootstrap(values[0])
    same = mean_of({0: [0.25] * 40, 1: [0.75] * 40})
    assert (same.estimate, same.low, same.high) == (0.5, 0.25, 0.75)
    change = difference_of({0: [1.0, 0.5], 1: [0.0, 0.0]}, {0: [0.5, 0.0], 2: [1.0, 1.0]})
    assert (change.seeds, change.interval.estimate, change.interval.low, change.interval.high) == ([0], 0.5, 0.5, 0.5)
    assert difference_of({0: [1.0]}, {1: [1.0]}) is None


def test_the_page_says_what_is_missing_and_has_no_part_without_cells(tmp_path):
    assert document.section(tmp_path) == ""
    table, about = TABLES["preferences"], {"model": "m", "size": "cpu", "pairs": "x"}
    kept = Store(tmp_path, "preferences")
    log = {"step": 2, "loss": 0.6, "candidates/effective_sample_size": 1.5}
    log |= {"nodes/draft/rewards/margins": 0.1, "nodes/answer/rewards/margins": 0.3}
    curve = {"steps": [0, 2], "validation": [-0.69, -0.6], "logs": [log], "cpu_seconds": 7.0,
             "best_step": 2}  # fmt: skip
    shared = {"seconds": 9.0, "peak_mib": 100.0, "machine": "a machine"}
    for method, accuracy in (("joint", [1.0, 1.0, 0.0, 0.5]), ("separate", [0.0, 1.0, 0.0, 0.5])):
        values = {"accuracy": accuracy, "log-loss": [0.5] * 4, "validation": [-0.6]}
        kept.add(table.cell(method, 0, 1.0, about), shared | {"values": values, "curves": [curve]})
    page = document.section(tmp_path)
    assert page.count("### ") == 1
    lines = {line.split(" | ")[0]: line.split(" | ") for line in page.split("\n") if line.startswith("| ")}
    bounds = cluster_bootstrap([1.0, 1.0, 0.0, 0.5])
    assert lines["| joint"][1:3] == [f"62.5 [{100 * bounds.low:.1f}, {100 * bounds.high:.1f}]", "0.500 [0.500, 0.500]"]
    assert lines["| separate"][3].startswith("\N{MINUS SIGN}25.0 [")
    assert lines["| separate"][4:] == ["1.50", "0.25", "2", "7", "100", "1, untuned", "1 |"]
    assert "Every row is a single seed of the 3 that are planned" in page
    assert "Not tuned yet, at the usual learning rate: separate; joint." in page
    assert "Not measured yet: prompting; one node; only draft; only answer; stage by stage; joint, beams, k = 2" in page
    assert "no part of this page: Constraints that a program checks; Summarise → rewrite; A critic loop; What" in page
    (row,) = [row for row in kept.curves() if row["step"] == "2" and row["method"] == "joint"]
    assert (row["validation"], row["loss"]) == ("-0.6", "0.6")


def test_the_demo_shows_before_and_after_and_saves_the_system(model, tmp_path, capsys):
    metrics = demo.main(["--model", str(model), "--output", str(tmp_path)], setting.QUICK)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["interval_95"][0] <= metrics["difference"] <= metrics["interval_95"][1]
    shares = [
        setting_of.met(Trace.load(tmp_path / f"{name}.jsonl")).mean()
        for setting_of in [Constrained(tmp_path / "cache", 0, setting.QUICK)]
        for name in ("before", "after")
    ]
    assert shares == pytest.approx([metrics["before"], metrics["after"]])
    assert "points (95 % interval" in capsys.readouterr().out
    aligned = System.from_pretrained(tmp_path / "system").compile()
    asked = {"question": [demands(24, 2, 3)["heldout"][0].text]}
    assert aligned.sample(asked, seed=1)["answer"]


def test_what_is_not_there_is_named_with_where_it_is_had(tmp_path, files, capsys):
    with pytest.raises(SystemExit, match=r"no folder of a model(.|\n)*hf download"):
        study.main(["--real", "--model", str(tmp_path), "--pairs", *files, "--cache", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"there is no file .*nowhere.jsonl(.|\n)*AlpacaEval"):
        study.main(["--real", "--model", "a/b", "--pairs", "nowhere.jsonl", files[1], "--cache", str(tmp_path)])
    with pytest.raises(SystemExit, match="need --pairs TRAIN.jsonl TEST.jsonl"):
        study.main(["--real", "--model", "a/b", "--cache", str(tmp_path)])


def arguments(model, files, tmp_path, *more):
    return ["--real", "--quick", "--model", str(model), "--pairs", *files, "--cache", str(tmp_path), *more]


def rows_of(folder, name):
    with (folder / "quick" / "real" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


QUICK = {
    "costs": ["one model, DPO", "draft -> refine, Direct", "draft -> refine, Sampling, k = 2"],
    "constraints": ["best of 4", "direct, three rounds", "one node"],
    "reports": ["before", "separate"],
    "critic-loop": ["unrolled, n = 1", "naive, n = 2"],
    "preferences": ["prompting", "separate", "joint, importance sampling, k = 4", "one node"],
}


RELEASE = pytest.mark.release("the study is run by its authors, not by users")


@pytest.mark.parametrize(
    "name", [name if name == "preferences" else pytest.param(name, marks=RELEASE) for name in QUICK]
)
def test_a_table_from_end_to_end(name, model, files, tmp_path, capsys):
    given = arguments(model, files, tmp_path, "--tables", name, "--judge", str(model), "--methods", *QUICK[name])
    study.main([*given, "--cells", "1"])
    (first,) = {row["cell"] for row in rows_of(tmp_path, name)}
    study.main(given)
    rows = rows_of(tmp_path, name)
    assert rows[0]["cell"] == first
    assert {row["method"] for row in rows} == set(QUICK[name])
    for row in rows:
        values = [float(value) for value in row["values"].split()]
        assert float(row["mean"]) == pytest.approx(sum(values) / len(values), rel=1e-3)
        assert len(values) == int(row["count"])
    table = TABLES[name]
    if name != "costs":
        counts = {row["count"] for row in rows if row["metric"] in table.metrics}
        assert counts == {"3"}
        assert {row["metric"] for row in rows if row["method"] == QUICK[name][1]} == {*table.metrics, "validation"}
    study.main(given)
    assert rows_of(tmp_path, name) == rows
    page = (tmp_path / "quick" / "study.md").read_text()
    assert all(f"| {method} |" in page for method in QUICK[name])
    assert "{{" not in page
    assert (f"judge {model.name}" in page) == (name == "preferences")


def test_what_another_judge_says_are_other_rows():
    one, other = (Sources(model="a", judge=f"models/{name}") for name in ("one", "other"))
    assert about(TABLES["preferences"], one, "cpu")["judge"] == "one"
    assert about(TABLES["preferences"], other, "cpu")["judge"] == "other"
    assert about(TABLES["constraints"], one, "cpu") == about(TABLES["constraints"], other, "cpu")
