"""Placement changes speed, never results: one rank and two play the same episodes, sample the same actions and learn the same weights.

In float64, where only a mistake can make a difference.
"""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.ranks import prepare, train_in_ranks
from vlarl.learner.targets import Targets
from vlarl.policies.checkpoint import load_policy
from vlarl.types import TrajectoryBatch

# A policy that knows nothing earns nothing without a shaped reward, and two zero gradients are equal for the wrong reason.
SMALL = ("env.reward=shaped", "eval.every=0", "log.tensorboard=false", "log.video_every=0", "log.histograms_every=0", "checkpoint.every=0")
PPO = ("algorithm.critic_warmup=1", "update.epochs=2")
GRPO = ("algorithm.kind=grpo", "algorithm.group_size=4", "algorithm.episodes_per_update=8", "update.minibatches=3")
OPENVLA = (*PPO, "policy.checkpoint=scratch:tiny-openvla")
COMPARED = ("image_TBVHWC", "state_TBD", "token_TBN", "reward_TBK", "terminated_TBK", "truncated_TBK", "valid_TBK", "active_TB")


def trained(out: Path, ranks: int, *overrides: str) -> Path:
    """A finished run on `ranks` ranks."""
    run_dir = prepare(out, f"ranks={ranks}", *SMALL, *overrides)
    train_in_ranks(run_dir, ranks)
    return run_dir


def rollouts(run_dir: Path, ranks: int) -> list[tuple[TrajectoryBatch, Targets]]:
    return [torch.load(run_dir / f"rollout-rank{r}.pt", weights_only=False) for r in range(ranks)]


def columns(parts: list[Tensor]) -> Tensor:
    """The ranks' columns side by side; a rank whose slots idle early has fewer rows."""
    most = max(len(p) for p in parts)
    return torch.cat([torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in parts], 1)


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "checkpoints" / "update-000002" / "policy" / "model.safetensors")


def largest_difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize("overrides", [PPO, GRPO, OPENVLA], ids=["ppo", "grpo", "openvla"])
def test_one_rank_and_two_learn_the_same(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    alone = trained(tmp_path / "alone", 1, "dtype=float64", *overrides)
    both = trained(tmp_path / "both", 2, "dtype=float64", *overrides)
    (one, target), parts = rollouts(alone, 1)[0], rollouts(both, 2)
    for name in COMPARED:
        assert torch.equal(getattr(one, name), columns([getattr(batch, name) for batch, _ in parts])), name
    assert one.slot_B.tolist() == [slot for batch, _ in parts for slot in batch.slot_B.tolist()]
    played = [e for batch, _ in parts for e in batch.episodes]
    assert sorted(one.episodes, key=lambda e: e.spec.uid) == sorted(played, key=lambda e: e.spec.uid)
    torch.testing.assert_close(columns([batch.logprob_TBN for batch, _ in parts]), one.logprob_TBN, atol=1e-12, rtol=0)
    torch.testing.assert_close(columns([t.advantage_TBJ for _, t in parts]), target.advantage_TBJ, atol=1e-9, rtol=0)
    assert torch.equal(columns([t.keep_TB for _, t in parts]), target.keep_TB) and target.keep_TB.any()
    start = load_policy("scratch:tiny", dtype=torch.float64, seed=1).module.state_dict()
    first, second = weights(alone), weights(both)
    assert {w.dtype for w in first.values()} == {torch.float64}
    assert largest_difference(start, first) > 1e-5  # else equality would say nothing
    assert largest_difference(first, second) < 1e-9
