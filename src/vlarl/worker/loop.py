"""Owns the training loop. Reads like the paper: collect trajectories, judge them, update the policy, measure, keep.

A newcomer starts here. `Trainer` (built in setup.py) holds a part per role of this rank: simulation, acting, learning. Ranks that learn run
`train`; where the placement has others, these run `assist` and do what the learners order.
"""
from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol

import torch

from vlarl.distributed.fsdp import acting
from vlarl.distributed.reduce import all_reduce_sum
from vlarl.envs.remote import serve
from vlarl.learner.optim import learning_rate_at, set_learning_rates
from vlarl.learner.targets import Targets, grpo_targets, ppo_targets
from vlarl.learner.update import Learner
from vlarl.recipe.schema import Grpo, Ppo
from vlarl.rollout.collector import concatenate
from vlarl.types import TrajectoryBatch
from vlarl.worker.context import Context
from vlarl.worker.evaluate import evaluate_training
from vlarl.worker.films import film_batch
from vlarl.worker.keeping import keep, restore
from vlarl.worker.progress import Progress, Reporter, gather_spans
from vlarl.worker.setup import Trainer


class Updates(Protocol):
    """What turns trajectories into new weights."""

    def update(self, batch: TrajectoryBatch, targets: Targets, update: int) -> dict[str, float]: ...


def train(run: Context, trainer: Trainer, learner: Learner, resume: bool) -> Progress:
    """Run the recipe's updates. resume: go on from the run folder's latest checkpoint."""
    progress = restore(run, trainer) if resume else Progress()
    reporter = Reporter(run, progress.update if resume else None)
    recipe = run.recipe
    synchronize(run, trainer, progress.update)
    if progress.update == 0 and recipe.eval.every:
        measure(run, trainer, learner, progress, reporter)
    while progress.update < recipe.update.updates:
        reporter.start_update(progress)
        rates = schedule(run, learner, progress)
        batch, targets, learnt = improve(run, trainer, learner, progress.update)
        trainer.orders.give("report", progress.update)
        reporter.update(progress, trainer, batch, learnt | rates | signal(run, targets))
        warm_up(run, progress, learnt)
        if due(progress.update, recipe.log.histograms_every):
            reporter.histograms(progress, batch, targets.advantage_TBJ)
        if due(progress.update, recipe.log.video_every) and run.world.is_main:
            film_batch(run, batch, progress.update)
        last = progress.update == recipe.update.updates
        better = False
        if recipe.eval.every and (last or due(progress.update, recipe.eval.every)):
            better = measure(run, trainer, learner, progress, reporter)
        if last or better or due(progress.update, recipe.checkpoint.every):
            trainer.orders.give("keep", progress.update)
            keep(run, trainer, progress, better)
    trainer.orders.give("end")
    reporter.curve()
    reporter.close()
    return progress


def assist(run: Context, trainer: Trainer, resume: bool) -> None:
    """A rank that does not learn: simulate, act, take new weights and checkpoint when the learners say so."""
    progress = restore(run, trainer) if resume else Progress()
    while True:
        with run.waiting("rollout/wait"):  # also while the learners evaluate
            order, number = trainer.orders.take()
        if order == "collect":
            run.spans.update = number + 1
            play(run, trainer)
        elif order == "weights":
            take_weights(run, trainer, number)
        elif order == "report":
            gather_spans(run, trainer.offload)
        elif order == "keep":
            progress.update = number
            keep(run, trainer, progress, best=False)
        else:
            return


def improve(run: Context, trainer: Trainer, learner: Updates, update: int) -> tuple[TrajectoryBatch, Targets, dict[str, float]]:
    """One iteration: collect, learn, bring the new weights to where they act."""
    batch, targets = collect(run, trainer, update)
    if trainer.policy is not None:
        trainer.policy.engine.forget()
    with run.span("update"), trainer.offload.phase("update"):
        learnt = learner.update(batch, targets, update)
    synchronize(run, trainer, update + 1)
    return batch, targets, learnt


def collect(run: Context, trainer: Trainer, update: int) -> tuple[TrajectoryBatch, Targets]:
    """Play this update's episodes and judge them; with dynamic sampling, replace groups that teach nothing, up to the stated cap."""
    rollout, learners = run.plan.rollout, run.world.learners
    assert learners is not None
    batch: TrajectoryBatch | None = None
    for left in reversed(range(rollout.rounds)):
        trainer.orders.give("collect", update)
        fresh = play(run, trainer)
        assert fresh is not None
        run.meet(learners, "the end of a rollout")
        batch = fresh if batch is None else concatenate(batch, fresh)
        targets = judge(run, batch)
        groups = rollout.parallel // rollout.group_size * rollout.episodes_per_slot
        if not left or all_reduce_sum(learners, torch.tensor(targets.kept_groups)) >= groups:
            break
        if batch is fresh:
            batch = batch.clone()  # the collector's buffers are used again
    assert batch is not None
    return batch, targets


