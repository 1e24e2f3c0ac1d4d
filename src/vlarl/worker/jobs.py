"""Owns the jobs of a worker rank: train, sft (warm start alone), eval, record, bench, profile; each from the run folder to its result.json.
"""
from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from vlarl import serial
from vlarl.distributed import manifest
from vlarl.distributed.fsdp import acting
from vlarl.distributed.mesh import shutdown
from vlarl.distributed.reduce import barrier
from vlarl.evaluation.report import result_table
from vlarl.launch.lifeline import LAUNCHER_PID
from vlarl.learner.update import Learner
from vlarl.metrics.sinks import METRICS_FILE, read_metrics
from vlarl.metrics.status import write_status
from vlarl.metrics.words import duration_text, rate_text
from vlarl.plan.profile import Profile
from vlarl.plan.specs import simulator_spec, weight_files
from vlarl.policies.base import VLAPolicy
from vlarl.policies.layout import switches
from vlarl.policies.probe import action_range
from vlarl.worker.bench import bench, build_emulated, measure_costs
from vlarl.worker.context import Context, open_context
from vlarl.worker.evaluate import evaluate
from vlarl.worker.loop import Updates, assist, train
from vlarl.worker.progress import Progress
from vlarl.worker.record import record
from vlarl.worker.setup import (
    acting_slots,
    build_learner,
    build_offload,
    build_placed_policy,
    build_policy,
    build_sharded_policy,
    build_trainer,
    equip_policy,
    evaluation_slots,
    place_policy,
    training_envs,
)
from vlarl.worker.warmstart import take_statistics, warm_start


@dataclass(frozen=True)
class JobOptions:
    """What a job is told besides the run folder. variations: of eval; none: the recipe's. resume: train goes on from the newest checkpoint.
    updates, warmup: of bench. emulate: a profile whose costs bench sleeps. dataset: the folder that record writes."""

    variations: tuple[str, ...] = ()
    resume: bool = False
    updates: int = 3
    warmup: int = 1
    emulate: Path | None = None
    dataset: Path | None = None


def run_job(job: str, run_dir: Path, options: JobOptions) -> None:
    """Run one job and leave the world."""
    run = open_context(run_dir)
    try:
        if job == "eval":
            evaluate_job(run, options.variations or (run.recipe.env.variation,))
        elif job == "bench":
            _bench_job(run, options)
        elif job == "profile":
            policy, learner = _learning(run, cloning=False)
            assert policy is not None and learner is not None, "a profile is of one rank that does everything"
            _finish(run, {"profile": serial.to_dict(measure_costs(run, policy, learner))})
        elif job == "record":
            assert options.dataset is not None, "--dataset names where to"
            _finish(run, record(run, options.dataset))
        elif job == "sft":
            policy = build_policy(run)
            warm_start(run, policy)
            _finish(run, {"notes": [f"Policy: {run_dir / 'warmstart'}"]})
        else:
            train_job(run, options.resume)
        barrier(run.world, "end")
    finally:
        run.close_hosts()
        run.spans.totals()
        shutdown()


def train_job(run: Context, resume: bool) -> None:
    """Warm start if the recipe has one, then RL."""
    policy, learner = _learning(run, cloning=bool(run.recipe.warmstart) and not resume)
    trainer = build_trainer(run, policy, learner, training_envs(run), simulator_spec(run.recipe.env))
    if learner is None:
        assist(run, trainer, resume)
    else:
        progress = train(run, trainer, learner, resume)
        if run.world.is_main:
            _finish(run, _training_result(run, progress))


def _learning(run: Context, cloning: bool) -> tuple[VLAPolicy | None, Learner | None]:
    """This rank's policy, warm-started first where `cloning`, and what improves it; None for the roles of others."""
    if cloning:
        whole = build_policy(run)
        warm_start(run, whole)
        policy = place_policy(run, whole)
    else:
        policy = build_placed_policy(run)
        if policy is not None:
            take_statistics(run, policy)
    if policy is not None:
        equip_policy(run, policy, acting_slots(run))
    if policy is None or "learner" not in run.rank_plan.roles:
        return policy, None
    return policy, build_learner(run, policy, _reference(run))


def _bench_job(run: Context, options: JobOptions) -> None:
    """A few timed iterations, real or slept."""
    updater: Updates | None
    actions = None
    if options.emulate is not None:
        profile = serial.load(Profile, options.emulate)
        trainer, updater = build_emulated(run, profile)
        actions = profile.actions_per_chunk
    else:
        policy, updater = _learning(run, cloning=False)
        trainer = build_trainer(run, policy, updater, training_envs(run), simulator_spec(run.recipe.env))
    if updater is None:
        assist(run, trainer, resume=False)
    else:
        _finish(run, {"bench": bench(run, trainer, updater, options.warmup, options.updates, actions)})


