"""Owns counter-based randomness: a number depends only on its key, never on batch position, rank, device or order of calls.

The mixer is splitmix64's finaliser (Steele, Lea & Flood, OOPSLA 2014), in int64 arithmetic, which wraps alike on CPU and GPU.
"""
from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def fold(*parts: Tensor | int) -> Tensor:
    """One int64 key from several integers or int64 tensors (broadcast together). Order matters."""
    device = next((p.device for p in parts if isinstance(p, Tensor)), torch.device("cpu"))
    key = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        part = part if isinstance(part, Tensor) else torch.tensor(part, dtype=torch.int64, device=device)
        key = _mix((key + _GOLDEN) ^ _mix(part + _GOLDEN))
    return key


def uniform(key: Tensor) -> Tensor:
    """float64 in [0, 1), 53 random bits, one number per key."""
    return _shift_right(key, 11).to(torch.float64) * 2.0**-53


def integers(key: Tensor, high: int) -> Tensor:
    """int64 in [0, high), one per key."""
    return (uniform(key) * high).to(torch.int64)


def permutation(key: Tensor, count: int) -> Tensor:
    """A permutation of 0..count-1 fixed by a scalar key. int64 (count,)."""
    return torch.argsort(fold(key, torch.arange(count, device=key.device)), stable=True)
