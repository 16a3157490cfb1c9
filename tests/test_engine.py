import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from tiny import char_tokenizer, llama

from sysdag import DiverseBeamSearch, ImportanceSampling, Input, MonteCarlo, PlanError, System, TrainingError, node
from sysdag.components import CausalLM, Opaque, Tabular
from sysdag.data.encoding import encode_pairs
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, NodeOptions, ObjectiveOptions

QUESTION = Input("question")
ONE_PASS = EngineOptions(engine="one_pass")  # the loss carries the graph
ROWS = [
    {"question": "ab", "chosen": "yes", "rejected": "no", "chosen_intermediates": {"draft": "y"},
     "rejected_intermediates": {"draft": "n0"}},
    {"question": "what?", "chosen": "one", "rejected": "", "chosen_intermediates": {"draft": ""},
     "rejected_intermediates": {"draft": "a b"}},
]  # fmt: skip


def two_llms(max_new_tokens=6, **options):
    @node(CausalLM(llama(0), char_tokenizer(), max_new_tokens=max_new_tokens))
    def draft(question):
        return f"q: {question} d:"

    @node(CausalLM(llama(1), char_tokenizer(), max_new_tokens=max_new_tokens))
    def answer(question, draft):
        return f"q: {question} d: {draft} a:"

    return System(QUESTION >> draft, (QUESTION & draft) >> answer)


def nudge(system):
    """Moves the policies away from their references, which were taken before."""
    with torch.no_grad():
        for n in system.nodes:
            for parameter in n.component.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))


def text_log_prob(component, prompt, completion):
    (draw,) = component.observe([completion])
    return component.log_prob([prompt], [draw])[0]


def build(system, rows, nodes=None, candidates=None, **options):
    torch.manual_seed(0)
    plan = system.compile()
    model = SystemModel(plan, ObjectiveOptions(**options), nodes, candidates, ONE_PASS)
    nudge(system)
    return model, encode_pairs(plan, rows, options.get("objective", "direct"))


def direct_by_hand(model, weights):
    """beta_i inside one sigmoid, each side under its own parents' values: SysDPO-Direct as written."""
    losses = []
    for row in ROWS:
        margin = 0.0
        for side, sign in (("chosen", 1), ("rejected", -1)):
            x, y, z = row["question"], row[f"{side}_intermediates"]["draft"], row[side]
            for name, prompt, value in (("draft", f"q: {x} d:", y), ("answer", f"q: {x} d: {y} a:", z)):
                policy = text_log_prob(model.components[name], prompt, value)
                reference = text_log_prob(model.references[name], prompt, value)
                margin = margin + sign * weights[name] * (policy - reference)
        losses.append(-torch.nn.functional.logsigmoid(margin))
    return torch.stack(losses).mean()


def as_double(model):
    """In fp32 the formula and the engine, which computes shared prefixes once, are each 1e-5 from the truth."""
    for component in (*model.components.values(), *model.references.values()):
        component.module.double()


