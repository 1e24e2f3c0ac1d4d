"""Owns the prediction of one iteration: a discrete-event simulation of a plan's rollout, and the update after it. Pure, torch-free.

What is simulated is what ranks do: env and rollout ranks take the stages in the same fixed order; a rollout rank acts on a stage once
all env ranks of it have delivered, an env rank simulates it once all actions are back; a rank does one thing at a time, or, where the
plan lets its simulators work beside its policy, two, both slower by what the profile's `overlap` says.
Episodes are taken to begin together and to last until the horizon; a critic then looks at their last frames as well.
Not modelled: episodes that end earlier, trajectories on their way to the learners, gathering weights where the actors learn.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from vlarl.plan.placement import PlacementPlan, StagePart, stage_parts
from vlarl.plan.profile import Profile

ROUNDING = 1e-12  # seconds


@dataclass(frozen=True)
class Prediction:
    """One iteration. frames: environment steps. env_seconds, act_seconds: of the busiest rank. overlap_efficiency: the larger of the two,
    over rollout_seconds. idle: share of the iteration that a rank does nothing, by rank."""

    frames: int
    seconds: float
    rollout_seconds: float
    update_seconds: float
    sync_seconds: float
    env_seconds: float
    act_seconds: float
    overlap_efficiency: float
    idle: tuple[float, ...]

    @property
    def frames_per_second(self) -> float:
        """Of the whole iteration, as the papers count."""
        return self.frames / self.seconds


def predict(plan: PlacementPlan, profile: Profile) -> Prediction:
    """Simulate one iteration of `plan` in which every device costs what `profile` says; frames are counted by the profile's chunks."""
    clock = _both_at_once(plan, profile) if plan.rollout.overlap else simulate_rollout(plan, profile)
    chunks, epochs = _chunk_steps(plan), plan.update.epochs
    learning = {
        r.rank: profile.update((r.sample_slots[1] - r.sample_slots[0]) * chunks, epochs) for r in plan.ranks if "learner" in r.roles
    }
    update = max(learning.values())
    separate = any("rollout" in r.roles and "learner" not in r.roles for r in plan.ranks)
    sync = profile.sync_seconds if separate else 0.0
    seconds = clock.end + update + sync
    env, act = max(clock.env.values()), max(clock.act.values())
    busy = [clock.busy[r.rank] + learning.get(r.rank, 0.0) for r in plan.ranks]
    return Prediction(
        frames=plan.rollout.parallel * chunks * profile.actions_per_chunk,
        seconds=seconds,
        rollout_seconds=clock.end,
        update_seconds=update,
        sync_seconds=sync,
        env_seconds=env,
        act_seconds=act,
        overlap_efficiency=max(env, act) / clock.end if clock.end else 1.0,
        idle=tuple(max(0.0, 1 - b / seconds) if seconds else 0.0 for b in busy),
    )


class Clock:
    """When each rank is free again, and how long it has simulated, acted, or done either. Seconds since the rollout began."""

    def __init__(self) -> None:
        self.free: dict[int, float] = defaultdict(float)
        self.env: dict[int, float] = defaultdict(float)
        self.act: dict[int, float] = defaultdict(float)
        self.busy: dict[int, float] = defaultdict(float)
        self.end = 0.0

    def work(self, rank: int, ready: float, seconds: float, done: dict[int, float]) -> float:
        """`rank` works for `seconds` as soon as it is free and its input is `ready`; returns when it is through."""
        self.free[rank] = max(self.free[rank], ready) + seconds
        done[rank] += seconds
        self.busy[rank] += seconds
        self.end = max(self.end, self.free[rank])
        return self.free[rank]


