"""Env hosts over the `fake` simulator: same results however many hosts, lost hosts come back on the same episode, every wait ends."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from helpers.fake_simulator import TASKS
from vlarl.envs import hosts
from vlarl.envs.base import BatchedEnv, Teacher, WorksAhead
from vlarl.envs.host import protocol
from vlarl.envs.hosts import HostedEnv, Hosting
from vlarl.envs.pool import LocalPool
from vlarl.envs.spec import EnvSpec, EpisodeSpec
from vlarl.errors import MachineError, WorkerError
from vlarl.rollout.episodes import ListFeed
from vlarl.types import EnvStep

SPEC = EnvSpec("fake", TASKS, views=2, height=4, width=3, state_dim=4, action_dim=2, horizon=10)
K = 4
TESTS = Path(__file__).parents[1]


def hosting(
    folder: Path, per_host: int = 1, seconds: float = 60.0, again: bool = False, start: str = "", python: str = sys.executable,
    start_seconds: float = 120.0,
) -> Hosting:
    settings = {"marks": str(folder), "again": again, "start": start}
    path = {"PYTHONPATH": str(TESTS)}
    return Hosting("helpers.fake_simulator:Fake", settings, python, per_host, start_seconds, seconds, path, folder / "logs")


@contextmanager
def hosted(slots: int, how: Hosting, first_slot: int = 0, beat: Callable[[], object] = lambda: None) -> Iterator[HostedEnv]:
    env = HostedEnv(slots, first_slot, SPEC, how, torch.device("cpu"), lambda n, total: None, beat)
    try:
        yield env
    finally:
        env.close()


def spec(uid: int, length: int, task: str = "plain", at: int = 0) -> EpisodeSpec:
    return EpisodeSpec(uid=uid, task=TASKS.index(task), init_state=length, seed=at)


def actions(slots: int, value: float = 0.5) -> torch.Tensor:
    return torch.full((slots, K, 2), value)


def run_pool(env: BatchedEnv, slots: int, rows: list[EpisodeSpec], chunks: int) -> list[EnvStep]:
    """Chunk n plays actions of value n / 7, which float32 cannot hold exactly."""
    pool = LocalPool([env], 0, slots, K, ListFeed(rows, slots), "all")
    pool.begin()
    steps = [pool.recv(0)]
    for n in range(chunks):
        pool.send(0, actions(slots, n / 7))
        steps.append(pool.recv(0))
    return steps


def same(a: EnvStep, b: EnvStep) -> None:
    assert a.episode == b.episode and a.final_index.tolist() == b.final_index.tolist()
    for name in ("reward_BK", "terminated_BK", "truncated_BK", "valid_BK", "success_B"):
        assert torch.equal(getattr(a.result, name), getattr(b.result, name)), name
    for x, y in [(a.obs, b.obs), (a.final_obs, b.final_obs)]:
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert torch.equal(x.image_BVHWC, y.image_BVHWC) and torch.equal(x.state_BD[:, :3], y.state_BD[:, :3])


def test_a_chunk_by_hand(tmp_path: Path) -> None:
    with hosted(2, hosting(tmp_path)) as env:
        assert isinstance(env, WorksAhead)
        env.reset(torch.tensor([0, 1]), [spec(1, 6), spec(2, 99)])
        first = env.step_chunk(actions(2), torch.tensor([True, True]))
        second = env.step_chunk(actions(2), torch.tensor([True, True]))
        third = env.step_chunk(actions(2), torch.tensor([False, True]))
        seen = env.observe(torch.tensor([1, 0]))
    assert first.reward_BK.tolist() == [[101.5, 102.5, 103.5, 104.5], [201.5, 202.5, 203.5, 204.5]]
    assert first.valid_BK.all() and not (first.terminated_BK | first.truncated_BK).any()
    assert second.reward_BK[0].tolist() == [105.5, 106.5, 0, 0] and second.valid_BK[0].tolist() == [True, True, False, False]
    assert second.terminated_BK[0].tolist() == [False, True, False, False] and second.success_B.tolist() == [True, False]
    assert third.truncated_BK[1].tolist() == [False, True, False, False] and not third.terminated_BK.any()  # horizon 10
    assert not third.valid_BK[0].any()
    assert seen.image_BVHWC.shape == (2, 2, 4, 3, 3) and seen.image_BVHWC[:, 1, 3, 2].tolist() == [[2, 10, 255], [1, 6, 255]]
    # u, actions played, their sum, pictures taken: one after the reset and one per chunk, not one per action.
    assert seen.state_BD.tolist() == [[2, 10, 10.0, 4], [1, 6, 6.0, 3]]


def test_a_simulators_own_limit_cuts_an_episode(tmp_path: Path) -> None:
    with hosted(1, hosting(tmp_path)) as env:
        env.reset(torch.tensor([0]), [spec(1, 2, "cut")])
        result = env.step_chunk(actions(1), torch.tensor([True]))
    assert result.valid_BK.tolist() == [[True, True, False, False]] and result.truncated_BK.tolist() == [[False, True, False, False]]
    assert not result.terminated_BK.any() and not result.success_B.any()


def test_any_number_of_hosts_gives_the_same_steps(tmp_path: Path) -> None:
    rows = [spec(u, length) for u, length in enumerate((3, 4, 99, 5, 9, 2, 7))]
    runs = []
    for per_host in (1, 2, 3):
        with hosted(3, hosting(tmp_path, per_host)) as env:
            runs.append(run_pool(env, 3, rows, 6))
            assert len(psutil.Process().children()) >= -(-3 // per_host)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            same(a, b)
    assert [e and e.uid for e in runs[0][-1].episode] == [None, None, None]


@pytest.mark.parametrize("task", ["killed", "hung", "raising", "hung at reset"])
def test_a_lost_host_comes_back_on_the_same_episode(tmp_path: Path, task: str, capfd: pytest.CaptureFixture[str]) -> None:
    at = 6 if task != "hung at reset" else 0
    rows = [spec(1, 9, task, at), spec(2, 99), spec(3, 5, task, at if at else 0), spec(4, 3)]
    plain = [EpisodeSpec(r.uid, 0, r.init_state, 0) for r in rows]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with hosted(2, hosting(tmp_path / "a", per_host=2)) as env:
        expected = run_pool(env, 2, plain, 5)
    with hosted(2, hosting(tmp_path / "b", per_host=2, seconds=3)) as env:
        steps = run_pool(env, 2, rows, 5)
    for a, b in zip(expected, steps, strict=True):
        plainly = tuple(e and EpisodeSpec(e.uid, 0, e.init_state, 0) for e in b.episode)
        same(a, EnvStep(b.obs, b.result, plainly, b.chunk_index_B, b.final_index, b.final_obs))
    told = capfd.readouterr().err
    assert env.restarts == told.count("env host 0 (slot 0-1)") > 0
    assert "slot 0, episode 1" in told and "initial state 9" in told


@pytest.mark.parametrize("resuming", [False, True], ids=["step", "resume"])
def test_a_rank_beats_while_its_hosts_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resuming: bool) -> None:
    """A hang is noticed after step_seconds for each slot of a host and chunk played again, longer than a rank may be silent."""
    monkeypatch.setattr(protocol, "BEAT_SECONDS", 0.1)
    beats: list[float] = []
    with hosted(2, hosting(tmp_path, per_host=2, seconds=1), beat=lambda: beats.append(time.monotonic())) as env:
        started = time.monotonic()
        if resuming:
            env.load_state_dict({"episode": [[1, 2, 99, 2, -1], None], "played": [torch.zeros(1, K, 2), torch.zeros(0)]})
        else:
            env.reset(torch.tensor([0, 1]), [spec(1, 99, "hung", 2), spec(2, 99)])
            env.step_chunk(actions(2), torch.tensor([True, True]))
        ended = time.monotonic()
        assert env.restarts == 1
    during = [started, *(t for t in beats if t > started), ended]
    assert ended - started > (4 if resuming else 2) and max(b - a for a, b in pairwise(during)) < 1


def test_killed_from_outside_between_chunks(tmp_path: Path) -> None:
    with hosted(2, hosting(tmp_path)) as env:
        env.reset(torch.tensor([0, 1]), [spec(1, 99), spec(2, 99)])
        env.step_chunk(actions(2), torch.tensor([True, True]))
        before = {int(s.rsplit(" ", 1)[1]) for s in env.observe(torch.tensor([0, 1])).instruction}
        os.kill(max(before), signal.SIGKILL)
        time.sleep(0.2)
        result = env.step_chunk(actions(2), torch.tensor([True, True]))
        assert result.reward_BK.tolist() == [[105.5, 106.5, 107.5, 108.5], [205.5, 206.5, 207.5, 208.5]]
        assert env.observe(torch.tensor([0, 1])).state_BD[:, :3].tolist() == [[1, 8, 8.0], [2, 8, 8.0]]


@pytest.mark.parametrize(("task", "cause"), [("killed", "was killed by SIGKILL in its step"), ("raising", "ValueError: the table broke"),
                                             ("hung", "did not answer within 3 s of its step")])
def test_a_host_that_fails_again_ends_the_run(tmp_path: Path, task: str, cause: str) -> None:
    with hosted(2, hosting(tmp_path, seconds=3, again=True), first_slot=10) as env:
        env.reset(torch.tensor([0, 1]), [spec(1, 99), spec(7, 99, task, 2)])
        with pytest.raises(WorkerError) as caught:
            env.step_chunk(actions(2), torch.tensor([True, True]))
    text = caught.value.message
    for part in ("Env host 1 (slot 11)", cause, "slot 11, episode 7", task, "initial state 99", "2 times in a row"):
        assert part in text
    assert "host11.log" in caught.value.hint


def test_a_mistake_of_the_users_is_told_at_once(tmp_path: Path) -> None:
    with hosted(1, hosting(tmp_path)) as env:
        env.reset(torch.tensor([0]), [spec(1, 99, "mistaken", 1)])
        with pytest.raises(MachineError, match="there is no table. Buy one."):
            env.step_chunk(actions(1), torch.tensor([True]))


@pytest.mark.parametrize(
    ("start", "cause"), [("exit", "exited with code 3 in its start"), ("hang", "did not answer within 2 s of its start")]
)
def test_a_simulator_that_does_not_start(tmp_path: Path, start: str, cause: str) -> None:
    with pytest.raises(WorkerError) as caught, hosted(2, hosting(tmp_path, start_seconds=2 if start == "hang" else 120, start=start)):
        pass
    assert cause in caught.value.message and "slot 0" in caught.value.message
    assert ("no such library" in caught.value.hint) == (start == "exit")


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="env.python: /nowhere/python cannot be run: No such file"), \
            hosted(1, hosting(tmp_path, python="/nowhere/python")):
        pass


def test_another_version_of_the_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "PROTOCOL", 99)
    with pytest.raises(MachineError, match="speaks protocol 2 and this rank speaks 99"), hosted(1, hosting(tmp_path)):
        pass


def test_open_episodes_survive_a_save(tmp_path: Path) -> None:
    rows = [spec(1, 99), spec(2, 3), spec(3, 9), spec(4, 99)]
    value = torch.arange(2 * K * 2).reshape(2, K, 2) / 7
    with hosted(2, hosting(tmp_path)) as env:
        env.reset(torch.tensor([0, 1]), rows[:2])
        env.step_chunk(value, torch.tensor([True, True]))  # slot 1 ends
        state = env.state_dict()
        expected = env.step_chunk(value, torch.tensor([True, False]))
        frame = env.observe(torch.tensor([0]))
    with hosted(2, hosting(tmp_path)) as env:
        env.load_state_dict(state)
        assert env.observe(torch.tensor([0])).state_BD[0, :2].tolist() == [1, 4]
        result = env.step_chunk(value, torch.tensor([True, False]))
        assert torch.equal(result.reward_BK, expected.reward_BK)
        assert torch.equal(env.observe(torch.tensor([0])).state_BD[:, :3], frame.state_BD[:, :3])


def test_hosts_end_with_the_pool_and_say_goodbye(tmp_path: Path) -> None:
    with hosted(2, hosting(tmp_path)) as env:
        env.reset(torch.tensor([0, 1]), [spec(1, 99), spec(2, 99)])
        pids = [int(s.rsplit(" ", 1)[1]) for s in env.observe(torch.tensor([0, 1])).instruction]
        assert all(psutil.pid_exists(p) for p in pids)
    assert not any(psutil.pid_exists(p) for p in pids)
    assert all((tmp_path / f"closed-{p}").exists() for p in pids)


def test_no_host_outlives_a_rank_that_is_killed(tmp_path: Path) -> None:
    """Even one that hangs."""
    code = f"""
