"""What is made of a step's scores is made on the host, wherever the models are, and what need not be held is let go."""

import gc
import weakref

import pytest
import torch
from test_engine import ROWS
from test_router_loss import made
from test_two_pass import make
from tiny import char_tokenizer, llama

from sysdag import Input, System, node
from sysdag.components import CausalLM
from sysdag.data.encoding import encode_pairs
from sysdag.engine import zero_points
from sysdag.engine.scored import MicroBatchScores, Scored, on_the_host
from sysdag.engine.scoring import score
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, ObjectiveOptions


@pytest.mark.parametrize("case", ["direct, two losses", "sampling", "sampling, tempered"])
def test_what_is_made_of_scores_is_on_the_cpu_whatever_the_default_device(case):
    model, pairs = make(case, engine="two_pass")
    comparison = model.compare(pairs, None, None)
    with torch.no_grad():
        scored = score(model.plan, comparison.terms, model.reference_of, model.budget)
    expected, metrics = comparison.combine(scored.policy, scored.reference)
    with torch.device("meta"):
        found, others = comparison.combine(scored.policy, scored.reference)
    assert torch.equal(found.chosen_rewards, expected.chosen_rewards)
    assert {name: values.tolist() for name, values in others.items()} == {
        name: values.tolist() for name, values in metrics.items()
    }


def test_scores_keep_their_dtypes_and_those_of_one_tensor_come_once():
    policy, other = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.bfloat16)
    given = [
        MicroBatchScores(None, None, None, None, policy, policy, (0.5, torch.tensor(2.0)), None),
        MicroBatchScores(None, None, None, None, other, None, None, other + 1),
    ]
    first, second = on_the_host(given)
    assert first.reference is first.policy
    assert torch.equal(first.policy, policy)
    assert (first.auxiliary[0], float(first.auxiliary[1])) == (0.5, 2.0)
    assert torch.equal(second.policy, other)
    assert torch.equal(second.typicality, other + 1)
    assert torch.equal(second.reference_or_zeros(), torch.zeros_like(other))


def test_a_loss_lies_where_something_trains_also_where_no_run_was_scored():
    model, _ = make("direct")
    assert model.device_of(Scored()) == torch.device("cpu")
    assert model.device_of(Scored(device=torch.device("meta"))) == torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_processes_add_up_rewards_in_one_dtype(dtype, monkeypatch):
    """Whatever dtypes the nodes have that the runs of each took."""
    seen = []
    monkeypatch.setattr(zero_points, "added_up", lambda sums, device: seen.append(sums.dtype) or sums)
    total, count = zero_points._over_processes(torch.tensor([1.5, 2.5], dtype=dtype), torch.device("cpu"))
    assert seen == [torch.float64]
    assert (float(total), float(count), total.dtype) == (4.0, 2.0, dtype)


class Box:
    """As long as it lives, the graph does that holds it."""


def watched(component):
    """A list of weak references to something in every graph that goes through the component's embeddings."""
    boxes = []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            ctx.box = Box()
            boxes.append(weakref.ref(ctx.box))
            return values.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    component.module.get_input_embeddings().register_forward_hook(
        lambda module, given, found: Marked.apply(found) if found.requires_grad else found
    )
    return boxes


@pytest.mark.parametrize("build", [llama, lambda seed: made("mixtral")], ids=["dense", "experts"])
def test_graphs_that_are_dropped_when_memory_runs_out_are_gone(build, monkeypatch):
    """Of the first node, when it runs out in the second one's first pass, before the second one is tried again."""
    question = Input("question")

    @node(CausalLM(build(0), char_tokenizer(), max_new_tokens=4))
    def draft(question):
        return f"q: {question} d:"

    @node(CausalLM(build(1), char_tokenizer(), max_new_tokens=4))
    def answer(question, draft):
        return f"{question} {draft} a:"

    plan = System(question >> draft, (question & draft) >> answer).compile()
    model = SystemModel(plan, ObjectiveOptions(beta=0.3), None, None, EngineOptions(engine="one_pass"))
    boxes, alive = watched(model.components["draft"]), []
    plain = CausalLM.score

    def limited(self, *arguments):
        if self is model.components["answer"] and self is not model.references["answer"]:
            gc.collect()
            alive.append(sum(each() is not None for each in boxes))
            if len(alive) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, *arguments)

    monkeypatch.setattr(CausalLM, "score", limited)
    model(encode_pairs(plan, ROWS, "direct"))
    assert alive[:2] == [1, 0]
