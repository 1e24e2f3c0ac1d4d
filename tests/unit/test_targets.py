"""From a rollout to advantages, weights and the samples kept, in hand-computed numbers."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from helpers.fakes import blank_batch, episode, one_rank_plan
from vlarl.distributed.mesh import World, init_world, shutdown
from vlarl.learner.targets import grpo_targets, ppo_targets
from vlarl.recipe.schema import Grpo, Ppo
from vlarl.types import EpisodeResult, TrajectoryBatch


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world(one_rank_plan())
    shutdown()


def ppo_batch() -> TrajectoryBatch:
    """Slot 0: a chunk worth 3, then one worth 4 in which the episode is cut off after one action. Slot 1 idles."""
    batch = blank_batch(2, 2)
    batch.reward_TBK[:, 0] = torch.tensor([[1.0, 2.0], [4.0, 99.0]])  # the second action of chunk 1 was not executed
    batch.valid_TBK[:, 0] = torch.tensor([[True, True], [True, False]])
    batch.valid_TBK[:, 1] = False
    batch.truncated_TBK[1, 0, 0] = True
    batch.value_TBJ[:, 0, 0] = torch.tensor([1.0, 2.0])
    batch.final_value_TBJ[1, 0, 0] = 6.0
    return replace(batch, last_value_BJ=torch.full((2, 1), 9.0, dtype=torch.float64))  # of the next episode: must not matter


def test_ppo_advantages_and_returns(world: World) -> None:
    targets = ppo_targets(ppo_batch(), Ppo(gamma=0.5, gae_lambda=0.5, normalize_advantage=False), world)
    # delta_1 = 4 + 0.5 * 6 - 2 = 5; delta_0 = 3 + 0.5 * 2 - 1 = 3; A_0 = 3 + 0.25 * 5.
    assert targets.advantage_TBJ[:, 0, 0].tolist() == [4.25, 5.0]
    assert targets.return_TBJ is not None and targets.return_TBJ[:, 0, 0].tolist() == [5.25, 7.0]
    assert targets.keep_TB.tolist() == [[True, False], [True, False]]
    assert (targets.groups, targets.kept_groups) == (0, 0)


def test_ppo_normalises_over_executed_chunks_only(world: World) -> None:
    targets = ppo_targets(ppo_batch(), Ppo(gamma=0.5, gae_lambda=0.5), world)
    expected = 0.375 / (0.375 + 1e-5)  # mean 4.625, standard deviation 0.375
    torch.testing.assert_close(targets.advantage_TBJ[:, 0, 0], torch.tensor([-expected, expected], dtype=torch.float64))
    assert targets.return_TBJ is not None and targets.return_TBJ[:, 0, 0].tolist() == [5.25, 7.0]  # returns are not normalised


def test_ppo_bootstraps_terminations_only_when_asked(world: World) -> None:
    batch = ppo_batch()
    batch = replace(batch, terminated_TBK=batch.truncated_TBK, truncated_TBK=batch.terminated_TBK)
    settings = Ppo(gamma=0.5, gae_lambda=0.5, normalize_advantage=False)
    assert ppo_targets(batch, settings, world).advantage_TBJ[1, 0, 0] == 4 - 2
    assert ppo_targets(batch, replace(settings, bootstrap="always"), world).advantage_TBJ[1, 0, 0] == 5


def grpo_batch() -> TrajectoryBatch:
    """Two groups of two slots. Group 3: returns 1 and 0; group 4: both 1. Slot 0 has an unfinished episode besides, slot 2 idles."""
    played = ((0, 3, 1.0, 2), (1, 3, 0.0, 4), (2, 4, 1.0, 2), (3, 4, 1.0, 4))  # slot, group, return, length
    rows = tuple(EpisodeResult(episode(s, length, r > 0, group), s, r, r > 0, length, 0) for s, group, r, length in played)
    batch = blank_batch(2, 4)
    batch.valid_TBK[1, 2] = False
    return replace(batch, episodes=rows, episode_TB=torch.tensor([[0, 1, 2, 3], [-1, 1, -1, 3]]))


def test_grpo_advantages_are_within_groups() -> None:
    targets = grpo_targets(grpo_batch(), Grpo(group_size=2), horizon=8)
    unit = 0.5 / (0.5 + 1e-6)  # mean 0.5, standard deviation 0.5
    expected = torch.tensor([[unit, -unit, 0, 0], [0, -unit, 0, 0]], dtype=torch.float64)[..., None]
    torch.testing.assert_close(targets.advantage_TBJ, expected)
    assert targets.return_TBJ is None
    assert targets.keep_TB.tolist() == [[True, True, False, False], [False, True, False, False]]
    assert (targets.groups, targets.kept_groups) == (2, 1)


def test_grpo_weighs_trajectories_alike() -> None:
    targets = grpo_targets(grpo_batch(), Grpo(group_size=2), horizon=8)
    assert targets.weight_TB.tolist() == [[4, 2, 0, 0], [0, 2, 0, 0]]  # horizon / length
    targets = grpo_targets(grpo_batch(), Grpo(group_size=2, length_norm=False), horizon=8)
    assert targets.weight_TB.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0]]


def test_grpo_counts_chunks_where_ratios_are_of_chunks() -> None:
    """Slot 0 plays 1 action and slot 1 plays 3, in 1 and 2 chunks; the horizon of 8 is 4 chunks of 2."""
    batch = grpo_batch()
    assert batch.valid_TBK.shape[-1] == 2
    short = tuple(replace(row, length=length) for row, length in zip(batch.episodes, (1, 3, 2, 4), strict=True))
    targets = grpo_targets(replace(batch, episodes=short), Grpo(group_size=2, logprob="chunk"), horizon=8)
    assert targets.weight_TB.tolist() == [[4, 2, 0, 0], [0, 2, 0, 0]]


def test_grpo_drops_groups_outside_the_filter() -> None:
    batch = grpo_batch()
    assert grpo_targets(batch, Grpo(group_size=2, filter=(0.6, 1.0)), 8).kept_groups == 0  # success rates are 0.5 and 1
    assert not grpo_targets(batch, Grpo(group_size=2, filter=(0.6, 1.0)), 8).keep_TB.any()
    assert grpo_targets(batch, Grpo(group_size=2, filter=(0.1, 0.9)), 8).kept_groups == 1


def test_grpo_without_a_finished_episode() -> None:
    targets = grpo_targets(blank_batch(2, 4), Grpo(group_size=2), horizon=8)
    assert not targets.keep_TB.any() and not targets.weight_TB.any() and (targets.groups, targets.kept_groups) == (0, 0)
