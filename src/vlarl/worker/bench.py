"""Owns the timing of iterations, real or emulated, and of a machine's costs as functions of batch size."""
from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from vlarl.distributed.fsdp import acting, shard
from vlarl.distributed.reduce import all_reduce_sum
from vlarl.distributed.routing import take_slots
from vlarl.emulate import Device, SleepingEnv, SleepingLearner, SleepingPolicy, sleeping_spec
from vlarl.envs.ahead import Ahead
from vlarl.envs.messages import StepMessage
from vlarl.learner.optim import set_learning_rates
from vlarl.learner.update import Learner
from vlarl.metrics.spans import simulation_seconds
from vlarl.metrics.status import write_status
from vlarl.plan.profile import Curve, Measured, Profile
from vlarl.plan.specs import policy_spec, simulator_spec
from vlarl.policies.base import VLAPolicy
from vlarl.recipe.schema import Ppo
from vlarl.rollout.episodes import TrainingFeed, TrainingSchedule
from vlarl.types import EnvStep, TrajectoryBatch
from vlarl.worker.context import Context
from vlarl.worker.loop import Updates, collect, improve, judge, synchronize
from vlarl.worker.progress import gather_spans
from vlarl.worker.setup import Trainer, build_env, build_pool, build_sampler, build_trainer, training_envs

BUSY = ("rollout/gather", "rollout/env", "rollout/act", "rollout/other", "update", "sync", "route")
REPEATS = 5  # of every measured cost; the median counts
SIZES = 4  # batch sizes of a sweep, the largest the recipe's own


def bench(run: Context, trainer: Trainer, learner: Updates, warmup: int, updates: int, actions: int | None = None) -> dict[str, Any]:
    """Time `updates` iterations after `warmup` others. actions: frames that a chunk counts for (None: those executed).

    Seconds are means per iteration, of the busiest rank. frames_per_second counts the whole iteration. idle: share of an iteration that
    rank r neither simulates, acts, learns nor moves data. On learners.
    """
    synchronize(run, trainer, 0)
    seconds, frames, rows = 0.0, 0.0, []
    for update in range(warmup + updates):
        if run.world.is_main:
            write_status(run.run_dir, phase="timing" if update >= warmup else "warming up", update=update, updates=warmup + updates)
        run.spans.update = update + 1
        started = time.perf_counter()
        batch, _, _ = improve(run, trainer, learner, update)
        ended = time.perf_counter()
        trainer.orders.give("report", update)
        ranks = [spans for spans, _, _ in gather_spans(run, trainer.offload)]
        played = _frames(run, batch, actions)
        if update >= warmup:
            seconds, frames = seconds + ended - started, frames + played
            rows.append(ranks)
    trainer.orders.give("end")
    return _summary(rows, seconds, frames)


def _frames(run: Context, batch: TrajectoryBatch, actions: int | None) -> float:
    assert run.world.learners is not None
    count = batch.valid_TBK.sum() if actions is None else batch.active_TB.sum() * actions
    return float(all_reduce_sum(run.world.learners, count.double()))


def _summary(rows: list[list[dict[str, float]]], seconds: float, frames: float) -> dict[str, Any]:
    """rows: seconds per span, per iteration and rank."""
    count, ranks = len(rows), range(len(rows[0]))
    mean = [{name: sum(row[rank].get(name, 0.0) for row in rows) / count for name in ("rollout", *BUSY)} for rank in ranks]
    most = {name: max(m[name] for m in mean) for name in mean[0]}
    env = max(sum(simulation_seconds(row[rank]) for row in rows) / count for rank in ranks)
    wall = seconds / count
    return {
        "frames_per_second": frames / seconds,
        "seconds": wall,
        "rollout_seconds": most["rollout"],
        "update_seconds": most["update"],
        "sync_seconds": most["sync"] + most["rollout/gather"],
        "route_seconds": most["route"],
        "env_seconds": env,
        "act_seconds": most["rollout/act"],
        "overlap_efficiency": max(env, most["rollout/act"]) / most["rollout"],
        "idle": {str(rank): max(0.0, 1 - sum(mean[rank][name] for name in BUSY) / wall) for rank in ranks},
    }


def build_emulated(run: Context, profile: Profile) -> tuple[Trainer, SleepingLearner | None]:
    """Trainer and learner of this rank, as the plan says, that sleep the profile's seconds."""
    run = replace(run, plan=replace(run.plan, update=replace(run.plan.update, reuse_features=False)))  # there are no towers
    recipe, roles, spec = run.recipe, run.rank_plan.roles, policy_spec(run.recipe)
    values = spec.values if isinstance(recipe.algorithm, Ppo) else 1
    device = Device(profile.overlap)
    policy = SleepingPolicy(device, profile, spec, values, run.master_dtype) if roles != ("env",) else None
    learner = None
    if policy is not None and run.world.learners is not None and run.world.learner is not None:
        shard(policy.module, run.world.learner, run.compute_dtype)
        learner = SleepingLearner(profile, recipe.update.epochs, run.world.learners)
    chunks = run.plan.rollout.chunks_per_episode
    # It has what acting and moving weights ask of a policy.
    stand_in = cast("VLAPolicy | None", policy)
    make_env = lambda slots: SleepingEnv(len(slots), device, profile, chunks, spec.action_dim)  # noqa: E731
    return build_trainer(run, stand_in, None, make_env, sleeping_spec(spec.action_dim)), learner


# ---------------------------------------------------------------- a machine's costs


