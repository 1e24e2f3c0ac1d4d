"""Health figures against numbers worked out by hand."""
from __future__ import annotations

import math

import pytest
import torch

from vlarl.algorithms.health import all_finite, explained_variance, logprob_gap, value_moments

TARGET = torch.tensor([0.0, 1.0, 2.0, 3.0])
ONE = torch.ones(4)


def test_explained_variance_by_hand():
    # errors 0 0 1 1: variance 1/4; targets: variance 5/4; 1 - (1/4) / (5/4)
    value = torch.tensor([0.0, 1.0, 1.0, 2.0])
    assert explained_variance(value_moments(value, TARGET, ONE)) == pytest.approx(0.8)
    assert explained_variance(value_moments(TARGET + 5, TARGET, ONE)) == pytest.approx(1.0)  # a constant error does not count
    assert explained_variance(value_moments(torch.zeros(4), TARGET, ONE)) == pytest.approx(0.0)
    assert explained_variance(value_moments(-TARGET, TARGET, ONE)) == pytest.approx(-3.0)


def test_explained_variance_adds_up_over_ranks_and_ignores_weight_zero():
    value, target = torch.tensor([0.0, 1.0, 1.0, 2.0, math.nan]), torch.cat([TARGET, torch.tensor([math.inf])])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    total = value_moments(value[:3], target[:3], weight[:3]) + value_moments(value[3:], target[3:], weight[3:])
    assert explained_variance(total) == pytest.approx(0.8)


@pytest.mark.parametrize("count", [0, 3])
def test_explained_variance_of_constant_targets(count):
    constant = torch.full((count,), 0.1)
    assert explained_variance(value_moments(torch.randn(count), constant, torch.ones(count))) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_gate(bad):
    good = [torch.ones(3), torch.zeros(0), torch.zeros(2, 2, dtype=torch.bfloat16)]
    assert all_finite(good).item()
    assert not all_finite([*good, torch.tensor([1.0, bad])]).item()
    assert all_finite([]).item()


def test_logprob_gap_by_hand():
    # gaps 1..200 (and one masked): sum 20100, max 200
    gap = torch.arange(1.0, 202.0)
    mask = gap <= 200
    stats = logprob_gap(-gap, torch.zeros(201), mask)
    assert {k: v.item() for k, v in stats.items()} == {"gap_count": 200.0, "gap_sum": 20100.0, "gap_max": 200.0}


def test_logprob_gap_without_entries_and_with_nan():
    nothing = logprob_gap(torch.ones(2), torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    assert [v.item() for v in nothing.values()] == [0.0] * 3
    broken = logprob_gap(torch.tensor([math.nan, 0.0]), torch.zeros(2), torch.ones(2, dtype=torch.bool))
    assert all(broken[k].isnan() for k in ("gap_sum", "gap_max"))
