"""Advantages against numbers worked out by hand and a slow reference written from the definition."""
from __future__ import annotations

import math

import pytest
import torch

from vlarl.algorithms.advantages import gae, group_advantage, length_weight, moments, normalize

NEVER = [[False]] * 3


def _chunk_gae(reward, value, last, terminated=NEVER, truncated=NEVER, valid=None, final=None, bootstrap="truncation"):
    """One slot, K = 1, J = 1, gamma = lambda = 0.5; lists over T."""
    def column(rows, dtype):
        return torch.tensor(rows, dtype=dtype).reshape(3, 1, 1)

    advantage, returns = gae(
        column(reward, torch.float64), column(value, torch.float64), torch.tensor([[last]], dtype=torch.float64),
        column(final or [0, 0, 0], torch.float64), column(terminated, torch.bool), column(truncated, torch.bool),
        column(valid or [True] * 3, torch.bool), 0.5, 0.5, bootstrap,
    )
    return advantage.flatten().tolist(), returns.flatten().tolist()


def test_chunk_level_without_end():
    # delta = [1 + .5*2 - 1, 0 + .5*4 - 2, 2 + .5*8 - 4] = [1, 0, 2];  A2 = 2, A1 = 0 + .25*2, A0 = 1 + .25*.5
    advantage, returns = _chunk_gae([1, 0, 2], [1, 2, 4], 8)
    assert advantage == [1.125, 0.5, 2.0]
    assert returns == [2.125, 2.5, 6.0]  # advantage + value


def test_termination_cuts_and_does_not_bootstrap():
    # delta1 = 0 - 2 = -2 = A1;  A0 = 1 + .25*(-2);  the final value 6 is not used
    advantage, _ = _chunk_gae([1, 0, 2], [1, 2, 4], 8, terminated=[False, True, False], final=[0, 6, 0])
    assert advantage == [0.5, -2.0, 2.0]


@pytest.mark.parametrize(("flags", "bootstrap"), [("truncated", "truncation"), ("truncated", "always"), ("terminated", "always")])
def test_bootstrap_from_final_observation(flags, bootstrap):
    # delta1 = 0 + .5*6 - 2 = 1 = A1;  A0 = 1 + .25*1
    advantage, _ = _chunk_gae([1, 0, 2], [1, 2, 4], 8, **{flags: [False, True, False]}, final=[0, 6, 0], bootstrap=bootstrap)
    assert advantage == [1.25, 1.0, 2.0]


def test_terminated_and_truncated_counts_as_terminated():
    end = [False, True, False]
    advantage, _ = _chunk_gae([1, 0, 2], [1, 2, 4], 8, terminated=end, truncated=end, final=[0, 6, 0])
    assert advantage == [0.5, -2.0, 2.0]


def test_idle_row_is_skipped():
    # Rows 0 and 2 follow each other: delta2 = 2 = A2, delta0 = 1 + .5*4 - 1 = 2, A0 = 2 + .25*2. What the idle row holds is ignored.
    advantage, returns = _chunk_gae([1, math.nan, 2], [1, math.nan, 4], 8, valid=[True, False, True], terminated=[False, True, False])
    assert advantage == [2.5, 0.0, 2.0]
    assert returns == [3.5, 0.0, 6.0]


@pytest.mark.parametrize(("truncated", "first"), [(False, 0.0), (True, 3.0)])
def test_action_level_with_end_inside_chunk(truncated, first):
    # Chunk 0: action 0 (V 1, r 1) ends the episode, action 1 is not executed. Chunk 1: V 2, 4; r 0, 1; last value 8 (read at [0]).
    # A[1,1] = 1 + .5*8 - 4 = 1;  A[1,0] = 0 + .5*4 - 2 + .25*1 = .25;  A[0,0] = 1 - 1 = 0, or 1 + .5*6 - 1 = 3 if truncated
    end = torch.tensor([[[True, False]], [[False, False]]])
    advantage, returns = gae(
        reward_TBK=torch.tensor([[[1.0, 5.0]], [[0.0, 1.0]]]), value_TBJ=torch.tensor([[[1.0, 9.0]], [[2.0, 4.0]]]),
        last_value_BJ=torch.tensor([[8.0, -50.0]]), final_value_TBJ=torch.tensor([[[6.0, 99.0]], [[0.0, 0.0]]]),
        terminated_TBK=torch.zeros_like(end) if truncated else end, truncated_TBK=end if truncated else torch.zeros_like(end),
        valid_TBK=torch.tensor([[[True, False]], [[True, True]]]), gamma=0.5, gae_lambda=0.5, bootstrap="truncation",
    )
    assert advantage.tolist() == [[[first, 0.0]], [[0.25, 1.0]]]
    assert returns.tolist() == [[[first + 1, 0.0]], [[2.25, 5.0]]]


def test_chunk_level_sums_executed_rewards():
    # r = 1 + 2 (the third action is not executed), terminated: A = 3 - 0.5
    advantage, _ = gae(
        torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[[0.5]]]), torch.tensor([[7.0]]), torch.zeros(1, 1, 1),
        torch.tensor([[[False, True, False]]]), torch.zeros(1, 1, 3, dtype=torch.bool), torch.tensor([[[True, True, False]]]),
        0.9, 0.9, "truncation",
    )
    assert advantage.item() == 2.5


def _random_rollout(generator, T, B, K, J):
    """Episodes of random length, ending inside chunks by either flag, with idle rows; unexecuted entries hold garbage."""
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reward, value, last, final = draw(T, B, K), draw(T, B, J), draw(B, J), draw(T, B, J)
    terminated, truncated, valid = (torch.zeros(T, B, K, dtype=torch.bool) for _ in range(3))
    for t in range(T):
        for b in range(B):
            if torch.rand((), generator=generator) < 0.2:
                continue
            end = int(torch.randint(0, 2 * K, (), generator=generator))
            valid[t, b, : end + 1] = True
            if end < K:
                flag = int(torch.randint(0, 3, (), generator=generator))
                terminated[t, b, end] = flag != 1
                truncated[t, b, end] = flag != 0
    return reward, value, last, final, terminated, truncated, valid


