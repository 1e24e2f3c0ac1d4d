"""Distribution, sampling, log-prob and entropy, by hand."""
from __future__ import annotations

import math

import torch

from vlarl.policies.sampling import entropy, log_distribution, sample, token_logprob

# Probabilities 1/8, 1/2, 1/8, 1/4.
LOGITS = torch.tensor([[[1.0, 4.0, 1.0, 2.0]]], dtype=torch.float64).log()


def test_distribution_at_temperature_one_and_a_half() -> None:
    torch.testing.assert_close(log_distribution(LOGITS, 1.0, 0).exp()[0, 0], torch.tensor([1, 4, 1, 2], dtype=torch.float64) / 8)
    # Temperature 1/2 squares the weights: 1, 16, 1, 4 of 22.
    torch.testing.assert_close(log_distribution(LOGITS, 0.5, 0).exp()[0, 0], torch.tensor([1, 16, 1, 4], dtype=torch.float64) / 22)


def test_top_k_keeps_exactly_k_and_breaks_ties_downwards() -> None:
    torch.testing.assert_close(log_distribution(LOGITS, 1.0, 2).exp()[0, 0], torch.tensor([0, 2, 0, 1], dtype=torch.float64) / 3)
    # The two 1/8 tie for third place: the lower bin wins. 1, 4, 2 of 7.
    torch.testing.assert_close(log_distribution(LOGITS, 1.0, 3).exp()[0, 0], torch.tensor([1, 4, 0, 2], dtype=torch.float64) / 7)
    assert torch.equal(log_distribution(LOGITS, 1.0, 9), log_distribution(LOGITS, 1.0, 0))


def test_a_token_to_be_scored_is_always_among_the_k() -> None:
    # 1 and 3 are the two likeliest. Token 0 takes the place of 3: 1, 4 of 5; a token that is among them changes nothing.
    scored = log_distribution(LOGITS, 1.0, 2, torch.tensor([[0]]))
    torch.testing.assert_close(scored.exp()[0, 0], torch.tensor([1, 4, 0, 0], dtype=torch.float64) / 5)
    for token in (1, 3):
        assert torch.equal(log_distribution(LOGITS, 1.0, 2, torch.tensor([[token]])), log_distribution(LOGITS, 1.0, 2))
    assert torch.equal(log_distribution(LOGITS, 1.0, 0, torch.tensor([[0]])), log_distribution(LOGITS, 1.0, 0))


def test_inverse_cdf() -> None:
    # Cumulated: 1/8, 5/8, 6/8, 1. A noise on an edge belongs to the next bin.
    logp = log_distribution(LOGITS.expand(1, 7, 4), 1.0, 0)
    noise = torch.tensor([[0.0, 0.12, 0.13, 0.62, 0.63, 0.76, 1 - 2**-53]], dtype=torch.float64)
    assert sample(logp, noise).tolist() == [[0, 0, 1, 1, 2, 3, 3]]


def test_bins_without_probability_are_never_drawn() -> None:
    logp = log_distribution(LOGITS, 1.0, 2)  # 0, 2/3, 0, 1/3
    for noise in (0.0, 0.5, 0.67, 1 - 2**-53):
        assert sample(logp, torch.tensor([[noise]], dtype=torch.float64)).item() in (1, 3)
    last = torch.log(torch.tensor([[[0.3, 0.7, 0.0]]]))
    assert sample(last, torch.ones(1, 1)).item() == 1


def test_samples_follow_the_distribution() -> None:
    count = 20_000
    noise = (torch.arange(count, dtype=torch.float64) + 0.5)[:, None] / count
    drawn = sample(log_distribution(LOGITS.expand(count, 1, 4), 1.0, 0), noise)
    assert torch.bincount(drawn.flatten()).tolist() == [count // 8, count // 2, count // 8, count // 4]


def test_logprob_and_entropy() -> None:
    logp = log_distribution(LOGITS, 1.0, 0)
    assert math.isclose(token_logprob(logp, torch.tensor([[3]])).item(), -math.log(4))
    # 2 * 1/8 * log 8 + 1/2 * log 2 + 1/4 * log 4 = 1.75 log 2
    assert math.isclose(entropy(logp).item(), 1.75 * math.log(2))


def test_entropy_under_top_k_has_finite_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    value = entropy(log_distribution(logits, 1.0, 2))
    # 2/3 and 1/3.
    assert math.isclose(value.item(), math.log(3) - 2 / 3 * math.log(2))
    value.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 0, 0] == 0
