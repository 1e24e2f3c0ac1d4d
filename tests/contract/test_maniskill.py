"""ManiSkill for real, on the CPU: what the adapter promises, on PickCube and PushCube. `vlarl envs install maniskill`."""
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from helpers import maniskill_standin
from vlarl import serial
from vlarl.envs.hosts import HostedEnv, Hosting
from vlarl.envs.maniskill.batched import ManiSkill
from vlarl.envs.maniskill.hosted import Slot
from vlarl.envs.maniskill.simulation import Simulation
from vlarl.envs.spec import EpisodeSpec
from vlarl.errors import MachineError, PlanError
from vlarl.plan.specs import simulator_spec
from vlarl.recipe.simulators import Env, Maniskill

pytestmark = pytest.mark.usefixtures("maniskill")
CPU = torch.device("cpu")
OPEN = 1.0


def env(task: str = "PickCube-v1", reward: Any = "sparse", horizon: int = 50, **own: Any) -> Env:
    section = Maniskill(**{"shader": "minimal", "show_goals": True, **own})
    return Env(simulator="maniskill", tasks=(task,), horizon=horizon, image_size=64, reward=reward, maniskill=section)


def simulation(recipe: Env) -> Simulation:
    return Simulation(recipe.tasks[0], 1, serial.to_dict(recipe), simulator_spec(recipe), torch.device("cpu"))


@pytest.fixture(scope="module")
def pick(maniskill: None) -> Simulation:
    return simulation(env(reward="relative"))


def episode(init_state: int, uid: int = 0, task: int = 0) -> EpisodeSpec:
    return EpisodeSpec(uid=uid, task=task, init_state=init_state, seed=1)


