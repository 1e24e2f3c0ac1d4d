"""The rollout loop: who is asked, with what noise, and when it ends."""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from helpers.fakes import A, FakeEnv, FakePolicy, K, N, NoSpans, episode
from vlarl.envs.pool import FinalFrames, LocalPool
from vlarl.envs.spec import EpisodeSpec
from vlarl.rng import fold, uniform
from vlarl.rollout.episodes import ListFeed
from vlarl.rollout.play import Sampler, play
from vlarl.types import ActionChunk, EnvStep, Observation


@dataclass
class Watcher:
    """Keeps every call of record."""

    calls: list[tuple[int, int, list[int], ActionChunk | None]] = field(default_factory=list)

    def record(self, stage: int, t: int, step: EnvStep, rows: Tensor, chunk: ActionChunk | None) -> None:
        self.calls.append((stage, t, rows.tolist(), chunk))


def run(
    rows: list[EpisodeSpec], slots: int, max_chunks: int, critic: bool, final_frames: FinalFrames = "none", stages: int = 1
) -> tuple[int, Watcher, FakePolicy, list[FakeEnv]]:
    envs = [FakeEnv(slots // stages) for _ in range(stages)]
    pool = LocalPool(envs, 0, slots // stages, K, ListFeed(rows, slots), final_frames)
    policy, watcher = FakePolicy(), Watcher()
    steps = play(pool, Sampler(policy, 7, N, 1.0, 0), watcher, NoSpans(), max_chunks, critic)
    return steps, watcher, policy, envs


def test_actors_are_asked_once_per_chunk_and_the_critic_once_more() -> None:
    rows = [episode(0, 100, True), episode(1, 100, True)]
    steps, watcher, policy, envs = run(rows, 2, max_chunks=3, critic=True)
    assert steps == 3 and policy.rows == [2, 2, 2, 2] and len(envs[0].actions) == 3
    assert [t for _, t, _, _ in watcher.calls] == [0, 1, 2, 3]
    steps, watcher, policy, envs = run(rows, 2, max_chunks=3, critic=False)
    assert steps == 3 and policy.rows == [2, 2, 2] and len(envs[0].actions) == 3
    assert watcher.calls[-1][2:] == ([], None)


def test_it_ends_when_every_slot_idles() -> None:
    # Slot 0 is done after 1 chunk, slot 1 after 3.
    steps, watcher, policy, envs = run([episode(0, 1, True), episode(1, 6, False)], 2, max_chunks=50, critic=False)
    assert steps == 3 and policy.rows == [2, 1, 1]
    assert [rows for _, _, rows, _ in watcher.calls] == [[0, 1], [1], [1], []]
    assert [a[:, 0, 0].tolist() for a in envs[0].actions] == [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]  # idle slot 0: zeros


def test_nothing_to_play() -> None:
    steps, watcher, policy, _ = run([], 2, max_chunks=5, critic=True)
    assert steps == 0 and policy.rows == [] and [c[2:] for c in watcher.calls] == [([], None)]


def test_final_frames_ride_along_with_the_forward_pass_of_the_next_episode() -> None:
    rows = [episode(0, 2, False), episode(1, 9, True), episode(2, 9, True)]
    _, watcher, policy, _ = run(rows, 2, max_chunks=2, critic=True, final_frames="truncated")
    assert policy.rows == [2, 3, 2]
    chunk = watcher.calls[1][3]
    assert chunk is not None
    # Values are 1000 uid + actions played: episode 2 starts, 1 goes on, 0 has ended after 2 actions.
    assert chunk.value_BJ[:, 0].tolist() == [2000.0, 1002.0, 2.0]


def test_stages_take_turns_and_end_apart() -> None:
    # Stage 0 (slots 0, 1) has one chunk to play, stage 1 (slots 2, 3) has three.
    rows = [episode(0, 2, True), episode(1, 2, True), episode(2, 6, True), episode(3, 6, True)]
    steps, watcher, _, _ = run(rows, 4, max_chunks=50, critic=False, stages=2)
    assert steps == 3
    assert [(stage, t) for stage, t, _, _ in watcher.calls] == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (1, 3)]


def test_noise_depends_on_seed_episode_and_chunk_alone() -> None:
    policy = FakePolicy()
    obs = Observation(torch.zeros(3, 1, 2, 2, 3, dtype=torch.uint8), torch.zeros(3, 2), ("",) * 3)
    uid, chunk = torch.tensor([4, 9, 4]), torch.tensor([0, 0, 1])
    token = Sampler(policy, 7, N, 1.0, 0)(obs, uid, chunk).token_BN
    assert not torch.equal(token[0], token[1]) and not torch.equal(token[0], token[2])
    alone = Sampler(policy, 7, N, 0.5, 0)(obs.select(torch.tensor([1])), uid[1:2], chunk[1:2]).token_BN
    assert torch.equal(alone[0], token[1])
    expected = [int(256 * uniform(fold(7, torch.tensor(9), torch.tensor(0), torch.tensor(n)))) for n in range(N)]
    assert token[1].tolist() == expected
    assert not torch.equal(Sampler(policy, 8, N, 1.0, 0)(obs, uid, chunk).token_BN, token)


def test_temperature_zero_is_greedy() -> None:
    class Listener(FakePolicy):
        def act(self, obs: Observation, noise_BN: Tensor | None, temperature: float, top_k: int) -> ActionChunk:
            assert noise_BN is None and temperature == 1.0
            return super().act(obs, noise_BN, temperature, top_k)

    obs = Observation(torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8), torch.zeros(1, 2), ("",))
    chunk = Sampler(Listener(), 7, N, 0.0, 0)(obs, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert chunk.action_BKA.shape == (1, K, A)
