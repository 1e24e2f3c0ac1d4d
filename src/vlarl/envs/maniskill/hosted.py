"""Owns Slot: ManiSkill on the CPU, one scene, as an env host plays it. See envs.host.protocol."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vlarl.envs.host.protocol import Played
from vlarl.envs.maniskill import expert
from vlarl.envs.maniskill.simulation import Simulation
from vlarl.envs.spec import EnvSpec, EpisodeSpec


class Slot:
    """Scenes are opened when an episode first asks for their task, and kept. settings: the recipe's `env` section."""

    def __init__(self, settings: dict[str, Any], spec: EnvSpec) -> None:
        torch.set_num_threads(1)
        self._settings, self._spec = settings, spec
        self._open: dict[str, Simulation] = {}
        self._now = self._simulation(spec.tasks[0])
        self._episode = EpisodeSpec(0, 0, 0, 0)

    def reset(self, episode: EpisodeSpec) -> str:
        """Start an episode; returns its instruction."""
        self._now, self._episode = self._simulation(self._spec.tasks[episode.task]), episode
        self._now.reset([0], [episode])
        return self._now.instructions()[0]

    def play(self, action_KA: np.ndarray) -> Played:
        """Execute actions up to the episode's end."""
        rewards, terminated, success = [], False, False
        for action in torch.from_numpy(np.array(action_KA)):
            outcome = self._now.step(action[None])
            rewards.append(float(outcome.reward))
            terminated, success = bool(outcome.terminated), bool(outcome.success)
            if terminated:
                break
        return Played(rewards, terminated, success)

    def observe(self, image_VHWC: np.ndarray, state_D: np.ndarray) -> None:
        """Render into `image_VHWC`, and the robot's state into `state_D`."""
        image_VHWC[:] = self._now.look()[0].cpu().numpy()  # drawn by a GPU where there is one
        state_D[:] = self._now.feel()[0].numpy()

    def expert(self, clumsiness: float) -> np.ndarray:
        """See expert.py."""
        return expert.act(self._now, self._episode, clumsiness)

    def close(self) -> None:
        for simulation in self._open.values():
            simulation.close()

    def _simulation(self, task: str) -> Simulation:
        if task not in self._open:
            self._open[task] = Simulation(task, 1, self._settings, self._spec, torch.device("cpu"))
        return self._open[task]
