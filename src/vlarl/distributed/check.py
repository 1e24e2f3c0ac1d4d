"""Owns the check of torch on this machine: `python -m vlarl.distributed.check [--cuda]`, in a process of its own, which it may take down.

The last line that it prints is JSON: {"devices": what computed and was summed between ranks, one text each}. Anything that fails ends it.
"""
from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from vlarl.distributed.mesh import use_loopback

SIDE = 256  # of the matrices that are multiplied


def check_device(device: torch.device) -> str:
    """Multiply in the dtype of acting and sum over a group of one rank, on this device. Returns what it is."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    product = torch.ones(SIDE, SIDE, device=device, dtype=dtype) @ torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    total = product.float().sum()
    dist.all_reduce(total)
    dist.destroy_process_group()
    assert total.item() == SIDE**3, f"{device} multiplied wrongly: {total.item()}"
    if not cuda:
        return f"float32 on {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()}), gloo"
    properties = torch.cuda.get_device_properties(device)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB, bfloat16, NCCL {nccl}"


def main() -> None:
    use_loopback()
    count = torch.cuda.device_count() if "--cuda" in sys.argv[1:] else 0
    devices = [torch.device("cuda", n) for n in range(count)] or [torch.device("cpu")]
    found = []
    for device in devices:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        found.append(check_device(device))
    print(json.dumps({"devices": found}))


if __name__ == "__main__":
    main()
