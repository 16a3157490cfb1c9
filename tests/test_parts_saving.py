"""Systems with parts of completions on a disk, at the command line, in other processes and behind a server."""

import json
import pickle
import sys

import pytest
import torch
from reasoning_models import CLOSE, thinking_model
from served_models import MODEL, TOKENIZER
from tiny import llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from vllm_stand_in import VllmStandIn

from sysdag import Input, SerializationError, System, Trace, split
from sysdag.cli import app
from sysdag.components import CausalLM, Server
from sysdag.execution.execute import node_inputs

MODULE = "system_that_thinks"
SYSTEM = """
from pathlib import Path

from sysdag import Input, System, split
from sysdag.components import CausalLM

question = Input("question", str)


@split(
    CausalLM(Path(__file__).parent / "model", max_length=120),
    reasoning="</think>",
    answer=None,
    max_new_tokens={"reasoning": 16, "answer": 8},
)
def solve(question):
    return [{"role": "user", "content": question}]


system = System(question >> solve)
"""
ROWS = [
    {"question": f"a{number}", "chosen": f"<think>\nso\n</think>\n\n{number}", "rejected": "<think>\nhm</think>\n\nno"}
    for number in range(4)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = thinking_model()
    model = llama(0, len(made.tokenizer), max_position_embeddings=128)
    with torch.no_grad():  # one number of its states is the same everywhere, and has it end a thought often
        model.model.embed_tokens.weight[:, 0] = 2.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[made.tokenizer.convert_tokens_to_ids(CLOSE), 0] = 4.0
    model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / f"{MODULE}.py").write_text(SYSTEM)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop(MODULE, None)


def declared():
    __import__(MODULE)
    return sys.modules[MODULE].system


def test_a_saved_system_has_one_model_and_the_same_scores(folder):
    plan = declared().compile()
    trace = plan.sample({"question": ["a", "b", "c"]}, seed=0)
    system = plan.system
    system.save_pretrained(folder / "saved")
    saved = json.loads((folder / "saved" / "system.json").read_text())
    assert list(saved["components"]) == ["answer"]
    assert [row["function"] for row in saved["nodes"]] == [f"{MODULE}:solve.answer", f"{MODULE}:solve.reasoning"]
    AutoModelForCausalLM.from_pretrained(folder / "saved" / "answer")
    del sys.modules[MODULE]  # found by its source, which is compared before it runs
    back = System.from_pretrained(folder / "saved").compile()
    assert back.system["answer"].component is back.system["reasoning"].component
    for name, value in plan.log_probs(trace).items():
        torch.testing.assert_close(back.log_probs(trace)[name], value)
    assert back.sample({"question": ["a"]}, seed=4)["answer"] == plan.sample({"question": ["a"]}, seed=4)["answer"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('reasoning="</think>"', 'reasoning="::"', "solve.reasoning is cut otherwise than when the system was saved"),
        ('"content": question', '"content": question + "!"', "changed since the system was saved"),
        ("@split(", "@split_(", "cannot be imported"),
    ],
)
def test_a_function_or_a_cut_that_changed_is_refused(folder, before, after, message):
    system = declared()
    system.save_pretrained(folder / "saved")
    del sys.modules[MODULE]
    (folder / f"{MODULE}.py").write_text(SYSTEM.replace(before, after))
    with pytest.raises(SerializationError, match=f"Node 'reasoning': .*{message}|Node 'answer': .*{message}"):
        System.from_pretrained(folder / "saved")
    system.load(folder / "saved")  # which has the functions at hand


def test_nodes_are_pickled_by_their_place(folder):
    system = declared()
    for name in ("reasoning", "answer"):
        assert pickle.loads(pickle.dumps(system[name])).function is system[name].function


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_the_whole_way_at_the_command_line(folder):
    name = f"{MODULE}.py:system"
    assert "reasoning" in run("plan", name)
    assert "4 can be used" in run("validate", name, "pairs.jsonl", "--objective", "direct")
    run("train", name, "pairs.jsonl", "--output_dir", "out", "--max_steps", 2, "--use_cpu", "true", "--objective",
        "direct", "--per_device_train_batch_size", 2, "--save_strategy", "no")  # fmt: skip
    (folder / "inputs.jsonl").write_text('{"question": "a"}\n{"question": "b"}\n')
    run("sample", "out", "inputs.jsonl", "--output", "runs.jsonl", "--device", "cpu", "--runs", 2)
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 4
    assert all(part in json.dumps(runs[0]) for part in ("reasoning", "answer", "token_ids"))
    (folder / "judge.py").write_text(
        "def score(run):\n    assert '<think>' not in run['answer'][:7]\n    return sum(map(ord, run['answer']))\n"
    )
    assert "win rate" in run("eval", "out", "pairs.jsonl", "--by", "judge.py:score", "--against", "chosen").lower()
    run("judge", "runs.jsonl", "--by", "judge.py:score", "--output", "judged.jsonl")
    assert "can be used" in run("validate", "out", "judged.jsonl", "--objective", "direct")
    logged = [{"question": row["question"], "output": row["chosen"]} for row in ROWS]
    (folder / "logged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    run("import", "logged.jsonl", "--system", name, "--output", "imported.jsonl")
    [first, *_] = Trace.from_jsonl(folder / "imported.jsonl")["answer"]
    assert first == "0"


def test_other_processes_read_parts_without_the_weights(folder):
    pytest.importorskip("ray")
    from sysdag.execution.ray_engine import _outline, _plan

    plan = declared().compile()
    trace = plan.sample({"question": ["a", "b"]}, seed=1)
    elsewhere = _plan(_outline(plan))
    for name in plan.order:
        ours, theirs = node_inputs(plan, trace, name).values, node_inputs(elsewhere, trace, name).values
        assert [each.prompt for each in ours] == [each.prompt for each in theirs]
        assert [each.before for each in ours] == [each.before for each in theirs]
        assert [(each.partition, each.place) for each in ours] == [(each.partition, each.place) for each in theirs]


@pytest.mark.usefixtures("no_waits")
def test_a_server_draws_parts():
    with VllmStandIn({"base": MODEL}, TOKENIZER) as server:
        model = CausalLM(MODEL, TOKENIZER, decoder=Server(server.url, score_draws=True))

        @split(model, thought="e", answer=None, max_new_tokens={"thought": 40, "answer": 5})
        def solve(question):
            return question

        plan = System(Input("question") >> solve).compile()
        trace = plan.sample({"question": ["ab"] * 6}, seed=0)
        asked = server.asked()
    texts = [(text, bool(draw.record["token_ids"]))
             for text, draw in zip(trace["thought"], trace.cells["answer"], strict=True)]  # fmt: skip
    assert any(written for _, written in texts)
    assert all(written == text.endswith("e") and "e" not in text[:-1] for text, written in texts)
    answers = [request for request in asked if request["max_tokens"] == 5]
    thoughts = [draw.record["token_ids"] for draw in trace.cells["thought"] if draw.value.endswith("e")]
    prompt = TOKENIZER("ab", add_special_tokens=False)["input_ids"]
    assert sorted(request["prompt"] for request in answers) == sorted([*prompt, *ids] for ids in thoughts)
    scored = plan.log_probs(trace)
    for name in plan.order:
        drawn = [draw.log_prob for draw in trace.cells[name]]
        assert drawn == pytest.approx(scored[name].tolist(), abs=1e-3)
