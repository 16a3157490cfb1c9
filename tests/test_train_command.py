"""`sysdag train`: options by flags and files, the way from data to a saved system, resumption, two processes."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import char_tokenizer, llama
from trained_systems import rows
from typer.testing import CliRunner

from sysdag import DiverseBeamSearch, Exhaustive, MonteCarlo, SysDPOConfig, SysDPOTrainer, System
from sysdag.cli import app
from sysdag.errors import OptionError
from sysdag.files.run_files import read_log, read_run
from sysdag.training.job import train
from sysdag.training.train_options import parse

MODULE = "system_of_the_train_command"
SYSTEM = """
from pathlib import Path

from sysdag import Input, System, node
from sysdag.components import CausalLM

HERE = Path(__file__).parent
question = Input("question")


@node(CausalLM(HERE / "drafter", max_new_tokens=4))
def draft(question):
    return f"q: {question} d:"


@node(CausalLM(HERE / "refiner", max_new_tokens=4))
def answer(question, draft):
    return f"q: {question} d: {draft} a:"


system = System(question >> draft, (question & draft) >> answer)
"""
BASIC = {
    "output_dir": "out", "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.05, "use_cpu": True,
    "logging_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no", "seed": 3,
}  # fmt: skip


def furnish(folder):
    """Leaves a system there, its models and preferences."""
    for name, seed in (("drafter", 0), ("refiner", 1)):
        llama(seed).save_pretrained(folder / name)
        char_tokenizer().save_pretrained(folder / name)
    (folder / f"{MODULE}.py").write_text(SYSTEM)
    for name, count in (("pairs", 16), ("held_out", 4)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a system, its models and preferences, as the working folder."""
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    forget()
    yield tmp_path
    forget()


def forget():
    """Has the system's file imported anew, with the weights on the disk."""
    sys.modules.pop(MODULE, None)
    sys.path[:] = [entry for entry in sys.path if not (Path(entry) / f"{MODULE}.py").is_file()]


def flags(**options):
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run(*arguments, code=0):
    forget()
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def weights(folder):
    system = System.from_pretrained(folder)
    return {
        f"{name}.{key}": value
        for name in ("draft", "answer")
        for key, value in system[name].component.module.state_dict().items()
    }


def same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_training_says_that_it_replaces_an_earlier_one(place):
    given = [f"{MODULE}.py:system", "pairs.jsonl", *flags(**BASIC | {"max_steps": 1})]
    told = "out holds an earlier training: its record and its system will be replaced."
    assert told not in run(*given).stdout
    assert told in run(*given).stdout


def test_a_system_is_aligned_by_a_file_of_options_and_flags_win(place):
    options = BASIC | {
        "system": f"{MODULE}.py:system", "dataset": "pairs.jsonl", "eval_dataset": "held_out.jsonl", "beta": 0.1,
        "objective": "sampling", "candidates": {"strategy": "monte_carlo", "num_candidates": 3}, "log_traces": 2,
        "save_strategy": False, "report-to": ["tensorboard"], "nodes": {"draft": {"learning_rate": 1e-2}},
    }  # fmt: skip
    (place / "config.yaml").write_text(yaml.safe_dump(options).replace("save_strategy: false", "save_strategy: no"))
    result = run(
        "--config", "config.yaml", "--beta", "0.3", "--max-steps=3", "--save_strategy", "steps", "--save_steps", "2"
    )
    record = read_run(place / "out")
    assert record["status"] == "finished"
    expected = {
        "beta": 0.3, "max_steps": 3, "save_strategy": "steps", "learning_rate": 0.05, "report_to": ["tensorboard"],
        "nodes": {"draft": {"learning_rate": 0.01}}, "use_cpu": True,
    }  # fmt: skip
    assert {name: record["config"][name] for name in expected} == expected
    assert record["candidates"] == {
        "strategy": "monte_carlo", "num_candidates": 3, "temperature": None, "top_p": None, "top_k": None,
        "distinct": True,
    }  # fmt: skip
    lines = read_log(place / "out")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert "eval_rewards/margins" in lines[-1]  # at the end, though evaluation during training is off
    assert lines[-1]["step"] == 3
    for text in (
        "level  node", "answer *", "Objective sampling", "monte_carlo(num_candidates=3, distinct=True)",
        "draft: CausalLM(", "parameters, learning rate 0.01",
        "The aligned system is in out: System.from_pretrained('out')", "out/run.json", "out/log.jsonl", "out/traces",
    ):  # fmt: skip
        assert text in result.output, text
    start = llama(0).state_dict()
    assert any(not torch.equal(start[name], weights("out")[f"draft.{name}"]) for name in start)
    assert "eval_rewards/margins" in (place / "out" / "README.md").read_text()
    assert (place / "out" / "checkpoint-2").is_dir()
    assert list((place / "out" / "runs").rglob("events*"))