import sys, time; sys.path[:0] = [{str(TESTS)!r}, {str(Path(hosts.__file__).parents[2])!r}]
from pathlib import Path
from contract.test_hosts import *
env = HostedEnv(2, 0, SPEC, hosting(Path({str(tmp_path)!r}), seconds=100), torch.device("cpu"), lambda n, t: None)
env.reset(torch.tensor([0, 1]), [spec(1, 99), spec(2, 99, "hung", 1)])
print(*(s.rsplit(" ", 1)[1] for s in env.observe(torch.tensor([0, 1])).instruction), flush=True)
env.step_chunk(actions(2), torch.tensor([True, True]))
"""
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    pids = [int(p) for p in rank.stdout.readline().split()]
    assert len(pids) == 2 and all(psutil.pid_exists(p) for p in pids)
    time.sleep(0.5)
    rank.kill()
    rank.wait()
    deadline = time.monotonic() + 10
    while any(_alive(p) for p in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(p) for p in pids)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_hosts_import_no_torch_and_wait_for_no_input(tmp_path: Path) -> None:
    code = "import sys; from helpers.fake_simulator import Fake as Base\n"
    code += "class Fake(Base):\n    def reset(self, episode):\n"
    code += "        return ' '.join([str('torch' in sys.modules or 'pydantic' in sys.modules), repr(sys.stdin.read())])\n"
    (tmp_path / "nosy.py").write_text(code)
    how: Any = hosting(tmp_path)
    how = Hosting("nosy:Fake", how.settings, how.python, 1, 60.0, 60.0, {"PYTHONPATH": f"{TESTS}:{tmp_path}"}, how.log_dir)
    with hosted(1, how) as env:
        env.reset(torch.tensor([0]), [spec(1, 9)])
        assert env.observe(torch.tensor([0])).instruction == ("False ''",)


def test_the_expert_is_asked_in_its_host_and_changes_nothing(tmp_path: Path) -> None:
    with hosted(3, hosting(tmp_path, per_host=2)) as env:
        env.reset(torch.arange(3), [spec(1, 9), spec(2, 9), spec(3, 9)])
        active = torch.tensor([True, False, True])
        env.step_chunk(actions(3), active)
        before = env.observe(torch.arange(3))
        asked = env.expert_action(torch.tensor([True, True, False]), 0.25)
        assert isinstance(env, Teacher) and torch.equal(asked, torch.tensor([[0.4, 0.25], [0.0, 0.25], [0.0, 0.0]]))
        after = env.observe(torch.arange(3))
        assert torch.equal(before.state_BD, after.state_BD) and torch.equal(before.image_BVHWC, after.image_BVHWC)


def test_a_simulator_without_an_expert_says_so(tmp_path: Path) -> None:
    how = replace(hosting(tmp_path), adapter="helpers.fake_simulator:Clueless")
    with hosted(1, how) as env:
        env.reset(torch.arange(1), [spec(1, 9)])
        with pytest.raises(MachineError, match="fake has no scripted expert"):
            env.expert_action(torch.ones(1, dtype=torch.bool), 0.0)
