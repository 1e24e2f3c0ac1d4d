"""Owns: a checkpoint restores exactly, on other rank counts too; an interrupted, full-disk or damaged one never costs an older one."""
from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import ToyPolicy, run_ranks, toy_batch, toy_loss_sum
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from helpers.disk import mounted
from vlarl.distributed import checkpoint, fsdp
from vlarl.distributed.manifest import (
    FORMAT,
    best,
    check_contents,
    checkpoint_folder,
    checkpoints,
    describe_files,
    latest,
    mark_best,
    prune,
    read_manifest,
    sha256,
    verify,
)
from vlarl.distributed.mesh import World
from vlarl.errors import CheckpointError, MachineError, VlarlError
from vlarl.learner.optim import build_optimizer

F64 = torch.float64


def _build(world: World, seed: int = 0) -> tuple[ToyPolicy, torch.optim.AdamW]:
    module = ToyPolicy(F64, seed)
    fsdp.shard(module, world.learner, F64)
    return module, build_optimizer(module, 1e-2, 1e-1, 1.0, (0.9, 0.95), 1e-5, 0.1)


def _step(world: World, module: ToyPolicy, optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    (toy_loss_sum(module, toy_batch(F64).chunk(world.world_size)[world.rank]) / 8).backward()
    optimizer.step()


def _write_policy(path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, path / "weights.pt")


def _save(world: World, run: Path, update: int, module: ToyPolicy, optimizer: torch.optim.AdamW) -> None:
    extra = {"rank": world.rank, "cursor": torch.arange(3) + world.rank, "uids": [1, 2]}
    checkpoint.save(world, checkpoint_folder(run, update), module, optimizer, extra, _write_policy, {"update": update})


def _train_and_save(world: World, run: Path) -> dict[str, Tensor]:
    """Two steps, a checkpoint, two more steps: the weights at the end."""
    module, optimizer = _build(world)
    for step in range(4):
        if step == 2:
            _save(world, run, 2, module, optimizer)
        _step(world, module, optimizer)
    return fsdp.full_state_dict(module)


def _resume(world: World, run: Path) -> tuple[dict[str, Tensor], tuple[dict[str, Any], ...], dict[str, Any]]:
    module, optimizer = _build(world, seed=99)
    extras, manifest = checkpoint.load(world, checkpoint_folder(run, 2), module, optimizer)
    for _ in range(2):
        _step(world, module, optimizer)
    return fsdp.full_state_dict(module), extras, manifest


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_resume_equals_going_on(tmp_path: Path, saved_on: int, loaded_on: int) -> None:
    expected = run_ranks(saved_on, _train_and_save, tmp_path)[0]
    state, extras, manifest = run_ranks(loaded_on, _resume, tmp_path)[-1 if loaded_on == 1 else 0]
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0 if saved_on == loaded_on else 1e-12)
    assert [e["rank"] for e in extras] == list(range(saved_on)) and manifest["ranks"] == saved_on
    assert extras[-1]["cursor"].tolist() == [saved_on - 1, saved_on, saved_on + 1] and extras[0]["uids"] == [1, 2]
    assert manifest["update"] == 2 and manifest["complete"] is True
    saved = torch.load(checkpoint_folder(tmp_path, 2) / "policy" / "weights.pt")
    assert saved.keys() == expected.keys()


def _die_while_writing(world: World, run: Path) -> None:
    module, optimizer = _build(world)
    _save(world, run, 1, module, optimizer)

    def die(path: Path, state: dict[str, Tensor]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save(world, checkpoint_folder(run, 2), module, optimizer, {}, die, {"update": 2})


def test_death_in_the_middle_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(EOFError):  # the rank is gone without a word
        run_ranks(1, _die_while_writing, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["update-000001", "update-000002.tmp"]
    assert latest(tmp_path) == checkpoint_folder(tmp_path, 1)
    verify(checkpoint_folder(tmp_path, 1))
    assert prune(tmp_path, keep=1) == []
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["update-000001"]


def _outcome(world: World, run: Path, update: int, module: ToyPolicy, optimizer: torch.optim.AdamW) -> tuple[str, str, str]:
    try:
        _save(world, run, update, module, optimizer)
    except VlarlError as error:
        return type(error).__name__, error.message, error.hint
    return "", "", ""


def _fill_the_disk(world: World, run: Path) -> list[tuple[str, str, str]]:
    """The second rank's own file meets a full disk: every rank hears of it."""
    module, optimizer = _build(world)
    first = _outcome(world, run, 1, module, optimizer)
    real = torch.save

    def full(value: object, path: Path) -> None:
        if world.rank == world.world_size - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, path)

    torch.save = full
    second = _outcome(world, run, 2, module, optimizer)
    torch.save = real
    return [first, second, _outcome(world, run, 3, module, optimizer)]


def test_a_disk_that_fills_while_writing_is_reported_by_every_rank(tmp_path: Path) -> None:
    results = run_ranks(2, _fill_the_disk, tmp_path)
    for first, second, third in results:
        assert first[0] == third[0] == ""
        assert second[0] == "MachineError" and "full" in second[1] and "last checkpoint is intact" in second[2]
    assert [p.name for p in checkpoints(tmp_path)] == ["update-000001", "update-000003"]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def _save_twice(world: World, run: Path, estimate: int | None) -> list[tuple[str, str, str]]:
    module, optimizer = _build(world)
    if estimate is not None:
        checkpoint._bytes_needed = lambda module, optimizer, names: estimate
    return [_outcome(world, run, update, module, optimizer) for update in (1, 2)]


def test_too_little_space_is_refused_before_writing(tmp_path: Path) -> None:
    first, _ = run_ranks(1, _save_twice, tmp_path, 1 << 60)[0]
    assert first[0] == "MachineError" and f"{1 << 30}.00 GiB" in first[1] and "free" in first[1]
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "200k") as disk:
        yield disk


