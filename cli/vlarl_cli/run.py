"""Owns the way of a command from recipe to result: load, plan, make the run folder, launch, follow, print."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vlarl import serial
from vlarl.distributed.manifest import MANIFEST, best, check_placement, latest, set_aside_after, update_of
from vlarl.errors import EXIT_WORKER, CheckpointError, MachineError, PlanError, RecipeError, VlarlError, WorkerError
from vlarl.launch import rundir
from vlarl.launch.supervisor import supervise
from vlarl.launch.torchrun import Job as Started
from vlarl.launch.torchrun import command, rank_env, sbatch, worker_arguments
from vlarl.metrics.status import write_status
from vlarl.plan.cluster import Cluster, discover, part_for
from vlarl.plan.compile import compile_plan
from vlarl.plan.memory import Job, checkpoint_bytes
from vlarl.plan.placement import PlacementPlan, layout
from vlarl.plan.specs import check_weights, policy_spec, simulator_spec
from vlarl.recipe.load import LoadedRecipe, load_with_origins
from vlarl.recipe.schema import Recipe
from vlarl_cli import render, resuming
from vlarl_cli.here import check_here
from vlarl_cli.placements import against_prediction, memory_against_prediction
from vlarl_cli.shipped import find_recipe, read_profile, shipped_recipes

INTERRUPTED = 130
JOIN_SECONDS = 300.0  # that a node waits for node 0 to make the run folder


@dataclass(frozen=True)
class Nodes:
    """Several machines that run the same command. count: of them. endpoint: HOST:PORT where they meet. rank: of this one; 0 makes the
    run folder, which all of them see."""

    count: int
    endpoint: str
    rank: int


@dataclass(frozen=True)
class Launch:
    """What is to be started. arguments of the worker come from job, resume, variations and dataset."""

    job: Started
    out: Path | None = None
    resume: bool = False
    in_process: bool = False
    variations: tuple[str, ...] = ()
    nodes: Nodes | None = None
    dataset: Path | None = None

    @property
    def planned(self) -> Job:
        """As what it is planned: a recording plays episodes as an evaluation does."""
        return self.job if self.job in ("train", "sft") else "eval"  # type: ignore[return-value]


def load(name: str, overrides: list[str]) -> LoadedRecipe:
    """A recipe by file or shipped name."""
    loaded = load_with_origins(find_recipe(name), overrides, shipped_recipes())
    _check_is_policy(loaded.recipe.policy.checkpoint)
    return loaded


def _check_is_policy(name: str) -> None:
    """Raise CheckpointError for the folder of a run or of a checkpoint, naming the policy in it: `vlarl eval` takes the best one there, and
    which weights a training begins with is better said."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return
    if (folder / MANIFEST).is_file() and (folder / "policy").is_dir():
        raise CheckpointError(f"policy.checkpoint = {name} is a checkpoint, not a policy.", f"Name its policy: {folder / 'policy'}")
    if (folder / "checkpoints").is_dir() and (folder / "recipe.json").is_file():
        link = folder / "checkpoints" / "best" if best(folder) is not None else latest(folder)
        found = link / "policy" if link is not None else folder / "warmstart"
        hint = f"Name a policy of it: {found}" if found.is_dir() else "It holds no finished checkpoint: let it run until its first one."
        raise CheckpointError(f"policy.checkpoint = {name} is a run folder, not a policy.", hint)


def make_plan(loaded: LoadedRecipe, job: Job, cluster: Cluster | None = None) -> PlacementPlan:
    """The plan for this machine, or for another one."""
    recipe = loaded.recipe
    there = cluster or discover(recipe.device)
    profile = read_profile(recipe.placement.profile) if recipe.placement.profile else None
    return compile_plan(recipe, there, policy_spec(recipe), simulator_spec(recipe.env), job, loaded.origins, profile)


def start(loaded: LoadedRecipe, launch: Launch) -> int:
    """Run a job in a new run folder. Returns the exit code."""
    loaded = replace(loaded, recipe=_located(loaded.recipe))
    if launch.in_process and loaded.recipe.ranks is None:
        loaded = replace(loaded, recipe=replace(loaded.recipe, ranks=1))
    recipe = loaded.recipe
    if launch.job == "sft" and not recipe.warmstart:
        rule = "warmstart: required for `vlarl sft`, and not given. Add a list of phases, such as `warmstart: [{steps: 5000}]`."
        raise RecipeError([rule], recipe.name)
    plan = make_plan(loaded, launch.planned, nodes_like_this(recipe.device, launch.nodes))
    check_here(loaded, launch.job)
    if launch.job != "record" or recipe.record.player == "policy":
        check_weights(recipe)
    if launch.nodes is not None and launch.nodes.rank > 0:
        return _follow(_join(launch), plan, recipe, launch)
    out = launch.out or rundir.default_path(recipe.name, time.time())
    needed = 0 if launch.planned == "eval" else checkpoint_bytes(recipe, policy_spec(recipe), plan.dtype)
    run = rundir.create(out, recipe, plan, needed)
    return _follow(run, plan, recipe, launch)


