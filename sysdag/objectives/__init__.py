"""What is optimised: candidates for what is unseen, comparisons of runs, and losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.objectives.candidate_sums import (
        candidate_log_sum,
        certificate,
        effective_sample_size,
        responsibilities,
    )
    from sysdag.objectives.candidates import Candidates, CandidateStrategy, distinct_ngrams
    from sysdag.objectives.losses import (
        PairScores,
        aot_loss,
        aot_unpaired_loss,
        apo_down_loss,
        apo_zero_loss,
        bco_pair_loss,
        cpo_loss,
        discopop_loss,
        exo_pair_loss,
        hinge_loss,
        ipo_loss,
        nca_pair_loss,
        pair_losses,
        preference_loss,
        robust_loss,
        sft_loss,
        sigmoid_loss,
        sigmoid_norm_loss,
        simpo_loss,
        sppo_hard_loss,
    )
    from sysdag.objectives.options import EngineOptions, NodeOptions, ObjectiveOptions, ReferenceOptions
    from sysdag.objectives.own_losses import register_loss
    from sysdag.objectives.strategies import DiverseBeamSearch, Exhaustive, ImportanceSampling, MonteCarlo
    from sysdag.objectives.unpaired_losses import RunScores, apo_zero_unpaired_loss, bco_loss, kto_loss, run_losses

__all__ = [
    "CandidateStrategy",
    "Candidates",
    "DiverseBeamSearch",
    "EngineOptions",
    "Exhaustive",
    "ImportanceSampling",
    "MonteCarlo",
    "NodeOptions",
    "ObjectiveOptions",
    "PairScores",
    "ReferenceOptions",
    "RunScores",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "bco_loss",
    "bco_pair_loss",
    "candidate_log_sum",
    "certificate",
    "cpo_loss",
    "discopop_loss",
    "distinct_ngrams",
    "effective_sample_size",
    "exo_pair_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "nca_pair_loss",
    "pair_losses",
    "preference_loss",
    "register_loss",
    "responsibilities",
    "robust_loss",
    "run_losses",
    "sft_loss",
    "sigmoid_loss",
    "sigmoid_norm_loss",
    "simpo_loss",
    "sppo_hard_loss",
]
__getattr__ = exports(
    __name__,
    {
        "candidate_sums": [
            "candidate_log_sum",
            "certificate",
            "effective_sample_size",
            "responsibilities",
        ],
        "candidates": ["CandidateStrategy", "Candidates", "distinct_ngrams"],
        "losses": [
            "PairScores",
            "aot_loss",
            "aot_unpaired_loss",
            "apo_down_loss",
            "apo_zero_loss",
            "bco_pair_loss",
            "cpo_loss",
            "discopop_loss",
            "exo_pair_loss",
            "hinge_loss",
            "ipo_loss",
            "nca_pair_loss",
            "pair_losses",
            "preference_loss",
            "robust_loss",
            "sft_loss",
            "sigmoid_loss",
            "sigmoid_norm_loss",
            "simpo_loss",
            "sppo_hard_loss",
        ],
        "options": ["EngineOptions", "NodeOptions", "ObjectiveOptions", "ReferenceOptions"],
        "own_losses": ["register_loss"],
        "strategies": ["DiverseBeamSearch", "Exhaustive", "ImportanceSampling", "MonteCarlo"],
        "unpaired_losses": ["RunScores", "apo_zero_unpaired_loss", "bco_loss", "kto_loss", "run_losses"],
    },
)
