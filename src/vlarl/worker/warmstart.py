"""Owns the warm start on worker ranks: the recipe's phases of cloning one after another, their record, and the policy folder they leave."""
from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from vlarl.datasets.read import action_statistics, read_dataset
from vlarl.distributed.reduce import barrier
from vlarl.errors import PlanError
from vlarl.learner.optim import build_cloning_optimizers
from vlarl.learner.sft import DemonstrationPool, Demonstrations, ExpertEnv, RecordedPool, SftProgress, clone, share_of, slots_of
from vlarl.metrics.sinks import MetricsWriter
from vlarl.metrics.status import write_status
from vlarl.plan.specs import simulator_spec
from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import STATISTICS, save_policy
from vlarl.recipe.schema import Warmstart
from vlarl.rng import fold
from vlarl.rollout.episodes import TrainingFeed, TrainingSchedule
from vlarl.worker.context import Context
from vlarl.worker.setup import build_env

DEMONSTRATION_SLOTS = 128  # over all ranks; fewer where the pool is smaller


def warm_start(run: Context, policy: VLAPolicy) -> None:
    """Clone the simulator's expert into `policy` (whole, not sharded yet); result and record are kept in the run folder's warmstart/."""
    folder = run.run_dir / "warmstart"
    folder.mkdir(exist_ok=True)
    record = _Record(run, MetricsWriter(folder, run.recipe.log.tensorboard, False, None) if run.world.is_main else None)
    take_statistics(run, policy)
    for number, phase in enumerate(run.recipe.warmstart):
        optimizers = build_cloning_optimizers(policy.module, phase.learning_rate, phase.weight_decay)
        clone(policy, optimizers, _demonstrations(run, policy, number), phase, run.world, record.alive, record.report)
        record.end_phase(phase)
    if record.sinks is not None:
        record.sinks.close()
        save_policy(folder, policy, policy.module.state_dict())
        (folder / "provenance.json").write_text(json.dumps(record.provenance(), indent=1), encoding="utf-8")
    barrier(run.world, "warm start")


def take_statistics(run: Context, policy: VLAPolicy) -> None:
    """Let the policy scale actions and state as the first recorded episodes of its warm start do, if it has any."""
    first = next((Path(phase.data) for phase in run.recipe.warmstart if phase.data is not None), None)
    if first is None:
        return
    kept = run.run_dir / "warmstart" / STATISTICS
    if kept.is_file():  # a run that goes on; the dataset may have gone
        ((key, entry),) = json.loads(kept.read_text(encoding="utf-8")).items()
    else:
        key, entry = first.name, action_statistics(first)
    policy.adopt_statistics(key, entry)


def _demonstrations(run: Context, policy: VLAPolicy, number: int) -> Demonstrations:
    """Recorded episodes, or those slots in which the expert plays that this rank's share of a minibatch is drawn from."""
    phase, key = run.recipe.warmstart[number], fold(run.recipe.seed, number)
    if phase.data is not None:
        seen, config = simulator_spec(run.recipe.env), policy.config
        size = (seen.height, seen.width)
        data = read_dataset(Path(phase.data), config.views, size, config.action_dim, config.proprio_dim)
        return RecordedPool(data, policy, key)
    every, tasks = min(DEMONSTRATION_SLOTS, phase.pool), phase.tasks or run.recipe.env.tasks
    slots = slots_of(share_of(run.world, phase.batch), phase.batch, every)
    simulator = build_env(run, slots, tasks=tasks)
    if not isinstance(simulator, ExpertEnv):
        simulator_name = run.recipe.env.simulator
        raise PlanError(f"warmstart: the simulator {simulator_name} has no scripted expert.", "Start from a supervised checkpoint.")
    feed = TrainingFeed(TrainingSchedule(run.recipe.seed + number, every, len(tasks), 1), slots)
    return DemonstrationPool(simulator, feed, policy, phase, slots, every, key)


class _Record:
    """What is told and kept while cloning; steps and samples count over all phases. Only rank 0 has sinks."""

    def __init__(self, run: Context, sinks: MetricsWriter | None) -> None:
        self.sinks = sinks
        self._run = run
        self._total = sum(phase.steps for phase in run.recipe.warmstart)
        self._started = time.perf_counter()
        self._phase = 0
        self._steps, self._samples = 0, 0

    def alive(self) -> None:
        """Tell the launcher that this rank is at work."""
        self._run.heartbeat.beat("warm start")

    def report(self, at: SftProgress) -> None:
        """After some steps of the present phase."""
        if self.sinks is None:
            return
        seconds, batch = time.perf_counter() - self._started, self._run.recipe.warmstart[self._phase].batch
        step, samples = self._steps + at.step, self._samples + at.step * batch
        row = {"sft/loss": at.loss, "sft/accuracy": at.accuracy, "sft/error_bins": at.error}
        self.sinks.write(step, row | {"sft/samples": samples, "sft/phase": self._phase, "time/minutes": seconds / 60})
        write_status(
            self._run.run_dir,
            phase="warm start",
            update=step,
            updates=self._total,
            frames_per_second=samples / seconds,
            eta_seconds=seconds / step * (self._total - step),
            line=f"phase {self._phase + 1}: loss {at.loss:.3f}, {at.error:.1f} bins from the expert",
        )

    def end_phase(self, phase: Warmstart) -> None:
        """The present phase is done."""
        self._phase += 1
        self._steps += phase.steps
        self._samples += phase.steps * phase.batch

    def provenance(self) -> dict[str, Any]:
        """Where the weights come from."""
        facts = {"recipe": self._run.recipe.name, "seed": self._run.recipe.seed, "steps": self._steps, "samples": self._samples}
        return facts | {"minutes": round((time.perf_counter() - self._started) / 60, 1), "torch": torch.__version__}
