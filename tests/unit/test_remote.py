"""Simulation on other ranks and the routing of trajectories: what a learner gets is what it would have collected by itself, bit for bit."""
from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.fakes import FakeEnv, FakePolicy, K, N, NoSpans, episode, one_rank_plan
from helpers.memory_links import MemoryLinks, in_threads
from vlarl.distributed.routing import Router
from vlarl.envs.pool import FinalFrames, LocalPool
from vlarl.envs.remote import Line, RemotePool, serve
from vlarl.envs.spec import EpisodeSpec
from vlarl.plan.placement import PlacementPlan, RankPlan, RolloutPlan, stage_parts
from vlarl.plan.roles import Roles, env_slots, policy_slots, sample_slots
from vlarl.rollout.collector import Collector
from vlarl.rollout.play import Sampler
from vlarl.types import TrajectoryBatch

SLOTS, GROUP = 12, 2
CPU = torch.device("cpu")


class Feed:
    """Slot s plays episodes of 1 to 7 actions, every other one a success; `allowance` of them per rollout (None: no end)."""

    def __init__(self, allowance: int | None) -> None:
        self._allowance = allowance
        self._cursor: dict[int, int] = {}
        self._limit: dict[int, int] = {}

    def allow(self) -> None:
        if self._allowance is not None:
            self._limit = {s: self._cursor.get(s, 0) + self._allowance for s in range(SLOTS)}

    def next(self, slot: int) -> EpisodeSpec | None:
        cursor = self._cursor.get(slot, 0)
        if self._allowance is not None and cursor >= self._limit[slot]:
            return None
        self._cursor[slot] = cursor + 1
        return episode(cursor * SLOTS + slot, 1 + (5 * slot + 3 * cursor) % 7, (slot + cursor) % 2 == 0, slot // GROUP)


def plan_for(roles: Roles, stages: int) -> PlacementPlan:
    env, acting, learning = env_slots(roles, SLOTS), policy_slots(roles, SLOTS), sample_slots(roles, SLOTS, GROUP)
    none = (0, 0)
    ranks = tuple(
        RankPlan(r, 0, r, "cpu", 1, roles.of(r), env.get(r, none), acting.get(r, none), learning.get(r, none))
        for r in sorted({*roles.env, *roles.rollout, *roles.learner})
    )
    base = vars(one_rank_plan())
    return PlacementPlan(**{**base, "mode": roles.mode, "ranks": ranks, "rollout": RolloutPlan(SLOTS, stages, 1, 0, 1, GROUP, 1)})


def local_pool(slots: tuple[int, int], stages: int, feed: Feed, final: FinalFrames) -> LocalPool:
    count = (slots[1] - slots[0]) // stages
    return LocalPool([FakeEnv(count) for _ in range(stages)], slots[0], count, K, feed, final)


def collector(pool: Any, max_chunks: int, critic: bool) -> Collector:
    return Collector(pool, max_chunks, K, N, 1 if critic else 0, torch.float32)


SAMPLER = Sampler(FakePolicy(), 7, N, 1.0, 0)


def collected_alone(slots: tuple[int, int], allowance: int | None, max_chunks: int, critic: bool, rollouts: int) -> list[TrajectoryBatch]:
    feed = Feed(allowance)
    pool = local_pool(slots, 1, feed, "truncated" if critic else "none")
    collect = collector(pool, max_chunks, critic)
    batches = []
    for _ in range(rollouts):
        feed.allow()
        batches.append(collect.collect(SAMPLER, NoSpans(), 3).clone())
    return batches


def collected_apart(
    plan: PlacementPlan, allowance: int | None, max_chunks: int, critic: bool, rollouts: int
) -> dict[int, list[TrajectoryBatch]]:
    stages = plan.rollout.stages

    def body(rank: int, links: MemoryLinks) -> list[TrajectoryBatch | None]:
        me = plan.ranks[rank]
        lines = [
            Line(links.to(p.rollout_rank if p.env_rank == rank else p.env_rank), s, p.start, p.end)  # type: ignore[arg-type]
            for s in range(stages)
            for p in stage_parts(plan.ranks, stages, s)
            if rank in (p.env_rank, p.rollout_rank)
        ]
        router = Router(rank, plan, links)  # type: ignore[arg-type]
        feed, spec = Feed(allowance), FakeEnv(1).spec
        pool = local_pool(me.slots, stages, feed, "truncated" if critic else "none") if "env" in me.roles else None
        collect = collector(RemotePool(spec, lines, K, max_chunks, CPU), max_chunks, critic) if "rollout" in me.roles else None
        results = []
        for _ in range(rollouts):
            batch = None
            feed.allow()
            if pool is not None:
                serve(pool, lines, max_chunks, CPU, NoSpans())
            if collect is not None:
                batch = collect.collect(SAMPLER, NoSpans(), 3)
            routed = router.route(batch)
            results.append(routed and routed.clone())
        return results

    results = in_threads(len(plan.ranks), body)
    return {r.rank: results[r.rank] for r in plan.ranks if "learner" in r.roles}


def assert_same(one: TrajectoryBatch, other: TrajectoryBatch) -> None:
    for field in fields(TrajectoryBatch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), field.name
        else:
            assert a == b, field.name


ROLES = {
    "1 env, 1 rollout, 2 learners": Roles("disaggregated", (0,), (1,), (2, 3)),
    "2 env, 1 rollout, 1 learner": Roles("disaggregated", (0, 1), (2,), (3,)),
    "1 env, 2 rollout, 3 learners": Roles("disaggregated", (0,), (1, 2), (3, 4, 5)),
    "hybrid 2:2": Roles("hybrid", (0, 1), (2, 3), (0, 1, 2, 3)),
    "hybrid 1:3": Roles("hybrid", (0,), (1, 2, 3), (0, 1, 2, 3)),
    "hybrid 3:2, crosswise": Roles("hybrid", (0, 2, 4), (1, 3), (0, 1, 2, 3, 4)),
}


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("roles", ROLES.values(), ids=list(ROLES))
@pytest.mark.parametrize(("allowance", "max_chunks", "critic"), [(None, 5, True), (2, 8, False)], ids=["ppo", "grpo"])
def test_placement_leaves_trajectories_alone(roles: Roles, stages: int, allowance: int | None, max_chunks: int, critic: bool) -> None:
    plan = plan_for(roles, stages)
    apart = collected_apart(plan, allowance, max_chunks, critic, rollouts=2)
    for rank, batches in apart.items():
        alone = collected_alone(plan.ranks[rank].sample_slots, allowance, max_chunks, critic, rollouts=2)
        for one, other in zip(alone, batches, strict=True):
            assert other.episodes
            assert_same(one, other)
