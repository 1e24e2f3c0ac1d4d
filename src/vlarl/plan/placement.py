"""Owns PlacementPlan: the frozen, versioned record of all that is derived from a recipe. Torch-free; ranks read it and the recipe only."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PLAN_VERSION = 1
Role = Literal["env", "rollout", "learner"]


@dataclass(frozen=True)
class RankPlan:
    """One process. slots: half-open range of the global environment slots it simulates (env role), ((0, 0) if none).
    policy_slots: the range it acts for (rollout role). sample_slots: the range whose samples it learns from (learner role)."""

    rank: int
    node: int
    local_rank: int
    device: str
    threads: int
    roles: tuple[Role, ...]
    slots: tuple[int, int]
    policy_slots: tuple[int, int]
    sample_slots: tuple[int, int]


@dataclass(frozen=True)
class WorkerGroup:
    """One torchrun world. backend: nccl or gloo."""

    nnodes: int
    ranks_per_node: int
    backend: Literal["nccl", "gloo"]


@dataclass(frozen=True)
class RolloutPlan:
    """parallel: global slots. chunk_steps: chunks per slot and update (PPO; 0 for GRPO). episodes_per_slot: episodes per slot and
    update (GRPO; 0 for PPO). chunks_per_episode: ceil(horizon / chunk). group_size: slots that share an episode's start (1: none)."""

    parallel: int
    stages: int
    chunk_steps: int
    episodes_per_slot: int
    chunks_per_episode: int
    group_size: int


@dataclass(frozen=True)
class UpdatePlan:
    """samples: chunks per update at most (all ranks). minibatch_samples: of one optimiser step. microbatch: per forward pass and rank.
    accumulation: forward passes per optimiser step and rank, at most."""

    samples: int
    epochs: int
    minibatches: int
    minibatch_samples: int
    microbatch: int
    accumulation: int


@dataclass(frozen=True)
class MemoryRow:
    """One line of the estimate. phase: rollout or update. where: device or host. bytes: per rank."""

    phase: Literal["rollout", "update"]
    component: str
    where: Literal["device", "host"]
    bytes: int


@dataclass(frozen=True)
class PlacementPlan:
    """The whole plan. dtype: compute dtype. equation: the batch arithmetic, printed as it stands. reason: why this mode.
    capacity_bytes: memory of one device (None: unknown)."""

    version: int
    name: str
    mode: Literal["collocated", "disaggregated", "hybrid"]
    reason: str
    seed: int
    dtype: Literal["float32", "float64", "bfloat16"]
    workers: WorkerGroup
    ranks: tuple[RankPlan, ...]
    rollout: RolloutPlan
    update: UpdatePlan
    memory: tuple[MemoryRow, ...]
    equation: str
    capacity_bytes: int | None
