"""Losses against numbers worked out by hand; sums must not depend on how samples are split."""
from __future__ import annotations

import math

import pytest
import torch

from vlarl.algorithms.losses import entropy_sum, kl_sum, level_advantage, level_mask, policy_loss, ratio_level, value_loss

# Two chunks of K = 2 actions of A = 2 tokens; the second chunk's second action was not executed.
LOGPROB = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]])
VALID = torch.tensor([[True, True], [True, False]])


@pytest.mark.parametrize(
    ("level", "expected", "mask"),
    [
        ("token", [[1, 2, 4, 8], [1, 2, 0, 0]], [[True] * 4, [True, True, False, False]]),
        ("action", [[3, 12], [3, 0]], [[True, True], [True, False]]),
        ("chunk", [[15], [3]], [[True], [True]]),
    ],
)
def test_levels(level, expected, mask):
    assert ratio_level(LOGPROB, VALID, level).tolist() == expected
    assert level_mask(VALID, level, action_dim=2).tolist() == mask


def test_chunk_mask_of_an_idle_row():
    assert level_mask(torch.tensor([[False, False]]), "chunk", 2).tolist() == [[False]]


@pytest.mark.parametrize(
    ("advantage", "level", "expected"),
    [
        ([[5.0], [7.0]], "token", [[5, 5, 5, 5], [7, 7, 7, 7]]),
        ([[5.0], [7.0]], "action", [[5, 5], [7, 7]]),
        ([[5.0], [7.0]], "chunk", [[5], [7]]),
        ([[1.0, 3.0], [5.0, 9.0]], "token", [[1, 1, 3, 3], [5, 5, 9, 9]]),
        ([[1.0, 3.0], [5.0, 9.0]], "action", [[1, 3], [5, 9]]),
        ([[1.0, 3.0], [5.0, 9.0]], "chunk", [[2], [5]]),  # mean over executed actions
    ],
)
def test_advantage_levels(advantage, level, expected):
    assert level_advantage(torch.tensor(advantage), VALID, level, action_dim=2).tolist() == expected


def _from_ratio(ratio):
    old = torch.full((1, len(ratio)), -2.0, dtype=torch.float64)
    return (old + torch.tensor([ratio], dtype=torch.float64).log()).requires_grad_(), old


def test_policy_loss_by_hand():
    # clip to [0.8, 1.3]. Per entry -min(r A, clip(r) A):
    # r 1.0 A 2: -2;  r 1.5 A 2: -2.6 (stopped);  r 0.5 A 2: -1;  r 1.5 A -2: 3;  r 0.5 A -2: 1.6 (stopped)
    logprob, old = _from_ratio([1.0, 1.5, 0.5, 1.5, 0.5])
    advantage = torch.tensor([[2.0, 2.0, 2.0, -2.0, -2.0]], dtype=torch.float64)
    loss, stats = policy_loss(logprob, old, advantage, torch.ones_like(old), 0.2, 0.3)
    assert loss.item() == pytest.approx(-2 - 2.6 - 1 + 3 + 1.6)
    loss.backward()
    # d(-r A) / d logprob = -r A where the clip does not stop it
    assert logprob.grad.flatten().tolist() == pytest.approx([-2.0, 0.0, -1.0, 3.0, 0.0])
    assert (stats["count"].item(), stats["clipped"].item(), stats["dual_clipped"].item()) == (5, 2, 0)
    assert stats["ratio"].item() == pytest.approx(5.0)
    assert stats["ratio_max"].item() == pytest.approx(1.5)
    # k3: (r - 1) - log r; the four deviations sum to 0
    assert stats["approx_kl"].item() == pytest.approx(-2 * math.log(1.5) - 2 * math.log(0.5))


def test_dual_clip_bounds_the_loss_of_bad_actions():
    # r 5, A -2: -min(rA, clip(r)A) = 10, at most 3 * 2 = 6. r 5, A 2: dual clip does not apply: -1.3 * 2. r 2, A -2: 4 < 6.
    logprob, old = _from_ratio([5.0, 5.0, 2.0])
    advantage = torch.tensor([[-2.0, 2.0, -2.0]], dtype=torch.float64)
    loss, stats = policy_loss(logprob, old, advantage, torch.ones_like(old), 0.2, 0.3, dual_clip=3.0)
    assert loss.item() == pytest.approx(6 - 2.6 + 4)
    assert stats["dual_clipped"].item() == 1
    loss.backward()
    assert logprob.grad.flatten().tolist() == pytest.approx([0.0, 0.0, 4.0])