def test_a_really_full_disk_leaves_the_first_checkpoint_and_nothing_else(small_disk: Path) -> None:
    (small_disk / "checkpoints").mkdir()
    first, second = run_ranks(1, _save_twice, small_disk, 0)[0]
    assert first[0] == "" and second[0] == "MachineError" and "full" in second[1]
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["update-000001"]
    verify(checkpoint_folder(small_disk, 1))


def _load_errors(world: World, run: Path, folder: Path) -> str:
    module, optimizer = _build(world)
    if not run.exists():
        _save(world, run, 2, module, optimizer)
        _save(world, run, 2, module, optimizer)  # again, in place
    try:
        checkpoint.load(world, folder, module, optimizer)
    except CheckpointError as error:
        return error.message
    return ""


def test_missing_truncated_changed_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = checkpoint_folder(run, 2)
    assert run_ranks(1, _load_errors, run, folder) == [""]

    def damage(name: str) -> Path:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        return copy

    truncated = next((damage("truncated") / "state").glob("*.distcp"))
    truncated.write_bytes(truncated.read_bytes()[:-10])
    weights = damage("flipped") / "policy" / "weights.pt"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (damage("unfinished") / "manifest.json").unlink()
    (damage("garbled") / "manifest.json").write_text("{")
    (damage("lost") / "ranks" / "rank0.pt").unlink()
    expected = {
        "truncated": "bytes, expected",
        "flipped": "other contents",
        "unfinished": "no manifest.json",
        "garbled": "cannot be read",
        "lost": "ranks/rank0.pt is missing",
        "never": "no checkpoint folder",
    }
    for name, text in expected.items():
        with pytest.raises(CheckpointError, match=text):
            verify(tmp_path / name)
    messages = run_ranks(2, _load_errors, run, tmp_path / "truncated")
    assert messages[0] == messages[1] and "bytes, expected" in messages[0]


def _freeze_and_resume(world: World, run: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train with frozen towers, save, load into another policy with the same frozen weights: both, gathered."""
    weights = []
    for seed in (0, 99):
        module = ToyPolicy(F64, seed)
        module.vision_backbone.load_state_dict(ToyPolicy(F64).vision_backbone.state_dict())
        module.vision_backbone.requires_grad_(False)
        fsdp.shard(module, world.learner, F64)
        optimizer = build_optimizer(module, 1e-2, 1e-1, 1.0, (0.9, 0.95), 1e-5, 0.1)
        if seed == 0:
            _step(world, module, optimizer)
            _save(world, run, 2, module, optimizer)
        else:
            checkpoint.load(world, checkpoint_folder(run, 2), module, optimizer)
        weights.append(fsdp.full_state_dict(module))
    return weights[0], weights[1]


def test_frozen_weights_are_not_stored_again(tmp_path: Path) -> None:
    saved, loaded = run_ranks(1, _freeze_and_resume, tmp_path)[0]
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    folder = checkpoint_folder(tmp_path, 2)
    stored = {key for key in FileSystemReader(folder / "state").read_metadata().state_dict_metadata if "vision_backbone" in key}
    assert stored == set()
    policy = torch.load(folder / "policy" / "weights.pt")
    assert torch.equal(policy["vision_backbone.weight"], ToyPolicy(F64).vision_backbone.weight)


def _load_foreign(world: World, run: Path) -> str:
    module, optimizer = _build(world)
    _save(world, run, 2, module, optimizer)
    other = ToyPolicy(F64)
    other.head = torch.nn.Linear(7, 9, dtype=F64)
    fsdp.shard(other, world.learner, F64)
    try:
        checkpoint.load(world, checkpoint_folder(run, 2), other, None)
    except CheckpointError as error:
        return error.message
    return ""


def test_a_checkpoint_of_another_policy_is_refused(tmp_path: Path) -> None:
    message = run_ranks(2, _load_foreign, tmp_path)
    assert "does not fit the policy" in message[0] and "head" in message[0] and message[0] == message[1]


def _fake(run: Path, update: int) -> Path:
    folder = checkpoint_folder(run, update)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "complete": True, "update": update, "files": {}}))
    return folder


def test_a_file_with_other_contents_than_the_manifest_says(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path, 1)
    (folder / "policy").mkdir(parents=True)
    weights = folder / "policy" / "model.safetensors"
    weights.write_bytes(b"weights")
    check_contents(weights, "no checkpoint, no opinion")
    manifest = {"complete": True, "format": FORMAT, "files": describe_files(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    check_contents(weights, sha256(weights))
    with pytest.raises(CheckpointError, match=r"model.safetensors has other contents than were written"):
        check_contents(weights, "another")


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    assert latest(tmp_path) is None and best(tmp_path) is None and checkpoints(tmp_path) == []
    folders = {u: _fake(tmp_path, u) for u in (5, 10, 15, 1000000)}
    mark_best(folders[10])
    mark_best(folders[5])
    assert prune(tmp_path, keep=2) == [folders[10]]
    assert checkpoints(tmp_path) == [folders[5], folders[15], folders[1000000]]
    assert latest(tmp_path) == folders[1000000] and best(tmp_path) == folders[5].resolve()
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)  # the link is relative
    assert read_manifest(moved / "checkpoints" / "best")["update"] == 5
    moved.rename(tmp_path)


def test_errors_share_the_users_exit_code() -> None:
    assert CheckpointError("x").exit_code == MachineError("x").exit_code == 2
