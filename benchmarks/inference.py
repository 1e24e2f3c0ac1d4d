"""Batched action generation against a plain Hugging Face loop over the same weights, in one run, by batch size; share of the roofline,
and how far log-probs of acting are from those of learning.

    python benchmarks/inference.py --kind openvla --size tiny --batches 1 8 64 --json FILE

The plain loop is what published evaluators do, given a batch: the image processor on the host (PIL, picture by picture), prompts
tokenised anew, logits over the whole vocabulary; OpenVLA by `LlamaForCausalLM.generate` with its growing cache, OFT by one forward of the
same class. Greedy, so that the tokens can be compared.
"""
from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlarl.policies.actions import build_codec
from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import initialize_module
from vlarl.policies.engine import Engine
from vlarl.policies.layout import OpenVLAConfig, read_config, read_statistics, resolve_folder, spec_from
from vlarl.policies.openvla import OpenVLA
from vlarl.policies.probe import equip
from vlarl.policies.tokenizer import PromptTable, load_tokenizer
from vlarl.policies.towers import tower_shape
from vlarl.recipe.schema import Engine as EngineSettings
from vlarl.types import Observation

ENGINES = ("eager", "compile", "cuda_graphs", "compile+cuda_graphs")
FOLDERS = {"openvla": "scratch:tiny-openvla", "openvla-oft": "scratch:tiny"}
SENTENCES = ("put the red cube on the green plate", "push the blue cube left", "touch the yellow cube")
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 2048}
REAL_TOWERS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
PUBLISHED = {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064}


def configure(kind: str, size: str) -> OpenVLAConfig:
    """tiny: as shipped. 300m: its towers, a Llama of 300 M parameters. 7b: the published shapes."""
    config = read_config(resolve_folder(FOLDERS[kind])[0])
    if size == "300m":
        return replace(config, text=config.text | WIDE)
    if size == "7b":
        chunk = 1 if kind == "openvla" else 8
        return replace(config, text=PUBLISHED, tower_ids=REAL_TOWERS, image_sizes=(224, 224), chunk=chunk)
    return config


def build(config: OpenVLAConfig, dtype: torch.dtype, device: torch.device) -> VLAPolicy:
    folder = resolve_folder(FOLDERS[config.kind])[0]
    torch.manual_seed(0)
    with torch.device(device):
        module = initialize_module(config, 1, dtype).to(device).eval()
    prompts = PromptTable(load_tokenizer(folder), config.bos_id, config.pad_id, config.blank_id, device)
    codec = build_codec(read_statistics(folder, config.raw), "tabletop", config.normalization, config.epsilon, config.action_dim, device)
    return VLAPolicy(module, config, spec_from(config, "tabletop"), prompts, codec, device, folder, 1.0, "")


