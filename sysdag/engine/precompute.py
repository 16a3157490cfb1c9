"""Reference scores on file: each pair is scored by the reference once, before training, which then never runs it.

A pair is found by a hash of its content. A bound's score depends on its noise (t, eps): each pair keeps a seed, and the
policy is scored at that seed's noise in every epoch. Without the file every visit to a pair draws new noise; with it
the loss is an average over fewer draws (as many as pairs), which `num_noise_draws` of the component raises.

The file belongs to one dataset, one system and one reference. Hashes of these are stored beside the scores, and a
difference is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sysdag.components import adapter_weights, prompt_date
from sysdag.components.component import Component
from sysdag.data.preferences import Feedback
from sysdag.engine.out_of_memory import Budget
from sysdag.engine.scoring import score
from sysdag.errors import PlanError, SerializationError
from sysdag.files.atomic import replacing_file
from sysdag.graph.plan import Plan
from sysdag.objectives.candidates import CandidateStrategy
from sysdag.objectives.comparison import Comparison, Term
from sysdag.objectives.options import ObjectiveOptions
from sysdag.objectives.strategies import Exhaustive
from sysdag.saving.serialization import system_to_dict

logger = logging.getLogger(__name__)
FILE_NAME = "reference_scores.safetensors"
_DATE = "the date that prompts tell"
_LIMITS = ("max_length", "max_new_tokens")  # of a language model: where a prompt or completion is cut

Compare = Callable[[Sequence[Feedback], Sequence[torch.Generator]], Comparison]


def check(options: ObjectiveOptions, strategy: CandidateStrategy | None) -> None:
    """Raises a PlanError where the runs that the reference has to score are not known before training."""
    if options.objective == "sampling" and not isinstance(strategy, Exhaustive):
        raise PlanError(
            f"precompute_ref_log_probs: {type(strategy).__name__} draws candidates during training, and the reference "
            "has to score them then: those of a search follow the policy, samples are new each time. Only Exhaustive "
            "has the same candidates throughout. Use objective='direct', or leave precompute_ref_log_probs out."
        )


@dataclass(frozen=True, eq=False)
class ReferenceScores:
    """What the reference gave every pair.

    Attributes:
        fingerprint: hashes of what the scores were made from, by a name that an error shows.
        seeds: of each pair's noise, by the pair's key.
        scores: for each node and pair the scores of its rows (winner, loser; or all candidates), fp32 or fp64.
    """

    fingerprint: Mapping[str, str]
    seeds: Mapping[str, int]
    scores: Mapping[str, Mapping[str, Tensor]]

    def generators(self, pairs: Sequence[Feedback]) -> list[torch.Generator]:
        """One generator for each pair's noise, as it was seeded when the reference scored it.

        Raises:
            PlanError: for a pair that the reference has not scored.
        """
        missing = [place for place, pair in enumerate(pairs) if pair.key not in self.seeds]
        if missing:
            raise PlanError(
                f"precompute_ref_log_probs: {pairs[missing[0]].described(missing[0])} was not among the datasets when "
                "the reference scored them, and the policy may have moved since. Pass all of them to the trainer as "
                "train_dataset or eval_dataset."
            )
        return [torch.Generator().manual_seed(self.seeds[pair.key]) for pair in pairs]

    def of(self, term: Term, pairs: Sequence[Feedback]) -> Tensor:
        """The reference's score of each row of a term's trace."""
        rows: dict[int, int] = {}
        found = []
        for pair in term.pair_of:
            rows[pair] = rows.get(pair, -1) + 1
            found.append(self.scores[term.name][pairs[pair].key][rows[pair]])
        return torch.stack(found)

    def save(self, file: Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        keys = list(self.seeds)
        tensors = {
            "keys": torch.tensor([list(bytes.fromhex(key)) for key in keys], dtype=torch.uint8),
            "seeds": torch.tensor([self.seeds[key] for key in keys]),
        }
        for name, by_pair in self.scores.items():
            tensors[f"counts/{name}"] = torch.tensor([len(by_pair[key]) for key in keys])
            tensors[f"scores/{name}"] = torch.cat([by_pair[key] for key in keys])
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as unfinished:
            save_file(tensors, unfinished, metadata={"fingerprint": json.dumps(dict(self.fingerprint))})

    @classmethod
    def load(cls, file: Path) -> ReferenceScores:
        """What `save` wrote.

        Raises:
            SerializationError: for a file that is none of these.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                fingerprint = json.loads((opened.metadata() or {})["fingerprint"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise SerializationError(f"{file} holds no reference scores ({error}); delete it.") from error
        keys = [bytes(row).hex() for row in tensors["keys"].tolist()]
        scores = {
            name.removeprefix("counts/"): dict(
                zip(keys, tensors[f"scores/{name.removeprefix('counts/')}"].split(counts.tolist()), strict=True)
            )
            for name, counts in tensors.items()
            if name.startswith("counts/")
        }
        return cls(fingerprint, dict(zip(keys, tensors["seeds"].tolist(), strict=True)), scores)

    def check(self, expected: Mapping[str, str], file: Path) -> None:
        """Raises a SerializationError that names what differs from what the scores are wanted for."""
        different = [n for n in {**expected, **self.fingerprint} if expected.get(n) != self.fingerprint.get(n)]
        if different:
            before = self.fingerprint.get(_DATE)
            keep = f", or set {prompt_date.VARIABLE}={before}" if before and _DATE in different else ""
            raise SerializationError(
                f"{file} holds reference scores that were made from something else: {', '.join(different)} differ. "
                f"Delete the file to compute them anew, or choose another output_dir{keep}."
            )


@torch.no_grad()
def compute(
    plan: Plan,
    compare: Compare,
    pairs: Sequence[Feedback],
    fingerprint: Mapping[str, str],
    budget: Budget,
    batch_size: int = 16,
) -> ReferenceScores:
    """Scores each distinct pair once.

    Args:
        plan: the system with the references as its components, in eval mode.
        compare: what a batch asks to be scored.
        fingerprint: see `fingerprint`.
        budget: of the micro-batches.
        batch_size: pairs that are compared at once.

    Raises:
        TrainingError: if a score is not finite, naming the node and the pair.
    """
    distinct = list({pair.key: pair for pair in pairs}.values())
    logger.info("The reference scores %d pairs, once.", len(distinct))
    seeds = {pair.key: int(pair.key[:15], 16) for pair in distinct}
    made = ReferenceScores(fingerprint, seeds, {})
    scores: dict[str, dict[str, Tensor]] = {}
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]
        terms = compare(batch, made.generators(batch)).terms
        found = score(plan, terms, lambda component: None, budget).policy
        for term in terms:
            of_pair: dict[str, list[int]] = {}
            for row, pair in enumerate(term.pair_of):
                of_pair.setdefault(batch[pair].key, []).append(row)
            values = found[term.name]
            scores.setdefault(term.name, {}).update({key: values[rows] for key, rows in of_pair.items()})
    return ReferenceScores(fingerprint, seeds, scores)


def fingerprint(
    plan: Plan, pairs: Iterable[Feedback], references: Mapping[str, Component], options: ObjectiveOptions
) -> dict[str, str]:
    """What reference scores depend on, hashed: the pairs, the nodes with their options, the references' weights."""
    saved = system_to_dict(plan.system)
    found = {"the pairs": _hash(sorted({pair.key for pair in pairs})), "the edges": _hash(saved["edges"])}
    if "switches" in saved:
        found["the switches"] = _hash(saved["switches"])
    found["the objective"] = options.objective
    if options.ld_alpha is not None:
        found["ld_alpha"] = str(options.ld_alpha)
    for row, n in zip(saved["nodes"], plan.system.nodes, strict=True):
        found[f"node {n.name!r}"] = _hash([row, _options(n.component)])
    if any(getattr(n.component, "told_time", ()) for n in plan.system.nodes):
        found[_DATE] = prompt_date.moment().date().isoformat()
    return found | {f"the weights of {key!r}": weights_hash(reference) for key, reference in references.items()}


def _options(component: Any) -> dict[str, Any]:
    if component is None:
        return {}
    shown = {n: v for n, v in vars(component).items() if not n.startswith("_")}
    shown |= {name: getattr(component, name, None) for name in _LIMITS}
    scalars = {name: value for name, value in shown.items() if isinstance(value, (str, int, float))}
    return {**scalars, "reading": component.reading()}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def weights_hash(component: Component) -> str:
    """SHA-256 of what a component's scores depend on: its tensors, and the config of its adapter.

    Another component's adapters are left out.
    """
    weights: dict[str, Tensor] = dict(component.own_parameters())
    digest = hashlib.sha256()
    if component.module is not None:
        beside = adapter_weights.fingerprint(component.module, weights.values())
        digest.update(str(beside.pop("config", "")).encode())
        weights |= {f"beside.{name}": tensor for name, tensor in beside.items()}
        weights |= {f"base.{name}": tensor for name, tensor in adapter_weights.base_state(component.module).items()}
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
