"""`sysdag eval`: systems against each other and against chosen responses, sampled or from traces."""

import json
import sys

import numpy
import pytest
from judge_server import JudgeServer
from PIL import Image
from typer.testing import CliRunner

from sysdag.cli import app
from sysdag.components import Opaque, Tabular
from sysdag.errors import DataError, JudgeError
from sysdag.evaluation import statistics
from sysdag.evaluation.evaluation_runs import chosen_runs, held_out
from sysdag.evaluation.judges import ColumnScore, FunctionScore, function_judge
from sysdag.evaluation.measures import evaluate, match
from sysdag.graph.system import System
from sysdag.graph.variables import Input, node
from sysdag.saving.loading import load_system
from sysdag.traces.cells import Draw
from sysdag.traces.readers import read_rows
from sysdag.traces.trace import Trace

SYSTEM = """
from sysdag import Input, System, node
from sysdag.components import Opaque, Tabular

question = Input("question", str)
topic = Input("topic")

def writer(right):
    @node(Tabular({"any": {"right": right, "wrong": 1 - right}}), name="draft")
    def draft(question):
        return "any"

    @node(Tabular({key: {f"{key}!": 0.75, f"{key}.": 0.25} for key in ("right", "wrong")}), name="answer")
    def answer(draft, question):
        return draft

    return System(question >> draft, (question & draft) >> answer)

strong, twin, weak = writer(0.8), writer(0.8), writer(0.4)
half = weak.with_components({"draft": strong["draft"].component})
same = strong

class Other(Tabular):  # another component around the same weights
    def __init__(self, of):
        super().__init__({"any": {"right": 0.5, "wrong": 0.5}})
        self._module = of.module

shadow = weak.with_components({"draft": Other(strong["draft"].component)})

@node(Opaque(str.upper))
def reply(question):
    return question

other_output = System(question >> reply)

@node(Opaque(str.upper), name="answer")
def about(topic):
    return topic

other_input = System(topic >> about)
"""
FUNCTIONS = """
def right(run):
    return run["answer"].startswith("right")

def errors(run):
    return int(not run["answer"].startswith("right"))

def gold(run):
    return run["answer"][:-1] == run["gold"]

def prefer(first, second):
    return int(right(first)) - int(right(second))

def needs_draft(run):
    return len(run["draft"])
"""
QUESTIONS = [f"question {number}" for number in range(30)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("evaluated_systems", "judging_evaluations"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "evaluated_systems.py").write_text(SYSTEM)
    (tmp_path / "judging_evaluations.py").write_text(FUNCTIONS)
    rows = [{"question": q, "chosen": "right.", "rejected": "wrong.", "gold": "right"} for q in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "inputs.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))
    return tmp_path


@node(Tabular({"any": {"right": 0.5, "wrong": 0.5}}), name="answer")
def judged(question):
    return "any"


def call(*arguments, code=0):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


STRONG, WEAK, BY = "evaluated_systems.py:strong", "evaluated_systems.py:weak", "judging_evaluations.py"


def test_a_system_against_another(files):
    text = call(
        STRONG, "inputs.jsonl", "--against", WEAK, "--by", f"{BY}:right", "--threshold", 1, "--output", "eval.json",
        "--seed", 3,
    )  # fmt: skip
    found = json.loads((files / "eval.json").read_text())
    assert found["sources"]["system"] == STRONG
    assert found["judge"] == {"kind": "score", "name": f"{BY}:right", "lower_is_better": False}
    rows = found["rows"]
    assert len(rows) == found["prompts"] == 30
    assert [(row["prompt"], row["run"]) for row in rows] == [(number, 0) for number in range(30)]
    # Everything again, from the rows alone.
    one, other = numpy.array([row["scores"] for row in rows]).T
    assert 0.6 < one.mean() < 0.97
    assert 0.2 < other.mean() < 0.65
    assert [row["outcome"] for row in rows] == list(numpy.sign(one - other))
    wins, ties, losses = ((one > other).sum(), (one == other).sum(), (one < other).sum())
    assert (found["wins"], found["ties"], found["losses"]) == (wins, ties, losses)
    rate = statistics.win_rate(numpy.sign(one - other).astype(int))
    assert found["win_rate"] == vars(rate)
    assert found["test"] == found["successes"]["test"] == vars(statistics.sign_test(one - other))
    assert found["scores"]["difference"] == vars(statistics.cluster_bootstrap(one - other, seed=3))
    assert found["successes"]["first"]["estimate"] == one.mean()
    assert f"A                    {STRONG}\nB                    {WEAK}\ncomparisons          30 on 30 prompts" in text
    assert (
        f"win rate of A        {100 * rate.estimate:.1f} % ({100 * rate.low:.1f} % to {100 * rate.high:.1f} %)" in text
    )
    assert f"wins, ties, losses   {wins}, {ties}, {losses}" in text


def test_several_runs_of_a_prompt_stay_together(files):
    call(STRONG, "inputs.jsonl", "--against", WEAK, "--by", f"{BY}:right", "--runs", 4, "--output", "eval.json",
         "--threshold", 1, "--limit", 10)  # fmt: skip
    found = json.loads((files / "eval.json").read_text())
    rows = found["rows"]
    assert [(row["prompt"], row["run"]) for row in rows] == [(p, r) for p in range(10) for r in range(4)]
    outcomes, prompts = [row["outcome"] for row in rows], [row["prompt"] for row in rows]
    assert found["win_rate"] == vars(statistics.win_rate(outcomes, prompts))
    assert found["test"] == vars(statistics.sign_test(outcomes, prompts))
    assert found["test"]["first"] + found["test"]["second"] <= 10


def test_the_same_seed_gives_the_same_evaluation(files):
    arguments = [STRONG, "inputs.jsonl", "--against", WEAK, "--by", f"{BY}:right", "--seed"]
    first, again, other = call(*arguments, 1), call(*arguments, 1), call(*arguments, 2)
    assert first == again != other


def test_against_chosen_with_columns_of_the_rows(files):
    call(WEAK, "rows.jsonl", "--against", "chosen", "--by", f"{BY}:gold", "--runs", 2, "--output", "eval.json")
    found = json.loads((files / "eval.json").read_text())
    assert found["scores"]["second"]["estimate"] == 1  # what is chosen is right everywhere
    assert found["wins"] == 0
    assert found["losses"] > 20
    assert len(found["rows"]) == 60


def test_rows_with_equal_inputs_are_one_prompt(files):
    plan = load_system(STRONG).compile()
    rows = [{"question": q, "chosen": c} for q, c in [("a", "right."), ("b", "right."), ("a", "wrong.")]]
    assert held_out(plan, rows, distinct=True).inputs == {"question": ["a", "b"]}
    assert held_out(plan, rows, distinct=False).inputs == {"question": ["a", "b", "a"]}
    (files / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(STRONG, "twice.jsonl", "--against", "chosen", "--by", f"{BY}:right", "--output", "eval.json")
    found = json.loads((files / "eval.json").read_text())
    assert found["prompts"] == 2
    assert [(row["prompt"], row["run"], row["scores"][1]) for row in found["rows"]] == [(0, 0, 1), (0, 1, 0), (1, 0, 1)]


def test_chosen_responses_as_they_stand_in_files():
    """Texts, one assistant message, draws, plates, several outputs, and the intermediates that every row has."""
    question = Input("question")
    ideas = node(name="ideas")(lambda question: [question])
    title, lines = (node(Opaque(str.upper), name=name)(lambda ideas: ideas) for name in ("title", "lines"))
    system = System(question >> ideas, ideas >> title, ideas.each() >> lines, outputs=["title", "lines"])
    rows = [
        {"question": "a", "chosen": {"title": "T", "lines": ["x", "y"]}, "chosen_intermediates": {"ideas": ["i"]}},
        {"question": "b", "chosen": {"title": Draw("U"), "lines": [Draw("z")]}, "chosen_intermediates": {"ideas": []}},
    ]
    plan = system.compile()
    found = chosen_runs(plan, held_out(plan, rows, distinct=False), runs=2)
    assert found["title"] == ["T", "T", "U", "U"]
    assert found["lines"] == [["x", "y"], ["x", "y"], ["z"], ["z"]]
    assert found["ideas"] == [["i"], ["i"], [], []]
    assert found["question"] == ["a", "a", "b", "b"]
    for wrong, text in [
        ({"title": "T"}, r"Row 1: chosen must be a dict with one value for each of \['title', 'lines'\]"),
        ({"title": "T", "lines": "xy"}, "Row 1: node 'lines' is a plate, whose value is a list, got str"),
    ]:
        with pytest.raises(DataError, match=text):
            chosen_runs(plan, held_out(plan, [rows[0], {**rows[1], "chosen": wrong}], distinct=False))


class Painter(Opaque):
    reads_files = True


def test_images_that_rows_name_are_what_a_judge_sees(tmp_path):
    plan = System(Input("idea") >> node(Painter(str.upper), name="image")(lambda idea: idea)).compile()
    Image.new("L", (2, 3), 7).save(tmp_path / "seven.png")
    rows = [{"idea": "a", "chosen": "seven.png"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    (image,) = chosen_runs(plan, held_out(plan, read_rows(tmp_path / "rows.jsonl"), distinct=False))["image"]
    assert (image.size, image.getpixel((1, 2))) == ((2, 3), 7)
    raw = {"idea": "a", "chosen": (tmp_path / "seven.png").read_bytes()}
    assert chosen_runs(plan, held_out(plan, [raw], distinct=False))["image"][0].size == (2, 3)
    with pytest.raises(DataError, match="Row 0, node 'image': expected an image, got the file 'seven.png', which PIL"):
        chosen_runs(plan, held_out(plan, rows, distinct=False))


def test_conversations_and_implicit_prompts():
    plan = System(Input("question") >> node(Opaque(str.upper), name="answer")(lambda question: question)).compile()
    say = lambda role, text: {"role": role, "content": text}
    rows = [
        {
            "chosen": [say("user", "why"), say("assistant", "so")],
            "rejected": [say("user", "why"), say("assistant", "no")],
        }
    ]
    given = held_out(plan, rows, distinct=False)
    assert given.inputs == {"question": [[say("user", "why")]]}
    assert chosen_runs(plan, given)["answer"] == ["so"]


def test_a_function_that_compares(files):
    text = call(STRONG, "inputs.jsonl", "--against", WEAK, "--by", f"{BY}:prefer", "--output", "eval.json")
    found = json.loads((files / "eval.json").read_text())
    assert found["scores"] is found["successes"] is None
    assert found["consistency"]["agreed"] == found["consistency"]["asked"] == 30
    for row in found["rows"]:
        assert row["outcome"] == {1.0: 1, 0.5: 0, 0.0: -1}[row["votes"][0]]
        assert row["votes"][0] == row["votes"][1]
    assert "the orders agree in 30 of 30" in text


def test_lower_is_better_turns_outcomes_and_the_threshold_round(files):
    for by, options, name in [("right", [], "r"), ("errors", ["--lower-is-better"], "e")]:
        call(STRONG, "inputs.jsonl", "--against", WEAK, "--by", f"{BY}:{by}", "--output", f"{name}.json",
             "--threshold", 1 if name == "r" else 0, *options)  # fmt: skip
    right, errors = (json.loads((files / f"{name}.json").read_text()) for name in "re")
    assert right["win_rate"] == errors["win_rate"]
    assert right["successes"]["first"] == errors["successes"]["first"]
    assert right["scores"]["difference"]["estimate"] == pytest.approx(-errors["scores"]["difference"]["estimate"])


def test_a_language_model_judges_in_both_orders_and_is_not_asked_again(files):
    def prefer_right(text):
        first, second = ("right" in part.rpartition("BEGIN")[2] for part in text.split("Response ")[-2:])
        return f"VERDICT: {'TIE' if first == second else 'A' if first else 'B'}"

    with JudgeServer(prefer_right) as server:
        arguments = [
            STRONG,
            "inputs.jsonl",
            "--against",
            WEAK,
            "--by",
            server.url,
            "--model",
            "m",
            "--output",
            "e.json",
        ]
        text = call(*arguments)
        asked = len(server.requests)
        found = json.loads((files / "e.json").read_text())
        assert asked == 2 * found["consistency"]["asked"] > 0
        assert found["consistency"]["same"] > 0
        assert found["wins"] > found["losses"]
        assert found["judge"]["model"] == "m"
        assert call(*arguments) == text
        assert len(server.requests) == asked


def test_the_systems_draw_independently(files):
    """With the draws of one seed the weak system would never win against the strong one."""
    call(STRONG, "inputs.jsonl", "--against", WEAK, "--by", f"{BY}:right", "--runs", 8, "--output", "eval.json")
    found = json.loads((files / "eval.json").read_text())
    assert found["losses"] / 240 == pytest.approx(0.2 * 0.4, abs=0.07)
    call(
        STRONG,
        "inputs.jsonl",
        "--against",
        "evaluated_systems.py:twin",
        "--by",
        f"{BY}:right",
        "--runs",
        8,
        "--output",
        "eval.json",
    )
    found = json.loads((files / "eval.json").read_text())
    assert found["ties"] / 240 == pytest.approx(0.8**2 + 0.2**2, abs=0.1)


def test_traces_are_kept_and_evaluated_again(files):
    arguments = [STRONG, "inputs.jsonl", "--against", WEAK, "--by", f"{BY}:right", "--batch-size", 7]
    text = call(*arguments, "--keep-traces", "kept")
    whole = (files / "kept" / "against.jsonl").read_bytes()
    (files / "kept" / "against.jsonl").write_bytes(whole[: len(whole) // 2])  # killed while it sampled
    assert call(*arguments, "--keep-traces", "kept") == text
    assert (files / "kept" / "against.jsonl").read_bytes() == whole
    again = call("--traces", "kept/system.jsonl", "kept/against.jsonl", "--by", f"{BY}:right")
    assert again.splitlines()[2:] == text.splitlines()[2:]
    assert again.startswith("A                    system\nB                    against\n")
    changed = call(*arguments[:-1], 5, "--keep-traces", "kept", code=1)
    assert "was begun by another run" in changed


def traces(scores, prompts):
    return Trace({"q": prompts}, {"answer": [Draw(f"answer {score}") for score in scores]}, {"score": scores})


def test_runs_are_matched_by_their_inputs(files):
    traces([1, 2, 3, 4], ["a", "b", "a", "c"]).save("one.jsonl")
    traces([5, 0, 2, 9], ["d", "a", "b", "a"]).save("other.parquet")
    text = call("--traces", "one.jsonl", "other.parquet", "--by", "score", "--output", "eval.json")
    assert "1 runs of one are left out" in text
    assert "1 runs of other are left out" in text
    found = json.loads((files / "eval.json").read_text())
    assert [(row["prompt"], row["run"], row["scores"]) for row in found["rows"]] == [
        (0, 0, [1, 0]), (0, 1, [3, 9]), (1, 0, [2, 2])
    ]  # fmt: skip


def test_margins_make_ties():
    matched = match(traces([1, 5, 3], list("abc")), traces([0, 1, 4], list("abc")))
    found = evaluate(ColumnScore("score"), matched, ["answer"], margin=2)
    assert [row["outcome"] for row in found.rows] == [0, 1, 0]
    decimals = match(traces([0.3, 0.2, 0.3], list("abc")), traces([0.2, 0.3, 0.201], list("abc")))
    found = evaluate(ColumnScore("score"), decimals, ["answer"], margin=0.1)
    assert [row["outcome"] for row in found.rows] == [1, -1, 0]
    assert [row["outcome"] for row in evaluate(ColumnScore("score"), matched, ["answer"]).rows] == [1, 1, -1]


def test_a_single_prompt_has_no_bounds():
    found = evaluate(ColumnScore("score"), match(traces([1, 2], ["a", "a"]), traces([0, 0], ["a", "a"])), ["answer"])
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["scores"]["difference"] == {"estimate": 1.5, "low": None, "high": None}
    assert "difference, A - B    +1.5" in found.table("one", "other")


def test_an_answer_that_cannot_be_read_is_left_out():
    answers = iter(["VERDICT: A", "VERDICT: B", "no idea", "VERDICT: B"])
    from sysdag.evaluation.endpoint import Endpoint
    from sysdag.evaluation.endpoint_judge import EndpointJudge

    matched = match(traces([1, 2], ["a", "b"]), traces([3, 4], ["a", "b"]))
    with JudgeServer(lambda text: next(answers)) as server:
        judge = EndpointJudge(endpoint=Endpoint(url=server.url, model="m", concurrency=1))
        found = evaluate(judge, matched, ["answer"])
        assert (found.wins, found.ties, found.losses) == (1, 0, 0)
        assert [row["outcome"] for row in found.rows] == [1, None]
        server.respond = lambda text: "no idea"
        with pytest.raises(JudgeError, match="gave no verdict that could be read.\n.*(.|\n)*4 times: no line VERDICT"):
            evaluate(judge, matched, ["answer"])


def test_options_that_need_scores_are_refused_for_judges_that_compare():
    matched = match(traces([1], ["a"]), traces([2], ["a"]))
    judge = function_judge(lambda one, other: 0)
    for options in ({"threshold": 1.0}, {"margin": 1.0}):
        with pytest.raises(JudgeError, match=f"{next(iter(options))} .* needs them"):
            evaluate(judge, matched, ["answer"], **options)


def test_traces_without_a_prompt_in_common_are_an_error():
    with pytest.raises(DataError, match="no prompt in common"):
        match(traces([1], ["a"]), traces([1], ["b"]))
    with pytest.raises(DataError, match=r"different inputs: \['q'\] and \['p'\]"):
        match(traces([1], ["a"]), Trace({"p": ["a"]}, {}))


def test_the_evaluation_says_who_is_better_only_where_it_can_tell():
    """A system against itself with other seeds: the interval holds one half, and the test sees nothing."""
    generator = numpy.random.default_rng(0)
    scores = generator.integers(0, 5, size=(2, 400)).tolist()
    prompts = [str(number // 4) for number in range(400)]
    found = evaluate(
        FunctionScore("s", lambda run: run["score"]), match(*(traces(s, prompts) for s in scores)), ["answer"]
    )
    assert found.win_rate.low < 0.5 < found.win_rate.high
    assert found.scores.difference.low < 0 < found.scores.difference.high
    assert found.test.p_value > 0.05


SAMPLED = [STRONG, "inputs.jsonl", "--against", WEAK]
WRONG = [
    ([STRONG, "inputs.jsonl", "--by", f"{BY}:right"], 2, "Give SYSTEM, DATA and --against"),
    ([STRONG, "--against", WEAK, "--by", f"{BY}:right"], 2, "Give SYSTEM, DATA and --against"),
    (SAMPLED, 2, "--by"),
    ([*SAMPLED, "--by", f"{BY}:right", "--threshold", "nan"], 1, "must be a finite number, got nan"),
    ([*SAMPLED, "--by", f"{BY}:right", "--output", "eval.csv"], 2, "its ending must be .json"),
    ([*SAMPLED, "--by", f"{BY}:right", "--runs", "0"], 2, "runs"),
    ([*SAMPLED, "--by", f"{BY}:right", "--confidence", "95"], 2, "confidence"),
    ([*SAMPLED, "--by", f"{BY}:right", "--criteria", "short"], 2, "--criteria belongs to an endpoint"),
    ([*SAMPLED, "--by", f"{BY}:right", "--seed", "-1"], 2, "seed"),
    ([*SAMPLED, "--by", "http://h/v1", "--model", "m", "--cache", "inputs.jsonl"], 2, "answers go to a file of their"),
    (["--traces", "a.jsonl", "b.jsonl", "--by", "http://h/v1", "--model", "m", "--cache", "a.jsonl"], 2,
     "answers go to a file of their"),
    ([*SAMPLED, "--by", f"{BY}:right", "--traces", "a.jsonl", "b.jsonl"], 2, "--traces stand instead of"),
    (["--traces", "a.jsonl", "b.jsonl", "--by", "score", "--runs", "2"], 2, "--runs belongs to sampling"),
    (["--traces", "a.jsonl", "--by", "score"], 2, "Missing option '--by'"),
    (["--traces", "a.jsonl", "nowhere.jsonl", "--by", "score"], 1, "nowhere.jsonl"),
    (["--traces", "a.jsonl", "replies.jsonl", "--by", "score"], 1, "replies.jsonl has no values of 'answer'"),
    (["--traces", "a.jsonl", "a.jsonl", "--by", "scores"], 1, "no column 'scores'"),
    ([*SAMPLED, "--by", "score"], 1, "has no column of scores. Name FILE.py:function"),
    ([*SAMPLED, "--by", f"{BY}:none"], 1, "has no 'none'; its functions are"),
    ([*SAMPLED, "--by", f"{BY}:prefer", "--threshold", "1"], 1, "gives no scores; threshold"),
    ([*SAMPLED, "--by", f"{BY}:gold"], 1, "KeyError: 'gold'; the run has ['answer', 'draft', 'question']"),
    ([STRONG, "nowhere.jsonl", "--against", WEAK, "--by", f"{BY}:right"], 1, "nowhere.jsonl"),
    ([STRONG, "topics.jsonl", "--against", WEAK, "--by", f"{BY}:right"], 1,
     "Row 0 (line 1): input 'question' is missing"),
    (["evaluated_systems.py:none", "inputs.jsonl", "--against", WEAK, "--by", f"{BY}:right"], 1, "has no 'none'"),
    ([STRONG, "inputs.jsonl", "--against", "evaluated_systems.py:other_output", "--by", f"{BY}:right"], 1,
     "other_output has no node 'answer', which is judged"),
    ([STRONG, "inputs.jsonl", "--against", STRONG, "--by", f"{BY}:right"], 1, "are one and the same system"),
    ([STRONG, "inputs.jsonl", "--against", "evaluated_systems.py:same", "--by", f"{BY}:right"], 1,
     "are one and the same system"),
    ([STRONG, "inputs.jsonl", "--against", "evaluated_systems.py:half", "--by", f"{BY}:right"], 1,
     "share the weights of node 'draft'"),
    ([STRONG, "inputs.jsonl", "--against", "evaluated_systems.py:shadow", "--by", f"{BY}:right"], 1,
     "share the weights of node 'draft'"),
    (["saved", "inputs.jsonl", "--against", "./saved", "--by", f"{BY}:right"], 1, "are one and the same system"),
    ([STRONG, "inputs.jsonl", "--against", "evaluated_systems.py:other_input", "--by", f"{BY}:right"], 1,
     "both have to run on the same inputs"),
    ([STRONG, "inputs.jsonl", "--against", "chosen", "--by", f"{BY}:right"], 1,
     "Row 0 (line 1): 'chosen' is missing"),
    ([STRONG, "rows.jsonl", "--against", "chosen", "--by", f"{BY}:right", "--node", "draft"], 1,
     "chosen responses have no value of 'draft'"),
    ([STRONG, "rows.jsonl", "--against", "chosen", "--by", f"{BY}:needs_draft"], 1, "KeyError: 'draft'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG, ids=[f"{n} {w[2]}" for n, w in enumerate(WRONG)])
def test_mistakes_end_in_a_message(files, arguments, code, message):
    traces([1, 2], ["a", "b"]).save("a.jsonl")
    Trace({"q": ["a"]}, {"reply": [Draw("x")]}, {"score": [1]}).save("replies.jsonl")
    System(Input("question") >> judged).save_pretrained(files / "saved")
    (files / "topics.jsonl").write_text('{"topic": "tea"}\n')
    options = [] if code == 2 or "--output" in arguments else ["--output", "eval.json"]
    text = call(*arguments, *options, code=code)
    assert message in " ".join(text.replace("│", "").split())
    assert "Traceback" not in text
    assert not (files / "eval.json").exists()
