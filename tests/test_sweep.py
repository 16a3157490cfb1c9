"""`sysdag train --sweep`: one training for each combination, each as from a process of its own."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny import char_tokenizer, llama
from trained_systems import rows
from typer.testing import CliRunner

from sysdag.cli import app
from sysdag.errors import OptionError
from sysdag.training.sweep import combinations, sweep
from sysdag.training.train_options import parse
from sysdag.training.trainer import SysDPOTrainer

pytest.importorskip("peft")
MODULE = "system_of_a_sweep"
SYSTEM = """
from pathlib import Path

from peft import LoraConfig

from sysdag import Input, System, node
from sysdag.components import CausalLM, Categorical

HERE = Path(__file__).parent
question = Input("question")


@node(CausalLM(HERE / "drafter", max_new_tokens=4))
def draft(question):
    return f"q: {question} d:"


@node(CausalLM(HERE / "refiner", max_new_tokens=4, peft_config=LoraConfig(r=2, target_modules="all-linear")))
def answer(question, draft):
    return f"q: {question} d: {draft} a:"


system = System(question >> draft, (question & draft) >> answer)
"""
BASIC = {
    "max_steps": 4, "per_device_train_batch_size": 5, "learning_rate": 0.05, "use_cpu": True, "logging_steps": 1,
    "save_steps": 3, "report_to": "none",
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name, seed in (("drafter", 0), ("refiner", 1)):
        llama(seed).save_pretrained(tmp_path / name)
        char_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / f"{MODULE}.py").write_text(SYSTEM)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(16)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop(MODULE, None)
    yield tmp_path
    sys.modules.pop(MODULE, None)


def arguments(*more, **changes):
    options = {name: value for name, value in (BASIC | changes).items() if value is not None}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["train", f"{MODULE}.py:system", "pairs.jsonl", *flags, *more]


def run(*more, code=0, **changes):
    result = CliRunner().invoke(app, arguments(*more, **changes))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def weights(folder):
    found = {str(file.relative_to(folder)): load_file(file) for file in Path(folder).glob("*/*.safetensors")}
    return {f"{file}:{name}": tensor for file, tensors in found.items() for name, tensor in tensors.items()}


def assert_same(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    for name, tensor in ours.items():
        assert tensor.equal(theirs[name]), name


SWEEP = ("--sweep", "beta=0.05,0.3", "--sweep", "seed=0,1", "--output_dir", "out")


def test_each_combination_is_the_training_of_a_fresh_process(place):
    told = run(*SWEEP).stdout
    folders = [f"beta={beta}_seed={seed}" for beta in ("0.05", "0.3") for seed in (0, 1)]
    assert [path.name for path in sorted(place.glob("out/*/")) if path.is_dir()] == folders
    for number, folder in enumerate(folders, start=1):
        assert f"Training {number} of 4: {folder}." in told
    assert "mean of 2" in told
    assert "`sysdag report out` draws them over each other." in told
    alone = arguments(beta=0.3, seed=1, output_dir="alone")
    done = subprocess.run([sys.executable, "-m", "sysdag.cli", *alone], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same("out/beta=0.3_seed=1", "alone")
    others = [weights(f"out/{folder}") for folder in folders]
    for one, other in itertools.pairwise(others):
        assert any(not tensor.equal(other[name]) for name, tensor in one.items())


OF_BETA = ("--sweep", "beta=0.05,0.3", "--output_dir")


def test_a_sweep_that_was_stopped_goes_on(place, monkeypatch):
    run(*OF_BETA, "whole")
    step, stop_at = SysDPOTrainer.training_step, {"beta=0.05": 3, "beta=0.3": 1}

    def interrupted(self, *given, **options):
        if self.state.global_step == stop_at.get(Path(self.args.output_dir).name):
            raise KeyboardInterrupt
        return step(self, *given, **options)

    monkeypatch.setattr(SysDPOTrainer, "training_step", interrupted)
    told = run(*OF_BETA, "out", code=130).stderr
    assert "Training 1 of 2: beta=0.05 was interrupted. The same command goes on from there." in told
    del stop_at["beta=0.05"]
    run(*OF_BETA, "out", code=130)
    stop_at.clear()
    assert "Training 1 of 2: beta=0.05 is done." in run(*OF_BETA, "out").stdout
    for folder in json.loads(Path("whole/sweep.json").read_text())["runs"]:
        assert_same(f"out/{folder['folder']}", f"whole/{folder['folder']}")
    assert Path("out/sweep.json").read_bytes() == Path("whole/sweep.json").read_bytes()
    told = run(*OF_BETA, "out").stdout
    assert told.count("is done.") == 2
    told = run("--sweep", "beta=0.3,0.5", "--output_dir", "out").stdout  # other values of the same
    assert "Training 1 of 2: beta=0.3 is done." in told
    assert "Training 2 of 2: beta=0.5." in told
    told = run(*OF_BETA, "out", code=2, learning_rate=0.01).stderr
    assert "begun otherwise: of beta=0.05, learning_rate was 0.05, and is now 0.01" in told


def test_the_report_compares_the_trainings(place):
    Path("config.yaml").write_text(yaml.safe_dump({"sweep": {"loss_type": ["ipo", ["sigmoid", "sft"]]}}))
    run("--config", "config.yaml", "--output_dir", "out", "--eval_dataset", "pairs.jsonl")
    result = CliRunner().invoke(app, ["report", "out"])
    assert result.exit_code == 0, result.output
    assert "Sweep:" in result.stdout
    assert "Of the last evaluation." in result.stdout
    html = Path("out/report.html").read_text()
    for text in ("loss_type=ipo", "loss_type=sigmoid-sft", '<section id="overview">', "Settings that differ"):
        assert text in html
    found = json.loads(CliRunner().invoke(app, ["report", "out", "--json"]).stdout)
    assert [row["loss_type"] for row in found["overview"]] == ["ipo", "['sigmoid', 'sft']"]
    assert all(row["loss"] != "\N{EN DASH}" for row in found["overview"])


def test_one_trainings_switches_do_not_reach_the_next(place):
    """bf16 and determinism are set for a whole process."""
    run("--sweep", "bf16=true,false", "--output_dir", "out", max_steps=2)
    run("--bf16", "false", "--output_dir", "alone", max_steps=2)
    assert_same("out/bf16=false", "alone")
    ours, theirs = weights("out/bf16=true"), weights("alone")
    assert any(not tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_a_dry_run_checks_every_combination_and_trains_none(place):
    told = run(*SWEEP, "--dry-run").stdout
    assert told.count("beta 0.3") == 2
    assert not Path("out").exists()


def test_weights_that_are_objects_cannot_be_had_untrained_again(place):
    source = SYSTEM.replace(
        'CausalLM(HERE / "drafter", max_new_tokens=4)',
        'CausalLM(*__import__("system_parts").parts(HERE / "drafter"), max_new_tokens=4)',
    )
    Path(f"{MODULE}.py").write_text(source)
    Path("system_parts.py").write_text(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\n"
        "def parts(folder):\n"
        "    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
    )
    told = " ".join(run(*SWEEP, code=1).stderr.split())
    assert "Node 'draft': " in told
    assert "weights that it was given as an object" in told
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["betta=1,2"], "--sweep betta: no such option; did you mean beta?"),
        (["beta"], "--sweep beta: expected an option and its values, as beta=0.1,0.3."),
        (["beta="], "--sweep beta: there is no value to try."),
        (["beta=0.1,high"], "--sweep beta=high: argument --beta: invalid float value: 'high'"),
        (["beta=0.1,-1"], "--sweep beta=-1: beta must be positive, got -1.0"),
        (["objective=direct,samplin"], "Did you mean sampling?"),
        (["loss_type=sigmoid,hing"], "Did you mean hinge?"),
        (["optim=sgdd"], "--sweep optim=sgdd: argument --optim: invalid choice: 'sgdd'"),
        (["beta=0.1,0.10"], "--sweep: beta=0.1 and beta=0.10 are the same training; drop one of them."),
        (["beta=0.1", "beta=0.2"], "--sweep beta=0.2: beta is swept already; give all its values at once."),
        (["output_dir=a,b"], "--sweep output_dir: each training has a folder of its own below it."),
        (["dataset=a,b"], "--sweep dataset: trainings on other data or systems do not compare"),
        (['loss_type=["ipo"'], "not a JSON list"),
    ],
)
def test_wrong_keys_and_values_are_named_before_anything_trains(place, given, message):
    flags = [part for each in given for part in ("--sweep", each)]
    told = " ".join(run(*flags, "--output_dir", "out", code=2).stderr.split())
    assert message in told
    assert "Traceback" not in told
    assert not Path("out").exists()


def test_a_file_whose_sweep_is_no_mapping_of_lists_is_refused_with_its_line(place):
    Path("c.yaml").write_text("beta: 1\nsweep: {beta: 0.1}\n")
    told = run("--config", "c.yaml", code=2).stderr
    assert "c.yaml, line 2: sweep: expected options with lists of values, as {beta: [0.1, 0.3]}" in told


def test_a_sweep_runs_in_one_process(place, monkeypatch):
    given = arguments(*SWEEP)[1:]
    job = parse(given)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="--sweep: 2 processes were started, and a sweep runs in one"):
        sweep(given, job)


def test_folders_are_named_by_what_is_swept():
    found = combinations({"loss_type": ["losses.py:own", "losses.py/own"], "nodes": [{"draft": {"beta": 0.2}}]})
    assert [each.folder for each in found] == [
        "loss_type=losses.py-own_nodes=draft-beta-0.2",
        "loss_type=losses.py-own_nodes=draft-beta-0.2-2",
    ]
    assert found[1].options == {"loss_type": "losses.py/own", "nodes": {"draft": {"beta": 0.2}}}


def test_a_sweep_stands_for_itself_in_a_job():
    job = parse(["s:x", "d", "--sweep", "beta=0.1,0.3", "--sweep", "seed=[0, 1]"])
    assert job.sweep == {"beta": ["0.1", "0.3"], "seed": [0, 1]}
    with pytest.raises(OptionError, match="no such option: --swep; did you mean --sweep"):
        parse(["s:x", "d", "--swep", "beta=1"])
