"""Owns the playing of a protocol: the rollout loop over an explicit list of episodes, one row per episode, videos of some."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlarl.envs.pool import EnvPool
from vlarl.envs.spec import EpisodeSpec
from vlarl.evaluation.report import EpisodeRow
from vlarl.rollout.play import Sampler, Spans, play
from vlarl.types import ActionChunk, EnvStep


@dataclass
class Film:
    """What one episode looked like: a frame (uint8, V H W C) per chunk."""

    spec: EpisodeSpec
    instruction: str
    frames: list[Tensor] = field(default_factory=list)
    success: bool = False


@dataclass
class _Open:
    spec: EpisodeSpec
    return_: float = 0.0
    length: int = 0
    film: Film | None = None


class EpisodeRecorder:
    """Recorder of a rollout that keeps a row per finished episode, and films of the episodes that `wants_film` picks by uid.

    watch: called after every chunk step of a stage with the rows so far and the number of actions executed in episodes still open.
    """

    def __init__(self, wants_film: Callable[[int], bool], watch: Callable[[list[EpisodeRow], int], None] | None = None) -> None:
        self.rows: list[EpisodeRow] = []
        self.films: list[Film] = []
        self._wants_film, self._watch = wants_film, watch
        self._open: dict[tuple[int, int], _Open] = {}

    def record(self, stage: int, t: int, step: EnvStep, rows: Tensor, chunk: ActionChunk | None) -> None:
        """See vlarl.rollout.play.Recorder."""
        if t > 0:
            self._outcome(stage, step)
        for b, spec in enumerate(step.episode):
            if spec is None:
                continue
            place = (stage, b)
            if place not in self._open:
                film = Film(spec, step.obs.instruction[b]) if self._wants_film(spec.uid) else None
                self._open[place] = _Open(spec, film=film)
            film = self._open[place].film
            if film is not None:
                film.frames.append(step.obs.image_BVHWC[b].cpu().clone())
        if self._watch is not None:
            self._watch(self.rows, sum(episode.length for episode in self._open.values()))

    def _outcome(self, stage: int, step: EnvStep) -> None:
        result = step.result
        ended = (result.terminated_BK | result.truncated_BK).any(-1).tolist()
        returns, lengths = (result.reward_BK * result.valid_BK).sum(-1).tolist(), result.valid_BK.sum(-1).tolist()
        success = result.success_B.tolist()
        final = {b: row for row, b in enumerate(step.final_index.tolist())}
        for b, end in enumerate(ended):
            episode = self._open.get((stage, b))
            if episode is None:
                continue
            episode.return_ += returns[b]
            episode.length += lengths[b]
            if not end:
                continue
            del self._open[(stage, b)]
            s = episode.spec
            row = EpisodeRow(s.uid, s.task, s.init_state, s.seed, success[b], episode.return_, episode.length)
            self.rows.append(row)
            if episode.film is not None:
                if b in final and step.final_obs is not None:
                    episode.film.frames.append(step.final_obs.image_BVHWC[final[b]].cpu().clone())
                episode.film.success = success[b]
                self.films.append(episode.film)


def play_episodes(pool: EnvPool, sampler: Sampler, recorder: EpisodeRecorder, spans: Spans) -> None:
    """Play whatever the pool's feed hands out, to its end."""
    unlimited = 2**31
    with torch.no_grad():
        play(pool, sampler, recorder, spans, unlimited, critic=False)