def play(run: Context, trainer: Trainer) -> TrajectoryBatch | None:
    """One collection, in this rank's roles. Returns what the rank learns from (None: it does not learn)."""
    env, rollout, batch = trainer.env, trainer.rollout, None
    if env is not None and isinstance(run.recipe.algorithm, Grpo):
        env.feed.allow(run.plan.rollout.episodes_per_slot)
    with run.span("rollout"), trainer.offload.phase("rollout") as away:
        if trainer.policy is not None and (rollout is not None or run.plan.mode == "hybrid"):
            # A hybrid's env ranks lend their shards, and that is all.
            with ExitStack() as gathered:
                with run.span("rollout/gather"):
                    gathered.enter_context(acting(trainer.policy.module, away if rollout is not None else {}))
                if rollout is not None:
                    batch = rollout.collector.collect(rollout.sampler, run, trainer.policy.policy_version)
        if env is not None and rollout is None:
            serve(env.pool, env.lines, trainer.max_chunks, run.world.device, run)
    with run.waiting("route" if rollout is not None else "rollout/wait"):
        return trainer.router.route(batch)


def synchronize(run: Context, trainer: Trainer, version: int) -> None:
    """The learners' weights are those after `version` updates: bring them to the ranks that act without learning."""
    trainer.orders.give("weights", version)
    take_weights(run, trainer, version)


def take_weights(run: Context, trainer: Trainer, version: int) -> None:
    """One weight sync, in this rank's role."""
    with run.span("sync"):
        trainer.sync.sync()
    if trainer.policy is not None:
        trainer.policy.policy_version = version


def judge(run: Context, batch: TrajectoryBatch) -> Targets:
    """Advantages by the recipe's algorithm."""
    algorithm, learners = run.recipe.algorithm, run.world.learners
    if isinstance(algorithm, Ppo):
        assert learners is not None
        return ppo_targets(batch, algorithm, learners)
    return grpo_targets(batch, algorithm, run.recipe.env.horizon)


def schedule(run: Context, learner: Learner, progress: Progress) -> dict[str, float]:
    """Set the learning rates of the coming update: the policy's is 0 while the critic warms up."""
    u, algorithm = run.recipe.update, run.recipe.algorithm
    start = progress.critic_ready
    if start is None:
        start = algorithm.critic_warmup if isinstance(algorithm, Ppo) else 0
    policy = learning_rate_at(progress.update, u.learning_rate, start, u.lr_warmup, u.updates, u.lr_decay)
    value = learning_rate_at(progress.update, u.value_learning_rate, 0, 0, u.updates, u.lr_decay)
    set_learning_rates(learner.optimizer, policy, value)
    learner.trains_policy = policy > 0
    return {"learning_rate": policy, "value_learning_rate": value}


def warm_up(run: Context, progress: Progress, learnt: dict[str, float]) -> None:
    """End the critic's warm-up when its time is up, or earlier when it explains enough."""
    algorithm = run.recipe.algorithm
    if isinstance(algorithm, Ppo) and progress.critic_ready is None:
        explained = learnt["explained_variance"] >= algorithm.critic_warmup_until
        if explained or progress.update >= algorithm.critic_warmup:
            progress.critic_ready = min(progress.update, algorithm.critic_warmup)


def signal(run: Context, targets: Targets) -> dict[str, float]:
    """GRPO: how many groups were played and how many of them teach something."""
    if not targets.groups:
        return {}
    learners = run.world.learners
    assert learners is not None
    both = all_reduce_sum(learners, targets.weight_TB.new_tensor([targets.groups, targets.kept_groups]))
    return {"groups": float(both[0]), "kept_groups": float(both[1])}


def measure(run: Context, trainer: Trainer, learner: Learner, progress: Progress, reporter: Reporter) -> bool:
    """Evaluate on episodes kept apart from training and from `vlarl eval`; True if this is the best policy so far.

    Before the first update there is nothing to keep: that policy is where the run began, and competes with no checkpoint.
    """
    reporter.status(progress, "evaluation")
    with run.span("eval"), trainer.offload.phase("evaluation") as away, acting(learner.policy.module, away):
        scores = evaluate_training(run, learner.policy, progress.update)
    reporter.evaluation(progress, trainer, scores)
    better = progress.update > 0 and (progress.best is None or scores["eval/success"] > progress.best[0])
    if better:
        progress.best = (scores["eval/success"], progress.update)
    return better


def due(update: int, every: int) -> bool:
    """Whether something done every `every` updates (0: never) is due after `update`."""
    return every > 0 and update % every == 0
