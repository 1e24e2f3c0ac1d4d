"""status.json and heartbeats: complete, strict, and no more often than needed."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from vlarl.metrics import status as status_module
from vlarl.metrics.status import Heartbeat, write_status


def test_status_has_every_field_and_no_nan(tmp_path: Path) -> None:
    write_status(tmp_path, phase="starting", update=0, updates=90)
    numbers = {"frames_per_second": math.nan, "success": 0.5, "eta_seconds": math.inf}
    write_status(tmp_path, phase="update", update=3, updates=9, episodes=4, line="x", **numbers)
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
    assert json.loads((tmp_path / "status.json").read_text(), parse_constant=pytest.fail) == {
        "phase": "update",
        "update": 3,
        "updates": 9,
        "frames_per_second": None,
        "success": 0.5,
        "episodes": 4,
        "eta_seconds": None,
        "line": "x",
    }


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
    Heartbeat(tmp_path, rank=0).beat("x" * 500)
    text = (tmp_path / "heartbeat" / "rank0.json").read_text()
    assert json.loads(text)["phase"] == "x" * 60 and len(text) == 128
