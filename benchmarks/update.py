"""Samples per second and model FLOPs utilisation of the update: full fine-tuning, adapters, frozen towers; by samples per forward pass.

    python benchmarks/update.py --size tiny --microbatches 8 32 128 --samples 128 --json FILE

One rank runs `Learner.update` (PPO loss, FSDP2, AdamW, one optimiser step) on random frames and tokens: variants one after another, within
one every size in turn. Frozen towers' features are computed anew and, in turn with that, read as kept from the rollout (reused).

FLOPs of a sample are counted from the layers' shapes: 2 per weight and token forward, 2 more for the gradient of a trained weight, 2 more
for that of its input, unless nothing before it is trained; attention 4 x positions^2 x width forward, twice that backward. What activation
checkpointing computes again is not counted, nor are norms, softmaxes, losses and the optimiser. MFU divides by a large matrix product
measured in the same run.
"""
from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from inference import FOLDERS, SENTENCES, build, configure, peaks, seconds, write_trace
from torch import nn

from vlarl.distributed.fsdp import acting, shard
from vlarl.distributed.mesh import World, init_world, shutdown
from vlarl.learner.optim import build_optimizer
from vlarl.learner.targets import Targets
from vlarl.learner.update import Learner
from vlarl.plan.cluster import Cluster
from vlarl.plan.compile import compile_plan
from vlarl.plan.specs import policy_spec, simulator_spec
from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import make_trainable
from vlarl.policies.openvla import OpenVLA
from vlarl.recipe.load import load_recipe
from vlarl.recipe.schema import Lora, Ppo, Rollout, Update
from vlarl.types import TrajectoryBatch

DEBUG = Path(__file__).parents[1] / "recipes" / "debug.yaml"


@dataclass(frozen=True)
class Variant:
    """What is trained, and how."""

    name: str
    lora: Lora | None = None
    freeze: tuple[str, ...] = ()
    checkpointing: bool = False


VARIANTS = {
    "full": Variant("full"),
    "full, checkpointing": Variant("full, checkpointing", checkpointing=True),
    "lora": Variant("lora", Lora()),
    "lora, checkpointing": Variant("lora, checkpointing", Lora(), checkpointing=True),
    "frozen towers": Variant("frozen towers", freeze=("vision",)),
    "lora, frozen towers": Variant("lora, frozen towers", Lora(), ("vision",)),
}


