"""Owns advantages: generalised advantage estimation, group-relative advantages, global normalisation, length weights. Pure functions.

Shapes: T chunk steps, B slots, E episodes, K actions per chunk, J values per chunk (K or 1), S steps of one time sequence.
"""
from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Bootstrap = Literal["truncation", "always"]


def gae(
    reward_TBK: Tensor,
    value_TBJ: Tensor,
    last_value_BJ: Tensor,
    final_value_TBJ: Tensor,
    terminated_TBK: Tensor,
    truncated_TBK: Tensor,
    valid_TBK: Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap: Bootstrap,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (advantage + value), both [T, B, J], 0 where nothing was executed.

    delta_t = r_t + gamma V_{t+1} (1 - end_t) - V_t;  A_t = delta_t + gamma lambda (1 - end_t) A_{t+1}  (Schulman et al., 2016).
    At the end of an episode V(final observation) stands in for V_{t+1} if it was truncated, or always with `bootstrap="always"`;
    otherwise 0. An episode flagged both terminated and truncated counts as terminated.

    J = 1: a step is a chunk (its reward is the sum over executed actions; gamma discounts per chunk). J = K: a step is an action; the
    T*K actions of a slot form one sequence from which the unexecuted ones are left out. Only the first of the J values of an
    observation is the value of that observation, so `last_value_BJ` and `final_value_TBJ` are read at [..., 0].
    """
    T, B, J = value_TBJ.shape
    K = reward_TBK.shape[-1]
    assert J in (1, K), f"{J} values for {K} actions"
    dtype = torch.promote_types(value_TBJ.dtype, torch.float32)
    reward_TBK = torch.where(valid_TBK, reward_TBK, 0.0).to(dtype)
    terminated_TBK, truncated_TBK = terminated_TBK & valid_TBK, truncated_TBK & valid_TBK
    final_TB = final_value_TBJ[..., 0].to(dtype)
    if J == 1:
        reward_SB, value_SB, final_SB = reward_TBK.sum(-1), value_TBJ[..., 0].to(dtype), final_TB
        terminated_SB, truncated_SB, valid_SB = terminated_TBK.any(-1), truncated_TBK.any(-1), valid_TBK.any(-1)
    else:
        reward_SB, value_SB = _actions_in_a_row(reward_TBK), _actions_in_a_row(value_TBJ.to(dtype))
        final_SB = final_TB.repeat_interleave(K, dim=0)
        terminated_SB, truncated_SB, valid_SB = (_actions_in_a_row(x) for x in (terminated_TBK, truncated_TBK, valid_TBK))
    end_SB = terminated_SB | truncated_SB
    has_future_SB = end_SB if bootstrap == "always" else truncated_SB & ~terminated_SB
    after_end_SB = torch.where(has_future_SB, final_SB, 0.0)

    advantage_SB = torch.zeros_like(value_SB)
    next_value_B = last_value_BJ[..., 0].to(dtype)
    next_advantage_B = torch.zeros_like(next_value_B)
    for s in range(value_SB.shape[0] - 1, -1, -1):
        end_B, valid_B = end_SB[s], valid_SB[s]
        delta_B = reward_SB[s] + gamma * torch.where(end_B, after_end_SB[s], next_value_B) - value_SB[s]
        step_B = delta_B + gamma * gae_lambda * torch.where(end_B, 0.0, next_advantage_B)
        advantage_SB[s] = torch.where(valid_B, step_B, 0.0)
        # An unexecuted step is as if it were not there: what follows it follows the step before.
        next_value_B = torch.where(valid_B, value_SB[s], next_value_B)
        next_advantage_B = torch.where(valid_B, step_B, next_advantage_B)
    return_SB = torch.where(valid_SB, advantage_SB + value_SB, 0.0)
    return _as_chunks(advantage_SB, J), _as_chunks(return_SB, J)


def group_advantage(
    return_E: Tensor, group_E: Tensor, success_E: Tensor, success_range: tuple[float, float] = (0.0, 1.0), eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """GRPO: (R - mean_group) / (std_group + eps), population std, and which episodes carry a signal.

    return_E float, group_E int64 (any numbers >= 0), success_E bool. Returns advantage_E (dtype of return_E) and keep_E bool: False
    (with advantage 0) where the group's success rate lies outside the closed `success_range` or all its returns are equal.
    A group may span ranks: pass the episodes of all ranks, ordered by uid so that every rank count adds up in the same order.
    """
    assert bool((group_E >= 0).all()), "an episode without a group has no group-relative advantage"
    _, index_E = torch.unique(group_E, return_inverse=True)
    groups = int(index_E.max()) + 1 if index_E.numel() else 0
    value_E = return_E.double()

    def mean_in_group(x_E: Tensor) -> Tensor:
        return (torch.zeros(groups, dtype=torch.float64, device=x_E.device).index_add(0, index_E, x_E) / size_G)[index_E]

    size_G = torch.bincount(index_E, minlength=groups).double()
    centered_E = value_E - mean_in_group(value_E)
    std_E = mean_in_group(centered_E.square()).sqrt()
    rate_E = mean_in_group(success_E.double())
    # "All equal" is asked of the returns themselves: the std of equal numbers may round to something above 0.
    empty_G = torch.zeros(groups, dtype=torch.float64, device=return_E.device)
    high_G = empty_G.scatter_reduce(0, index_E, value_E, "amax", include_self=False)
    low_G = empty_G.scatter_reduce(0, index_E, value_E, "amin", include_self=False)
    keep_E = (high_G > low_G)[index_E] & (rate_E >= success_range[0]) & (rate_E <= success_range[1])
    advantage_E = torch.where(keep_E, centered_E / (std_E + eps), 0.0)
    return advantage_E.to(return_E.dtype), keep_E


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """(count, sum, sum of squares) of x where mask, float64 (3,). Add them up over all ranks before `normalize`."""
    kept = torch.where(mask, x, 0.0).double()
    return torch.stack((mask.sum().double(), kept.sum(), kept.square().sum()))


def normalize(x: Tensor, moments: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / (std + eps) with the population std of the summed `moments`; entries outside their mask are meaningless."""
    count, total, total_square = moments.unbind()
    mean = total / count.clamp(min=1)
    std = (total_square / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    return ((x - mean) / (std + eps)).to(x.dtype)


def length_weight(length_E: Tensor, horizon: int) -> Tensor:
    """horizon / length, float32 (E,); 0 for length 0. Given to each of an episode's samples, every episode adds up to `horizon`.

    `length_E` counts what the weight multiplies (executed actions for action or token ratios, chunks for chunk ratios). Divided by the
    global sum of weights, the loss is the mean over episodes of each one's mean.
    """
    length_E = length_E.to(torch.float32)
    return torch.where(length_E > 0, horizon / length_E.clamp(min=1), 0.0)


def _actions_in_a_row(x_TBK: Tensor) -> Tensor:
    """[T, B, K] -> [T*K, B], in the order of execution."""
    return x_TBK.transpose(1, 2).flatten(0, 1)


def _as_chunks(x_SB: Tensor, J: int) -> Tensor:
    """[T*J, B] -> [T, B, J]: the inverse of `_actions_in_a_row`."""
    return x_SB.unflatten(0, (-1, J)).transpose(1, 2).contiguous()
