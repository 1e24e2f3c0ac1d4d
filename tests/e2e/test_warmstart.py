"""The shipped supervised policy is as its recipe makes it: the first steps of that recipe, run again, give figures like those on record.

Not the same: samples were drawn otherwise when that policy was made, by code whose draws depended on the number of ranks.
"""
from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest

ASSET = Path(str(resources.files("vlarl"))) / "assets" / "tiny-sft"
WAIT_SECONDS = 500


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_weights_are_those_on_record() -> None:
    provenance = json.loads((ASSET / "provenance.json").read_text())
    weights = (ASSET / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == provenance["sha256"]
    assert len(weights) <= 8_000_000
    assert rows(ASSET / "metrics.jsonl")[-1]["step"] == provenance["steps"]


@pytest.mark.slow
def test_the_recipe_reproduces_the_first_steps(tmp_path: Path) -> None:
    """100 optimiser steps; samples are others and processors round differently, so the means are compared, not the weights."""
    recorded = rows(ASSET / "metrics.jsonl")[0]
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vlarl_cli.app", "sft", "quickstart-warmstart", "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not rows(run / "warmstart" / "metrics.jsonl") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    again = rows(run / "warmstart" / "metrics.jsonl")
    assert again, f"no step in {WAIT_SECONDS} s: {errors}"
    assert again[0]["step"] == recorded["step"] == 100
    assert again[0]["sft/loss"] == pytest.approx(recorded["sft/loss"], rel=0.02)
    assert again[0]["sft/error_bins"] == pytest.approx(recorded["sft/error_bins"], rel=0.03)
