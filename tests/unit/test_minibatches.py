"""Minibatches: every sample once, balanced, and the same union for any number of ranks."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlarl.algorithms.minibatches import microbatches, slot_minibatches


def _samples(index, slot_B):
    """Flat indices as (step, global slot)."""
    B = slot_B.shape[0]
    return {(i // B, slot_B[i % B].item()) for i in index.tolist()}


def _keep(T, B, share, seed):
    return torch.rand(T, B, generator=torch.Generator().manual_seed(seed)) < share


@settings(max_examples=40, deadline=None)
@given(T=st.integers(1, 9), B=st.integers(1, 12), M=st.integers(1, 6), share=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 99))
def test_every_kept_sample_exactly_once(T, B, M, share, seed):
    keep = _keep(T, B, share, seed)
    parts = slot_minibatches(keep, torch.arange(B), seed, 1, 0, M)
    assert len(parts) == M
    assert torch.equal(torch.cat(parts).sort().values, keep.flatten().nonzero()[:, 0])


@settings(max_examples=25, deadline=None)
@given(T=st.integers(1, 9), M=st.integers(1, 5), seed=st.integers(0, 99), ranks=st.sampled_from([2, 4, 8]))
def test_union_is_the_same_for_any_rank_count(T, M, seed, ranks):
    keep, slot = _keep(T, 8, 0.8, seed), torch.arange(8)
    whole = [_samples(part, slot) for part in slot_minibatches(keep, slot, 5, seed, 2, M)]
    union = [set() for _ in range(M)]
    for columns in slot.chunk(ranks):
        for m, part in enumerate(slot_minibatches(keep[:, columns], slot[columns], 5, seed, 2, M)):
            union[m] |= _samples(part, slot[columns])
    assert union == whole


def test_rows_that_others_fill_change_nothing():
    """A second round of episodes begins after the longest first one of its rank: at another row, but with the same samples."""
    keep, slot = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 0], [1, 1], [1, 1], [1, 1]], dtype=torch.bool), torch.arange(4, 6)
    early = torch.cat([keep[:3], keep[4:]])
    for number in range(2):
        column = slice(number, number + 1)
        late, soon = (slot_minibatches(k[:, column], slot[column], 1, 2, 3, 3) for k in (keep, early))
        rows = early[:, number].nonzero()[:, 0].tolist(), keep[:, number].nonzero()[:, 0].tolist()
        numbered = [[[where.index(i) for i in part.tolist()] for part in parts] for where, parts in zip(rows, (soon, late), strict=True)]
        assert numbered[0] == numbered[1]


def test_every_slot_is_dealt_out_evenly_and_remainders_are_spread():
    # 6 samples per slot over 4 minibatches: 1 or 2 each; over 4 slots in a row the rotation evens them out to 6 each.
    slot = torch.arange(100, 108)
    parts = slot_minibatches(torch.ones(6, 8, dtype=torch.bool), slot, 1, 1, 0, 4)
    assert [len(p) for p in parts] == [12, 12, 12, 12]
    for part in parts:
        assert all(n in (1, 2) for n in torch.bincount(part % 8, minlength=8).tolist())
    for columns in (slice(0, 4), slice(4, 8)):  # and so does each of two ranks
        assert [len(p) for p in slot_minibatches(torch.ones(6, 4, dtype=torch.bool), slot[columns], 1, 1, 0, 4)] == [6, 6, 6, 6]


@pytest.mark.parametrize("change", [{"seed": 2}, {"update": 2}, {"epoch": 2}])
def test_the_key_matters(change):
    key = {"seed": 1, "update": 1, "epoch": 1}
    keep, slot = torch.ones(16, 4, dtype=torch.bool), torch.arange(4)
    first, again, other = (slot_minibatches(keep, slot, **k, minibatches=2) for k in (key, key, key | change))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_slots_use_different_permutations():
    first = slot_minibatches(torch.ones(32, 2, dtype=torch.bool), torch.tensor([0, 2]), 1, 1, 0, 2)[0]
    assert set((first[first % 2 == 0] // 2).tolist()) != set((first[first % 2 == 1] // 2).tolist())


def test_microbatches_pad_with_weight_zero():
    pieces = microbatches(torch.tensor([7, 8, 9]), size=2, count=3)
    assert [i.tolist() for i, _ in pieces] == [[7, 8], [9, 0], [0, 0]]
    assert [w.tolist() for _, w in pieces] == [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


def test_microbatches_refuse_what_does_not_fit():
    with pytest.raises(AssertionError):
        microbatches(torch.arange(5), size=2, count=2)
