import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sysdag.errors import LoadingError, PlanError
from sysdag.objectives import losses
from sysdag.objectives.candidate_sums import candidate_log_sum, effective_sample_size, responsibilities
from sysdag.objectives.losses import KINDS, LOSSES, Kind, PairScores, preference_loss
from sysdag.objectives.options import ObjectiveOptions
from sysdag.objectives.own_losses import name_of, register_loss


def pair_scores(chosen, rejected, chosen_lengths=None, rejected_lengths=None, nll=0.0, policies=None, target=None):
    chosen, rejected = (torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected))
    policies = [None, None] if policies is None else [torch.tensor(p, dtype=torch.float64) for p in policies]
    ones = torch.ones_like(chosen)
    return PairScores(
        chosen_rewards=chosen,
        rejected_rewards=rejected,
        chosen_lengths=ones if chosen_lengths is None else torch.tensor(chosen_lengths, dtype=torch.float64),
        rejected_lengths=ones if rejected_lengths is None else torch.tensor(rejected_lengths, dtype=torch.float64),
        chosen_nll=torch.tensor(nll, dtype=torch.float64),
        chosen_policy=policies[0],
        rejected_policy=policies[1],
        target=None if target is None else torch.tensor(target, dtype=torch.float64),
    )


def log_sigmoid(x):
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return math.exp(log_sigmoid(x))


rewards = st.floats(-20, 20)
smoothing = st.floats(0, 0.49)


def test_without_smoothing_a_margin_without_end_is_no_nan():
    """0 times the infinite loss of the flipped label would be."""
    found = LOSSES["sigmoid"](pair_scores([math.inf, 1.0], [0.0, 0.0]), 0.1, 0.0)
    assert found.tolist() == pytest.approx([0.0, -log_sigmoid(1.0)])


def test_one_loss_of_weight_one_is_the_loss_itself():
    scores = pair_scores([1.0, -2.0], [0.5, 3.0])
    alone = losses.pair_losses(scores, ["hinge"], [1.0], beta=0.1, label_smoothing=0.0)
    assert alone.tolist() == [0.5, 6.0]
    both = losses.pair_losses(scores, ["hinge", "sigmoid"], [0.5, 2.0], beta=0.1, label_smoothing=0.0)
    assert both.tolist() == pytest.approx([0.25 - 2 * log_sigmoid(0.5), 3.0 - 2 * log_sigmoid(-5.0)])


@given(rewards, rewards, rewards, rewards, smoothing)
def test_losses_equal_their_formulas(c, r, pc, pr, e):
    beta, m = 0.2, c - r
    scores = pair_scores([c], [r], [4.0], [5.0], nll=1.25, policies=([pc], [pr]))

    def smooth(x):
        return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)

    expected = {
        "sigmoid": smooth(m),
        "robust": (-(1 - e) * log_sigmoid(m) + e * log_sigmoid(-m)) / (1 - 2 * e),
        "hinge": max(0.0, 1 - m),
        "ipo": ((c / 4 - r / 5) / beta - 1 / (2 * beta)) ** 2,
        "sft": 1.25,
        "nca_pair": -log_sigmoid(c) - 0.5 * log_sigmoid(-c) - 0.5 * log_sigmoid(-r),
        "bco_pair": -log_sigmoid(c) - log_sigmoid(-r),
        "sppo_hard": ((c - 0.5) / beta) ** 2 + ((r + 0.5) / beta) ** 2,
        "aot": smooth(m),
        "aot_unpaired": smooth(m),
        "apo_zero": 1 - sigmoid(c) + sigmoid(r),
        "apo_down": sigmoid(c) + 1 - sigmoid(m),
        "discopop": -log_sigmoid(m) * sigmoid(-m / 0.05) + math.exp(log_sigmoid(m / 0.05) - m),
        "sigmoid_norm": -log_sigmoid(c / 4 - r / 5),
        "simpo": smooth(pc / 4 - pr / 5 - 0.5),
        "cpo": smooth(pc - pr) + 1.25,
    }
    if e > 1e-9:
        expected["exo_pair"] = sigmoid(m) * (log_sigmoid(m) - math.log1p(-e)) + sigmoid(-m) * (
            log_sigmoid(-m) - math.log(e)
        )
    assert {*expected, "exo_pair"} == LOSSES.keys() == KINDS.keys()
    for name, value in expected.items():
        got = LOSSES[name](scores, beta, e)
        assert got.shape == (1,)
        assert float(got) == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_sorted_losses_compare_quantiles_of_the_batch():
    c, r, pc, pr = [3.0, -1.0, 0.5], [1.0, 2.0, -4.0], [-9.0, -2.0, -7.0], [-1.0, -6.0, -3.0]
    scores = pair_scores(c, r, policies=(pc, pr))
    margins = sorted(a - b for a, b in zip(pc, pr, strict=True))
    reference = sorted((a - b) - (d - f) for a, b, d, f in zip(pc, c, pr, r, strict=True))
    expected = [-log_sigmoid(a - b) for a, b in zip(margins, reference, strict=True)]
    assert LOSSES["aot"](scores, 0.1, 0.0).tolist() == pytest.approx(expected)
    expected = [-log_sigmoid(a - b) for a, b in zip(sorted(c), sorted(r), strict=True)]
    assert LOSSES["aot_unpaired"](scores, 0.1, 0.0).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("m", [-500.0, -100.0, 100.0, 500.0])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_slopes_stay_finite_far_out(name, m):
    tensors = [torch.tensor([value], dtype=torch.float32, requires_grad=True) for value in (m, -m, m, -m)]
    one = torch.ones(1)
    scores = PairScores(
        chosen_rewards=tensors[0], rejected_rewards=tensors[1], chosen_lengths=one, rejected_lengths=one,
        chosen_nll=-tensors[2].sum(), chosen_policy=tensors[2], rejected_policy=tensors[3],
    )  # fmt: skip
    loss = LOSSES[name](scores, 0.1, 0.1 if KINDS[name].smooths else 0.0)
    found = torch.autograd.grad(loss.sum(), tensors, materialize_grads=True)
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("name", LOSSES)
def test_a_margin_of_the_pair_is_taken_off_where_it_enters(name):
    e = 0.1 if KINDS[name].smooths else 0.0
    given = {"policies": ([-1.0, -2.0], [-3.0, -1.5]), "nll": 2.0}
    plain = LOSSES[name](pair_scores([1.5, 0.5], [0.0, 0.2], **given), 0.2, e)
    found = LOSSES[name](pair_scores([1.5, 0.5], [0.0, 0.2], target=[0.7, -0.1], **given), 0.2, e)
    if not KINDS[name].takes_margins:
        torch.testing.assert_close(found, plain)
        return
    lower = {"policies": ([-1.7, -1.9], [-3.0, -1.5]), "nll": 2.0}  # of one term each, as simpo has it
    expected = LOSSES[name](pair_scores([0.8, 0.6], [0.0, 0.2], **lower), 0.2, e)
    torch.testing.assert_close(found, expected)


