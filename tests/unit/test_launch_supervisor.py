"""Real torchrun over fake ranks: whatever ends a run, its cause is told and no process is left."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch_helpers import PLAN, RECIPE, fake_command

from helpers.commands import running
from vlarl.errors import VlarlError, WorkerError
from vlarl.launch import rundir
from vlarl.launch.supervisor import supervise

DEADLINE_SECONDS = 60.0


@pytest.fixture
def run(tmp_path: Path) -> rundir.RunDir:
    return rundir.create(tmp_path / "run", RECIPE, PLAN, 0)


def survivors(folder: Path) -> list[int]:
    """Process ids noted in the run folder that still run (zombies do not)."""
    pids = [int(p.read_text()) for p in [*folder.glob("pid*"), *folder.glob("child.pid")]]
    assert pids, "no rank came up"
    return [pid for pid in pids if running(pid)]


def failure(run: rundir.RunDir, behaviours: str, stall_seconds: float = 60.0) -> VlarlError:
    with pytest.raises(VlarlError) as caught:
        supervise(fake_command(run, behaviours), run, 2, stall_seconds, lambda status: None, grace_seconds=2.0)
    assert survivors(run.path) == []
    return caught.value


def test_ranks_that_end_well(run: rundir.RunDir) -> None:
    seen: list[dict[str, Any]] = []
    assert supervise(fake_command(run, "0=done,1=done"), run, 2, 60.0, seen.append) is None
    assert seen == [{"phase": "rollout", "update": 1, "updates": 2}]
    assert run.log(1).read_text() == "rank 1 says hello\n"
    assert survivors(run.path) == []


def test_a_users_mistake_is_told_as_the_rank_told_it(run: rundir.RunDir) -> None:
    problem = failure(run, "1=user")
    assert not isinstance(problem, WorkerError)
    assert (problem.exit_code, problem.message, problem.hint) == (2, "policy.safetensors is cut short.", "Copy it again.")


def test_the_earliest_failure_is_the_cause_and_stubborn_processes_end_too(run: rundir.RunDir) -> None:
    problem = failure(run, "0=late_crash,1=crash")
    assert isinstance(problem, WorkerError)
    assert problem.message == "Rank 1 failed in phase 'update': crash of rank 1"
    assert str(run.log(1)) in problem.hint


def test_ranks_deaf_to_sigterm_and_their_children_end_too(run: rundir.RunDir) -> None:
    assert "crash of rank 0" in failure(run, "0=crash,1=stubborn").message


def test_a_rank_that_dies_without_a_word(run: rundir.RunDir) -> None:
    problem = failure(run, "1=sigkill")
    assert re.match(r"Rank 1 was killed \(SIGKILL\).*in phase 'rollout'", problem.message)
    assert problem.exit_code == 1


def test_a_rank_that_falls_silent(run: rundir.RunDir) -> None:
    problem = failure(run, "1=stall", stall_seconds=4.0)
    said = r"Rank 1 has reported nothing for \d+ s \(the limit is 4 s: stall_seconds\); its last phase was 'rollout'"
    assert re.match(said, problem.message)
    assert "fake_worker.py" in run.log(1).read_text()  # its stack


def test_who_is_missing_is_named_beside_who_noticed(run: rundir.RunDir) -> None:
    problem = failure(run, "0=lost,1=stall", stall_seconds=6.0)
    assert problem.message == "Rank 0 failed in phase 'update': lost of rank 0"
    assert re.match(r"Rank 1 had reported nothing for \d s by then; its last phase was 'rollout'\. ", problem.hint)


def test_nobody_is_missing_where_all_others_report(run: rundir.RunDir) -> None:
    assert "nothing" not in failure(run, "0=lost", stall_seconds=6.0).hint


def start_launcher(folder: Path) -> subprocess.Popen[bytes]:
    """A launcher in a process of its own, with both ranks up."""
    helper = Path(__file__).with_name("launch_helpers.py")
    launcher = subprocess.Popen([sys.executable, str(helper), str(folder), ""], env={**os.environ, "PYTHONPATH": str(helper.parent)})
    wait_until(lambda: (folder / "pid0").exists() and (folder / "pid1").exists())
    return launcher


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_everything(tmp_path: Path, number: signal.Signals) -> None:
    launcher = start_launcher(tmp_path / "run")
    launcher.send_signal(number)
    assert launcher.wait(DEADLINE_SECONDS) == 128 + number
    assert survivors(tmp_path / "run") == []


def test_killing_the_launcher_leaves_nobody(tmp_path: Path) -> None:
    launcher = start_launcher(tmp_path / "run")
    torchrun = [p.pid for p in psutil.Process(launcher.pid).children()]
    launcher.kill()
    launcher.wait()
    wait_until(lambda: survivors(tmp_path / "run") == [])
    wait_until(lambda: not any(running(pid) for pid in torchrun))
