"""Owns Cluster: what there is to run on. Found without torch (nvidia-smi, scheduler affinity, control groups), or read from a file."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlarl import serial
from vlarl.errors import MachineError

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """devices_per_node: GPUs, or 0 on a CPU machine. device_bytes: memory of one GPU (None: no GPU, or unknown). cores, host_bytes: per
    node, as far as this process may use them. reason: why this device kind."""

    nodes: int = 1
    devices_per_node: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    device_name: str = "CPU"
    device_bytes: int | None = None
    cores: int = 1
    host_bytes: int = 0
    reason: str = ""


def discover(device: str) -> Cluster:
    """This machine. device: auto, cpu or cuda, as the recipe asks. Raises MachineError where cuda is asked for and cannot be had."""
    cores, host_bytes = usable_cores(), usable_memory()
    if device == "cpu":
        return Cluster(cores=cores, host_bytes=host_bytes, reason="the recipe asks for the CPU")
    gpus, reason = _nvidia_gpus()
    if gpus and not _torch_has_cuda():
        gpus, reason = [], "this build of torch has no CUDA"
    if not gpus:
        if device == "cuda":
            raise MachineError(
                f"device = cuda, but {reason}.", "Set device to cpu or auto, or install the NVIDIA driver and the CUDA build of torch."
            )
        return Cluster(cores=cores, host_bytes=host_bytes, reason=reason)
    name, smallest = gpus[0][0], min(size for _, size in gpus)
    found = f"{len(gpus)} GPU" + ("s" if len(gpus) > 1 else "")
    return Cluster(
        devices_per_node=len(gpus),
        device="cuda",
        device_name=name,
        device_bytes=smallest,
        cores=cores,
        host_bytes=host_bytes,
        reason=f"{found} found",
    )


def from_file(path: Path) -> Cluster:
    """A Cluster written as JSON (every field), for planning a run on another machine."""
    return serial.load(Cluster, path)


def usable_cores() -> int:
    """Cores this process may use: scheduler affinity, cut by the control group's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(CGROUP / "cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def usable_memory() -> int:
    """Host memory in bytes, cut by the control group's limit."""
    import psutil

    limit = _read(CGROUP / "memory.max")
    total = int(psutil.virtual_memory().total)
    return min(total, int(limit)) if limit.isdigit() else total


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _nvidia_gpus() -> tuple[list[tuple[str, int]], str]:
    """(name, bytes) of every visible GPU, and the reason where there is none."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return [], "no NVIDIA driver was found"
    if result.returncode != 0:
        said = (result.stdout or result.stderr).strip().splitlines()
        return [], f"nvidia-smi failed: {said[0] if said else result.returncode}"
    rows = [[part.strip() for part in line.split(",")] for line in result.stdout.splitlines() if line.count(",") == 3]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wanted = [v.strip() for v in visible.split(",") if v.strip()]
        rows = [row for w in wanted for row in rows if w == row[0] or (w.startswith("GPU-") and row[1].startswith(w))]
    gpus = [(name, int(mib) * 2**20 if mib.isdigit() else 0) for _, _, name, mib in rows]
    return gpus, "no GPU is visible (CUDA_VISIBLE_DEVICES)" if visible is not None else "nvidia-smi lists no GPU"


def _torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, told from its version file: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return re.search(r"^cuda\b[^=]*=\s*'[\d.]+'", _read(Path(spec.origin).parent / "version.py"), re.MULTILINE) is not None
