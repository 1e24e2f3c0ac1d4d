"""Owns the claim that a warm start clones the same samples on any number of ranks, from an expert and from recorded episodes."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_processes
from torch import Tensor

from vlarl.datasets.episode import Episode
from vlarl.datasets.write import DatasetWriter, Shape
from vlarl.errors import PlanError
from vlarl.launch.rundir import create
from vlarl.plan.cluster import Cluster
from vlarl.plan.compile import compile_plan
from vlarl.plan.specs import policy_spec, simulator_spec
from vlarl.policies.checkpoint import load_policy
from vlarl.recipe.load import load_recipe
from vlarl.recipe.schema import Warmstart
from vlarl.worker import jobs

DEBUG = Path(__file__).parents[2] / "recipes" / "debug.yaml"
# Two steps a phase. 12 positions draw from 128 slots, which 3 ranks do not divide, and from 2 slots, fewer than those ranks.
COMMON: dict[str, Any] = {"steps": 2, "batch": 12, "learning_rate": 1e-3, "lr_warmup": 0, "log_every": 1}
EXPERT = (Warmstart(pool=300, clumsiness=0.5, **COMMON), Warmstart(pool=2, **COMMON))


def recorded(folder: Path) -> tuple[Warmstart, ...]:
    """Two phases on three short episodes of random frames, states and actions."""
    random = np.random.default_rng(0)
    with DatasetWriter(folder, Shape(("main",), 64, 64, 8, 7), 20, "tabletop", "image") as writer:
        for number, length in enumerate((5, 9, 7)):
            image = random.integers(0, 256, (length, 1, 64, 64, 3), np.uint8)
            state, action = (random.standard_normal((length, width), np.float32) for width in (8, 7))
            reward = np.zeros(length, np.float32)
            writer.add(Episode(image, state, action, reward, f"touch the {('red', 'blue', 'red')[number]} cube", True, (0, number, 0)))
    return (Warmstart(data=str(folder), **COMMON), Warmstart(data=str(folder), **COMMON))


def run_folder(path: Path, phases: tuple[Warmstart, ...], ranks: int) -> Path:
    recipe = load_recipe(DEBUG, [])
    recipe = replace(recipe, dtype="float64", device="cpu", ranks=ranks, threads=1, stall_seconds=100.0, warmstart=phases)
    recipe = replace(recipe, env=replace(recipe.env, parallel=12), log=replace(recipe.log, tensorboard=False, video_every=0))
    plan = compile_plan(recipe, Cluster(cores=4, host_bytes=1 << 40), policy_spec(recipe), simulator_spec(recipe.env))
    return create(path, recipe, plan, 0).path


def _clone(run_dir: Path) -> None:
    torch.set_num_threads(1)
    jobs.run_job("sft", run_dir, jobs.JobOptions())


def cloned(run_dir: Path, ranks: int) -> tuple[Tensor, Tensor]:
    """All weights end to end, and the reported losses, accuracies and distances."""
    run_processes(ranks, _clone, run_dir, seconds=300.0)
    weights = load_policy(str(run_dir / "warmstart"), dtype=torch.float64).module.state_dict()
    rows = [json.loads(line) for line in (run_dir / "warmstart" / "metrics.jsonl").read_text().splitlines()]
    told = torch.tensor([[row[name] for name in ("sft/loss", "sft/accuracy", "sft/error_bins")] for row in rows], dtype=torch.float64)
    return torch.cat([w.flatten() for w in weights.values() if w.is_floating_point()]), told


@pytest.mark.parametrize("source", ["expert", "recorded"])
def test_a_warm_start_is_the_same_on_any_number_of_ranks(tmp_path: Path, source: str) -> None:
    phases = EXPERT if source == "expert" else recorded(tmp_path / "demos")
    weights, told = cloned(run_folder(tmp_path / "1", phases, 1), 1)
    assert told.shape == (4, 3)
    for ranks in (2, 3):
        others, theirs = cloned(run_folder(tmp_path / str(ranks), phases, ranks), ranks)
        assert (others - weights).abs().max() <= 1e-9, (ranks, float((others - weights).abs().max()))
        assert (theirs - told).abs().max() <= 1e-9, (ranks, theirs, told)


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="a phase's batch of 2 does not split over 3 ranks. Use 3"):
        run_folder(tmp_path, (replace(EXPERT[0], batch=2),), 3)
