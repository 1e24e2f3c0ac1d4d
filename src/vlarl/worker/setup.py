"""Owns the building of a rank's parts from its plan: policy, simulators, pools, learner."""
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from vlarl import serial
from vlarl.distributed.fsdp import acting, before_capture, local_rows, shard
from vlarl.distributed.links import Links, Orders
from vlarl.distributed.residency import Offload
from vlarl.distributed.routing import Router
from vlarl.distributed.weight_sync import WeightSync
from vlarl.envs.ahead import Ahead
from vlarl.envs.base import HOSTED, BatchedEnv, simulator_class
from vlarl.envs.homes import environment_python
from vlarl.envs.hosts import HostedEnv, Hosting
from vlarl.envs.pool import EnvPool, Feed, FinalFrames, LocalPool
from vlarl.envs.remote import Line, RemotePool
from vlarl.envs.spec import EnvSpec
from vlarl.learner.optim import build_optimizer
from vlarl.learner.update import Learner
from vlarl.metrics.spans import SIMULATE
from vlarl.metrics.status import write_status
from vlarl.plan.placement import PlacementPlan, stage_parts
from vlarl.plan.specs import policy_spec, simulator_spec
from vlarl.policies.base import PolicyModule, VLAPolicy
from vlarl.policies.checkpoint import cast_parameters, load_policy
from vlarl.policies.layout import stated_settings, switches
from vlarl.policies.probe import action_range, check_policy, equip
from vlarl.policies.spec import PolicySpec
from vlarl.policies.weights import WHOLE, Place
from vlarl.recipe.schema import Env, Grpo, Ppo
from vlarl.recipe.schema import Policy as PolicySettings
from vlarl.rollout.collector import Collector
from vlarl.rollout.episodes import TrainingFeed, TrainingSchedule
from vlarl.rollout.play import Policy, Sampler
from vlarl.worker.context import Context

MakeEnv = Callable[[range], BatchedEnv]  # from global slots to a simulator of them


@dataclass
class Simulation:
    """The env role. lines: to the ranks that act for its slots, where this rank does not itself."""

    feed: TrainingFeed
    pool: LocalPool
    lines: Sequence[Line]


@dataclass
class Acting:
    """The rollout role."""

    collector: Collector
    sampler: Sampler


@dataclass
class Trainer:
    """What the training loop works with on this rank: one part per role, None for the roles of others.

    policy: sharded on a learner, whole where it only acts, None on a rank that only simulates. max_chunks: of one collection, per slot.
    """

    env: Simulation | None
    rollout: Acting | None
    learner: Learner | None
    policy: VLAPolicy | None
    max_chunks: int
    orders: Orders
    router: Router
    sync: WeightSync
    offload: Offload


def build_policy(run: Context) -> VLAPolicy:
    """The recipe's policy, whole on this rank, as the warm start needs it."""
    policy = _load(run, True, run.recipe.policy, run.master_dtype, WHOLE)
    if run.world.is_main:
        print(*policy.notices, sep="\n", end="\n" if policy.notices else "")
    return policy


def build_sharded_policy(run: Context, trainable: bool, source: str | None = None, apart: bool = False) -> VLAPolicy:
    """The recipe's policy (or that of the folder `source`), spread over the learner ranks: each reads its own rows only. Collective.

    trainable: False freezes it and gives it no new adapters. apart: stored adapters act beside the weights, as they were trained; so do
    those of `source`, and one that the recipe trains on.
    """
    chosen = run.recipe.policy if source is None else replace(run.recipe.policy, checkpoint=source, adapter=None)
    place = Place(lambda module: _shard(run, module, trainable), local_rows)
    lora = run.recipe.policy.lora
    apart = apart or source is not None or (lora is not None and lora.start == "adapter")
    return _probed(run, _load(run, trainable, chosen, run.master_dtype, place, apart))


def build_placed_policy(run: Context) -> VLAPolicy | None:
    """The recipe's policy as this rank's roles need it: sharded where it learns, whole where it only acts, else None."""
    roles = run.rank_plan.roles
    if "learner" in roles:
        return build_sharded_policy(run, trainable=True)
    # FSDP2 casts what it gathers to the compute dtype, too; buffers keep theirs there as here.
    return _probed(run, _load(run, True, run.recipe.policy, run.compute_dtype, WHOLE)) if "rollout" in roles else None


