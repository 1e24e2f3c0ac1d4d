"""Owns the torchrun command of a plan: arguments and environment. Pure; imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlarl.errors import PlanError
from vlarl.launch.lifeline import LAUNCHER_PID, LOG_FOLDER
from vlarl.plan.placement import PlacementPlan

Job = Literal["train", "sft", "eval"]
MONITOR_SECONDS = 0.2  # how soon torchrun sees that a rank ended


@dataclass(frozen=True)
class Command:
    """argv, and the whole environment of the process."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def worker_arguments(run_dir: Path, job: Job, resume: bool = False, variations: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What a rank is told besides the run folder's files."""
    arguments = ["--run-dir", str(run_dir), "--job", job]
    if resume:
        arguments.append("--resume")
    if variations:
        arguments += ["--variations", ",".join(variations)]
    return tuple(arguments)


def command(plan: PlacementPlan, run_dir: Path, arguments: tuple[str, ...], base_env: Mapping[str, str], launcher_pid: int) -> Command:
    """Torch elastic's torchrun, one process per rank, on a free port of its own choice. Raises PlanError for several nodes."""
    if plan.workers.nnodes != 1:
        raise PlanError(f"The plan spans {plan.workers.nnodes} nodes, and this version of vlarl starts ranks on one.", "Plan for one node.")
    argv = (
        sys.executable,
        *("-m", "vlarl.launch.lifeline", "-m", "torch.distributed.run"),
        *("--nnodes", "1", "--nproc-per-node", str(plan.workers.ranks_per_node)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", run_dir.name),
        # The machine's own name need not resolve.
        *("--local-addr", "127.0.0.1"),
        *("--max-restarts", "0", "--monitor-interval", str(MONITOR_SECONDS)),
        *("-m", "vlarl.worker"),
        *arguments,
    )
    return Command(argv, {**base_env, **rank_env(plan, run_dir, launcher_pid)})


def rank_env(plan: PlacementPlan, run_dir: Path, launcher_pid: int) -> dict[str, str]:
    """Environment of every rank. Threads are the plan's: cores that are asked for twice are ten times slower."""
    threads = str(max(rank.threads for rank in plan.ranks))
    env = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        LAUNCHER_PID: str(launcher_pid),
        LOG_FOLDER: str(run_dir / "logs"),
    }
    if plan.workers.backend == "gloo" and sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # gloo else asks for the address of the machine's name
    return env
