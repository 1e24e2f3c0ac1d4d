"""Recording of rollouts: columns, episodes across collections, bootstrap values, stages, joining of batches."""
from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from helpers.fakes import A, FakeEnv, FakePolicy, K, N, NoSpans, episode
from vlarl.envs.pool import FinalFrames, LocalPool
from vlarl.envs.spec import EpisodeSpec
from vlarl.rollout.collector import Collector, concatenate
from vlarl.rollout.episodes import ListFeed
from vlarl.rollout.play import Sampler
from vlarl.types import TrajectoryBatch

# Slot 0 plays 0 (3 actions, success), 2 (4, failure), 4; slot 1 plays 1 (2, failure), 3 (8, success).
ROWS = [episode(0, 3, True), episode(1, 2, False), episode(2, 4, False), episode(3, 8, True), episode(4, 20, True), episode(5, 20, True)]


def build(
    rows: list[EpisodeSpec], max_chunks: int, values: int = 1, final_frames: FinalFrames = "truncated", stages: int = 1, slots: int = 2
) -> tuple[Collector, LocalPool, Sampler]:
    envs = [FakeEnv(slots // stages) for _ in range(stages)]
    pool = LocalPool(envs, 4, slots // stages, K, _From(rows, slots), final_frames)
    return Collector(pool, max_chunks, K, N, values, torch.float32), pool, Sampler(FakePolicy(), 7, N, 1.0, 0)


class _From:
    """A ListFeed for slots that count from 4."""

    def __init__(self, rows: list[EpisodeSpec], slots: int) -> None:
        self.feed = ListFeed(rows, slots)

    def next(self, slot: int) -> EpisodeSpec | None:
        return self.feed.next(slot - 4)


def returns(uid: int, first: int, last: int) -> float:
    """Sum of the rewards 100 uid + n of actions first..last."""
    return float(sum(100 * uid + n for n in range(first, last + 1)))


def test_columns_are_slots_and_rows_are_chunks() -> None:
    collector, _, sampler = build(ROWS, max_chunks=3)
    batch = collector.collect(sampler, NoSpans(), policy_version=5)
    # Slot 4 (column 0): episode 0 in chunks 0, 1; episode 2 in chunk 2. Slot 5: episode 1 in chunk 0; episode 3 in chunks 1, 2.
    assert batch.slot_B.tolist() == [4, 5]
    assert batch.state_TBD[..., 0].tolist() == [[0, 1], [0, 3], [2, 3]]
    assert batch.state_TBD[..., 1].tolist() == [[0, 0], [2, 0], [0, 2]]
    assert batch.image_TBVHWC[2, 0, 0, 1, 1].tolist() == [2, 0, 255]
    assert [[batch.instructions[i] for i in row] for row in batch.instruction_TB.tolist()] == [
        ["episode 0", "episode 1"],
        ["episode 0", "episode 3"],
        ["episode 2", "episode 3"],
    ]
    assert batch.reward_TBK.tolist() == [[[1, 2], [101, 102]], [[3, 0], [301, 302]], [[201, 202], [303, 304]]]
    assert batch.valid_TBK.tolist() == [[[True, True], [True, True]], [[True, False], [True, True]], [[True, True], [True, True]]]
    assert batch.terminated_TBK.nonzero().tolist() == [[1, 0, 0]]
    assert batch.truncated_TBK.nonzero().tolist() == [[0, 1, 1]]
    assert batch.value_TBJ[..., 0].tolist() == [[0, 1000], [2, 3000], [2000, 3002]]  # 1000 uid + actions played
    assert batch.active_TB.all() and batch.policy_version == 5
    assert batch.token_TBN.shape == (3, 2, N) and torch.equal(batch.token_TBN, (-batch.logprob_TBN * 256).long())


def test_bootstrap_values() -> None:
    collector, _, sampler = build(ROWS, max_chunks=3)
    batch = collector.collect(sampler, NoSpans(), 0)
    assert batch.final_value_TBJ.nonzero().tolist() == [[0, 1, 0]]  # only episode 1 was truncated
    assert batch.final_value_TBJ[0, 1, 0] == 1002.0
    assert batch.last_value_BJ[:, 0].tolist() == [2002.0, 3004.0]  # of the frames after the last chunk
    collector, _, sampler = build(ROWS, max_chunks=3, final_frames="all")
    batch = collector.collect(sampler, NoSpans(), 0)
    assert batch.final_value_TBJ[..., 0].tolist() == [[0, 1002], [3, 0], [0, 0]]


def test_episodes_of_a_collection() -> None:
    collector, _, sampler = build(ROWS, max_chunks=3)
    batch = collector.collect(sampler, NoSpans(), 5)
    assert [(e.spec.uid, e.slot, e.return_, e.success, e.length, e.policy_version) for e in batch.episodes] == [
        (1, 5, returns(1, 1, 2), False, 2, 5),
        (0, 4, returns(0, 1, 3), True, 3, 5),
    ]
    assert batch.episode_TB.tolist() == [[1, 0], [1, -1], [-1, -1]]  # rows of `episodes`; open ones have none yet


def test_open_episodes_go_on_in_the_next_collection() -> None:
    collector, _, sampler = build(ROWS, max_chunks=3)
    collector.collect(sampler, NoSpans(), 0)
    batch = collector.collect(sampler, NoSpans(), 1)
    # Slot 4: episode 2 ends after chunk 0 (4 actions), then 4. Slot 5: episode 3 ends after chunk 1 (8 actions), then 5.
    assert batch.state_TBD.tolist() == [[[2, 2], [3, 4]], [[4, 0], [3, 6]], [[4, 2], [5, 0]]]
    assert [(e.spec.uid, e.return_, e.success, e.length) for e in batch.episodes] == [
        (2, returns(2, 1, 4), False, 4),
        (3, returns(3, 1, 8), True, 8),
    ]
    assert batch.episode_TB.tolist() == [[0, 1], [-1, 1], [-1, -1]]
    assert batch.last_value_BJ[:, 0].tolist() == [4004.0, 5002.0]
    assert batch.instructions == ("episode 2", "episode 3", "episode 4", "episode 5")


def test_open_episodes_survive_a_save() -> None:
    collector, pool, sampler = build(ROWS, max_chunks=3)
    collector.collect(sampler, NoSpans(), 0)
    resumed, other, _ = build(ROWS, max_chunks=3)
    other.load_state_dict(pool.state_dict())
    other._feed = pool._feed
    resumed.load_state_dict(collector.state_dict())
    batch = resumed.collect(sampler, NoSpans(), 1)
    assert [(e.spec.uid, e.return_, e.length) for e in batch.episodes] == [(2, returns(2, 1, 4), 4), (3, returns(3, 1, 8), 8)]


def test_without_a_critic_the_batch_ends_with_its_last_episode() -> None:
    rows = [episode(0, 3, True), episode(1, 2, False)]
    collector, _, sampler = build(rows, max_chunks=10, values=0, final_frames="none")
    batch = collector.collect(sampler, NoSpans(), 0)
    assert batch.reward_TBK.shape == (2, 2, K)
    assert batch.active_TB.tolist() == [[True, True], [True, False]]
    assert batch.episode_TB.tolist() == [[1, 0], [1, -1]]
    assert not batch.value_TBJ.any() and not batch.last_value_BJ.any()
    assert not batch.image_TBVHWC[1, 1].any()  # idle


def test_two_stages_record_what_one_does() -> None:
    rows = [episode(u, 2 + u % 5, u % 3 > 0) for u in range(24)]
    batches = []
    for stages in (1, 2):
        collector, _, sampler = build(rows, max_chunks=5, stages=stages, slots=4)
        batches.append(collector.collect(sampler, NoSpans(), 0))
    one, two = batches
    for f in fields(TrajectoryBatch):
        a, b = getattr(one, f.name), getattr(two, f.name)
        if isinstance(a, Tensor) and f.name not in ("episode_TB", "instruction_TB"):  # numbered in the order of their end or appearance
            assert torch.equal(a, b), f.name
    assert sorted(one.episodes, key=lambda e: e.spec.uid) == sorted(two.episodes, key=lambda e: e.spec.uid)
    for batch in batches:
        named = [[batch.instructions[i] for i in row] for row in batch.instruction_TB.tolist()]
        assert named == [[f"episode {int(u)}" for u in row] for row in batch.state_TBD[..., 0].tolist()]
        rows_TB = [[batch.episodes[e].spec.uid if e >= 0 else None for e in row] for row in batch.episode_TB.tolist()]
        finished = {e.spec.uid for e in batch.episodes}
        assert rows_TB == [[int(u) if int(u) in finished else None for u in row] for row in batch.state_TBD[..., 0].tolist()]


def test_action_level_values_are_recorded_per_action() -> None:
    class TwoValues(FakePolicy):
        def act(self, *arguments):  # type: ignore[no-untyped-def]
            chunk = super().act(*arguments)
            return replace(chunk, value_BJ=torch.cat([chunk.value_BJ, chunk.value_BJ + 0.5], 1))

    collector, _, _ = build(ROWS, max_chunks=2, values=K)
    batch = collector.collect(Sampler(TwoValues(), 7, N, 1.0, 0), NoSpans(), 0)
    assert batch.value_TBJ.tolist() == [[[0, 0.5], [1000, 1000.5]], [[2, 2.5], [3000, 3000.5]]]
    assert batch.last_value_BJ.tolist() == [[2000, 2000.5], [3002, 3002.5]]


def test_the_next_collection_overwrites_what_was_not_cloned() -> None:
    collector, _, sampler = build(ROWS, max_chunks=1)
    view = collector.collect(sampler, NoSpans(), 0)
    kept = view.clone()
    collector.collect(sampler, NoSpans(), 0)
    assert kept.state_TBD[..., 1].tolist() == [[0, 0]] and view.state_TBD[..., 1].tolist() == [[2, 0]]


def test_concatenate_joins_in_time_and_renumbers() -> None:
    rows = [episode(0, 3, True), episode(1, 2, False), episode(2, 2, False), episode(3, 4, True)]
    feed = _From(rows[:2], 2)
    pool = LocalPool([FakeEnv(2)], 4, 2, K, feed, "none")
    collector, sampler = Collector(pool, 10, K, N, 0, torch.float32), Sampler(FakePolicy(), 7, N, 1.0, 0)
    first = collector.collect(sampler, NoSpans(), 0).clone()
    feed.feed = ListFeed(rows[2:], 2)
    second = collector.collect(sampler, NoSpans(), 0)
    both = concatenate(first, second)
    assert [e.spec.uid for e in both.episodes] == [1, 0, 2, 3]
    assert both.episode_TB.tolist() == [[1, 0], [1, -1], [2, 3], [-1, 3]]
    assert both.state_TBD[..., 0].tolist() == [[0, 1], [0, 0], [2, 3], [0, 3]]  # an idle slot's state is 0
    assert both.active_TB.tolist() == [[True, True], [True, False], [True, True], [False, True]]
    assert [both.instructions[i] for i in both.instruction_TB[2].tolist()] == ["episode 2", "episode 3"]
    assert both.reward_TBK[2:].tolist() == second.reward_TBK.tolist() and both.slot_B.tolist() == [4, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_log_probs_keep_the_runs_precision(dtype: torch.dtype) -> None:
    pool = LocalPool([FakeEnv(2)], 4, 2, K, _From(ROWS, 2), "none")
    batch = Collector(pool, 2, K, N, 1, dtype).collect(Sampler(FakePolicy(), 7, N, 1.0, 0), NoSpans(), 0)
    assert batch.value_TBJ.dtype == batch.logprob_TBN.dtype == batch.last_value_BJ.dtype == batch.final_value_TBJ.dtype == dtype
    assert A == 3 and batch.token_TBN.shape[-1] == N
