"""What there is to run on is found without torch."""
from __future__ import annotations

from pathlib import Path

import pytest

from vlarl import serial
from vlarl.errors import MachineError
from vlarl.plan import cluster
from vlarl.plan.cluster import Cluster, described, discover, from_file, part_for

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
    with pytest.raises(MachineError, match="no NVIDIA driver.*--cluster 8x80GB"):
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
    assert from_file(path) == Cluster(cores=8, reason="as described by cluster.json")
    path.write_text('{"devices_per_node": 4, "device_bytes": "24GB", "cores": 16}')
    found = described(str(path))
    assert (found.device, found.devices_per_node, found.device_bytes, found.cores, found.nodes) == ("cuda", 4, 24 * 2**30, 16, 1)


def test_a_cluster_in_a_word() -> None:
    found = described("8x80GB")
    assert (found.nodes, found.devices_per_node, found.device, found.device_bytes, found.cores) == (1, 8, "cuda", 80 * 2**30, 64)
    assert (described("2x8x141gb").nodes, described("2x8x141gb").device_bytes) == (2, 141 * 2**30)
    cpu = part_for(found, "cpu")
    assert (cpu.device, cpu.devices_per_node, cpu.device_bytes, cpu.cores) == ("cpu", 0, None, 64)
    assert part_for(found, "auto") == part_for(found, "cuda") == found


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file, and not of the form GPUS x MEMORY"),
        ("hello: 1", "is not JSON"),
        ("[8]", "expected fields in braces"),
        ('{"gpus": 8}', "gpus: unknown field. Known: nodes"),
        ('{"nodes": 0, "device_byte": 1}', "nodes = 0: expected a whole number of at least 1.\n  device_byte: unknown field. Did you mean"),
        ('{"device_bytes": "lots"}', 'expected a whole number of at least 1 or a size such as "80GB"'),
        ('{"device": "cuda"}', "device = cuda, and devices_per_node = 0: cuda needs GPUs"),
        ('{"nodes": 1000, "devices_per_node": 8}', "more than the 512"),
    ],
)
def test_descriptions_that_are_none(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "cluster.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MachineError) as caught:
        described(str(path))
    assert says in caught.value.message and "8x80GB" in caught.value.hint


def test_no_gpus_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="0 GPUs"):
        described("0x80GB")
    with pytest.raises(MachineError, match="is a folder"):
        described(str(tmp_path))
    with pytest.raises(MachineError, match="has no GPU"):
        part_for(Cluster(), "cuda")
