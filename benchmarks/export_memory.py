"""Measures the peak of private memory and of disk while adapters are merged into a generated base by `vlarl export --merge-lora`.

    python benchmarks/export_memory.py --gigabytes 0.3 --json FILE

Two figures of memory: of the process that writes, which also loads the policy once in float32 to know its logits; and, with --apart, of
the writing alone.
"""
from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load_memory import GB, Peak, emit, resident, write_checkpoint

RANK = 16


def write_adapter(base: Path, folder: Path) -> None:
    """Random factors for every linear layer of the base's Llama, but lm_head."""
    import torch
    from safetensors.torch import save_file

    from vlarl.policies.adapter import PREFIX, config_of
    from vlarl.policies.weight_files import read_weights

    factors, layers = {}, []
    for name, tensor in read_weights(base).items():
        if "_proj.weight" in name and name.startswith("language_model.model.layers."):
            layer, (rows, columns) = name.removesuffix(".weight"), tensor.shape
            factors[f"{PREFIX}{layer}.lora_A.weight"] = torch.randn(RANK, columns) / RANK
            factors[f"{PREFIX}{layer}.lora_B.weight"] = torch.randn(rows, RANK) * 1e-3
            layers.append(layer)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config_of(str(base), RANK, 16.0, layers)))
    for path in base.iterdir():
        if not path.name.startswith("model"):
            shutil.copyfile(path, folder / path.name)


def watched(command: list[str], folder: Path) -> dict[str, float]:
    """A process's peak of anonymous memory and what `folder` held at most meanwhile, looked at every few milliseconds."""
    process, anonymous, disk = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0, 0
    while process.poll() is None:
        try:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            anonymous = max(anonymous, int(lines["RssAnon"].split()[0]) * 1024)
            disk = max(disk, sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()))
        except (OSError, KeyError, IndexError):
            pass  # it ended, or a file was renamed, between two looks
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{command} ended with code {process.returncode}")
    return {"private_gb": round(anonymous / GB, 3), "disk_gb": round(disk / GB, 3)}


def write_alone(source: Path, out: Path) -> dict[str, float]:
    """What the writing takes above torch and its libraries."""
    import torch

    from vlarl.policies.adapter import stored_weights
    from vlarl.policies.weights import write_merged

    torch.zeros(1)
    stored, _, adapter = stored_weights(str(source), None)
    before, peak = resident(), Peak()
    write_merged(out, stored, adapter, None, 5_000_000_000)
    peak.stop()
    return {"private_gb": round((peak.anonymous - before[0]) / GB, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.3)
    parser.add_argument("--apart", action="store_true", help="also the writing alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base, policy, work = (Path(name) / part for part in ("base", "policy", "work"))
        for folder in (base, policy, work / "out"):
            folder.mkdir(parents=True)
        result: dict[str, object] = {"base_gb": round(write_checkpoint(base, options.gigabytes) / GB, 3)}
        write_adapter(base, policy)
        command = [sys.executable, "-m", "vlarl.worker.export"]
        result["idle"] = watched([sys.executable, "-c", "import vlarl.worker.export, time; time.sleep(1)"], work)
        result["write"] = watched([*command, "write", str(policy), str(work / "out"), "--merge-lora"], work)
        result["out_gb"] = round(sum(path.stat().st_size for path in (work / "out").iterdir()) / GB, 3)
        result["verify"] = watched([*command, "verify", str(work / "out")], work)
        if options.apart:
            (work / "alone").mkdir()
            result["write_alone"] = write_alone(policy, work / "alone")
    emit(result, options.json)


if __name__ == "__main__":
    main()
