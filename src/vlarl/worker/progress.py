"""Owns how far a run has come: the counters that a checkpoint keeps, and what is told to the user after every update."""
from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

from vlarl import serial
from vlarl.distributed.reduce import all_gather_objects, all_reduce_sum
from vlarl.distributed.residency import Offload, children_bytes
from vlarl.metrics.curve import draw_curve
from vlarl.metrics.sinks import METRICS_FILE, MetricsWriter
from vlarl.metrics.spans import bottleneck_line, simulation_seconds
from vlarl.metrics.status import write_status
from vlarl.metrics.words import rate_text
from vlarl.plan.placement import Phase, phase_bytes
from vlarl.types import TrajectoryBatch
from vlarl.worker.context import Context
from vlarl.worker.setup import Trainer

RECENT_EPISODES = 400  # over which "success so far" is taken


@dataclass
class Progress:
    """update: updates done. critic_ready: update at which the critic's warm-up ended (None: it has not). recent: successes of the latest
    episodes of all ranks. best: highest success rate at an evaluation and its update."""

    update: int = 0
    critic_ready: int | None = None
    frames: int = 0
    episodes: int = 0
    seconds: float = 0.0
    recent: list[bool] = field(default_factory=list)
    best: tuple[float, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> Progress:
        best = state["best"]
        return Progress(**(state | {"best": None if best is None else (best[0], best[1])}))

    @property
    def success(self) -> float | None:
        """Share of the recent episodes that succeeded."""
        return sum(self.recent) / len(self.recent) if self.recent else None


def gather_spans(run: Context, offload: Offload) -> list[tuple[dict[str, float], dict[str, float], int]]:
    """Of every rank, in order: seconds per span since the last call, memory metrics, env hosts replaced so far. Collective."""
    memory = {f"memory/measured_peak_bytes_{phase}": peak for phase, peak in offload.take_peaks().items()}
    memory |= {"memory/offloaded_bytes": offload.bytes, "memory/host_rss_bytes": psutil.Process().memory_info().rss + children_bytes()}
    return all_gather_objects(run.world, (run.spans.totals(), memory, sum(env.restarts for env in run.hosted)))


def most(ranks: Iterable[dict[str, float]]) -> dict[str, float]:
    """The most that any rank spent or used."""
    found: dict[str, float] = {}
    for figures in ranks:
        found |= {name: max(value, found.get(name, 0.0)) for name, value in figures.items()}
    return found


class Reporter:
    """Writes metrics, curve and status. Only the main rank has sinks; every learner takes part in the sums."""

    def __init__(self, run: Context, resume_from: int | None) -> None:
        self._run = run
        log = run.recipe.log
        self.sinks: MetricsWriter | None = None
        if run.world.is_main:
            self.sinks = MetricsWriter(run.run_dir, log.tensorboard, log.wandb, resume_from, serial.to_dict(run.recipe))
        self._started = time.perf_counter()
        self._evaluated = ""

    def start_update(self, progress: Progress) -> None:
        """Begin the clock of the next update."""
        self._run.spans.totals()  # evaluations and checkpoints in between are not part of the update
        self._run.spans.update = progress.update + 1
        self._started = time.perf_counter()

    def update(self, progress: Progress, trainer: Trainer, batch: TrajectoryBatch, learnt: dict[str, float]) -> None:
        """File one update: counters, metrics row, status. Collective; ranks that do not learn take part by `gather_spans`."""
        run, world = self._run, self._run.world.learners
        assert world is not None
        seconds = time.perf_counter() - self._started
        ranks = gather_spans(run, trainer.offload)
        spans = most(seconds for seconds, _, _ in ranks)
        sums = all_reduce_sum(world, torch.tensor([float(batch.valid_TBK.sum()), float(batch.active_TB.sum())], dtype=torch.float64))
        frames, chunks = sums.tolist()
        # Ordered by uid, so that the list is the same on any number of ranks.
        episodes = sorted((e for part in all_gather_objects(world, batch.episodes) for e in part), key=lambda e: e.spec.uid)
        progress.update += 1
        progress.frames += int(frames)
        progress.episodes += len(episodes)
        progress.seconds += seconds
        progress.recent = (progress.recent + [e.success for e in episodes])[-RECENT_EPISODES:]
        if self.sinks is None:
            return
        row = {
            "rollout/frames": progress.frames,
            "rollout/chunks": chunks,
            "rollout/frames_per_second": frames / seconds,
            "rollout/host_restarts": sum(restarts for _, _, restarts in ranks),
            "time/total_seconds": progress.seconds,
            "time/minutes": progress.seconds / 60,
            "time/update_wall_seconds": seconds,
            "time/rollout_seconds": spans.get("rollout", 0.0),
            "time/env_seconds": simulation_seconds(spans),
            "time/act_seconds": spans.get("rollout/act", 0.0),
            "time/update_seconds": spans.get("update", 0.0),
            "time/sync_seconds": spans.get("sync", 0.0) + spans.get("rollout/gather", 0.0),
            "time/route_seconds": spans.get("route", 0.0),
            "sync/bytes": trainer.sync.bytes,
            "train/episodes": len(episodes),
            "train/successes": sum(e.success for e in episodes),
        }
        if episodes:
            row |= {
                "train/success": sum(e.success for e in episodes) / len(episodes),
                "train/return": sum(e.return_ for e in episodes) / len(episodes),
                "train/length": sum(e.length for e in episodes) / len(episodes),
            }
            for task, name in enumerate(run.tasks):
                of_task = [e.success for e in episodes if e.spec.task == task]
                if of_task:
                    row[f"train/success_{name}"] = sum(of_task) / len(of_task)
        asked = run.recipe.policy.engine
        if trainer.policy is not None and (asked.compile or asked.cuda_graphs):
            engine = trainer.policy.engine
            row |= {"engine/compile": float(engine.compiled is not None), "engine/cuda_graphs": float(engine.graphs is not None)}
        row |= most(memory for _, memory, _ in ranks) | self._predicted("rollout") | self._predicted("update")
        self.sinks.write(progress.update, row | {f"update/{name}": value for name, value in learnt.items()})
        self.status(progress, "training", frames / seconds, bottleneck_line(spans, seconds))

    def evaluation(self, progress: Progress, trainer: Trainer, scores: dict[str, float]) -> None:
        """File an evaluation, and draw the curve anew. Collective of the learners."""
        world = self._run.world.learners
        assert world is not None
        peak = most(all_gather_objects(world, trainer.offload.take_peaks()))["evaluation"]
        if self.sinks is not None:
            memory = {"memory/measured_peak_bytes_evaluation": peak} | self._predicted("evaluation")
            self.sinks.write(progress.update, scores | memory)
            when = "before training" if progress.update == 0 else f"after {progress.update} update{'s' * (progress.update > 1)}"
            self._evaluated = f"evaluation {when}: {rate_text(int(scores['eval/successes']), int(scores['eval/episodes']))}"
            self.status(progress, "evaluation")
            self.curve()

    def _predicted(self, phase: Phase) -> dict[str, float]:
        return {f"memory/predicted_peak_bytes_{phase}": float(phase_bytes(self._run.plan.memory, phase))}

    def histograms(self, progress: Progress, batch: TrajectoryBatch, advantage: torch.Tensor) -> None:
        """TensorBoard histograms of the latest batch."""
        if self.sinks is not None:
            self.sinks.histogram("histogram/advantage", advantage[batch.active_TB], progress.update)
            self.sinks.histogram("histogram/value", batch.value_TBJ[batch.active_TB], progress.update)
            self.sinks.histogram("histogram/logprob", batch.logprob_TBN[batch.active_TB], progress.update)

    def status(self, progress: Progress, phase: str, frames_per_second: float | None = None, line: str = "") -> None:
        """Tell the launcher where the run stands."""
        if self.sinks is None:
            return
        updates = self._run.recipe.update.updates
        left = (updates - progress.update) * progress.seconds / progress.update if progress.update else None
        write_status(
            self._run.run_dir,
            phase=phase,
            update=progress.update,
            updates=updates,
            frames_per_second=frames_per_second,
            recent=(sum(progress.recent), len(progress.recent)) if progress.recent else None,
            episodes=progress.episodes,
            eta_seconds=left,
            line=line or f"{progress.update} of {updates} updates done",
            evaluated=self._evaluated,
        )

    def curve(self) -> None:
        """Draw curve.png anew."""
        if self.sinks is not None:
            draw_curve(self._run.run_dir / METRICS_FILE, self._run.run_dir / "curve.png")

    def close(self) -> None:
        if self.sinks is not None:
            self.sinks.close()
