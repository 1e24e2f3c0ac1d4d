"""Owns `vlarl export` on the control side: which policy, where to, the two processes that write and verify it, what is printed."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vlarl.errors import CheckpointError, MachineError, RecipeError, WorkerError
from vlarl.launch.rundir import check_space
from vlarl.policies.adapter import stored_weights
from vlarl.policies.layout import SIDE_FILE, STATED, resolve_folder, stated_settings
from vlarl.policies.weight_files import VALUE_HEAD
from vlarl.recipe.document import overrides
from vlarl.recipe.schema import Policy
from vlarl_cli import render
from vlarl_cli.evaluate import find_policy

BYTES = {"float32": 4, "bfloat16": 2}  # of a number, by --dtype
FLOATS = ("F64", "F32", "BF16", "F16")  # what --dtype changes, as safetensors spells it
BESIDE = 16 << 20  # tokenizer, settings, logits


@dataclass(frozen=True)
class ExportOptions:
    """dtype: float32, bfloat16, or None: as stored. policy: `KEY=VALUE` items of a recipe's `policy` section, as in `vlarl eval`."""

    merge_lora: bool
    shard_gb: float
    dtype: str | None
    policy: tuple[str, ...]


def export(checkpoint: str, out: Path, options: ExportOptions) -> int:
    """Write and verify; `out` appears complete or not at all. Returns the exit code."""
    source, run_dir = find_policy(checkpoint)
    resolve_folder(source)
    stated = _stated(source, options.policy)
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MachineError(f"{out} exists already and is not an empty folder.", "Name another folder with --out.")
    check_space(out, output_bytes(source, options.merge_lora, options.dtype))
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        flags = ["--shard-bytes", str(int(options.shard_gb * 1e9)), "--stated", json.dumps(stated)]
        flags += ["--merge-lora"] * options.merge_lora + (["--dtype", options.dtype] if options.dtype is not None else [])
        flags += ["--run", str(run_dir)] if run_dir is not None else []
        render.note(f"writing {out}")
        _step("write", source, str(draft), *flags)
        render.note("loading it in a fresh process")
        manifest = _step("verify", str(draft))
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except OSError as error:
        raise MachineError(f"{out} cannot be written: {error.strerror or error}.", "Name another folder with --out.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    rows = [["layout", manifest["layout"]], ["weights", manifest["dtype"]]]
    for c in manifest["comparisons"]:
        difference = f"{c['max_logit_difference']:.3g} (at most {c['limit']:.3g} may be rounding)"
        rows += [["compared with", f"{c['with']} ({c['dtype']})"], ["largest difference of a logit", difference]]
    rows.append(["size", f"{sum(file['bytes'] for file in manifest['files'].values()) / 1e9:.3g} GB"])
    table = {"title": "export", "columns": ["what", "value"], "rows": rows}
    render.result({"table": table, "notes": [f"Policy: {out}", f"Evaluate: vlarl eval --ckpt {out}"]})
    return 0


def output_bytes(source: str, merge: bool, dtype: str | None) -> int:
    """What the export takes on disk. Reading it back takes no room there."""
    stored, base, adapter = stored_weights(source, None)
    if adapter is not None and not merge:
        factors = [tensor for pair in adapter.layers.values() for tensor in pair] + list(adapter.whole.values())
        head = [tensor for name, tensor in stored.items() if name.startswith(VALUE_HEAD)]
        return sum(tensor.bytes for tensor in (*factors, *head)) + BESIDE
    total = sum(path.stat().st_size for path in base.glob(SIDE_FILE.format("*")))
    for tensor in stored.values():
        changed = dtype is not None and tensor.dtype in FLOATS
        total += math.prod(tensor.shape) * BYTES[dtype] if changed and dtype is not None else tensor.bytes
    return total + BESIDE


def _stated(source: str, items: tuple[str, ...]) -> dict[str, Any]:
    """What `--policy` says, as the torch side takes it. RecipeError for what it cannot say."""
    document = overrides([f"policy.{item}" for item in items])
    problems = list(document.problems)
    given = document.values.get("policy", {})
    known = ("kind", *STATED, "unnorm_key")
    problems += [f"--policy {name}: an export does not use it. Known: {', '.join(known)}." for name in given if name not in known]
    if not problems:
        try:
            policy = TypeAdapter(Policy).validate_json(json.dumps({"checkpoint": source, **given}), strict=True)
            return stated_settings(policy) | ({"unnorm_key": policy.unnorm_key} if policy.unnorm_key is not None else {})
        except ValidationError as error:
            problems = [f"--policy {'.'.join(map(str, e['loc']))}: {e['msg']}." for e in error.errors(include_url=False)]
    raise RecipeError(problems, "vlarl export")


def _step(*arguments: str) -> dict[str, Any]:
    """One process of the torch side; its answer. Its failure is raised here."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "vlarl.worker.export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise WorkerError(f"The process that exports ({arguments[0]}) ended with code {done.returncode}: {last}") from None
    if done.returncode:
        raise CheckpointError(answer["message"], answer["hint"])
    return answer
