import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import sysdag.ops
from sysdag.cli import app
from sysdag.objectives.losses import LOSSES
from sysdag.ops import _dispatch

ROOT = Path(__file__).resolve().parents[1]
OPS = ["linear_logprob", "token_logprob", "preference_loss", "diverse_beam_step", "diffusion_error"]
HAS_EXTENSION = _dispatch.why_absent("cpp") is None


@pytest.fixture
def machine(monkeypatch):
    """Sets what is here: the extension, a GPU; and forgets what was found out about it, before and after."""
    monkeypatch.delenv("SYSDAG_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def pretend(extension=None, gpu=False):
        if extension is not None:
            monkeypatch.setattr(_dispatch, "extension_loaded", lambda: extension)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        forget()

    def forget():
        _dispatch.why_unavailable.cache_clear()
        _dispatch._chosen.cache_clear()

    yield pretend
    forget()


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def environment():
    return json.loads(run("env", "--json"))


def test_versions_and_devices(machine):
    machine()
    found = environment()
    assert list(found["versions"]) == [
        "sysdag", "python", "torch", "triton", "transformers", "diffusers", "peft", "accelerate"
    ]  # fmt: skip
    for package in ("transformers", "peft"):
        assert found["versions"][package] == importlib.metadata.version(package)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["sysdag"] == sysdag.__version__
    assert list(found["devices"]) == ["cpu"]
    text = run("env")
    assert f"torch         {torch.__version__}" in text
    assert "SYSDAG_BACKEND: not set" in text


def test_torchs_version_names_its_build_where_the_metadata_do_not(machine, monkeypatch):
    machine()
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.11.0")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert environment()["versions"]["torch"] == "2.11.0+cu130"


@pytest.mark.skipif(not HAS_EXTENSION, reason="the extension is not built")
def test_the_extension_serves_every_op_on_the_cpu(machine):
    machine()
    found = environment()
    assert list(found["ops"]) == OPS
    for served in found["ops"].values():
        assert served == {"here": ["cpp", "reference"], "chosen": {"cpu": "cpp"}, "errors": {}}
    assert found["absent"]["triton"] == "torch finds no GPU"
    assert "token_logprob      cpp on cpu (here: cpp, reference)" in run("env")


def test_without_the_extension_plain_torch_serves(machine):
    machine(extension=False)
    found = environment()
    for served in found["ops"].values():
        assert served == {"here": ["reference"], "chosen": {"cpu": "reference"}, "errors": {}}
    missing = "the extension sysdag._C is not built (make build)"
    assert found["absent"] == {"cpp": missing, "triton": "torch finds no GPU", "cuda": missing}
    text = run("env")
    assert f"no cpp backend: {missing}" in text
    assert "linear_logprob     reference on cpu (here: reference)" in text


def test_without_triton(machine, monkeypatch):
    machine(extension=False)
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: None)
    assert environment()["absent"]["triton"] == "triton is not installed"


def test_tritons_interpreter_is_here_but_chosen_only_where_it_is_forced(machine, monkeypatch):
    machine(extension=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    served = environment()["ops"]["token_logprob"]
    assert served == {"here": ["triton", "reference"], "chosen": {"cpu": "reference"}, "errors": {}}
    monkeypatch.setenv("SYSDAG_BACKEND", "triton")
    assert environment()["ops"]["token_logprob"]["chosen"] == {"cpu": "triton"}


def test_a_gpu_is_served_by_triton(machine, monkeypatch):
    class Properties:
        name, major, minor, total_memory = "A GPU", 9, 0, 140 * 2**30

    machine(extension=False, gpu=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    found = environment()
    assert found["devices"]["cuda:1"] == "A GPU, sm_90, 140 GiB"
    assert "triton" not in found["absent"]
    for served in found["ops"].values():
        assert served["chosen"] == {"cpu": "reference", "cuda": "triton"}


def test_losses_that_no_kernel_serves_are_told(machine):
    machine(extension=False)
    found = environment()["losses"]
    assert found["kernels"] == ["sigmoid", "ipo", "hinge", "robust"]
    assert sorted([*found["kernels"], *found["plain"]]) == sorted(LOSSES)
    assert "serves sigmoid, ipo, hinge, robust; in plain torch everywhere: sft, exo_pair" in run("env")


def test_a_forced_backend(machine, monkeypatch):
    machine(extension=False)
    monkeypatch.setenv("SYSDAG_BACKEND", "reference")
    found = environment()
    assert found["forced_backend"] == "reference"
    assert found["ops"]["preference_loss"]["chosen"] == {"cpu": "reference"}
    assert "SYSDAG_BACKEND: reference" in run("env")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpp", "token_logprob: backend 'cpp' cannot serve tensors on cpu: the extension sysdag._C is not built"),
        ("cude", "Unknown backend 'cude'; the backends are ['reference', 'cpp', 'triton', 'cuda']"),
    ],
)
def test_a_forced_backend_that_cannot_serve_is_reported(machine, monkeypatch, name, message):
    machine(extension=False)
    monkeypatch.setenv("SYSDAG_BACKEND", name)
    served = environment()["ops"]["token_logprob"]
    assert served["chosen"] == {}
    assert message in served["errors"]["cpu"]
    assert message in run("env")