def measure_costs(run: Context, policy: VLAPolicy, learner: Learner) -> Measured:
    """Costs of the recipe's simulator, policy and learner on this device, swept over batch sizes up to the recipe's. One rank."""
    sizes = _sizes(run.recipe.env.parallel)
    env: list[tuple[float, float]] = []
    act: list[tuple[float, float]] = []
    message: list[tuple[float, float]] = []
    for done, size in enumerate(sizes):
        write_status(run.run_dir, phase=f"measuring batches of {size}", update=done, updates=len(sizes) + 1)
        with run.span("costs"):
            *seconds, overlap = _chunk_costs(run, policy, size)
        for curve, value in zip((env, act, message), seconds, strict=True):
            curve.append((float(size), value))
    write_status(run.run_dir, phase="measuring updates", update=len(sizes), updates=len(sizes) + 1)
    update = _update_costs(run, policy, learner)
    weights = [p.detach() for p in policy.module.parameters() if p.requires_grad]
    return Measured(
        device=torch.cuda.get_device_name() if run.world.device.type == "cuda" else f"CPU ({platform.machine()}), {_threads()}",
        notes=f"Medians of {REPEATS}, or a larger batch's where that is less. "
        "Messages and weight sync are copies within one device; between ranks, links add to them. "
        f"Overlap with {sizes[-1]} slots simulated and as many acted on.",
        env_seconds=rising(env),
        act_seconds=rising(act),
        update_seconds=update,
        sync_seconds=_median(run, lambda: [w.clone() for w in weights]),
        message_seconds=rising(message),
        overlap=overlap,
    )


def rising(points: list[tuple[float, float]]) -> Curve:
    """The (size, seconds) points, sizes ascending, of a cost that never falls: noise only adds time, so the least of all larger sizes."""
    least = list(accumulate((seconds for _, seconds in reversed(points)), min))[::-1]
    return tuple((size, seconds) for (size, _), seconds in zip(points, least, strict=True))


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread" + ("s" if count > 1 else "")


def _sizes(largest: int) -> list[int]:
    """1 and the largest, and by fours in between."""
    return sorted({max(1, largest // 4**i) for i in range(SIZES)} | {1})


def _chunk_costs(run: Context, policy: VLAPolicy, size: int) -> tuple[float, float, float, float]:
    """Seconds of simulating one chunk of `size` slots, of acting on them, and of packing and unpacking their frames; and how much of the
    shorter of the first two disappears when both go on at once."""
    recipe, spec = run.recipe, policy.spec
    feed = TrainingFeed(TrainingSchedule(recipe.seed, size, len(run.tasks), 1), range(size))
    pool = build_pool(lambda slots: build_env(run, slots), feed, (0, size), 1, spec.chunk, "none")
    sampler = build_sampler(policy, spec, recipe.seed, recipe.rollout.temperature, recipe.rollout.top_k)
    message = StepMessage(size, pool.spec, spec.chunk, run.world.device)
    pool.begin()
    steps: list[EnvStep] = [pool.recv(0)]
    action: list[Tensor] = []

    def act() -> None:
        step = steps[-1]
        uid = torch.tensor([e.uid for e in step.episode if e is not None])
        action.append(sampler(step.obs, uid, step.chunk_index_B).action_BKA)

    def simulate() -> None:
        pool.send(0, action[-1])
        steps.append(pool.recv(0))

    def pack() -> None:
        message.write(steps[-1], slice(0, size))
        message.read(None)

    def both() -> None:
        simulating = ahead.start(simulate)
        act()
        ahead.wait(simulating)

    ahead = Ahead(1, run.world.device, lambda start, end: None)
    with acting(policy.module):
        act_seconds = _median(run, act)
        env_seconds = _median(run, simulate)
        hidden = env_seconds + act_seconds - _median(run, both)
    pack_seconds = _median(run, pack)
    ahead.close()
    pool.close()
    return env_seconds, act_seconds, pack_seconds, min(1.0, max(0.0, hidden / min(env_seconds, act_seconds)))


def _update_costs(run: Context, policy: VLAPolicy, learner: Learner) -> Curve:
    """Seconds of one epoch over the samples of a quarter, half and all of the slots of one collection."""
    trainer = build_trainer(run, policy, learner, training_envs(run), simulator_spec(run.recipe.env))
    batch, _ = collect(run, trainer, 0)
    batch = batch.clone()
    set_learning_rates(learner.optimizer, 0.0, 0.0)  # the collected samples stay on-policy
    group, slots = run.plan.rollout.group_size, batch.slot_B.tolist()
    points = {}
    for share in (4, 2, 1):
        part = take_slots(batch, slots[: max(group, len(slots) // share // group * group)])
        targets = judge(run, part)
        samples = int(targets.keep_TB.sum())
        if samples:
            once = partial(learner.update, part, targets, 0)
            points[float(samples)] = _median(run, once, 3) / run.recipe.update.epochs
    return rising(sorted(points.items())) or ((1.0, 0.0),)


def _median(run: Context, action: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median seconds of an action, after one call that warms up."""
    seconds = []
    for _ in range(1 + repeats):
        _settle(run)
        started = time.perf_counter()
        action()
        _settle(run)
        seconds.append(time.perf_counter() - started)
        run.heartbeat.beat("costs")
    return statistics.median(seconds[1:])


def _settle(run: Context) -> None:
    if run.world.device.type == "cuda":
        torch.cuda.synchronize()
