"""Training of systems with switches: losses and gradients against formulas over tables, written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from switched_systems import CODES, OUTLINES, REPORTS, ROUTES, SOLUTIONS, build

from sysdag.data.encoding import encode_pairs
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, ObjectiveOptions
from sysdag.objectives.strategies import Exhaustive

TABLES = {"route": ROUTES, "solve": SOLUTIONS, "outline": OUTLINES, "write": CODES, "report": REPORTS}
ENGINES = [{"engine": "one_pass"}, {"engine": "two_pass", "micro_batch_tokens": 1}, {"engine": "two_pass"}]
BETA = 0.3


class Tables:
    """The tables of the system as tensors of logits, which share no code with its components."""

    def __init__(self, system):
        self.logits = {}
        for name in (each.name for each in system.nodes if each.is_random):
            trained = system[name].component.module["logits"]
            self.logits[name] = trained.detach().clone().requires_grad_(True)

    def log_p(self, name, key, value):
        rows, values = list(TABLES[name]), list(dict.fromkeys(v for row in TABLES[name].values() for v in row))
        return self.logits[name][rows.index(key)].log_softmax(-1)[values.index(value)]

    def run(self, x, route, z, outline=None, report=None):
        found = self.log_p("route", x, route)
        if route == "math":
            found = found + self.log_p("solve", x, z)
        else:
            found = found + self.log_p("outline", x, outline) + self.log_p("write", (x, outline), z)
        return found if report is None else found + self.log_p("report", (x, z), report)

    def marginal(self, x, z):
        """log p(z|x): the paths by name, one a branch and outline."""
        paths = [self.run(x, "math", z), self.run(x, "code", z, "o"), self.run(x, "code", z, "p")]
        return torch.stack(paths).logsumexp(0)

    def marginal_report(self, x, report):
        paths = [self.run(x, "math", z, report=report) for z in "uv"]
        paths += [self.run(x, "code", z, outline, report) for z in "uv" for outline in "op"]
        return torch.stack(paths).logsumexp(0)


def nudged(system):
    torch.manual_seed(0)
    with torch.no_grad():
        for each in system.nodes:
            if each.is_random:
                logits = each.component.module["logits"]
                logits.add_(0.3 * torch.randn_like(logits))


def made(objective, rows, engine, *, behind=False, **options):
    """The model with its policy moved away from the reference, the pairs, and the tables of both."""
    system = build(behind=behind)
    plan = system.compile()
    strategy = Exhaustive() if objective == "sampling" else None
    chosen = ObjectiveOptions(objective=objective, beta=BETA, **options)
    model = SystemModel(plan, chosen, None, strategy, EngineOptions(**engine))
    reference = Tables(system)
    nudged(system)
    return model, encode_pairs(plan, rows, objective), Tables(system), reference


def check(model, pairs, policy, margins):
    expected = torch.stack([-F.logsigmoid(margin) for margin in margins]).mean()
    expected.backward()
    assert abs(float(expected.detach()) - math.log(2)) > 1e-3
    model.zero_grad()
    output = model(pairs)
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()))
    accumulate_gradients(model, output)
    for name, logits in policy.logits.items():
        got = model.plan.system[name].component.module["logits"].grad
        if logits.grad is None:
            assert got is None or not got.any(), name
        else:
            torch.testing.assert_close(got, logits.grad, rtol=1e-7, atol=1e-9)
    return output


DIRECT = [
    {"x": "a", "chosen": "u", "rejected": "v", "chosen_intermediates": {"route": "math"},
     "rejected_intermediates": {"route": "code", "outline": "p"}},
    {"x": "b", "chosen": "v", "rejected": "u", "chosen_intermediates": {"route": "code", "outline": "o", "solve": None},
     "rejected_intermediates": {"route": "math", "solve": "u"}},
    {"x": "b", "chosen": "v", "rejected": "u", "chosen_intermediates": {"route": "math", "outline": None},
     "rejected_intermediates": {"route": "math"}},
]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_direct_scores_the_branches_that_were_taken(engine):
    model, pairs, policy, reference = made("direct", DIRECT, engine)

    def margin(row):
        sides = {}
        for side in ("chosen", "rejected"):
            given = row[f"{side}_intermediates"]
            run = (row["x"], given["route"], row[side], given.get("outline"))
            sides[side] = policy.run(*run) - reference.run(*run).detach()
        return BETA * (sides["chosen"] - sides["rejected"])

    output = check(model, pairs, policy, [margin(row) for row in DIRECT])
    assert output.metrics["nodes/solve/taken"].tolist() == [0.5, 0.5, 1.0]
    assert output.metrics["nodes/write/taken"].tolist() == [0.5, 0.5, 0.0]
    assert "nodes/route/taken" not in output.metrics
    parts = [output.metrics[f"nodes/{name}/rewards/margins"] for name in ("route", "solve", "outline", "write")]
    torch.testing.assert_close(sum(parts), output.metrics["rewards/margins"])
    assert output.metrics["nodes/write/rewards/margins"][2] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_sampling_sums_over_candidates_of_all_branches(engine):
    rows = [{"x": "a", "chosen": "u", "rejected": "v"}, {"x": "b", "chosen": "u", "rejected": "v"}]
    model, pairs, policy, reference = made("sampling", rows, engine)
    margins = [
        BETA * (policy.marginal(x, z) - reference.marginal(x, z).detach())
        - BETA * (policy.marginal(x, y) - reference.marginal(x, y).detach())
        for x, z, y in (("a", "u", "v"), ("b", "u", "v"))
    ]
    output = check(model, pairs, policy, margins)
    for row, x in enumerate("ab"):  # responsibilities of the branch, mean of both sides
        of_math = [float((policy.run(x, "math", z) - policy.marginal(x, z)).exp()) for z in "uv"]
        assert float(output.metrics["nodes/solve/taken"][row]) == pytest.approx(sum(of_math) / 2)
        assert float(output.metrics["nodes/write/taken"][row]) == pytest.approx(1 - sum(of_math) / 2)
    assert output.metrics["candidates/coverage"].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("engine", ENGINES)
def test_sampling_of_what_stands_behind_a_switch(engine):
    rows = [{"x": "a", "chosen": "s", "rejected": "t"}, {"x": "b", "chosen": "t", "rejected": "s"}]
    model, pairs, policy, reference = made("sampling", rows, engine, behind=True)
    margins = []
    for row in rows:
        ratios = [
            policy.marginal_report(row["x"], row[side]) - reference.marginal_report(row["x"], row[side]).detach()
            for side in ("chosen", "rejected")
        ]
        margins.append(BETA * (ratios[0] - ratios[1]))
    check(model, pairs, policy, margins)


def test_a_branch_that_no_pair_takes_has_no_part_in_a_step():
    model, pairs, policy, reference = made("direct", DIRECT[2:], {"engine": "two_pass"})
    before = model.plan.system["write"].component.calls
    run = [("b", "math", z) for z in "vu"]
    ratios = [policy.run(*each) - reference.run(*each).detach() for each in run]
    check(model, pairs, policy, [BETA * (ratios[0] - ratios[1])])
    assert model.plan.system["write"].component.calls == before