def _located(recipe: Recipe) -> Recipe:
    """The recipe with whole paths, links followed: resuming from another folder, or after `best` has moved on, finds the same weights.

    What is not here keeps its name, under which it can be planned for; `check_weights` then says how to get it.
    """
    p = recipe.policy
    checkpoint, adapter = (
        str(Path(name).expanduser().resolve()) if name and Path(name).expanduser().is_dir() else name for name in (p.checkpoint, p.adapter)
    )
    assert checkpoint is not None
    phases = tuple(replace(w, data=str(Path(w.data).expanduser().resolve())) if w.data else w for w in recipe.warmstart)
    return replace(recipe, policy=replace(p, checkpoint=checkpoint, adapter=adapter), warmstart=phases)


def nodes_like_this(device: str, nodes: Nodes | None) -> Cluster | None:
    """So many machines as this one; None for this one alone."""
    return None if nodes is None else replace(discover(device), nodes=nodes.count)


def _join(launch: Launch) -> rundir.RunDir:
    """The run folder that node 0 makes, once it is there."""
    assert launch.out is not None and launch.nodes is not None
    run = rundir.RunDir(launch.out.absolute())
    hint = "Start the same command on node 0, with --out on a file system that all nodes see."
    _await_node_0(run.plan.is_file, f"{run.path} has not appeared within {JOIN_SECONDS:.0f} s: node 0 makes it.", hint)
    if run.result.is_file():
        raise MachineError(f"The run in {run.path} has ended already.", "Name another folder with --out, on all nodes.")
    return run


def _rejoin(path: Path) -> rundir.RunDir:
    """The run folder once node 0 has made it ready. Ranks start after that only: they wait for all nodes."""
    run = rundir.RunDir(path.absolute())
    problem = f"{run.path} still shows how the last attempt ended after {JOIN_SECONDS:.0f} s: node 0 makes it ready."
    _await_node_0(lambda: not rundir.remains(run), problem, "Start the same command on node 0.")
    return run


def _await_node_0(done: Callable[[], bool], problem: str, hint: str) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise MachineError(problem, hint)
        time.sleep(0.5)


def slurm_file(name: str, overrides: list[str], count: int, there: Cluster | None) -> str:
    """The sbatch file of a training run on `count` machines: such as `there` describes (if it is one of several, so many), else as this."""
    loaded = load(name, overrides)
    device = loaded.recipe.device
    try:
        machine = discover(device) if there is None else part_for(there, device)
    except MachineError as error:
        raise MachineError(error.message, "Say what the job's nodes have: --cluster 8x80GB (GPUs of one node x memory of each).") from None
    if count > 1 and machine.nodes not in (1, count):
        raise MachineError(f"--nnodes {count}, but --cluster describes {machine.nodes} nodes.", "Give one of the two.")
    plan = make_plan(loaded, "train", replace(machine, nodes=max(count, machine.nodes)))
    return sbatch(plan, loaded.recipe.name, (name, *overrides))


def resume(run_path: Path, overrides: list[str], launch: Launch, dry_run: bool) -> int:
    """Go on with the run in `run_path` from its newest whole checkpoint. Overrides change its recipe (`update.updates=200`).

    Nothing is touched before all has been checked, nor in a dry run, which prints the plan.
    """
    newest, damage = resuming.choose_checkpoint(run_path)
    before = _located(serial.load(Recipe, run_path / "recipe.json"))
    resuming.check_kinds(run_path, newest, before, overrides)
    loaded = load_with_origins(run_path / "recipe.json", [*_policy_override(run_path, newest, overrides), *overrides])
    loaded = replace(loaded, recipe=_located(loaded.recipe))
    resuming.check_same(run_path, newest, before, loaded.recipe)
    resuming.check_left(run_path, newest, loaded.recipe)
    plan = make_plan(loaded, launch.planned, nodes_like_this(loaded.recipe.device, launch.nodes))
    check_placement(newest, layout(plan))
    check_weights(loaded.recipe)
    if damage:
        render.note(resuming.skipped(damage, newest))
    if dry_run:
        render.plan(plan)
        render.note(f"{run_path} would go on from update {update_of(newest)} of {loaded.recipe.update.updates}.")
        return 0
    if launch.nodes is not None and launch.nodes.rank > 0:
        return _follow(_rejoin(run_path), plan, loaded.recipe, launch)
    rundir.check_space(run_path, rundir.LOG_BYTES)
    if damage:
        set_aside_after(newest)
    run = rundir.reopen(run_path, loaded.recipe, plan)
    return _follow(run, plan, loaded.recipe, launch)


