"""Warm start: targets, schedules, the pool of demonstrations, and that cloning learns."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.fakes import A, FakeEnv, K, LinearPolicy, N, episode, one_rank_plan
from vlarl.datasets.read import Recorded
from vlarl.distributed.mesh import World, init_world, shutdown
from vlarl.envs.spec import EpisodeSpec
from vlarl.learner.optim import build_cloning_optimizers
from vlarl.learner.sft import (
    DemonstrationPool,
    ExpertEnv,
    RecordedPool,
    SftProgress,
    clone,
    learning_rate,
    share_of,
    slots_of,
    soft_targets,
)
from vlarl.policies.actions import BINS
from vlarl.recipe.schema import Warmstart
from vlarl.rng import fold
from vlarl.types import Observation


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world(one_rank_plan())
    shutdown()


class Expert(FakeEnv):
    """FakeEnv with an expert: every number of the next action is (episode + actions played) mod 4, in quarters."""

    def expert_chunk(self, chunk: int, clumsiness: float) -> Tensor:
        number = torch.tensor([spec.uid + played if spec else 0 for spec, played in zip(self._episode, self._played, strict=True)])
        return ((number % 4) / 4)[:, None, None].expand(-1, chunk, A).clone()


class Endless:
    """Slot b plays episodes 10 b, 10 b + 1, ... of 3 actions each."""

    def __init__(self) -> None:
        self.count: dict[int, int] = {}

    def next(self, slot: int) -> EpisodeSpec:
        self.count[slot] = self.count.get(slot, -1) + 1
        return episode(10 * slot + self.count[slot], 3, True)


class Codec:
    """Bin = 100 x action."""

    def encode(self, action_BKA: Tensor) -> Tensor:
        return (100 * action_BKA).long().flatten(1)


def demonstrations(
    settings: Warmstart, slots: int, size: int, seed: int = 0, played: range | None = None
) -> tuple[DemonstrationPool, Expert]:
    """played: the slots of this rank; None for all of them."""
    local = range(slots) if played is None else played
    env = Expert(len(local))
    policy = SimpleNamespace(spec=SimpleNamespace(chunk=K), codec=Codec())
    settings = replace(settings, pool=size)
    return DemonstrationPool(env, Endless(), policy, settings, local, slots, fold(seed, 0)), env  # type: ignore[arg-type]


def rank_of(rank: int, ranks: int) -> World:
    return SimpleNamespace(rank=rank, world_size=ranks)  # type: ignore[return-value]


def silent() -> None:
    """Tells nobody."""


def test_soft_targets() -> None:
    hard = soft_targets(torch.tensor([[0, 2]]), 0.0, 4)
    assert hard.tolist() == [[[1, 0, 0, 0], [0, 0, 1, 0]]]
    soft = soft_targets(torch.tensor([[0]]), 1.0, 3)[0, 0]
    weights = torch.tensor([0.0, -0.5, -2.0]).exp()  # a Gaussian cut off at the first bin
    torch.testing.assert_close(soft, weights / weights.sum())


def test_learning_rate_rises_then_falls_to_a_twentieth() -> None:
    settings = Warmstart(steps=100, learning_rate=2.0, lr_warmup=10)
    assert learning_rate(settings, 0) == pytest.approx(2.0 / 10)
    assert learning_rate(settings, 10) == pytest.approx(2.0 * (1 - 0.095))
    assert learning_rate(settings, 100) == pytest.approx(2.0 / 20)


def test_samples_pair_what_is_seen_with_what_the_expert_does() -> None:
    pool, env = demonstrations(Warmstart(steps=1, batch=200), slots=3, size=100)
    for _ in range(8):
        pool.collect()
    assert pool.rounds == 8 and all(index == [0, 1, 2] for index in env.observed)
    obs, token_BN = pool.sample(0, range(200))
    assert obs.image_BVHWC.shape == (200, 1, 2, 2, 3) and token_BN.shape == (200, N)
    uid, played = obs.state_BD.long().unbind(1)
    assert torch.equal(token_BN, (25 * ((uid + played) % 4))[:, None].expand(-1, N))  # labels carry no noise
    assert torch.equal(obs.image_BVHWC[:, 0, 0, 0, 0].long(), uid)
    assert obs.instruction == tuple(f"episode {u}" for u in uid.tolist())
    assert sorted(set(played.tolist())) == [0, 2]  # episodes of 3 actions are two chunks long, then the next one starts
    assert len(set(uid.tolist())) == 12  # 4 episodes in each of 3 slots


def test_the_oldest_samples_are_renewed() -> None:
    pool, _ = demonstrations(Warmstart(steps=1, batch=100), slots=2, size=6)
    for _ in range(20):
        pool.collect()
    obs, _ = pool.sample(0, range(100))
    assert sorted(set(obs.state_BD[:, 0].long().tolist())) == [8, 9, 18, 19]  # the last three of twenty chunks in each slot


def test_executed_actions_are_disturbed_in_a_third_of_the_chunks() -> None:
    pool, env = demonstrations(Warmstart(steps=1, action_noise=0.5), slots=300, size=600)
    expert_BKA = env.expert_chunk(K, 0.0)
    pool.collect()
    executed = env.actions[0]
    moved = (executed[..., :-1] != expert_BKA[..., :-1]).flatten(1).any(1)
    assert 75 <= int(moved.sum()) <= 125  # 100 expected, standard deviation 8
    flipped = (executed[..., -1] != expert_BKA[..., -1]).any(1)
    assert int(flipped.sum()) <= 35  # the gripper: 5 % of the chunks, whole chunks at a time, and no noise
    assert torch.equal(executed[flipped][..., -1], -expert_BKA[flipped][..., -1])
    assert float(executed.abs().max()) <= 1
    quiet, calm = demonstrations(Warmstart(steps=1, action_noise=0.0), slots=300, size=600)
    quiet.collect()
    assert torch.equal(calm.actions[0][..., :-1], expert_BKA[..., :-1])


def test_the_same_seed_gives_the_same_samples() -> None:
    drawn = []
    for seed, step in ((0, 0), (0, 0), (1, 0), (0, 1)):
        pool, _ = demonstrations(Warmstart(steps=1), 3, 100, seed)
        for _ in range(5):
            pool.collect()
        drawn.append(pool.sample(step, range(64))[0].state_BD)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])


def test_every_sample_in_the_rings_is_drawn_equally_often() -> None:
    pool, _ = demonstrations(Warmstart(steps=1, batch=7), slots=3, size=13)  # rings of 4; 7 positions share 3 slots unevenly
    for _ in range(6):
        pool.collect()
    drawn = torch.cat([pool.sample(step, range(7))[0].state_BD for step in range(2000)])
    kinds, counts = drawn.unique(dim=0, return_counts=True)
    assert len(kinds) == 12, "the last four chunks in each of three slots"
    assert (counts - 14000 / 12).abs().max() < 5 * (14000 / 12) ** 0.5


@pytest.mark.parametrize(("ranks", "slots", "batch"), [(2, 8, 12), (3, 8, 12), (4, 2, 12), (12, 8, 12), (5, 1, 5), (3, 100, 6)])
def test_ranks_clone_the_shares_of_the_minibatch_of_one(ranks: int, slots: int, batch: int) -> None:
    """Also where the slots do not divide, or are fewer than the ranks; and what a slot executes does not depend on its neighbours."""
    settings = Warmstart(steps=1, batch=batch, action_noise=0.5)

    def play(played: range) -> tuple[DemonstrationPool, list[Tensor]]:
        pool, env = demonstrations(settings, slots, size=3 * slots, played=played)
        for _ in range(5):
            pool.collect()
        return pool, env.actions

    whole, executed = play(range(slots))
    shares = [share_of(rank_of(rank, ranks), batch) for rank in range(ranks)]
    assert [p for share in shares for p in share] == list(range(batch)) and {len(share) for share in shares} == {batch // ranks}
    seen: list[Observation] = []
    for share in shares:
        played = slots_of(share, batch, slots)
        part, acted = play(played)
        assert all(torch.equal(mine, all_[played.start : played.stop]) for mine, all_ in zip(acted, executed, strict=True))
        obs, token_BN = part.sample(9, share)
        assert torch.equal(token_BN, whole.sample(9, share)[1])
        seen.append(obs)
    expected = whole.sample(9, range(batch))[0]
    assert torch.equal(torch.cat([obs.state_BD for obs in seen]), expected.state_BD)
    assert torch.equal(torch.cat([obs.image_BVHWC for obs in seen]), expected.image_BVHWC)
    assert sum((obs.instruction for obs in seen), ()) == expected.instruction


def test_the_fake_expert_is_an_expert_and_the_plain_simulator_is_none() -> None:
    assert isinstance(Expert(1), ExpertEnv) and not isinstance(FakeEnv(1), ExpertEnv)


def test_cloning_learns_and_reports(world: World) -> None:
    settings = Warmstart(steps=60, batch=32, learning_rate=0.05, lr_warmup=5, log_every=25, pool=300)
    policy = LinearPolicy(world, torch.float32, bins=BINS, whole=True)
    pool, _ = demonstrations(settings, slots=30, size=300)
    reports: list[SftProgress] = []
    beats: list[int] = []
    optimizers = build_cloning_optimizers(policy.module, 1.0, 0.0)
    clone(policy, optimizers, pool, settings, world, lambda: beats.append(pool.rounds), reports.append)  # type: ignore[arg-type]
    assert [r.step for r in reports] == [25, 50, 60]
    assert beats[:11] == list(range(11)), "while the pool first fills, too"
    assert len(beats) == pool.rounds + settings.steps
    assert pool.rounds == 11  # the first fill: 300 samples; 59 x 32 seen ones are six times 10.5 rounds
    assert 0 < reports[-1].loss < 0.5 * reports[0].loss
    assert reports[-1].accuracy > 0.2 and reports[-1].error < 40  # four actions, 25 bins apart


def recorded_pool(seed: int) -> RecordedPool:
    """Two episodes of 3 and 2 frames; frame n shows n, its action is n / 100 in every number."""
    number = np.arange(5, dtype=np.float32)
    image, action = np.zeros((5, 1, 2, 2, 3), np.uint8), np.repeat(number[:, None] / 100, A, 1)
    image += number.astype(np.uint8)[:, None, None, None, None]
    data = Recorded(image, number[:, None], action, np.array([0, 0, 0, 1, 1]), ("a", "a", "a", "b", "b"))
    policy = SimpleNamespace(spec=SimpleNamespace(chunk=K), codec=Codec(), device=torch.device("cpu"))
    return RecordedPool(data, policy, fold(seed, 0))  # type: ignore[arg-type]


def test_recorded_frames_come_with_the_actions_that_followed() -> None:
    pool = recorded_pool(3)
    pool.provide(10**6, silent)
    obs, token_BN = pool.sample(4, range(200))
    assert set(obs.state_BD[:, 0].tolist()) == {0, 1, 2, 3, 4}
    for frame, image, sentence, tokens in zip(obs.state_BD[:, 0].tolist(), obs.image_BVHWC, obs.instruction, token_BN, strict=True):
        last = 2 if frame < 3 else 4
        expected = [min(int(frame) + k, last) for k in range(K) for _ in range(A)]
        assert (image == frame).all() and sentence == ("a" if frame < 3 else "b")
        assert all(abs(got - wanted) <= 1 for got, wanted in zip(tokens.tolist(), expected, strict=True)), "the codec cuts to whole bins"
    again, other = recorded_pool(3).sample(4, range(200))[1], recorded_pool(4).sample(4, range(200))[1]
    later = pool.sample(5, range(200))[1]
    assert torch.equal(again, token_BN) and not torch.equal(other, token_BN) and not torch.equal(later, token_BN)
    parts = [pool.sample(4, share_of(rank_of(rank, 4), 200))[1] for rank in range(4)]
    assert torch.equal(torch.cat(parts), token_BN), "ranks take their shares of the same minibatch"
