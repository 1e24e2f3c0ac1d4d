"""Owns ManiSkill: a batch of scenes of one task in the rank's own process, states and frames staying on the GPU. A BatchedEnv."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from vlarl.envs.maniskill.simulation import Simulation
from vlarl.envs.spec import EnvSpec, EpisodeSpec
from vlarl.errors import PlanError
from vlarl.types import ChunkResult, Observation


class ManiSkill:
    """`num_slots` scenes on `device` (a CPU has room for one). settings: the recipe's `env` section as a dict."""

    def __init__(self, num_slots: int, settings: Mapping[str, Any], spec: EnvSpec, device: torch.device) -> None:
        """PlanError where a batch is to play more than one task, or more scenes than a CPU takes."""
        if len(spec.tasks) > 1:
            raise PlanError(f"env.tasks: scenes of a GPU batch play one task, got {len(spec.tasks)}.", "Name one task per run.")
        if num_slots > 1 and device.type == "cpu":
            raise PlanError(f"env.parallel: ManiSkill steps one scene per process on a CPU, got {num_slots}.", "Use env hosts.")
        self.spec = spec
        self._simulation = Simulation(spec.tasks[0], num_slots, dict(settings), spec, device)
        self.device = self._simulation.device
        self._step_B = torch.zeros(num_slots, dtype=torch.int64, device=self.device)
        self._done_B = torch.ones(num_slots, dtype=torch.bool, device=self.device)
        self._sentences = [""] * num_slots
        self._episode: list[EpisodeSpec | None] = [None] * num_slots
        self._played: list[list[Tensor]] = [[] for _ in range(num_slots)]  # chunks (K, A) of the open episode, on the CPU

    def reset(self, index: Tensor, episodes: Sequence[EpisodeSpec]) -> None:
        """Start `episodes` in the slots `index` (int64)."""
        rows = index.tolist()
        self._simulation.reset(rows, episodes)
        self._step_B[rows] = 0
        self._done_B[rows] = False
        told = self._simulation.instructions()
        for row, episode in zip(rows, episodes, strict=True):
            self._sentences[row], self._episode[row], self._played[row] = told[row], episode, []

    def step_chunk(self, action_BKA: Tensor, active_B: Tensor) -> ChunkResult:
        """Execute K actions in the active slots, each up to its episode's end, where it stays to be looked at; render nothing."""
        going = active_B.to(self.device) & ~self._done_B
        actions = action_BKA.detach().cpu()
        for row in going.nonzero()[:, 0].tolist():
            self._played[row].append(actions[row].clone())
        action_BKA = action_BKA.to(self.device)
        ended_early = torch.zeros_like(going)
        kept: dict[str, Any] = {}
        columns: list[tuple[Tensor, ...]] = []
        success = torch.zeros_like(going)
        for k in range(action_BKA.shape[1]):
            if not going.any():
                columns.append((torch.zeros_like(going, dtype=torch.float32), *[torch.zeros_like(going)] * 3))
                continue
            outcome = self._simulation.step(torch.where(going[:, None], action_BKA[:, k], 0.0))
            self._step_B += going
            terminated = going & outcome.terminated
            truncated = going & ~terminated & (self._step_B >= self.spec.horizon)
            success = success | terminated & outcome.success
            columns.append((torch.where(going, outcome.reward, 0.0), terminated, truncated, going))
            over = terminated | truncated
            going = going & ~over
            if over.any() and going.any() and k + 1 < action_BKA.shape[1]:  # the others go on: note where these ended
                kept = self._simulation.freeze(over.nonzero()[:, 0], kept)
                ended_early = ended_early | over
            self._done_B = self._done_B | over
        if kept:
            self._simulation.thaw(ended_early.nonzero()[:, 0], kept)
        reward, terminated, truncated, valid = (torch.stack(column, 1) for column in zip(*columns, strict=True))
        return ChunkResult(reward, terminated, truncated, valid, success)

    def observe(self, index: Tensor) -> Observation:
        """Frames, states (see Simulation.feel) and sentences of the slots `index` (int64). All scenes are rendered together."""
        index = index.to(self.device)
        image, state = self._simulation.look()[index], self._simulation.feel()[index]
        return Observation(image, state, tuple(self._sentences[i] for i in index.tolist()))

    def state_dict(self) -> dict[str, Any]:
        """The open episodes and what was played in them: a simulator's own state leaves out contacts and targets."""
        done_B = self._done_B.tolist()
        open_ = {i: episode for i, episode in enumerate(self._episode) if episode is not None and not done_B[i]}
        return {
            "slots": list(open_),
            "episodes": [astuple(episode) for episode in open_.values()],
            "played": [[chunk.clone() for chunk in self._played[i]] for i in open_],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Play the saved episodes up to where they were, all ending together."""
        self._done_B[:] = True
        lengths = [len(chunks) for chunks in state["played"]]
        longest = max(lengths, default=0)
        for t in range(longest + 1):
            due = [n for n, length in enumerate(lengths) if longest - length == t]
            if due:
                self.reset(torch.tensor([state["slots"][n] for n in due]), [EpisodeSpec(*state["episodes"][n]) for n in due])
            if t == longest:
                break
            running = [n for n, length in enumerate(lengths) if longest - length <= t]
            chunk = state["played"][running[0]][0]
            action_BKA, active_B = torch.zeros(len(self._played), *chunk.shape), torch.zeros(len(self._played), dtype=torch.bool)
            for n in running:
                action_BKA[state["slots"][n]] = state["played"][n][t - (longest - lengths[n])]
                active_B[state["slots"][n]] = True
            self.step_chunk(action_BKA, active_B)

    def close(self) -> None:
        self._simulation.close()
