"""Judging runs and comparing systems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.evaluation.endpoint import Endpoint
    from sysdag.evaluation.endpoint_judge import EndpointJudge
    from sysdag.evaluation.judge_choice import JudgeChoice
    from sysdag.evaluation.judges import ColumnScore, ComparingJudge, ScoringJudge, function_judge
    from sysdag.evaluation.labels import label_runs
    from sysdag.evaluation.measures import Evaluation, evaluate, match
    from sysdag.evaluation.ranking import choose_pairs, judge_runs
    from sysdag.evaluation.statistics import (
        Interval,
        PairedTest,
        cluster_bootstrap,
        exact_test,
        sign_test,
        wilson_interval,
        win_rate,
    )
    from sysdag.evaluation.verdicts import Verdict

__all__ = [
    "ColumnScore",
    "ComparingJudge",
    "Endpoint",
    "EndpointJudge",
    "Evaluation",
    "Interval",
    "JudgeChoice",
    "PairedTest",
    "ScoringJudge",
    "Verdict",
    "choose_pairs",
    "cluster_bootstrap",
    "evaluate",
    "exact_test",
    "function_judge",
    "judge_runs",
    "label_runs",
    "match",
    "sign_test",
    "wilson_interval",
    "win_rate",
]
__getattr__ = exports(
    __name__,
    {
        "endpoint": ["Endpoint"],
        "endpoint_judge": ["EndpointJudge"],
        "judge_choice": ["JudgeChoice"],
        "judges": ["ColumnScore", "ComparingJudge", "ScoringJudge", "function_judge"],
        "labels": ["label_runs"],
        "measures": ["Evaluation", "evaluate", "match"],
        "ranking": ["choose_pairs", "judge_runs"],
        "statistics": [
            "Interval",
            "PairedTest",
            "cluster_bootstrap",
            "exact_test",
            "sign_test",
            "wilson_interval",
            "win_rate",
        ],
        "verdicts": ["Verdict"],
    },
)
