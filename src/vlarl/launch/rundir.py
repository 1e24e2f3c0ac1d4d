"""Owns the run folder: where each file lies, atomic writes, and a folder that appears complete or not at all. Stdlib only."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlarl import serial
from vlarl.errors import MachineError, VlarlError
from vlarl.plan.placement import PlacementPlan
from vlarl.recipe.schema import Recipe

LOG_BYTES = 64 << 20  # logs, metrics, videos and pictures of a usual run
FOLDERS = ("logs", "checkpoints", "heartbeat", "traces", "videos", "tensorboard")


@dataclass(frozen=True)
class RunDir:
    """recipe.json, plan.json: all that a rank reads. status.json, heartbeat/rank{r}.json: how it is doing. logs/rank{r}.log,
    logs/rank{r}.error.json, logs/torchrun.log. result.json: what the command prints at its end."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def torchrun_log(self) -> Path:
        return self.path / "logs" / "torchrun.log"

    def log(self, rank: int) -> Path:
        return self.path / "logs" / f"rank{rank}.log"

    def error(self, rank: int) -> Path:
        return self.path / "logs" / f"rank{rank}.error.json"

    def heartbeat(self, rank: int) -> Path:
        return self.path / "heartbeat" / f"rank{rank}.json"


def default_path(name: str, now: float) -> Path:
    """`runs/<name>-<time>`, with a number behind it where that exists."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"
    path, count = Path("runs") / stem, 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{stem}-{count}"
    return path


def create(path: Path, recipe: Recipe, plan: PlacementPlan, needed_bytes: int) -> RunDir:
    """A new run folder holding recipe and plan. MachineError where it exists already, cannot be written, or the disk is too full.

    It is prepared beside its final place and renamed, so nothing half-written is left behind.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise MachineError(f"{path} exists already and is not an empty folder.", "Name another folder with --out, or go on with --resume.")
    check_space(path, needed_bytes + LOG_BYTES)
    made = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        for folder in FOLDERS:
            (draft / folder).mkdir()
        write_atomic(draft / "recipe.json", serial.dumps(recipe))
        write_atomic(draft / "plan.json", serial.dumps(plan))
        os.replace(draft, path)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        _remove_empty(made)
        raise _unwritable(path, error) from None
    return RunDir(path)


def reopen(path: Path, recipe: Recipe, plan: PlacementPlan) -> RunDir:
    """An existing run folder made ready for another attempt: recipe and plan replaced, traces of how the last attempt ended removed."""
    run = RunDir(path.absolute())
    try:
        for folder in FOLDERS:
            (run.path / folder).mkdir(exist_ok=True)
        for stale in remains(run):
            stale.unlink(missing_ok=True)
        write_atomic(run.recipe, serial.dumps(recipe))
        write_atomic(run.plan, serial.dumps(plan))
    except OSError as error:
        raise _unwritable(run.path, error) from None
    return run


def remains(run: RunDir) -> list[Path]:
    """What an attempt leaves behind of how it ended; nothing in a folder that is ready for one."""
    fixed = [path for path in (run.status, run.result) if path.exists()]
    return [*fixed, *run.path.glob("heartbeat/*.json"), *run.path.glob("logs/*.error.json")]


def check_writable(path: Path, hint: str) -> None:
    """Raise MachineError unless something can be made at `path`, by making and removing a file in the folder that is nearest to it."""
    there = path.absolute()
    while not os.path.exists(there):  # Path.exists raises where a folder above may not be read
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there if there != path.absolute() else there.parent):
            return
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {error.strerror or error}.", hint) from None


def check_space(path: Path, needed_bytes: int) -> None:
    """Raise MachineError if the disk that holds (or will hold) `path` has less than `needed_bytes` free."""
    there = path
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        hint = "Free some space, name a folder on another disk with --out, or keep fewer checkpoints (checkpoint.keep)."
        raise MachineError(f"{path}: the run may write {needed_bytes / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB free.", hint)


def write_atomic(path: Path, text: str) -> None:
    """Write a file in full or not at all, and flush it to the disk."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """The file's contents; None where it is missing or not (yet) JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders made for nothing, innermost first; one that has got other contents meanwhile stays, and those above it."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _unwritable(path: Path, error: OSError) -> VlarlError:
    return MachineError(f"The run folder {path} cannot be written: {error.strerror or error}.", "Name a folder of your own with --out.")