def gradients(loss, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        (None, {"draft": 0.3, "answer": 0.3}),
        ({"draft": NodeOptions(beta=0.05), "answer": NodeOptions(scale=3.0)}, {"draft": 0.05, "answer": 0.9}),
    ],
)
def test_direct_equals_the_formula_written_out(nodes, weights):
    model, pairs = build(two_llms(), ROWS, nodes, beta=0.3)
    as_double(model)
    output, expected = model(pairs), direct_by_hand(model, weights)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    assert output.loss.item() != pytest.approx(math.log(2), abs=1e-3)
    for got, want in zip(gradients(output.loss, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def sampling_by_hand(model, candidates, beta):
    losses = []
    for row, drafts in zip(ROWS, candidates, strict=True):
        estimates = {}
        for kind, parts in (("policy", model.components), ("reference", model.references)):
            for side in ("chosen", "rejected"):
                terms = [
                    text_log_prob(parts["draft"], f"q: {row['question']} d:", y)
                    + text_log_prob(parts["answer"], f"q: {row['question']} d: {y} a:", row[side])
                    for y in drafts
                ]
                estimates[kind, side] = torch.stack(terms).exp().sum().log()
        margin = beta * (estimates["policy", "chosen"] - estimates["reference", "chosen"]) - beta * (
            estimates["policy", "rejected"] - estimates["reference", "rejected"]
        )
        losses.append(-torch.nn.functional.logsigmoid(margin))
    return torch.stack(losses).mean()


class FixedDrafts(MonteCarlo):
    """Candidates given by hand."""

    drafts = (("y", "n0", ""), ("a", "bb"))

    def paths(self, plan, rows, latents, generator):
        from sysdag.objectives.candidates import Candidates

        prompt = tuple(p for p, drafts in enumerate(self.drafts) for _ in drafts)
        draws = plan.system["draft"].component.observe([d for drafts in self.drafts for d in drafts])
        return Candidates(rows.select(prompt).updated({"draft": draws}), prompt)


def test_sampling_equals_the_formula_written_out():
    model, pairs = build(two_llms(), ROWS, candidates=FixedDrafts(num_candidates=3), objective="sampling", beta=0.3)
    as_double(model)
    output, expected = model(pairs), sampling_by_hand(model, FixedDrafts.drafts, 0.3)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients(output.loss, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def means(output):
    """Of what a step measured, one value a pair, over the pairs."""
    assert all(values.shape == output.losses.shape for values in output.metrics.values())
    return {name: float(values.mean()) for name, values in output.metrics.items()}


def test_node_margins_add_up_to_the_margin_in_direct():
    model, pairs = build(two_llms(), ROWS, beta=0.3)
    metrics = means(model(pairs))
    total = metrics["nodes/draft/rewards/margins"] + metrics["nodes/answer/rewards/margins"]
    assert metrics["rewards/margins"] == pytest.approx(total, rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(
        metrics["rewards/chosen"] - metrics["rewards/rejected"], rel=1e-4
    )


def test_before_the_first_step_the_loss_is_ln_2_and_every_margin_0():
    for objective, candidates in (("direct", None), ("sampling", DiverseBeamSearch(num_candidates=3))):
        plan = two_llms().compile()
        model = SystemModel(plan, ObjectiveOptions(objective=objective), candidates=candidates)
        output = model(encode_pairs(plan, ROWS, objective))
        assert output.loss.item() == pytest.approx(math.log(2), abs=1e-6)
        assert all(float(ratio.abs().max()) == 0 for ratio in output.log_ratios.values())


def test_a_single_shared_candidate_would_give_the_latent_exactly_no_gradient():
    class One(FixedDrafts):
        drafts = (("y",), ("a",))

    model, pairs = build(two_llms(), ROWS, candidates=One(num_candidates=2), objective="sampling", beta=0.3)
    model(pairs).loss.backward()
    assert max(float(p.grad.abs().max()) for p in model.policies["draft"].parameters()) == pytest.approx(0, abs=1e-6)
    assert max(float(p.grad.abs().max()) for p in model.policies["answer"].parameters()) > 1e-3


def test_one_candidate_is_refused_with_its_reason():
    for strategy in (DiverseBeamSearch, MonteCarlo):
        with pytest.raises(PlanError, match=r"num_candidates=1 is refused.*cancels.*exactly zero gradient"):
            strategy(num_candidates=1)
        with pytest.raises(PlanError, match="2 or more"):
            strategy(num_candidates=0)


def test_a_frozen_node_keeps_its_weights_and_leaves_the_margin_to_the_other():
    plan = two_llms().compile()
    model = SystemModel(plan, ObjectiveOptions(), {"draft": NodeOptions(trainable=False)}, engine=ONE_PASS)
    output = model(encode_pairs(plan, ROWS, "direct"))
    output.loss.backward()
    assert not any(p.requires_grad for p in model.policies["draft"].parameters())
    assert any(p.grad is not None for p in model.policies["answer"].parameters())
    assert means(output)["nodes/draft/rewards/margins"] == 0


def test_a_node_that_one_training_froze_trains_in_the_next_but_not_what_its_user_froze():
    system = two_llms()
    plan = system.compile()
    models = {name: system[name].component.module for name in ("draft", "answer")}
    models["answer"].model.embed_tokens.requires_grad_(False)
    for frozen, trained in (("draft", "answer"), ("answer", "draft"), ("draft", "answer")):
        SystemModel(plan, ObjectiveOptions(), {frozen: NodeOptions(trainable=False)})
        assert not any(parameter.requires_grad for parameter in models[frozen].parameters())
        still = {name for name, parameter in models[trained].named_parameters() if not parameter.requires_grad}
        assert still == ({"model.embed_tokens.weight"} if trained == "answer" else set())


def test_a_score_that_is_not_finite_names_the_node_and_the_row():
    system = two_llms()
    plan = system.compile()
    model = SystemModel(plan, ObjectiveOptions())
    with torch.no_grad():
        system["answer"].component.module.lm_head.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="'answer'.*row 0.*nan.*not changed"):
        model(encode_pairs(plan, ROWS, "direct"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "both"}, "objective must be"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"loss_type": ("dpo",)}, "loss_type must name"),
        ({"loss_type": ()}, "loss_type must name"),
        ({"loss_weights": (1.0, 2.0)}, "one weight for each"),
        ({"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss_type": ("ipo",)}, "no effect on loss_type"),
    ],
)
def test_objective_options_out_of_range_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        ObjectiveOptions(**options)


