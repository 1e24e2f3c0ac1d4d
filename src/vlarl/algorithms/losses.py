"""Owns the losses, as sums: the caller divides by denominators added up over all ranks, so any rank count gives the same gradient.

Shapes: B samples (chunks), K actions per chunk, A numbers per action, N = K*A tokens (token k*A + a belongs to action k), J values
per chunk (K or 1), L entries per chunk at the chosen level: N (token), K (action) or 1 (chunk).
Weights are 0 where nothing was executed or a row is padding; entries of weight 0 contribute neither value nor gradient, whatever they hold.
Statistics are detached 0-d tensors: sums over entries of positive weight ("ratio_max" is a maximum). Nothing here waits for the device.
"""
from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Level = Literal["token", "action", "chunk"]


def ratio_level(logprob_BN: Tensor, valid_BK: Tensor, level: Level) -> Tensor:
    """Token log-probs (or entropies) summed to [B, L]; tokens of unexecuted actions count 0."""
    B, K = valid_BK.shape
    logprob_BKA = logprob_BN.unflatten(1, (K, -1))
    logprob_BKA = torch.where(valid_BK[..., None], logprob_BKA, 0.0)
    if level == "token":
        return logprob_BKA.flatten(1)
    return logprob_BKA.sum(-1) if level == "action" else logprob_BKA.sum((1, 2))[:, None]


def level_mask(valid_BK: Tensor, level: Level, action_dim: int) -> Tensor:
    """bool [B, L]: the entries that were executed (a chunk, if any of its actions was)."""
    if level == "chunk":
        return valid_BK.any(-1, keepdim=True)
    return valid_BK if level == "action" else valid_BK.repeat_interleave(action_dim, dim=1)


def level_advantage(advantage_BJ: Tensor, valid_BK: Tensor, level: Level, action_dim: int) -> Tensor:
    """Advantages at the ratio's level, [B, L]. Coarse ones are repeated over what they cover.

    Action-level advantages under a chunk-level ratio become their mean over the executed actions, which keeps their scale.
    """
    B, K = valid_BK.shape
    J = advantage_BJ.shape[1]
    assert J in (1, K), f"{J} advantages for {K} actions"
    if level == "chunk":
        if J == 1:
            return advantage_BJ
        return torch.where(valid_BK, advantage_BJ, 0.0).sum(-1, keepdim=True) / valid_BK.sum(-1, keepdim=True).clamp(min=1)
    advantage_BK = advantage_BJ.expand(B, K)
    return advantage_BK if level == "action" else advantage_BK.repeat_interleave(action_dim, dim=1)


def policy_loss(
    logprob_BL: Tensor,
    old_logprob_BL: Tensor,
    advantage_BL: Tensor,
    weight_BL: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logprob - old_logprob)  (Schulman et al., 2017).

    dual_clip c > 1: where A < 0 the term is at most -c A (Ye et al., 2020), which bounds the loss when r is large.
    Statistics: count; clipped, dual_clipped: entries whose gradient the clip has stopped; approx_kl: sum of (r - 1) - log r, the k3
    estimator of KL(old || new); ratio: sum of r; ratio_max.
    """
    mask_BL = weight_BL > 0
    log_ratio_BL = torch.where(mask_BL, logprob_BL - old_logprob_BL, 0.0)
    ratio_BL = log_ratio_BL.exp()
    advantage_BL = torch.where(mask_BL, advantage_BL, 0.0)
    clipped_BL = ratio_BL.clamp(1 - clip_low, 1 + clip_high)
    loss_BL = torch.maximum(-ratio_BL * advantage_BL, -clipped_BL * advantage_BL)
    negative_BL = advantage_BL < 0
    dual_BL = torch.zeros_like(mask_BL)
    if dual_clip is not None:
        dual_BL = negative_BL & (ratio_BL > dual_clip)
        loss_BL = torch.where(negative_BL, torch.minimum(loss_BL, -dual_clip * advantage_BL), loss_BL)
    with torch.no_grad():
        stopped_BL = ((advantage_BL > 0) & (ratio_BL > 1 + clip_high)) | (negative_BL & (ratio_BL < 1 - clip_low))
        stats = {
            "count": mask_BL.sum(),
            "clipped": stopped_BL.sum(),
            "dual_clipped": dual_BL.sum(),
            "approx_kl": (ratio_BL - 1 - log_ratio_BL).sum(),
            "ratio": (ratio_BL * mask_BL).sum(),
            "ratio_max": (ratio_BL * mask_BL).max(),
        }
    return (loss_BL * weight_BL).sum(), stats


def value_loss(
    value_BJ: Tensor, old_value_BJ: Tensor, target_BJ: Tensor, weight_BJ: Tensor, value_clip: float | None, huber: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of max(h(value - target), h(clipped value - target)); clipped = old + clamp(value - old, +-value_clip).

    h(x) = x^2 / 2, or Huber: huber * (|x| - huber / 2) where |x| > huber. None turns either off.
    Statistics: value_count; value_clipped: entries whose gradient the clip has stopped.
    """
    mask_BJ = weight_BJ > 0
    error_BJ = torch.where(mask_BJ, value_BJ - target_BJ, 0.0)
    loss_BJ = _half_square(error_BJ, huber)
    stopped_BJ = torch.zeros_like(mask_BJ)
    if value_clip is not None:
        moved_BJ = torch.where(mask_BJ, value_BJ - old_value_BJ, 0.0)
        clipped_error_BJ = torch.where(mask_BJ, old_value_BJ - target_BJ, 0.0) + moved_BJ.clamp(-value_clip, value_clip)
        clipped_loss_BJ = _half_square(clipped_error_BJ, huber)
        stopped_BJ = (clipped_loss_BJ > loss_BJ) & (moved_BJ.abs() > value_clip)
        loss_BJ = torch.maximum(loss_BJ, clipped_loss_BJ)
    return (loss_BJ * weight_BJ).sum(), {"value_count": mask_BJ.sum(), "value_clipped": stopped_BJ.sum()}


def entropy_sum(entropy_BL: Tensor, weight_BL: Tensor) -> Tensor:
    """Weighted sum of entropies (nats)."""
    return (torch.where(weight_BL > 0, entropy_BL, 0.0) * weight_BL).sum()


def kl_sum(logprob_BL: Tensor, reference_logprob_BL: Tensor, weight_BL: Tensor) -> Tensor:
    """Weighted sum of the k3 estimator of KL(policy || reference): exp(d) - 1 - d >= 0, d = reference - policy  (Schulman, 2020)."""
    difference_BL = torch.where(weight_BL > 0, reference_logprob_BL - logprob_BL, 0.0)
    return ((difference_BL.exp() - 1 - difference_BL) * weight_BL).sum()


def _half_square(error: Tensor, huber: float | None) -> Tensor:
    if huber is None:
        return 0.5 * error.square()
    size = error.abs()
    return torch.where(size <= huber, 0.5 * error.square(), huber * (size - 0.5 * huber))
