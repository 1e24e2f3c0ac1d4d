"""Owns `vlarl bench-placement`: one short timed run per placement, in turn, and the table, pictures and trace of them all.

A run's row is in results.json as soon as it ends; called again with the same folder, only what is missing is run.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlarl import serial
from vlarl.errors import EXIT_WORKER, MachineError, PlanError, VlarlError, WorkerError
from vlarl.launch import rundir
from vlarl.launch.supervisor import supervise
from vlarl.launch.torchrun import command, worker_arguments
from vlarl.plan.choose import candidates, label
from vlarl.plan.cluster import Cluster, discover
from vlarl.plan.compile import compile_plan, crowding
from vlarl.plan.costs import predict
from vlarl.plan.placement import PlacementPlan
from vlarl.plan.profile import PROFILE_VERSION, Measured, Profile, check, check_chunk, without_traffic
from vlarl.plan.specs import check_weights, policy_spec, simulator_spec
from vlarl.recipe.load import LoadedRecipe
from vlarl.recipe.schema import Placement, Recipe
from vlarl_cli import charts, render
from vlarl_cli.placements import block, compared
from vlarl_cli.run import conclude
from vlarl_cli.shipped import profile_text, read_profile

CPU_RANKS = 4  # where neither recipe nor machine says how many
MEASURED = ("frames_per_second", "rollout_seconds", "update_seconds", "sync_seconds", "env_seconds", "act_seconds", "overlap_efficiency")
Row = dict[str, Any]


@dataclass(frozen=True)
class BenchOptions:
    """modes, stages: what to compare. all_splits: every sensible division into env, rollout and learner ranks, not the best one alone.
    emulate: sleep these costs instead of computing. profile: predict from these costs (None: from costs measured first, on one rank).
    devices: ranks (None: as the recipe says)."""

    modes: tuple[str, ...]
    stages: tuple[int, ...]
    all_splits: bool
    updates: int
    warmup: int
    devices: int | None
    emulate: Profile | None
    profile: Profile | None
    out: Path | None


def bench(loaded: LoadedRecipe, options: BenchOptions) -> int:
    """Run every placement that has no row yet. Returns the exit code: 0; 1 where one failed; 128 + n for signal n."""
    if options.profile is not None:
        check_chunk(options.profile, policy_spec(loaded.recipe).chunk, loaded.recipe.policy.checkpoint)
    cluster = _cluster(loaded.recipe, options)
    recipe = _recipe(loaded.recipe, cluster, options)
    assert recipe.ranks is not None
    if remark := crowding(cluster, recipe.ranks):
        render.note(remark)
    if options.emulate is None:
        check_weights(recipe)
    _placements(recipe, cluster, options, options.profile, render.note)  # refuses what cannot be before there is a folder
    out = _folder(recipe, options)
    costs = without_traffic(options.emulate) if options.emulate else options.profile or _measured(loaded, recipe, cluster, out)
    if isinstance(costs, int):
        return costs
    chosen = _placements(recipe, cluster, options, costs, lambda told: None)
    rows: list[Row] = rundir.read_json(out / "results.json") or []
    failed = []
    for i, (placement, plan) in enumerate(chosen):
        if any(row["label"] == label(placement) for row in rows):
            continue
        render.note(f"{i + 1}/{len(chosen)}  {label(placement)}{_emulated(options)}")
        try:
            result = _run(out / folder_name(placement), replace(recipe, placement=placement), plan, options)
        except VlarlError as problem:
            render.error(problem)
            failed.append(label(placement))
            continue
        if isinstance(result, int):
            render.note(f"{len(rows)} of {len(chosen)} placements are done; the same command with --out {out} goes on.")
            return result
        predicted = predict(plan, costs).frames_per_second if costs else None
        rows.append(row_of(placement, plan, result, options.emulate, predicted, folder_name(placement)))
        rundir.write_atomic(out / "results.json", json.dumps(rows, indent=2) + "\n")
    if rows:
        _conclude(out, rows, options)
    if failed:
        render.note(f"Failed: {', '.join(failed)}. Logs are below {out}.")
    return 1 if failed else 0


def write_profile(loaded: LoadedRecipe, path: Path, out: Path | None) -> int:
    """Measure what the recipe's simulator, policy and learner cost on one device, and write it as a profile."""
    if path.exists():
        raise MachineError(f"{path} exists already.", "Name another file.")
    rundir.check_writable(path, "Name another file with --write-profile.")
    recipe = replace(loaded.recipe, ranks=1, placement=Placement(mode="collocated"), warmstart=())
    cluster = discover(recipe.device)
    plan = compile_plan(recipe, cluster, policy_spec(recipe), simulator_spec(recipe.env), "train", loaded.origins)
    check_weights(recipe)
    run = rundir.create(out or rundir.default_path(f"{recipe.name}-profile", time.time()), recipe, plan, 0)
    result = _supervised(run, plan, recipe, worker_arguments(run.path, "profile"))
    if isinstance(result, int):
        return result
    measured = serial.from_dict(Measured, result["profile"])
    profile = Profile(
        version=PROFILE_VERSION,
        name=path.stem,
        summary=f"{recipe.env.simulator} at {recipe.env.image_size} pixels with {policy_spec(recipe).kind}, measured.",
        source="measured",
        provenance=f"vlarl bench-placement {recipe.name} --write-profile, {time.strftime('%Y-%m-%d')}. {measured.notes}".strip(),
        device=measured.device,
        actions_per_chunk=policy_spec(recipe).chunk,
        env_seconds=measured.env_seconds,
        act_seconds=measured.act_seconds,
        update_seconds=measured.update_seconds,
        sync_seconds=measured.sync_seconds,
        message_seconds=measured.message_seconds,
        overlap=measured.overlap,
    )
    check(profile, str(run.result))
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_atomic(path, profile_text(profile))
    render.note(f"Profile: {path}")
    return 0


