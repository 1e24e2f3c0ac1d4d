"""Owns how `vlarl record` turns a recipe into a recording: who plays, on which simulator, where to."""

from __future__ import annotations

import glob
import shutil
import time
from dataclasses import replace
from pathlib import Path

import psutil

from vlarl.errors import MachineError
from vlarl.launch import rundir
from vlarl.recipe.load import LoadedRecipe
from vlarl.recipe.schema import Eval, Placement, Ppo, Update
from vlarl_cli import render, run
from vlarl_cli.evaluate import find_policy


def record(loaded: LoadedRecipe, out: Path, policy: str | None, in_process: bool) -> int:
    """Record in one rank; its simulators' processes use the other cores. policy: who plays instead of the expert. Returns the exit code."""
    if out.exists():
        raise MachineError(f"{out} exists already.", "Name another folder with --out.")
    out = out.absolute()
    rundir.check_writable(out, "Name a folder of your own with --out.")
    recipe = loaded.recipe
    player, chosen = recipe.record.player, recipe.policy
    if policy is not None:
        player, chosen = "policy", replace(chosen, checkpoint=find_policy(policy)[0], adapter=None, lora=None, freeze=())
    parallel = min(recipe.env.parallel, recipe.record.episodes)
    recipe = replace(
        recipe,
        ranks=1,
        warmstart=(),
        policy=chosen,
        env=replace(recipe.env, parallel=parallel),
        record=replace(recipe.record, player=player),
        algorithm=Ppo(critic_warmup=0),
        update=Update(updates=1),
        placement=Placement(),
        eval=Eval(episodes=recipe.record.episodes, parallel=parallel),
    )
    folder = rundir.default_path(f"record-{recipe.name}", time.time())
    before = _drafts(out)
    try:
        return run.start(replace(loaded, recipe=recipe), run.Launch("record", folder, in_process=in_process, dataset=out))
    finally:
        _clear(_drafts(out) - before)


def _drafts(out: Path) -> set[Path]:
    """What `DatasetWriter` writes before it puts a dataset in its place."""
    return set(out.parent.glob(f".{glob.escape(out.name)}.*.draft"))


def _clear(drafts: set[Path]) -> None:
    """Remove what a recording leaves that was stopped or killed; its files have no end yet, so that no reader could open them. One that is
    being written under the same name by somebody else stays."""
    for draft in drafts:
        writer = draft.suffixes[-2].removeprefix(".")
        if writer.isdigit() and not psutil.pid_exists(int(writer)):
            shutil.rmtree(draft, ignore_errors=True)
            render.note("The recording did not end, and a dataset is whole or not at all: what was recorded has been removed.")