def test_preference_loss_weights_and_averages():
    scores = pair_scores([1.0, -2.0], [0.5, 3.0], nll=2.0)
    margins = [0.5, -5.0]
    expected = 0.7 * sum(-log_sigmoid(m) for m in margins) / 2 + 0.3 * 2.0
    got = preference_loss(scores, ["sigmoid", "sft"], [0.7, 0.3], beta=0.1, label_smoothing=0.0)
    assert float(got) == pytest.approx(expected)


def test_preference_loss_of_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError, match="kto_pair"):
        preference_loss(pair_scores([1.0], [0.0]), ["kto_pair"], [1.0], beta=0.1, label_smoothing=0.0)


def squared(scores, beta, label_smoothing):
    """(m - 1 + e)^2"""
    return (scores.margins - 1 + label_smoothing) ** 2


def test_a_loss_of_ones_own_is_named_like_the_others(known_losses):
    register_loss("squared", squared, smoothed=True)
    options = ObjectiveOptions(loss_type=("squared", "sft"), loss_weights=(0.5, 2.0), label_smoothing=0.25)
    scores = pair_scores([1.0, -2.0], [0.5, 3.0], nll=2.0)
    got = preference_loss(scores, options.loss_type, options.weights, beta=0.1, label_smoothing=0.25)
    assert float(got) == pytest.approx(0.5 * ((0.5 - 0.75) ** 2 + (-5 - 0.75) ** 2) / 2 + 2 * 2.0)
    register_loss("squared", squared)
    with pytest.raises(PlanError, match=r"label_smoothing=0.1 has no effect on loss_type \['squared'\]"):
        ObjectiveOptions(loss_type=("squared",), label_smoothing=0.1)


