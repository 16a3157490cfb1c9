"""The implicit reward of a system on given pairs, by one estimator for all methods.

beta times log p(z|x) - log q(z|x), q the untrained system. With a latent draft y both are importance sampled over the
same k drafts y ~ q: log p is estimated by logmeanexp [log p(y|x) - log q(y|x) + log p(z|x, y)], log q likewise with
weights of 1. The drafts and the scores under q are made once and shared by all cells, so that methods differ in
nothing but p.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from scipy.special import logsumexp

from bench.study.training import runs
from sysdag import System, Trace
from sysdag.execution import log_probs

SIDES = ("chosen", "rejected")
AT_ONCE = 32  # runs that are scored in one call


class ImplicitReward:
    """Of the pairs of one part.

    Args:
        rows: dataset rows: question, chosen, rejected.
        drafts: k, of an instruction; 0 for a system without a draft.
        beta: of the training.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], *, drafts: int, beta: float) -> None:
        self.rows, self.num_drafts, self.beta = list(rows), drafts, beta
        self.questions = list(dict.fromkeys(row["question"] for row in rows))

    def prepare(self, base: System, folder: Path) -> None:
        """Draws the drafts, and keeps them with the scores of the untrained system."""
        folder.mkdir()
        if self.num_drafts:
            drawn = runs(base, {"question": self.questions}, self.num_drafts, 41).only(["draft"])
            drawn.to_jsonl(folder / "drafts.jsonl")
        drafts = self._drafts(folder)
        (folder / "scores.json").write_text(json.dumps({n: v.tolist() for n, v in self._scores(base, drafts).items()}))

    def margins(self, system: System, folder: Path) -> numpy.ndarray:
        """(P,) beta times: log p - log q of the chosen answer, minus that of the rejected one.

        Args:
            folder: that `prepare` filled.
        """
        kept = {name: numpy.array(v) for name, v in json.loads((folder / "scores.json").read_text()).items()}
        own = self._scores(system, self._drafts(folder))
        weights = (own["draft"] - kept["draft"])[self._places]
        chosen, rejected = (logsumexp(weights + own[side], axis=1) - logsumexp(kept[side], axis=1) for side in SIDES)
        return self.beta * (chosen - rejected)

    @cached_property
    def _places(self) -> list[int]:
        """Of each pair, its instruction's place."""
        return [self.questions.index(row["question"]) for row in self.rows]

    def _drafts(self, folder: Path) -> Trace | None:
        return Trace.from_jsonl(folder / "drafts.jsonl") if self.num_drafts else None

    def _scores(self, system: System, drafts: Trace | None) -> dict[str, numpy.ndarray]:
        """ "draft" (Q, k), zeros without; "chosen" and "rejected" (P, k), of the answers behind each draft."""
        k = max(1, self.num_drafts)
        plan, observe = system.compile(), system["answer"].component.observe
        latent = numpy.zeros((len(self.questions), k))
        if drafts is not None:
            latent = _in_parts(plan, drafts, "draft").reshape(-1, k)
        # Both answers of a pair beside each other behind each draft: what they begin with is scored once.
        at = [place * k + draft for place in self._places for draft in range(k) for _ in SIDES]
        source = drafts if drafts is not None else Trace({"question": self.questions}, {})
        texts = [row[side] for row in self.rows for _ in range(k) for side in SIDES]
        answered = source.select(at).updated({"answer": observe(texts)})
        scores = _in_parts(plan, answered, "answer").reshape(len(self.rows), k, 2)
        return {"draft": latent, "chosen": scores[..., 0], "rejected": scores[..., 1]}


@torch.no_grad()
def _in_parts(plan: Any, trace: Trace, name: str) -> numpy.ndarray:
    """One node's log-likelihood of every run."""
    parts = [
        log_probs(plan, trace.select(range(first, min(first + AT_ONCE, len(trace)))), [name])[name].double().cpu()
        for first in range(0, len(trace), AT_ONCE)
    ]
    return torch.cat(parts).numpy()
