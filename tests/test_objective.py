import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sysdag.errors import LoadingError, PlanError
from sysdag.objectives.losses import (
    LOSSES,
    PairScores,
    candidate_log_sum,
    effective_sample_size,
    preference_loss,
    register_loss,
    responsibilities,
)
from sysdag.objectives.options import ObjectiveOptions


def pair_scores(chosen, rejected, chosen_lengths=None, rejected_lengths=None, nll=0.0):
    chosen, rejected = (torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected))
    ones = torch.ones_like(chosen)
    return PairScores(
        chosen_rewards=chosen,
        rejected_rewards=rejected,
        chosen_lengths=ones if chosen_lengths is None else torch.tensor(chosen_lengths, dtype=torch.float64),
        rejected_lengths=ones if rejected_lengths is None else torch.tensor(rejected_lengths, dtype=torch.float64),
        chosen_nll=torch.tensor(nll, dtype=torch.float64),
    )


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


rewards = st.floats(-20, 20)
smoothing = st.floats(0, 0.49)


@given(rewards, rewards, smoothing)
def test_losses_equal_their_formulas(chosen, rejected, e):
    beta, margin = 0.2, chosen - rejected
    scores = pair_scores([chosen], [rejected], [4.0], [5.0], nll=1.25)
    expected = {
        "sigmoid": -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin),
        "robust": (-(1 - e) * log_sigmoid(margin) + e * log_sigmoid(-margin)) / (1 - 2 * e),
        "hinge": max(0.0, 1 - margin),
        "ipo": ((chosen / 4 - rejected / 5) / beta - 1 / (2 * beta)) ** 2,
        "sft": 1.25,
    }
    assert expected.keys() == LOSSES.keys()
    for name, value in expected.items():
        got = LOSSES[name](scores, beta, e)
        assert got.shape == (1,)
        assert float(got) == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_preference_loss_weights_and_averages():
    scores = pair_scores([1.0, -2.0], [0.5, 3.0], nll=2.0)
    margins = [0.5, -5.0]
    expected = 0.7 * sum(-log_sigmoid(m) for m in margins) / 2 + 0.3 * 2.0
    got = preference_loss(scores, ["sigmoid", "sft"], [0.7, 0.3], beta=0.1, label_smoothing=0.0)
    assert float(got) == pytest.approx(expected)


def test_preference_loss_of_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError, match="exo_pair"):
        preference_loss(pair_scores([1.0], [0.0]), ["exo_pair"], [1.0], beta=0.1, label_smoothing=0.0)


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