def test_a_reporter_that_is_not_installed_is_told_without_a_traceback(place, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    result = run(f"{MODULE}.py:system", "pairs.jsonl", "--report-to", "wandb", "--output-dir", "out", code=2)
    assert "\nError: report_to: WandbCallback requires wandb to be installed." in f"\n{result.stderr}"


def test_a_model_that_cannot_be_loaded_is_told_with_its_node(place):
    Path("refiner/model.safetensors").write_bytes(b"cut off")
    result = run(f"{MODULE}.py:system", "pairs.jsonl", "--output-dir", "out", code=1)
    assert re.search(r"^Error: Node 'answer': the model of CausalLM\(.*refiner.*cannot be loaded", result.stderr, re.M)
    assert not Path("out").exists()


def test_a_training_on_the_cpu_says_nothing_on_standard_error(place):
    options = {name: value for name, value in BASIC.items() if name != "use_cpu"} | {
        "max_steps": 1,
        "report_to": "none",
    }
    Path("basic.yaml").write_text(yaml.safe_dump(options))
    command = [sys.executable, "-m", "sysdag.cli", "train", f"{MODULE}.py:system", "pairs.jsonl"]
    done = subprocess.run([*command, "--config", "basic.yaml"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_trains_as_the_trainer_does(place):
    run(f"{MODULE}.py:system", "pairs.jsonl", *flags(**BASIC, beta=0.2, loss_type="ipo"))
    by_command = weights("out")
    forget()
    sys.path.insert(0, str(place))
    system = __import__(MODULE).system
    args = SysDPOConfig(
        **{**BASIC, "output_dir": "other", "beta": 0.2, "loss_type": "ipo", "disable_tqdm": True, "report_to": []}
    )
    trainer = SysDPOTrainer(system, args, train_dataset=rows(16))
    trainer.train()
    trainer.save_model()
    same(by_command, weights("other"))


def test_a_training_that_was_stopped_goes_on(place, monkeypatch):
    command = [f"{MODULE}.py:system", "pairs.jsonl"]
    options = BASIC | {"save_strategy": "steps", "save_steps": 2, "logging_strategy": "no"}
    run(*command, *flags(**{**options, "output_dir": "whole"}))
    step = SysDPOTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SysDPOTrainer, "training_step", interrupted)
    result = run(*command, *flags(**options), code=130)
    last = Path("out") / "checkpoint-2"
    assert (
        f"Interrupted. {last} is complete; the same command with --resume_from_checkpoint {last} goes on"
        in result.stderr
    )
    assert read_run("out")["status"] == "failed: interrupted"
    assert not (place / "out" / "system.json").exists()
    monkeypatch.setattr(SysDPOTrainer, "training_step", step)
    for which in (str(last), "last"):
        run(*command, *flags(**options), "--resume_from_checkpoint", which)
        same(weights("out"), weights("whole"))
    assert [each["step"] for each in read_run("out")["resumed"]] == [2, 4]
    monkeypatch.setattr(SysDPOTrainer, "training_step", interrupted)
    result = run(*command, *flags(**{**BASIC, "output_dir": "new", "resume_from_checkpoint": "false"}), code=130)
    assert "There is no checkpoint in new yet" in result.stderr


def test_a_training_that_was_stopped_behind_its_last_step_takes_no_further_one(place):
    """The last step is in the middle of an epoch."""
    given = [f"{MODULE}.py:system", "pairs.jsonl", *flags(**BASIC | {"max_steps": 5, "save_strategy": "steps"})]
    run(*given)
    before = weights("out")
    run(*given, "--resume_from_checkpoint", "last")
    same(weights("out"), before)
    assert read_run("out")["resumed"][-1]["step"] == 5


def test_the_weights_of_a_folder_start_a_training_whose_reference_is_the_system(place):
    """The loss of the first step, from likelihoods that transformers gives."""
    run(f"{MODULE}.py:system", "pairs.jsonl", *flags(**BASIC | {"output_dir": "first"}))
    forget()
    job = parse([f"{MODULE}.py:system", "pairs.jsonl", *flags(**BASIC | {"max_steps": 1}),
                 "--per_device_train_batch_size", "16"])  # fmt: skip
    train(replace(job, weights=Path("first")), say=lambda _: None)
    loss = next(line["loss"] for line in read_log("out") if "loss" in line)
    sides = {side: [] for side in ("chosen", "rejected")}
    for name, prompt in (("draft", "q: {question} d:"), ("answer", "q: {question} d: {draft} a:")):
        start = llama(0 if name == "draft" else 1).eval()
        trained = type(start).from_pretrained(Path("first") / name).eval()
        tokenizer = char_tokenizer()
        for side, found in sides.items():
            ratios = []
            for row in rows(16):
                draft = row[f"{side}_intermediates"]["draft"]
                value = draft if name == "draft" else row[side]
                asked = tokenizer(prompt.format(question=row["question"], draft=draft))["input_ids"]
                said = [*tokenizer(value, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                ids = torch.tensor([[*asked, *said]])
                logs = [model(ids).logits.log_softmax(-1)[0, len(asked) - 1 : -1] for model in (trained, start)]
                of = [each.gather(1, torch.tensor(said)[:, None]).sum() for each in logs]
                ratios.append((of[0] - of[1]).item())
            found.append(ratios)
    margins = torch.tensor(sides["chosen"]).sum(0) - torch.tensor(sides["rejected"]).sum(0)
    expected = -torch.nn.functional.logsigmoid(0.1 * margins).mean().item()
    assert abs(expected - 0.6931) > 1e-3
    assert loss == pytest.approx(expected, abs=1e-4)


def test_the_columns_of_other_data_sets(place):
    rows = [
        {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score": 3},
        {"history": "r", "human_ref_A": "", "human_ref_B": "b", "labels": 1, "score": 4},
    ]
    (place / "shp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"{MODULE}.py", "shp.jsonl", "--objective", "sampling", "--dry-run", "--output_dir", "out"]
    told = run(*given, "--shape", "shp").stdout
    assert "shp.jsonl: 2 rows: 1 can be used, 1 are dropped, 0 cannot." in told
    assert "Columns that no node reads: score." in told
    assert "2 rows: 2 can be used, 0 are dropped" in run(*given, "--shape", "shp", "--empty", "keep").stdout
    assert "--shape shp makes pairs of them" in run(*given, code=1).stderr
    names = {"history": "prompt", "human_ref_A": "chosen", "human_ref_B": "rejected"}
    options = [part for old, new in names.items() for part in ("--rename", f"{old}={new}")]
    assert "Columns that no node reads: labels, score." in run(*given, *options).stdout
    (place / "train.yaml").write_text(yaml.safe_dump({"rename": names, "empty": "keep"}))
    assert "2 rows: 2 can be used" in run(*given, "--config", "train.yaml").stdout
    job = parse([*given, "--config", "train.yaml", "--rename", "history=question", "--shape", "shp"])
    assert (dict(job.rename), job.shape) == ({"history": "question"}, "shp")
    for options, message in (
        (["--shape", "shq"], "shape 'shq' is unknown; those that are known: orca_dpo_pairs, "),
        (["--rename", "history"], "--rename history: expected OLD=NEW, as question=prompt."),
        (["--empty", "no"], "empty must be 'drop' or 'keep', got 'no'"),
    ):
        assert message in run(*given, *options, code=2).stderr
    (place / "train.yaml").write_text("rename: [history]\n")
    assert (
        "train.yaml, line 1: rename: expected old and new names of columns, as {question: prompt}"
        in run(*given, "--config", "train.yaml", code=2).stderr
    )


def test_a_dry_run_checks_the_data_and_loads_no_weights(place):
    for name in ("drafter", "refiner"):
        (place / name / "model.safetensors").unlink()
    result = run(f"{MODULE}.py", "pairs.jsonl", "--objective", "sampling", "--dry-run", "--output_dir", "out")
    assert "level  node" in result.output
    assert "candidates diverse_beam_search(num_candidates=2, diversity_penalty=1.0, ngram_size=2)" in result.output
    assert not (place / "out").exists()
    (place / "pairs.jsonl").write_text('{"question": "a", "chosen": "b", "rejected": "c"}\n')
    result = run(f"{MODULE}.py", "pairs.jsonl", "--dry-run", code=1)
    assert "'draft'" in result.stderr
    assert "Traceback" not in result.output


def test_rows_that_should_not_be_trained_on_are_dropped_and_told_or_refused(place):
    bad = {**rows(1)[0], "rejected": rows(1)[0]["chosen"], "rejected_intermediates": rows(1)[0]["chosen_intermediates"]}
    with (place / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(bad) + "\n")
    command = [f"{MODULE}.py:system", "pairs.jsonl", *flags(**{**BASIC, "max_steps": 1})]
    result = run(*command)
    assert "identical" in result.output
    assert read_run("out")["data"]["train"]["pairs"] == 16
    result = run(*command, "--strict", code=1)
    assert "identical" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s:x"], "DATA is missing: sysdag train SYSTEM DATA"),
        ([], "SYSTEM is missing"),
        (["s:x", "d", "--betta", "1"], "no such option: --betta; did you mean --beta?"),
        (["s:x", "d", "--output-dirs=o"], "no such option: --output-dirs; did you mean --output-dir?"),
        (["s:x", "d", "e"], "unexpected argument 'e'"),
        (["s:x", "d", "--beta", "high"], "argument --beta: invalid float value: 'high'"),
        (["s:x", "d", "--beta", "-1"], "beta must be positive, got -1.0"),
        (["s:x", "d", "--nodes", "{answer"], "nodes must be JSON, got '{answer'"),
        (["s:x", "d", "--nodes", '{"answer": {"beta": "x"}}'], "nodes: beta of 'answer' must be"),
        (["s:x", "d", "--candidates", "beam", "--objective", "sampling"], "candidates: unknown strategy 'beam'"),
        (["s:x", "d", "--candidates", "monte_carlo"], "candidates have no use with objective direct"),
        (["s:x", "d", "--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end", "--save_steps", "3"],
         "a round multiple"),
        (["s:x", "d", "--eval_strategy", "steps"], "eval_strategy is 'steps', but there is nothing to evaluate on; "
         "give --eval-dataset"),
        (["s:x", "d", "--per-device-train-batch-size", "0"], "per_device_train_batch_size must be 1 or more, got 0."),
        (["s:x", "d", "--num-train-epochs", "-1"], "num_train_epochs must be above 0 where max_steps is not, got -1"),
        (["s:x", "d", "--learning-rate", "-1"], "learning_rate must be 0 or more, got -1.0."),
        (["s:x", "d", "--output-dir", __file__], "test_train_command.py is a file; name a folder."),
        (["--config", "nowhere.yaml"], "The configuration file nowhere.yaml cannot be read"),
    ],
)  # fmt: skip
def test_wrong_options_end_in_one_message(arguments, message):
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert len(result.stderr.splitlines()) <= 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: high\n", "c.yaml, line 1: beta: invalid float value: 'high'"),
        ("system: a:b\n\nbetta: 1\n", "c.yaml, line 3: betta: no such option; did you mean beta?"),
        ("beta: 1\nbeta: 2\n", "c.yaml, line 2: beta stands there a second time; the first is in c.yaml, line 1."),
        ("beta: [1, 2]\n", "c.yaml, line 1: beta: expected a single value, got a list."),
        ("output_dir: {a: 1}\n", "c.yaml, line 1: output_dir: expected a single value, got a mapping."),
        ("nodes: [1]\n", "c.yaml, line 1: nodes: expected a single value or a mapping, got a list."),
        ("beta: null\n", "c.yaml, line 1: beta: must have a value, got null."),
        ("\noptim: sgdd\n", "c.yaml, line 2: optim: invalid choice: 'sgdd'"),
        ("use_cpu: maybe\n", "c.yaml, line 1: use_cpu: Truthy value expected"),
        ("strict: 3\n", "c.yaml, line 1: strict: expected true or false, got '3'."),
        ("dataset: [a]\n", "c.yaml, line 1: dataset: expected a text"),
        ("x: {a: 1}\n? [a]\n: b\n", "c.yaml, line 2: a key must be the name of an option."),
        ("objective: sampling\ncandidates: {strategy: monte_carlo, num_candidate: 3}\n",
         "c.yaml, line 2: candidates: monte_carlo has no option 'num_candidate' (did you mean 'num_candidates'?)"),
        ("objective: sampling\ncandidates: {strategy: monte_carlo, num_candidates: four}\n",
         "c.yaml, line 2: candidates: num_candidates of monte_carlo must be an integer, got 'four'."),
        ("- 1\n", "c.yaml must be a mapping of options to values, got a sequence."),
        ("beta: 1\na: [\n", "c.yaml, line 3: not YAML: expected the node content, but found '<stream end>'."),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_shown_with_its_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text.replace("x: {a: 1}\n", "beta: 1\n"))
    with pytest.raises(OptionError) as caught:
        parse(["s:x", "d", "--config", "c.yaml"])
    assert message in str(caught.value)


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1).filter(lambda t: t.strip() == t)


@settings(max_examples=12, deadline=None)
@given(
    beta=st.floats(1e-6, 10), rate=st.floats(1e-9, 1), losses=st.lists(st.sampled_from(["sigmoid", "ipo"]), min_size=1),
    steps=st.integers(-1, 10**6), flag=st.booleans(), save=st.sampled_from(["no", "steps", "epoch"]), name=NAMES,
    scale=st.floats(1e-6, 10),
)  # fmt: skip
def test_a_file_and_flags_say_the_same(tmp_path_factory, beta, rate, losses, steps, flag, save, name, scale):
    options = {
        "beta": beta, "learning_rate": rate, "loss_type": losses, "max_steps": steps, "disable_dropout": flag,
        "save_strategy": save, "run_name": name, "nodes": {"answer": {"scale": scale, "trainable": flag}},
        "use_cpu": True, "output_dir": "out",
    }  # fmt: skip
    file = tmp_path_factory.mktemp("file") / "c.yaml"
    file.write_text(yaml.safe_dump({**options, "candidates": None}, allow_unicode=True))
    from_file = parse(["s:x", "d", "--config", str(file)])
    words = ["--loss_type", *losses, f"--nodes={json.dumps(options['nodes'])}"]
    words += [f"--{key}={value}" for key, value in options.items() if key not in ("loss_type", "nodes")]
    from_flags = parse(["s:x", *words, "d"])
    assert (from_flags.system, from_flags.dataset) == (from_file.system, from_file.dataset) == ("s:x", "d")
    expected = SysDPOConfig(**options).to_dict()
    assert from_file.args.to_dict() == from_flags.args.to_dict() == expected


def test_candidates_by_name_by_json_and_by_default():
    def found(*arguments):
        return parse(["s:x", "d", "--use_cpu", "--objective", "sampling", *arguments]).candidates

    assert found() == DiverseBeamSearch()
    assert found("--candidates", "exhaustive") == Exhaustive()
    text = '{"strategy": "monte_carlo", "num_candidates": 3, "temperature": 1}'
    assert found("--candidates", text) == MonteCarlo(num_candidates=3, temperature=1)


def test_the_help_lists_every_option_in_groups():
    result = CliRunner().invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    text = result.output
    own, inherited = (
        text.index("SysDPO (sysdag.SysDPOConfig):"),
        text.index("training (transformers.TrainingArguments):"),
    )
    assert text.index("--candidates") < own < inherited
    for field in fields(SysDPOConfig):
        if field.init:
            at = text.index(f"  --{field.name.replace('_', '-')}")
            belongs = field.name in ("beta", "nodes", "objective", "log_traces", "check_resume")
            assert not belongs or own < at < inherited, field.name
            assert field.metadata.get("help"), field.name
    assert "Strength of the regularisation towards the reference. (default: 0.1)" in " ".join(text.split())


def test_the_command_is_listed_and_nothing_heavy_is_imported_for_that():
    code = (
        "import sys; from sysdag.cli import app\ntry: app(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train " in ended.stdout
    assert ended.stdout.strip().endswith("False")


def test_processes_that_would_each_train_alone_are_refused(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(f"{MODULE}.py:system", "pairs.jsonl", "--output_dir", "out", code=2)
    assert "2 processes were started, but each of them would train on all data by itself" in result.stderr
    assert not (place / "out").exists()
