"""Losses on a system of two language models against their formulas, from transformers' logits alone."""

import copy
import math

import pytest
import torch
from test_mixed_system import captioner_and_painter
from tiny import char_tokenizer, llama
from torch.nn.functional import logsigmoid

from sysdag import Input, MonteCarlo, PlanError, System, node
from sysdag.components import Categorical, CausalLM, Opaque, Tabular
from sysdag.data.encoding import encode_pairs
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.objectives.candidates import Candidates
from sysdag.objectives.losses import KINDS, LOSSES
from sysdag.objectives.options import EngineOptions, NodeOptions, ObjectiveOptions

QUESTION = Input("question")
BETA, BETAS = 0.3, {"draft": 0.15, "answer": 0.3}
ROWS = [
    ("ab", ("y", "yes"), ("n0", "no")),
    ("what?", ("", "one"), ("a b", "")),
    ("c", ("so it is", "three"), ("t", "a longer answer")),
    ("d e", ("no", "b"), ("maybe", "c")),
]
DRAFTS = (("y", "n0", ""), ("a", "bb"), ("x", "so"), ("m", "n", "o"))


def two_llms():
    @node(CausalLM(llama(0), char_tokenizer(), max_new_tokens=16))
    def draft(question):
        return f"q: {question} d:"

    @node(CausalLM(llama(1), char_tokenizer(), max_new_tokens=16))
    def answer(question, draft):
        return f"q: {question} d: {draft} a:"

    return System(QUESTION >> draft, (QUESTION & draft) >> answer)


class Given(MonteCarlo):
    """Candidates given by hand."""

    def paths(self, plan, rows, latents, generator):
        prompt = tuple(p for p, drafts in enumerate(DRAFTS) for _ in drafts)
        draws = plan.system["draft"].component.observe([d for drafts in DRAFTS for d in drafts])
        return Candidates(rows.select(prompt).updated({"draft": draws}), prompt)


def pairs_of(plan, objective):
    rows = [
        {"question": question, "chosen": won[1], "rejected": lost[1],
         "chosen_intermediates": {"draft": won[0]}, "rejected_intermediates": {"draft": lost[0]}}
        for question, won, lost in ROWS
    ]  # fmt: skip
    return encode_pairs(plan, rows, objective)


def built(objective, engine="one_pass", **options):
    """The model, its policies away from the references, all in fp64."""
    torch.manual_seed(0)
    system = two_llms()
    plan = system.compile()
    starts = {n.name: copy.deepcopy(n.component.module).double() for n in system.nodes}
    nodes = {name: NodeOptions(beta=beta) for name, beta in BETAS.items()} if objective == "direct" else None
    candidates = Given(num_candidates=3) if objective == "sampling" else None
    made = ObjectiveOptions(objective=objective, beta=BETA, **options)
    model = SystemModel(plan, made, nodes, candidates, EngineOptions(engine=engine, micro_batch_tokens=60))
    for n in system.nodes:
        n.component.module.double()
        with torch.no_grad():
            for parameter in n.component.module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    for reference in model.references.values():
        if reference.module is not None:
            reference.module.double()
    return model, starts


def token_log_probs(model, prompt, completion):
    """Of the completion's characters and its end of sequence, and log sum p^2 at each."""
    tokenizer = char_tokenizer()
    before = tokenizer(prompt)["input_ids"]
    after = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    logits = model(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1]
    log_p = logits.log_softmax(-1)
    return log_p[torch.arange(len(after)), torch.tensor(after)], (2 * log_p).logsumexp(-1)