def test_options_that_cannot_be_honoured_are_refused():
    plan = two_llms().compile()
    sampling = ObjectiveOptions(objective="sampling")
    with pytest.raises(PlanError, match="'drafter' is no random node"):
        SystemModel(plan, ObjectiveOptions(), {"drafter": NodeOptions()})
    with pytest.raises(PlanError, match="needs candidates"):
        SystemModel(plan, sampling)
    with pytest.raises(PlanError, match="no use for candidates"):
        SystemModel(plan, ObjectiveOptions(), candidates=MonteCarlo())
    with pytest.raises(PlanError, match="'answer' has its own beta.*one logarithm"):
        SystemModel(plan, sampling, {"answer": NodeOptions(beta=0.5)}, MonteCarlo())
    with pytest.raises(PlanError, match="nothing to align"):
        SystemModel(plan, ObjectiveOptions(), {n: NodeOptions(trainable=False) for n in ("draft", "answer")})


def test_nodes_that_share_a_component_must_agree_on_training_it():
    shared = CausalLM(llama(0), char_tokenizer())

    @node(shared)
    def draft(question):
        return question

    @node(shared)
    def answer(question, draft):
        return question + draft

    plan = System(QUESTION >> draft, (QUESTION & draft) >> answer).compile()
    with pytest.raises(PlanError, match=r"\['draft', 'answer'\] share one component, but their trainable differ"):
        SystemModel(plan, ObjectiveOptions(), {"draft": NodeOptions(trainable=False)})
    model = SystemModel(plan, ObjectiveOptions(), engine=ONE_PASS)
    assert list(model.policies) == ["answer"]
    model(encode_pairs(plan, ROWS, "direct")).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


