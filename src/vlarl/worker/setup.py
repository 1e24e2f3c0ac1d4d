"""Owns the building of a rank's parts from its plan: policy, simulators, pools, learner."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from vlarl.distributed.fsdp import shard
from vlarl.envs.base import BatchedEnv, simulator_class
from vlarl.envs.pool import Feed, FinalFrames, LocalPool
from vlarl.learner.optim import build_optimizer
from vlarl.learner.update import Learner
from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import load_policy
from vlarl.recipe.schema import Env, Ppo
from vlarl.rollout.collector import Collector
from vlarl.rollout.episodes import TrainingFeed, TrainingSchedule
from vlarl.rollout.play import Sampler
from vlarl.worker.context import Context


@dataclass
class Trainer:
    """What the training loop works with on this rank."""

    policy: VLAPolicy
    learner: Learner
    feed: TrainingFeed
    pool: LocalPool
    collector: Collector
    sampler: Sampler


def build_policy(run: Context, trainable: bool, source: str | None = None) -> VLAPolicy:
    """The recipe's policy (or `source`), whole on this rank. trainable: False freezes it and leaves adapters out."""
    p = run.recipe.policy
    lora = p.lora if trainable else None
    dtype, device = run.master_dtype, run.world.device
    policy = load_policy(source or p.checkpoint, p.unnorm_key, p.value, dtype, device, lora, p.freeze, run.recipe.seed)
    if not trainable:
        policy.module.requires_grad_(False)
    return policy


def shard_policy(run: Context, policy: VLAPolicy) -> VLAPolicy:
    """The same policy, spread over the learner ranks."""
    checkpointing = run.recipe.update.activation_checkpointing and any(p.requires_grad for p in policy.module.parameters())
    units = policy.module.fsdp_units()
    shard(policy.module, run.world.learner, run.compute_dtype, units, activation_checkpointing=checkpointing)
    return policy


def build_optimizer_for(run: Context, policy: VLAPolicy) -> torch.optim.Optimizer:
    """AdamW as the recipe's `update` section says."""
    u = run.recipe.update
    return build_optimizer(policy.module, u.learning_rate, u.value_learning_rate, u.betas, u.eps, u.weight_decay)


def build_env(run: Context, slots: int, variation: str | None = None, tasks: tuple[str, ...] | None = None) -> BatchedEnv:
    """One simulator of `slots` slots. variation, tasks: None for the recipe's."""
    e: Env = run.recipe.env
    return simulator_class(e.simulator)(
        num_slots=slots,
        tasks=tasks or e.tasks,
        variation=variation or e.variation,
        horizon=e.horizon,
        image_size=e.image_size,
        wrist_camera=e.wrist_camera,
        reward=e.reward,
        device=run.world.device,
    )


def build_pool(
    run: Context, feed: Feed, slots: tuple[int, int], stages: int, chunk: int, final_frames: FinalFrames, variation: str | None = None
) -> LocalPool:
    """A pool of the global slots [slots[0], slots[1]) in `stages` parts, playing `chunk` actions at a time."""
    per_stage = (slots[1] - slots[0]) // stages
    envs = [build_env(run, per_stage, variation) for _ in range(stages)]
    return LocalPool(envs, slots[0], per_stage, chunk, feed, final_frames)


def build_sampler(run: Context, policy: VLAPolicy, seed: int, temperature: float, top_k: int) -> Sampler:
    """The policy as an actor whose noise is keyed by `seed`."""
    return Sampler(policy, seed, policy.spec.chunk * policy.spec.action_dim, temperature, top_k)


def build_trainer(run: Context, policy: VLAPolicy, reference: VLAPolicy | None) -> Trainer:
    """Everything the training loop needs on this rank."""
    recipe, rollout = run.recipe, run.plan.rollout
    algorithm = recipe.algorithm
    optimizer, dump_dir = build_optimizer_for(run, policy), run.run_dir / "refused"
    learner = Learner(policy, reference, optimizer, run.world, algorithm, recipe.update, recipe.rollout, recipe.seed, dump_dir)
    slots = run.rank_plan.slots
    schedule = TrainingSchedule(recipe.seed, rollout.parallel, len(recipe.env.tasks), rollout.group_size)
    feed = TrainingFeed(schedule, range(*slots))
    critic = isinstance(algorithm, Ppo)
    final_frames: FinalFrames = "none"
    if isinstance(algorithm, Ppo):
        final_frames = "all" if algorithm.bootstrap == "always" else "truncated"
    spec = policy.spec
    pool = build_pool(run, feed, slots, rollout.stages, spec.chunk, final_frames)
    values = (spec.chunk if recipe.policy.value == "action" else 1) if critic else 0
    max_chunks = rollout.chunk_steps or rollout.episodes_per_slot * rollout.chunks_per_episode
    collector = Collector(pool, max_chunks, spec.chunk, spec.chunk * spec.action_dim, values, run.master_dtype)
    sampler = build_sampler(run, policy, recipe.seed, recipe.rollout.temperature, recipe.rollout.top_k)
    return Trainer(policy, learner, feed, pool, collector, sampler)
