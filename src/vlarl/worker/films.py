"""Owns which episodes end up as videos, and where."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlarl.evaluation.runner import Film
from vlarl.metrics.video import annotate, write_mp4
from vlarl.types import TrajectoryBatch
from vlarl.worker.context import Context

FRAMES_PER_SECOND = 4  # a frame per action chunk
TRAINING_FILMS = 2


def _side_by_side(frames_VHWC: Sequence[Tensor]) -> Tensor:
    """Views next to one another: (T, H, V*W, C)."""
    return torch.stack([torch.cat(list(frame), dim=1) for frame in frames_VHWC])


def write_films(run: Context, films: Sequence[Film], prefix: str, count: int) -> None:
    """At most `count` successes and `count` failures, as videos/{prefix}-{task}-{uid}-{success|failure}.mp4."""
    for success, word in ((True, "success"), (False, "failure")):
        for film in sorted((f for f in films if f.success is success), key=lambda f: f.spec.uid)[:count]:
            task = run.tasks[film.spec.task]
            path = run.run_dir / "videos" / f"{prefix}-{task}-{film.spec.uid:04d}-{word}.mp4"
            write_mp4(path, annotate(_side_by_side(film.frames), film.instruction, success), FRAMES_PER_SECOND)


def film_batch(run: Context, batch: TrajectoryBatch, update: int) -> None:
    """Videos of a few training episodes that were played within this update from start to end."""
    films = []
    for row, episode in enumerate(batch.episodes):
        steps, column = (batch.episode_TB == row).nonzero().unbind(-1)
        if episode.length == int(batch.valid_TBK[steps, column].sum()):  # else it began in an earlier update
            instruction = batch.instructions[int(batch.instruction_TB[steps[0], column[0]])]
            frames = list(batch.image_TBVHWC[steps, column].clone())
            films.append(Film(episode.spec, instruction, frames, episode.success))
        if len(films) >= 8 * TRAINING_FILMS:
            break
    write_films(run, films, f"train-{update:06d}", TRAINING_FILMS)
