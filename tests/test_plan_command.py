"""`sysdag plan`: the table, the other forms, the files, and the estimate, all without weights."""

import importlib.util
import json

import pytest
import torch
from PIL import Image
from tiny import char_tokenizer, llama
from typer.testing import CliRunner

from sysdag.cli import app
from sysdag.graph import outline
from sysdag.saving.loading import load_system

SYSTEM = """
from pathlib import Path
from sysdag import Input, System, loop, node
from sysdag.components import CausalLM, Opaque

models = Path(__file__).parent
question = Input("question")
shared = CausalLM(models / "shared", max_new_tokens=8)

@node(CausalLM(models / "drafter", max_new_tokens=8))
def draft(question):
    return question

@node(shared)
def critic(draft):
    return draft

@node(shared)
def rewrite(draft, critic):
    return draft + critic

@node
def words(rewrite) -> list:
    return rewrite.split()

@node(Opaque(str.upper))
def tool(words):
    return words

body = loop(critic >> rewrite, carry={"draft": rewrite}, times=2)
looped = System(question >> draft, (draft & critic) >> rewrite, draft >> critic, body)
with_tool = System(question >> draft, (draft & critic) >> rewrite, draft >> critic, body, rewrite >> words,
                   words.each() >> tool)
"""
LENGTHS = ["--lengths", "draft=32,8", *(f for n in ("critic[0]", "critic[1]") for f in ("--lengths", f"{n}=16,8")),
           "--lengths", "rewrite[0]=24,8,4", "--lengths", "rewrite[1]=24,8"]  # fmt: skip


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """`planned_systems.py` beside the configs of its models; there are no weights anywhere."""
    folder = tmp_path_factory.mktemp("planned")
    for name in ("drafter", "shared"):
        llama(0).config.save_pretrained(folder / name)
        char_tokenizer().save_pretrained(folder / name)
    (folder / "planned_systems.py").write_text(SYSTEM)
    assert not list(folder.rglob("*.safetensors"))
    return folder / "planned_systems.py"


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_the_table_has_levels_branches_models_and_objectives(systems):
    lines = run(f"{systems}:looped").splitlines()
    plan = load_system(f"{systems}:looped").compile()
    assert lines[:7] == str(plan).splitlines()
    assert lines[8:] == [
        "branches: draft | critic[0] | rewrite[0] | critic[1] | rewrite[1]",
        "model 1 is shared by critic[0], rewrite[0], critic[1], rewrite[1]",
        "direct: yes. Scored: draft, critic[0], rewrite[0], critic[1], rewrite[1]; latent: none",
        "sampling: yes. Scored: draft, critic[0], rewrite[0], critic[1], rewrite[1]; "
        "latent: draft, critic[0], rewrite[0], critic[1]",
    ]


def test_an_objective_that_cannot_serve_says_why(systems):
    *_, direct, sampling = run(f"{systems}:with_tool").splitlines()
    assert direct.startswith("direct: yes.")
    assert sampling.startswith("sampling: no. Node 'tool' (Opaque(str.upper)) has no likelihood (`none`)")
    found = json.loads(run(f"{systems}:with_tool", "--json"))["objectives"]
    assert found["direct"] == {
        "serves": True,
        "reason": None,
        "latents": [],
        "observed": ["draft", "critic[0]", "rewrite[0]", "critic[1]", "rewrite[1]", "tool"],
        "factors": ["draft", "critic[0]", "rewrite[0]", "critic[1]", "rewrite[1]"],
    }
    assert not found["sampling"]["serves"]
    assert f"sampling: no. {found['sampling']['reason']}" == sampling
    assert found["sampling"]["factors"] == []


def test_json_says_all_that_the_plan_holds(systems):
    plan = load_system(f"{systems}:with_tool").compile()
    found = json.loads(run(f"{systems}:with_tool", "--json"))
    assert [n["name"] for n in found["nodes"]] == list(plan.order)
    for level, names in enumerate(plan.levels):
        assert {n["name"] for n in found["nodes"] if n["level"] == level} == set(names)
    by_name = {n["name"]: n for n in found["nodes"]}
    assert by_name["tool"] == {
        "name": "tool",
        "level": 6,
        "parents": [{"name": "words", "parameter": "words", "each": True}],
        "runs_if": [],
        "component": "Opaque(str.upper)",
        "model": 2,
        "likelihood": "none",
        "output": True,
        "lives": [6, 6],
    }
    assert by_name["words"]["component"] is None
    assert by_name["words"]["model"] is None
    assert found["models"] == [["draft"], ["critic[0]", "rewrite[0]", "critic[1]", "rewrite[1]"], ["tool"]]
    assert found["branches"] == [list(branch) for branch in plan.branches]
    assert (found["inputs"], found["outputs"], found["estimate"]) == (["question"], ["tool"], None)


def test_mermaid_and_dot_are_the_plans(systems):
    plan = load_system(f"{systems}:looped").compile()
    assert run(f"{systems}:looped", "--mermaid") == plan.to_mermaid() + "\n"
    assert run(f"{systems}:looped", "--dot") == plan.to_dot() + "\n"