def flops(policy: VLAPolicy, frozen: bool, reuse: bool, prompt: int) -> float:
    """Of one sample's forward and backward, see above. frozen: the towers are. reuse: their features are given. prompt: its tokens."""
    module, config = policy.module, policy.config
    assert isinstance(module, OpenVLA)
    patches, answer = config.patches, module.num_tokens
    length = patches + prompt + (answer + config.stop_token if config.kind == "openvla-oft" else answer - 1)
    towers = dict(module.vision_backbone.named_children())
    total = 0.0
    for name, layer in module.named_modules():
        parts = name.split(".")
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or parts[0] == "value_head" or "attn_pool" in parts:
            continue
        weights, tokens, before = layer.weight.numel(), length, True
        if parts[0] == "vision_backbone":
            tower = towers[parts[1]]
            if reuse or parts[2] == "blocks" and int(parts[3]) >= tower.layers_used:
                continue
            tokens = patches + tower.prefix * config.views
            before = not frozen and parts[2] == "blocks"
        elif parts[0] == "projector":
            tokens, before = patches, not frozen
        elif "lm_head" in parts:
            weights, tokens = policy.config.action_bins * layer.weight.shape[1], answer
        total += 2 * weights * tokens * (1 + layer.weight.requires_grad + before)
    llama = module.language_model.config
    total += 3 * 4 * length**2 * llama.hidden_size * llama.num_hidden_layers
    for tower in () if reuse else module.vision_backbone.towers:
        width = tower.pos_embed.shape[-1]
        once = 4 * (patches // config.views + tower.prefix) ** 2 * width * tower.layers_used * config.views
        total += once * (1 if frozen else 3)
    return total


def rollout(policy: VLAPolicy, samples: int, reuse: bool) -> tuple[TrajectoryBatch, Targets]:
    """Features, where wanted, and random frames, tokens and advantages in the place of a rollout of one chunk in `samples` slots."""
    spec, generator = policy.spec, torch.Generator().manual_seed(1)
    K, N, B = spec.chunk, spec.chunk * spec.action_dim, samples
    image = torch.randint(0, 256, (1, B, spec.views, spec.image_size, spec.image_size, 3), dtype=torch.uint8, generator=generator)
    feature = torch.zeros(1, B, 0, 0)
    if reuse:
        with acting(policy.module):
            feature = torch.cat([policy.module.encode_image(part.to(policy.device)).cpu() for part in image[0].split(32)])[None]
    flags = torch.zeros(1, B, K, dtype=torch.bool)
    batch = TrajectoryBatch(
        image_TBVHWC=image,
        feature_TBPF=feature,
        state_TBD=torch.zeros(1, B, 8),
        instruction_TB=torch.arange(B)[None] % len(SENTENCES),
        instructions=SENTENCES,
        token_TBN=torch.randint(0, 256, (1, B, N), generator=generator),
        logprob_TBN=torch.full((1, B, N), -5.5),
        value_TBJ=torch.zeros(1, B, 1),
        reward_TBK=torch.zeros(1, B, K),
        terminated_TBK=flags,
        truncated_TBK=flags,
        valid_TBK=~flags,
        active_TB=torch.ones(1, B, dtype=torch.bool),
        last_value_BJ=torch.zeros(B, 1),
        final_value_TBJ=torch.zeros(1, B, 1),
        episode_TB=torch.full((1, B), -1),
        slot_B=torch.arange(B),
        episodes=(),
        policy_version=0,
    )
    advantage = torch.randn(1, B, 1, generator=generator)
    return batch, Targets(advantage, advantage, torch.ones(1, B, dtype=torch.bool), torch.ones(1, B), 0, 0)


def measure(
    world: World, policy: VLAPolicy, dtype: torch.dtype, variant: Variant, microbatches: Sequence[int], samples: int, repeats: int,
    trace: Path | None,
) -> list[dict[str, Any]]:
    """One variant: after a warm-up, every case in turn. trace: where to say what takes the time, with most samples at a time."""
    make_trainable(policy.module, variant.lora, variant.freeze, torch.float32, trainable=True)
    assert world.learner is not None
    shard(policy.module, world.learner, dtype, policy.module.fsdp_units(), activation_checkpointing=variant.checkpointing)
    optimizer = build_optimizer(policy.module, 1e-6, 1e-6, 1.0, (0.9, 0.95), 1e-5, 0.0)
    frozen = "vision" in variant.freeze
    kept = (False, True) if frozen else (False,)
    collected = {reuse: rollout(policy, samples, reuse) for reuse in kept}
    prompt = policy.prompts(SENTENCES).ids_BL.shape[1]
    times: dict[tuple[int, bool], list[float]] = {case: [] for case in itertools.product(microbatches, kept)}
    peak: dict[tuple[int, bool], int] = {}
    for repeat in range(repeats + 1):
        for (microbatch, reuse), taken in times.items():
            settings = Update(minibatches=1, microbatch=microbatch, logprob_gap_limit=1e9)
            learner = Learner(policy, None, optimizer, world, Ppo(), settings, Rollout(), seed=1)
            if world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            once = seconds(partial(learner.update, *collected[reuse], 0), world.device)
            if repeat == repeats and trace is not None and microbatch == max(microbatches):
                write_trace(trace, partial(learner.update, *collected[reuse], 0), world.device)
            if repeat:
                taken.append(once)
                peak[microbatch, reuse] = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
    rows = []
    for (microbatch, reuse), taken in times.items():
        median, count = statistics.median(taken), flops(policy, frozen, reuse, prompt)
        row = {"variant": variant.name + ", reused" * reuse, "microbatch": microbatch, "seconds": taken}
        row |= {"peak_bytes": peak[microbatch, reuse]}
        row |= {"samples_per_second": samples / median, "gflop_per_sample": count / 1e9, "flops_per_second": count * samples / median}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(FOLDERS), default="openvla-oft")
    parser.add_argument("--size", choices=("tiny", "300m", "7b"), default="tiny")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--samples", type=int, default=128, help="of one optimiser step")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trace", type=Path, help="write what takes the time here, one table per variant, with most samples at a time")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    recipe = load_recipe(DEBUG, ["ranks=1"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cluster = Cluster(device=device, devices_per_node=1, device_name=device, cores=os.cpu_count() or 1)
    world = init_world(compile_plan(recipe, cluster, policy_spec(recipe), simulator_spec(recipe.env)))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    top = peaks(dtype, world.device)[0]
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    load = os.getloadavg()[0]
    print(f"{options.kind}, {options.size}, {dtype}, {name}, {torch.get_num_threads()} thread(s), load {load:.1f} before the start")
    print(f"measured peak: {top / 1e9:.1f} GFLOP/s", flush=True)
    rows = []
    for chosen in options.variants:
        policy = build(configure(options.kind, options.size), torch.float32, world.device)
        trace = None if options.trace is None else options.trace.with_suffix(f".{chosen.replace(', ', '-').replace(' ', '-')}.txt")
        found = measure(world, policy, dtype, VARIANTS[chosen], options.microbatches, options.samples, options.repeats, trace)
        del policy  # one at a time fits
        gc.collect()
        for row in found:
            row["mfu"] = row.pop("flops_per_second") / top
            spread = f"{options.samples / max(row['seconds']):.2f} to {options.samples / min(row['seconds']):.2f}"
            print(f"{row['variant']:28s} {row['microbatch']:4d} at a time: {row['samples_per_second']:8.2f} samples/s ({spread}),", end=" ")
            memory = f", peak {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
            print(f"{row['gflop_per_sample']:.2f} GFLOP each, MFU {row['mfu']:.1%}{memory}", flush=True)
        rows += found
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        settings = {"kind": options.kind, "size": options.size, "dtype": str(dtype), "threads": torch.get_num_threads()}
        settings |= {"samples": options.samples, "load_before": load}
        figures = {"machine": name, "versions": versions, "settings": settings, "peak": top, "rows": rows}
        options.json.write_text(json.dumps(figures, indent=1))
    shutdown()


if __name__ == "__main__":
    main()
