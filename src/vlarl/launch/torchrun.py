"""Owns the torchrun command of a plan: arguments and environment. Pure; imports no torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlarl.errors import PlanError
from vlarl.launch.lifeline import LAUNCHER_PID, LOG_FOLDER
from vlarl.plan.placement import PlacementPlan

Job = Literal["train", "sft", "eval", "record", "bench", "profile"]
MONITOR_SECONDS = 0.2  # how soon torchrun sees that a rank ended


@dataclass(frozen=True)
class Command:
    """argv, and the whole environment of the process."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def worker_arguments(
    run_dir: Path, job: Job, resume: bool = False, variations: tuple[str, ...] = (), dataset: Path | None = None
) -> tuple[str, ...]:
    """What a rank is told besides the run folder's files."""
    arguments = ["--run-dir", str(run_dir), "--job", job]
    if resume:
        arguments.append("--resume")
    if variations:
        arguments += ["--variations", ",".join(variations)]
    if dataset is not None:
        arguments += ["--dataset", str(dataset)]
    return tuple(arguments)


def command(
    plan: PlacementPlan,
    run_dir: Path,
    arguments: tuple[str, ...],
    base_env: Mapping[str, str],
    launcher_pid: int,
    rdzv_endpoint: str | None = None,
) -> Command:
    """This node's torchrun (torch elastic), one process per rank. Raises PlanError for several nodes without `rdzv_endpoint`.

    rdzv_endpoint: HOST:PORT on which one of the nodes listens, the same on all; None: one node, on a free port of its own choice.
    """
    nodes = plan.workers.nnodes
    if nodes > 1 and rdzv_endpoint is None:
        raise PlanError(f"The plan spans {nodes} nodes, and nothing says where they meet.", "Give --nnodes and --rdzv-endpoint HOST:PORT.")
    # One node: the machine's own name need not resolve.
    where = ("--rdzv-endpoint", rdzv_endpoint) if rdzv_endpoint else ("--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1")
    argv = (
        sys.executable,
        *("-m", "vlarl.launch.lifeline", "-m", "torch.distributed.run"),
        *("--nnodes", str(nodes), "--nproc-per-node", str(plan.workers.ranks_per_node)),
        *("--rdzv-backend", "c10d", *where, "--rdzv-id", run_dir.name),
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
    if plan.workers.backend == "gloo" and plan.workers.nnodes == 1 and sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # gloo else asks for the address of the machine's name
    return env


def sbatch(plan: PlacementPlan, name: str, arguments: tuple[str, ...], port: int = 29400) -> str:
    """A Slurm batch file that starts `vlarl train` once on every node of the plan. arguments: of `vlarl train`, as typed."""
    workers = plan.workers
    gpus = f"#SBATCH --gres=gpu:{workers.ranks_per_node}\n" if workers.backend == "nccl" else ""
    threads = workers.ranks_per_node * max(rank.threads for rank in plan.ranks)
    meet = f' --nnodes {workers.nnodes} --rdzv-endpoint "$head:{port}" --out "$out"' if workers.nnodes > 1 else ' --out "$out"'
    return f"""\
#!/bin/bash
#SBATCH --job-name={shlex.quote(name)}
#SBATCH --nodes={workers.nnodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={threads}
{gpus}#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
# The time is a guess: set what the queue allows, and go on afterwards with `vlarl train --resume`. Add --partition and --account as needed.
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
out=runs/{shlex.quote(name)}-$SLURM_JOB_ID  # on a file system that all nodes see
export head out
srun --kill-on-bad-exit=1 vlarl train {shlex.join(arguments)}{meet}
"""
