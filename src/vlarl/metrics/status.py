"""Owns the two small files by which a run tells its launcher how it is doing: status.json (rank 0) and heartbeat/rank{r}.json.

Stdlib only: the control process may import it. A reader never sees half a record.
"""
from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS_FILE = "status.json"
HEARTBEAT_FOLDER = "heartbeat"
BEAT_SECONDS = 0.5
WAITING_SECONDS = 1.0
PHASE_CHARACTERS = 60
RECORD_BYTES = 128


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
    status = {
        "phase": phase,
        "update": update,
        "updates": updates,
        "frames_per_second": _finite(frames_per_second),
        "success": _finite(success),
        "episodes": episodes,
        "eta_seconds": _finite(eta_seconds),
        "line": line,
    }
    _replace(run_dir / STATUS_FILE, json.dumps(status).encode())


class Heartbeat:
    """heartbeat/rank{rank}.json: {"phase", "time" (Unix seconds)}; the launcher ends a run whose beats stop.

    A new phase is written at once, so that a rank that hangs is named with the phase it hangs in; the same phase again
    at most every BEAT_SECONDS. Records have one length and are overwritten in place by a single write: phases change hundreds
    of times per second, a rename for each would cost more than it tells, and a full disk cannot stop the beat.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        path = run_dir / HEARTBEAT_FOLDER / f"rank{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._phase = "start"
        self._written = time.monotonic()
        _replace(path, self._record())
        self._file = path.open("r+b", buffering=0)
        self._waits_in: str | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """Go on beating while this rank only waits for others: those are watched themselves, and the one that hangs is the one to name.
        The wait needs a deadline of its own."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._go_on, name="heartbeat", daemon=True)
            self._thread.start()
        self.beat(phase)
        with self._lock:
            self._waits_in = phase
        try:
            yield
        finally:
            with self._lock:
                self._waits_in = None

    def _go_on(self) -> None:
        while True:
            time.sleep(WAITING_SECONDS)
            with self._lock:
                if self._waits_in is not None:
                    self.beat(self._waits_in)

    def beat(self, phase: str) -> None:
        """Says: alive, and in `phase` (a word such as rollout/act, update, eval)."""
        now = time.monotonic()
        if phase == self._phase and now - self._written < BEAT_SECONDS:
            return
        self._phase = phase
        self._written = now
        os.pwrite(self._file.fileno(), self._record(), 0)

    def _record(self) -> bytes:
        """One JSON object and blanks, RECORD_BYTES in all."""
        return json.dumps({"phase": self._phase[:PHASE_CHARACTERS], "time": round(time.time(), 3)}).encode().ljust(RECORD_BYTES)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)
