"""Measures the peak host memory of loading a generated sharded checkpoint straight into the shards of several ranks, against a whole load.

    python benchmarks/load_memory.py --ranks 2 --gigabytes 2.2 --json FILE

Private memory (anonymous pages) is what a rank needs for itself; pages of mapped weight files belong to the page cache, are shared by all
ranks and can be dropped at any time, so they are counted apart.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

GB = 1e9
HIDDEN, MLP, HEADS, VOCAB, SHARD_BYTES = 1024, 2816, 16, 32064, 500_000_000


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """A policy folder in bfloat16, in shards: the tiny policy with a Llama of as many layers as it takes, random weights. Its bytes."""
    import torch
    from safetensors.torch import save_file

    from vlarl.policies.checkpoint import COMPANIONS, empty_module
    from vlarl.policies.layout import read_config, resolve_folder

    source, _ = resolve_folder("scratch:tiny")
    raw = json.loads((source / "config.json").read_text())
    per_layer = 4 * HIDDEN**2 + 3 * HIDDEN * MLP
    layers = max(1, round((gigabytes * GB / 2 - 2 * VOCAB * HIDDEN) / per_layer))
    raw["text_config"] |= {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": layers}
    raw["text_config"] |= {"num_attention_heads": HEADS}
    (folder / "config.json").write_text(json.dumps(raw))
    for name in COMPANIONS:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    module = empty_module(read_config(folder), 1, torch.bfloat16)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    shard: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    total = number = 0

    def flush() -> None:
        nonlocal shard, number
        number += 1
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard = {}

    for name, empty in module.state_dict().items():
        count = empty.numel()
        shard[name] = noise.to(torch.bfloat16).repeat(-(-count // len(noise)))[:count].view(empty.shape).contiguous()
        total += shard[name].numel() * 2
        if sum(t.numel() * 2 for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def resident() -> tuple[int, int]:
    """Bytes of this process: anonymous, and of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


class Peak:
    """The largest figures seen by a thread that looks every 5 ms."""

    def __init__(self) -> None:
        self.anonymous, self.mapped = 0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.is_set():
            anonymous, mapped = resident()
            self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)
            time.sleep(0.005)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def rank_main(folder: str, rank: int, ranks: int, port: int, sharded: bool, pipe: Any) -> None:
    """One rank: load in float32, and tell what it took above what torch and its libraries take."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from vlarl.distributed.fsdp import local_rows, shard
    from vlarl.policies.checkpoint import load_policy
    from vlarl.policies.weights import WHOLE, Place

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (ranks,))
    load_policy("scratch:tiny")  # imports and lazy initialisation are not what is measured
    before, peak, started = resident(), Peak(), time.perf_counter()
    place = Place(lambda module: shard(module, mesh, torch.float32, module.fsdp_units()), local_rows) if sharded else WHOLE
    policy = load_policy(folder, place=place)
    if not sharded:
        shard(policy.module, mesh, torch.float32, policy.module.fsdp_units())
    seconds = time.perf_counter() - started
    peak.stop()
    after = resident()
    kept = sum(local_rows(p.detach())[0].numel() * 4 for p in policy.module.parameters())
    figures = {"kept": kept, "peak": peak.anonymous - before[0], "after": after[0] - before[0], "mapped": peak.mapped - before[1]}
    pipe.send({name: round(value / GB, 3) for name, value in figures.items()} | {"seconds": round(seconds, 1)})
    dist.barrier()
    dist.destroy_process_group()


def measure(folder: Path, ranks: int, sharded: bool) -> list[dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    port = 29500 + os.getpid() % 1000 + int(sharded)
    pipes, processes = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=rank_main, args=(str(folder), rank, ranks, port, sharded, sender))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    rows = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return rows


def emit(result: dict[str, object], path: Path | None) -> None:
    """Print the figures as JSON, and write them too where a file is named."""
    text = json.dumps(result, indent=1)
    print(text)
    if path is not None:
        path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=2.2, help="of the checkpoint, in bfloat16")
    parser.add_argument("--whole", action="store_true", help="also load whole on every rank and shard then, for comparison")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_checkpoint(folder, options.gigabytes)
        result = {
            "checkpoint_gb": round(size / GB, 3),
            "float32_gb": round(2 * size / GB, 3),
            "files": len(list(folder.glob("*.safetensors"))),
            "ranks": options.ranks,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "sharded": measure(folder, options.ranks, True),
        }
        if options.whole:
            result["whole"] = measure(folder, options.ranks, False)
    emit(result, options.json)


if __name__ == "__main__":
    main()