def _reference(run: Context) -> VLAPolicy | None:
    """The policy before RL, for the KL term, if there is one."""
    if run.recipe.algorithm.kl_coef == 0:
        return None
    cloned = str(run.run_dir / "warmstart") if run.recipe.warmstart else None
    return build_sharded_policy(run, trainable=False, source=cloned)


def evaluate_job(run: Context, variations: tuple[str, ...]) -> None:
    """Play the named variations with one policy; eval.json holds every episode's row. The learners' job."""
    if run.world.learners is None:
        return
    policy = build_sharded_policy(run, trainable=False, apart=True)
    equip_policy(run, policy, evaluation_slots(run))
    hashes = {}
    for path in weight_files(run.recipe):
        hashes[path.name] = manifest.sha256(path)
        manifest.check_contents(path, hashes[path.name])
    reports, offload = [], build_offload(run, policy, None)
    checkpoint, evaluated = _evaluated(run)
    for done, variation in enumerate(variations):
        if run.world.is_main:
            which = f" ({done + 1} of {len(variations)})" if len(variations) > 1 else ""
            write_status(run.run_dir, phase=f"evaluating {variation}{which}", update=done, updates=len(variations), line=checkpoint)
        with run.span("eval"), offload.phase("evaluation") as away, acting(policy.module, away):
            report = evaluate(run, policy, variation, run.recipe.seed, hashes, f"eval-{variation}")
        reports.append(report | {"policy": evaluated})
    if run.world.is_main:
        _write(run.run_dir / "eval.json", reports)
    notes = [checkpoint, *policy.notices, action_range(policy), switches(policy.config), f"Every episode: {run.run_dir / 'eval.json'}"]
    _finish(run, {"table": result_table(reports), "notes": notes})


def _evaluated(run: Context) -> tuple[str, dict[str, Any]]:
    """Which policy `vlarl eval` plays, as a line and for eval.json; update and best: of a run's checkpoint."""
    source = run.recipe.policy.checkpoint
    assert source is not None
    folder = Path(source).parent
    if not (folder / manifest.MANIFEST).is_file():  # a policy folder of its own, or a built-in one
        return f"policy: {_shown(source)}", {"path": source, "update": None, "best": None}
    best = manifest.best(folder.parent.parent) == folder
    update = manifest.read_manifest(folder)["update"]
    return f"policy: {_shown(str(folder))}{' (best)' if best else ''}", {"path": source, "update": update, "best": best}


def _shown(path: str) -> str:
    """As short as it can be typed: ranks work in the folder of the command."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def _training_result(run: Context, progress: Progress) -> dict[str, Any]:
    """What the command prints at its end. The record knows every evaluation, also those before a resume."""
    counts = {
        row["step"]: rate_text(int(row["eval/successes"]), int(row["eval/episodes"]))
        for row in read_metrics(run.run_dir / METRICS_FILE)
        if "eval/episodes" in row
    }
    rows = [["updates", str(progress.update)], ["episodes", str(progress.episodes)]]
    command = psutil.Process(int(os.environ.get(LAUNCHER_PID, os.getpid())))
    rows.append(["time of this command", duration_text(time.time() - command.create_time())])
    rows.append(["time of all updates", duration_text(progress.seconds)])
    if progress.recent:
        rate = rate_text(sum(progress.recent), len(progress.recent))
        rows.append([f"success, last {len(progress.recent)} training episodes", rate])
    if 0 in counts:
        rows.append(["evaluation before training", counts[0]])
    best = progress.best[1] if progress.best is not None else 0
    if best in counts and best > 0:
        rows.append([f"best evaluation (update {best}, checkpoints/best)", counts[best]])
    if any(counts):
        rows.append([f"last evaluation (update {max(counts)})", counts[max(counts)]])
    return {
        "table": {"title": run.recipe.name, "columns": ["what", "value"], "rows": rows},
        "notes": [f"Evaluate: vlarl eval --ckpt {run.run_dir}", f"Curve: {run.run_dir / 'curve.png'}"],
    }


def _finish(run: Context, result: dict[str, Any]) -> None:
    if run.world.is_main:
        _write(run.run_dir / "result.json", result)


def _write(path: Path, value: Any) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value, indent=1), encoding="utf-8")
    draft.replace(path)