class ByHand:
    """The rewards and lengths of a batch, side by side in lists, written out."""

    def __init__(self, model, starts, objective, ld_alpha=None):
        policies = {name: component.module for name, component in model.components.items()}
        self.c, self.r, self.pc, self.pr, self.nc, self.nr, self.weights = ([] for _ in range(7))
        chosen = {"draft": [], "answer": []}
        for row, (question, *sides) in enumerate(ROWS):
            asked = f"q: {question} d:"

            def said(draft, asked=asked):
                return f"{asked} {draft} a:"

            if objective == "sampling":
                of = {}
                for key, models in (("p", policies), ("q", starts)):
                    drafts = [token_log_probs(models["draft"], asked, d)[0].sum() for d in DRAFTS[row]]
                    for side, (_, answer) in enumerate(sides):
                        ends = [token_log_probs(models["answer"], said(d), answer)[0].sum() for d in DRAFTS[row]]
                        joint = [a + b for a, b in zip(drafts, ends, strict=True)]
                        of[key, side] = torch.logsumexp(torch.stack(joint), 0)
                lengths = [len(answer) + 1 for _, answer in sides]
                parts = [(BETA * of["p", side], BETA * of["q", side]) for side in range(2)]
                chosen["answer"].append((of["p", 0], lengths[0]))
            else:
                tokens = [
                    {"draft": (asked, draft), "answer": (said(draft), answer)} for draft, answer in sides
                ]  # fmt: skip
                parts, lengths, typical = [], [], []
                for side in range(2):
                    policy = reference = typicality = 0.0
                    for name, (prompt, completion) in tokens[side].items():
                        shared = min(len(each[name][1]) + 1 for each in tokens)
                        weight = torch.ones(len(completion) + 1, dtype=torch.float64)
                        if ld_alpha is not None:
                            weight[shared:] = ld_alpha
                        log_p, squares = token_log_probs(policies[name], prompt, completion)
                        log_q, _ = token_log_probs(starts[name], prompt, completion)
                        policy = policy + BETAS[name] * (weight * log_p).sum()
                        reference = reference + BETAS[name] * (weight * log_q).sum().detach()
                        typicality = typicality + (log_p - squares).sum().detach()
                        if side == 0:
                            chosen[name].append((log_p.sum(), len(completion) + 1))
                    lengths.append(sum(len(completion) + 1 for _, completion in tokens[side].values()))
                    typical.append(typicality / lengths[-1])
                    parts.append((policy, reference))
                self.weights.append((typical[0] + typical[1]).exp())
            self.c.append(parts[0][0] - parts[0][1].detach())
            self.r.append(parts[1][0] - parts[1][1].detach())
            self.pc.append(parts[0][0])
            self.pr.append(parts[1][0])
            self.nc.append(lengths[0])
            self.nr.append(lengths[1])
        self.nll = sum(
            -sum(log_p for log_p, _ in each) / sum(length for _, length in each) for each in chosen.values() if each
        )

    def losses(self, name, e):
        """One a pair; the formulas of the papers, each written by itself."""
        c, r, pc, pr = (torch.stack(each) for each in (self.c, self.r, self.pc, self.pr))
        nc, nr = torch.tensor(self.nc), torch.tensor(self.nr)
        m, sigmoid = c - r, torch.sigmoid
        smooth = lambda x: -(1 - e) * sigmoid(x).log() - e * sigmoid(-x).log()
        return {
            "sigmoid": lambda: smooth(m),
            "robust": lambda: (-(1 - e) * sigmoid(m).log() + e * sigmoid(-m).log()) / (1 - 2 * e),
            "hinge": lambda: torch.clamp(1 - m, min=0),
            "ipo": lambda: ((c / nc - r / nr) / BETA - 1 / (2 * BETA)) ** 2,
            "sft": lambda: self.nll.expand(len(c)),
            "exo_pair": lambda: (
                sigmoid(m) * (sigmoid(m).log() - math.log(1 - e)) + sigmoid(-m) * (sigmoid(-m).log() - math.log(e))
            ),
            "nca_pair": lambda: -sigmoid(c).log() - 0.5 * sigmoid(-c).log() - 0.5 * sigmoid(-r).log(),
            "bco_pair": lambda: -sigmoid(c).log() - sigmoid(-r).log(),
            "sppo_hard": lambda: (c / BETA - 0.5 / BETA) ** 2 + (r / BETA + 0.5 / BETA) ** 2,
            "aot": lambda: smooth((pc - pr).sort().values - ((pc - c) - (pr - r)).detach().sort().values),
            "aot_unpaired": lambda: smooth(c.sort().values - r.sort().values),
            "apo_zero": lambda: 1 - sigmoid(c) + sigmoid(r),
            "apo_down": lambda: sigmoid(c) + 1 - sigmoid(c - r),
            "discopop": lambda: -sigmoid(m).log() * (1 - sigmoid(m / 0.05)) + torch.exp(-m) * sigmoid(m / 0.05),
            "sigmoid_norm": lambda: -sigmoid(c / nc - r / nr).log(),
            "simpo": lambda: smooth(pc / nc - pr / nr - 0.5),
            "cpo": lambda: smooth(pc - pr) + self.nll,
        }[name]()


