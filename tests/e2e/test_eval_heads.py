"""`vlarl eval` of heads in side files: an L1 head is evaluated; FiLM and diffusion are refused."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlarl.policies.checkpoint import load_policy, save_policy
from vlarl.policies.openvla_oft import L1Head

ARGUMENTS = ("--episodes", "2", "--set", "train")


def evaluate(folder: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlarl_cli.app", "eval", "--ckpt", str(folder), "--out", str(out), *ARGUMENTS, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped policy with a regression head as its authors publish one: a state dict of their data-parallel wrapper, in a side file."""
    made = tmp_path / "l1"
    policy = load_policy("bundled:tiny-sft")
    save_policy(made, policy, dict(policy.module.state_dict()))
    raw = json.loads((made / "config.json").read_text())
    raw["vlarl"]["head"] = "l1"
    (made / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(0)
    head = L1Head(policy.config.chunk, policy.config.action_dim, policy.spec.hidden_size)
    torch.save({f"module.{name}": tensor for name, tensor in head.state_dict().items()}, made / "action_head--150000_checkpoint.pt")
    return made


@pytest.mark.slow
def test_an_l1_head_is_evaluated(folder: Path, tmp_path: Path) -> None:
    ended = evaluate(folder, tmp_path / "out")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (report,) = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert report["pooled"]["episodes"] == 2
    assert "un-normalised with tabletop" in "".join(file.read_text() for file in (tmp_path / "out" / "logs").glob("*.log"))


@pytest.mark.slow
@pytest.mark.usefixtures("libero")
def test_an_l1_head_is_evaluated_on_the_simulator_of_a_recipe(folder: Path, tmp_path: Path) -> None:
    short = ("env.tasks=[libero_spatial-3]", "env.horizon=8", "env.libero.settle_steps=1", "env.libero.render=fast", "eval.videos=0")
    ended = evaluate(folder, tmp_path / "out", "--recipe", "libero-spatial-tiny-grpo", "--device", "cpu", *short)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (report,) = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (report["pooled"]["episodes"], list(report["tasks"])) == (2, ["libero_spatial-3"])
    assert report["protocol"]["simulator"] == "libero" and report["protocol"]["horizon"] == 8


@pytest.mark.parametrize(("part", "what"), [("vision_backbone", "FiLM"), ("noisy_action_projector", "a diffusion head")])
def test_other_heads_are_refused_before_a_run_folder_is_made(folder: Path, tmp_path: Path, part: str, what: str) -> None:
    torch.save({}, folder / f"{part}--150000_checkpoint.pt")
    ended = evaluate(folder, tmp_path / "out")
    assert ended.returncode == 2
    assert f"{part}--150000_checkpoint.pt: a checkpoint with {what}" in " ".join(ended.stderr.split())
    assert not (tmp_path / "out").exists()
