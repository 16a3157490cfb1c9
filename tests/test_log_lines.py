"""What a training shows of its logs: lines that fit a terminal, with everything in the record."""

import json

import pytest
from trained_systems import rows, two_llms
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sysdag import SysDPOConfig, SysDPOTrainer
from sysdag.training.log_lines import WIDTH, log_line


def trained(folder, **options):
    args = SysDPOConfig(
        output_dir=str(folder), max_steps=3, logging_steps=1, eval_strategy="steps", eval_steps=3, use_cpu=True,
        report_to=[], save_strategy="no", learning_rate=1e-3, per_device_train_batch_size=4, **options,
    )  # fmt: skip
    trainer = SysDPOTrainer(two_llms(), args, train_dataset=rows(12), eval_dataset=rows(4))
    trainer.train()
    return trainer


@pytest.mark.parametrize("has_bar", [False, True])
def test_a_log_is_a_line_and_the_record_has_all(has_bar, tmp_path, capsys, monkeypatch):
    written = []
    monkeypatch.setattr("tqdm.std.tqdm.write", staticmethod(lambda text, *args, **kwargs: written.append(text)))
    trainer = trained(tmp_path, disable_tqdm=not has_bar)
    shown = written if has_bar else capsys.readouterr().out.splitlines()
    lines = [line for line in shown if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3", "3/3", "3/3"]
    assert max(map(len, shown)) <= WIDTH == 120
    assert lines[0].split("  ")[2].startswith("loss 0.69")
    assert "margin 0" in lines[0]
    assert "  evaluation  loss " in lines[3]
    assert "train loss " in lines[4]
    record = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(record) == 5
    assert {"loss", "grad_norm", "nodes/draft/rewards/margins", "nodes/answer/grad_norm"} <= record[0].keys()
    assert record[0]["loss"] == trainer.state.log_history[0]["loss"]
    kinds = (PrinterCallback, ProgressCallback)
    assert sum(isinstance(each, kinds) for each in trainer.callback_handler.callbacks) == 1


def test_a_callback_of_the_users_own_stays(tmp_path):
    class Mine(PrinterCallback):
        pass

    args = SysDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = SysDPOTrainer(two_llms(), args, train_dataset=rows(4), callbacks=[Mine()])
    assert any(type(each) is Mine for each in trainer.callback_handler.callbacks)
    assert sum(isinstance(each, PrinterCallback) for each in trainer.callback_handler.callbacks) == 2


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"loss": 0.5, "epoch": 1.0, "learning_rate": 1e-6}, "step 7/90  epoch 1  loss 0.5  lr 1e-06"),
        ({"eval_loss": 0.25, "eval_runtime": 3.0}, "step 7/90  evaluation  loss 0.25"),
        ({"eval_all_loss": 0.25}, "step 7/90  eval_all_loss 0.25"),
        ({"mine": 3, "text": "a" * 200}, "step 7/90  mine 3"),
    ],
)
def test_what_a_line_says(logs, line):
    assert log_line(logs, 7, 90) == line


def test_a_line_ends_where_the_terminal_does():
    names = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "learning_rate")
    logs = {name: -1.2345678e-100 for name in (*names, "candidates/effective_sample_size", "train_loss")}
    assert 90 < len(log_line(logs, 10**9, 10**9)) <= WIDTH
