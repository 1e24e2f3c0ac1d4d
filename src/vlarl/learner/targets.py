"""Owns what a rollout teaches: from a TrajectoryBatch to advantages, returns, weights and the samples worth learning from."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlarl.algorithms.advantages import gae, group_advantage, length_weight, moments, normalize
from vlarl.distributed.mesh import World
from vlarl.distributed.reduce import all_reduce_sum
from vlarl.recipe.schema import Grpo, Ppo
from vlarl.types import TrajectoryBatch


@dataclass(frozen=True)
class Targets:
    """advantage_TBJ float; return_TBJ float (None without a critic); keep_TB bool: samples to learn from; weight_TB float32: of a sample's
    entries in the policy loss. groups, kept_groups: GRPO groups on this rank and those with a signal."""

    advantage_TBJ: Tensor
    return_TBJ: Tensor | None
    keep_TB: Tensor
    weight_TB: Tensor
    groups: int
    kept_groups: int


def ppo_targets(batch: TrajectoryBatch, algorithm: Ppo, world: World) -> Targets:
    """Generalised advantages, normalised over the samples of all ranks."""
    advantage_TBJ, return_TBJ = gae(
        batch.reward_TBK,
        batch.value_TBJ,
        batch.last_value_BJ,
        batch.final_value_TBJ,
        batch.terminated_TBK,
        batch.truncated_TBK,
        batch.valid_TBK,
        algorithm.gamma,
        algorithm.gae_lambda,
        algorithm.bootstrap,
    )
    if algorithm.normalize_advantage:
        J = advantage_TBJ.shape[-1]
        mask_TBJ = batch.valid_TBK if J > 1 else batch.valid_TBK.any(-1, keepdim=True)
        advantage_TBJ = normalize(advantage_TBJ, all_reduce_sum(world, moments(advantage_TBJ, mask_TBJ)))
    keep_TB = batch.valid_TBK.any(-1)
    return Targets(advantage_TBJ, return_TBJ, keep_TB, torch.ones_like(keep_TB, dtype=torch.float32), 0, 0)


def grpo_targets(batch: TrajectoryBatch, algorithm: Grpo, horizon: int) -> Targets:
    """Group-relative advantages; samples of groups without a signal are not kept. Groups never straddle ranks."""
    rows = batch.episodes
    group_E = torch.tensor([r.spec.group for r in rows], dtype=torch.int64)
    return_E = torch.tensor([r.return_ for r in rows], dtype=torch.float64)
    success_E = torch.tensor([r.success for r in rows], dtype=torch.bool)
    advantage_E, keep_E = group_advantage(return_E, group_E, success_E, algorithm.filter)
    finished_TB = batch.episode_TB >= 0
    episode_TB = batch.episode_TB.clamp(min=0)
    keep_TB = finished_TB & batch.valid_TBK.any(-1)
    # In units of what a ratio is of: a chunk cut short by its episode's end is one chunk like the others.
    if algorithm.logprob == "chunk":
        length_E = torch.bincount(episode_TB[keep_TB], minlength=len(rows))
        horizon = -(-horizon // batch.valid_TBK.shape[-1])
    else:
        length_E = torch.tensor([r.length for r in rows])
    weight_E = length_weight(length_E, horizon) if algorithm.length_norm else torch.ones(len(rows))
    advantage_TB1 = torch.zeros(*keep_TB.shape, 1, dtype=batch.logprob_TBN.dtype)
    weight_TB = torch.zeros(keep_TB.shape)
    if rows:
        keep_TB = keep_TB & keep_E[episode_TB]
        advantage_TB1 = torch.where(keep_TB, advantage_E[episode_TB], 0.0)[..., None].to(advantage_TB1.dtype)
        weight_TB = torch.where(keep_TB, weight_E[episode_TB], 0.0)
    groups, kept = len(group_E.unique()), len(group_E[keep_E].unique())
    return Targets(advantage_TB1, None, keep_TB, weight_TB, groups, kept)