def check(model, objective, expected):
    """Loss and every gradient of a model against a loss that was written out.

    To 1e-5 of a gradient's largest entry: Llama's norms and rotations are in fp32 whatever the weights are in.
    """
    parameters = model.trained_parameters()
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    output = model(pairs_of(model.plan, objective))
    torch.testing.assert_close(output.loss.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    accumulate_gradients(model, output)
    compared = 0
    for parameter, want in zip(parameters, wanted, strict=True):
        if want is not None:
            assert float((parameter.grad - want).abs().max()) <= 1e-5 * float(want.abs().max())
            compared += bool(want.any())
    assert compared > 20
    return output


@pytest.mark.parametrize("objective", ["direct", "sampling"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_a_system_is_its_formula(name, objective):
    """In micro-batches of a few sequences each, also where it sorts over the batch."""
    e = 0.1 if KINDS[name].smooths else 0.0
    model, starts = built(objective, "two_pass", loss_type=(name,), label_smoothing=e)
    by_hand = ByHand(model, starts, objective)
    check(model, objective, by_hand.losses(name, e).mean())


def test_losses_mix_with_and_without_a_reference():
    names, weights = ("simpo", "nca_pair", "cpo", "aot"), (0.5, 2.0, 0.25, 1.0)
    model, starts = built("direct", loss_type=names, loss_weights=weights)
    by_hand = ByHand(model, starts, "direct")
    check(model, "direct", sum(w * by_hand.losses(n, 0.0).mean() for n, w in zip(names, weights, strict=True)))


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "simpo"])
def test_tails_of_each_node_weigh_what_ld_alpha_says(name, engine):
    model, starts = built("direct", engine, loss_type=(name,), ld_alpha=0.3)
    check(model, "direct", ByHand(model, starts, "direct", 0.3).losses(name, 0.0).mean())


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_pairs_weigh_by_how_typical_the_policy_finds_whole_runs(engine):
    model, starts = built("direct", engine, loss_type=("hinge",), use_weighting=True)
    by_hand = ByHand(model, starts, "direct")
    check(model, "direct", (torch.stack(by_hand.weights) * by_hand.losses("hinge", 0.0)).mean())


def test_typicality_of_a_discrete_node_is_by_its_table():
    table = Tabular({"a": {"x": 0.5, "y": 0.3, "z": 0.2}})
    found = table.typicality(["a", "a"], table.observe(["x", "z"]))
    squares = 0.25 + 0.09 + 0.04
    assert found.tolist() == pytest.approx([math.log(0.5 / squares), math.log(0.2 / squares)])


@pytest.mark.parametrize("objective", ["direct", "sampling"])
@pytest.mark.parametrize("loss_type", [("simpo",), ("cpo",), ("simpo", "sft")])
def test_without_a_reference_none_is_made_or_scored(objective, loss_type, monkeypatch):
    scored, log_prob = [], CausalLM.log_prob
    monkeypatch.setattr(CausalLM, "log_prob", lambda self, *given: scored.append(1) or log_prob(self, *given))

    def calls(*loss_type):
        scored.clear()
        model, _ = built(objective, loss_type=loss_type)
        model(pairs_of(model.plan, objective))
        return len(scored)

    with_one = calls("sigmoid")
    for kind in ("reference", "moving_reference"):
        monkeypatch.setattr(CausalLM, kind, lambda self: pytest.fail("a reference was made"))
    assert with_one == 2 * calls(*loss_type) > 0


@pytest.mark.parametrize("objective", ["direct", "sampling"])
def test_reference_free_takes_a_reference_of_equal_probabilities(objective):
    model, starts = built(objective, loss_type=("bco_pair",), reference_free=True)
    by_hand = ByHand(model, starts, objective)
    expected = -logsigmoid(torch.stack(by_hand.pc)) - logsigmoid(-torch.stack(by_hand.pr))
    output = check(model, objective, expected.mean())
    assert output.metrics["rewards/chosen"].tolist() == pytest.approx([float(v) for v in by_hand.pc], rel=1e-5)


def test_a_frozen_node_counts_without_a_reference():
    """Its log-probability is a part of what simpo compares, though none of it trains."""
    model, starts = built("direct", loss_type=("simpo",))
    frozen = SystemModel(
        model.plan, model.options, {"draft": NodeOptions(beta=0.15, trainable=False), "answer": NodeOptions(beta=0.3)},
        engine=EngineOptions(engine="one_pass"),
    )  # fmt: skip
    expected = ByHand(frozen, starts, "direct").losses("simpo", 0.0).mean()
    output = frozen(pairs_of(frozen.plan, "direct"))
    torch.testing.assert_close(output.loss.detach(), expected.detach(), rtol=1e-9, atol=1e-9)


def test_a_shown_reward_is_what_simpo_compares():
    model, starts = built("direct", loss_type=("simpo",))
    by_hand = ByHand(model, starts, "direct")
    output = model(pairs_of(model.plan, "direct"))
    expected = [float(p) / n for p, n in zip(by_hand.pc, by_hand.nc, strict=True)]
    assert output.metrics["rewards/chosen"].tolist() == pytest.approx(expected, rel=1e-5)


# What is not defined


def routed():
    @node(Categorical(["short", "long"], 2))
    def route(question):
        return [1.0, 0.0]

    @node(CausalLM(llama(1), char_tokenizer(), max_new_tokens=8))
    def answer(question, route):
        return f"{question} {route}"

    return System(QUESTION >> route, (QUESTION & route) >> answer).compile()


@pytest.mark.parametrize("name", ["sigmoid_norm", "simpo"])
def test_what_divides_by_tokens_needs_nodes_that_have_some(name):
    with pytest.raises(PlanError, match=rf"loss_type '{name}' divides .* node 'route' \(Categorical.*has none"):
        SystemModel(routed(), ObjectiveOptions(loss_type=(name,)))
    sampling = ObjectiveOptions(objective="sampling", loss_type=(name,))
    SystemModel(routed(), sampling, candidates=MonteCarlo())  # the likelihood is of the answer, which has tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ("aot",)}, "loss_type 'aot' looks at the policy's likelihood itself, and of node 'image'"),
        ({"loss_type": ("simpo",)}, "loss_type 'simpo' looks at the policy's likelihood itself, and of node 'image'"),
        ({"loss_type": ("cpo",)}, "loss_type 'cpo' looks at the policy's"),
        ({"loss_type": ("sigmoid_norm",)}, "loss_type 'sigmoid_norm' divides .* node 'image'"),
        ({"reference_free": True}, "reference_free=True: of node 'image'"),
        ({"use_weighting": True}, "use_weighting=True weighs runs by their probability, which node 'image'"),
    ],
)
def test_bounds_are_refused_where_they_say_too_little(options, message):
    with pytest.raises(PlanError, match=message):
        SystemModel(captioner_and_painter().compile(), ObjectiveOptions(**options))


