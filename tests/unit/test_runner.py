"""Evaluation: the same rows however many episodes are played at once, with the real simulator and a real policy."""
from __future__ import annotations

import pytest
import torch

from helpers.fakes import FakeEnv, FakePolicy, K, N, NoSpans, episode
from vlarl.envs.pool import LocalPool
from vlarl.envs.tabletop.env import Tabletop
from vlarl.evaluation.protocol import Protocol, episodes
from vlarl.evaluation.report import EpisodeRow
from vlarl.evaluation.runner import EpisodeRecorder, play_episodes
from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import load_policy
from vlarl.rollout.episodes import ListFeed
from vlarl.rollout.play import Sampler


@pytest.fixture(scope="module")
def policy() -> VLAPolicy:
    return load_policy("scratch:tiny", dtype=torch.float64, seed=3)  # float64: rounding cannot tip a sample over


def rows_with(policy: VLAPolicy, parallel: int) -> list[EpisodeRow]:
    protocol = Protocol("test", "tabletop", ("put", "touch"), "train", 9, 8, 32, 1, policy.spec.chunk, 1.0, 5)
    env = Tabletop(parallel, protocol.tasks, "train", protocol.horizon, protocol.image_size, False, "sparse", torch.device("cpu"))
    pool = LocalPool([env], 0, parallel, policy.spec.chunk, ListFeed(episodes(protocol), parallel), "none")
    recorder = EpisodeRecorder(lambda uid: False)
    tokens = policy.spec.chunk * policy.spec.action_dim
    play_episodes(pool, Sampler(policy, protocol.seed, tokens, protocol.temperature, 0), recorder, NoSpans())
    return sorted(recorder.rows, key=lambda row: row.uid)


def test_rows_do_not_depend_on_how_many_play_at_once(policy: VLAPolicy) -> None:
    seven = rows_with(policy, 7)
    assert [row.uid for row in seven] == list(range(9))
    assert all(0 < row.length <= 8 for row in seven)
    assert rows_with(policy, 1) == seven
    assert rows_with(policy, 50) == seven


def test_rows_and_films() -> None:
    played = [episode(0, 3, True), episode(1, 4, False), episode(2, 1, True)]
    pool = LocalPool([FakeEnv(2)], 0, 2, K, ListFeed(played, 2), "all")
    told: list[tuple[int, int]] = []
    recorder = EpisodeRecorder(lambda uid: uid < 2, lambda rows, open_actions: told.append((len(rows), open_actions)))
    play_episodes(pool, Sampler(FakePolicy(), 7, N, 0.0, 0), recorder, NoSpans())
    rows = {row.uid: row for row in recorder.rows}
    assert told == [(0, 0), (0, 4), (2, 0), (3, 0)]  # episodes that have ended, actions in the others: K of each, then 3 and 4, then 1
    assert [(rows[u].success, rows[u].return_, rows[u].length) for u in range(3)] == [(True, 6.0, 3), (False, 410.0, 4), (True, 201.0, 1)]
    films = {film.spec.uid: film for film in recorder.films}
    assert sorted(films) == [0, 1]
    # A frame before every chunk of two actions, and the last one.
    assert [[int(frame[0, 0, 0, 1]) for frame in films[u].frames] for u in (0, 1)] == [[0, 2, 3], [0, 2, 4]]
    assert (films[0].success, films[1].success, films[1].instruction) == (True, False, "episode 1")