def test_an_opaque_parent_cancels_in_direct_and_is_shared_by_candidates_in_sampling():
    calls = []

    @node(Opaque(lambda text: calls.append(text) or text.upper()))
    def facts(question):
        return question

    @node(Tabular({"A": {"p": 0.5, "q": 0.5}}))
    def draft(facts):
        return facts

    @node(Tabular({("A", "p"): {"yes": 0.9, "no": 0.1}, ("A", "q"): {"yes": 0.2, "no": 0.8}}))
    def answer(facts, draft):
        return facts, draft

    plan = System(QUESTION >> facts, facts >> draft, (facts & draft) >> answer).compile()
    steps = [{"facts": "A", "draft": "p"}, {"facts": "A", "draft": "q"}]
    rows = [{"question": "a", "chosen": "yes", "rejected": "no", "chosen_intermediates": steps[0],
             "rejected_intermediates": steps[1]}]  # fmt: skip
    direct = SystemModel(plan, ObjectiveOptions())(encode_pairs(plan, rows, "direct"))
    assert not calls
    assert "nodes/facts/rewards/margins" not in direct.metrics
    sampling = SystemModel(plan, ObjectiveOptions(objective="sampling"), candidates=DiverseBeamSearch(num_candidates=2))
    output = sampling(encode_pairs(plan, rows, "sampling"))
    assert calls == ["a"]
    assert means(output)["candidates/coverage"] == pytest.approx(1.0)
    assert means(output)["candidates/count"] == 2
    assert means(output)["logps/chosen"] == pytest.approx(math.log(0.5 * 0.9 + 0.5 * 0.2))


def sampled(model, pairs, **options):
    """The metrics of a batch under other options of the objective."""
    model.options = dataclasses.replace(model.options, **options)
    return model(pairs)


def test_a_responsibility_temperature_flattens_the_responsibilities():
    model, pairs = build(two_llms(), ROWS, candidates=FixedDrafts(num_candidates=3), objective="sampling", beta=0.3)
    sizes = [
        means(sampled(model, pairs, responsibility_temperature=t))["candidates/effective_sample_size"]
        for t in (1, 5, 1e6)
    ]
    assert sizes[0] < sizes[1] < sizes[2] == pytest.approx((3 + 2) / 2, rel=1e-4)
    metrics = means(sampled(model, pairs, responsibility_temperature=2.0))
    assert "candidates/certified_lower" not in metrics


def test_length_normalization_is_the_log_sum_of_averaged_likelihoods():
    model, pairs = build(two_llms(), ROWS[:1], candidates=FixedDrafts(num_candidates=3), objective="sampling", beta=0.3)
    model.candidates.strategy.__class__.drafts = (("y", "n0", ""),)
    try:
        output = sampled(model, pairs, candidate_length_normalization=True)
    finally:
        model.candidates.strategy.__class__.drafts = (("y", "n0", ""), ("a", "bb"))
    rewards = {}
    for side in ("chosen", "rejected"):
        sums = []
        for parts in (model.components, model.references):
            terms = []
            for y in ("y", "n0", ""):
                log_p = text_log_prob(parts["draft"], "q: ab d:", y) + text_log_prob(
                    parts["answer"], f"q: ab d: {y} a:", ROWS[0][side]
                )
                terms.append(log_p / (len(y) + 1 + len(ROWS[0][side]) + 1))
            sums.append(torch.stack(terms).logsumexp(0))
        rewards[side] = 0.3 * (sums[0] - sums[1])
    assert means(output)["rewards/margins"] == pytest.approx(
        float((rewards["chosen"] - rewards["rejected"]).detach()), abs=1e-6
    )