def calls():
    """Each op on fp32 tensors."""
    f = lambda *shape: torch.rand(*shape)
    ids = torch.tensor([0, 1])
    return {
        "linear_logprob": (f(2, 4), f(5, 4), ids, ids),
        "token_logprob": (f(2, 5), ids),
        "preference_loss": (f(4), f(4), torch.tensor([0, 1, 2, 3, 4]), 0.1),
        "diverse_beam_step": (f(1, 2, 1, 8), f(1, 2, 1), 1.0),
        "diffusion_error": (f(2, 3), f(2, 3), f(2, 3)),
    }


@pytest.mark.parametrize("op", OPS)
def test_the_listed_backends_are_those_that_the_op_asks_for(op, monkeypatch):
    asked = []

    def resolve(name, device, preference):
        asked.append((name, tuple(preference)))
        return "reference"

    monkeypatch.setattr(importlib.import_module(f"sysdag.ops.{op}"), "resolve", resolve)
    getattr(sysdag.ops, op)(*calls()[op])
    assert set(asked) == {(op, _dispatch.IMPLEMENTATIONS[op])}


def test_every_op_is_listed():
    assert list(_dispatch.IMPLEMENTATIONS) == OPS
    assert set(OPS) == {name for name in sysdag.ops.__all__ if name not in ("BackendError", "resolve", "use_backend")}


def test_env_stays_a_subcommand_and_the_entry_point_is_the_app():
    assert "env" in run("--help")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert importlib.metadata.EntryPoint("sysdag", scripts["sysdag"], "console_scripts").load() is app


def options_of(command):
    yield from (parameter for parameter in command.params if parameter.param_type_name == "option")
    for each in getattr(command, "commands", {}).values():
        yield from options_of(each)


def test_an_options_name_is_in_small_letters_with_every_typer():
    """0.27 takes over the capitals of a metavar that is the option's name."""
    found = list(options_of(typer.main.get_command(app)))
    assert len(found) > 50
    for option in found:
        assert all(name == name.lower() for name in option.opts)
        assert (option.metavar or "").replace("_", "-").lower() not in {name.lstrip("-") for name in option.opts}


def test_help_needs_no_torch():
    code = "import sys, sysdag.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_version_is_printed():
    import sysdag

    assert run("--version") == f"sysdag {sysdag.__version__}\n"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["tran"], "train"),
        (["plan", "system.py", "--lenghts", "1"], "--lengths"),
        (["sample", "s.py:x", "in.jsonl", "--ouput", "o.jsonl"], "--output"),
        (["train", "s.py:x", "pairs.jsonl", "--learning-rte", "1"], "--learning-rate"),
        (["train", "s.py:x", "pairs.jsonl", "--eval-datset", "x"], "--eval-dataset"),
    ],
)
def test_what_is_almost_an_option_or_a_command_is_told_with_the_one_that_is_meant(given, meant):
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert re.search(rf"(?<![\w-]){meant}(?![\w-])", result.output), result.output


def test_the_options_of_a_training_are_listed_with_hyphens():
    result = CliRunner().invoke(app, ["train", "--help"])
    flags = re.findall(r"^  (--[\w-]+)", result.output, re.MULTILINE)
    assert len(flags) > 100
    assert {"--learning-rate", "--eval-dataset", "--dry-run", "--loss-type"} <= set(flags)
    assert [flag for flag in flags if "_" in flag] == []
