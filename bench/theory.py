"""Theorem 1 and the bias of Sampling with few candidates, on a system that can be enumerated."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import measure
from sysdag import DiverseBeamSearch, ImportanceSampling, Input, MonteCarlo, System, node
from sysdag.components import Tabular
from sysdag.execution import fill
from sysdag.objectives import CandidateStrategy, candidate_log_sum
from sysdag.theory import check_alignment, enumerate_outcomes

INPUTS = {"x": ["a", "b"]}
OUTPUTS = "pqr"
STRATEGIES = {
    "diverse beam search": DiverseBeamSearch,
    "Monte Carlo": MonteCarlo,
    "importance sampling": ImportanceSampling,
}


def table(keys: Sequence, values: str, seed: int) -> Tabular:
    """A table of random probabilities, uneven as a language model's are."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(keys), len(values), generator=generator, dtype=torch.float64).mul(1.5).softmax(-1)
    return Tabular({key: dict(zip(values, row.tolist(), strict=True)) for key, row in zip(keys, rows, strict=True)})


def two_latents() -> System:
    """x -> plan -> draft -> answer with skip edges: 4 x 4 latent paths, 3 outputs."""

    @node(table("ab", "klmn", 0))
    def plan(x):
        return x

    @node(table(list(itertools.product("ab", "klmn")), "uvwy", 1))
    def draft(x, plan):
        return x, plan

    @node(table(list(itertools.product("ab", "uvwy")), OUTPUTS, 2))
    def answer(x, draft):
        return x, draft

    x = Input("x")
    return System(x >> plan, (x & plan) >> draft, (x & draft) >> answer)


def reward(inputs, values) -> float:
    """Prefers a different answer for each input, by steps of one."""
    return float((OUTPUTS.index(values["answer"]) + (inputs["x"] == "b")) % len(OUTPUTS))


def log_likelihood_error(system: System, strategy: CandidateStrategy, seed: int) -> float:
    """Mean over inputs and outputs of log p-hat(z|x) - log p(z|x), in nats, under the untrained system."""
    plan = system.compile()
    errors = []
    for x in INPUTS["x"]:
        outcomes = enumerate_outcomes(plan, {"x": x})
        joint = sum(plan.log_probs(outcomes).values())
        drawn = strategy.draw(plan, {"x": [x]}, torch.Generator().manual_seed(seed))
        for z in OUTPUTS:
            truth = joint[[value == z for value in outcomes["answer"]]].logsumexp(0)
            draws = plan.system["answer"].component.observe([z]) * len(drawn.prompt)
            terms = sum(plan.log_probs(fill(plan, drawn.trace.updated({"answer": draws}))).values())
            if drawn.log_weight is not None:
                terms = terms + torch.tensor(drawn.log_weight)
            estimate = candidate_log_sum(terms, torch.zeros(len(terms), dtype=torch.long), 1)
            errors.append((estimate[0] - truth).item())
    return statistics.fmean(errors)


def deviations(sizes: Sequence[int], repeats: int) -> list[dict[str, object]]:
    system = two_latents()
    rows = []
    exact = check_alignment(system, reward, INPUTS, objective="sampling")
    print(exact)
    rows.append(
        dict(strategy="all candidates", k=16, log_p_bias=0.0, deviation=exact.deviation, deviation_sd=0.0, repeats=1)
    )
    for name, strategy in STRATEGIES.items():
        for k in sizes:
            seeds = range(1 if strategy is DiverseBeamSearch else repeats)
            bias = statistics.fmean(log_likelihood_error(system, strategy(num_candidates=k), seed) for seed in seeds)
            found = [
                check_alignment(
                    system, reward, INPUTS, objective="sampling", candidates=strategy(num_candidates=k), seed=seed
                ).deviation
                for seed in seeds
            ]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            rows.append(
                dict(
                    strategy=name,
                    k=k,
                    log_p_bias=bias,
                    deviation=statistics.fmean(found),
                    deviation_sd=spread,
                    repeats=len(found),
                )
            )
            print(f"{name:22} k={k:3}  bias of log p {bias:+.4f} nats  reward's deviation {rows[-1]['deviation']:.4f}")
    return rows


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for name in STRATEGIES:
        found = [row for row in rows if row["strategy"] == name]
        ks = [row["k"] for row in found]
        axes[0].plot(ks, [abs(row["log_p_bias"]) for row in found], marker="o", label=name)
        axes[1].plot(ks, [row["deviation"] for row in found], marker="o", label=name)
    axes[0].set_ylabel("|bias of log p(z|x)|, nats")
    axes[1].set_ylabel("deviation of the implicit reward")
    for one in axes:
        one.set_xscale("log", base=2)
        one.set_xlabel("candidates k (of 16 paths)")
        one.grid(alpha=0.3)
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    own = {
        "--plot": {"type": Path, "default": Path("docs/bias.png"), "help": "default docs/bias.png"},
        "--sizes": {"type": int, "nargs": "+", "default": [2, 4, 8, 16, 32, 64], "help": "numbers of candidates"},
    }
    options = measure.options(__doc__, "theory", arguments, devices=["cpu"], repeats=20, own=own)
    rows = deviations(options.sizes, options.repeats)
    folder = options.csv.parent if options.csv else measure.RESULTS
    measure.write(rows, folder / "theory.csv")  # the same on every device
    plot(rows, options.plot)
    print(f"wrote {options.plot}")
