"""A critic loop on the real model: generator -> (critic -> generator) x n, on instructions that a program checks.

Trained as it is, with n unrolled rounds, or naively: the arrow back is dropped, so that the preferences about the
n-round system's answers are put to a graph of one round. What is deployed and measured has n rounds.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from bench.study.real import models
from bench.study.real.constrained import SIZES, Constrained
from bench.study.real.setting import SAMPLING, outcome
from sysdag import System

VERSION = 1
ROUNDS = (1, 2, 3)
WAYS = ("before", "naive", "unrolled")


def named(way: str, rounds: int) -> str:
    """A row's name."""
    return f"{way}, n = {rounds}"


METHODS = {named(way, rounds): (way, rounds) for rounds in ROUNDS for way in WAYS if (way, rounds) != ("naive", 1)}


class CriticLoop(Constrained):
    """See the module.

    Args:
        rounds: of the system that is deployed.
    """

    nodes = ("draft", "critic", "rewrite")

    def __init__(self, cache: Path, seed: int, size: Any, rounds: int) -> None:
        super().__init__(cache, seed, size)
        self.outline = models.critic_loop(rounds)
        (self.output,) = self.outline.outputs


def align(cache: Path, *, method: str, seed: int, size: str, model: str, rate: float = 1.0) -> dict[str, Any]:
    """One method on one seed; see `bench.study.real.constrained.align`.

    Args:
        method: of `METHODS`; with one round the naive graph is the unrolled one.
    """
    way, rounds = METHODS[method]
    setting = CriticLoop(cache, seed, SIZES[size], rounds)
    system = setting.system()
    if way == "before":
        return outcome(setting, system, [])
    trained = system
    if way == "naive":
        once = models.critic_loop(1)
        trained = once.with_components({node.name: system[node.name].component for node in once.nodes})
    pairs = [{name: row[name] for name in ("question", "chosen", "rejected")} for row in setting.pairs]
    curve = setting.train(
        trained, setting.nodes, rate=rate, candidates=SAMPLING["joint, Monte Carlo, k = 4"](), rows=pairs,
        validate=partial(_deployed, setting, system),
    )  # fmt: skip
    return outcome(setting, system, [curve])


def _deployed(setting: CriticLoop, system: System, trained: System) -> float:
    """What the deployed system reaches, whose components `trained` shares."""
    return setting.validated(system)
