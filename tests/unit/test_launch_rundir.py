"""A run folder appears complete or not at all."""
from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from launch_helpers import PLAN, RECIPE

from vlarl import serial
from vlarl.errors import MachineError
from vlarl.launch import rundir
from vlarl.plan.placement import PlacementPlan
from vlarl.recipe.schema import Recipe


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_it_holds_all_that_a_rank_reads(tmp_path: Path) -> None:
    run = rundir.create(tmp_path / "a" / "b", RECIPE, PLAN, 0)
    assert serial.load(Recipe, run.recipe) == RECIPE
    assert serial.load(PlacementPlan, run.plan) == PLAN
    assert {p.name for p in run.path.iterdir()} == {"recipe.json", "plan.json", *rundir.FOLDERS}
    assert [p.name for p in run.path.parent.iterdir()] == ["b"]


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    rundir.create(tmp_path / "empty", RECIPE, PLAN, 0)
    with pytest.raises(MachineError, match="not an empty folder"):
        rundir.create(tmp_path / "empty", RECIPE, PLAN, 0)


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot be written"):
        rundir.create(tmp_path / "file" / "run", RECIPE, PLAN, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_nothing_is_left_when_the_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="No space left on device"):
        rundir.create(tmp_path / "new" / "run", RECIPE, PLAN, 0)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_others_use_meanwhile_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        (tmp_path / "new" / "other").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError):
        rundir.create(tmp_path / "new" / "run", RECIPE, PLAN, 0)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["other"]


def test_too_little_space_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 100 * 2**20))
    with pytest.raises(MachineError, match="may write 164 MiB and the disk has 100 MiB free"):
        rundir.create(tmp_path / "run", RECIPE, PLAN, 100 * 2**20)
    assert list(tmp_path.iterdir()) == []


def test_another_attempt_forgets_how_the_last_one_ended(tmp_path: Path) -> None:
    run = rundir.create(tmp_path / "run", RECIPE, PLAN, 0)
    for path in (run.error(0), run.heartbeat(0), run.status, run.result):
        path.write_text("{}")
    run.log(0).write_text("kept")
    again = rundir.reopen(run.path, RECIPE, PLAN)
    assert again == run
    assert not any(p.exists() for p in (run.error(0), run.heartbeat(0), run.status, run.result))
    assert run.log(0).read_text() == "kept"


def test_default_paths_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = rundir.default_path("a", 0.0)
    first.mkdir(parents=True)
    assert rundir.default_path("a", 0.0).name == f"{first.name}-2"
