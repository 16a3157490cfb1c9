"""All that is known of a plan before anything runs: its table, branches, models, and what each objective needs.

As text for people (`to_text`) and as JSON-ready data for programs (`to_dict`); no weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from sysdag.errors import PlanError, shown
from sysdag.graph.plan import Objective, Plan
from sysdag.graph.switches import Case

FORMAT_VERSION = 1


def objections(plan: Plan) -> dict[Objective, str | None]:
    """For each objective why it cannot align the system, or None if it can."""
    found: dict[Objective, str | None] = {}
    for objective in get_args(Objective):
        try:
            plan.check(objective)
            found[objective] = None
        except PlanError as error:
            found[objective] = str(error)
    return found


def to_text(plan: Plan) -> str:
    """The plan's table, and below it its branches, the models that several nodes share, and the objectives."""
    lines = [str(plan), "", "branches: " + " | ".join(" >> ".join(branch) for branch in plan.branches)]
    for number, names in enumerate(plan.models):
        if len(names) > 1:
            lines.append(f"model {number} is shared by {', '.join(names)}")
    for name in plan.order:
        if (grammar := _grammar(plan, name)) is not None:
            lines.append(f"{name} writes texts of the grammar {shown(grammar, 200)}")
    for objective, objection in objections(plan).items():
        if objection is not None:
            lines.append(f"{objective}: no. {objection}")
            continue
        latents = ", ".join(plan.latents(objective)) or "none"
        lines.append(f"{objective}: yes. Scored: {', '.join(plan.factors(objective))}; latent: {latents}")
    return "\n".join(lines)


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-ready data.

    Returns:
        `inputs` and `outputs`, names; `nodes` in topological order, each with `name`, `level`, `parents`, `runs_if`
        (the branches of switches that it is in), `component` (its repr, None for a deterministic node), `model` (an
        index of `models`), `likelihood`, `output`, `lives` (the levels that produce and last read its value) and, where
        its component has one, `grammar`; `branches` and `models`, lists of node names; `switches`, each with its
        `router` and `cases`; `objectives`, for each `serves`, `reason` (why not), `latents`, `observed` and `factors`
        (what it scores).
    """
    alive = {name: [start, end] for name, start, end in plan.lifetimes}
    model_of = {name: number for number, names in enumerate(plan.models) for name in names}
    level_of = {name: level for level, names in enumerate(plan.levels) for name in names}
    nodes = []
    for name in plan.order:
        n = plan.system[name]
        nodes.append(
            {
                "name": name,
                "level": level_of[name],
                "parents": [
                    {"name": edge.parent, "parameter": edge.parameter, "each": edge.each}
                    for edge in plan.arguments(name)
                ],
                "runs_if": [
                    {"router": made.router, "switch": made.name, "is": made.title(places)}
                    for made, places in plan.switches_over(name)
                ],
                "component": repr(n.component) if n.is_random else None,
                "model": model_of.get(name),
                "likelihood": n.likelihood,
                "output": name in plan.system.outputs,
                "lives": alive[name],
                **({} if (grammar := _grammar(plan, name)) is None else {"grammar": grammar}),
            }
        )
    return {
        "format_version": FORMAT_VERSION,
        "inputs": [given.name for given in plan.system.inputs],
        "outputs": list(plan.system.outputs),
        "nodes": nodes,
        "branches": [list(branch) for branch in plan.branches],
        "switches": [
            {
                "name": made.name,
                "router": made.router,
                "cases": [{"is": made.title([at]), **_case(case)} for at, case in enumerate(made.cases)],
            }
            for made in plan.system.switches
        ],
        "models": [list(names) for names in plan.models],
        "objectives": {
            objective: _objective(plan, objective, objection) for objective, objection in objections(plan).items()
        },
    }


def _grammar(plan: Plan, name: str) -> Any:
    return getattr(plan.system[name].component, "grammar", None)


def _case(case: Case) -> dict[str, Any]:
    return {"nodes": list(case.nodes), "end": case.end}


def _objective(plan: Plan, objective: Objective, objection: str | None) -> Mapping[str, Any]:
    return {
        "serves": objection is None,
        "reason": objection,
        "latents": list(plan.latents(objective)),
        "observed": list(plan.observed(objective)),
        "factors": list(plan.factors(objective)) if objection is None else [],
    }
