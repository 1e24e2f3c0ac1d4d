"""Messages between real ranks, and weights on their way to ranks that act without learning."""
from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from spawn import DEADLINE_SECONDS, ToyPolicy, cpu_plan, run_processes

from vlarl.distributed import mesh
from vlarl.distributed.fsdp import shard
from vlarl.distributed.links import PATIENCE, Links, Orders
from vlarl.distributed.reduce import all_reduce_sum
from vlarl.distributed.weight_sync import WeightSync
from vlarl.errors import WorkerError
from vlarl.plan.placement import PlacementPlan, Role


def apart(*roles: tuple[Role, ...]) -> PlacementPlan:
    """One rank for each tuple of roles."""
    plan = cpu_plan(len(roles))
    return replace(plan, mode="disaggregated", ranks=tuple(replace(r, roles=mine) for r, mine in zip(plan.ranks, roles, strict=True)))


def _talk(plan: PlacementPlan) -> Any:
    """Rank 0 simulates, rank 1 acts, rank 2 learns."""
    world = mesh.init_world(plan, DEADLINE_SECONDS)
    links = Links(world, plan)
    orders = Orders(world, plan, links)
    heard: list[Any] = []
    if world.rank == 2:
        orders.give("collect", 7)
        orders.give("end")
        return world.is_main, world.learners is not None and world.learners.world_size
    for _ in range(2):
        heard.append(orders.take())
    if world.rank == 0:
        frames = [torch.full((3,), float(i)) for i in range(4)]
        for pending in [links.to(1).send(f, "observations") for f in frames]:
            pending.wait()
        action = torch.zeros(2)
        links.to(1).recv(action, "actions").wait()
        heard.append(action.tolist())
    else:
        sending = links.to(0).send(torch.tensor([5.0, 6.0]), "actions")
        for _ in range(4):
            frame = torch.zeros(3)
            links.to(0).recv(frame, "observations").wait()
            heard.append(frame[0].item())
        sending.wait()
    return heard


def test_messages_keep_their_order_and_kinds_do_not_mix() -> None:
    simulator, actor, learner = run_processes(3, _talk, apart(("env",), ("rollout",), ("learner",)))
    assert simulator == [("collect", 7), ("end", 0), [5.0, 6.0]]
    assert actor == [("collect", 7), ("end", 0), 0.0, 1.0, 2.0, 3.0]
    assert learner == (True, 1), "the first rank that learns writes the files"


def _wait_in_vain(plan: PlacementPlan, dead: bool) -> Any:
    """Rank 0 simulates, and sends nothing: it is slow, or gone."""
    world = mesh.init_world(plan, DEADLINE_SECONDS)
    links = Links(replace(world, timeout_seconds=3.0 / PATIENCE), plan)
    if world.rank == 0:
        if not dead:
            time.sleep(8)  # a slow peer, not a dead one
        return None
    started = time.monotonic()
    try:
        links.to(0).recv(torch.zeros(2), "observations").wait()
    except WorkerError as error:
        return error.message, time.monotonic() - started
    return None


@pytest.mark.parametrize("dead", [False, True], ids=["slow", "dead"])
def test_a_wait_has_a_deadline_and_names_the_peer(dead: bool) -> None:
    message, seconds = run_processes(2, _wait_in_vain, apart(("env",), ("rollout", "learner")), dead)[1]
    assert "observations of rank 0 (env)" in message and seconds < 7


def _learner_that_hangs(plan: PlacementPlan) -> Any:
    """Rank 0 acts, 1 and 2 learn, and 2 never comes: how long weight sync and the learners' group let the others wait."""
    world = mesh.init_world(plan, 6.0)
    sync = WeightSync(world, plan, ToyPolicy(torch.float32), torch.float32)
    started = time.monotonic()
    if world.rank == 2:
        time.sleep(16)
        return None
    with pytest.raises(WorkerError if world.rank == 0 else RuntimeError):
        if world.rank == 0:
            sync.sync()
        else:
            assert world.learner is not None
            torch.distributed.all_reduce(torch.ones(1), group=world.learner.get_group())
    return time.monotonic() - started


def test_every_group_has_the_worlds_deadline() -> None:
    waited = run_processes(3, _learner_that_hangs, apart(("rollout",), ("learner",), ("learner",)))
    assert all(4 < seconds < 12 for seconds in waited[:2]), waited


def _sync(plan: PlacementPlan, bucket_bytes: int) -> Any:
    """Rank 0 simulates, 1 and 2 act, 3 and 4 learn: sharded float64 weights arrive whole, in float32."""
    world = mesh.init_world(plan, DEADLINE_SECONDS)
    module = None
    if world.rank in (1, 2):
        module = ToyPolicy(torch.float32, seed=1)
    elif world.learners is not None:
        module = ToyPolicy(torch.float64, seed=2)
        assert all_reduce_sum(world.learners, torch.ones(1)).item() == 2
    if module is not None:
        module.projector.requires_grad_(False)
    if module is not None and world.learners is not None:
        shard(module, world.learner, torch.float64)
    sync = WeightSync(world, plan, module, torch.float32, bucket_bytes)
    for _ in range(2):
        sync.sync()
    if module is None or world.learners is not None:
        return sync.bytes
    return sync.bytes, {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("bucket_bytes", [52, 1 << 20], ids=["many buckets", "one bucket"])
def test_learners_weights_arrive_whole(bucket_bytes: int) -> None:
    plan = apart(("env",), ("rollout",), ("rollout",), ("learner",), ("learner",))
    nobody, first, second, speaker, _ = run_processes(5, _sync, plan, bucket_bytes)
    learnt, own = dict(ToyPolicy(torch.float64, seed=2).named_parameters()), dict(ToyPolicy(torch.float32, seed=1).named_parameters())
    for size, weights in (first, second):
        for name, value in weights.items():
            frozen = name.startswith("projector")
            assert torch.equal(value, own[name] if frozen else learnt[name].float()), name
        assert size == speaker == sum(4 * p.numel() for name, p in own.items() if not name.startswith("projector"))
    assert nobody == 0