def _measured(loaded: LoadedRecipe, recipe: Recipe, cluster: Cluster, out: Path) -> Profile | int | None:
    """Costs of this recipe on one rank with the threads of one of many, from `out` where they have been measured before. None where one
    rank cannot hold all slots; an exit code where a signal ended it."""
    path = out / "profile.yaml"
    if not path.exists():
        render.note("measuring what simulation, action generation and learning cost on one rank")
        assert recipe.ranks is not None
        threads = recipe.threads or (max(1, cluster.cores // recipe.ranks) if cluster.device == "cpu" else None)
        shutil.rmtree(out / "profile", ignore_errors=True)  # an attempt that was cut short
        try:
            code = write_profile(replace(loaded, recipe=replace(recipe, threads=threads)), path, out / "profile")
        except PlanError as problem:
            render.note(f"nothing is predicted, as one rank cannot measure for all slots: {problem.message} (--profile names costs)")
            return None
        if code:
            return code
    return read_profile(str(path))


def row_of(
    placement: Placement, plan: PlacementPlan, measured: Row, emulate: Profile | None, predicted: float | None, folder: str
) -> Row:
    """One row of results.json. idle: share per rank, in their order."""
    counts = {name: sum(name in r.roles for r in plan.ranks) for name in ("env", "rollout", "learner")}
    row: Row = {"label": label(placement), "mode": plan.mode, "stages": plan.rollout.stages, "devices": len(plan.ranks)} | counts
    row |= {"emulated": emulate is not None, "profile": emulate.name if emulate else None}
    row |= {name: measured[name] for name in MEASURED} | {"overlap": plan.rollout.overlap}
    idle = measured["idle"]
    row["idle"] = [idle[str(rank)] for rank in range(len(plan.ranks))] if isinstance(idle, dict) else list(idle)
    return row | {"predicted_frames_per_second": predicted, "placement": block(placement, plan.rollout.overlap), "run": folder}


def speedups(rows: list[Row]) -> list[Row]:
    """Rows, fastest first, with their speed over the best disaggregated placement of one stage and over the slowest one (None: not run)."""
    disaggregated = [row["frames_per_second"] for row in rows if row["mode"] == "disaggregated" and row["stages"] == 1]
    slowest = min(row["frames_per_second"] for row in rows)
    against = max(disaggregated, default=None)
    return [
        row
        | {
            "speedup_over_disaggregated": row["frames_per_second"] / against if against else None,
            "speedup_over_slowest": row["frames_per_second"] / slowest,
        }
        for row in sorted(rows, key=lambda row: -row["frames_per_second"])
    ]


def folder_name(placement: Placement) -> str:
    """Run folder of a placement: `hybrid-4-4-k2`."""
    counts = [str(n) for n in (placement.env, placement.rollout, placement.learner) if n is not None]
    return "-".join([placement.mode, *counts, f"k{placement.stages}"])


# ---------------------------------------------------------------- what to run


def _cluster(recipe: Recipe, options: BenchOptions) -> Cluster:
    """Emulation needs no memory, and no cores to speak of: ranks that sleep do not crowd each other."""
    if options.emulate is not None:
        cores = options.devices or recipe.ranks or CPU_RANKS
        return Cluster(cores=cores, reason=f"emulated: costs slept, not computed, as {options.emulate.name} says")
    return discover(recipe.device)


def _recipe(recipe: Recipe, cluster: Cluster, options: BenchOptions) -> Recipe:
    """The recipe with the number of ranks to compare on; RL alone."""
    ranks = options.devices or recipe.ranks or cluster.devices_per_node or CPU_RANKS
    wanted = recipe.placement
    recipe = replace(
        recipe,
        ranks=ranks,
        warmstart=(),
        placement=Placement(mode="collocated", overlap=wanted.overlap, offload=wanted.offload),
        update=replace(recipe.update, updates=options.warmup + options.updates),
        eval=replace(recipe.eval, every=0),
    )
    return replace(recipe, device="cpu", threads=None) if options.emulate else recipe


def _placements(
    recipe: Recipe, cluster: Cluster, options: BenchOptions, costs: Profile | None, remark: Callable[[str], None]
) -> list[tuple[Placement, PlacementPlan]]:
    """What to run: of each mode and number of stages the division that is predicted best, or the most even one that fits."""
    assert recipe.ranks is not None
    wanted = candidates(recipe.ranks, options.modes, options.stages, recipe.placement)
    if costs is not None:
        fastest = [row.placement for row in compared(recipe, cluster, costs, wanted) if row.prediction is not None]
        wanted = fastest + [p for p in wanted if p not in fastest]
    policy, env = policy_spec(recipe), simulator_spec(recipe.env)
    chosen: list[tuple[Placement, PlacementPlan]] = []
    refused: dict[tuple[str, int], str] = {}
    for placement in wanted:
        kind = (placement.mode, placement.stages)
        if not options.all_splits and any(kind == (p.mode, p.stages) for p, _ in chosen):
            continue
        try:
            chosen.append((placement, compile_plan(replace(recipe, placement=placement), cluster, policy, env, profile=costs)))
        except PlanError as problem:
            refused.setdefault(kind, problem.message)
    for (mode, stages), why in refused.items():
        if not any((mode, stages) == (p.mode, p.stages) for p, _ in chosen):
            remark(f"left out: {mode}, stages {stages}: {why}")
    if not chosen:
        raise PlanError(f"No placement of {recipe.name} fits {_counted(recipe.ranks, 'rank')}.", "Change env.parallel or --devices.")
    order = {(mode, k): i for i, (mode, k) in enumerate((m, k) for m in options.modes for k in options.stages)}
    return sorted(chosen, key=lambda item: order[item[0].mode, item[0].stages])


def _folder(recipe: Recipe, options: BenchOptions) -> Path:
    """The folder of the comparison; one that exists must be of the very same comparison."""
    out = (options.out or rundir.default_path(f"{recipe.name}-bench", time.time())).absolute()
    settings = {
        "recipe": serial.to_dict(recipe),
        "emulate": serial.to_dict(options.emulate) if options.emulate else None,
        "updates": options.updates,
        "warmup": options.warmup,
    }
    there = out / "bench.json"
    if there.exists():
        if rundir.read_json(there) != settings:
            raise MachineError(f"{out} holds a comparison with other settings.", "Name another folder with --out.")
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MachineError(f"{out} exists already and holds no comparison.", "Name another folder with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        rundir.write_atomic(there, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise MachineError(f"{out} cannot be written: {error.strerror or error}.", "Name a folder of your own with --out.") from None
    return out


# ---------------------------------------------------------------- runs


def _run(path: Path, recipe: Recipe, plan: PlacementPlan, options: BenchOptions) -> Row | int:
    """One timed run: what the ranks measured, or the exit code where a signal ended it."""
    if path.exists():  # an attempt that was cut short
        shutil.rmtree(path)
    run = rundir.create(path, recipe, plan, 0)
    extra = ["--updates", str(options.updates), "--warmup", str(options.warmup)]
    if options.emulate is not None:
        costs = run.path / "profile.json"
        rundir.write_atomic(costs, serial.dumps(without_traffic(options.emulate)))
        extra += ["--emulate", str(costs)]
    result = _supervised(run, plan, recipe, (*worker_arguments(run.path, "bench"), *extra))
    return result if isinstance(result, int) else result["bench"]


def _supervised(run: rundir.RunDir, plan: PlacementPlan, recipe: Recipe, arguments: tuple[str, ...]) -> Row | int:
    torchrun = command(plan, run.path, arguments, os.environ, os.getpid())
    code = EXIT_WORKER
    try:
        with render.progress() as on_progress:
            stopped = supervise(torchrun, run, len(plan.ranks), recipe.stall_seconds, on_progress)
        code = 0 if stopped is None else 128 + stopped.value
    finally:
        conclude(run, code)
    if stopped is not None:
        render.note(f"Stopped by {stopped.name}; nothing is left running.")
        return code
    result = rundir.read_json(run.result)
    if not isinstance(result, dict):
        raise WorkerError("The ranks ended without an error and without a result.", f"Log: {run.log(0)}")
    return result


# ---------------------------------------------------------------- conclusion


def _conclude(out: Path, rows: list[Row], options: BenchOptions) -> None:
    """Table, pictures, trace, and the block to paste."""
    ranked = speedups(rows)
    rundir.write_atomic(out / "results.json", json.dumps(ranked, indent=2) + "\n")
    what = _counted(ranked[0]["devices"], "emulated device" if options.emulate else "rank")
    title = f"{what}, frames/s of the whole iteration"
    render.bench_table(ranked, title)
    charts.bars(out / "placements.png", ranked, title)
    lanes = {row["label"]: charts.read_lanes(out / row["run"]) for row in ranked}
    charts.timelines(out / "timelines.png", lanes, "emulated" if options.emulate else "")
    charts.trace(out / "trace.json", lanes)
    render.note(f"winner{_emulated(options)}: {ranked[0]['label']}")
    render.note(ranked[0]["placement"])
    rundir.write_atomic(out / "placement.yaml", ranked[0]["placement"] + "\n")
    render.note(f"results.json, placements.png, timelines.png, trace.json (opens in ui.perfetto.dev), placement.yaml: {out}")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _emulated(options: BenchOptions) -> str:
    return " (emulated)" if options.emulate else ""
