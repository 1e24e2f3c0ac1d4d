"""Owns what every part of a worker rank shares: the run folder, recipe, plan, world, spans and heartbeat."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vlarl import serial
from vlarl.distributed.mesh import World, init_world
from vlarl.distributed.reduce import meet
from vlarl.envs.hosts import HostedEnv
from vlarl.metrics.spans import Spans
from vlarl.metrics.status import Heartbeat
from vlarl.plan.placement import PlacementPlan, RankPlan
from vlarl.plan.specs import simulator_spec
from vlarl.recipe.schema import Recipe

WAIT = "rollout/wait"  # the name under which ranks wait for others that simulate or act
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Context:
    """One rank of one run. compute_dtype: of the forward pass and of weights that are not trained; masters are float32
    (float64 in a float64 run).

    hosted: simulators in env hosts that this rank has started. evaluation_hosts: those of them that wait for the next evaluation, by
    variation and slots.
    """

    run_dir: Path
    recipe: Recipe
    plan: PlacementPlan
    world: World
    spans: Spans
    heartbeat: Heartbeat
    hosted: list[HostedEnv] = field(default_factory=list)
    evaluation_hosts: dict[tuple[str, range], HostedEnv] = field(default_factory=dict)

    @property
    def rank_plan(self) -> RankPlan:
        return self.plan.ranks[self.world.rank]

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.plan.dtype]

    @property
    def master_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that EpisodeSpec.task numbers."""
        return simulator_spec(self.recipe.env).tasks

    def close_hosts(self) -> None:
        """End every env host; once more does no harm."""
        for env in self.hosted:
            env.close()

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Time a wait for other ranks, and go on telling the launcher that this one is alive."""
        with self.heartbeat.waiting(name), self.spans.span(name):
            yield

    def meet(self, world: World, what: str) -> None:
        """Wait for the slowest rank of `world` at `what`, before a collective would: that has one deadline, and nothing beats in it."""
        if world.world_size > 1:
            with self.waiting(WAIT):
                meet(world, what)

    def span(self, name: str) -> AbstractContextManager[None]:
        """Time a phase, and tell the launcher that this rank is alive in it."""
        if name == WAIT:
            return self.waiting(name)
        self.heartbeat.beat(name)
        return self.spans.span(name)


def open_context(run_dir: Path) -> Context:
    """Read the run folder and join the world."""
    recipe = serial.load(Recipe, run_dir / "recipe.json")
    plan = serial.load(PlacementPlan, run_dir / "plan.json")
    world = init_world(plan, recipe.stall_seconds)
    heartbeat = Heartbeat(run_dir, world.rank)
    heartbeat.beat("set-up")
    return Context(run_dir, recipe, plan, world, Spans(run_dir, world.rank), heartbeat)
