"""Owns what `--resume` looks at before anything is touched: which checkpoint, are updates left, is it still the same run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlarl.distributed.manifest import DamagedError, newest_whole, update_of
from vlarl.errors import CheckpointError
from vlarl.recipe.document import overrides
from vlarl.recipe.rules import show
from vlarl.recipe.schema import Recipe

BUILT_IN = ("bundled:", "scratch:")


def choose_checkpoint(run_path: Path) -> tuple[Path, list[DamagedError]]:
    """The checkpoint to go on from, and what is wrong with newer ones."""
    if not (run_path / "recipe.json").is_file():
        message = f"{run_path} is not a run folder: it has no recipe.json."
        raise CheckpointError(message, "Name the folder that --out named, or one in runs/.")
    newest, damage = newest_whole(run_path)
    if newest is None and damage:
        hint = "Copy the run again, or start the recipe anew, in another folder."
        raise CheckpointError(f"{run_path} holds no whole checkpoint to go on from. {damage[0].message}", hint)
    if newest is None:
        raise CheckpointError(f"{run_path} holds no finished checkpoint to go on from.", "Start the recipe anew, in another folder.")
    return newest, damage


def skipped(damage: list[DamagedError], newest: Path) -> str:
    """One line on the checkpoints that are not taken."""
    return f"{' '.join(problem.message for problem in damage)} Going on from {newest.name} instead."


def check_left(run_path: Path, newest: Path, recipe: Recipe) -> None:
    """Raise CheckpointError where the run has made its updates: nothing would run, and an old result be printed as a new one."""
    done, wanted = update_of(newest), recipe.update.updates
    if done >= wanted:
        message = f"{run_path}: the run is at update {done}; update.updates = {wanted} leaves nothing to do."
        raise CheckpointError(message, f"Give more: vlarl train --resume {run_path} update.updates={done * 2}")


def check_same(run_path: Path, newest: Path, before: Recipe, now: Recipe) -> None:
    """Raise CheckpointError where overrides make another run of it: its checkpoint, episodes and metrics would not belong together."""
    _refuse(run_path, newest, [f"{name}: {show(old)} -> {show(new)}" for name, old, new in _identity(before, now) if old != new])


def check_kinds(run_path: Path, newest: Path, before: Recipe, items: list[str]) -> None:
    """`check_same` for overrides under which the recipe's other settings would be mistakes, whose list would hide the reason."""
    changed = []
    for section, part in overrides(items).values.items():
        for name, old in (("env.simulator", before.env.simulator), ("algorithm.kind", before.algorithm.kind)):
            changed += [f"{name}: {old} -> {show(new)}" for key, new in _items(part) if f"{section}.{key}" == name and new != old]
    _refuse(run_path, newest, changed)


def _items(section: Any) -> list[tuple[str, Any]]:
    return list(section.items()) if isinstance(section, dict) else []


def _refuse(run_path: Path, newest: Path, changed: list[str]) -> None:
    if changed:
        message = f"{run_path}: a run that goes on stays what it is, and this would change {'; '.join(changed)}."
        hint = "Leave these overrides away, or begin a new run with what it has learnt: "
        raise CheckpointError(message, f"{hint}vlarl train RECIPE policy.checkpoint={newest / 'policy'} ... --out NEW")


def _identity(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """(field, its value before and now) of what a run is; policy.engine only changes its speed."""
    yield "seed", before.seed, now.seed
    yield "env.simulator", before.env.simulator, now.env.simulator
    yield "env.tasks", before.env.tasks, now.env.tasks
    yield "algorithm.kind", before.algorithm.kind, now.algorithm.kind
    moved = any(gone(name) for name in (before.policy.checkpoint, before.policy.adapter) if name is not None)
    left_out = {"engine", *(("checkpoint", "adapter") if moved else ())}  # what has moved may be named anew
    for name in (f.name for f in fields(before.policy) if f.name not in left_out):
        yield f"policy.{name}", getattr(before.policy, name), getattr(now.policy, name)


def gone(policy: str) -> bool:
    """Whether a policy (or adapter) folder that a recipe names is no longer there."""
    return not policy.startswith(BUILT_IN) and not Path(policy).expanduser().is_dir()
