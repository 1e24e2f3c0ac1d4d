"""Owns: collectives give the same numbers on every rank; a missing rank is an error in time, not a hang."""
from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from spawn import cpu_plan, run_ranks

from vlarl.distributed import mesh, reduce
from vlarl.distributed.mesh import World
from vlarl.errors import PlanError, WorkerError


def _collect(world: World) -> dict[str, object]:
    mine = torch.tensor([1.0, 10.0], dtype=torch.float64) * (world.rank + 1)
    total, largest = reduce.all_reduce_sum(world, mine), reduce.all_reduce_max(world, mine)
    reduce.barrier(world, "after the sums")
    return {
        "mine": mine.tolist(),
        "sum": total.tolist(),
        "max": largest.tolist(),
        "gathered": reduce.gather_objects(world, {"rank": world.rank}),
        "everywhere": reduce.all_gather_objects(world, world.rank),
        "told": reduce.broadcast_object(world, f"from {world.rank}"),
        "threads": torch.get_num_threads(),
        "learners": world.learner.size(),
    }


def test_collectives_on_two_ranks() -> None:
    first, second = run_ranks(2, _collect)
    assert first["mine"] == [1.0, 10.0] and second["mine"] == [2.0, 20.0], "inputs are left alone"
    for result in (first, second):
        assert result["sum"] == [3.0, 30.0] and result["max"] == [2.0, 20.0]
        assert result["everywhere"] == [0, 1] and result["told"] == "from 0"
        assert result["threads"] == 1 and result["learners"] == 2
    assert first["gathered"] == [{"rank": 0}, {"rank": 1}] and second["gathered"] == []


def test_collectives_on_one_rank() -> None:
    (only,) = run_ranks(1, _collect)
    assert only["sum"] == [1.0, 10.0] and only["gathered"] == [{"rank": 0}] and only["everywhere"] == [0]


def _wait_for_nobody(world: World) -> tuple[str, float]:
    """Rank 1 never comes to the barrier."""
    started = time.monotonic()
    if world.rank == 1:
        time.sleep(4)  # stays alive past the deadline: a slow peer, not a dead one
        return "", 0.0
    impatient = World(world.rank, world.world_size, world.device, world.learner, world.control, timeout_seconds=1.0)
    try:
        reduce.barrier(impatient, "end of rollout")
    except WorkerError as error:
        return error.message, time.monotonic() - started
    return "", 0.0


def test_a_barrier_has_a_deadline_and_names_itself_and_the_missing_rank() -> None:
    message, seconds = run_ranks(2, _wait_for_nobody)[0]
    assert "end of rollout" in message and "1" in message.split("deadline")[1] and seconds < 4


def test_a_plan_for_other_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(PlanError, match="2 ranks, but 1"):
        mesh.init_world(cpu_plan(2))


def test_one_process_needs_no_launcher() -> None:
    code = (
        "from spawn import cpu_plan; from vlarl.distributed import mesh; import torch;"
        "w = mesh.init_world(cpu_plan(1)); assert w.is_main and w.learner.size() == 1 and w.device.type == 'cpu';"
        "mesh.shutdown(); mesh.shutdown()"
    )
    subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-c", code], cwd=__file__.rpartition("/")[0], check=True, timeout=60)
