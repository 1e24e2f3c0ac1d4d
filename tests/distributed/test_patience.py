"""A rank that is done waits for a slower one, however many deadlines that takes, and beats meanwhile; for one that is gone it does not."""
from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from spawn import cpu_plan, run_processes

from helpers.fakes import blank_batch
from vlarl.distributed import mesh, reduce
from vlarl.errors import WorkerError
from vlarl.metrics.spans import Spans
from vlarl.metrics.status import Heartbeat, write_status
from vlarl.recipe.schema import Policy, Ppo, Recipe
from vlarl.worker import evaluate, loop
from vlarl.worker.context import Context

SECONDS = 2.0  # of a deadline
SLOW = 5.0  # of the second rank's rollout
RECIPE = Recipe(name="patience", policy=Policy(checkpoint="none"), algorithm=Ppo())


def _context(folder: Path) -> Context:
    plan = cpu_plan(2)
    world = mesh.init_world(plan, SECONDS)
    if world.is_main:
        write_status(folder, phase="evaluation", update=0, updates=1)
    return Context(folder, RECIPE, plan, world, Spans(None, world.rank), Heartbeat(folder, world.rank))


def _slowly(run: Context) -> float:
    """What the second rank does so long: the age of the first one's last beat at the end of it."""
    if run.world.rank == 0:
        return 0.0
    time.sleep(SLOW)
    beat = json.loads((run.run_dir / "heartbeat" / "rank0.json").read_text())
    assert beat["phase"] == "rollout/wait"
    return time.time() - beat["time"]


def _collect(folder: Path) -> float:
    run = _context(folder)
    ages = []

    def play(run: Context, trainer: Any) -> Any:
        ages.append(_slowly(run))
        return blank_batch(3, 4)

    loop.play = play  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(orders=SimpleNamespace(give=lambda *order: None))
    _, targets = loop.collect(run, trainer, 0)
    assert targets.return_TBJ is not None, "the advantages' statistics are of both ranks"
    return ages[0]


def test_a_slow_rollout_is_waited_for(tmp_path: Path) -> None:
    assert run_processes(2, _collect, tmp_path)[1] < SECONDS


def _evaluate(folder: Path) -> tuple[float, int]:
    run, ages, nothing = _context(folder), [], lambda *_: SimpleNamespace(close=lambda: None)
    for name in ("evaluation_env", "LocalPool", "build_sampler", "write_films"):
        setattr(evaluate, name, nothing)
    evaluate.play_episodes = lambda *_: ages.append(_slowly(run))  # type: ignore[assignment]
    evaluate.build_report = lambda protocol, rows, hashes: {"rows": len(rows)}  # type: ignore[assignment]
    policy: Any = SimpleNamespace(spec=SimpleNamespace(chunk=4))
    report = evaluate.evaluate(run, policy, "in-distribution", 0, {}, "eval")
    return ages[0], report["rows"]


def test_a_slow_evaluation_is_waited_for(tmp_path: Path) -> None:
    assert run_processes(2, _evaluate, tmp_path)[1][0] < SECONDS


def _gone(folder: Path) -> tuple[str, float]:
    run = _context(folder)
    if run.world.rank == 1:
        time.sleep(SECONDS / 2)
        return "", 0.0  # as a rank that failed in its rollout
    started = time.monotonic()
    try:
        run.meet(run.world, "the end of a rollout")
    except WorkerError as error:
        return error.message, time.monotonic() - started
    return "", 0.0


def test_a_rank_that_failed_is_not_waited_for(tmp_path: Path) -> None:
    message, seconds = run_processes(2, _gone, tmp_path)[0]
    assert "lost its peers in the end of a rollout, waiting for rank 1 (deadline 20 s)" in message and seconds < SLOW


def _patient(folder: Path) -> tuple[str, float]:
    world = replace(mesh.init_world(cpu_plan(2), SECONDS), timeout_seconds=0.3)
    started = time.monotonic()
    if world.rank == 1:
        time.sleep(SLOW)
        return "", 0.0
    try:
        reduce.meet(world, "nobody")
    except WorkerError as error:
        return error.message, time.monotonic() - started
    return "", 0.0


def test_patience_ends(tmp_path: Path) -> None:
    message, seconds = run_processes(2, _patient, tmp_path)[0]
    assert "waiting for rank 1 (deadline 3 s)" in message and 2.5 < seconds < SLOW
