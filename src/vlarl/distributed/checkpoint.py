"""Owns training checkpoints: atomic writing and exact loading of weights, optimiser moments and each rank's own state.

A checkpoint is complete or absent: it is written beside its final name, flushed, described by a manifest, then renamed.
Every rank raises the same error, so that none is left waiting.
"""
from __future__ import annotations

import errno
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from vlarl.distributed.fsdp import full_state_dict
from vlarl.distributed.manifest import FORMAT, MANIFEST, describe_files, read_manifest, sync, sync_tree, temporary, verify
from vlarl.distributed.mesh import World
from vlarl.distributed.reduce import all_gather_objects, broadcast_object, meet
from vlarl.errors import CheckpointError, MachineError, VlarlError, WorkerError

WritePolicy = Callable[[Path, dict[str, Tensor]], None]
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SLACK_BYTES = 8 << 20  # manifests, tokenizer, ranks' own state
_PHASE = "checkpoint"


class Pulse(Protocol):
    """How a rank shows that it is alive, with the phase it is in: metrics.status.Heartbeat."""

    def beat(self, phase: str) -> None: ...

    def waiting(self, phase: str) -> AbstractContextManager[None]: ...


class Unwatched:
    """The pulse of a rank that nobody watches."""

    def beat(self, phase: str) -> None:
        pass

    def waiting(self, phase: str) -> AbstractContextManager[None]:
        return nullcontext()


UNWATCHED = Unwatched()


def save(
    world: World,
    folder: Path,
    module: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    extra: dict[str, Any],
    write_policy: WritePolicy,
    manifest: dict[str, Any],
    names: Container[str] | None = None,
    pulse: Pulse = UNWATCHED,
) -> None:
    """Write a checkpoint to `folder`, replacing an older one there. Collective; `module` is sharded and not being acted with.

    Weights that are not trained are not in it (but may be in the policy that `write_policy` writes): they are read where the policy is.
    module, optimizer: None on the ranks that do not learn.
    extra: this rank's own state: plain Python values and tensors (episode scheduler, open episodes, counters).
    write_policy(path, state): called on the main rank with an empty folder and whole weights (CPU), writes the policy for `eval`.
    names: of the weights that it wants; None: all.
    manifest: JSON values to keep with it (update, versions, scores), of the main rank.
    pulse: beats with every file, and while the main rank works alone.
    Raises MachineError if the disk is full or the folder unwritable; then nothing of it is left, and older checkpoints are untouched.
    """
    part = temporary(folder)
    _together(world, part, pulse, lambda: _prepare(part, _bytes_needed(module, optimizer, names)) if world.is_main else None)
    weights = {} if module is None else full_state_dict(module, names)
    _together(world, part, pulse, lambda: _write(world, part, module, optimizer, extra, weights, write_policy, pulse))
    _together(world, part, pulse, lambda: _finish(world, part, folder, manifest, pulse) if world.is_main else None)


def load(
    world: World, folder: Path, module: nn.Module | None, optimizer: torch.optim.Optimizer | None, pulse: Pulse = UNWATCHED
) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """Restore trained weights and optimiser in place from `folder`, on any number of ranks. Collective.

    module: None on ranks that do not learn; elsewhere it holds the weights that are not trained already.

    Returns (extras, manifest): extras holds what each saving rank gave as `extra`, in rank order, so `extras[world.rank]` is this rank's
    own where manifest["ranks"] == world.world_size. Learning rates are not restored: they follow from the schedule.
    Raises CheckpointError if it is missing, truncated, damaged, or of another policy.
    """
    _together(world, None, pulse, lambda: verify(folder, beat=lambda: pulse.beat(_PHASE)) if world.is_main else None)
    manifest = read_manifest(folder)
    _together(world, None, pulse, lambda: _read(world, folder, module, optimizer))
    extras = []
    for rank in range(manifest["ranks"]):
        pulse.beat(_PHASE)
        extras.append(torch.load(_rank_file(folder, rank), map_location="cpu", weights_only=True))
    return tuple(extras), manifest


def _prepare(part: Path, needed: int) -> None:
    """Make an empty `part`, if the disk has room for `needed` bytes."""
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(part.parent).free
    if free < needed:
        raise MachineError(
            f"A checkpoint needs {_gigabytes(needed)}, but the disk of {part.parent} has {_gigabytes(free)} free.",
            "Free some space, lower checkpoint.keep, or choose another folder with --out; the last checkpoint is intact.",
        )
    for name in ("policy", "state", "ranks"):
        (part / name).mkdir(parents=True)


def _write(
    world: World,
    part: Path,
    module: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    extra: dict[str, Any],
    weights: dict[str, Tensor],
    write_policy: WritePolicy,
    pulse: Pulse,
) -> None:
    pulse.beat(_PHASE)
    if world.learners is not None:
        writer = dcp.FileSystemWriter(part / "state", thread_count=1, sync_files=True)
        dcp.save(_state(module, optimizer), storage_writer=writer, process_group=world.learners.control)
    pulse.beat(_PHASE)
    rank_file = _rank_file(part, world.rank)
    torch.save(extra, rank_file)
    sync(rank_file)
    pulse.beat(_PHASE)
    if world.is_main:
        write_policy(part / "policy", weights)


