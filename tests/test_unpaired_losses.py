"""Losses of single runs on systems of two nodes against their formulas: enumerated, and from transformers' logits."""

import itertools
import math

import pytest
import switched_systems
import torch
from test_mixed_system import captioner_and_painter
from test_system_losses import BETA, BETAS, DRAFTS, built, token_log_probs
from tiny_diffusion import drift, from_text, images, seed

from sysdag import (
    DataError,
    DiverseBeamSearch,
    Exhaustive,
    ImportanceSampling,
    Input,
    MonteCarlo,
    PlanError,
    SysDPOConfig,
    System,
    TrainingError,
    node,
)
from sysdag.components import Tabular
from sysdag.data.encoding import encode_pairs, encode_rows
from sysdag.data.preferences import mismatched
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.execution.likelihood import aligned
from sysdag.objectives.options import EngineOptions, NodeOptions, ObjectiveOptions
from sysdag.objectives.reward_shift import RewardShift
from sysdag.objectives.unpaired_losses import UNPAIRED_LOSSES, RunScores, kto_loss

ONE_PASS = EngineOptions(engine="one_pass")
WEIGHTS = {"desirable_weight": 0.6, "undesirable_weight": 1.5}


def losses(name, rewards, labels, z=0.0, shift=0.0, weights=(1.0, 1.0)):
    """One a run; the formulas of the papers, run by run."""
    found = []
    for r, label in zip(rewards, labels, strict=True):
        r = torch.as_tensor(r, dtype=torch.float64)
        sign = 1.0 if label else -1.0
        value = {
            "kto": lambda r=r, sign=sign: 1 - torch.sigmoid(sign * (r - z)),
            "apo_zero_unpaired": lambda r=r, label=label: 1 - torch.sigmoid(r) if label else torch.sigmoid(r),
            "bco": lambda r=r, sign=sign: -torch.sigmoid(sign * (r - shift)).log(),
        }[name]()
        found.append(weights[0 if label else 1] * value)
    return torch.stack(found)


# Tables, by enumeration

XS, YS, ZS = "ab", "uv", "pq"


def table(keys, values, seed_):
    numbers = torch.rand(len(keys), len(values), generator=torch.Generator().manual_seed(seed_)) + 0.1
    rows = numbers / numbers.sum(1, keepdim=True)
    return {key: dict(zip(values, row.tolist(), strict=True)) for key, row in zip(keys, rows.double(), strict=True)}


PAIRS_XY = list(itertools.product(XS, YS))
P = table(XS, YS, 14), table(PAIRS_XY, ZS, 15)  # the policy
Q = table(XS, YS, 16), table(PAIRS_XY, ZS, 17)  # the reference
RUNS = [("a", "u", "p", True), ("b", "v", "q", False), ("a", "v", "p", True), ("b", "u", "q", True)]


def normal(rows):
    return {key: {v: p / math.fsum(row.values()) for v, p in row.items()} for key, row in rows.items()}


def chain():
    @node(Tabular(normal(Q[0])))
    def y(x):
        return x

    @node(Tabular(normal(Q[1])))
    def z(x, y):
        return (x, y)

    x = Input("x")
    return System(x >> y, (x & y) >> z)


def rows_of(runs):
    return [{"x": x, "output": z, "intermediates": {"y": y}, "label": label} for x, y, z, label in runs]


def tabular(objective, loss, candidates=None, engine=ONE_PASS, **options):
    """A model whose policy is P and whose reference is Q, and the runs."""
    plan = chain().compile()
    made = ObjectiveOptions(objective=objective, beta=0.7, loss_type=(loss,), **options)
    if objective == "sampling" and candidates is None:
        candidates = Exhaustive()
    model = SystemModel(plan, made, None, candidates, engine)
    for name, rows in zip("yz", P, strict=True):
        with torch.no_grad():
            logits = torch.tensor([list(row.values()) for row in rows.values()], dtype=torch.float64).log()
            plan.system[name].component.module["logits"].copy_(logits)
    return model, encode_rows(plan, rows_of(RUNS), objective)