def actions(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 7, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def record(sim: Simulation, init_state: int, count: int) -> list[Tensor]:
    sim.reset([0], [episode(init_state)])
    seen = [sim.look(), sim.feel()]
    for action in actions(count):
        outcome = sim.step(action[None])
        seen += [outcome.reward, sim.feel()]
    return [*seen, sim.look()]


def test_equal_specs_give_equal_episodes_whatever_came_before(pick: Simulation) -> None:
    first = record(pick, 7, 6)
    other = record(pick, 8, 9)
    again = record(pick, 7, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_nothing_is_rendered_while_stepping(pick: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(pick.base, "capture_sensor_data", lambda f=pick.base.capture_sensor_data: (looked.append(1), f()))
    pick.reset([0], [episode(3)])
    for action in actions(4):
        pick.step(action[None])
    assert not looked
    pick.look()
    assert len(looked) == 1


def test_frames_are_upright_and_show_what_moves(pick: Simulation) -> None:
    """The red cube and the green goal are seen where the camera's own geometry says that they are."""
    pick.reset([0], [episode(5)])
    before = pick.look()[0, 0].float()
    params = pick.base.get_sensor_params()["base_camera"]
    for thing, channel in ((pick.base.cube, 0), (pick.base.goal_site, 1)):
        point = torch.cat([thing.pose.p[0], torch.ones(1)])
        x, y, depth = (params["intrinsic_cv"][0] @ (params["extrinsic_cv"][0] @ point)).tolist()
        colour = before[int(y / depth), int(x / depth)]
        assert colour.argmax() == channel and colour[channel] > 1.5 * colour.sort().values[1]
    assert before.shape == (64, 64, 3) and before.std() > 10
    for _ in range(4):
        pick.step(torch.tensor([[0.0, 1, 0, 0, 0, 0, OPEN]]))
    assert (pick.look()[0, 0].float() - before).abs().mean() > 1


def test_relative_rewards_add_up_to_what_was_gained(pick: Simulation) -> None:
    pick.reset([0], [episode(6)])
    start = float(pick._dense_B)
    total = sum(float(pick.step(action[None]).reward) for action in actions(8))
    end = float(pick.base.get_reward(obs={}, action=torch.zeros(1, 7), info=pick._info))
    assert total == pytest.approx(end - start, abs=2e-2)  # the reward weighs the action a little


def test_a_chunk_is_its_actions_one_by_one_and_ends_with_the_horizon() -> None:
    recipe = env(horizon=6)
    spec, settings = simulator_spec(recipe), serial.to_dict(recipe)
    whole = ManiSkill(1, settings, spec, CPU)
    index, chunk = torch.zeros(1, dtype=torch.int64), actions(8).view(1, 8, 7)
    whole.reset(index, [episode(2)])
    result = whole.step_chunk(chunk, torch.ones(1, dtype=torch.bool))
    assert result.valid_BK.sum() == 6 and result.truncated_BK[0].tolist() == [False] * 5 + [True] + [False] * 2
    seen = whole.observe(index)
    slot = Slot(settings, spec)
    slot.reset(episode(2))
    rewards = [r for k in range(6) for r in slot.play(chunk[0, k : k + 1].numpy()).reward]
    image, state = np.zeros((1, 64, 64, 3), np.uint8), np.zeros(8, np.float32)
    slot.observe(image, state)
    assert torch.equal(seen.image_BVHWC[0], torch.from_numpy(image)) and torch.equal(seen.state_BD[0], torch.from_numpy(state))
    assert result.reward_BK[0, :6].tolist() == rewards
    assert seen.instruction == ("pick up the red cube and move it to the green ball",)


def test_a_saved_episode_goes_on_where_it_was() -> None:
    recipe = env(reward="dense")
    one = ManiSkill(1, serial.to_dict(recipe), simulator_spec(recipe), CPU)
    index, active = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    one.reset(index, [episode(9)])
    for seed in (1, 2):
        one.step_chunk(actions(3, seed)[None], active)
    saved = one.state_dict()
    expected, frame = one.step_chunk(actions(3, 3)[None], active), one.observe(index)
    one.reset(index, [episode(10)])
    one.load_state_dict(saved)
    again = one.step_chunk(actions(3, 3)[None], active)
    assert torch.equal(again.reward_BK, expected.reward_BK) and again.reward_BK.abs().sum() > 0
    assert torch.equal(one.observe(index).image_BVHWC, frame.image_BVHWC)


def hosted(recipe: Env, slots: int, per_host: int, folder: Path) -> HostedEnv:
    how = Hosting(
        "vlarl.envs.maniskill.hosted:Slot", serial.to_dict(recipe), sys.executable, per_host, 600, 600,
        {"MS_ASSET_DIR": str(maniskill_standin.ROOT)}, folder,
    )
    return HostedEnv(slots, 0, simulator_spec(recipe), how, CPU, lambda n, total: None)


@pytest.mark.slow
def test_one_host_or_three_and_one_killed_within_an_episode_play_the_same(tmp_path: Path) -> None:
    recipe, index, all_of_them, seen = env(reward="dense"), torch.arange(3), torch.ones(3, dtype=torch.bool), []
    for per_host in (3, 1):
        pool = hosted(recipe, 3, per_host, tmp_path / str(per_host))
        try:
            pool.reset(index, [episode(20), episode(21, uid=1), episode(20, uid=2)])
            first = pool.step_chunk(torch.stack([actions(4, 1), actions(4, 2), actions(4, 1)]), all_of_them)
            if per_host == 1:
                os.kill([p.pid for p in psutil.Process().children() if "host/__main__.py" in " ".join(p.cmdline())][1], signal.SIGKILL)
            second = pool.step_chunk(torch.stack([actions(3, 3)] * 3), all_of_them)
            shown = pool.observe(index)
            seen.append((first.reward_BK, second.reward_BK, shown.image_BVHWC, shown.state_BD))
        finally:
            pool.close()
    for one, three in zip(*seen, strict=True):
        assert torch.equal(one, three) and torch.equal(one[0], one[2]) and not torch.equal(one[0], one[1])


def test_mistakes_are_named_before_the_simulator_asks() -> None:
    with pytest.raises(PlanError, match="no task 'PickCub-v1'.*PickCube-v1"):
        simulation(env("PickCub-v1"))
    with pytest.raises(MachineError, match="PickSingleYCB-v1 needs files.*mani_skill2_ycb.*download_asset ycb"):
        simulation(env("PickSingleYCB-v1"))
    with pytest.raises(PlanError, match="no camera 'wrist'.*base_camera"):
        simulation(env(cameras=("wrist",)))
    with pytest.raises(PlanError, match="pd_joint_pos.*pd_ee_delta_pose"):
        simulation(env(control_mode="pd_joint_pos"))
    with pytest.raises(PlanError, match="one scene per process"):
        ManiSkill(2, serial.to_dict(env()), simulator_spec(env()), CPU)


def test_a_missing_library_for_physics_on_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from sapien import physx

    def offline() -> None:
        raise ConnectionError("no route to github.com")

    monkeypatch.setattr(physx, "enable_gpu", offline)
    recipe = Env(simulator="maniskill", tasks=("PickCube-v1",))
    with pytest.raises(MachineError, match="could not fetch or load PhysX's GPU library: no route") as caught:
        Simulation("PickCube-v1", 1, serial.to_dict(recipe), simulator_spec(recipe), torch.device("cuda"))
    assert "~/.sapien/physx/" in caught.value.hint and "sim_backend=physx_cpu" in caught.value.hint
