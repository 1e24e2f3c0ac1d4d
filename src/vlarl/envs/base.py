"""Owns what a simulator adapter must offer and the tables of adapters. A new simulator is one module and one row here.

An adapter either runs in the rank (SIMULATORS: a BatchedEnv) or in env hosts (HOSTED: an envs.host.protocol.Simulator, which
hosts.HostedEnv makes a BatchedEnv of). One that can do both runs in the rank where the rank has a GPU (EnvSpec.hosted).
"""
from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vlarl.envs.spec import EnvSpec, EpisodeSpec
from vlarl.types import ChunkResult, Observation

SIMULATORS = {"tabletop": "vlarl.envs.tabletop.env:Tabletop", "maniskill": "vlarl.envs.maniskill.batched:ManiSkill"}
# Called in the host with the recipe's env section (a dict) and the EnvSpec.
HOSTED = {
    "libero": "vlarl.envs.libero.env:Libero",
    "maniskill": "vlarl.envs.maniskill.hosted:Slot",
    "robotwin": "vlarl.envs.robotwin.env:RoboTwin",
}


class BatchedEnv(Protocol):
    """A simulator of several slots. Slots are independent: what happens in one never depends on the others."""

    spec: EnvSpec

    def reset(self, index: Tensor, episodes: Sequence[EpisodeSpec]) -> None:
        """Start `episodes` in the slots `index` (int64)."""

    def step_chunk(self, action_BKA: Tensor, active_B: Tensor) -> ChunkResult:
        """Execute K actions in the active slots, each up to its episode's end; render nothing."""

    def observe(self, index: Tensor) -> Observation:
        """Render the slots `index` (int64)."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly from here."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class WorksAhead(Protocol):
    """A BatchedEnv that can simulate while the rank does something else."""

    def start_chunk(self, action_BKA: Tensor, active_B: Tensor) -> None:
        """Begin; `step_chunk` with the same arguments, called next, waits for the result."""


@runtime_checkable
class Teacher(Protocol):
    """A BatchedEnv that knows how its tasks are done, from what a policy does not see."""

    def expert_action(self, active_B: Tensor, clumsiness: float) -> Tensor:
        """The scripted expert's next action for the slots active_B (bool), float32 (B, A), zero elsewhere. clumsiness: share of episodes,
        by a fixed draw of each, in which it misses its aim."""


def simulator_class(name: str) -> type[Any]:
    """The adapter class behind a simulator's name."""
    module, attribute = SIMULATORS[name].split(":")
    return getattr(import_module(module), attribute)
