"""A system whose first node looks at images, by the commands: sample, validate, train, eval, report."""

import base64
import io
import json
import sys

import pytest
import torch
from PIL import Image
from tiny import char_tokenizer, llama
from tiny_vision import build, picture
from typer.testing import CliRunner

from sysdag import DiverseBeamSearch, SysDPOConfig, SysDPOTrainer, Trace
from sysdag.cli import app
from sysdag.engine.replay import accumulate_gradients
from sysdag.saving.loading import load_system
from sysdag.traces import preference_row

MODULE = "system_that_sees"
SYSTEM = """
from pathlib import Path

from peft import LoraConfig

from sysdag import Input, System, node
from sysdag.components import CausalLM, ImageTextToText

HERE = Path(__file__).parent
images, question = Input("images"), Input("question", str)
adapter = LoraConfig(r=2, target_modules=r".*(text_model|language_model).*(q|v)_proj")


@node(ImageTextToText(HERE / "seer", peft_config=adapter, max_new_tokens=4))
def seen(images, question):
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


@node(CausalLM(HERE / "writer", max_new_tokens=4))
def answer(question, seen):
    return f"q: {question} s: {seen} a:"


system = System((images & question) >> seen, (question & seen) >> answer)


def score(run):
    return len(set(run["answer"]))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the system, its models and inputs, as the working folder."""
    model, processor = build("smolvlm")
    for saved in (model, processor):
        saved.save_pretrained(tmp_path / "seer")
    for saved in (llama(), char_tokenizer()):
        saved.save_pretrained(tmp_path / "writer")
    (tmp_path / f"{MODULE}.py").write_text(SYSTEM)
    picture(0).save(tmp_path / "first.png")
    buffer = io.BytesIO()
    picture(1, 20, 50).save(buffer, format="PNG")
    inline = {"__bytes__": base64.b64encode(buffer.getvalue()).decode()}
    rows = [
        {"images": ["first.png"], "question": "a red cube"},
        {"images": ["first.png", inline], "question": "two words"},
        {"images": [], "question": "a friend"},
    ]
    (tmp_path / "inputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    sys.modules.pop(MODULE, None)
    yield tmp_path
    sys.modules.pop(MODULE, None)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_the_commands_work_on_a_system_that_sees(place):
    system = f"{MODULE}.py:system"
    run("plan", system)
    run("sample", system, "inputs.jsonl", "--output", "runs.jsonl", "--runs", 3, "--seed", 1)
    run("judge", "runs.jsonl", "--by", f"{MODULE}.py:score", "--output", "pairs.jsonl")
    assert "3 rows" in run("validate", system, "pairs.jsonl", "--objective", "sampling")
    options = ["--output-dir", "out", "--objective", "sampling", "--max-steps", 2, "--use-cpu", "--report-to", "none"]
    run("train", system, "pairs.jsonl", *options, "--logging-steps", 1, "--eval-dataset", "pairs.jsonl")
    log = [json.loads(line) for line in (place / "out" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    run("eval", "out", "inputs.jsonl", "--against", system, "--by", f"{MODULE}.py:score", "--output", "verdicts.json")
    run("report", "out")


def test_a_trace_on_file_scores_as_it_was_drawn(place):
    """Pixels that were given as images are kept without loss, and draws by their token ids."""
    plan = load_system(f"{MODULE}.py:system").compile()
    inputs = {"images": [[picture(3), picture(4, 16, 24)], []], "question": ["a red cube", "dark"]}
    trace = plan.sample(inputs, seed=0)
    trace.to_jsonl("runs.jsonl")
    again = Trace.from_jsonl("runs.jsonl")
    assert isinstance(again["images"][0][0], Image.Image)
    with torch.no_grad():
        for name, found in plan.log_probs(again).items():
            drawn = torch.tensor([draw.log_prob for draw in trace.cells[name]])
            torch.testing.assert_close(found.double(), drawn.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["direct", "sampling"])
def test_two_passes_give_the_gradient_of_one(place, objective):
    plan = load_system(f"{MODULE}.py:system").compile()
    inputs = {"images": [[picture(3)], [picture(3)], [], []], "question": ["a red cube"] * 2 + ["dark"] * 2}
    trace = plan.sample(inputs, seed=0)
    pairs = [preference_row(trace, 0, 1, ["answer"]), preference_row(trace, 2, 3, ["answer"])]
    found = {}
    for engine, tokens in {"one_pass": 8192, "two_pass": 70}.items():
        args = SysDPOConfig(
            output_dir="out", objective=objective, engine=engine, micro_batch_tokens=tokens, use_cpu=True, report_to=[],
            seed=0,
        )  # fmt: skip
        candidates = DiverseBeamSearch(num_candidates=2) if objective == "sampling" else None
        trainer = SysDPOTrainer(model=plan.system.fresh(), args=args, candidates=candidates, train_dataset=pairs)
        for number, weight in enumerate(each for each in trainer.model.parameters() if each.requires_grad):
            torch.manual_seed(number)
            with torch.no_grad():
                weight.add_(0.05 * torch.randn_like(weight))
        output = trainer.model(trainer.data_collator(trainer.train_dataset)["pairs"])
        accumulate_gradients(trainer.model, output)
        found[engine] = [each.grad for each in trainer.model.parameters() if each.requires_grad]
    for one, two in zip(found["one_pass"], found["two_pass"], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