def _reference(reward, value, last, final, terminated, truncated, valid, gamma, lam, bootstrap):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l} up to the end of the episode, one slot and one step at a time."""
    T, B, K = reward.shape
    J = value.shape[-1]
    advantage = torch.zeros(T, B, J, dtype=torch.float64)
    for b in range(B):
        steps = []  # (t, j, reward, value, ended, value after the end)
        for t in range(T):
            groups = [[k] for k in range(K)] if J == K else [list(range(K))]
            for j, actions in enumerate(groups):
                done = [k for k in actions if valid[t, b, k]]
                if not done:
                    continue
                term, trunc = any(terminated[t, b, k] for k in done), any(truncated[t, b, k] for k in done)
                future = final[t, b, 0].item() if (bootstrap == "always" or not term) else 0.0
                steps.append((t, j, sum(reward[t, b, k].item() for k in done), value[t, b, j].item(), term or trunc, future))
        for i, (t, j, *_) in enumerate(steps):
            total = 0.0
            for l_, (_, _, r, v, ended, future) in enumerate(steps[i:]):
                follower = i + l_ + 1
                after = future if ended else (steps[follower][3] if follower < len(steps) else last[b, 0].item())
                total += (gamma * lam) ** l_ * (r + gamma * after - v)
                if ended:
                    break
            advantage[t, b, j] = total
    return advantage


@pytest.mark.parametrize("bootstrap", ["truncation", "always"])
@pytest.mark.parametrize(("K", "J"), [(1, 1), (3, 1), (3, 3)])
def test_against_reference(K, J, bootstrap):
    generator = torch.Generator().manual_seed(10 * K + J)
    for _ in range(5):
        rollout = _random_rollout(generator, T=7, B=4, K=K, J=J)
        advantage, returns = gae(*rollout, 0.97, 0.9, bootstrap)
        expected = _reference(*rollout, 0.97, 0.9, bootstrap)
        torch.testing.assert_close(advantage, expected, rtol=1e-12, atol=1e-12)
        valid = rollout[-1] if J == K else rollout[-1].any(-1, keepdim=True)
        torch.testing.assert_close(returns, torch.where(valid, expected + rollout[1], 0.0), rtol=1e-12, atol=1e-12)


def test_half_precision_values_are_computed_in_float32():
    advantage, _ = gae(
        torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.5, dtype=torch.bfloat16), torch.zeros(1, 1), torch.zeros(1, 1, 1),
        *(torch.zeros(1, 1, 1, dtype=torch.bool) for _ in range(2)), torch.ones(1, 1, 1, dtype=torch.bool), 0.99, 0.95, "truncation",
    )
    assert advantage.dtype == torch.float32


# Group 7: returns 1 0 1 1, mean .75, std sqrt(.1875); group 2: 2 2, no spread; group 9: 0 3, mean 1.5, std 1.5. Interleaved on purpose.
RETURNS = torch.tensor([1.0, 2.0, 0.0, 0.0, 1.0, 2.0, 1.0, 3.0])
GROUPS = torch.tensor([7, 2, 9, 7, 7, 2, 7, 9])
SUCCESS = torch.tensor([True, True, False, False, True, True, True, True])


def test_group_advantage_by_hand():
    advantage, keep = group_advantage(RETURNS, GROUPS, SUCCESS, eps=0.0)
    high, low = 0.25 / math.sqrt(0.1875), -0.75 / math.sqrt(0.1875)
    torch.testing.assert_close(advantage, torch.tensor([high, 0, -1, low, high, 0, high, 1]))
    assert keep.tolist() == [True, False, True, True, True, False, True, True]


def test_group_success_filter_is_closed():
    # Success rates: group 7 3/4, group 9 1/2.
    _, keep = group_advantage(RETURNS, GROUPS, SUCCESS, (0.5, 0.7))
    assert keep.tolist() == [False, False, True, False, False, False, False, True]


def test_equal_returns_carry_no_signal_whatever_the_rounding():
    returns = torch.full((7,), 0.1, dtype=torch.float64)
    _, keep = group_advantage(returns, torch.zeros(7, dtype=torch.int64), torch.ones(7, dtype=torch.bool))
    assert not keep.any()


def test_no_episodes():
    advantage, keep = group_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    assert advantage.shape == keep.shape == (0,)


def test_normalize_is_the_same_for_any_split():
    # 1 2 3 4 (the masked 100 does not count): mean 2.5, std sqrt(1.25)
    x, mask = torch.tensor([1.0, 2.0, 100.0, 3.0, 4.0]), torch.tensor([True, True, False, True, True])
    whole = moments(x, mask)
    assert whole.tolist() == [4.0, 10.0, 30.0]
    torch.testing.assert_close(whole, moments(x[:2], mask[:2]) + moments(x[2:], mask[2:]))
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5]) / math.sqrt(1.25)
    torch.testing.assert_close(normalize(x, whole, eps=0.0)[mask], expected)


def test_normalize_without_samples_is_finite():
    assert normalize(torch.zeros(3), torch.zeros(3, dtype=torch.float64)).isfinite().all()


def test_length_weight_gives_every_episode_the_same_total():
    length = torch.tensor([2, 8, 16, 0])
    weight = length_weight(length, 16)
    assert weight.tolist() == [8.0, 2.0, 1.0, 0.0]
    assert (weight * length).tolist() == [16.0, 16.0, 16.0, 0.0]
