"""Rates and durations as people read them."""
from __future__ import annotations

import pytest

from vlarl.metrics.words import duration_text, rate_text


def test_a_rate_has_count_and_interval() -> None:
    assert rate_text(163, 200) == "163/200 = 81.5 % (75.5 to 86.3 %)"
    assert rate_text(0, 8) == "0/8 = 0.0 % (0.0 to 32.4 %)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.26, "1.3 s"), (59.6, "60 s"), (119.0, "119 s"), (125.0, "2.1 minutes"), (7199.0, "120.0 minutes"), (9000.0, "2.5 hours")],
)
def test_durations_have_sensible_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
