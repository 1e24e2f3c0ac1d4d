"""LocalPool: order of calls, refilling, idle slots, final frames, chunk counts, open episodes across a save."""
from __future__ import annotations

import pytest
import torch

from helpers.fakes import A, FakeEnv, K, episode
from vlarl.envs.pool import FinalFrames, LocalPool
from vlarl.envs.spec import EpisodeSpec
from vlarl.rollout.episodes import ListFeed

ACTION = torch.zeros(2, K, A)
# Slot 0 plays episodes 0, 2, 4; slot 1 plays 1, 3. Chunks are 2 actions long.
ROWS = [episode(0, 3, True), episode(1, 2, False), episode(2, 1, False), episode(3, 5, True), episode(4, 2, True)]


def build(rows: list[EpisodeSpec], final_frames: FinalFrames = "none", stages: int = 1, slots: int = 2) -> tuple[LocalPool, list[FakeEnv]]:
    envs = [FakeEnv(slots) for _ in range(stages)]
    return LocalPool(envs, 0, slots, K, ListFeed(rows, slots * stages), final_frames), envs


def uids(episodes: tuple[EpisodeSpec | None, ...]) -> list[int | None]:
    return [e.uid if e is not None else None for e in episodes]


def test_calls_out_of_order_are_refused() -> None:
    pool, _ = build(ROWS, stages=2)
    with pytest.raises(AssertionError, match="recv before send"):
        pool.recv(0)
    pool.begin()
    with pytest.raises(AssertionError, match="send before recv"):
        pool.send(0, ACTION)
    pool.recv(0)
    with pytest.raises(AssertionError, match="stage 0: recv before send"):
        pool.recv(0)
    pool.recv(1)  # stages have an order each
    pool.send(0, ACTION)
    with pytest.raises(AssertionError, match="stage 0: send before recv"):
        pool.send(0, ACTION)


def test_slots_are_numbered_by_stage() -> None:
    envs = [FakeEnv(3), FakeEnv(3)]
    pool = LocalPool(envs, 10, 3, K, ListFeed([], 20), "none")
    assert (pool.slots(0), pool.slots(1), pool.stages) == (range(10, 13), range(13, 16), 2)


def test_finished_slots_are_refilled_and_then_idle() -> None:
    pool, _ = build(ROWS)
    pool.begin()
    step = pool.recv(0)
    assert uids(step.episode) == [0, 1]
    assert not step.result.valid_BK.any() and not step.result.success_B.any()
    assert step.obs.instruction == ("episode 0", "episode 1")
    seen, chunks = [], []
    for _ in range(4):
        pool.send(0, ACTION)
        step = pool.recv(0)
        seen.append(uids(step.episode))
        chunks.append(step.chunk_index_B.tolist())
    # Slot 0: 0 takes 2 chunks, 2 one, 4 one. Slot 1: 1 takes 1 chunk, 3 takes 3.
    assert seen == [[0, 3], [2, 3], [4, 3], [None, None]]
    assert [c[0] for c in chunks[:3]] == [1, 0, 0]
    assert [c[1] for c in chunks[:3]] == [0, 1, 2]
    assert step.active_B.tolist() == [False, False]


def test_the_result_is_of_the_chunk_and_the_frame_of_the_next_episode() -> None:
    pool, _ = build(ROWS)
    pool.begin()
    pool.recv(0)
    pool.send(0, ACTION)
    step = pool.recv(0)
    assert step.result.reward_BK.tolist() == [[1.0, 2.0], [101.0, 102.0]]
    assert step.result.truncated_BK.tolist() == [[False, False], [False, True]]
    assert step.obs.state_BD.tolist() == [[0.0, 2.0], [3.0, 0.0]]  # episode, actions played
    pool.send(0, ACTION)
    step = pool.recv(0)
    assert step.result.terminated_BK.tolist() == [[True, False], [False, False]]
    assert step.result.valid_BK.tolist() == [[True, False], [True, True]]
    assert step.result.success_B.tolist() == [True, False]


def test_idle_slots_are_black_and_not_rendered() -> None:
    pool, (env,) = build([episode(7, 4, True)])
    pool.begin()
    step = pool.recv(0)
    assert uids(step.episode) == [7, None]
    assert step.obs.image_BVHWC[0, 0, 0, 0].tolist() == [7, 0, 255]
    assert not step.obs.image_BVHWC[1].any() and not step.obs.state_BD[1].any() and step.obs.instruction == ("episode 7", "")
    for _ in range(2):
        pool.send(0, torch.ones(2, K, A))
        step = pool.recv(0)
    assert uids(step.episode) == [None, None] and step.obs.image_BVHWC.shape == (2, 1, 2, 2, 3) and not step.obs.image_BVHWC.any()
    assert env.observed == [[0], [0]]  # nothing is rendered once every slot idles
    assert not step.result.valid_BK[1].any()


def test_begin_seats_idle_slots_again() -> None:
    pool, _ = build([])
    pool.begin()
    assert uids(pool.recv(0).episode) == [None, None]
    pool._feed = ListFeed([episode(5, 4, True), episode(6, 4, True)], 2)
    pool.begin()
    step = pool.recv(0)
    assert uids(step.episode) == [5, 6] and not step.result.valid_BK.any()


@pytest.mark.parametrize(("final_frames", "expected"), [("none", []), ("truncated", [1]), ("all", [0, 1])])
def test_final_frames(final_frames: FinalFrames, expected: list[int]) -> None:
    pool, (env,) = build([episode(0, 2, True), episode(1, 1, False), episode(2, 9, True), episode(3, 9, True)], final_frames)
    pool.begin()
    pool.recv(0)
    pool.send(0, ACTION)
    env.observed.clear()
    step = pool.recv(0)
    assert step.final_index.tolist() == expected
    assert uids(step.episode) == [2, 3]
    assert env.observed == ([expected] if expected else []) + [[0, 1]]  # before the slots are refilled, and only what is wanted
    if expected:
        assert step.final_obs is not None
        assert step.final_obs.state_BD.tolist() == [[b, 2 - b] for b in expected]  # the last frame, after `length` actions
    else:
        assert step.final_obs is None


def test_stages_step_apart() -> None:
    pool, envs = build([episode(u, 9, True) for u in range(4)], stages=2)
    pool.begin()
    pool.recv(0)
    pool.recv(1)
    pool.send(0, ACTION)
    step = pool.recv(0)
    assert step.obs.state_BD.tolist() == [[0.0, 2.0], [1.0, 2.0]]
    assert (len(envs[0].actions), len(envs[1].actions)) == (1, 0)


def test_open_episodes_survive_a_save() -> None:
    pool, _ = build(ROWS)
    pool.begin()
    pool.recv(0)
    pool.send(0, ACTION)
    pool.recv(0)
    resumed, _ = build(ROWS)
    resumed.load_state_dict(pool.state_dict())
    resumed._feed = pool._feed
    resumed.begin()
    step = resumed.recv(0)
    assert uids(step.episode) == [0, 3] and step.chunk_index_B.tolist() == [1, 0]
    assert step.obs.state_BD.tolist() == [[0.0, 2.0], [3.0, 0.0]]
    resumed.send(0, ACTION)
    assert resumed.recv(0).result.success_B.tolist() == [True, False]


def test_close_reaches_every_simulator() -> None:
    pool, envs = build(ROWS, stages=2)
    pool.close()
    assert all(env.closed for env in envs)
