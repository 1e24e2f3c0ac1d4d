"""Counter-based randomness: frozen values, independence of shape and order, uniformity."""
from __future__ import annotations

import pytest
import torch

from vlarl import rng

GOLDEN, MIX1, MIX2, WRAP = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 2**64


def _mix(x):
    """splitmix64's finaliser in unbounded integers."""
    x = (x ^ (x >> 30)) * MIX1 % WRAP
    x = (x ^ (x >> 27)) * MIX2 % WRAP
    return x ^ (x >> 31)


def _fold(*parts):
    key = 0
    for part in parts:
        key = _mix(((key + GOLDEN) % WRAP) ^ _mix((part + GOLDEN) % WRAP))
    return key if key < 2**63 else key - WRAP


def test_the_reference_mixer_is_splitmix64():
    assert _mix(GOLDEN) == 0xE220A8397B1DCDAF  # first output of splitmix64 seeded with 0


@pytest.mark.parametrize("parts", [(0,), (1,), (1, 2, 3), (-1, 5), (2**62, 2**63 - 1), (12345, 0, 0)])
def test_fold_wraps_like_unsigned_arithmetic(parts):
    assert rng.fold(*parts).item() == _fold(*parts)


def test_frozen_values():
    # A change here changes every run of every recipe.
    assert rng.fold(1, 2, 3).item() == 17824878756907967 == _fold(1, 2, 3)
    assert rng.uniform(rng.fold(torch.arange(3))).tolist() == [0.01403302919427496, 0.8662403237905675, 0.18350248126738766]
    assert rng.permutation(rng.fold(7), 6).tolist() == [1, 4, 3, 0, 2, 5]


def test_a_number_does_not_depend_on_the_others():
    uid, chunk, token = torch.arange(40), torch.arange(3), torch.arange(5)
    whole = rng.uniform(rng.fold(9, uid[:, None, None], chunk[:, None], token))
    assert whole.shape == (40, 3, 5)
    assert torch.equal(rng.uniform(rng.fold(9, uid[17:20, None, None], chunk[:, None], token)), whole[17:20])
    assert rng.uniform(rng.fold(9, 31, 2, 4)) == whole[31, 2, 4]
    order = torch.tensor([3, 0, 39])
    assert torch.equal(rng.uniform(rng.fold(9, uid[order, None, None], chunk[:, None], token)), whole[order])


def test_order_of_parts_and_their_number_matter():
    keys = {rng.fold(*parts).item() for parts in [(1, 2), (2, 1), (1,), (2,), (1, 2, 0), (0, 1, 2)]}
    assert len(keys) == 6


def test_no_collisions_on_a_grid():
    keys = rng.fold(1, torch.arange(200)[:, None, None], torch.arange(50)[:, None], torch.arange(56))
    assert keys.unique().numel() == keys.numel()


def test_uniformity():
    count, bins = 200_000, 100
    x = rng.uniform(rng.fold(3, torch.arange(count)))
    assert x.dtype == torch.float64
    assert x.min() >= 0 and x.max() < 1
    # Pearson's chi-square, 99 degrees of freedom: mean 99, standard deviation sqrt(198) = 14; the values are fixed, so is the outcome.
    observed = torch.histc(x, bins, 0, 1)
    chi_square = ((observed - count / bins).square() / (count / bins)).sum().item()
    assert 99 - 4 * 14 < chi_square < 99 + 4 * 14


def test_neighbouring_keys_are_uncorrelated():
    x = rng.uniform(rng.fold(torch.arange(300)[:, None], torch.arange(300))) - 0.5
    for shifted in (x[1:] * x[:-1], x[:, 1:] * x[:, :-1], x * x.T):
        off_diagonal = shifted[~torch.eye(*shifted.shape, dtype=torch.bool)]
        assert off_diagonal.mean().abs() * off_diagonal.numel() ** 0.5 < 5 / 12  # five standard errors; the product's is 1/12


def test_integers_cover_their_range():
    x = rng.integers(rng.fold(torch.arange(1000)), 7)
    assert x.dtype == torch.int64
    assert x.unique().tolist() == list(range(7))


def test_permutation():
    p = rng.permutation(rng.fold(1), 50)
    assert p.sort().values.tolist() == list(range(50))
    assert not torch.equal(p, rng.permutation(rng.fold(2), 50))
    assert rng.permutation(rng.fold(1), 0).shape == (0,)