def observation(batch: int, size: int, device: torch.device) -> Observation:
    image = torch.randint(0, 256, (batch, 1, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Observation(image.to(device), torch.zeros(batch, 8, device=device), tuple(SENTENCES[i % 3] for i in range(batch)))


@torch.no_grad()
def plain_loop(policy: VLAPolicy, obs: Observation) -> Tensor:
    """Greedy tokens (B,N) as published evaluators get them."""
    module, config, device = policy.module, policy.config, policy.device
    assert isinstance(module, OpenVLA)
    llama, dtype, size = module.language_model, module.projector.fc1.weight.dtype, config.image_sizes[0]
    towers = [tower_shape(name) for name in config.tower_ids]
    pixels = []
    for frame in obs.image_BVHWC[:, 0].cpu().numpy():
        picture = np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        pixels.append(np.concatenate([(picture - np.float32(t.mean)) / np.float32(t.std) for t in towers], -1).transpose(2, 0, 1))
    patches = module.projector(module.vision_backbone(torch.from_numpy(np.stack(pixels)).to(device, dtype)))
    fresh = PromptTable(policy._prompts._tokenizer, config.bos_id, config.pad_id, config.blank_id, device)
    prompt = fresh.batch(obs.instruction)
    text = llama.get_input_embeddings()(prompt.ids_BL)
    mask = torch.ones_like(prompt.ids_BL, dtype=torch.bool) if prompt.mask_BL is None else prompt.mask_BL
    mask = torch.cat([mask[:, :1], mask.new_ones(len(mask), patches.shape[1]), mask[:, 1:]], 1)
    embedding = torch.cat([text[:, :1], patches, text[:, 1:]], 1)
    low, high, count = config.action_low, config.action_low + config.action_bins, module.num_tokens
    if config.kind == "openvla":
        settings: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "use_cache": True}
        only = [lambda _, scores: torch.full_like(scores, -torch.inf).index_copy(1, actions, scores[:, low:high])]
        actions = torch.arange(low, high, device=device)
        settings |= {"logits_processor": transformers.LogitsProcessorList(only), "pad_token_id": config.pad_id}
        return llama.generate(inputs_embeds=embedding, attention_mask=mask.long(), **settings)[:, -count:] - low
    embedding = torch.cat([embedding, embedding.new_zeros(len(mask), count, embedding.shape[2])], 1)
    mask = torch.cat([mask, mask.new_ones(len(mask), count)], 1)
    total = mask.shape[1]
    seen = mask[:, None, None, :].expand(-1, 1, total, total)
    logits = llama(inputs_embeds=embedding, attention_mask=seen, position_ids=mask.long().cumsum(1) - 1, is_causal=False).logits
    return logits[:, -count - 1 : -1, low:high].argmax(-1)


@torch.no_grad()
def logprob_gap(policy: VLAPolicy, obs: Observation) -> tuple[float, float]:
    """Mean and largest difference (nats per token) between what acting and learning say of sampled tokens."""
    shape, chance = (len(obs), policy.spec.chunk * policy.spec.action_dim), torch.Generator().manual_seed(2)
    noise_BN = torch.rand(shape, dtype=torch.float64, generator=chance)
    chunk = policy.act(obs, noise_BN.to(policy.device), 1.0, 0)
    gap_BN = (chunk.logprob_BN - policy.evaluate(obs, chunk.token_BN, 1.0, 0).logprob_BN).abs().double()
    return float(gap_BN.mean()), float(gap_BN.max())


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time; on a CPU with one thread, processor time, in which other processes on the machine do not count."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peaks(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s read by a sum over a large array: measured, here and now."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = min(seconds(lambda: a @ a, device) for _ in range(5))
    big = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    return 2 * side**3 / product, big.numel() * 4 / min(seconds(big.sum, device) for _ in range(5))


def engines(policy: VLAPolicy, wanted: Sequence[str], batch: int, dtype: torch.dtype) -> dict[str, Engine]:
    """Ways to act by name, those that pass the comparison of log-probs here. eager: batches run as they come."""
    found = {}
    for name in wanted:
        parts = [] if name == "eager" else name.split("+")
        settings = EngineSettings(compile="compile" in parts, cuda_graphs="cuda_graphs" in parts, batch_sizes=(batch,) if parts else None)
        left_out = equip(policy, settings, batch, dtype)
        if left_out:
            print(*left_out, sep="\n")
        else:
            found[name] = policy.engine
    return found


def measure(
    policy: VLAPolicy, ways: dict[str, Engine], batch: int, repeats: int, top: tuple[float, float], trace: Path | None
) -> list[dict[str, Any]]:
    """All ways to act and the plain loop in turn, after a warm-up; greedy tokens compared first."""
    obs = observation(batch, policy.spec.image_size, policy.device)

    def act(engine: Engine) -> Tensor:
        policy.engine = engine
        return policy.act(obs, None, 1.0, 0).token_BN

    expected = plain_loop(policy, obs)
    rows = {}
    for name, engine in ways.items():
        agree = float((act(engine) == expected).double().mean())
        rows[name] = {"batch": batch, "engine": name, "same_tokens": agree, "logprob_gap": logprob_gap(policy, obs)}
    calls: dict[str, Callable[[], Tensor]] = {name: functools.partial(act, engine) for name, engine in ways.items()}
    calls["plain"] = lambda: plain_loop(policy, obs)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, policy.device))
    eager = Engine()
    with FlopCounterMode(display=False) as counter:  # of a plain pass: a replayed graph shows the counter nothing
        act(eager)
    if trace is not None:
        write_trace(trace.with_suffix(f".{batch}.txt"), lambda: act(eager), policy.device)
    bound, plain = floor(policy, batch, counter.get_total_flops(), top), statistics.median(times["plain"])
    for name, row in rows.items():
        median = statistics.median(times[name])
        row |= {"ours_ms": [1e3 * t for t in times[name]], "plain_ms": [1e3 * t for t in times["plain"]], "speedup": plain / median}
        row |= {"actions_per_second": batch * policy.spec.chunk / median, "roofline_share": bound / median}
    return list(rows.values())


