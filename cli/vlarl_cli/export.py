"""Owns `vlarl export` on the control side: which policy, where to, the two processes that write and verify it, what is printed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from vlarl.errors import CheckpointError, MachineError, WorkerError
from vlarl.launch.rundir import check_space
from vlarl.policies.adapter import stored_weights
from vlarl.policies.layout import resolve_folder
from vlarl_cli import render
from vlarl_cli.evaluate import find_policy


def export(checkpoint: str, out: Path, merge_lora: bool, shard_gb: float) -> int:
    """Write and verify; `out` appears complete or not at all. Returns the exit code."""
    source, _ = find_policy(checkpoint)
    resolve_folder(source)
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MachineError(f"{out} exists already and is not an empty folder.", "Name another folder with --out.")
    stored, _, _ = stored_weights(source, None)
    check_space(out, sum(tensor.bytes for tensor in stored.values()))
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        options = ["--shard-bytes", str(int(shard_gb * 1e9))] + ["--merge-lora"] * merge_lora
        render.note(f"writing {out}")
        _step("write", source, str(draft), *options)
        render.note("loading it in a fresh process")
        manifest = _step("verify", str(draft))
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except OSError as error:
        raise MachineError(f"{out} cannot be written: {error.strerror or error}.", "Name another folder with --out.") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    rows = [
        ["layout", manifest["layout"]],
        ["compared with", manifest["compared_with"]],
        ["largest difference of a logit", f"{manifest['max_logit_difference']:.3g}"],
        ["size", f"{sum(file['bytes'] for file in manifest['files'].values()) / 1e9:.3g} GB"],
    ]
    table = {"title": "export", "columns": ["what", "value"], "rows": rows}
    render.result({"table": table, "notes": [f"Policy: {out}", f"Evaluate: vlarl eval --ckpt {out}"]})
    return 0


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
