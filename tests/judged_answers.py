"""A system whose preferences are judged by hand: what policy and reference give each answer is written down."""

import numpy

from sysdag import Input, System, node
from sysdag.components import Tabular

question = Input("question")
QUESTIONS = "abcde"
BETA = 0.3
# log-odds of "yes" by question; the reference is at 0. All but the last prefer the chosen "yes".
LOG_ODDS = numpy.array([0.2, 1.5, 0.7, 3.0, -2.0])


@node(Tabular({each: {"yes": 0.5, "no": 0.5} for each in QUESTIONS}), name="answer")
def answer_key(question):
    return question


def judged() -> System:
    component = Tabular({each: {"yes": 0.5, "no": 0.5} for each in QUESTIONS})
    return System(question >> answer_key).with_components({"answer": component})


def learn(system: System) -> None:
    """Gives the policy its log-odds, as a training would."""
    logits = system["answer"].component.module["logits"]
    for row, log_odds in enumerate(LOG_ODDS):
        logits.data[row, 0] = logits.data[row, 1] + float(log_odds)


def rows(count: int = len(QUESTIONS)) -> list[dict]:
    return [{"question": each, "chosen": "yes", "rejected": "no"} for each in QUESTIONS[:count]]


def expected(count: int = len(QUESTIONS)) -> dict[str, float]:
    """Means over the first pairs, of the formulas: margin beta (log-odds of policy - of reference), -log sigmoid."""
    margins = BETA * LOG_ODDS[:count]
    chosen = BETA * (-numpy.log1p(numpy.exp(-LOG_ODDS[:count])) - numpy.log(0.5))
    return {
        "loss": float(numpy.log1p(numpy.exp(-margins)).mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/accuracies": float((margins > 0).mean()),
        "rewards/chosen": float(chosen.mean()),
        "logps/chosen": float((chosen / BETA + numpy.log(0.5)).mean()),
    }