def log_ratio(objective, x, y, z):
    """log p/q of the run (Direct), or of its output given the input (Sampling), by enumeration."""

    def joint(tables, y):
        first, second = map(normal, tables)
        return first[x][y] * second[x, y][z]

    of = [y] if objective == "direct" else YS
    return math.log(sum(joint(P, y) for y in of) / sum(joint(Q, y) for y in of))


@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=str)
@pytest.mark.parametrize("objective", ["direct", "sampling"])
@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_losses_of_tables_are_their_formulas(name, objective, weights):
    model, runs = tabular(objective, name, **weights)
    output = model(runs)
    rewards = [0.7 * log_ratio(objective, x, y, z) for x, y, z, _ in RUNS]
    others = [RUNS[-1], *RUNS[:-1]]  # the inputs of a row, and all values of the one before it
    z = max(0.0, sum(0.7 * log_ratio(objective, x, o[1], o[2]) for (x, *_), o in zip(RUNS, others, strict=True)) / 4)
    shift = sum(rewards) / 4
    both = tuple(weights.values()) or (1.0, 1.0)
    expected = losses(name, rewards, [run[3] for run in RUNS], z, shift, both)
    assert z > 0.01
    torch.testing.assert_close(output.losses, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(output.loss.detach(), expected.mean(), rtol=1e-6, atol=1e-7)
    if name == "kto":
        assert output.metrics["kl"].tolist() == pytest.approx([z / 0.7] * 4, rel=1e-5)
    if name == "bco":
        assert output.metrics["delta"].tolist() == pytest.approx([shift] * 4, rel=1e-5)
    chosen = output.metrics["rewards/chosen"]
    assert chosen.isnan().tolist() == [False, True, False, False]
    assert chosen.nanmean().item() == pytest.approx((rewards[0] + rewards[2] + rewards[3]) / 3, rel=1e-5)
    assert output.metrics["rewards/rejected"].nanmean().item() == pytest.approx(rewards[1], rel=1e-5)
    zero = {"kto": z, "bco": shift}.get(name, 0.0)
    accurate = [float((r > zero) == run[3]) for r, run in zip(rewards, RUNS, strict=True)]
    assert output.metrics["rewards/accuracies"].tolist() == accurate


@pytest.mark.parametrize("objective", ["direct", "sampling"])
def test_the_kl_term_is_at_least_0_and_has_no_gradient(objective):
    """Turned round, the mean log-ratio of mismatched runs is below 0."""
    global P, Q
    P, Q = Q, P
    try:
        model, runs = tabular(objective, "kto")
        rewards = [0.7 * log_ratio(objective, x, y, z) for x, y, z, _ in RUNS]
        output = model(runs)
    finally:
        P, Q = Q, P
    assert output.metrics["kl"].tolist() == [0.0] * 4
    torch.testing.assert_close(output.losses, losses("kto", rewards, [run[3] for run in RUNS]), rtol=1e-6, atol=1e-7)
    model, runs = tabular(objective, "kto")
    output = model(runs)
    accumulate_gradients(model, output)
    found = [p.grad.clone() for p in model.trained_parameters()]
    z = float(output.metrics["kl"][0].double()) * 0.7
    other, runs = tabular(objective, "apo_zero_unpaired")  # the same curve around 0: shifted by hand
    leaves = other.trained_parameters()
    scores = other.compare(runs, None, None)
    values = {t.name: other.plan.system[t.name].component.score(*inputs_of(other, t)) for t in scores.terms}
    frozen = {t.name: other.references[t.name].score(*inputs_of(other, t)).detach() for t in scores.terms}
    made, _ = scores.combine(values, frozen)
    expected = kto_loss(RunScores(rewards=made.rewards, desirable=made.desirable, kl=torch.tensor(z))).mean()
    for got, want in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def inputs_of(model, term):
    elements, draws = aligned(model.plan, term.trace, term.name)
    return list(elements.values), list(draws), term.noise


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_importance_sampling_takes_the_weighted_mean_of_its_candidates(name, monkeypatch):
    """logmeanexp of log p(y) - log pi(y) + log p(z|y), as for a side of a pair; drawn once, also for the KL term."""
    model, runs = tabular("sampling", name, ImportanceSampling(num_candidates=5))
    seeds = [torch.Generator().manual_seed(n) for n in range(4)]
    drawn = model.candidates.draw(model.plan, {"x": [run[0] for run in RUNS]}, [0, 1, 2, 3], None)
    calls, draw = [], model.candidates.draw
    monkeypatch.setattr(model.candidates, "draw", lambda *given: calls.append(1) or draw(*given))
    output = model(runs, seeds)
    assert len(calls) == 1

    def reward(row, z):
        x, ys = RUNS[row][0], [y for y, p in zip(drawn.trace["y"], drawn.prompt, strict=True) if p == row]
        assert len(ys) == 5
        sums = [
            sum(normal(t[0])[x][y] / normal(P[0])[x][y] * normal(t[1])[x, y][z] for y in ys) / 5 for t in (P, Q)
        ]  # fmt: skip
        return 0.7 * math.log(sums[0] / sums[1])

    kl = max(0.0, sum(reward(row, RUNS[row - 1][2]) for row in range(4)) / 4)
    assert kl > 0.01
    expected = losses(name, [reward(row, run[2]) for row, run in enumerate(RUNS)], [run[3] for run in RUNS], kl)
    torch.testing.assert_close(output.losses, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", ["direct", "sampling"])
@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_training_on_thumbs_moves_probability_to_what_is_liked(name, objective):
    """Every run of two inputs, liked where z is p: of the whole system p(z = p|x) rises, and both tables learn."""
    plan = chain().compile()
    options = ObjectiveOptions(objective=objective, beta=0.5, loss_type=(name,))
    model = SystemModel(plan, options, None, Exhaustive() if objective == "sampling" else None, ONE_PASS)
    runs = encode_rows(
        plan, rows_of([(x, y, z, z == "p") for x, y in PAIRS_XY for z in ZS for _ in range(2)]), objective
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.trained_parameters(), lr=0.1)

    def liked():
        first, second = (n.component.module["logits"].softmax(-1) for n in (plan.system["y"], plan.system["z"]))
        return (first.flatten() * second[:, 0]).view(2, 2).sum(1).detach()

    before, start = liked(), [p.detach().clone() for p in model.trained_parameters()]
    for _ in range(25):
        optimizer.zero_grad()
        accumulate_gradients(model, model(runs))
        optimizer.step()
    assert (liked() > before + 0.15).all()
    assert torch.isfinite(liked()).all()
    if objective == "sampling":  # the latents' table learns which of its values leads to p
        assert any(not torch.allclose(a, b, atol=0.05) for a, b in zip(start, model.trained_parameters(), strict=True))


# Language models, from transformers' logits

TEXTS = [
    ("ab", "y", "yes", True), ("what?", "a b", "", False), ("c", "so it is", "three", True),
    ("d e", "maybe", "c", False),
]  # fmt: skip


def text_rows(objective):
    rows = [{"question": q, "completion": z, "intermediates": {"draft": y}, "label": good} for q, y, z, good in TEXTS]
    if objective == "sampling":
        for row in rows:
            del row["intermediates"]
    return rows


def reward_by_hand(model, starts, objective, row, question, draft, answer):
    policies = {name: component.module for name, component in model.components.items()}
    asked = f"q: {question} d:"

    def score(models, name, draft):
        prompt, text = (asked, draft) if name == "draft" else (f"{asked} {draft} a:", answer)
        return token_log_probs(models[name], prompt, text)[0].sum()

    if objective == "direct":
        return sum(
            BETAS[name] * (score(policies, name, draft) - score(starts, name, draft).detach()) for name in BETAS
        )  # fmt: skip
    sums = []
    for models in (policies, starts):
        joint = [score(models, "draft", y) + score(models, "answer", y) for y in DRAFTS[row]]
        sums.append(torch.logsumexp(torch.stack(joint), 0))
    return BETA * (sums[0] - sums[1].detach())


@pytest.mark.parametrize(
    ("name", "objective", "engine"),
    [("kto", "direct", "one_pass"), *itertools.product(UNPAIRED_LOSSES, ("direct", "sampling"), ("two_pass",))],
)
def test_a_loss_of_two_language_models_is_its_formula(name, objective, engine):
    """Loss and every gradient, in micro-batches of a few sequences; candidates are those of the row's own inputs."""
    model, starts = built(objective, engine, loss_type=(name,), **WEIGHTS)
    hand = lambda row, run, cells: reward_by_hand(model, starts, objective, row, run[0], cells[1], cells[2])
    rewards = [hand(row, run, run) for row, run in enumerate(TEXTS)]
    with torch.no_grad():
        z = sum(hand(row, run, TEXTS[row - 1]) for row, run in enumerate(TEXTS)).clamp(min=0) / 4
        shift = torch.stack(rewards).mean()
    expected = losses(name, rewards, [t[3] for t in TEXTS], z, shift, tuple(WEIGHTS.values())).mean()
    parameters = model.trained_parameters()
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    output = model(encode_rows(model.plan, text_rows(objective), objective))
    torch.testing.assert_close(output.loss.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    accumulate_gradients(model, output)
    compared = 0
    for parameter, want in zip(parameters, wanted, strict=True):
        if want is not None:
            assert float((parameter.grad - want).abs().max()) <= 1e-5 * float(want.abs().max())
            compared += bool(want.any())
    assert compared > 20
    said = [float(sum(token_log_probs(model.components[n].module, p, t)[0].sum().detach() for n, p, t in [
        ("draft", f"q: {q} d:", y), ("answer", f"q: {q} d: {y} a:", answer)])) for q, y, answer, _ in TEXTS
    ]  # fmt: skip
    if objective == "direct":
        assert output.metrics["logps/chosen"].nanmean().item() == pytest.approx((said[0] + said[2]) / 2, rel=1e-4)


def test_mixes_weigh_losses_and_rows_weigh_themselves():
    model, runs = tabular("direct", "kto")
    alone = {}
    for name in UNPAIRED_LOSSES:
        model.options = ObjectiveOptions(beta=0.7, loss_type=(name,))
        model.shift = RewardShift()
        alone[name] = model(runs).losses
    model.options = ObjectiveOptions(beta=0.7, loss_type=("bco", "kto"), loss_weights=(0.5, 2.0))
    model.shift = RewardShift()
    mixed = model(runs).losses
    torch.testing.assert_close(mixed, 0.5 * alone["bco"] + 2 * alone["kto"])
    model.options = ObjectiveOptions(beta=0.7, loss_type=("kto",))
    rows = [row | {"weight": w} for row, w in zip(rows_of(RUNS), (2.0, 0.0, 1.0, 0.5), strict=True)]
    weighted = model(encode_rows(model.plan, rows, "direct")).losses
    torch.testing.assert_close(weighted, alone["kto"] * torch.tensor([2.0, 0.0, 1.0, 0.5]).double())


def test_the_shift_is_the_mean_of_all_rewards_that_training_saw():
    model, runs = tabular("direct", "bco")
    rewards = [0.7 * log_ratio("direct", x, y, z) for x, y, z, _ in RUNS]
    deltas = [float(model(part).metrics["delta"][0]) for part in (runs[:1], runs[1:], runs[:2])]
    seen = [rewards[:1], rewards, [*rewards, *rewards[:2]]]
    assert deltas == pytest.approx([sum(each) / len(each) for each in seen], rel=1e-5)
    with torch.no_grad():
        assert float(model(runs[:1]).metrics["delta"][0]) == pytest.approx(deltas[-1])  # an evaluation adds nothing
    assert model.shift.count == 6


def test_before_the_first_step_all_rewards_and_zero_points_are_0():
    plan = chain().compile()
    runs = encode_rows(plan, rows_of(RUNS), "direct")
    for name, loss in (("kto", 0.5), ("apo_zero_unpaired", 0.5), ("bco", math.log(2))):
        model = SystemModel(plan, ObjectiveOptions(loss_type=(name,)), engine=ONE_PASS)
        output = model(runs)
        assert output.losses.tolist() == pytest.approx([loss] * 4)


# Mismatched runs


def test_the_first_run_of_a_batch_takes_the_values_of_the_last():
    runs = encode_rows(chain().compile(), rows_of(RUNS), "direct")
    made = mismatched(runs)
    for place, run in enumerate(made):
        assert run.mismatched.inputs == runs[place].inputs
        assert run.mismatched.run == runs[place - 1].run
    assert [run.mismatched for run in mismatched(made[:2])] == [run.mismatched for run in made[:2]]  # they stay
    model, _ = tabular("direct", "kto")
    with pytest.raises(PlanError, match="mismatches the runs of a batch .* and this batch has one. Give it two"):
        model(runs[:1])


def test_a_mismatched_run_that_cannot_be_scored_is_named_as_one():
    """A table without a row for the inputs of one run and the intermediates of another."""

    @node(Tabular({"a": {"u": 1.0}, "b": {"v": 1.0}}))
    def y(x):
        return x

    @node(Tabular({("a", "u"): {"p": 0.5, "q": 0.5}, ("b", "v"): {"p": 0.5, "q": 0.5}}))
    def z(x, y):
        return (x, y)

    x = Input("x")
    plan = System(x >> y, (x & y) >> z).compile()
    runs = encode_rows(plan, rows_of([("a", "u", "p", True), ("b", "v", "q", False)]), "direct")
    SystemModel(plan, ObjectiveOptions(loss_type=("bco",)), engine=ONE_PASS)(runs)
    model = SystemModel(plan, ObjectiveOptions(loss_type=("kto",)), engine=ONE_PASS)
    with pytest.raises((DataError, TrainingError), match="'kto', which scores the inputs of each row with the values"):
        model(runs)


def test_deterministic_nodes_are_computed_from_mismatched_inputs():
    """z's key is made by a function of the input and y: of a mismatched run from both as they then are."""

    @node(Tabular(normal(Q[0])))
    def y(x):
        return x

    @node
    def key(x, y):
        return (x, y)

    @node(Tabular(normal(Q[1])))
    def z(key):
        return key

    x = Input("x")
    plan = System(x >> y, (x & y) >> key >> z).compile()
    model = SystemModel(plan, ObjectiveOptions(beta=0.7, loss_type=("kto",)), engine=ONE_PASS)
    for name, rows in zip("yz", P, strict=True):
        with torch.no_grad():
            logits = torch.tensor([list(row.values()) for row in rows.values()], dtype=torch.float64).log()
            plan.system[name].component.module["logits"].copy_(logits)
    other, runs = tabular("direct", "kto")
    assert model(encode_rows(plan, rows_of(RUNS), "direct")).loss.item() == pytest.approx(other(runs).loss.item())


def test_a_diffusion_node_is_scored_under_captions_and_noise_of_its_own():
    """Each run has one (t, eps) draw, which the run that has its inputs and other values shares where it can."""
    plan = captioner_and_painter().compile()
    nodes = {"image": NodeOptions(beta=500.0)}
    model = SystemModel(plan, ObjectiveOptions(beta=0.2, loss_type=("apo_zero_unpaired",)), nodes, engine=ONE_PASS)
    for component in model.components.values():
        drift(component.module, size=0.02)
        component.module.double()
    for reference in model.references.values():
        reference.module.double()
    rows = [
        {"prompt": "draw", "output": images(2), "intermediates": {"text": "a dark square|light circle"}, "label": True},
        {"prompt": "paint", "output": images(3, number=50), "intermediates": {"text": "a|b|c"}, "label": False},
    ]
    runs = encode_rows(plan, rows, "direct")
    output = model(runs, seed(7))
    painter, frozen = model.components["image"], model.references["image"]
    draws = [painter.observe(images(2)), painter.observe(images(3, number=50))]
    noise = painter.noise([d for each in draws for d in each], seed(7))
    rewards = []
    for row, captions in enumerate((["a dark square", "light circle"], ["a", "b", "c"])):
        own = noise.select([0, 1] if row == 0 else [2, 3, 4])
        errors = painter.errors(captions, draws[row], own) - frozen.errors(captions, draws[row], own)
        image = -500.0 * 0.5 * float(errors.detach().sum()) / 64
        written, prompt = "|".join(captions), f"{rows[row]['prompt']}|"
        component, before = model.components["text"], model.references["text"]
        given = component.observe([written])
        text = (component.log_prob([prompt], given)[0] - before.log_prob([prompt], given)[0]).item()
        rewards.append(0.2 * text + image)
    expected = losses("apo_zero_unpaired", rewards, [True, False])
    torch.testing.assert_close(output.losses.double(), expected, rtol=1e-5, atol=1e-6)
    model.options = ObjectiveOptions(beta=0.2, loss_type=("kto",))
    assert torch.isfinite(model(runs, seed(7)).losses).all()


# What is not defined


def plated(source):
    """A plate over a list that is an input, a function of it, or a function of a random node."""
    words = Input("words")

    @node(Tabular({"w": {"u": 1.0}}))
    def said(words):
        return "w"

    @node
    def parts(words) -> list:
        return list(words)

    @node
    def pieces(said) -> list:
        return [said]

    out = node(Tabular({"u": {"p": 0.5, "q": 0.5}, "w": {"p": 0.5, "q": 0.5}}), name="out")
    if source == "input":
        return System(words >> said, words.each() >> out(lambda words: words), outputs=["out", "said"]).compile()
    if source == "function":
        return System(
            words >> said, words >> parts, parts.each() >> out(lambda parts: parts), outputs=["out", "said"]
        ).compile()
    return System(words >> said >> pieces, pieces.each() >> out(lambda pieces: pieces)).compile()


@pytest.mark.parametrize("source", ["input", "function"])
def test_kto_refuses_plates_whose_number_of_elements_the_input_decides(source):
    plan = plated(source)
    with pytest.raises(PlanError, match="node 'out' has one value for each element of a list that .* input 'words'"):
        SystemModel(plan, ObjectiveOptions(loss_type=("kto",)))
    SystemModel(plan, ObjectiveOptions(loss_type=("bco",)))
    SystemModel(plated("run"), ObjectiveOptions(loss_type=("kto",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ("kto", "sigmoid")}, "'kto' takes single runs with a label, and 'sigmoid' pairs of runs"),
        ({"loss_type": ("sft", "bco")}, "'bco' takes single runs with a label, and 'sft' pairs"),
        ({"desirable_weight": 2.0}, r"desirable_weight has no effect on loss_type \['sigmoid'\]; it belongs to"),
        ({"loss_type": ("kto",), "undesirable_weight": -1.0}, "undesirable_weight must be finite and 0 or more, got"),
        ({"loss_type": ("kto",), "desirable_weight": math.nan}, "desirable_weight must be finite and 0 or more"),
        ({"loss_type": ("kto",), "desirable_weight": 0.0, "undesirable_weight": 0.0}, "both 0, so nothing is trained"),
        ({"loss_type": ("kto",), "reference_free": True}, "reference_free does not go with loss_type 'kto'"),
        ({"loss_type": ("bco",), "ld_alpha": 0.5}, "ld_alpha does not go with loss_type 'bco', which has one run"),
        ({"loss_type": ("bco",), "use_weighting": True}, "use_weighting does not go with loss_type 'bco'"),
        ({"loss_type": ("kto",), "label_smoothing": 0.1}, r"no effect on loss_type \['kto'\]"),
        ({"loss_type": ("kto_unpaired",)}, r"must name one or more of \['aot',.*'apo_zero_unpaired'.*'kto'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        ObjectiveOptions(**options)


def test_a_safeguard_of_winners_needs_pairs():
    image = node(from_text(winner_safeguard=0.5), name="image")(lambda caption: caption)
    plan = System(Input("caption") >> image).compile()
    with pytest.raises(PlanError, match="Node 'image' has a winner_safeguard, .* loss_type 'kto' takes single runs"):
        SystemModel(plan, ObjectiveOptions(loss_type=("kto",)))


def test_the_engine_names_feedback_that_its_losses_do_not_take():
    plan = chain().compile()
    pair = {"x": "a", "chosen": "p", "rejected": "q", "chosen_intermediates": {"y": "u"},
            "rejected_intermediates": {"y": "v"}}  # fmt: skip
    runs, pairs = encode_rows(plan, rows_of(RUNS), "direct"), encode_pairs(plan, [pair], "direct")
    with pytest.raises(DataError, match=r"Row 0 is an unpaired run\. Loss_type 'sigmoid' compares two runs; .*'kto'"):
        SystemModel(plan, ObjectiveOptions())(runs)
    with pytest.raises(DataError, match=r"Row 0 is a pair\. Loss_type 'kto' takes single runs; .*'sigmoid'"):
        SystemModel(plan, ObjectiveOptions(loss_type=("kto",)))(pairs)


@pytest.mark.parametrize(
    ("candidates", "warns"),
    [(DiverseBeamSearch(), True), (MonteCarlo(), True), (ImportanceSampling(), False), (Exhaustive(), False)],
    ids=lambda value: type(value).__name__,
)
def test_sums_of_what_was_found_are_told_where_one_run_is_a_side(candidates, warns, caplog):
    options = ObjectiveOptions(objective="sampling", loss_type=("bco",))
    SystemModel(chain().compile(), options, candidates=candidates)
    assert ("sums the probabilities of the candidates that it finds" in caplog.text) == warns


def test_a_plain_sum_teaches_latents_that_the_output_does_not_depend_on():
    """What that warning says, by enumeration of all draws of two candidates; importance sampling has a mean of 0."""
    alike, p = {"p": 0.3, "q": 0.7}, {"u": 0.5, "v": 0.3, "w": 0.2}
    y = node(Tabular({"a": p}), name="y")(lambda x: x)
    z = node(Tabular(dict.fromkeys(p, alike)), name="z")(lambda y: y)
    plan = System(Input("x") >> y >> z).compile()
    runs = encode_rows(plan, [{"x": "a", "output": "p", "label": True}] * 100, "sampling")
    drifts = {}
    for candidates in (MonteCarlo(num_candidates=2), ImportanceSampling(num_candidates=2)):
        options = ObjectiveOptions(objective="sampling", beta=1.0, loss_type=("apo_zero_unpaired",))
        model = SystemModel(plan, options, None, candidates, ONE_PASS)
        logits = plan.system["y"].component.module["logits"]
        found = [model(runs, torch.Generator().manual_seed(number)).loss for number in range(16)]
        drifts[type(candidates)] = torch.autograd.grad(torch.stack(found).mean(), logits)[0][0].tolist()
    # d loss / d reward is -1/4 at reward 0; of a set S with probability c, d log c / d logit_j = [j in S] p_j / c - p_j
    expected = [
        -sum(p[a] * p[b] * ((j in (a, b)) * p[j] / sum(p[i] for i in {a, b}) - p[j]) for a in p for b in p) / 4
        for j in p
    ]
    assert max(map(abs, expected)) > 0.015
    assert drifts[MonteCarlo] == pytest.approx(expected, abs=0.008)
    assert drifts[ImportanceSampling] == pytest.approx([0.0] * 3, abs=0.008)


def test_a_function_of_the_losses_is_its_name(tmp_path):
    assert SysDPOConfig(output_dir=str(tmp_path), loss_type=kto_loss, report_to=[]).loss_type == ["kto"]


def test_kto_refuses_switches_and_the_others_score_the_branch_that_a_run_took():
    plan = switched_systems.build().compile()
    with pytest.raises(PlanError, match="this system has switches: other inputs may take branches"):
        SystemModel(plan, ObjectiveOptions(loss_type=("kto",)))
    model = SystemModel(plan, ObjectiveOptions(beta=0.5, loss_type=("apo_zero_unpaired",)), engine=ONE_PASS)
    (x, row), *_ = switched_systems.ROUTES.items()
    solved = next(iter(switched_systems.SOLUTIONS[x]))
    run = {"x": x, "output": solved, "label": True, "intermediates": {"route": "math"}}
    runs = encode_rows(plan, [run], "direct")
    with torch.no_grad():
        for name in ("route", "solve"):
            plan.system[name].component.module["logits"].mul_(2.0)
    tables = row, switched_systems.SOLUTIONS[x]
    expected = sum(
        math.log(table[value] ** 2 / sum(p**2 for p in table.values()) / table[value])
        for table, value in zip(tables, ("math", solved), strict=True)
    )
    assert float(model(runs).losses[0]) == pytest.approx(1 / (1 + math.exp(0.5 * expected)), rel=1e-6)
