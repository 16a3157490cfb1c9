"""All diagnoses of a training, the gravest first: pure functions of the log, with their thresholds beside them."""

from __future__ import annotations

from sysdag.reporting.diagnosis import Diagnosis, Facts
from sysdag.reporting.history import History
from sysdag.reporting.node_signs import (
    low_coverage,
    nodes_that_learn_nothing,
    one_node_carries_everything,
    responsibilities_collapse,
)
from sysdag.reporting.preference_signs import (
    chosen_log_probs_fall,
    loss_does_not_move,
    loss_rises,
    over_optimisation,
    too_easy,
)
from sysdag.reporting.run_signs import gradient_spikes, not_finite, too_short

_LEVELS = ("problem", "warning", "note")
SIGNS = (
    not_finite, loss_does_not_move, loss_rises, responsibilities_collapse, over_optimisation, chosen_log_probs_fall,
    too_easy, gradient_spikes, one_node_carries_everything, low_coverage, too_short,
)  # fmt: skip


def diagnose(history: History, facts: Facts | None = None) -> list[Diagnosis]:
    """Everything that the numbers of a training say, problems before warnings before notes.

    Args:
        history: the log.
        facts: what else is known; without, nodes are taken to train and to have components of their own names.
    """
    facts = facts or Facts()
    found = [diagnosis for sign in SIGNS if (diagnosis := sign(history, facts)) is not None]
    found += nodes_that_learn_nothing(history, facts)
    return sorted(found, key=lambda diagnosis: _LEVELS.index(diagnosis.level))