def place_policy(run: Context, policy: VLAPolicy) -> VLAPolicy | None:
    """A whole, warm-started policy as this rank's roles need it."""
    roles = run.rank_plan.roles
    if "learner" in roles:
        _shard(run, policy.module, trainable=True)
        return policy
    if "rollout" not in roles:
        return None
    cast_parameters(policy.module, run.compute_dtype)
    return policy


def _load(run: Context, trainable: bool, p: PolicySettings, dtype: torch.dtype, place: Place, apart: bool = False) -> VLAPolicy:
    return load_policy(
        p.checkpoint,
        p.unnorm_key,
        p.value,
        dtype,
        run.world.device,
        p.lora if trainable else None,
        p.freeze,
        run.recipe.seed,
        adapter=p.adapter,
        apart=apart,
        stated=stated_settings(p),
        place=place,
        trainable=trainable,
    )


def _probed(run: Context, policy: VLAPolicy) -> VLAPolicy:
    """The policy, once it has passed the checks of probe.py."""
    with acting(policy.module):
        check_policy(policy, run.compute_dtype)
    if run.world.is_main:
        for line in (*policy.notices, action_range(policy), switches(policy.config)):
            print(line)
    return policy


def equip_policy(run: Context, policy: VLAPolicy, slots: int) -> None:
    """Switch on what the recipe's `policy.engine` asks for. slots: rows of a usual batch. Collective of the learners."""
    settings = run.recipe.policy.engine
    if not (settings.compile or settings.cuda_graphs or settings.batch_sizes):
        return
    with run.waiting("engine"), acting(policy.module):
        sampling = run.recipe.rollout
        left_out = equip(
            policy, settings, slots, run.compute_dtype, sampling.temperature, sampling.top_k, lambda: before_capture(policy.module)
        )
    for line in left_out:
        print(f"rank {run.world.rank}: {line}")


def acting_slots(run: Context) -> int:
    """Slots of one stage that this rank acts for; where it only learns, those of its evaluations."""
    first, end = run.rank_plan.policy_slots
    return (end - first) // run.plan.rollout.stages or evaluation_slots(run)


