"""Owns the one rollout loop: stages of an EnvPool in turn, each acted on while the others simulate. Training and evaluation both use it."""
from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vlarl.envs.pool import EnvPool
from vlarl.envs.spec import EpisodeSpec
from vlarl.rng import fold, uniform
from vlarl.types import ActionChunk, EnvStep, Observation


class Policy(Protocol):
    """The acting half of a VLA policy."""

    def act(self, obs: Observation, noise_BN: Tensor | None, temperature: float, top_k: int) -> ActionChunk: ...


class Spans(Protocol):
    """Names where time goes."""

    def span(self, name: str) -> AbstractContextManager[None]: ...


class Recorder(Protocol):
    """Watches a rollout. Called once per stage and chunk step t, with t running from 0."""

    def record(self, stage: int, t: int, step: EnvStep, rows: Tensor, chunk: ActionChunk | None) -> None:
        """`step` holds the outcome of chunk t - 1 and what is seen now. `chunk` (None: nobody was asked) has one row per entry of `rows`
        (int64: active slots, in order) and, for a critic, then one per `step.final_index`. `rows` is empty once the stage has ended."""


@dataclass(frozen=True)
class Sampler:
    """Turns observations into actions. The noise is keyed by (seed, episode, chunk, token), so an action depends on nothing else.

    temperature 0 is greedy.
    """

    policy: Policy
    seed: int
    tokens: int
    temperature: float
    top_k: int

    def __call__(self, obs: Observation, uid: Tensor, chunk_index: Tensor) -> ActionChunk:
        """Act on `obs` (R rows); uid, chunk_index int64 (R,)."""
        noise = None
        if self.temperature > 0:
            key = fold(self.seed, uid[:, None], chunk_index[:, None], torch.arange(self.tokens)[None])
            noise = uniform(key).to(obs.image_BVHWC.device)
        return self.policy.act(obs, noise, self.temperature or 1.0, self.top_k)


def play(pool: EnvPool, sampler: Sampler, recorder: Recorder, spans: Spans, max_chunks: int, critic: bool) -> int:
    """Play until every slot idles or has played `max_chunks` chunks; returns the number of chunk steps.

    critic: ask the policy also for the values of final frames and, once more, after the last chunk (to bootstrap from).
    """
    pool.begin()
    open_stages = set(range(pool.stages))
    t = 0
    while open_stages:
        for stage in sorted(open_stages):
            with spans.span(pool.span):
                step = pool.recv(stage)
            active = [b for b, e in enumerate(step.episode) if e is not None]
            last = t >= max_chunks or not active
            rows = torch.tensor(active, dtype=torch.int64)
            with spans.span("rollout/act"):
                chunk = _ask(sampler, step, rows, critic) if not last or critic else None
            if last:
                open_stages.remove(stage)
            else:
                assert chunk is not None
                with spans.span(pool.span):  # before recording: somebody may be waiting for it
                    pool.send(stage, _spread(chunk.action_BKA, rows, len(step.episode)))
            with spans.span("rollout/other"):
                recorder.record(stage, t, step, rows[:0] if last and not critic else rows, chunk)
        t += 1
    return t - 1


def _ask(sampler: Sampler, step: EnvStep, rows: Tensor, critic: bool) -> ActionChunk | None:
    """One forward for the active slots and for the final frames that a critic wants to judge."""
    episodes: list[EpisodeSpec | None] = [step.episode[b] for b in rows.tolist()]
    uid = torch.tensor([e.uid if e is not None else 0 for e in episodes], dtype=torch.int64)
    chunk_index = step.chunk_index_B[rows]
    obs = step.obs if len(rows) == len(step.episode) else step.obs.select(rows)
    if critic and step.final_obs is not None:
        final = step.final_obs
        image = torch.cat([obs.image_BVHWC, final.image_BVHWC])
        obs = Observation(image, torch.cat([obs.state_BD, final.state_BD]), obs.instruction + final.instruction)
        uid = torch.cat([uid, uid.new_full((len(final),), -1)])
        chunk_index = torch.cat([chunk_index, chunk_index.new_zeros(len(final))])
    if len(obs) == 0:
        return None
    chunk = sampler(obs, uid, chunk_index)
    if chunk.action_BKA.is_cuda:
        torch.cuda.current_stream().synchronize()  # the time belongs to acting; the recorder would wait for it anyway
    return chunk


def _spread(action_RKA: Tensor, rows: Tensor, slots: int) -> Tensor:
    """Actions of the active rows among all slots (idle: zero)."""
    if len(rows) == slots:
        return action_RKA[:slots]
    action_BKA = action_RKA.new_zeros((slots, *action_RKA.shape[1:]))
    action_BKA[rows.to(action_RKA.device)] = action_RKA[: len(rows)]
    return action_BKA
