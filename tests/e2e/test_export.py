"""Runs with adapters: they resume exactly without their frozen weights stored, and `vlarl export` writes them apart and merged."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from helpers.ranks import prepare, train_in_ranks
from vlarl.distributed.manifest import latest

SETTINGS = ("device=cpu", "ranks=1", "threads=1", "env.reward=shaped", "update.updates=1", "eval.every=0", "log.video_every=0")
SETTINGS += ("algorithm.critic_warmup=0",)
LORA = ("policy.checkpoint=bundled:tiny-sft", "policy.lora={rank: 2, alpha: 4}", "update.learning_rate=1.0e-3")


def vlarl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlarl_cli.app", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def test_a_run_with_adapters_resumes_exactly_and_stores_no_frozen_weight(tmp_path: Path) -> None:
    quiet = ("log.tensorboard=false", "log.histograms_every=0")
    whole = prepare(tmp_path / "whole", *SETTINGS, *LORA, *quiet, "update.updates=2")
    train_in_ranks(whole, 1)
    for updates in (1, 2):
        parts = prepare(tmp_path / "parts", *SETTINGS, *LORA, *quiet, f"update.updates={updates}")
        train_in_ranks(parts, 1, resume=updates == 2)
    first, second = (latest(run) for run in (whole, parts))
    assert first is not None and second is not None and first.name == second.name == "update-000002"
    one, two = (load_file(folder / "policy" / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_B" in name)
    stored = FileSystemReader(first / "state").read_metadata().state_dict_metadata
    assert stored and all(".lora_" in key or ".value_head." in key for key in stored)


def test_a_run_trains_on_an_adapter_and_resumes(tmp_path: Path) -> None:
    """Its reference is the adapter as it was, kept apart too: before the first step there is no KL at all."""
    quiet = ("log.tensorboard=false", "log.histograms_every=0", "update.minibatches=1")
    first = prepare(tmp_path / "first", *SETTINGS, *LORA, *quiet)
    train_in_ranks(first, 1)
    before = latest(first)
    assert before is not None
    on = (f"policy.adapter={before / 'policy'}", "policy.lora={rank: 2, start: adapter}", "policy.freeze=[vision]", "algorithm.kl_coef=0.1")
    ends = []
    for name, stops in (("whole", (2,)), ("parts", (1, 2))):
        for updates in stops:
            run = prepare(tmp_path / name, *SETTINGS, *LORA, *quiet, *on, f"update.updates={updates}")
            train_in_ranks(run, 1, resume=updates == 2 and name == "parts")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert rows[0]["update/kl_reference"] == 0 and rows[0]["update/logprob_gap"] < 1e-5
        newest = latest(run)
        assert newest is not None
        ends.append(load_file(newest / "policy" / "adapter_model.safetensors"))
    start = load_file(before / "policy" / "adapter_model.safetensors")
    assert start.keys() == ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    changed = {name for name in start if not torch.equal(start[name], ends[0][name])}
    assert changed and not any("vision_backbone" in name for name in changed)
    assert json.loads((newest / "policy" / "adapter_config.json").read_text())["lora_alpha"] == 4


@pytest.mark.slow
def test_a_run_with_adapters_is_exported_apart_and_merged(tmp_path: Path) -> None:
    run = prepare(tmp_path / "run", *SETTINGS, *LORA)
    train_in_ranks(run, 1)
    for flags, layout, file in [((), "adapter", "adapter_model.safetensors"), (("--merge-lora",), "model", "model.safetensors")]:
        out = tmp_path / layout
        ended = vlarl("export", "--ckpt", str(run), "--out", str(out), *flags)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        manifest = json.loads((out / "export.json").read_text())
        assert manifest["layout"] == layout and file in manifest["files"]
        in_training, files = manifest["comparisons"]
        assert "in training" in in_training["with"] and "apart, as trained" in files["with"]
        assert all(c["dtype"] == "float32" and c["max_logit_difference"] < 1e-3 for c in (in_training, files))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", "run"]
    assert vlarl("export", "--ckpt", str(run), "--out", str(tmp_path / "model")).returncode == 2
