"""Owns the recording of episodes on a worker rank: an expert or a policy plays, every step is seen, and a LeRobot v3 dataset is written."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlarl.datasets.episode import Episode
from vlarl.datasets.write import DatasetWriter, Shape
from vlarl.distributed.fsdp import acting
from vlarl.envs.base import BatchedEnv, Teacher
from vlarl.envs.spec import EpisodeSpec
from vlarl.errors import PlanError
from vlarl.evaluation.statistics import wilson
from vlarl.metrics.status import write_status
from vlarl.recipe.schema import Env, Record
from vlarl.rollout.episodes import TrainingFeed, TrainingSchedule
from vlarl.types import Observation
from vlarl.worker.context import Context
from vlarl.worker.setup import build_env, build_sampler, build_sharded_policy

STEPS_PER_SECOND = {"libero": 20, "maniskill": 20, "robotwin": 20, "tabletop": 10}  # for the time stamps
PATIENCE = 40  # episodes without one to keep, after which recording is given up
SECONDS_BETWEEN_REPORTS = 1.0

Player = Callable[[Observation, list["_Open"]], Tensor]  # what is seen in all slots -> the next action of each, float32 (B, A)


@dataclass
class _Open:
    """The episode that a slot is in the middle of. left: actions of a policy's chunk still to be played, chunks: of those so far."""

    spec: EpisodeSpec
    frames: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # image, state, action
    rewards: list[float] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    chunks: int = 0


def record(run: Context, folder: Path) -> dict[str, Any]:
    """Write the dataset that the recipe's `record` section asks for; the result's table. One rank."""
    settings, env = run.recipe.record, run.recipe.env
    slots = min(env.parallel, settings.episodes)
    simulator = build_env(run, range(slots))
    seen = simulator.spec
    shape = Shape(camera_names(env, seen.views), seen.height, seen.width, seen.state_dim, seen.action_dim)
    try:
        with (
            _player(run, simulator) as player,
            DatasetWriter(folder, shape, STEPS_PER_SECOND[env.simulator], env.simulator, settings.images) as writer,
        ):
            session = _Session(run, simulator, player, writer, slots)
            while writer.episodes < settings.episodes:
                session.step()
    finally:
        simulator.close()
    return session.result(folder)


def camera_names(env: Env, views: int) -> tuple[str, ...]:
    """What the views are called in a dataset."""
    named = {"maniskill": env.maniskill.cameras, "robotwin": env.robotwin.cameras}
    return (env.simulator in named and named[env.simulator]) or ("main", "wrist")[:views]


@contextmanager
def _player(run: Context, simulator: BatchedEnv) -> Iterator[Player]:
    """Who plays: the simulator's expert, or the recipe's policy."""
    settings = run.recipe.record
    if settings.player == "expert":
        if not isinstance(simulator, Teacher):
            hint = "Record a policy (--policy), or on the CPU (device=cpu)."
            raise PlanError(f"{simulator.spec.name} has no scripted expert here.", hint)
        teacher = simulator

        def expert(obs: Observation, open_: list[_Open]) -> Tensor:
            return teacher.expert_action(torch.ones(len(open_), dtype=torch.bool), settings.clumsiness).cpu()

        yield expert
        return
    policy = build_sharded_policy(run, trainable=False)
    sampler = build_sampler(policy, policy.spec, run.recipe.seed, settings.temperature, 0)

    def think(obs: Observation, open_: list[_Open]) -> Tensor:
        rows = [b for b, episode in enumerate(open_) if not episode.left]
        if rows:
            uid, chunk = (torch.tensor([value(open_[b]) for b in rows]) for value in (lambda e: e.spec.uid, lambda e: e.chunks))
            for b, action_KA in zip(rows, sampler(obs.select(torch.tensor(rows)), uid, chunk).action_BKA.cpu(), strict=True):
                open_[b].left, open_[b].chunks = list(action_KA), open_[b].chunks + 1
        return torch.stack([episode.left.pop(0) for episode in open_])

    with acting(policy.module), torch.no_grad():
        yield think


