import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sysdag.objectives.losses import (
    LOSSES,
    PairScores,
    candidate_log_sum,
    effective_sample_size,
    preference_loss,
    responsibilities,
)


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
