"""Owns real worker ranks for tests: the train job of a run folder on one or two gloo ranks, each in a fresh process, without the launcher.

Every rank leaves its first rollout in `rollout-rank{r}.pt` of the run folder, to be compared between rank counts.
"""
from __future__ import annotations

import multiprocessing
import os
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from vlarl.launch import rundir

DEADLINE_SECONDS = 240.0


def prepare(out: Path, *overrides: str) -> Path:
    """A run folder of the debug recipe, as `vlarl train` makes it; in a folder that is one already, recipe and plan are replaced."""
    from vlarl_cli.run import load, make_plan

    loaded = load("debug", ["device=cpu", "threads=1", *overrides])
    plan = make_plan(loaded, "train")
    return (rundir.reopen(out, loaded.recipe, plan) if out.exists() else rundir.create(out, loaded.recipe, plan, 0)).path


def train_in_ranks(run_dir: Path, ranks: int, resume: bool = False) -> None:
    """Train in `run_dir` on `ranks` processes; a rank's failure fails the test with its traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlarl.worker.jobs"])  # imported once, not by every rank
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=DEADLINE_SECONDS))
    queue = context.SimpleQueue()
    every = [(queue, run_dir, rank, ranks, store.port, resume) for rank in range(ranks)]
    processes = [context.Process(target=_rank_main, args=arguments, daemon=True) for arguments in every]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=DEADLINE_SECONDS)
        problems = [queue.get() for _ in processes if not queue.empty()]
        assert not problems, "\n".join(problems)
        assert [process.exitcode for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()


def _rank_main(queue: Any, run_dir: Path, rank: int, ranks: int, port: int, resume: bool) -> None:
    # The variables that torchrun sets; its agent, like the parent here, already serves the store.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from vlarl.worker import jobs, loop

    collect = loop.collect

    def keeping(run: Any, trainer: Any, update: int) -> Any:
        batch, targets = collect(run, trainer, update)
        if update == 0:
            torch.save((batch.clone(), targets), run_dir / f"rollout-rank{rank}.pt")
        return batch, targets

    loop.collect = keeping
    try:
        jobs.run_job("train", run_dir, jobs.JobOptions(resume=resume))
    except BaseException:
        queue.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise
