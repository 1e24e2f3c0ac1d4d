"""Owns what a simulator adapter must offer (BatchedEnv) and the table of adapters. A new simulator is one module and one row here."""
from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from vlarl.envs.spec import EnvSpec, EpisodeSpec
from vlarl.types import ChunkResult, Observation

SIMULATORS = {"tabletop": "vlarl.envs.tabletop.env:Tabletop"}


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


def simulator_class(name: str) -> type[Any]:
    """The adapter class behind a simulator's name."""
    module, attribute = SIMULATORS[name].split(":")
    return getattr(import_module(module), attribute)


def device_of(obs: Observation) -> torch.device:
    """Where a simulator leaves its frames."""
    return obs.image_BVHWC.device