def test_importance_weights_enter_the_sum():
    drawn = {}

    class Watched(ImportanceSampling):
        def draw(self, plan, inputs, generator=None):
            drawn["candidates"] = super().draw(plan, inputs, generator)
            return drawn["candidates"]

    model, pairs = build(two_llms(3), ROWS, candidates=Watched(num_candidates=3), objective="sampling", beta=0.3)
    output = model(pairs, torch.Generator().manual_seed(0))
    candidates = drawn["candidates"]
    assert candidates.prompt == (0, 0, 0, 1, 1, 1)
    expected = []
    for number, row in enumerate(ROWS):
        terms = [
            text_log_prob(model.components["answer"], f"q: {row['question']} d: {cell.value} a:", row["chosen"])
            for cell, prompt in zip(candidates.trace.cells["draft"], candidates.prompt, strict=True)
            if prompt == number
        ]
        expected.append(float(torch.stack(terms).logsumexp(0).detach()) - math.log(3))
    # candidates come from the policy itself, so p(y|x) / q(y|x) is 1
    assert means(output)["logps/chosen"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert "candidates/coverage" not in output.metrics


def test_candidates_are_kept_for_the_asked_number_of_steps():
    calls = []

    class Counted(MonteCarlo):
        def draw(self, plan, inputs, generator=None):
            calls.append(list(inputs["question"]))
            return super().draw(plan, inputs, generator)

    strategy = Counted(num_candidates=3)
    model, pairs = build(two_llms(), ROWS, candidates=strategy, objective="sampling", candidates_refresh_steps=3)
    kept = [means(model(pairs, step=step))["candidates/distinct_2"] for step in range(3)]
    assert calls == [["ab", "what?"]]
    assert len(set(kept)) == 1
    model(pairs[:1], step=3)
    assert calls[1:] == [["ab"]]
    model(pairs, step=4)
    assert calls[2:] == [["what?"]]
    model(pairs)
    assert calls[3:] == [["ab", "what?"]]
    fresh, pairs = build(two_llms(), ROWS, candidates=strategy, objective="sampling")
    calls.clear()
    fresh(pairs, step=0)
    fresh(pairs, step=0)
    assert len(calls) == 2


@pytest.mark.parametrize("strategy", [MonteCarlo, ImportanceSampling])
def test_a_prompts_candidates_are_the_same_in_a_batch_of_any_size_and_others_at_each_step(strategy):
    seen = {}

    class Watched(strategy):
        def draw(self, plan, inputs, generator=None):
            found = super().draw(plan, inputs, generator)
            for number, question in enumerate(inputs["question"]):
                cells = found.of_prompt(number).trace.cells["draft"]
                seen.setdefault(question, []).append([cell.record["token_ids"] for cell in cells])
            return found

    model, pairs = build(two_llms(), ROWS, candidates=Watched(num_candidates=3), objective="sampling")
    torch.manual_seed(5)
    model(pairs, step=7)
    torch.rand(3)
    model(pairs[::-1], step=7)
    model(pairs[1:], step=7)
    first, second = seen["ab"], seen["what?"]
    assert first[0] == first[1]
    assert second[0] == second[1] == second[2]
    model(pairs, step=8)
    torch.manual_seed(6)
    model(pairs, step=7)
    assert first[2] != first[0] != first[3]


def test_candidates_may_come_from_the_reference():
    class Watched(DiverseBeamSearch):
        seen: ClassVar = []

        def draw(self, plan, inputs, generator=None):
            self.seen.append(plan.system["draft"].component)
            return super().draw(plan, inputs, generator)

    for source in ("policy", "reference"):
        model, pairs = build(
            two_llms(), ROWS, candidates=Watched(num_candidates=2), objective="sampling", candidates_from=source
        )
        model(pairs)
        expected = model.components if source == "policy" else model.references
        assert Watched.seen[-1] is expected["draft"]


@pytest.mark.parametrize(
    "options",
    [
        {"responsibility_temperature": 2.0},
        {"candidate_length_normalization": True},
        {"candidates_from": "reference"},
        {"candidates_refresh_steps": 2},
    ],
)
def test_options_of_sampling_are_refused_for_direct(options):
    with pytest.raises(PlanError, match=f"{next(iter(options))} has no effect on objective='direct'"):
        ObjectiveOptions(**options)
    ObjectiveOptions(objective="sampling", **options)


@pytest.mark.parametrize(
    "options", [{"responsibility_temperature": 0.0}, {"candidates_from": "both"}, {"candidates_refresh_steps": 0}]
)
def test_options_of_sampling_out_of_range_are_refused(options):
    with pytest.raises(PlanError, match=next(iter(options))):
        ObjectiveOptions(objective="sampling", **options)
