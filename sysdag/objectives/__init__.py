"""What is optimised: candidates for what is unseen, comparisons of runs, and losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.objectives.candidates import (
        Candidates,
        CandidateStrategy,
        DiverseBeamSearch,
        Exhaustive,
        ImportanceSampling,
        MonteCarlo,
        distinct_ngrams,
    )
    from sysdag.objectives.losses import (
        PairScores,
        candidate_log_sum,
        certificate,
        effective_sample_size,
        hinge_loss,
        ipo_loss,
        preference_loss,
        register_loss,
        responsibilities,
        robust_loss,
        sft_loss,
        sigmoid_loss,
    )
    from sysdag.objectives.options import EngineOptions, NodeOptions, ObjectiveOptions, ReferenceOptions

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
    "candidate_log_sum",
    "certificate",
    "distinct_ngrams",
    "effective_sample_size",
    "hinge_loss",
    "ipo_loss",
    "preference_loss",
    "register_loss",
    "responsibilities",
    "robust_loss",
    "sft_loss",
    "sigmoid_loss",
]
__getattr__ = exports(
    __name__,
    {
        "candidates": [
            "CandidateStrategy",
            "Candidates",
            "DiverseBeamSearch",
            "Exhaustive",
            "ImportanceSampling",
            "MonteCarlo",
            "distinct_ngrams",
        ],
        "losses": [
            "PairScores",
            "candidate_log_sum",
            "certificate",
            "effective_sample_size",
            "hinge_loss",
            "ipo_loss",
            "preference_loss",
            "register_loss",
            "responsibilities",
            "robust_loss",
            "sft_loss",
            "sigmoid_loss",
        ],
        "options": ["EngineOptions", "NodeOptions", "ObjectiveOptions", "ReferenceOptions"],
    },
)
