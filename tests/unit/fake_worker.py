"""Stands in for a worker rank in launcher tests: holds on, reports, then does what VLARL_FAKE says. Imports no torch.

VLARL_FAKE: `rank=behaviour` pairs separated by commas; other ranks beat until they are ended. Behaviours: done, user, crash, late_crash,
lost (a crash after waiting LOST_SECONDS for the others), exit3, sigkill, stall, stubborn.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from vlarl.launch.lifeline import hold
from vlarl.launch.rundir import write_atomic

LOST_SECONDS = 4.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--job")
    run_dir, rank = parser.parse_args().run_dir, int(os.environ["RANK"])
    hold()
    print(f"rank {rank} says hello", flush=True)
    behaviours = dict(item.split("=") for item in os.environ["VLARL_FAKE"].split(",") if item)
    behaviour = behaviours.get(str(rank), "beat")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        (run_dir / "child.pid").write_text(str(child.pid))
    write_atomic(run_dir / f"pid{rank}", str(os.getpid()))
    beat(run_dir, rank)
    if rank == 0:
        write_atomic(run_dir / "status.json", json.dumps({"phase": "rollout", "update": 1, "updates": 2}))
    act(behaviour, run_dir, rank)
    while True:
        if behaviour != "stall":
            beat(run_dir, rank)
        time.sleep(0.1)


def beat(run_dir: Path, rank: int) -> None:
    write_atomic(run_dir / "heartbeat" / f"rank{rank}.json", json.dumps({"phase": "rollout", "time": time.time()}))


def act(behaviour: str, run_dir: Path, rank: int) -> None:
    if behaviour == "done":
        sys.exit(0)
    if behaviour == "exit3":
        sys.exit(3)
    if behaviour == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour in ("user", "crash", "late_crash", "lost"):
        # The late one is written first and lives on: the time inside the file decides, not which file is seen first.
        late = 5.0 if behaviour == "late_crash" else 0.0
        if behaviour == "crash":
            time.sleep(0.3)
        if behaviour == "lost":
            time.sleep(LOST_SECONDS)
        kind, message = ("user", "policy.safetensors is cut short.") if behaviour == "user" else ("crash", f"{behaviour} of rank {rank}")
        row = {"kind": kind, "message": message, "hint": "Copy it again.", "time": time.time() + late, "phase": "update"}
        write_atomic(run_dir / "logs" / f"rank{rank}.error.json", json.dumps(row))
        if behaviour == "late_crash":
            return
        sys.exit(2 if kind == "user" else 1)


if __name__ == "__main__":
    main()
