"""The torchrun command is a pure function of the plan."""
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launch_helpers import PLAN

from vlarl.errors import PlanError
from vlarl.launch.torchrun import command, sbatch, worker_arguments
from vlarl.plan.placement import WorkerGroup


def test_the_command(tmp_path: Path) -> None:
    made = command(PLAN, tmp_path / "r", worker_arguments(tmp_path / "r", "eval", variations=("train", "vision")), {"A": "b"}, 7)
    text = " ".join(made.argv)
    assert text.startswith(f"{sys.executable} -m vlarl.launch.lifeline -m torch.distributed.run --nnodes 1 --nproc-per-node 2 ")
    assert "--rdzv-endpoint localhost:0" in text
    assert text.endswith(f"-m vlarl.worker --run-dir {tmp_path / 'r'} --job eval --variations train,vision")
    assert (made.env["A"], made.env["OMP_NUM_THREADS"], made.env["VLARL_LAUNCHER_PID"]) == ("b", "2", "7")


def test_the_plans_threads_win_over_the_environment(tmp_path: Path) -> None:
    assert command(PLAN, tmp_path, (), {"OMP_NUM_THREADS": "99"}, 7).env["OMP_NUM_THREADS"] == "2"


def test_resume_is_passed_on(tmp_path: Path) -> None:
    assert worker_arguments(tmp_path, "train", resume=True) == ("--run-dir", str(tmp_path), "--job", "train", "--resume")


def test_several_nodes_need_a_place_to_meet(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="2 nodes"):
        command(replace(PLAN, workers=WorkerGroup(2, 2, "gloo")), tmp_path, (), {}, 7)


def test_several_nodes_meet_at_the_endpoint(tmp_path: Path) -> None:
    made = command(replace(PLAN, workers=WorkerGroup(2, 4, "gloo")), tmp_path / "r", (), {}, 7, "head:29400")
    text = " ".join(made.argv)
    assert "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint head:29400 --rdzv-id r" in text
    assert "127.0.0.1" not in text
    assert "GLOO_SOCKET_IFNAME" not in made.env


def test_sbatch() -> None:
    text = sbatch(replace(PLAN, workers=WorkerGroup(4, 8, "nccl")), "my run", ("a.yaml", "env.tasks=[put, push]"))
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {"#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=1", "#SBATCH --gres=gpu:8", "#SBATCH --cpus-per-task=16"} <= set(lines)
    assert "#SBATCH --time=24:00:00" in lines
    assert lines[-1] == (
        "srun --kill-on-bad-exit=1 vlarl train a.yaml 'env.tasks=[put, push]' --nnodes 4 --rdzv-endpoint \"$head:29400\" --out \"$out\""
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