def simulate_rollout(plan: PlacementPlan, profile: Profile) -> Clock:
    """Play the plan's chunk steps. A critic looks at every stage once more after the last one, to bootstrap from."""
    steps, critic = _chunk_steps(plan), _has_critic(plan)
    stages = [stage_parts(plan.ranks, plan.rollout.stages, s) for s in range(plan.rollout.stages)]
    by_env = [_slots(parts, "env_rank") for parts in stages]
    by_rollout = [_slots(parts, "rollout_rank") for parts in stages]
    # Per stage and rank, whom it waits for and how long the message is under way: worked out once, for there may be hundreds of ranks.
    actions = [_sources(parts, profile, "env_rank", "rollout_rank") for parts in stages]
    pictures = [_sources(parts, profile, "rollout_rank", "env_rank") for parts in stages]
    clock = Clock()
    seen: dict[tuple[int, int], float] = defaultdict(float)  # (stage, env rank) -> when its observations were ready
    chosen: dict[tuple[int, int], float] = {}  # (stage, rollout rank) -> when its actions were
    for t in range(steps + 1):
        frames = _looks(plan, t)
        for s in range(len(stages)):
            if t > 0:
                for rank, slots in by_env[s].items():
                    came = max(chosen[s, source] + seconds for source, seconds in actions[s][rank])
                    seen[s, rank] = clock.work(rank, came, profile.env(slots), clock.env)
            if t < steps or critic:
                for rank, slots in by_rollout[s].items():
                    came = max(seen[s, source] + seconds for source, seconds in pictures[s][rank])
                    chosen[s, rank] = clock.work(rank, came, profile.act(frames * slots), clock.act)
    return clock


def _both_at_once(plan: PlacementPlan, profile: Profile) -> Clock:
    """The same for ranks that simulate and act by themselves, one stage beside another.

    The n-th simulation follows the n-th forward pass, and the pass after it, of the same stage, comes `stages` later.
    """
    clock, stages, steps = Clock(), plan.rollout.stages, _chunk_steps(plan)
    passes, together = (steps + _has_critic(plan)) * stages, 1 / (2 - profile.overlap)
    for rank in plan.ranks:
        slots = (rank.slots[1] - rank.slots[0]) // stages
        acted = simulated = 0
        simulating, acting = profile.env(slots), profile.act(_looks(plan, 0) * slots)  # what is left of the jobs at hand
        while acted < passes or simulated < steps * stages:
            can_act = acted < passes and acted - stages < simulated
            can_simulate = simulated < steps * stages and simulated < acted
            speed = together if can_act and can_simulate else 1.0
            seconds = min([acting / speed] * can_act + [simulating / speed] * can_simulate)
            clock.busy[rank.rank] += seconds
            if can_act:
                acting -= seconds * speed
                clock.act[rank.rank] += seconds
            if can_simulate:
                simulating -= seconds * speed
                clock.env[rank.rank] += seconds
            if can_act and acting <= ROUNDING:
                acted += 1
                acting = profile.act(_looks(plan, acted // stages) * slots)
            if can_simulate and simulating <= ROUNDING:
                simulated += 1
                simulating = profile.env(slots)
        clock.end = max(clock.end, clock.busy[rank.rank])
    return clock


def _has_critic(plan: PlacementPlan) -> bool:
    return plan.rollout.chunk_steps > 0


def _looks(plan: PlacementPlan, t: int) -> int:
    """Frames per slot that the policy sees at chunk step t: with a critic, also the last ones of episodes that have just ended."""
    return 2 if _has_critic(plan) and t > 0 and t % plan.rollout.chunks_per_episode == 0 else 1


def _chunk_steps(plan: PlacementPlan) -> int:
    """Chunks that every slot plays per update, at most."""
    return plan.rollout.chunk_steps or plan.rollout.episodes_per_slot * plan.rollout.chunks_per_episode


def _slots(parts: tuple[StagePart, ...], side: Literal["env_rank", "rollout_rank"]) -> dict[int, int]:
    counts: dict[int, int] = defaultdict(int)
    for part in parts:
        counts[getattr(part, side)] += part.end - part.start
    return counts


def _sources(
    parts: tuple[StagePart, ...], profile: Profile, to: Literal["env_rank", "rollout_rank"], of: Literal["env_rank", "rollout_rank"]
) -> dict[int, list[tuple[int, float]]]:
    """Rank -> (rank that it hears from, seconds of the message) for every part of a stage."""
    found: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for part in parts:
        found[getattr(part, to)].append((getattr(part, of), _travel(part, profile)))
    return found


def _travel(part: StagePart, profile: Profile) -> float:
    return profile.message(part.end - part.start) if part.env_rank != part.rollout_rank else 0.0