def test_a_loss_of_ones_own_is_found_where_it_stands(known_losses, tmp_path, monkeypatch):
    (tmp_path / "lasting_losses.py").write_text(
        "def doubled(scores, beta, label_smoothing):\n    return 2 * scores.margins"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("lasting_losses:doubled", f"{tmp_path / 'lasting_losses.py'}:doubled"):
        assert ObjectiveOptions(loss_type=(name,)).loss_type == (name,)
        got = preference_loss(pair_scores([1.0], [0.5]), [name], [1.0], beta=0.1, label_smoothing=0.0)
        assert float(got) == 1.0
    with pytest.raises(LoadingError, match=r"has no 'tripled'; its functions are \['doubled'\]"):
        ObjectiveOptions(loss_type=("lasting_losses:tripled",))


def test_losses_that_cannot_be_registered_are_refused_by_name(known_losses):
    with pytest.raises(PlanError, match="the name 'sigmoid' is taken by <function sigmoid_loss"):
        register_loss("sigmoid", squared)
    with pytest.raises(PlanError, match="name of a loss must be a text that is not empty, got ''"):
        register_loss("", squared)
    for wrong in (lambda scores: scores.margins, lambda scores, *, beta, label_smoothing: scores.margins):
        with pytest.raises(PlanError, match=r"'own' must be a function loss\(scores, beta, label_smoothing\)"):
            register_loss("own", wrong)
    register_loss("own", squared)
    register_loss("own", squared)
    namesake = lambda scores, beta, label_smoothing: scores.margins
    with pytest.raises(PlanError, match="'own' is taken by <function squared"):
        register_loss("own", namesake)
    assert LOSSES["own"] is squared


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda scores, beta, e: scores.margins.mean(), r"shape \(\)"),
        (lambda scores, beta, e: scores.margins[:, None] - scores.margins, r"shape \(2, 2\)"),
        (lambda scores, beta, e: 1.0, "float"),
    ],
)
def test_a_loss_returns_one_number_a_pair(known_losses, wrong, got):
    register_loss("own", wrong)
    with pytest.raises(PlanError, match=rf"'own' must return one loss a pair, shape \(2,\), got {got}"):
        preference_loss(pair_scores([1.0, 2.0], [0.0, 1.0]), ["own"], [1.0], beta=0.1, label_smoothing=0.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda scores, beta, e: scores.margins.mean(), r"must return one loss a pair, shape \(4,\), got shape \(\)"),
        (lambda scores, beta, e: 1.0, r"shape \(4,\), got float"),
        (lambda scores, beta, e: scores.margins.log(), "is not finite on rewards of -1.2 to 0.9: it gives"),
        (lambda scores, beta, e: (scores.margins > 0).long(), "is not finite"),
        (lambda scores, beta, e: scores.margins.detach() ** 2, "has no gradient"),
        (lambda scores, beta, e: torch.ones_like(scores.margins), "has no gradient"),
        (lambda scores, beta, e: (0 * scores.margins).sqrt(), "has a gradient that is not finite"),
        (lambda scores, beta, e: scores.kl, "fails on 4 pairs .AttributeError: .*see `PairScores`"),
    ],
)
def test_a_loss_of_ones_own_is_tried_out_before_training(known_losses, wrong, message):
    name = name_of(wrong)
    with pytest.raises(PlanError, match=f"loss_type '{re.escape(name)}' .*{message}"):
        ObjectiveOptions(loss_type=(name,))


def sorting(scores, beta, label_smoothing):
    return -scores.margins.sort().values


def likelihoods(scores, beta, label_smoothing):
    chosen, rejected = scores.policies()
    return torch.relu(1 - chosen + rejected) ** 2


def test_what_a_loss_is_shows_on_a_few_pairs(known_losses):
    names = {function: name_of(function) for function in (squared, sorting, likelihoods)}
    assert names[sorting] == f"{__name__}:sorting"
    assert name_of(sorting) == names[sorting]
    assert name_of(LOSSES["nca_pair"]) == "nca_pair"
    ObjectiveOptions(loss_type=tuple(names.values()))
    assert KINDS[names[squared]] == Kind(smooths=True, takes_margins=True)
    assert KINDS[names[sorting]] == Kind(takes_margins=True, compares_pairs=True)
    assert KINDS[names[likelihoods]] == Kind(needs_reference=False, needs_policy=True)
    assert not ObjectiveOptions(loss_type=(names[likelihoods],)).needs_reference
    first, second = (lambda scores, beta, e: -scores.margins for _ in range(2))
    assert name_of(first) == f"{__name__}:{first.__qualname__}"
    assert name_of(second) == f"{__name__}:{first.__qualname__}#2"


@given(st.lists(st.lists(st.floats(-300, 0), min_size=1, max_size=5), min_size=1, max_size=4))
def test_candidate_sums_equal_plain_exponentials(groups):
    joint = torch.tensor([value for group in groups for value in group], dtype=torch.float64)
    prompt = torch.tensor([p for p, group in enumerate(groups) for _ in group])
    log_sum = candidate_log_sum(joint, prompt, len(groups))
    weights = responsibilities(joint, prompt, len(groups))
    size = effective_sample_size(weights, prompt, len(groups))
    for p, group in enumerate(groups):
        total = sum(math.exp(value) for value in group)
        assert math.exp(float(log_sum[p])) == pytest.approx(total, rel=1e-9)
        shares = [math.exp(value) / total for value in group]
        assert weights[prompt == p].tolist() == pytest.approx(shares, rel=1e-9, abs=1e-12)
        assert float(size[p]) == pytest.approx(1 / sum(share**2 for share in shares), rel=1e-9)


def test_candidate_log_sum_survives_scores_far_below_underflow():
    joint = torch.tensor([-2000.0, -2001.0, -5.0])
    got = candidate_log_sum(joint, torch.tensor([0, 0, 1]), 2)
    assert got.tolist() == pytest.approx([-2000 + math.log1p(math.exp(-1)), -5.0])


def test_the_gradient_of_the_log_sum_is_the_responsibilities():
    joint = torch.tensor([-1.0, -3.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    prompt = torch.tensor([0, 0, 0, 1])
    candidate_log_sum(joint, prompt, 2).sum().backward()
    torch.testing.assert_close(joint.grad, responsibilities(joint.detach(), prompt, 2))
    torch.autograd.gradcheck(lambda x: candidate_log_sum(x, prompt, 2), (joint,))


def test_a_prompt_without_candidates_has_no_mass():
    assert candidate_log_sum(torch.tensor([0.0]), torch.tensor([1]), 2).tolist() == [-math.inf, 0.0]
