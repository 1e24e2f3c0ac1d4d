"""Owns which episode is played where: the training schedule and the feeds that hand episodes to slots.

Slot s plays its own deterministic sequence, so the list of episodes depends neither on who finishes first nor on the rank a slot lives on.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlarl.envs.spec import EVAL_INIT_STATE, EpisodeSpec
from vlarl.rng import fold, integers


@dataclass(frozen=True)
class TrainingSchedule:
    """slots: global number. tasks: number of tasks. group_size: consecutive slots that start alike (1: none)."""

    seed: int
    slots: int
    tasks: int
    group_size: int

    def episode(self, slot: int, cursor: int) -> EpisodeSpec:
        """The `cursor`-th episode of a slot. Tasks take turns; initial states are drawn by a counter-based key."""
        group = slot // self.group_size
        groups = self.slots // self.group_size
        return EpisodeSpec(
            uid=cursor * self.slots + slot,
            task=(group + cursor * groups) % self.tasks,
            init_state=int(integers(fold(self.seed, group, cursor), EVAL_INIT_STATE)),
            seed=self.seed,
            group=cursor * groups + group if self.group_size > 1 else -1,
        )


class TrainingFeed:
    """Feeds the slots of one rank from a TrainingSchedule. `cursor` counts each slot's episodes so far and is checkpointed."""

    def __init__(self, schedule: TrainingSchedule, slots: range) -> None:
        self._schedule = schedule
        self._slots = slots
        self.cursor = [0] * len(slots)
        self._limit: list[int] | None = None

    def allow(self, episodes_per_slot: int) -> None:
        """Let every slot play so many episodes more, then idle (without a call, slots never idle)."""
        self._limit = [c + episodes_per_slot for c in self.cursor]

    def next(self, slot: int) -> EpisodeSpec | None:
        """The slot's next episode, or None when its allowance is used up."""
        i = slot - self._slots.start
        if self._limit is not None and self.cursor[i] >= self._limit[i]:
            return None
        self.cursor[i] += 1
        return self._schedule.episode(slot, self.cursor[i] - 1)


class ListFeed:
    """Feeds an explicit list of episodes: slot s of `slots` global ones plays rows s, s + slots, s + 2 slots, ..."""

    def __init__(self, episodes: Sequence[EpisodeSpec], slots: int) -> None:
        self._episodes = episodes
        self._slots = slots
        self._cursor: dict[int, int] = {}

    def next(self, slot: int) -> EpisodeSpec | None:
        """The slot's next episode, or None at the end of its list."""
        cursor = self._cursor.setdefault(slot, 0)
        self._cursor[slot] = cursor + 1
        row = cursor * self._slots + slot
        return self._episodes[row] if row < len(self._episodes) else None
