"""Which checkpoint a training goes on from: one of its own, never one that an earlier training left in the folder."""

import json

import pytest
import torch
from judged_answers import judged, rows
from typer.testing import CliRunner

from sysdag import SerializationError, SysDPOConfig, SysDPOTrainer
from sysdag.cli import app

SYSTEM = """
from sysdag import Input, System, node
from sysdag.components import Tabular

question = Input("question")

@node(Tabular({each: {"yes": 0.5, "no": 0.5} for each in "abcde"}))
def answer(question):
    return question

system = System(question >> answer)
"""


def trainer_of(folder, **options):
    defaults = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_steps": 2,
        "max_steps": 6, "learning_rate": 0.1, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return SysDPOTrainer(judged(), SysDPOConfig(**(defaults | options)), train_dataset=rows())


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("seed", [1, 2], ids=["the same training again", "another training"])
def test_checkpoints_of_a_replaced_training_do_not_block_the_way(tmp_path, seed):
    trainer_of(tmp_path, seed=1, save_steps=3).train()
    expected = trainer_of(tmp_path / "whole", seed=seed)
    expected.train()
    trainer_of(tmp_path, seed=seed, max_steps=4).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-6"]
    resumed = trainer_of(tmp_path, seed=seed)
    resumed.train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "run.json").read_text())["resumed"][0]["step"] == 4
    logits = [trainer.system["answer"].component.module["logits"] for trainer in (resumed, expected)]
    assert torch.equal(*logits)
    again = trainer_of(tmp_path, seed=seed)  # a training that was resumed has its earlier checkpoints still
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_without_a_checkpoint_it_is_said_what_there_is(tmp_path):
    with pytest.raises(SerializationError, match="has no checkpoint of its training yet. Leave the option out"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
    trainer_of(tmp_path, save_steps=5).train()
    trainer_of(tmp_path, max_steps=1, save_strategy="no").train()
    with pytest.raises(SerializationError, match=r"\['checkpoint-5', 'checkpoint-6'\] are of an earlier one; name one"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(SerializationError, match=r"elsewhere is no checkpoint of a training; .*checkpoint-5"):
        trainer_of(tmp_path).train(resume_from_checkpoint="elsewhere")
    named = trainer_of(tmp_path)
    named.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert named.state.global_step == 6


def test_the_command_says_the_same_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judged_system.py").write_text(SYSTEM)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    base = ["train", "judged_system.py", "pairs.jsonl", "--output-dir", "out", "--use-cpu", "--report-to", "none"]
    for given in (["--resume-from-checkpoint"], ["--resume_from_checkpoint", "true"]):
        result = CliRunner().invoke(app, [*base, *given])
        assert result.exit_code == 1, result.output
        assert "has no checkpoint of its training yet" in result.output
        assert "Traceback" not in result.output
    result = CliRunner().invoke(app, [*base, "--resume-from-checkpoint", "nowhere"])
    assert result.exit_code == 1
    assert "nowhere is no checkpoint of a training" in result.output
