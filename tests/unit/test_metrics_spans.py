"""Spans add up, traces are written per rank, the bottleneck line is the arithmetic it claims."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlarl.metrics import spans as spans_module
from vlarl.metrics.spans import Spans, bottleneck_line


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets: clock[0] is perf_counter, the Unix time is 1000 s ahead of it."""
    now = [10.0]
    monkeypatch.setattr(spans_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(spans_module.time, "time", lambda: now[0] + 1000.0)
    return now


def test_seconds_add_up_per_name_and_reset(clock: list[float]) -> None:
    spans = Spans(None, rank=0)
    for seconds in (1.0, 2.0):
        with spans.span("rollout"), spans.span("rollout/act"):
            clock[0] += seconds
    with pytest.raises(ValueError), spans.span("update"):
        clock[0] += 4.0
        raise ValueError
    assert spans.totals(reset=False) == {"rollout/act": 3.0, "rollout": 3.0, "update": 4.0}
    assert spans.totals() == {"rollout/act": 3.0, "rollout": 3.0, "update": 4.0}
    assert spans.totals() == {}


def test_a_span_inside_another_is_filed_under_it(clock: list[float]) -> None:
    spans = Spans(None, rank=0)
    with spans.span("eval"):
        with spans.span("rollout/act"):
            clock[0] += 1.0
        with spans.span("eval/report"):
            clock[0] += 0.5
    with spans.span("rollout/act"):
        clock[0] += 2.0
    assert spans.totals() == {"eval/rollout/act": 1.0, "eval/report": 0.5, "eval": 1.5, "rollout/act": 2.0}


def test_trace_lines_carry_wall_time_and_update(tmp_path: Path, clock: list[float]) -> None:
    spans = Spans(tmp_path, rank=3)
    for update in (1, 2):
        spans.update = update
        with spans.span("sync"):
            clock[0] += 0.5
        spans.totals()
    lines = [json.loads(line) for line in (tmp_path / "traces" / "rank3.jsonl").read_text().splitlines()]
    assert lines == [
        {"name": "sync", "start": 1010.0, "end": 1010.5, "update": 1},
        {"name": "sync", "start": 1010.5, "end": 1011.0, "update": 2},
    ]


def test_bottleneck_line() -> None:
    totals = {"update": 6.1, "rollout/env": 1.0, "rollout/act": 2.4, "rollout/other": 0.2, "update/forward": 3.0, "rollout": 3.6}
    line = bottleneck_line(totals, total_seconds=10.0)
    assert line.startswith("update 61% | act 24% | env 10% | other 5%  (update-bound: ")
    assert bottleneck_line({"rollout/env": 3.0, "rollout/act": 1.0}).startswith("env 75% | act 25%  (env-bound: ")
    assert bottleneck_line({"update": 1.0}, total_seconds=10.0) == "update 10% | other 90%"
    assert bottleneck_line({}) == ""