def floor(policy: VLAPolicy, batch: int, flops: int, top: tuple[float, float]) -> float:
    """Seconds below which no implementation comes: of the first pass and of every cached step after it (OpenVLA's other tokens), the
    larger of FLOPs over the measured rate and bytes of weights over the measured bandwidth. A step multiplies all rows with all weights."""
    steps = policy.spec.action_dim - 1 if policy.config.kind == "openvla" else 0
    weights = sum(p.numel() * p.element_size() for p in policy.module.parameters())
    llama = list(policy.module.language_model.parameters())
    step_flops = 2 * batch * sum(p.numel() for p in llama)
    step = max(step_flops / top[0], sum(p.numel() * p.element_size() for p in llama) / top[1])
    return max((flops - steps * step_flops) / top[0], weights / top[1]) + steps * step


def write_trace(path: Path, call: Callable[[], object], device: torch.device) -> None:
    """Where the device's time goes in one call, by kind of operation: a table."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profile:
        seconds(call, device)
    order = f"self_{device.type}_time_total"
    path.write_text(profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(FOLDERS), default="openvla")
    parser.add_argument("--size", choices=("tiny", "300m", "7b"), default="tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=["eager"], help="as in policy.engine")
    parser.add_argument("--trace", type=Path, help="write what takes the time of an eager call here, one table per batch size")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy, top = build(configure(options.kind, options.size), dtype, device), peaks(dtype, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{options.kind}, {policy.spec.parameters / 1e6:.1f} M parameters, {dtype}, {name}, {torch.get_num_threads()} thread(s)")
    print(f"measured peaks: {top[0] / 1e9:.1f} GFLOP/s, {top[1] / 1e9:.1f} GB/s; 1-minute load {os.getloadavg()[0]:.1f}")
    rows = []
    for batch in options.batches:
        ways = engines(policy, options.engines, batch, dtype)
        for row in measure(policy, ways, batch, options.repeats, top, options.trace):
            rows.append(row)
            ours, plain = (f"{statistics.median(t):.1f} ({min(t):.1f} to {max(t):.1f}) ms" for t in (row["ours_ms"], row["plain_ms"]))
            print(f"batch {batch:4d}, {row['engine']}: {ours}, plain {plain}: {row['speedup']:.2f}x;", end=" ")
            print(f"{row['actions_per_second']:.0f} actions/s, {row['roofline_share']:.0%} of the roofline,", end=" ")
            mean, most = row["logprob_gap"]
            print(f"same tokens {row['same_tokens']:.1%}, log-prob gap {mean:.2g}, at most {most:.2g}", flush=True)
        policy.engine.forget()
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        settings = {"kind": options.kind, "size": options.size, "dtype": str(dtype), "threads": torch.get_num_threads()}
        settings |= {"load": os.getloadavg()}
        figures = {"machine": name, "versions": versions, "settings": settings, "peaks": top, "rows": rows}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