def test_entries_of_weight_zero_do_not_exist():
    logprob = torch.tensor([[0.0, 500.0]], requires_grad=True)  # exp(500) overflows
    old, weight = torch.tensor([[0.0, -500.0]]), torch.tensor([[2.0, 0.0]])
    loss, stats = policy_loss(logprob, old, torch.tensor([[3.0, math.nan]]), weight, 0.2, 0.2)
    (loss + entropy_sum(logprob, weight) + kl_sum(logprob, old, weight)).backward()
    assert loss.item() == -6.0
    assert logprob.grad.tolist() == [[-6.0 + 2.0, 0.0]]  # the k3 term is at its minimum: no gradient
    assert stats["ratio"].item() == stats["ratio_max"].item() == stats["count"].item() == 1


def test_empty_batch_keeps_the_graph():
    logprob = torch.zeros(2, 3, requires_grad=True)
    loss, _ = policy_loss(logprob, torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3), 0.2, 0.2)
    loss.backward()
    assert logprob.grad.tolist() == [[0.0] * 3] * 2


def test_value_loss_by_hand():
    # clip 0.2, no Huber, target 1. v .5 old .4: moved .1, both .5*.25 = .125.
    # v .9 old .4: clipped to .6: max(.5*.01, .5*.16) = .08 (stopped).  v 2 old .4: clipped .6: max(.5*1, .08) = .5
    value = torch.tensor([[0.5], [0.9], [2.0]], dtype=torch.float64, requires_grad=True)
    old = torch.full_like(value, 0.4)
    target, weight = torch.ones_like(old), torch.tensor([[1.0], [1.0], [3.0]], dtype=torch.float64)
    loss, stats = value_loss(value, old.detach(), target.detach(), weight, 0.2, None)
    assert loss.item() == pytest.approx(0.125 + 0.08 + 1.5)
    assert (stats["value_count"].item(), stats["value_clipped"].item()) == (3, 1)
    loss.backward()
    assert value.grad.flatten().tolist() == pytest.approx([-0.5, 0.0, 3.0])


def test_value_loss_huber():
    # errors 1 and -4 with huber 2: .5*1;  2*(4 - 1) = 6
    value = torch.tensor([[1.0, -4.0]])
    loss, stats = value_loss(value, torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), None, 2.0)
    assert loss.item() == 6.5
    assert stats["value_clipped"].item() == 0


def test_value_loss_ignores_weight_zero():
    value = torch.tensor([[1.0, math.inf]], requires_grad=True)
    loss, _ = value_loss(value, torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), 5.0, 10.0)
    loss.backward()
    assert loss.item() == 0.5
    assert value.grad.tolist() == [[1.0, 0.0]]


def test_entropy_and_kl_sums_by_hand():
    weight = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert entropy_sum(torch.tensor([[0.5, 0.25]], dtype=torch.float64), weight).item() == 1.0
    # d = log 2 and 0: 2 - 1 - log 2, and 0
    policy = torch.tensor([[-1.0, -1.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.0 + math.log(2), -1.0]], dtype=torch.float64)
    assert kl_sum(policy, reference, weight).item() == pytest.approx(1 - math.log(2))


def test_kl_estimator_is_right_in_expectation():
    policy, reference = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    estimated = kl_sum(policy.log()[None], reference.log()[None], policy[None])
    assert estimated.item() == pytest.approx((policy * (policy / reference).log()).sum().item())


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gradient_does_not_depend_on_the_split(parts):
    generator = torch.Generator().manual_seed(0)
    old, advantage = (torch.randn(8, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    start = old + 0.3 * torch.randn(8, 3, generator=generator, dtype=torch.float64)
    weight = (torch.rand(8, 3, generator=generator) < 0.7).double()
    whole = start.clone().requires_grad_()
    (policy_loss(whole, old, advantage, weight, 0.2, 0.28)[0] / weight.sum()).backward()
    split = start.clone().requires_grad_()
    for rows in torch.arange(8).chunk(parts):
        (policy_loss(split[rows], old[rows], advantage[rows], weight[rows], 0.2, 0.28)[0] / weight.sum()).backward()
    torch.testing.assert_close(split.grad, whole.grad, rtol=0, atol=1e-15)