def _policy_override(run_path: Path, newest: Path, overrides: list[str]) -> list[str]:
    """The policy that the run began with may have moved; its checkpoint has the same shape, and the same weights where they are frozen.

    It will not do where the first weights themselves are needed: below adapters, and as the reference of the KL term.
    """
    recipe = serial.load(Recipe, run_path / "recipe.json")
    used = [name for name in (recipe.policy.checkpoint, recipe.policy.adapter) if name is not None]
    gone = [name for name in used if resuming.gone(name)]
    if not gone or any(text.startswith("policy.checkpoint=") for text in overrides):
        return []
    needed = "the base of its adapters (policy.lora)" if recipe.policy.lora is not None else ""
    if recipe.algorithm.kl_coef > 0 and not recipe.warmstart:
        needed = needed or "the reference of its KL term (algorithm.kl_coef)"
    if needed:
        hint = f"Put it back, or name its new place: vlarl train --resume {run_path} policy.checkpoint=FOLDER."
        raise CheckpointError(f"{gone[0]}, which the run began with and which is {needed}, is gone.", hint)
    return [f"policy.checkpoint={json.dumps(str(newest / 'policy'))}", "policy.adapter=null"]


def _follow(run: rundir.RunDir, plan: PlacementPlan, recipe: Recipe, launch: Launch) -> int:
    """Run to the end; status.json then says how it ended (node 0 writes it, as it writes the rest)."""
    code = EXIT_WORKER
    try:
        code = _run(run, plan, recipe, launch)
    finally:
        if launch.nodes is None or launch.nodes.rank == 0:
            conclude(run, code)
    return code


def conclude(run: rundir.RunDir, code: int) -> None:
    """Say in status.json how the attempt ended, by its exit code; else whoever watches that file sees its last phase for ever."""
    how = "done" if code == 0 else "stopped" if code > 128 else "failed"
    status = rundir.read_json(run.status)
    try:
        if isinstance(status, dict):
            rundir.write_atomic(run.status, json.dumps({**status, "phase": how, "eta_seconds": None}))
        else:  # it ended before it had one
            write_status(run.path, phase=how, update=0, updates=0)
    except OSError:
        return  # a full disk: what ended the run is said elsewhere


def _run(run: rundir.RunDir, plan: PlacementPlan, recipe: Recipe, launch: Launch) -> int:
    arguments = worker_arguments(run.path, launch.job, launch.resume, launch.variations, launch.dataset)
    render.note(f"{plan.name}: {plan.reason}")
    render.note(f"batch: {plan.equation}" if launch.job == "train" else f"job: {launch.job}")
    render.note(f"run folder: {run.path}")
    if launch.in_process:
        code = _in_process(run, plan, arguments)
        if code == INTERRUPTED:
            _stopped("SIGINT", run, launch)
        return code or _print_result(run)
    endpoint = launch.nodes.endpoint if launch.nodes else None
    torchrun = command(plan, run.path, arguments, os.environ, os.getpid(), endpoint)
    try:
        with render.progress() as on_progress:
            stopped = supervise(torchrun, run, len(plan.ranks), recipe.stall_seconds, on_progress)
    except VlarlError:
        _offer_resume(run, launch)
        raise
    if stopped is not None:
        _stopped(stopped.name, run, launch)
        return 128 + stopped.value
    if launch.nodes is not None and launch.nodes.rank > 0:
        return 0
    code = _print_result(run)
    if launch.job == "train" and (memory := memory_against_prediction(run.path)):
        render.note(memory)
    if launch.job == "train" and recipe.placement.profile:
        render.note(against_prediction(plan, read_profile(recipe.placement.profile), run.path))
    return code


def _in_process(run: rundir.RunDir, plan: PlacementPlan, arguments: tuple[str, ...]) -> int:
    """One rank in this very process, for breakpoints: no torchrun, no supervision, output on the screen."""
    if len(plan.ranks) != 1:
        raise PlanError(f"--in-process runs one rank and the plan has {len(plan.ranks)}.", "Add ranks=1 to the command.")
    threads = {name: value for name, value in rank_env(plan, run.path, os.getpid()).items() if not name.startswith("VLARL_")}
    os.environ.update(threads)
    try:
        code: int = importlib.import_module("vlarl.worker.__main__").main(list(arguments))
    except KeyboardInterrupt:  # while torch is being imported
        return INTERRUPTED
    return code


def _print_result(run: rundir.RunDir) -> int:
    result = rundir.read_json(run.result)
    if not isinstance(result, dict):
        raise WorkerError("The ranks ended without an error and without a result.", f"Log: {run.log(0)}")
    render.result(result)
    return 0


def _stopped(signal: str, run: rundir.RunDir, launch: Launch) -> None:
    render.note(f"Stopped by {signal}; nothing is left running.")
    _offer_resume(run, launch)


def _offer_resume(run: rundir.RunDir, launch: Launch) -> None:
    if launch.job == "train" and latest(run.path) is not None:
        render.note(f"Go on from the last checkpoint: vlarl train --resume {run.path}")
