"""Owns the figures that tell whether an update is healthy: explained variance, finite gate, gap between rollout and training log-probs."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def value_moments(value: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted (count, sum target, sum target^2, sum error, sum error^2), error = target - value, float64 (5,). Adds up over ranks."""
    mask = weight > 0
    weight = weight.double()
    target = torch.where(mask, target, 0.0).double()
    error = target - torch.where(mask, value, 0.0).double()
    sums = (weight, weight * target, weight * target.square(), weight * error, weight * error.square())
    return torch.stack([s.sum() for s in sums])


def explained_variance(moments: Tensor) -> float:
    """1 - Var(error) / Var(target) from summed `value_moments`: 1 is perfect, 0 no better than a constant. 0 if targets do not vary."""
    count, target, target_square, error, error_square = moments.tolist()
    if count == 0:
        return 0.0
    target_variance = target_square / count - (target / count) ** 2
    error_variance = error_square / count - (error / count) ** 2
    if target_variance <= 1e-12 * (target_square / count):  # nothing but rounding
        return 0.0
    return 1.0 - error_variance / target_variance


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """bool 0-d, on the tensors' device: no NaN and no infinity anywhere. True for no tensors. Sharded gradients: pass the local shards."""
    finite = [t.isfinite().all() for t in tensors]
    return torch.stack(finite).all() if finite else torch.tensor(True)


def logprob_gap(logprob: Tensor, rollout_logprob: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """|logprob - rollout_logprob| where mask, nats: gap_count, gap_sum (add up over ranks), gap_max (take the largest).

    A NaN shows in sum and max. 0-d float64 tensors.
    """
    gap = (logprob.detach() - rollout_logprob).abs()[mask].double()
    count = gap.numel()
    zero = torch.zeros((), dtype=torch.float64, device=gap.device)
    if count == 0:
        return {"gap_count": zero, "gap_sum": zero, "gap_max": zero}
    return {"gap_count": zero + count, "gap_sum": gap.sum(), "gap_max": gap.max()}
