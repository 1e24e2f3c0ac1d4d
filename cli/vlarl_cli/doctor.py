"""Owns `vlarl doctor`: what this machine has, whether torch works on it, and what to do where something is missing."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from vlarl.plan.cluster import Cluster, discover

CHECK_SECONDS = 300
SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED = 1 << 30  # NCCL's buffers between the GPUs of a machine
ENOUGH_DISK = 20 << 30  # a 7B checkpoint and a run's own
OPEN_FILES = 4096


@dataclass(frozen=True)
class Finding:
    """One line. problem, fix: None where all is well."""

    name: str
    found: str
    problem: str | None = None
    fix: str | None = None


def examine() -> list[Finding]:
    """Everything but the simulators. Takes seconds: torch is tried in a process of its own."""
    cluster = discover("auto")
    return [_python(), *_packages(), _processor(cluster), _devices(cluster), _torch(cluster), *_limits(cluster)]


def _python() -> Finding:
    return Finding("python", f"{platform.python_version()}, {sys.executable}; {_system()}")


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, kernel {platform.release()}, {platform.machine()}"


def _packages() -> list[Finding]:
    """vlarl, and all that it needs to run: in one line what is well, a line each for what is not."""
    well, wrong = [f"vlarl {metadata.version('vlarl')}"], []
    for line in metadata.requires("vlarl") or ():
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(Finding(need.name, "-", f"It is not installed; vlarl needs {need}.", f"Run: pip install '{need}'"))
            continue
        if need.specifier.contains(version, prereleases=True):
            well.append(f"{need.name} {version}")
        else:
            wrong.append(Finding(need.name, version, f"vlarl needs {need}.", f"Run: pip install -U '{need}'"))
    return [Finding("packages", ", ".join(well)), *wrong]


def _processor(cluster: Cluster) -> Finding:
    return Finding("processor", f"{cluster.cores} cores, {cluster.host_bytes / 2**30:.0f} GiB of memory for this process")


def _devices(cluster: Cluster) -> Finding:
    if cluster.device == "cpu":
        return Finding("devices", f"no GPU: {cluster.reason}")
    return Finding("devices", f"{cluster.devices_per_node} x {cluster.device_name}, {(cluster.device_bytes or 0) / 2**30:.0f} GiB")


def _torch(cluster: Cluster) -> Finding:
    """A product and a sum between ranks on every device."""
    cuda = ["--cuda"] if cluster.device == "cuda" else []
    command = [sys.executable, "-m", "vlarl.distributed.check", *cuda]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("torch", "-", f"It did not compute within {CHECK_SECONDS} s.", f"Run it by hand: {' '.join(command)}")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        return Finding("torch", "-", f"It does not compute here: {said}", f"Run it by hand: {' '.join(command)}")
    devices = json.loads(done.stdout.splitlines()[-1])["devices"]
    if cuda and len(devices) != cluster.devices_per_node:
        problem = f"It computes on {len(devices)} device(s), and the driver lists {cluster.devices_per_node} GPUs."
        return Finding("torch", "; ".join(devices), problem, "Look at CUDA_VISIBLE_DEVICES, and at the driver's version for this build.")
    return Finding("torch", "; ".join(devices))


def _limits(cluster: Cluster) -> list[Finding]:
    """What the system grants: shared memory, disk, open files."""
    import resource

    found = []
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY).total
        small = cluster.devices_per_node > 1 and size < ENOUGH_SHARED
        problem = "NCCL needs more between the GPUs of a machine." if small else None
        fix = "Start the container with --shm-size=8g (or --ipc=host)." if small else None
        found.append(Finding("shared memory", f"{size / 2**30:.1f} GiB at {SHARED_MEMORY}", problem, fix))
    free, here = shutil.disk_usage(Path.cwd()).free, Path.cwd()
    if not os.access(here, os.W_OK):
        found.append(Finding("disk", str(here), "This folder cannot be written, and runs go to runs/ in it.", "Use --out DIR."))
    else:
        full = cluster.device == "cuda" and free < ENOUGH_DISK
        problem = "A 7B policy and its checkpoints need more." if full else None
        found.append(Finding("disk", f"{free / 2**30:.0f} GiB free in {here}", problem, "Use --out DIR on another disk." if full else None))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < OPEN_FILES <= hard
    found.append(Finding("open files", "unlimited" if soft == resource.RLIM_INFINITY else str(soft),
                         "Many simulator processes may need more." if few else None, f"Run: ulimit -n {OPEN_FILES}" if few else None))
    return found
