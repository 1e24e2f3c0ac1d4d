"""Ctrl-C and SIGTERM where no launcher stands between, and while episodes are recorded: nothing half-made stays, and no traceback."""
from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import DEADLINE_SECONDS, wait_for

SMALL = ("device=cpu", "threads=1", "env.parallel=2", "env.horizon=30")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vlarl_cli.app", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """What it printed; it must end with the signal's exit code."""
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in out + err
    return out


def test_ctrl_c_in_process(tmp_path: Path) -> None:
    quiet = ("update.updates=100000", "eval.every=0", "log.video_every=0")
    process = start(tmp_path, "train", "debug", *SMALL, *quiet, "--in-process", "--out", "run")
    wait_for((tmp_path / "run" / "metrics.jsonl").is_file, process)
    assert "Stopped by SIGINT" in stop(process, signal.SIGINT)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["phase"] == "stopped"


@pytest.mark.parametrize(("number", "more"), [(signal.SIGTERM, ()), (signal.SIGINT, ("--in-process",))], ids=["sigterm", "in-process"])
def test_a_recording_that_is_stopped_leaves_no_draft(tmp_path: Path, number: signal.Signals, more: tuple[str, ...]) -> None:
    other = tmp_path / ".demos.1.draft"  # of somebody else who is at it
    other.mkdir()
    process = start(tmp_path, "record", "debug", *SMALL, *more, "--episodes", "100000", "--out", "demos")
    wait_for(lambda: len(list(tmp_path.glob(".demos.*.draft"))) > 1, process)
    out = stop(process, number)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".demos.1.draft", "runs"]
    assert more or "what was recorded has been removed" in out
