"""Owns Cluster: what there is to run on. Found without torch (nvidia-smi, scheduler affinity, control groups), or described by the user:
`8x80GB`, or a JSON file."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from vlarl.errors import MachineError

GPUS_PER_NODE = 8
CORES_PER_GPU = 8  # assumed where a description does not say
MAX_DEVICES = 512  # of a described cluster: a plan is made rank by rank
UNITS = {"MB": 2**20, "GB": 2**30, "TB": 2**40}  # as cards are sold: an "80 GB" card has 80 GiB
DESCRIBE = (
    "Write 8x80GB (GPUs x memory of each) or 2x8x80GB (nodes x GPUs x memory), or name a JSON file with some of these fields: "
    "nodes, devices_per_node, device_bytes, device_name, cores, host_bytes."
)
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
                f"device = cuda, but {reason}.",
                "To plan for a machine that has GPUs: vlarl plan RECIPE --cluster 8x80GB (GPUs x memory of each). "
                "To run here: set device to cpu or auto, or install the NVIDIA driver and the CUDA build of torch.",
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


def described(text: str) -> Cluster:
    """A machine that need not be here: `GPUSxMEMORY`, `NODESxGPUSxMEMORY`, or a JSON file with some of Cluster's fields."""
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\d+)\s*x\s*(\d+(?:\.\d+)?)\s*(MB|GB|TB)", text.strip(), re.IGNORECASE)
    if found is None:
        return from_file(Path(text))
    values = {"nodes": int(found[1] or 1), "devices_per_node": int(found[2]), "device_bytes": _bytes(found[3], found[4])}
    if values["devices_per_node"] == 0:
        raise MachineError(f"--cluster {text}: there are 0 GPUs. A machine without GPUs is described by a JSON file.", DESCRIBE)
    return _cluster(values, f"--cluster {text}", text)


def from_file(path: Path) -> Cluster:
    """A Cluster from a JSON file; every field may be left out. Sizes may be text: `"80GB"`."""
    name = f"--cluster {path}"
    if path.is_dir():
        raise MachineError(f"{name}: is a folder, expected a file.", DESCRIBE)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MachineError(f"{name}: no such file, and not of the form GPUS x MEMORY.", DESCRIBE) from None
    except OSError as error:
        raise MachineError(f"{name}: cannot be read: {error.strerror}.", DESCRIBE) from None
    except ValueError:
        raise MachineError(f"{name}: is not JSON.", DESCRIBE) from None
    if not isinstance(values, dict):
        raise MachineError(f"{name}: expected fields in braces, such as {{\"devices_per_node\": 8, \"device_bytes\": \"80GB\"}}.", DESCRIBE)
    return _cluster(values, name, path.name)


def part_for(cluster: Cluster, device: str) -> Cluster:
    """What a recipe with this `device` has of a described cluster: with cpu, its processors alone."""
    if device == "cuda" and cluster.device == "cpu":
        raise MachineError(f"device = cuda, but the machine ({cluster.reason}) has no GPU.", "Name GPUs, such as --cluster 8x80GB.")
    if device != "cpu" or cluster.device == "cpu":
        return cluster
    reason = f"{cluster.reason}; the recipe asks for the CPU"
    return replace(cluster, devices_per_node=0, device="cpu", device_name="CPU", device_bytes=None, reason=reason)


def _cluster(values: dict[str, Any], name: str, short: str) -> Cluster:
    """Checked, and what is not said filled in; all that is wrong at once."""
    known = [f.name for f in fields(Cluster)]
    values = {key: _size(value) if key.endswith("_bytes") else value for key, value in values.items()}
    problems = [problem for key, value in values.items() if (problem := _field_problem(key, value, known))]
    if not problems:
        gpus = ({"devices_per_node": 0} | values)["devices_per_node"]
        assumed = {
            "device": "cuda" if gpus else "cpu",
            "device_name": "GPU" if gpus else "CPU",
            "cores": max(1, gpus) * CORES_PER_GPU,
            "reason": f"as described by {short}",
        }
        cluster = Cluster(**(assumed | values))
        if (cluster.device == "cuda") != (cluster.devices_per_node > 0):
            problems.append(f"device = {cluster.device}, and devices_per_node = {cluster.devices_per_node}: cuda needs GPUs, cpu has none.")
        elif cluster.nodes * max(1, cluster.devices_per_node) > MAX_DEVICES:
            problems.append(f"{cluster.nodes} x {cluster.devices_per_node} GPUs: more than the {MAX_DEVICES} that can be planned for.")
    if problems:
        raise MachineError(f"{name}: " + (problems[0] if len(problems) == 1 else "\n  ".join(["", *problems])), DESCRIBE)
    return cluster


def _field_problem(key: str, value: Any, known: list[str]) -> str:
    """One sentence where a field of a description is unknown or wrong; "" where it is fine."""
    if key not in known:
        close = get_close_matches(key, known, n=1, cutoff=0.5)
        return f"{key}: unknown field. " + (f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}.")
    shown = f"{key} = {json.dumps(value)}"
    if key == "device":
        return "" if value in ("cpu", "cuda") else f"{shown}: expected cpu or cuda."
    if key in ("device_name", "reason"):
        return "" if isinstance(value, str) else f"{shown}: expected text."
    if key == "device_bytes" and value is None:
        return ""
    least = 0 if key in ("devices_per_node", "host_bytes") else 1
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return ""
    size = ' or a size such as "80GB"' if key.endswith("_bytes") else ""
    return f"{shown}: expected a whole number of at least {least}{size}."


def _size(value: Any) -> Any:
    """`"80GB"` in bytes; anything else as it is."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(MB|GB|TB)\s*", value, re.IGNORECASE) if isinstance(value, str) else None
    return value if found is None else _bytes(found[1], found[2])


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit.upper()])


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