def test_a_bound_takes_the_losses_of_rewards():
    for name, kind in KINDS.items():
        if not kind.needs_policy and not kind.needs_tokens:
            e = 0.1 if name == "exo_pair" else 0.0
            SystemModel(captioner_and_painter().compile(), ObjectiveOptions(loss_type=(name,), label_smoothing=e))


def test_tails_need_tokens():
    plan = System(QUESTION >> node(Tabular({"a": {"x": 0.5, "y": 0.5}}), name="n")(lambda question: question)).compile()
    with pytest.raises(PlanError, match="ld_alpha weighs tokens, and no node of this system has any"):
        SystemModel(plan, ObjectiveOptions(ld_alpha=0.5))


def test_a_tool_counts_as_certain_without_a_reference():
    @node(CausalLM(llama(0), char_tokenizer(), max_new_tokens=8))
    def query(question):
        return question

    @node(Opaque(str.upper))
    def found(query):
        return query

    plan = System(QUESTION >> query >> found).compile()
    rows = [{"question": "a", "chosen": "B", "rejected": "C", "chosen_intermediates": {"query": "b"},
             "rejected_intermediates": {"query": "c"}}]  # fmt: skip
    model = SystemModel(plan, ObjectiveOptions(loss_type=("cpo",)), engine=EngineOptions(engine="one_pass"))
    output = model(encode_pairs(plan, rows, "direct"))
    own = [float(token_log_probs(model.components["query"].module, "a", side)[0].sum()) for side in "bc"]
    expected = -float(logsigmoid(torch.tensor(0.1 * (own[0] - own[1])))) - own[0] / 2
    assert float(output.loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ("kto_pair",)}, r"loss_type must name one or more of \['aot', .*'sppo_hard'\]"),
        ({"loss_type": ("exo_pair",)}, "'exo_pair' needs a label_smoothing above 0; the paper recommends 1e-3"),
        ({"discopop_tau": 0.1}, r"discopop_tau has no effect on loss_type \['sigmoid'\]; it belongs to \['discopop'\]"),
        ({"discopop_tau": 0.0, "loss_type": ("discopop",)}, "discopop_tau must be positive, got 0.0"),
        ({"simpo_gamma": 1.0}, "simpo_gamma has no effect"),
        ({"simpo_gamma": math.nan, "loss_type": ("simpo",)}, "simpo_gamma must be finite"),
        ({"cpo_alpha": -1.0, "loss_type": ("cpo",)}, "cpo_alpha must be 0 or more, got -1.0"),
        ({"label_smoothing": 0.1, "loss_type": ("apo_zero",)}, r"no effect on loss_type \['apo_zero'\]; .*'exo_pair'"),
        ({"reference_free": True, "loss_type": ("aot",)}, "leaves loss_type 'aot' nothing"),
        ({"loss_type": ("simpo",), "objective": "sampling", "candidates_from": "reference"}, "needs a reference"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], got 1.5"),
        ({"ld_alpha": 0.5, "objective": "sampling"}, "ld_alpha does not go with objective='sampling'"),
        ({"ld_alpha": 0.5, "loss_type": ("sigmoid", "sft")}, "ld_alpha does not go with loss_type 'sft'"),
        ({"use_weighting": True, "objective": "sampling"}, "use_weighting does not go with objective='sampling'"),
        ({"use_weighting": True, "loss_type": ("sigmoid", "aot")}, "use_weighting=True weighs single pairs, and aot"),
        ({"group_dro": True, "loss_type": ("aot_unpaired",)}, "group_dro=True weighs single pairs, and aot_unpaired"),
        ({"group_dro_step_size": 0.1}, "no effect without group_dro=True"),
        ({"group_dro": True, "group_dro_step_size": 0.0}, "group_dro_step_size must be positive"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        ObjectiveOptions(**options)
