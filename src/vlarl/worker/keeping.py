"""Owns a run's checkpoints on worker ranks: what each rank adds to them, which is the best, and how a run goes on from the newest."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from vlarl.distributed import checkpoint, manifest
from vlarl.distributed.reduce import barrier
from vlarl.errors import CheckpointError
from vlarl.plan.placement import layout
from vlarl.policies.checkpoint import save_policy, saved_names
from vlarl.worker.context import Context
from vlarl.worker.export import training_logits
from vlarl.worker.progress import Progress
from vlarl.worker.setup import Trainer


def keep(run: Context, trainer: Trainer, progress: Progress, best: bool) -> None:
    """Write a checkpoint from which the run continues exactly, and prune old ones. Every rank; `progress` and `best` are the learners'."""
    folder = manifest.checkpoint_folder(run.run_dir, progress.update)
    extra: dict[str, Any] = {"progress": progress.state_dict()}
    if trainer.env is not None:
        extra |= {"cursor": trainer.env.feed.cursor, "pool": trainer.env.pool.state_dict()}
    if trainer.rollout is not None:
        extra |= {"collector": trainer.rollout.collector.state_dict()}
    policy, learner = trainer.policy, trainer.learner
    with run.span("checkpoint"):
        live = training_logits(run, trainer)
        checkpoint.save(
            run.world,
            folder,
            learner.policy.module if learner is not None else None,
            learner.optimizer if learner is not None else None,
            extra,
            lambda path, state: save_policy(path, policy, state, live) if policy is not None else None,
            {"update": progress.update, "training_success": progress.success, "placement": layout(run.plan)},
            saved_names(policy) if policy is not None else None,
            run.heartbeat,
        )
        if run.world.is_main:
            if best or progress.best is None:  # until an evaluation has chosen, the newest
                manifest.mark_best(folder)
            manifest.prune(run.run_dir, run.recipe.checkpoint.keep)
        barrier(run.world, "checkpoint")


def restore(run: Context, trainer: Trainer) -> Progress:
    """Go on exactly where the latest checkpoint was taken. Every rank."""
    folder, learner = latest_checkpoint(run.run_dir), trainer.learner
    module, optimizer = (learner.policy.module, learner.optimizer) if learner is not None else (None, None)
    manifest.check_placement(folder, layout(run.plan))
    extras, _ = checkpoint.load(run.world, folder, module, optimizer, run.heartbeat)
    extra: dict[str, Any] = extras[run.world.rank]
    if trainer.env is not None:
        trainer.env.feed.cursor = list(extra["cursor"])
        trainer.env.pool.load_state_dict(extra["pool"])
    if trainer.rollout is not None:
        trainer.rollout.collector.load_state_dict(extra["collector"])
    run.meet(run.world, "resuming")  # episodes that are played again take their time
    progress = Progress.from_state(extra["progress"])
    if run.world.is_main and progress.best is not None and progress.best[1] == progress.update:
        manifest.mark_best(folder)  # a run that died between the checkpoint and this could not
    return progress


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run folder; CheckpointError if it has none."""
    folder = manifest.latest(run_dir)
    if folder is None:
        raise CheckpointError(f"{run_dir} holds no finished checkpoint to resume from.", "Start the run anew, with another --out.")
    return folder
