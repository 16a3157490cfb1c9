"""A language model behind an endpoint as a judge of two runs, asked in both orders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sysdag.evaluation.endpoint import Answer, Endpoint
from sysdag.evaluation.judge_prompt import CRITERIA, TEMPLATE, check_template, message, read_verdict
from sysdag.evaluation.judges import progress, same_outputs
from sysdag.evaluation.verdicts import SAME, Verdict
from sysdag.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class EndpointJudge:
    """Shows a language model the inputs and the outputs of two runs.

    A preference counts where the model gives it in both orders (see `Verdict`). Runs whose outputs are equal are a tie
    that nobody is asked about. An answer that does not end in a verdict is counted, never guessed.

    Attributes:
        endpoint: where the model is.
        criteria: what makes a response better.
        template: see `sysdag.evaluation.judge_prompt.message`.
        where: what an error calls the template.

    Raises:
        JudgeError: for a template that cannot serve.
    """

    endpoint: Endpoint
    criteria: str = CRITERIA
    template: str = TEMPLATE
    where: str = "The template"

    def __post_init__(self) -> None:
        check_template(self.template, self.where)

    @property
    def name(self) -> str:
        return f"{self.endpoint.model} at {self.endpoint.url}"

    def compare(self, first: Trace, second: Trace, outputs: Sequence[str]) -> list[Verdict]:
        differ = [row for row, same in enumerate(same_outputs(first, second, outputs)) if not same]
        asked = self.endpoint.answers(self._questions(first, second, differ, outputs))
        answers = list(progress(asked, 2 * len(differ), "judging"))
        verdicts = [SAME] * len(first)
        for row, one, other in zip(differ, answers[::2], answers[1::2], strict=True):
            (vote, problem), (turned, other_problem) = _vote(one), _vote(other)
            votes = (vote, None if turned is None else 1 - turned)
            verdicts[row] = Verdict(votes, problems=tuple(filter(None, (problem, other_problem))))
        return verdicts

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "endpoint",
            "url": self.endpoint.url,
            "model": self.endpoint.model,
            "options": dict(self.endpoint.options),
            "criteria": self.criteria,
            "template_sha256": hashlib.sha256(self.template.encode()).hexdigest(),
        }

    def _questions(
        self, first: Trace, second: Trace, rows: Sequence[int], outputs: Sequence[str]
    ) -> Iterator[list[dict[str, Any]]]:
        shown = [{name: trace[name] for name in outputs} for trace in (first, second)]
        for row in rows:
            inputs = {name: column[row] for name, column in first.inputs.items()}
            one, other = ({name: column[row] for name, column in columns.items()} for columns in shown)
            for pair in ((one, other), (other, one)):
                yield [{"role": "user", "content": message(self.template, self.criteria, inputs, *pair)}]


def _vote(answer: Answer) -> tuple[float | None, str]:
    """The probability that the response called A is better, or None and why there is none."""
    vote = None if answer.text is None else read_verdict(answer.text)
    return vote, "" if vote is not None else answer.problem or "no line VERDICT: A, B or TIE at the end"
