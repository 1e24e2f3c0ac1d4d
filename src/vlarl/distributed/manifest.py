"""Owns a checkpoint's place and proof on disk: folder names, manifest, latest, best, prune. Stdlib only, so every process may ask.

    run_dir/checkpoints/update-000025/{policy/, state/, ranks/rank0.pt..., manifest.json}
    run_dir/checkpoints/best -> update-000025

A folder appears under its final name only once complete (it is written as `NAME.tmp` and renamed), and its manifest lists every file.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlarl.errors import CheckpointError

FORMAT = 2  # 2: only trained weights in state/, the placement in the manifest
MANIFEST = "manifest.json"
BEST = "best"
_PREFIX = "update-"
_TEMPORARY = ".tmp"
_ASIDE = ".damaged"
_ANOTHER = "Copy it again, or delete or move that folder: --resume and eval then take the newest checkpoint that is left."


class DamagedError(CheckpointError):
    """A checkpoint whose files are not those that were written; an older one of the run may be whole."""


def checkpoint_folder(run_dir: Path, update: int) -> Path:
    """Where the checkpoint taken after `update` optimiser updates belongs."""
    return run_dir / "checkpoints" / f"{_PREFIX}{update:06d}"


def temporary(folder: Path) -> Path:
    """The name under which `folder` is written before it is complete."""
    return folder.with_name(folder.name + _TEMPORARY)


def describe_files(folder: Path, beat: Callable[[], object] = lambda: None) -> dict[str, dict[str, Any]]:
    """{path relative to `folder`: {bytes, sha256}} of every file but the manifest, in name order. beat: called before each is read."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != MANIFEST):
        beat()
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises CheckpointError if there is none, or it is not a finished checkpoint's."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder {folder}.", "List the run's checkpoints/ folder for those that exist.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"{folder} is not a checkpoint: it has no {MANIFEST}."
        raise CheckpointError(message, "Give a folder such as RUN/checkpoints/best.") from None
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error.strerror or error}.", "Check its permissions.") from error
    except ValueError as error:
        raise DamagedError(f"{folder / MANIFEST} cannot be read: {error}.", _ANOTHER) from error
    if not isinstance(manifest, dict) or manifest.get("complete") is not True:
        raise DamagedError(f"{folder / MANIFEST} is not the manifest of a complete checkpoint.", _ANOTHER)
    if manifest.get("format") != FORMAT:
        message = f"{folder} has checkpoint format {manifest.get('format')}, expected {FORMAT}."
        raise CheckpointError(message, "Load it with the vlarl that wrote it.")
    return manifest


def verify(folder: Path, hashes: bool = True, beat: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Compare the files with the manifest: sizes, and contents if `hashes`. Returns it; CheckpointError names the first misfit.

    beat: called before each file."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        beat()
        path = folder / name
        if not path.is_file():
            problem = "is missing"
        elif (size := path.stat().st_size) != expected["bytes"]:
            problem = f"has {size} bytes, expected {expected['bytes']}"
        elif hashes and sha256(path) != expected["sha256"]:
            problem = "has other contents than were written"
        else:
            continue
        raise DamagedError(f"The checkpoint {folder} is damaged: {name} {problem}.", _ANOTHER)
    return manifest


def check_contents(path: Path, digest: str) -> None:
    """Raise DamagedError where a file CHECKPOINT/policy/NAME has another sha256 than its manifest says; others are anybody's."""
    folder = path.parent.parent
    if not (folder / MANIFEST).is_file():
        return
    files, name = read_manifest(folder)["files"], path.relative_to(folder).as_posix()
    if name in files and files[name]["sha256"] != digest:
        raise DamagedError(f"The checkpoint {folder} is damaged: {name} has other contents than were written.", _ANOTHER)


def check_placement(folder: Path, placement: str) -> None:
    """Raise CheckpointError unless `folder` was written under `placement` (see `plan.placement.layout`): open episodes belong to ranks."""
    written = read_manifest(folder)["placement"]
    if written != placement:
        message = f"{folder} was written by a run {written}; this one is {placement}, and open episodes belong to ranks and slots."
        hint = "Resume with the ranks, placement and env.parallel of then, or start a new run from its policy/ folder."
        raise CheckpointError(message, hint)


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's finished checkpoints, oldest first."""
    found = [p for p in (run_dir / "checkpoints").glob(f"{_PREFIX}*") if _update(p).isdigit() and (p / MANIFEST).is_file()]
    return sorted(found, key=update_of)


def latest(run_dir: Path) -> Path | None:
    """The newest finished checkpoint; None if there is none."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def newest_whole(run_dir: Path) -> tuple[Path | None, list[DamagedError]]:
    """The newest finished checkpoint whose files have their sizes (hashes take minutes at 7B, and are the ranks' to compare), and what is
    wrong with those after it, newest first."""
    damage = []
    for folder in reversed(checkpoints(run_dir)):
        try:
            verify(folder, hashes=False)
        except DamagedError as problem:
            damage.append(problem)
        else:
            return folder, damage
    return None, damage


def set_aside_after(folder: Path) -> None:
    """Rename the checkpoints newer than `folder`, so that it is the latest: else the ranks would take them, and `prune` keep them before
    those to come. Nothing is deleted: what is damaged may still hold what somebody needs."""
    run_dir = folder.parent.parent
    for newer in [p for p in checkpoints(run_dir) if update_of(p) > update_of(folder)]:
        places = (newer.with_name(f"{newer.name}{_ASIDE}{n}") for n in ("", *map(str, range(2, 1000))))
        try:
            newer.rename(next(place for place in places if not place.exists()))
        except OSError as error:
            message = f"{newer} is damaged and cannot be renamed: {error.strerror or error}."
            raise CheckpointError(message, "Move or delete that folder, then resume again.") from None
    sync(folder.parent)


def best(run_dir: Path) -> Path | None:
    """The checkpoint marked best; None if none is."""
    link = run_dir / "checkpoints" / BEST
    return link.resolve() if link.is_dir() else None


def mark_best(folder: Path) -> None:
    """Point `best` beside `folder` to it (a relative link, so the run folder can be moved), atomically."""
    link = folder.parent / (BEST + _TEMPORARY)
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name, target_is_directory=True)
    os.replace(link, folder.parent / BEST)
    sync(folder.parent)


def prune(run_dir: Path, keep: int) -> list[Path]:
    """Delete all finished checkpoints but the newest `keep` (>= 1) and the best, and unfinished leftovers. Returns the deleted ones."""
    assert keep >= 1, "the newest checkpoint is what a run resumes from"
    protected = best(run_dir)
    doomed = [p for p in checkpoints(run_dir)[:-keep] if protected is None or p.resolve() != protected]
    for folder in doomed:
        folder.rename(temporary(folder))  # never leaves a half-deleted folder under a finished one's name
    for leftover in (run_dir / "checkpoints").glob(f"{_PREFIX}*{_TEMPORARY}"):
        shutil.rmtree(leftover, ignore_errors=True)
    return doomed


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path, beat: Callable[[], object] = lambda: None) -> None:
    """Flush every file and folder below `folder`, and itself. beat: called before each."""
    for path in folder.rglob("*"):
        beat()
        sync(path)
    sync(folder)


def update_of(folder: Path) -> int:
    """After how many updates a checkpoint was taken."""
    return int(_update(folder))


def _update(folder: Path) -> str:
    return folder.name.removeprefix(_PREFIX)


def sha256(path: Path) -> str:
    """Of a file's contents, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
