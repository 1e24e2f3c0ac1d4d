"""A rank that dies or hangs in any role ends the run in time; rank, role, phase and peer are named, and nobody survives."""
from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_placements import recipe_for, run_folder

from vlarl import serial
from vlarl.errors import WorkerError
from vlarl.launch.rundir import RunDir
from vlarl.launch.supervisor import supervise
from vlarl.launch.torchrun import command, worker_arguments
from vlarl.plan.placement import PlacementPlan
from vlarl.plan.profile import PROFILE_VERSION, Profile
from vlarl.recipe.schema import Placement

STALL_SECONDS = 8.0
SECONDS = ((1.0, 0.1), (1000.0, 0.1))


def slow_run(folder: Path) -> tuple[RunDir, PlacementPlan, tuple[str, ...]]:
    """A run of one env, one rollout and one learner rank that would sleep for many minutes."""
    run = RunDir(run_folder(folder, recipe_for("ppo", Placement(mode="disaggregated", env="1", rollout="1", learner="1"), 3)))
    recipe = run.recipe.read_text().replace('"stall_seconds": 100.0', f'"stall_seconds": {STALL_SECONDS}')
    run.recipe.write_text(recipe)
    costs = Profile(
        version=PROFILE_VERSION, name="slow", summary="", source="assumed", provenance="", device="", actions_per_chunk=1,
        env_seconds=SECONDS, act_seconds=SECONDS, update_seconds=SECONDS, sync_seconds=0.0, message_seconds=SECONDS,
    )  # fmt: skip
    (run.path / "profile.json").write_text(serial.dumps(costs))
    extra = ("--updates", "1000", "--emulate", str(run.path / "profile.json"))
    return run, serial.load(PlacementPlan, run.plan), (*worker_arguments(run.path, "bench"), *extra)


def strike(run: RunDir, rank: int, number: signal.Signals) -> list[int]:
    """Send a signal to a rank once an update is done; returns the ranks' process ids."""
    while not any('"update": 1' in path.read_text() for path in (run.path / "traces").glob("rank*.jsonl")):
        time.sleep(0.2)
    found = {}
    for process in psutil.process_iter(["environ", "cmdline"]):
        if str(run.path) in (process.info["cmdline"] or ()) and "RANK" in (process.info["environ"] or {}):
            found[int(process.info["environ"]["RANK"])] = process.pid
    os.kill(found[rank], number)
    return list(found.values())


@pytest.mark.parametrize(
    ("rank", "number", "expected"),
    [(0, signal.SIGKILL, "rank 0 (env)"), (1, signal.SIGSTOP, "rank 1 (rollout)"), (2, signal.SIGSTOP, "rank 2 (learner)")],
    ids=["env dies", "rollout hangs", "learner hangs"],
)
def test_whoever_fails_is_named(tmp_path: Path, rank: int, number: signal.Signals, expected: str) -> None:
    run, plan, arguments = slow_run(tmp_path / "run")
    pids: list[int] = []
    struck: list[float] = []

    def do() -> None:
        pids.extend(strike(run, rank, number))
        struck.append(time.monotonic())

    threading.Thread(target=do, daemon=True).start()
    base: dict[str, Any] = dict(os.environ)
    with pytest.raises(WorkerError) as raised:
        supervise(command(plan, run.path, arguments, base, os.getpid()), run, 3, STALL_SECONDS, lambda status: None, grace_seconds=2.0)
    assert expected in raised.value.message.lower(), raised.value.message
    assert "phase" in raised.value.message or "Waited in vain" in raised.value.message
    assert time.monotonic() - struck[0] < 3 * STALL_SECONDS
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    """Not a zombie that its new parent has not buried yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
