"""Owns how rates and durations are written for people, alike wherever a run says one. Stdlib only."""
from __future__ import annotations

from vlarl.evaluation.statistics import wilson

SHORT_SECONDS, LONG_SECONDS = 120, 7200  # below: seconds; from: hours


def rate_text(successes: int, episodes: int) -> str:
    """`163/200 = 81.5 % (75.5 to 86.3 %)`: the count, the rate and its 95 % Wilson interval. episodes >= 1."""
    low, high = wilson(successes, episodes)
    return f"{successes}/{episodes} = {100 * successes / episodes:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"


def duration_text(seconds: float) -> str:
    """In the unit that people would use."""
    if seconds < SHORT_SECONDS:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < LONG_SECONDS:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"