def test_the_estimate_by_node_with_its_total_from_configs_alone(systems):
    text = run(f"{systems}:looped", "--objective", "sampling", "--candidates", 3, "--device", "cpu", *LENGTHS)
    plan = load_system(f"{systems}:looped").compile()
    lengths = {"draft": (32, 8), "critic[0]": (16, 8), "critic[1]": (16, 8), "rewrite[0]": (24, 8, 4),
               "rewrite[1]": (24, 8)}  # fmt: skip
    expected = plan.estimate(lengths, objective="sampling", num_candidates=3, device="cpu")
    assert text.endswith(f"\n\nmemory of a training, objective=sampling:\n{expected}\n")
    assert str(expected).splitlines()[-1].endswith("in all")
    assert all(plan.system[name].component.lm._model is None for name in plan.random_nodes)


def test_every_option_of_the_estimate_reaches_it(systems):
    options = ["--pairs", 5, "--engine", "one_pass", "--micro-batch-tokens", 100, "--gradient-checkpointing",
               "--frozen", "draft"]  # fmt: skip
    found = json.loads(run(f"{systems}:looped", "--json", *options, *LENGTHS))["estimate"]
    plan = load_system(f"{systems}:looped").compile()
    lengths = {"draft": (32, 8), "critic[0]": (16, 8), "critic[1]": (16, 8), "rewrite[0]": (24, 8, 4),
               "rewrite[1]": (24, 8)}  # fmt: skip
    given = {"pairs": 5, "engine": "one_pass", "micro_batch_tokens": 100, "gradient_checkpointing": True}
    expected = plan.estimate(lengths, frozen=["draft"], **given)
    assert found == expected.to_dict()
    assert found["total"] == found["resident"] + found["step"]
    assert found["nodes"].keys() == {"draft", "critic[0]"}
    assert found["nodes"]["draft"]["gradients"] == 0 < found["nodes"]["critic[0]"]["gradients"]
    for leave_out in given:
        kept = {name: value for name, value in given.items() if name != leave_out}
        assert plan.estimate(lengths, frozen=["draft"], **kept).to_dict() != found, leave_out
    offloaded = json.loads(run(f"{systems}:looped", "--json", "--offload-idle", "--frozen", "draft", *LENGTHS))
    assert offloaded["estimate"]["offload_idle"] is True


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_pictures(systems, tmp_path, ending):
    path = tmp_path / f"graph{ending}"
    run(f"{systems}:looped", "--output", path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if ending == ".png":
        with Image.open(path) as image:
            assert min(image.size) > 200
    else:
        assert path.read_bytes().startswith({".svg": b"<?xml", ".pdf": b"%PDF"}[ending])


def test_files_hold_what_is_printed(systems, tmp_path):
    for ending, option in ((".mmd", "--mermaid"), (".dot", "--dot"), (".json", "--json"), (".txt", None)):
        path = tmp_path / f"graph{ending}"
        path.write_text("older")
        printed = run(f"{systems}:looped", "--output", path, *([option] if option else []))
        assert path.read_text() == printed


def test_a_failed_picture_leaves_the_older_file(systems, tmp_path, monkeypatch):
    path = tmp_path / "graph.png"
    path.write_text("older")
    monkeypatch.setattr("sysdag.graph.render.draw", lambda plan, path: path.write_text("half") and 1 / 0)
    result = CliRunner().invoke(app, ["plan", f"{systems}:looped", "--output", str(path)])
    assert isinstance(result.exception, ZeroDivisionError)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("graph.png", "older")]


def test_without_matplotlib_a_picture_names_what_to_install(systems, tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else there(name))
    message = run(f"{systems}:looped", "--output", tmp_path / "graph.png", code=1)
    assert 'pip install "sysdag[report]"' in message
    assert not list(tmp_path.iterdir())
    run(f"{systems}:looped", "--output", tmp_path / "graph.mmd")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--output", "graph.doc"], 2, "must be one of .svg .png .pdf .mmd .dot .json .txt"),
        (["--mermaid", "--json"], 2, "exclude each other"),
        (["--pairs", "2"], 2, "--pairs belongs to the estimate"),
        (["--micro-batch-tokens", "2"], 2, "--micro-batch-tokens belongs to the estimate"),
        (["--lengths", "draft=12"], 2, "--lengths draft=12: expected NODE=PROMPT,COMPLETION[,COMMON]"),
        (["--lengths", "draft=12,x"], 2, "expected NODE=PROMPT,COMPLETION[,COMMON]"),
        (["--lengths", "12,8"], 2, "expected NODE=PROMPT,COMPLETION[,COMMON]"),
        (["--estimate"], 1, "lengths has no entry for node 'draft'"),
        (["--lengths", "drft=1,2"], 1, "lengths names 'drft'; the system's random nodes are ['draft', 'critic[0]'"),
        (["--estimate", "--frozen", "drft"], 1, "frozen names 'drft'"),
        (["--estimate", "--engine", "one_pass", "--offload-idle"], 1, "offload_idle=True needs engine='two_pass'"),
        (["--estimate", "--device", "cuda"], 1, "torch finds no GPU"),
    ],
)
def test_mistakes_are_named(systems, options, code, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = run(f"{systems}:looped", *options, code=code)
    assert message in " ".join(output.replace("│", " ").split())


def test_an_objective_that_cannot_serve_has_no_estimate(systems):
    message = run(f"{systems}:with_tool", "--objective", "sampling", *LENGTHS, code=1)
    assert "Node 'tool'" in message


def test_the_outline_of_every_objective_agrees_with_the_plan(systems):
    for name in ("looped", "with_tool"):
        plan = load_system(f"{systems}:{name}").compile()
        for objective, objection in outline.objections(plan).items():
            if objection is None:
                plan.check(objective)
            else:
                with pytest.raises(ValueError) as error:
                    plan.check(objective)
                assert str(error.value) == objection
