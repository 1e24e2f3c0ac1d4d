"""status.json and heartbeats: complete, strict, and no more often than needed."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from vlarl.metrics import status as status_module
from vlarl.metrics.status import RECORD_BYTES, Heartbeat, evaluation_counts, read_status, write_evaluation, write_status


def test_status_has_every_field_and_no_nan(tmp_path: Path) -> None:
    write_status(tmp_path, phase="starting", update=0, updates=90)
    numbers = {"frames_per_second": math.nan, "eta_seconds": math.inf}
    write_status(tmp_path, phase="update", update=3, updates=9, recent=(2, 4), episodes=4, line="x", evaluated="y", **numbers)
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
    assert json.loads((tmp_path / "status.json").read_text(), parse_constant=pytest.fail) == {
        "phase": "update",
        "update": 3,
        "updates": 9,
        "frames_per_second": None,
        "success": 0.5,
        "recent": [2, 4],
        "episodes": 4,
        "eta_seconds": None,
        "line": "x",
        "evaluation": None,
        "evaluated": "y",
    }


def test_an_evaluation_in_progress_is_added_to_the_status_it_began_with(tmp_path: Path) -> None:
    write_status(tmp_path, phase="evaluation", update=3, updates=9, evaluated="y")
    began = read_status(tmp_path)
    write_status(tmp_path, phase="simulators: 1 of 2 are up", update=3, updates=9)
    write_evaluation(tmp_path, began, played=7, of=20, successes=5, eta_seconds=math.inf)
    assert read_status(tmp_path) == began | {"evaluation": {"played": 7, "of": 20, "successes": 5, "eta_seconds": None}}
    write_status(tmp_path, phase="training", update=3, updates=9)
    assert read_status(tmp_path)["evaluation"] is None


def test_heartbeats_tell_how_far_an_evaluation_is(tmp_path: Path) -> None:
    ranks = [Heartbeat(tmp_path, rank) for rank in range(3)]
    assert evaluation_counts(tmp_path, 4) == (0, 0)  # rank 3 has not begun to beat
    ranks[0].evaluating((123456, 4))
    ranks[2].evaluating((4, 4))
    ranks[2].beat("rollout/act")  # which keeps the count
    assert evaluation_counts(tmp_path, 4) == (123460, 8)
    (tmp_path / "heartbeat" / "rank0.json").write_text("{")  # caught while it is being overwritten
    assert evaluation_counts(tmp_path, 4) == (4, 4)
    ranks[2].evaluating(None)
    assert evaluation_counts(tmp_path, 4) == (0, 0)


def test_heartbeat_writes_new_phases_at_once_and_old_ones_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(status_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(status_module.time, "time", lambda: now[0])
    heart = Heartbeat(tmp_path, rank=1)
    path = tmp_path / "heartbeat" / "rank1.json"
    assert json.loads(path.read_text()) == {"phase": "start", "time": 100.0}
    seen = []
    for seconds, phase in [(0.0, "rollout"), (0.1, "rollout"), (0.1, "update"), (0.4, "update"), (0.2, "update")]:
        now[0] += seconds
        heart.beat(phase)
        beat = json.loads(path.read_text())
        seen.append((beat["phase"], round(beat["time"], 3)))
    assert seen == [("rollout", 100.0), ("rollout", 100.0), ("update", 100.2), ("update", 100.2), ("update", 100.8)]


def test_a_long_phase_fits_the_record(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, rank=0)
    heart.beat("x" * 500)
    heart.evaluating((10**9, 10**9))
    text = (tmp_path / "heartbeat" / "rank0.json").read_text()
    assert json.loads(text)["phase"] == "x" * 60 and len(text) == RECORD_BYTES
