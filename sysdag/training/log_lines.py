"""What a training shows of a log: a line that fits a terminal. The whole record is in `log.jsonl` of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback

WIDTH = 120
# What is shown, in this order, as long as there is room, with the names that it is shown by.
_SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "grad_norm": "grad norm",
    "learning_rate": "lr",
    "candidates/effective_sample_size": "ess",
    "groups/worst_loss": "worst group",
    "train_loss": "train loss",
    "train_runtime": "seconds",
    "train_samples_per_second": "pairs/s",
}


def log_line(logs: Mapping[str, Any], step: int, last: int) -> str:
    """One line about a log, of at most `WIDTH` columns.

    Args:
        step, last: the step that it is about, and the one that training ends with.
    """
    for prefix in ("", "eval_"):
        parts = [f"{name} {_number(logs[prefix + key])}" for key, name in _SHOWN.items() if prefix + key in logs]
        if parts:
            head = f"step {step}/{last}" + (f"  epoch {_number(logs['epoch'])}" if "epoch" in logs else "")
            return _fitting([head, *(["evaluation"] if prefix else []), *parts])
    return _fitting([f"step {step}/{last}", *(f"{key} {_number(value)}" for key, value in logs.items())])


def _fitting(parts: list[str]) -> str:
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if len(longer) > WIDTH:
            break
        line = longer
    return line or parts[0][:WIDTH]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class LinePrinter(PrinterCallback):
    """Prints a line for each log, where there is no progress bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_local_process_zero and logs:
            print(log_line(logs, state.global_step, state.max_steps), flush=True)


class LineProgress(ProgressCallback):
    """A progress bar with a line for each log above it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(log_line(logs, state.global_step, state.max_steps))


def show_lines(trainer: Any) -> None:
    """Has a trainer show lines where it would show whole logs; what else it was given stays."""
    for shown, ours in ((PrinterCallback, LinePrinter), (ProgressCallback, LineProgress)):
        for callback in [each for each in trainer.callback_handler.callbacks if type(each) is shown]:
            trainer.remove_callback(callback)
            trainer.add_callback(ours)
