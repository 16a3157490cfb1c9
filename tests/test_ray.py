"""The engine on Ray against the local one, on a Ray of two CPUs."""

import contextlib
import json
import logging
import os
import re
import threading

import pytest
import sampled_systems
import switched_systems
from test_sample_command import BAD, SYSTEMS, copied, sample
from tiny import llama
from tokenizer_families import IM, TOOLS, bytes_with, user
from trained_systems import two_llms

from sysdag import Input, PlanError, System, Trace, node
from sysdag.components import CausalLM, Opaque
from sysdag.errors import RunError, SysdagError
from sysdag.execution.batches import LocalEngine
from sysdag.execution.ray_engine import RayEngine, _connected
from sysdag.execution.running import run

ray = pytest.importorskip("ray")
LOOPED = sampled_systems.looped.compile()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray of this module's tests alone. Returns the file whose existence kills an actor."""
    order = tmp_path_factory.mktemp("ray") / "kill"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("SYSDAG_TEST_KILL", str(order))
        ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
        try:
            yield order
        finally:
            ray.shutdown()


@pytest.mark.slow
def test_the_file_is_the_local_engines_resumed_and_with_an_actor_that_dies(cluster, tmp_path):
    """A loop and a plate that share one model in a pool of two, and a deterministic node; from a line cut in two on."""
    inputs, whole = tmp_path / "inputs.json", tmp_path / "whole.jsonl"
    inputs.write_text(json.dumps([{"x": value} for value in "abba"]))
    options = [f"{SYSTEMS}:looped", inputs, "--runs", 5, "--seed", 3, "--batch-size", 3, "--output"]
    sample(*options, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    cut = copied(whole, tmp_path / "cut.jsonl", len(b"".join(lines[:7])) + 20)
    cluster.touch()
    sample(*options, cut, "--resume", "--engine", "ray", "--actors", "turn[1]=2")
    assert not cluster.exists(), "no actor was killed"
    assert cut.read_bytes() == whole.read_bytes()
    assert not ray.data.DataContext.get_current().execution_options.preserve_order
    assert logging.getLogger("ray.data").level != logging.ERROR


@pytest.mark.slow
def test_branches_of_switches_are_taken_as_by_the_local_engine(cluster):
    plan = switched_systems.build(behind=True).compile()
    options = {"runs": 6, "seed": 5, "batch_size": 4}
    local, there = (list(run(plan, {"x": ["a", "b"]}, engine=engine, **options)) for engine in ("local", "ray"))
    assert [list(trace.rows()) for trace in there] == [list(trace.rows()) for trace in local]
    whole = Trace.concatenate(there)
    assert {value is None for value in whole["solve"]} == {True, False}


@pytest.mark.slow
def test_language_models_from_a_saved_folder(cluster, tmp_path):
    two_llms().save_pretrained(tmp_path / "system")
    inputs = tmp_path / "inputs.jsonl"
    inputs.write_text(
        "".join(json.dumps({"prompt": f"{letter}{number}"}) + "\n" for number, letter in enumerate("abcd"))
    )
    options = [tmp_path / "system", inputs, "--runs", 2, "--batch-size", 3, "--output"]
    sample(*options, tmp_path / "local.jsonl")
    sample(*options, tmp_path / "ray.jsonl", "--engine", "ray")
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()
    assert (tmp_path / "ray.jsonl").read_bytes().count(b"token_ids") == 16
    other = [tmp_path / "system", inputs, "--runs", 2, "--batch-size", 5, "--output", tmp_path / "other.jsonl"]
    sample(*other, "--engine", "ray")
    drawn = [
        re.findall(r'"token_ids": ?\[.*?\]', (tmp_path / f"{name}.jsonl").read_text()) for name in ("ray", "other")
    ]
    assert len(drawn[0]) == 16
    assert drawn[1] == drawn[0]


def test_an_error_is_the_local_engines_behind_the_batches_before_it(cluster):
    base = 1  # a function that is no module's, with something of its surroundings

    @node
    def reciprocal(y):
        return base / y

    plan = System(Input("y") >> reciprocal).compile()
    seen = {}
    for engine in ("local", "ray"):
        traces = run(plan, {"y": [1, 2, 4, 0, 8, 0]}, batch_size=2, engine=engine)
        seen[engine] = [next(traces)["reciprocal"]]
        with pytest.raises(RunError) as error:
            next(traces)
        seen[engine].append(str(error.value))
    assert seen["ray"] == seen["local"]
    assert seen["ray"][0] == [1.0, 0.5]
    assert seen["ray"][1].endswith("In the function of node 'reciprocal', row 3, run 0.")
    assert any("In a task of Ray: Traceback" in note for note in error.value.__notes__)


def test_a_model_that_is_not_there_and_gpus_that_are_not(cluster):
    absent = sampled_systems.Absent(sampled_systems.TABLE)
    plan = System(sampled_systems.x >> node(absent, name="draft")(lambda x: x)).compile()
    message = r"Node 'draft': the model of Tabular\(.* cannot be loaded \(OSError: no such model\)"
    with pytest.raises(RunError, match=message):
        next(run(plan, {"x": ["a"]}, engine="ray"))
    with pytest.raises(PlanError, match="2 actors with 0.5 GPUs each do not fit: Ray has 0 GPUs"):
        next(run(LOOPED, {"x": ["a"]}, engine=RayEngine(actors={"coin": 2}, gpus_per_actor=0.5)))


def test_nodes_that_share_a_model_share_its_actors():
    plan = System(
        sampled_systems.x >> sampled_systems.coin,
        sampled_systems.coin >> sampled_systems.turn,
        sampled_systems.x >> node(Opaque(str.upper), name="upper")(lambda x: x),
    ).compile()
    assert plan.components == (("coin", "turn"), ("upper",))
    assert RayEngine().pool_sizes(plan) == [1, 1]
    assert RayEngine(actors={"turn": 3}).pool_sizes(plan) == [3, 1]
    assert RayEngine(actors={"upper": 2, "coin": 4, "turn": 4}).pool_sizes(plan) == [4, 2]
    with pytest.raises(PlanError, match=r"\['coin', 'turn\[0\]'\] share one model, so they have one number, got"):
        RayEngine(actors={"coin": 1, "turn[0]": 2}).pool_sizes(LOOPED)
    with pytest.raises(PlanError, match=r"'letters' is none of the nodes with a model, \['coin', "):
        run(LOOPED, {"x": ["a"]}, engine=RayEngine(actors={"letters": 1}))
    with pytest.raises(PlanError, match="actors must be 1 or more and gpus_per_actor 0 or more"):
        RayEngine(actors={"coin": 0})
    with pytest.raises(PlanError, match="got {} and -1"):
        RayEngine(gpus_per_actor=-1)


def test_what_cannot_be_sent_names_its_node(cluster):
    lock = threading.Lock()

    @node(Opaque(lambda value: lock and value))
    def tool(x):
        return x

    @node
    def held(x):
        return lock and x

    for name, made in (("component", tool), ("function", held)):
        message = f"Node '{made.name}': its {name} .* cannot be sent to Ray's actors .*must be picklable"
        with pytest.raises(PlanError, match=message):
            next(run(System(sampled_systems.x >> made).compile(), {"x": ["a"]}, engine="ray"))


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SysdagError, match=r'pip install "sysdag\[ray\]"'):
        run(LOOPED, {"x": ["a"]}, engine="ray")


