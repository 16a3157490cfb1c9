"""The log of a training as series: one for each metric, apart for training and for each set of evaluation data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_KEY = re.compile(
    r"(?:(?P<split>\w+?)_)?(?P<metric>loss|learning_rate|grad_norm|kl|delta|(?:rewards|logps|nodes|candidates)/.+)"
)
_NODE = re.compile(r"nodes/(?P<node>.+)/rewards/(?:chosen|rejected|margins)")
_COMPONENT = re.compile(r"nodes/(?P<component>.+)/grad_norm")

_LARGEST = 1e300


@dataclass(frozen=True)
class Series:
    """One metric over the steps, which increase.

    Attributes:
        steps: optimizer steps.
        values: one a step; nan where what was logged is not finite.
    """

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def finite(self) -> Series:
        """The points whose value is finite."""
        points = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        return Series(tuple(step for step, _ in points), tuple(value for _, value in points))

    def at(self, step: int) -> float | None:
        """The value at a step; None where there is none."""
        return self.values[self.steps.index(step)] if step in self.steps else None


EMPTY = Series()


@dataclass(frozen=True)
class History:
    """What a training logged.

    Attributes:
        train: series by metric.
        evaluations: series by metric, by the prefix of their keys in the log (`eval`, or `eval_<name>` for each of
            several evaluation sets), in order of first appearance.
    """

    train: Mapping[str, Series]
    evaluations: Mapping[str, Mapping[str, Series]]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> History:
        """The history of the lines of a log: dicts with `step` and metrics. Of equal steps the later line counts.

        A number that is not finite may stand as null, as `log.jsonl` has it, or as itself.
        """
        points: dict[str, dict[str, dict[int, float]]] = {}
        for line in lines:
            is_update = "loss" in line
            for key, value in line.items():
                found = _KEY.fullmatch(key)
                if found is None or not (value is None or isinstance(value, (int, float))):
                    continue
                split = found["split"] or ""
                # The Trainer's closing line has `train_loss`; another prefix beside `loss` is a metric of the user's.
                if split == "train" or (split and is_update):
                    continue
                points.setdefault(split, {}).setdefault(found["metric"], {})[line["step"]] = _number(value)
        splits = {split: {name: _series(own) for name, own in metrics.items()} for split, metrics in points.items()}
        return cls(splits.pop("", {}), splits)

    @cached_property
    def evaluation(self) -> Mapping[str, Series]:
        """The evaluation that conclusions rest on: `eval`, or the first of several sets; empty without any."""
        return self.evaluations.get("eval") or next(iter(self.evaluations.values()), {})

    @cached_property
    def evaluation_name(self) -> str:
        """The prefix of its keys, or ""."""
        return "eval" if "eval" in self.evaluations else next(iter(self.evaluations), "")

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The nodes whose rewards were logged, by name."""
        return self._named(_NODE)

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The keys of the components whose gradient norms were logged."""
        return self._named(_COMPONENT)

    @cached_property
    def last_step(self) -> int:
        """The last step with a metric; 0 without any."""
        return max(
            (s.steps[-1] for split in (self.train, *self.evaluations.values()) for s in split.values()), default=0
        )

    def _named(self, pattern: re.Pattern[str]) -> tuple[str, ...]:
        names = (key for split in (self.train, *self.evaluations.values()) for key in split)
        return tuple(sorted({found[1] for name in names if (found := pattern.fullmatch(name))}))


def _number(value: float | None) -> float:
    """nan for what is not finite, or so large that sums of it would not be."""
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:  # Python's integers, and JSON's, have no end
        return math.nan
    return number if abs(number) <= _LARGEST else math.nan


def _series(points: Mapping[int, float]) -> Series:
    steps = tuple(sorted(points))
    return Series(steps, tuple(points[step] for step in steps))


def best_evaluation(history: History, config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The metric and the step of the best evaluation: by `metric_for_best_model` where it was logged, else by the loss.

    Returns:
        None where fewer than two evaluations are known.
    """
    name = str(config.get("metric_for_best_model") or "loss")
    greater = config.get("greater_is_better")
    if greater is None:
        greater = not name.endswith("loss")
    metric, series = name, history.evaluation
    for split, metrics in history.evaluations.items():
        plain = name.removeprefix(f"{split}_")
        if plain != name and plain in metrics:
            metric, series = plain, metrics
    if metric not in series:
        metric, greater = "loss", False
    finite = series.get(metric, EMPTY).finite
    if len(finite) < 2:
        return None
    best = (max if greater else min)(finite.values)
    return metric, finite.steps[finite.values.index(best)]
