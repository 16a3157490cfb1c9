"""What a training of a system with switches needs in memory: the largest branches, or the stated ones."""

import pytest
import torch

pytest.importorskip("peft")
from test_switch_models import mixture, outline_prompt, question, solve_prompt, tell_prompt

from sysdag import Edge, PlanError, System, node
from sysdag.components import Categorical
from sysdag.components.memory import SavedBytes
from sysdag.data.encoding import encode_pairs
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, ObjectiveOptions

LETTERS = 15
LENGTHS = {
    "solve": (len(solve_prompt("a" * 60)), LETTERS + 1),
    "outline": (len(outline_prompt("a" * 60)), LETTERS + 1),
    "tell": (len(tell_prompt("a" * 60, "o" * LETTERS)), LETTERS + 1),
}


def features(question):
    return [float(len(question))] * 8


def routed():
    return mixture(node(Categorical(["math", "talk"], 8), name="route")(features))


def row(letter, route):
    between = {"route": route}
    sides = {side: {**between, **({"outline": other * LETTERS} if route == "talk" else {})}
             for side, other in zip(("chosen", "rejected"), {"a": "on", "b": "pq"}[letter], strict=True)}  # fmt: skip
    return {
        "question": letter * 60, "chosen": "y" * LETTERS, "rejected": "z" * LETTERS,
        "chosen_intermediates": sides["chosen"], "rejected_intermediates": sides["rejected"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("routes", "shares"),
    [
        (["math", "math"], {"solve": 1.0, "outline": 0.0, "tell": 0.0}),
        (["talk", "math"], {"solve": 0.5, "outline": 0.5, "tell": 0.5}),
    ],
)
def test_graphs_of_one_pass_are_within_15_percent_of_what_a_step_saves(routes, shares):
    plan = routed().compile()
    model = SystemModel(plan, ObjectiveOptions(), engine=EngineOptions(engine="one_pass"))
    pairs = encode_pairs(plan, [row(letter, route) for letter, route in zip("ab", routes, strict=True)], "direct")
    saved = SavedBytes()
    with saved, torch.enable_grad():
        model(pairs)
    told = plan.estimate(LENGTHS, engine="one_pass", pairs=2, shares=shares, device="cpu")
    assert sum(told.graphs.values()) == pytest.approx(saved.total, rel=0.15)


def test_where_nothing_is_said_the_largest_branch_counts():
    """Talking, with two language models: what they need in a system that has nothing else."""
    switched = routed().compile()
    chain = System.from_parts(
        [question],
        [switched.system[name] for name in ("outline", "tell")],
        [Edge("question", "outline", "question"), Edge("question", "tell", "question"),
         Edge("outline", "tell", "outline")],
        ["tell"],
    ).compile()  # fmt: skip
    lengths = {name: LENGTHS[name] for name in ("outline", "tell")}
    alone = chain.estimate(lengths, engine="one_pass", pairs=2, device="cpu")
    told = switched.estimate(LENGTHS, engine="one_pass", pairs=2, device="cpu")
    assert {name: told.graphs[name] for name in lengths} == alone.graphs
    assert told.graphs["solve"] == 0


def test_branches_are_not_there_at_once_unless_it_is_said():
    plan = routed().compile()
    told = plan.estimate(LENGTHS, engine="one_pass", pairs=4, device="cpu")
    assert told.graphs["solve"] == 0
    assert min(told.graphs["outline"], told.graphs["tell"], told.graphs["route"]) > 0
    both = plan.estimate(LENGTHS, engine="one_pass", pairs=4, device="cpu", shares=dict.fromkeys(LENGTHS, 1.0))
    assert both.graphs["solve"] > 0
    assert {name: both.graphs[name] for name in ("outline", "tell")} == {
        name: told.graphs[name] for name in ("outline", "tell")
    }
    two = plan.estimate(LENGTHS, engine="two_pass", pairs=4, device="cpu")
    assert two.graphs["solve"] > 0  # one after the other: the largest counts
    assert two.step < told.step
    assert told.resident == both.resident  # weights are there whichever branch is taken


def test_shares_that_are_none_are_named():
    plan = routed().compile()
    with pytest.raises(PlanError, match=r"shares\['solve'\] must be from 0 to 1"):
        plan.estimate(LENGTHS, shares={"solve": 1.5})
    with pytest.raises(PlanError, match=r"shares\['route'\] must be .* 1 for a node that always runs"):
        plan.estimate(LENGTHS, shares={"route": 0.5})
    with pytest.raises(PlanError, match="shares names 'nobody'"):
        plan.estimate(LENGTHS, shares={"nobody": 0.5})
