"""Statistics against published or hand-computed numbers, and scipy where it has the same test."""
from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from vlarl.evaluation.statistics import episodes_needed, mcnemar, paired_episodes_needed, wilson


def test_wilson_by_hand():
    # z^2 = 3.8415; k 8, n 10: centre (.8 + .19207) / 1.38415 = .71674; half width 1.95996 / 1.38415 * sqrt(.016 + .0096037) = .22658
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(counts, confidence):
    k, n = counts
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    with pytest.raises(AssertionError):
        wilson(11, 10)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 32
    assert mcnemar(1, 5) == 2 * (1 + 6) / 64
    assert mcnemar(3, 12) == pytest.approx(binomtest(3, 15).pvalue)
    assert 0 <= mcnemar(1000, 4000) < 1e-300  # counts whose powers of two do not fit a float


def test_episodes_needed():
    # Published table values for power 0.8, two-sided 0.05: 0.5 against 0.7 needs 93 per group, 0.8 against 0.9 needs 199.
    assert episodes_needed(0.5, 0.7) == episodes_needed(0.7, 0.5) == 93
    assert episodes_needed(0.8, 0.9) == 199


def test_paired_episodes_needed_by_hand():
    # d .1, discordant .2: (1.95996 * sqrt(.2) + .84162 * sqrt(.19))^2 / .01 = (.87652 + .36685)^2 / .01 = 154.6
    assert paired_episodes_needed(0.15, 0.05) == paired_episodes_needed(0.05, 0.15) == 155


def test_imports_no_torch():
    code = "import sys, vlarl.evaluation.statistics; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
