"""Diagnoses of the run as such: numbers that are not finite, spikes of the gradient, too little to judge by."""

from __future__ import annotations

import numpy

from sysdag.reporting import formats
from sysdag.reporting.diagnosis import Diagnosis, Facts
from sysdag.reporting.formats import number
from sysdag.reporting.history import EMPTY, History

SPIKE = 10.0
"""A gradient norm is a spike above this many times the median of those before it."""
SPIKE_WINDOW = 20
"""of which so many count,"""
SPIKE_LEAST = 10
"""and at least so many are needed."""
SHORTEST = 10
"""Fewer logs of the training loss than this are too few for a verdict."""


def not_finite(history: History, facts: Facts) -> Diagnosis | None:
    """Any metric that was nan or infinite at any step."""
    found: dict[str, list[int]] = {}
    for split, metrics in {"": history.train, **history.evaluations}.items():
        for name, series in metrics.items():
            bad = [step for step, value in zip(series.steps, series.values, strict=True) if not numpy.isfinite(value)]
            if bad:
                found[f"{split}_{name}" if split else name] = bad
    if not found:
        return None
    all_steps = sorted({step for bad in found.values() for step in bad})
    told = "; ".join(f"{name} at {formats.steps(bad)}" for name, bad in list(found.items())[:5])
    more = f"; and {len(found) - 5} more metrics" if len(found) > 5 else ""
    return Diagnosis(
        "not_finite",
        "problem",
        "Numbers that are not finite",
        f"{told}{more}.",
        "Train in bf16 or float32 instead of fp16, lower the learning rate, add warm-up, and look at the pairs of "
        "these steps for empty or over-long values.",
        all_steps[0],
        all_steps[-1],
    )


def gradient_spikes(history: History, facts: Facts) -> Diagnosis | None:
    """Single updates whose gradient is far larger than those before.

    Fires for each logged gradient norm, of the whole and by node, above `SPIKE` times the median of the up to
    `SPIKE_WINDOW` before it, and above the median of all; the first `SPIKE_LEAST` cannot be judged.
    """
    found = []
    names = ["grad_norm", *(f"nodes/{key}/grad_norm" for key in history.components)]
    for name in names:
        series = history.train.get(name, EMPTY).finite
        values = numpy.asarray(series.values, dtype=float)
        before = _medians_before(values)
        if not len(before):
            continue
        behind = values[SPIKE_LEAST:]
        for at in numpy.flatnonzero((before > 0) & (behind > numpy.maximum(SPIKE * before, numpy.median(values)))):
            found.append((float(behind[at]), float(before[at]), series.steps[SPIKE_LEAST + at], name))
    if not found:
        return None
    value, usual, step, name = max(found, key=lambda spike: spike[0] / spike[1])
    all_steps = sorted({spike[2] for spike in found})
    clip = facts.config.get("max_grad_norm")
    told = f" Gradients are clipped at max_grad_norm={number(clip)}." if isinstance(clip, (int, float)) and clip else ""
    return Diagnosis(
        "gradient_spikes",
        "warning",
        f"Gradient spikes at {formats.steps(all_steps)}",
        f"The largest: {name} is {number(value)} at step {step}, {number(value / usual, 2)} times the median before "
        f"it, {number(usual)}.{told}",
        "Look at the pairs of these steps; clip harder (max_grad_norm), lower the learning rate, add warm-up, or use "
        "larger batches.",
        all_steps[0],
        all_steps[-1],
    )


def _medians_before(values: numpy.ndarray) -> numpy.ndarray:
    """For each value from the `SPIKE_LEAST`th on, the median of the up to `SPIKE_WINDOW` before it."""
    if len(values) <= SPIKE_LEAST:
        return numpy.empty(0)
    padded = numpy.concatenate([numpy.full(SPIKE_WINDOW - SPIKE_LEAST, numpy.nan), values[:-1]])
    return numpy.nanmedian(numpy.lib.stride_tricks.sliding_window_view(padded, SPIKE_WINDOW), axis=1)


def too_short(history: History, facts: Facts) -> Diagnosis | None:
    """Fewer than `SHORTEST` logs of the training loss: what the other diagnoses do not say means nothing."""
    losses = history.train.get("loss", EMPTY)
    if len(losses) >= SHORTEST:
        return None
    return Diagnosis(
        "too_short",
        "note",
        "Too short a log for a verdict",
        f"There are {len(losses)} logs of the training loss up to step {history.last_step}, and "
        f"{len(history.evaluation.get('loss', EMPTY))} evaluations; at least {SHORTEST} and 6 are needed to judge.",
        "Log and evaluate more often (logging_steps, eval_steps), or train longer.",
        losses.steps[0] if len(losses) else 0,
        history.last_step,
    )
