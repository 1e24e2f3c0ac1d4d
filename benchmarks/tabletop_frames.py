"""Measures tabletop: rendered frames/s and control steps/s, beside the tiny policy's action generation in the same run.

Method: one process, `--threads` torch threads, one batch of scenes of the `train` variation. Each round renders the batch once, plays
one chunk of 4 actions in every slot without rendering, and lets the policy act once on the frames; rounds follow one another so that
all three see the same machine, after a warm-up round. Medians of `--repeats` rounds, with smallest and largest. `share of acting` is a
rendered frame's cost over that of generating one action chunk (which needs one frame). At 224 px only the simulator is measured.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vlarl.envs.spec import EpisodeSpec
from vlarl.envs.tabletop.env import Tabletop
from vlarl.envs.tabletop.spec import TASKS
from vlarl.policies.checkpoint import load_policy

CHUNK = 4


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(size: int, batch: int, repeats: int, policy_source: str | None, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every round: `render`, `step` (a chunk) and, with a policy, `act`, each for the whole batch."""
    sim = Tabletop(batch, TASKS, "train", 10**6, size, False, "sparse", device)
    slots = torch.arange(batch)
    sim.reset(slots, [EpisodeSpec(uid=i, task=i % 3, init_state=i, seed=0) for i in range(batch)])
    policy = None if policy_source is None else load_policy(policy_source, device=device)
    idle = torch.zeros(batch, CHUNK, 7, device=device)
    idle[..., 6] = -1
    everyone = torch.ones(batch, dtype=torch.bool)
    times: dict[str, list[float]] = {"render": [], "step": []} | ({} if policy is None else {"act": []})
    for round_ in range(repeats + 1):
        row = {"render": seconds(lambda: sim.observe(slots), device), "step": seconds(lambda: sim.step_chunk(idle, everyone), device)}
        if policy is not None:
            seen = sim.observe(slots)
            noise = torch.rand(batch, policy.spec.chunk * policy.spec.action_dim)
            row["act"] = seconds(lambda seen=seen, noise=noise: policy.act(seen, noise, 1.0, 0), device)
        if round_ > 0:
            for name, value in row.items():
                times[name].append(value)
    return times


def rate(batch: int, taken: list[float]) -> dict[str, float]:
    return {"median": batch / statistics.median(taken), "min": batch / max(taken), "max": batch / min(taken)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--policy", default="scratch:tiny", help="policy to compare with at 64 px; speed does not depend on its weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    figures: dict[str, dict[str, float]] = {}
    for size in (64, 224):
        times = measure(size, options.batch, options.repeats, options.policy if size == 64 else None, device)
        figures[f"rendered frames/s, {size} px"] = rate(options.batch, times["render"])
        if size == 64:
            figures["control steps/s, no rendering"] = rate(options.batch * CHUNK, times["step"])
            figures["action chunks/s, tiny policy"] = rate(options.batch, times["act"])
            shares = [r / a for r, a in zip(times["render"], times["act"], strict=True)]
            figures["rendering's share of acting"] = {"median": statistics.median(shares), "min": min(shares), "max": max(shares)}
    result = {
        "batch": options.batch, "threads": options.threads, "repeats": options.repeats, "device": options.device,
        "torch": torch.__version__, "machine": f"{platform.machine()}, {os.cpu_count()} cores", "load": os.getloadavg()[0],
        "figures": figures,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