def _finish(world: World, part: Path, folder: Path, manifest: dict[str, Any], pulse: Pulse) -> None:
    """Describe, flush and rename: from here on the checkpoint exists."""

    def beat() -> None:
        pulse.beat(_PHASE)

    files = describe_files(part, beat)
    own = {"format": FORMAT, "complete": True, "ranks": world.world_size, "files": files, "software": _software()}
    assert not own.keys() & manifest.keys(), f"the manifest's own fields: {sorted(own)}"
    (part / MANIFEST).write_text(json.dumps({**manifest, **own}, indent=1), encoding="utf-8")
    sync_tree(part, beat)
    if folder.exists():
        old = folder.with_name(folder.name + ".old.tmp")
        folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        part.rename(folder)
    sync(folder.parent)


def _read(world: World, folder: Path, module: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> None:
    if world.learners is None:
        return
    state = _state(module, optimizer)
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder / "state"), process_group=world.learners.control)
    except (CheckpointException, RuntimeError, ValueError) as error:
        cause = next((e for e, _ in error.failures.values()), error) if isinstance(error, CheckpointException) else error
        message = f"The checkpoint {folder} does not fit the policy: {cause}."
        raise CheckpointError(message, "Resume with the recipe that wrote it.") from error


def _state(module: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Flat name -> live tensor of trained weights, buffers and moments; loading copies into these very tensors, shard by shard."""
    assert module is not None, "a learner holds the policy"
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    state = {f"weights.{name}": value for name, value in module.state_dict().items() if name not in frozen}
    if optimizer is not None:
        for name, p in module.named_parameters():
            if p.requires_grad:
                state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    return state


def _bytes_needed(module: nn.Module | None, optimizer: torch.optim.Optimizer | None, names: Container[str] | None) -> int:
    """State, plus a copy of the named weights for the policy folder; of all ranks together (numel of a sharded tensor is global)."""
    assert module is not None, "the main rank learns"
    state = sum(t.numel() * t.element_size() for t in _state(module, optimizer).values())
    weights = sum(t.numel() * t.element_size() for name, t in module.state_dict().items() if names is None or name in names)
    return state + weights + _SLACK_BYTES


def _together(world: World, part: Path | None, pulse: Pulse, action: Callable[[], object]) -> None:
    """Run `action` on every rank; if any fails, remove `part` and raise the first rank's error on all of them."""
    failure: BaseException | None = None
    try:
        action()
    except (Exception, CheckpointException) as error:
        failure = error
    # Judged before cleaning up, while the disk is as full as the writer found it.
    verdict_here = None if failure is None else _as_vlarl_error(failure, part)
    with pulse.waiting(_PHASE):
        meet(world, "a checkpoint")
    verdicts = all_gather_objects(world, verdict_here)
    if all(v is None for v in verdicts):
        return
    if part is not None and world.is_main:
        shutil.rmtree(part, ignore_errors=True)
    broadcast_object(world, None)  # nobody goes on before the folder is gone
    verdict = next((v for v in verdicts if isinstance(v, tuple)), None)
    if verdict is not None:
        kind, message, hint = verdict
        raise kind(message, hint) from failure
    if failure is not None:
        raise failure
    raise WorkerError("Another rank failed at the checkpoint.", "Its own log says why.")


def _as_vlarl_error(error: BaseException, part: Path | None) -> tuple[type[VlarlError], str, str] | str:
    """(class, message, hint) where the user can mend it; otherwise its text, a fault of ours."""
    if isinstance(error, VlarlError):
        return type(error), error.message, error.hint
    causes = [e for e, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    if part is None or not any(isinstance(e, (OSError, RuntimeError)) for e in causes):
        return repr(error)
    if any(isinstance(e, OSError) and e.errno in _DISK_FULL for e in causes) or _disk_is_full(part):
        message = f"The disk of {part.parent} became full while a checkpoint was written."
        return MachineError, message, "Free some space, then resume; the last checkpoint is intact."
    for e in causes:
        if isinstance(e, OSError):
            message = f"A checkpoint cannot be written to {part.parent}: {e.strerror or e}."
            return MachineError, message, "Check the folder's permissions; the last checkpoint is intact."
    return repr(error)


def _disk_is_full(part: Path) -> bool:
    """torch's archive writer reports a full disk as a RuntimeError without its cause."""
    try:
        return shutil.disk_usage(part.parent).free < 1 << 20
    except OSError:
        return False


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / "ranks" / f"rank{rank}.pt"


def _software() -> dict[str, str]:
    return {"vlarl": importlib.metadata.version("vlarl"), "torch": torch.__version__, "python": platform.python_version()}


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