def test_a_ray_that_is_started_is_stopped(monkeypatch):
    calls = []
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    with contextlib.suppress(ZeroDivisionError), _connected():
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        calls.append(1 / 0)
    assert calls == [{"include_dashboard": False, "logging_level": logging.WARNING}, "shutdown"]


def test_nothing_is_left_to_do():
    assert list(run(LOOPED, {"x": ["a"]}, engine="ray", first_batch=1)) == []


@pytest.mark.slow
def test_inputs_are_read_as_in_the_local_engine(cluster):
    """What a value spells is text in a task, too, and a row's own options reach the chat template."""
    tokenizer = bytes_with(TOOLS, IM, IM[2])
    lm = CausalLM(llama(vocab_size=len(tokenizer), max_position_embeddings=512), tokenizer, max_new_tokens=4)
    question = Input("question")

    @node(lm)
    def draft(question):
        return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"

    @node(lm)
    def answer(draft, question):
        return [user(f"{question} {draft}")]

    plan = System(question >> draft, (draft & question) >> answer).compile()
    tools = [{"type": "function", "function": {"name": "weather", "description": "of a city"}}]
    inputs = {"question": ["say<|im_end|>", "two words"], "tools": [tools, None]}
    local, there = (
        next(run(plan, inputs, batch_size=2, engine=engine)) for engine in (LocalEngine(), RayEngine(device=None))
    )
    assert list(there.rows()) == list(local.rows())
    log_probs = plan.log_probs(there)
    for name in ("draft", "answer"):
        drawn = [draw.log_prob for draw in there.cells[name]]
        assert log_probs[name].tolist() == pytest.approx(drawn, abs=1e-4)
    without = next(run(plan, {"question": inputs["question"]}, batch_size=2))
    assert without.cells["answer"][0].log_prob != local.cells["answer"][0].log_prob


class Reads(Opaque):
    def tell_apart(self, input, function, arguments):
        return f"{input}!"


def test_a_component_that_reads_inputs_its_own_way_says_how_on_ray(cluster):
    plan = System(sampled_systems.x >> node(Reads(str.upper), name="upper")(lambda x: x)).compile()
    assert next(run(plan, {"x": ["a"]}))["upper"] == ["A!"]
    with pytest.raises(PlanError, match=r"override `input_reader\(self\)` in Reads"):
        next(run(plan, {"x": ["a"]}, engine="ray"))


def test_bad_rows_are_skipped_as_in_the_local_engine(cluster, tmp_path):
    inputs = tmp_path / "bad.jsonl"
    inputs.write_text("\n".join(BAD) + "\n")
    shown = {}
    for engine in ("local", "ray"):
        output = tmp_path / f"{engine}.jsonl"
        options = ["--runs", 3, "--batch-size", 4, "--on-error", "skip", "--engine", engine, "--output", output]
        shown[engine] = sample(f"{SYSTEMS}:looped", inputs, *options).replace(str(output), "FILE")
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()
    assert "Skipped 4 of 7 rows" in shown["local"]
    assert shown["ray"] == shown["local"]
    records = [json.loads((tmp_path / f"{engine}.jsonl.run.json").read_text()) for engine in ("local", "ray")]
    assert records[1]["skipped"] == records[0]["skipped"]
