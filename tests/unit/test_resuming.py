"""`--resume`: what is looked at before anything is touched, and what status.json says once a run has ended."""
from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import Vlarl, command_line
from vlarl import serial
from vlarl.distributed.manifest import FORMAT, latest
from vlarl.errors import CheckpointError, WorkerError
from vlarl.launch.rundir import RunDir
from vlarl.plan.placement import PlacementPlan, layout
from vlarl_cli import run


@pytest.fixture
def vlarl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Vlarl:
    return command_line(monkeypatch, capsys, tmp_path)


@pytest.fixture
def started(vlarl: Vlarl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path | None]:
    """A run folder `run` with checkpoints 1 and 2, of 4 updates. Its ranks are never started; the checkpoint they would find is noted."""
    found: list[Path | None] = []

    def fake(command: Any, folder: RunDir, ranks: int, stall_seconds: float, on_progress: Callable[[dict[str, Any]], None]) -> None:
        found.append(latest(folder.path))
        folder.status.write_text(json.dumps({"phase": "update", "update": 4, "eta_seconds": 1.0}))
        folder.result.write_text("{}")

    monkeypatch.setattr(run, "supervise", fake)
    assert vlarl("train", "debug", "device=cpu", "ranks=1", "update.updates=4", "--out", "run")[0] == 0
    for update in (1, 2):
        checkpoint(tmp_path / "run", update)
    found.clear()
    return found


def checkpoint(run_dir: Path, update: int) -> None:
    folder = run_dir / "checkpoints" / f"update-{update:06d}"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "config.json").write_text("{}")
    facts = {
        "format": FORMAT,
        "complete": True,
        "placement": layout(serial.load(PlacementPlan, run_dir / "plan.json")),
        "files": {"policy/config.json": {"bytes": 2, "sha256": ""}},
    }
    (folder / "manifest.json").write_text(json.dumps(facts))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_dry_run_prints_the_plan_and_touches_nothing(vlarl: Vlarl, started: list[Path | None], tmp_path: Path) -> None:
    before = contents(tmp_path)
    code, text, _ = vlarl("train", "--resume", "run", "update.updates=9", "--dry-run")
    assert code == 0 and "samples = " in text and "run would go on from update 2 of 9." in text
    assert started == [] and contents(tmp_path) == before


def test_a_run_without_updates_left_is_refused(vlarl: Vlarl, started: list[Path | None], tmp_path: Path) -> None:
    before = contents(tmp_path)
    code, _, text = vlarl("train", "--resume", "run", "update.updates=2")
    assert code == 2 and "the run is at update 2; update.updates = 2 leaves nothing to do" in text and "update.updates=4" in text
    assert started == [] and contents(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        *("env.tasks=[push]", "env.simulator=libero", "policy.checkpoint=bundled:tiny-sft", "policy.freeze=[vision]", "seed=7"),
        *("policy.lora={rank: 2}", "algorithm.kind=grpo"),
    ],
)
def test_overrides_that_make_another_run_are_refused(vlarl: Vlarl, started: list[Path | None], tmp_path: Path, change: str) -> None:
    before = contents(tmp_path)
    code, _, text = vlarl("train", "--resume", "run", change)
    assert code == 2 and f"{change.split('=')[0]}: " in text, text
    assert "stays what it is" in text and "update-000002/policy" in text
    assert started == [] and contents(tmp_path) == before


def test_what_changes_only_the_way_is_allowed(vlarl: Vlarl, started: list[Path | None], tmp_path: Path) -> None:
    assert vlarl("train", "--resume", "run", "update.updates=6", "update.learning_rate=1.0e-5", "seed=1")[0] == 0
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["update"]["updates"] == 6
    assert started == [tmp_path / "run" / "checkpoints" / "update-000002"]


def test_a_damaged_newest_checkpoint_is_set_aside(vlarl: Vlarl, started: list[Path | None], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    (folder / "update-000002" / "policy" / "config.json").write_text("")
    before = contents(tmp_path)
    assert vlarl("train", "--resume", "run", "--dry-run")[0] == 0 and contents(tmp_path) == before
    code, text, _ = vlarl("train", "--resume", "run")
    assert code == 0 and "has 0 bytes, expected 2. Going on from update-000001 instead." in text
    assert started == [folder / "update-000001"]
    assert sorted(p.name for p in folder.iterdir()) == ["update-000001", "update-000002.damaged"]
    (folder / "update-000001" / "manifest.json").write_text("{")
    code, _, text = vlarl("train", "--resume", "run")
    assert code == 2 and "holds no whole checkpoint" in text and len(started) == 1


def test_a_checkpoint_of_another_format_is_not_taken_for_damage(vlarl: Vlarl, started: list[Path | None], tmp_path: Path) -> None:
    manifest = tmp_path / "run" / "checkpoints" / "update-000002" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": FORMAT + 1}))
    code, _, text = vlarl("train", "--resume", "run")
    assert code == 2 and "with the vlarl that wrote it" in text and started == []


def test_a_run_folder_is_not_a_policy(vlarl: Vlarl, started: list[Path | None], tmp_path: Path) -> None:
    for name, found in (("run", "run/checkpoints/update-000002/policy"), ("run/checkpoints/update-000001", "update-000001/policy")):
        code, _, text = vlarl("train", "debug", f"policy.checkpoint={name}", "--out", "new")
        assert code == 2 and found in text and "not a policy" in text
    (tmp_path / "run" / "checkpoints" / "best").symlink_to("update-000001")
    with pytest.raises(CheckpointError) as refused:
        run.load("debug", ["policy.checkpoint=run"])
    assert refused.value.hint.endswith("run/checkpoints/best/policy")


@pytest.mark.parametrize(
    ("outcome", "says", "code"), [(None, "done", 0), (signal.SIGINT, "stopped", 130), (WorkerError("died"), "failed", 1)]
)
def test_status_says_how_a_run_ended(
    vlarl: Vlarl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome: Any, says: str, code: int
) -> None:
    def fake(command: Any, folder: RunDir, *rest: Any) -> Any:
        folder.status.write_text(json.dumps({"phase": "rollout", "update": 1, "eta_seconds": 5.0}))
        folder.result.write_text("{}")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(run, "supervise", fake)
    assert vlarl("train", "debug", "device=cpu", "--out", "run")[0] == code
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"phase": says, "update": 1, "eta_seconds": None}


def test_folders_that_cannot_be_written_are_told_before_anything_starts(vlarl: Vlarl, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments in (("record", "debug", "--out"), ("bench-placement", "debug", "device=cpu", "--write-profile")):
        for path in ("/dev/null/x", "file/x"):
            code, _, text = vlarl(*arguments, path)
            assert code == 2 and f"{path} cannot be written: Not a directory." in text, text
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
