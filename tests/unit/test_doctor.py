"""`vlarl doctor`: torch is really tried, what is missing is named with its fix, and the exit code says whether all is well."""
from __future__ import annotations

import importlib.metadata as metadata
from collections import namedtuple
from pathlib import Path

import pytest

from helpers.command_line import command_line
from vlarl.plan.cluster import Cluster
from vlarl_cli import doctor, simulators

Usage = namedtuple("Usage", "total used free")


def test_this_machine_is_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(simulators, "examine_all", list)
    code, text, _ = command_line(monkeypatch, capsys, tmp_path)("doctor")
    assert code == 0, text
    assert f"torch {metadata.version('torch')}" in text
    assert "gloo" in text or "NCCL" in text


def test_packages_that_are_missing_or_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["rich>=999", "no-such-package>=1", "numpy>=1", "wandb>=1; extra == 'wandb'"]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    together, old, missing = doctor._packages()
    assert together.problem is None and f"numpy {metadata.version('numpy')}" in together.found and "rich" not in together.found
    assert (old.name, old.found, old.fix) == ("rich", metadata.version("rich"), "Run: pip install -U 'rich>=999'")
    assert (missing.name, missing.fix) == ("no-such-package", "Run: pip install 'no-such-package>=1'")


def test_a_torch_that_does_not_see_the_drivers_gpus_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = doctor._torch(Cluster(device="cuda", devices_per_node=2))
    assert found.problem == "It computes on 1 device(s), and the driver lists 2 GPUs."


def test_a_torch_that_fails_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcublas.so.12 is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor._torch(Cluster())
    assert found.problem == "It does not compute here: ImportError: libcublas.so.12 is missing"
    assert found.fix is not None and found.fix.endswith("-m vlarl.distributed.check")


def test_what_the_system_grants_is_judged_by_what_the_machine_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 1 << 30))
    gpus, cpu = Cluster(device="cuda", devices_per_node=8), Cluster()
    shared, disk, _ = doctor._limits(gpus)
    assert shared.problem and "--shm-size" in str(shared.fix)
    assert disk.problem and "1 GiB free" in disk.found
    assert not any(finding.problem for finding in doctor._limits(cpu)[:2])
