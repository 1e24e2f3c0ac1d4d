"""Owns who learns from what when: minibatches stratified over global slots, and their split into forward passes.

Every slot deals its own samples out by a permutation keyed by (seed, update, epoch, slot). A rank needs to know only its own slots, and
the union over ranks is the same minibatch for any number of ranks, without communication.
"""
from __future__ import annotations

import torch
from torch import Tensor

from vlarl import rng


def slot_minibatches(keep_TB: Tensor, slot_B: Tensor, seed: int, update: int, epoch: int, minibatches: int) -> list[Tensor]:
    """Deals the samples where `keep_TB` (bool) into `minibatches` parts, each sample into exactly one.

    slot_B int64: global slot numbers of the columns. Returns int64 tensors of flat indices t*B + b, ascending; some may be empty.
    Slot s with n samples gives part m the samples floor(m n / M) .. floor((m+1) n / M) of its permutation, and part m goes to minibatch
    (m + s) mod M, so that what does not divide evenly is spread over the minibatches and not piled on one of them.
    """
    # A sample's number among its slot's own, and not its row: rows that only others fill differ with the number of ranks.
    number_TB = (keep_TB.cumsum(0) - 1).clamp(min=0)
    key_TB = rng.fold(seed, update, epoch, slot_B[None], number_TB)
    order_TB = torch.argsort(key_TB, dim=0, stable=True)
    kept_TB = keep_TB.gather(0, order_TB)
    position_TB = kept_TB.cumsum(0) - 1  # among the slot's kept samples, in the order of the permutation
    count_B = keep_TB.sum(0).clamp(min=1)
    part_TB = ((position_TB + 1) * minibatches - 1) // count_B  # the m with floor(m n / M) <= position < floor((m+1) n / M)
    assigned_TB = torch.where(kept_TB, (part_TB + slot_B) % minibatches, -1)
    minibatch_TB = torch.empty_like(assigned_TB).scatter_(0, order_TB, assigned_TB)
    return [(minibatch_TB == m).flatten().nonzero()[:, 0] for m in range(minibatches)]


def microbatches(index: Tensor, size: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Splits `index` (int64, at most size * count) into exactly `count` pieces of `size`: (index, weight float32 of 0 or 1).

    Missing entries are index 0 with weight 0, so that ranks with fewer samples still make the same calls on the same shapes.
    """
    samples = index.shape[0]
    assert samples <= size * count, f"{samples} samples do not fit into {count} forward passes of {size}"
    padded = torch.zeros(size * count, dtype=torch.int64, device=index.device)
    padded[:samples] = index
    weight = (torch.arange(size * count, device=index.device) < samples).float()
    return list(zip(padded.split(size), weight.split(size), strict=True))
