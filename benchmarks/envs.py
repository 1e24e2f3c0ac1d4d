"""Steps per second of a hosted simulator: bare, through env hosts, with several chunk lengths and numbers of hosts; start-up and memory.

    python benchmarks/envs.py libero --tasks libero_object-0 --python /path/to/python --hosts 1 2 --chunks 1 8 --steps 32
    python benchmarks/envs.py maniskill --tasks PushCube-v1 --hosts 1 2 4

`bare` is the adapter in a loop of its own, by the same interpreter, rendering as often (once per chunk). It and the hosts are timed in
turn, each idle while the others work. Prints one JSON object: every repeat, and two ratios: overhead, by chunk length the median over
repeats of bare over one host in the same turn, less one; and chunk_gain, what rendering at the end of the longest chunk alone brings over
the shortest.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from vlarl import serial
from vlarl.envs.base import HOSTED
from vlarl.envs.hosts import ONE_THREAD, HostedEnv, Hosting
from vlarl.envs.spec import EnvSpec, EpisodeSpec
from vlarl.plan.specs import simulator_spec
from vlarl.recipe.schema import Env

ROOT = Path(__file__).resolve().parents[1]
BARE = """
import importlib, json, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
from vlarl.envs.spec import EnvSpec, EpisodeSpec
job = json.loads(sys.argv[2])
spec = EnvSpec(**dict(job["spec"], tasks=tuple(job["spec"]["tasks"])))
module, name = job["adapter"].split(":")
start = time.perf_counter()
simulator = getattr(importlib.import_module(module), name)(job["settings"], spec)
image = np.zeros((spec.views, spec.height, spec.width, 3), np.uint8)
state = np.zeros(spec.state_dim, np.float32)
simulator.reset(EpisodeSpec(0, 0, 0, 0))
simulator.observe(image, state)
print("RESULT", time.perf_counter() - start, flush=True)
for line in sys.stdin:
    chunk = int(line)
    action = np.zeros((chunk, spec.action_dim), np.float32)
    begin = time.perf_counter()
    for _ in range(job["steps"] // chunk):
        simulator.play(action)
        simulator.observe(image, state)
    print("RESULT", job["steps"] // chunk * chunk / (time.perf_counter() - begin), flush=True)
simulator.close()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("simulator")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--hosts", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    env = Env(
        simulator=options.simulator,
        tasks=tuple(options.tasks),
        horizon=10**6,
        image_size=options.size,
        wrist_camera=True,
        python=options.python,
    )
    spec, settings = simulator_spec(env), serial.to_dict(env)
    job = {"adapter": HOSTED[env.simulator], "settings": settings, "spec": asdict(spec)}
    job |= {"chunks": options.chunks, "steps": options.steps, "repeats": options.repeats}
    bare, sizes = Bare(options.python, job), sorted(options.hosts)
    found: dict[str, Any] = {"bare": {"start": bare.answer()}}
    with tempfile.TemporaryDirectory() as logs:
        pools = {str(count): Pool(count, spec, job, options.python, Path(logs) / str(count)) for count in sizes}
        found |= {name: pool.facts for name, pool in pools.items()}
        for chunk in options.chunks * options.repeats:
            found["bare"].setdefault(str(chunk), []).append(bare.speed(chunk))
            for name, pool in pools.items():
                found[name].setdefault(str(chunk), []).append(pool.speed(chunk))
        for pool in pools.values():
            pool.env.close()
    bare.close()
    alone = found["bare"]

    def overhead(chunk: str) -> float:
        return median(b / h for b, h in zip(alone[chunk], found["1"][chunk], strict=True)) - 1

    result = {
        "settings": {**vars(options), "json": None},
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "unit": "steps/s, all hosts together; start: seconds to the first frames; bytes: of the largest host",
        "bare": found.pop("bare"),
        "hosts": found,
        "overhead": {c: overhead(c) for c in map(str, options.chunks)} if "1" in found else None,
        "chunk_gain": median(alone[str(options.chunks[-1])]) / median(alone[str(options.chunks[0])]),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text)


class Bare:
    """The adapter in a process of its own, which waits between turns."""

    def __init__(self, python: str, job: dict[str, Any]) -> None:
        command, alike = [python, "-c", BARE, str(ROOT / "src"), json.dumps(job)], {**os.environ, **ONE_THREAD}  # as hosts run
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alike)

    def answer(self) -> float:
        """The next number that it says."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT"):
                return float(line.split()[1])
        raise SystemExit(f"the bare simulator ended with code {self._process.wait()}")

    def speed(self, chunk: int) -> float:
        """Steps per second of one turn."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{chunk}\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Pool:
    """`count` hosts of one slot each. facts: seconds to their first frames, memory of the largest."""

    def __init__(self, count: int, spec: EnvSpec, job: dict[str, Any], python: str, logs: Path) -> None:
        before = set(psutil.Process().children())
        hosting, start = Hosting(job["adapter"], job["settings"], python, 1, 900.0, 900.0, {}, logs), time.perf_counter()
        self.env = HostedEnv(count, 0, spec, hosting, torch.device("cpu"), lambda n, total: None)
        self._count, self._steps, self._spec = count, job["steps"], spec
        self.env.reset(torch.arange(count), [EpisodeSpec(n, 0, 0, 0) for n in range(count)])
        taken = time.perf_counter() - start
        memory = max(p.memory_info().rss for p in set(psutil.Process().children()) - before)
        self.facts: dict[str, Any] = {"start": taken, "bytes": memory}

    def speed(self, chunk: int) -> float:
        """Steps per second of one turn, all hosts together."""
        every, active = torch.arange(self._count), torch.ones(self._count, dtype=torch.bool)
        action, begin = torch.zeros(self._count, chunk, self._spec.action_dim), time.perf_counter()
        for _ in range(self._steps // chunk):
            self.env.step_chunk(action, active)
            self.env.observe(every)
        return self._count * (self._steps // chunk) * chunk / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
