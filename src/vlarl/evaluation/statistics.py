"""Owns the statistics of success rates: intervals, paired tests, how many episodes a claim needs. Stdlib only."""
from __future__ import annotations

import math
from statistics import NormalDist


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (Wilson, 1927) of a success rate: (low, high), both in [0, 1]. (0, 1) for no episodes."""
    assert 0 <= successes <= episodes, f"{successes} successes in {episodes} episodes"
    if episodes == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / episodes
    shrink = 1 + z * z / episodes
    center = (rate + z * z / (2 * episodes)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes * episodes))
    # The bounds at 0 and n successes are exactly 0 and 1; rounding must not say otherwise.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == episodes else min(1.0, center + half)
    return low, high


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value that A and B succeed equally often on the same episodes (McNemar, 1947).

    only_a, only_b: episodes in which only A, only B succeeded. Under equality each is a fair coin toss.
    """
    assert only_a >= 0 and only_b >= 0
    total = only_a + only_b
    tail = sum(math.comb(total, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**total))


def episodes_needed(rate_a: float, rate_b: float, power: float = 0.8, confidence: float = 0.95) -> int:
    """Episodes per policy (unpaired) for a two-sided test to tell two success rates apart with probability `power`.

    Normal approximation with pooled variance under equality (Fleiss, Levin & Paik, 2003), no continuity correction.
    """
    assert rate_a != rate_b, "equal rates cannot be told apart"
    z_alpha, z_power = NormalDist().inv_cdf(0.5 + confidence / 2), NormalDist().inv_cdf(power)
    pooled = (rate_a + rate_b) / 2
    spread = z_alpha * math.sqrt(2 * pooled * (1 - pooled)) + z_power * math.sqrt(rate_a * (1 - rate_a) + rate_b * (1 - rate_b))
    return math.ceil((spread / (rate_a - rate_b)) ** 2)


def paired_episodes_needed(share_only_a: float, share_only_b: float, power: float = 0.8, confidence: float = 0.95) -> int:
    """Shared episodes for McNemar's test to tell A from B, given the shares in which only A or only B succeeds (Connor, 1987)."""
    difference, discordant = share_only_a - share_only_b, share_only_a + share_only_b
    assert difference != 0, "equal rates cannot be told apart"
    z_alpha, z_power = NormalDist().inv_cdf(0.5 + confidence / 2), NormalDist().inv_cdf(power)
    spread = z_alpha * math.sqrt(discordant) + z_power * math.sqrt(discordant - difference**2)
    return math.ceil((spread / difference) ** 2)
