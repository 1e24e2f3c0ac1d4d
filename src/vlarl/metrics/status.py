"""Owns the two small files by which a run tells its launcher how it is doing: status.json (rank 0) and heartbeat/rank{r}.json.

Stdlib only: the control process may import it. Every write is a rename, so a reader never sees half a file.
"""
from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

STATUS_FILE = "status.json"
HEARTBEAT_FOLDER = "heartbeat"
BEAT_SECONDS = 0.5


def write_status(
    run_dir: Path,
    *,
    phase: str,
    update: int,
    updates: int,
    frames_per_second: float | None = None,
    success: float | None = None,
    episodes: int = 0,
    eta_seconds: float | None = None,
    line: str = "",
) -> None:
    """Replaces status.json. phase: what the run does now. update of updates. success: share of recent training episodes, 0..1.

    episodes: finished since the start of the run. eta_seconds: to the end of the command. line: the bottleneck line.
    Values that are not finite become null.
    """
    _replace(
        run_dir / STATUS_FILE,
        {
            "phase": phase,
            "update": update,
            "updates": updates,
            "frames_per_second": _finite(frames_per_second),
            "success": _finite(success),
            "episodes": episodes,
            "eta_seconds": _finite(eta_seconds),
            "line": line,
        },
    )


class Heartbeat:
    """heartbeat/rank{rank}.json: {"phase", "time" (Unix seconds)}; the launcher ends a run whose beats stop.

    A new phase is written at once, so that a rank that hangs is named with the phase it hangs in; the same phase again
    at most every BEAT_SECONDS.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / HEARTBEAT_FOLDER / f"rank{rank}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._phase = ""
        self._written = -math.inf

    def beat(self, phase: str) -> None:
        """Says: alive, and in `phase` (a word such as rollout, update, eval)."""
        now = time.monotonic()
        if phase == self._phase and now - self._written < BEAT_SECONDS:
            return
        self._phase = phase
        self._written = now
        _replace(self._path, {"phase": phase, "time": time.time()})


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _replace(path: Path, content: dict[str, object]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(path)
