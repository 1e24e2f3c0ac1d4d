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
from typing import Any

STATUS_FILE = "status.json"
HEARTBEAT_FOLDER = "heartbeat"
BEAT_SECONDS = 0.5
WAITING_SECONDS = 1.0
PHASE_CHARACTERS = 60
RECORD_BYTES = 160


def write_status(
    run_dir: Path,
    *,
    phase: str,
    update: int,
    updates: int,
    frames_per_second: float | None = None,
    recent: tuple[int, int] | None = None,
    episodes: int = 0,
    eta_seconds: float | None = None,
    line: str = "",
    evaluated: str = "",
) -> None:
    """Replaces status.json. phase: what the run does now. update of updates. recent: successes among the latest training episodes, and the
    number of these.

    episodes: finished since the start of the run. eta_seconds: to the end of the command. line: the bottleneck line, or whatever else is
    worth a line. evaluated: a sentence on the latest evaluation while training, which the command prints once. Values that are not
    finite become null, as does `evaluation` (see `write_evaluation`).
    """
    status = {
        "phase": phase,
        "update": update,
        "updates": updates,
        "frames_per_second": _finite(frames_per_second),
        "success": recent[0] / recent[1] if recent else None,
        "recent": recent,
        "episodes": episodes,
        "eta_seconds": _finite(eta_seconds),
        "line": line,
        "evaluation": None,
        "evaluated": evaluated,
    }
    _replace(run_dir / STATUS_FILE, json.dumps(status).encode())


def read_status(run_dir: Path) -> dict[str, Any]:
    """What status.json holds. For the rank that writes it, after `write_status`."""
    status: dict[str, Any] = json.loads((run_dir / STATUS_FILE).read_text(encoding="utf-8"))
    return status


def replace_status(run_dir: Path, status: dict[str, Any]) -> None:
    """Replaces status.json by what `read_status` gave."""
    _replace(run_dir / STATUS_FILE, json.dumps(status).encode())


def write_evaluation(
    run_dir: Path, status: dict[str, Any], *, played: int, of: int, successes: int, eta_seconds: float | None
) -> None:
    """Replaces status.json by `status`, as it was when the evaluation began, and how far that is.

    played of `of` episodes have ended, `successes` of them well. eta_seconds: to the end of this evaluation.
    """
    evaluation = {"played": played, "of": of, "successes": successes, "eta_seconds": _finite(eta_seconds)}
    replace_status(run_dir, status | {"evaluation": evaluation})


def evaluation_counts(run_dir: Path, ranks: int) -> tuple[int, int]:
    """Episodes that have ended, and ended well, in the evaluation in progress: of all ranks whose heartbeats can be read."""
    played = successes = 0
    for rank in range(ranks):
        try:
            beat = json.loads((run_dir / HEARTBEAT_FOLDER / f"rank{rank}.json").read_bytes())
        except (OSError, ValueError):  # caught while it is being overwritten
            continue
        if "evaluation" in beat:
            played, successes = played + beat["evaluation"][0], successes + beat["evaluation"][1]
    return played, successes


class Heartbeat:
    """heartbeat/rank{rank}.json: {"phase", "time" (Unix seconds)}; the launcher ends a run whose beats stop. While this rank plays an
    evaluation also "evaluation": [episodes that have ended, successes].

    A new phase is written at once, so that a rank that hangs is named with the phase it hangs in; the same phase again
    at most every BEAT_SECONDS. Records have one length and are overwritten in place by a single write: phases change hundreds
    of times per second, a rename for each would cost more than it tells, and a full disk cannot stop the beat.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        path = run_dir / HEARTBEAT_FOLDER / f"rank{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._phase = "start"
        self._counts: tuple[int, int] | None = None
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

    def evaluating(self, counts: tuple[int, int] | None) -> None:
        """Say how many episodes of an evaluation this rank has ended, and with success; None: it plays none any longer."""
        self._counts = counts
        self._written = time.monotonic()
        os.pwrite(self._file.fileno(), self._record(), 0)

    def _record(self) -> bytes:
        """One JSON object and blanks, RECORD_BYTES in all."""
        beat: dict[str, Any] = {"phase": self._phase[:PHASE_CHARACTERS], "time": round(time.time(), 3)}
        if self._counts is not None:
            beat["evaluation"] = self._counts
        return json.dumps(beat).encode().ljust(RECORD_BYTES)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)
