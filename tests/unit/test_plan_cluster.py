"""What there is to run on is found without torch."""
from __future__ import annotations

from pathlib import Path

import pytest

from vlarl import serial
from vlarl.errors import MachineError, VlarlError
from vlarl.plan import cluster
from vlarl.plan.cluster import Cluster, discover, from_file

GPUS = "0, GPU-aa, NVIDIA H100, 81559\n1, GPU-bb, NVIDIA H100, 40000\n"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nvidia-smi that prints GPUS, and a torch that has CUDA."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{GPUS}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cluster, "_torch_has_cuda", lambda: True)
    return tool


def test_gpus_are_counted_and_the_smallest_decides(nvidia_smi: Path) -> None:
    found = discover("auto")
    assert (found.device, found.devices_per_node, found.device_name, found.device_bytes) == ("cuda", 2, "NVIDIA H100", 40000 * 2**20)


def test_visible_devices_are_respected(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    assert discover("auto").devices_per_node == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert discover("auto").device == "cpu"


def test_asking_for_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="no NVIDIA driver"):
        discover("cuda")
    assert discover("auto").device == "cpu"


def test_a_broken_driver_is_quoted(nvidia_smi: Path) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'driver mismatch'\nexit 9\n")
    with pytest.raises(MachineError, match="nvidia-smi failed: driver mismatch"):
        discover("cuda")


def test_a_torch_without_cuda_is_said_so(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_torch_has_cuda", lambda: False)
    assert discover("auto").reason == "this build of torch has no CUDA"


def test_limits_of_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert cluster.usable_cores() == 64
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert cluster.usable_cores() == 2
    assert cluster.usable_memory() == 1_000_000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cluster.usable_cores() == 64


def test_a_cluster_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    wanted = Cluster(nodes=2, devices_per_node=8, device="cuda", device_name="H100", device_bytes=80 * 2**30, cores=64, host_bytes=2**40)
    path.write_text(serial.dumps(wanted))
    assert from_file(path) == wanted
    path.write_text("{}")
    with pytest.raises(VlarlError, match="nodes is missing"):
        from_file(path)