def evaluation_slots(run: Context) -> int:
    """Episodes that each learner plays at once in an evaluation."""
    assert run.world.learners is not None, "learners evaluate"
    settings = run.recipe.eval
    return -(-min(settings.parallel or run.recipe.env.parallel, settings.episodes) // run.world.learners.world_size)


def _shard(run: Context, module: PolicyModule, trainable: bool) -> None:
    checkpointing = run.recipe.update.activation_checkpointing and trainable
    assert run.world.learner is not None, "only learners keep shards"
    shard(module, run.world.learner, run.compute_dtype, module.fsdp_units(), activation_checkpointing=checkpointing)


def build_optimizer_for(run: Context, policy: VLAPolicy) -> torch.optim.Optimizer:
    """AdamW as the recipe's `update` section says."""
    u = run.recipe.update
    return build_optimizer(policy.module, u.learning_rate, u.value_learning_rate, u.vision_scale, u.betas, u.eps, u.weight_decay)


def build_env(
    run: Context, slots: range, variation: str | None = None, tasks: tuple[str, ...] | None = None, batches: int = 1
) -> BatchedEnv:
    """One simulator of the global slots `slots`. variation, tasks: None for the recipe's. batches: such simulators that this rank runs."""
    e = replace(run.recipe.env, variation=variation or run.recipe.env.variation, tasks=tasks or run.recipe.env.tasks)
    seen = simulator_spec(e)
    if seen.hosted(run.world.device.type):
        return _hosted_env(run, e, slots, batches)
    if e.simulator == "maniskill":
        return simulator_class(e.simulator)(len(slots), serial.to_dict(e), seen, run.world.device)
    return simulator_class(e.simulator)(
        num_slots=len(slots),
        tasks=e.tasks,
        variation=e.variation,
        horizon=e.horizon,
        image_size=e.image_size,
        wrist_camera=e.wrist_camera,
        reward=e.reward,
        device=run.world.device,
    )


def training_envs(run: Context) -> MakeEnv:
    """What makes the simulators of a collection's slots, one per stage."""
    return lambda slots: build_env(run, slots, batches=run.plan.rollout.stages)


def evaluation_env(run: Context, slots: range, variation: str) -> BatchedEnv:
    """A simulator for an evaluation. One in env hosts stays for the next evaluation; close the others."""
    found = run.evaluation_hosts.get((variation, slots))
    if found is not None:
        return found
    for other in run.evaluation_hosts.values():
        other.close()
    run.evaluation_hosts.clear()
    env = build_env(run, slots, variation)
    if isinstance(env, HostedEnv):
        run.evaluation_hosts[variation, slots] = env
    return env


def render_threads(cores: int, hosts: int) -> dict[str, str]:
    """What Mesa's CPU renderers (lavapipe, llvmpipe) are told, so that all hosts of a rank use its cores and no more. Physics has one
    thread per host. They would take all of the machine's each."""
    return {"LP_NUM_THREADS": str(max(1, cores // hosts))}


def drawing_device(device: torch.device, visible: str | None) -> dict[str, str]:
    """What a rank's hosts are told, so that they draw on its own GPU and not all ranks' on the first. visible: the rank's
    CUDA_VISIBLE_DEVICES, None where it is not set. EGL's devices are taken to be in CUDA's order; a GPU named by its UUID has no number."""
    if device.type != "cuda":
        return {}
    number = device.index or 0
    own = visible.split(",")[number].strip() if visible else str(number)
    return {"CUDA_VISIBLE_DEVICES": own} | ({"MUJOCO_EGL_DEVICE_ID": own} if own.isdigit() else {})


def _hosted_env(run: Context, env: Env, slots: range, batches: int) -> HostedEnv:
    """The slots in processes of their own, all started at once."""
    hosts = -(-len(slots) // env.slots_per_host)
    hosting = Hosting(
        adapter=HOSTED[env.simulator],
        settings=serial.to_dict(env),
        python=env.python or environment_python(env.simulator) or sys.executable,
        per_host=env.slots_per_host,
        start_seconds=env.start_seconds,
        step_seconds=env.step_seconds,
        environment={
            **render_threads(run.rank_plan.threads, batches * hosts),
            **drawing_device(run.world.device, os.environ.get("CUDA_VISIBLE_DEVICES")),
        },
        log_dir=run.run_dir / "logs",
    )

    def started(count: int, total: int) -> None:
        print(f"env hosts: {count} of {total} are up", flush=True)
        if run.world.is_main:
            updates = run.recipe.update.updates
            write_status(run.run_dir, phase=f"simulators: {count} of {total} are up", update=run.spans.update, updates=updates)

    def beat() -> None:
        run.heartbeat.beat("env hosts")

    with run.waiting("env hosts"):
        made = HostedEnv(len(slots), slots.start, simulator_spec(env), hosting, run.world.device, started, beat)
    run.hosted.append(made)
    return made


def build_pool(
    make_env: MakeEnv,
    feed: Feed,
    slots: tuple[int, int],
    stages: int,
    chunk: int,
    final_frames: FinalFrames,
    ahead: Ahead | None = None,
) -> LocalPool:
    """A pool of the global slots [slots[0], slots[1]) in `stages` parts, playing `chunk` actions at a time."""
    per_stage = (slots[1] - slots[0]) // stages
    parts = [range(first, first + per_stage) for first in range(slots[0], slots[1], per_stage)]
    return LocalPool([make_env(part) for part in parts], slots[0], per_stage, chunk, feed, final_frames, ahead)


def build_ahead(run: Context, seen: EnvSpec, overlap: bool) -> Ahead | None:
    """Threads for the simulators of a rank that acts meanwhile. Those in processes of their own are only waited for, each stage's in its
    own thread; those in the rank share one, as they share a device."""
    if not overlap:
        return None
    threads = run.plan.rollout.stages if seen.hosted(run.world.device.type) else 1
    return Ahead(threads, run.world.device, partial(run.spans.file, SIMULATE))



def build_sampler(policy: Policy, spec: PolicySpec, seed: int, temperature: float, top_k: int) -> Sampler:
    """The policy as an actor whose noise is keyed by `seed`."""
    return Sampler(policy, seed, spec.chunk * spec.action_dim, temperature, top_k)


def build_learner(run: Context, policy: VLAPolicy, reference: VLAPolicy | None) -> Learner:
    """What learns from the batches of all learner ranks."""
    recipe, world = run.recipe, run.world.learners
    assert world is not None, "learners have a world of their own"
    optimizer, dump_dir = build_optimizer_for(run, policy), run.run_dir / "refused"
    whole = "gradients" not in run.plan.residency.update
    return Learner(
        policy,
        reference,
        optimizer,
        world,
        recipe.algorithm,
        recipe.update,
        recipe.rollout,
        recipe.seed,
        dump_dir,
        whole,
        lambda: run.heartbeat.beat("update"),
    )


def build_trainer(run: Context, policy: VLAPolicy | None, learner: Learner | None, make_env: MakeEnv, seen: EnvSpec) -> Trainer:
    """Everything the training loop needs on this rank. seen: what the simulators made by `make_env` offer. Collective."""
    recipe, plan, me, spec = run.recipe, run.plan, run.rank_plan, policy_spec(run.recipe)
    algorithm, stages, chunk = recipe.algorithm, plan.rollout.stages, spec.chunk
    max_chunks = plan.rollout.chunk_steps or plan.rollout.episodes_per_slot * plan.rollout.chunks_per_episode
    links = Links(run.world, plan)
    lines = _lines(plan, me.rank, links)
    pool: EnvPool
    env, rollout = None, None
    if "env" in me.roles:
        ahead = build_ahead(run, seen, plan.rollout.overlap and "rollout" in me.roles)
        schedule = TrainingSchedule(recipe.seed, plan.rollout.parallel, len(run.tasks), plan.rollout.group_size)
        feed = TrainingFeed(schedule, range(*me.slots))
        env = Simulation(feed, build_pool(make_env, feed, me.slots, stages, chunk, _final_frames(algorithm), ahead), lines)
    if "rollout" in me.roles:
        assert policy is not None
        pool = env.pool if env is not None else RemotePool(seen, lines, chunk, max_chunks, run.world.device)
        values = spec.values if isinstance(algorithm, Ppo) else 0
        policy.keep_features = plan.update.reuse_features
        policy.engine.forget()  # graphs that were captured to be proved hand over no features
        feature_shape = (spec.patches, spec.vision_width) if plan.update.reuse_features else (0, 0)
        collector = Collector(
            pool, max_chunks, chunk, chunk * spec.action_dim, values, run.master_dtype, feature_shape, run.compute_dtype
        )
        rollout = Acting(collector, build_sampler(policy, spec, recipe.seed, recipe.rollout.temperature, recipe.rollout.top_k))
    orders = Orders(run.world, plan, links)
    sync = WeightSync(run.world, plan, policy.module if policy is not None else None, run.compute_dtype)
    router, offload = Router(me.rank, plan, links), build_offload(run, policy, learner)
    return Trainer(env, rollout, learner, policy, max_chunks, orders, router, sync, offload)


def build_offload(run: Context, policy: VLAPolicy | None, learner: Learner | None) -> Offload:
    """What this rank can move off its device."""
    reference = learner.reference.module if learner is not None and learner.reference is not None else None
    optimizer = learner.optimizer if learner is not None else None
    return Offload(run.plan.residency, run.world.device, policy.module if policy is not None else None, optimizer, reference)


def _final_frames(algorithm: Ppo | Grpo) -> FinalFrames:
    if not isinstance(algorithm, Ppo):
        return "none"
    return "all" if algorithm.bootstrap == "always" else "truncated"


def _lines(plan: PlacementPlan, rank: int, links: Links) -> list[Line]:
    """Who this rank talks to about which slots, stage by stage; nobody where it simulates and acts itself."""
    stages = plan.rollout.stages
    parts = [(s, part) for s in range(stages) for part in stage_parts(plan.ranks, stages, s)]
    mine = [(s, part) for s, part in parts if rank in (part.env_rank, part.rollout_rank) and part.env_rank != part.rollout_rank]
    return [Line(links.to(p.rollout_rank if p.env_rank == rank else p.env_rank), s, p.start, p.end) for s, p in mine]
