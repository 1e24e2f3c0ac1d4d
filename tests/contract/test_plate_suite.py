"""The plate suite's and a bridge task's own code on generated stand-in files, on a CPU."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from helpers import maniskill_standin as standin
from vlarl import serial
from vlarl.envs.maniskill.plate_episodes import arm_offsets, decode, positions, trials
from vlarl.envs.maniskill.plate_settings import SETTINGS
from vlarl.envs.maniskill.simulation import Simulation
from vlarl.envs.maniskill.spec import PLATE_TASK
from vlarl.envs.spec import EpisodeSpec
from vlarl.plan.specs import simulator_spec
from vlarl.recipe.simulators import Env, Maniskill

pytestmark = pytest.mark.usefixtures("maniskill")

STILL = torch.tensor([[0.0, 0, 0, 0, 0, 0, 1]])
CORNER = (0, 0)  # of the frame, where only the photograph is seen


@contextmanager
def opened(setting: str, size: int = 128, task: str = PLATE_TASK, reward: Any = "relative") -> Iterator[Simulation]:
    standin.write_all()
    own = Maniskill(gripper="unit")
    env = Env(simulator="maniskill", tasks=(task,), variation=setting, horizon=80, image_size=size, reward=reward, maniskill=own)
    simulation = Simulation(task, 1, serial.to_dict(env), simulator_spec(env), torch.device("cpu"))
    try:
        yield simulation
    finally:
        simulation.close()


def begin(simulation: Simulation, episode_id: int) -> None:
    simulation._start([0], 0, {"episode_id": torch.tensor([episode_id])})


def test_an_id_is_the_scene_that_it_names() -> None:
    with opened("train") as sim:
        for number in (0, 166_250, 802_815):
            begin(sim, number)
            want = decode(SETTINGS["train"], np.array([number]))
            task, place = sim.base, positions("pair")[want.position[0]]
            thing = task._objects[want.object[0]].pose
            assert np.allclose(thing.p[0], place[0], atol=1e-5) and np.allclose(task._plates[0].pose.p[0], place[1], atol=1e-5)
            assert 2 * np.arccos(thing.q[0, 0]) == pytest.approx(want.yaw[0] * np.pi / 4, abs=1e-3)
            others = [a.pose.p[0] for i, a in enumerate(task._objects) if i != want.object[0]]
            assert all(float(p[0]) == 1.0 for p in others)
            frame = sim.look()[0, 0]
            assert frame.shape == (128, 128, 3)
            assert frame[CORNER].tolist() == pytest.approx(standin.photo_rgb(int(want.photo[0])), abs=1)
            assert sim.instructions() == [f"put thing {want.object[0]} on plate 0"]


def test_an_object_on_the_plate_is_a_success_and_a_lifted_one_is_not() -> None:
    with opened("train") as sim:
        begin(sim, 4_000)
        task = sim.base
        first = sim.step(STILL)
        assert not bool(first.success) and not bool(first.terminated)
        from mani_skill.utils.structs import Pose

        thing, plate = task._objects[int(task._object_B)], task._plates[0].pose.p
        thing.set_pose(Pose.create_from_pq(plate + torch.tensor([[0.0, 0.0, 0.03]]), thing.pose.q))
        outcomes = [sim.step(STILL) for _ in range(3)]
        assert bool(outcomes[-1].success) and bool(outcomes[-1].terminated)
        assert float(outcomes[-1].reward) == 0.0  # it was never grasped
        thing.set_pose(Pose.create_from_pq(plate + torch.tensor([[0.0, 0.0, 0.3]]), thing.pose.q))
        assert not bool(task.evaluate()["success"])


def test_an_episode_does_not_depend_on_the_one_before() -> None:
    with opened("train", 64) as sim:
        seen = []
        for init_state in (11, 12, 11):
            sim.reset([0], [EpisodeSpec(0, 0, init_state, 3)])
            for _ in range(3):
                sim.step(torch.tensor([[0.01, 0.0, -0.01, 0, 0, 0, 1]]))
            seen.append((sim.look(), sim.feel()))
        assert torch.equal(seen[0][0], seen[2][0]) and torch.equal(seen[0][1], seen[2][1])
        assert not torch.equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize("setting", ["VisionTexture05", "VisionWhole03"])
def test_textures_are_blended_in(setting: str) -> None:
    with opened(setting, 480) as sim:
        number = trials(SETTINGS[setting]) // 2 + 5
        begin(sim, number)
        want = decode(SETTINGS[setting], np.array([number]))
        photo, texture = np.array(standin.photo_rgb(int(want.photo[0]))), np.array(standin.texture_rgb(int(want.extra[0])))
        whole = setting == "VisionWhole03"
        assert np.allclose(sim.look()[0, 0][CORNER], photo * 0.85 + texture * 0.15 if whole else photo, atol=1.5)  # 0.3 or 0.5 of mix 0.5


def test_distractors_arms_sentences_and_jumps() -> None:
    with opened("MultiPlate", 64) as sim:
        begin(sim, 123_456_789)
        want = decode(SETTINGS["MultiPlate"], np.array([123_456_789]))
        second = sim.base._plates[int(want.extra[0]) - 1].pose.p[0]
        assert np.allclose(second, positions("third plate")[want.position[0], 2], atol=1e-5)
        assert len(sim.base._plates) == 16 and bool(sim.look().any())
    with opened("EEPose", 64) as sim:
        number = 5_000_000_000
        begin(sim, number)
        row = int(decode(SETTINGS["EEPose"], np.array([number])).extra[0])
        moved = sim.base.agent.robot.get_qpos()[0].numpy() - sim.base._joints_Q8[0].numpy()
        assert np.allclose(moved, arm_offsets()[row], atol=1e-5) and np.abs(arm_offsets()[row]).max() > 0
    with opened("Instruct", 64) as sim:
        begin(sim, 0)
        assert sim.instructions() == ["Place the thing 0 on the plate 0"]
    with opened("PositionChangeTo", 64) as sim:
        begin(sim, 77)
        places = positions("third object")[decode(SETTINGS["PositionChangeTo"], np.array([77])).position[0]]
        trace = []
        for _ in range(6):
            sim.step(STILL)
            trace.append(sim.base._pose_of(sim.base._objects, sim.base._object_rows, sim.base._object_B)[0, :2].numpy().copy())
        assert np.linalg.norm(trace[3] - places[0, :2]) < 0.03
        assert np.linalg.norm(trace[4] - places[2, :2]) < 0.001  # right after the fifth step
        assert np.linalg.norm(trace[5] - places[2, :2]) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_opens_starts_steps_and_shows_a_scene(setting: str) -> None:
    with opened(setting, 64) as sim:
        assert sim.base.episodes() == trials(SETTINGS[setting])
        sim.reset([0], [EpisodeSpec(0, 0, 5, 1)])
        before = sim.look()
        for _ in range(6):
            outcome = sim.step(torch.tensor([[0.02, 0.02, -0.01, 0, 0, 0.1, 0]]))
        assert torch.isfinite(outcome.reward).all()
        assert (sim.look().float() - before.float()).abs().mean() > 0.1


def test_a_bridge_task_plays_through_the_same_adapter() -> None:
    with opened("train", 64, "PutCarrotOnPlateInScene-v1", "sparse") as sim:
        seen = []
        for init_state in (1, 2, 1):
            sim.reset([0], [EpisodeSpec(0, 0, init_state, 3)])
            start = sim.feel()[0, :3]
            for _ in range(4):
                outcome = sim.step(torch.tensor([[0.02, 0.0, 0.02, 0, 0, 0, 1]]))
            seen.append(sim.look())
            moved = sim.feel()[0, :3] - start
        assert torch.equal(seen[0], seen[2]) and seen[0][0, 0][-1, -1].tolist() == [77] * 3  # the photograph
        assert float(outcome.reward) == 0 and moved[2] > 0.03  # metres, not shares
        assert sim.instructions() == ["put carrot on plate"]