class _Session:
    """All slots playing side by side, one control step at a time; episodes go to the writer as they end."""

    def __init__(self, run: Context, env: BatchedEnv, player: Player, writer: DatasetWriter, slots: int) -> None:
        self._run, self._env, self._player, self._writer = run, env, player, writer
        self._settings: Record = run.recipe.record
        self._generator = torch.Generator().manual_seed(run.recipe.seed)
        schedule = TrainingSchedule(run.recipe.seed, slots, len(run.tasks), 1)
        self._feed = TrainingFeed(schedule, range(slots))
        self._every = torch.arange(slots)
        self._started, self._told = time.perf_counter(), 0.0
        self._played: list[tuple[int, bool]] = []  # task and success of every finished episode
        self._frames = 0
        self._open: list[_Open] = [self._next(b) for b in range(slots)]
        env.reset(self._every, [episode.spec for episode in self._open])

    def step(self) -> None:
        """Look, act, keep what was seen and meant, play; finish and begin episodes."""
        obs = self._env.observe(self._every)
        action_BA = self._player(obs, self._open)
        executed = self._disturb(action_BA)
        result = self._env.step_chunk(executed[:, None], torch.ones(len(self._open), dtype=torch.bool))
        image, state, reward = obs.image_BVHWC.cpu(), obs.state_BD.cpu(), result.reward_BK[:, 0].tolist()
        ended = (result.terminated_BK | result.truncated_BK)[:, 0].tolist()
        success = result.success_B.tolist()
        for b, episode in enumerate(self._open):
            episode.frames.append((image[b].clone(), state[b].clone(), action_BA[b].clone()))
            episode.rewards.append(reward[b])
            if ended[b]:
                self._finish(episode, obs.instruction[b], success[b])
        self._frames += len(self._open)
        again = [b for b, end in enumerate(ended) if end]
        for b in again:
            self._open[b] = self._next(b)
        if again and self._writer.episodes < self._settings.episodes:
            self._env.reset(torch.tensor(again), [self._open[b].spec for b in again])
        self._report()

    def result(self, folder: Path) -> dict[str, Any]:
        """The table at the end: all episodes that were played, kept or not."""
        rows = []
        for number, task in enumerate(self._run.tasks):
            won = [success for t, success in self._played if t == number]
            if won:
                low, high = wilson(sum(won), len(won))
                rows.append([task, str(len(won)), f"{sum(won)}/{len(won)}", f"{sum(won) / len(won):.1%} [{low:.1%}, {high:.1%}]"])
        seconds = time.perf_counter() - self._started
        kept = f"{_counted(self._writer.episodes, 'episode')}, {_counted(self._writer.frames, 'frame')}: {folder}"
        speed = f"{seconds:.0f} s, {self._frames / seconds:.1f} frames/s. Clone it: warmstart: [{{steps: 1000, data: {folder}}}]"
        columns = ["task", "played", "successes", "rate"]
        return {"table": {"title": f"recorded by the {self._settings.player}", "columns": columns, "rows": rows}, "notes": [kept, speed]}

    def _next(self, slot: int) -> _Open:
        spec = self._feed.next(slot)
        assert spec is not None, "the training feed has no end"
        return _Open(spec)

    def _disturb(self, action_BA: Tensor) -> Tensor:
        if self._settings.noise == 0:
            return action_BA
        noise = torch.randn(action_BA.shape, generator=self._generator) * self._settings.noise
        noise[:, -1] = 0
        return action_BA + noise  # which simulators cut to their range

    def _finish(self, episode: _Open, instruction: str, success: bool) -> None:
        spec = episode.spec
        self._played.append((spec.task, success))
        if self._writer.episodes < self._settings.episodes and (success or self._settings.keep == "all"):
            image, state, action = (torch.stack(part).numpy() for part in zip(*episode.frames, strict=True))
            reward = torch.tensor(episode.rewards).numpy()
            self._writer.add(Episode(image, state, action, reward, instruction, success, (spec.task, spec.init_state, spec.seed)))
        if len(self._played) == PATIENCE and self._writer.episodes == 0:
            hint = "Set record.keep=all, a longer env.horizon, less record.noise, or let something better play."
            raise PlanError(f"None of {PATIENCE} episodes ended in success, and successes alone are kept.", hint)

    def _report(self) -> None:
        seconds = time.perf_counter() - self._started
        if seconds - self._told < SECONDS_BETWEEN_REPORTS:
            return
        self._told = seconds
        kept, wanted = self._writer.episodes, self._settings.episodes
        self._run.heartbeat.beat("recording")
        write_status(
            self._run.run_dir,
            phase="recording",
            update=kept,
            updates=wanted,
            frames_per_second=self._frames / seconds,
            eta_seconds=seconds / kept * (wanted - kept) if kept else None,
            line=f"{sum(s for _, s in self._played)} of {_counted(len(self._played), 'episode')} ended in success",
        )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
