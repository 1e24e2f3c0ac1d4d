"""Tabletop's dynamics on hand-made states: grasp, carry, drop, support, push, and what counts as success."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vlarl.envs.tabletop import physics, scene
from vlarl.envs.tabletop.scene import HALF, PLATE_TOP, PUSH, PUT, TOUCH, Scene, State
from vlarl.envs.tabletop.spec import DIRECTIONS
from vlarl.envs.tabletop.variations import TRAIN

CLOSE, OPEN = 1.0, -1.0


def world(family: int, ee: tuple[float, float, float], cube: tuple[float, float] = (0.0, 0.0), other: tuple[float, float] = (-0.2, 0.2),
          goal: int = 0, closed: bool = False) -> tuple[State, Scene]:
    """One slot: target object 0 at `cube`, object 1 at `other`, plates at (0.15, 0) and (0.15, 0.2)."""
    fixed, state = scene.draw(torch.tensor([family]), torch.tensor([1]), TRAIN)
    fixed = replace(fixed, target_B=torch.tensor([0]), goal_B=torch.tensor([goal]), way_B2=scene.directions(torch.device("cpu"))[[goal]])
    return replace(
        state, ee_B3=torch.tensor([ee]), closed_B=torch.tensor([closed]), object_BM3=torch.tensor([[[*cube, HALF], [*other, HALF]]]),
        yaw_BM=torch.zeros(1, 2), plate_BP2=torch.tensor([[[0.15, 0.0], [0.15, 0.2]]]), origin_B2=torch.tensor([cube]),
    ), fixed


def move(state: State, *steps: tuple[float, float, float, float]) -> State:
    """steps: (dx, dy, dz, gripper), no rotation."""
    for dx, dy, dz, gripper in steps:
        state = physics.step(state, torch.tensor([[dx, dy, dz, 0.0, 0.0, 0.0, gripper]]))
    return state


def test_one_unit_is_one_step_and_is_clamped() -> None:
    state, _ = world(TOUCH, (0.0, 0.0, 0.2))
    state = physics.step(state, torch.tensor([[1.0, -0.5, 3.0, 0.5, 0.0, -2.0, 0.0]]))
    torch.testing.assert_close(state.ee_B3, torch.tensor([[0.045, -0.0225, 0.245]]))
    torch.testing.assert_close(state.euler_B3, torch.tensor([[0.05, 0.0, -0.1]]))
    assert not state.closed_B  # 0 opens
    for _ in range(30):
        state = move(state, (1, 1, -1, OPEN))
    torch.testing.assert_close(state.ee_B3, torch.tensor([[0.33, 0.37, 0.02]]))


def test_put_on_the_plate_and_let_go() -> None:
    state, fixed = world(PUT, (0.01, 0.0, 0.05))
    state = move(state, (0, 0, 0, CLOSE))
    assert state.held_B == 0 and torch.equal(state.object_BM3[:, 0], state.ee_B3)
    state = move(state, (0, 0, 1, CLOSE), (1, 0, 0, CLOSE), (1, 0, 0, CLOSE), (1, 0, 0, CLOSE))
    torch.testing.assert_close(state.object_BM3[0, 0], torch.tensor([0.145, 0.0, 0.095]))
    assert not physics.success(state, fixed)  # above the plate, still held
    state = move(state, (0, 0, 0, OPEN))
    assert state.held_B == -1 and physics.success(state, fixed)
    assert state.object_BM3[0, 0, 2] == pytest.approx(PLATE_TOP + HALF)


def test_release_beside_the_plate_is_no_success() -> None:
    state, fixed = world(PUT, (0.0, 0.0, 0.035))
    state = move(state, (0, 0, 0, CLOSE), (0, 0, 1, CLOSE), (1, 0, 0, CLOSE), (0.5, 0, 0, CLOSE), (0, 0, 0, OPEN))
    torch.testing.assert_close(state.object_BM3[0, 0], torch.tensor([0.0675, 0.0, HALF]))
    assert not physics.success(state, fixed)


def test_no_grasp_when_far_tilted_turned_or_already_closed() -> None:
    level, at = (0.0, 0.0, 0.0), (0.0, 0.0, 0.034)
    for ee, angle in (((0.045, 0.0, 0.034), level), ((0.0, 0.0, 0.08), level), (at, (0.6, 0.0, 0.0)), (at, (0.0, 0.0, 0.7))):
        state, _ = world(PUT, ee)
        state = replace(state, euler_B3=torch.tensor([angle]))
        assert move(state, (0, 0, 0, CLOSE)).held_B == -1, (ee, angle)
    state, _ = world(PUT, (0.0, 0.0, 0.034), closed=True)
    assert move(state, (0, 0, 0, CLOSE)).held_B == -1
    state, _ = world(PUT, (0.03, 0.0, 0.034))
    quarter_turn = replace(state, euler_B3=torch.tensor([[0.0, 0.0, 1.0]]), yaw_BM=torch.tensor([[1.0 - torch.pi / 2, 0.0]]))
    assert move(quarter_turn, (0, 0, 0, CLOSE)).held_B == 0  # a cube looks the same after a quarter turn


def test_dropped_on_another_cube_it_rests_on_top_and_is_not_lowered_through_it() -> None:
    state, _ = world(PUT, (0.0, 0.0, 0.034), other=(0.045, 0.0))
    state = replace(state, object_BM3=torch.tensor([[[0.0, 0.0, HALF], [0.0, 0.13, HALF]]]))
    state = move(state, (0, 0, 0, CLOSE), (0, 0, 1, CLOSE), (0, 0, 1, CLOSE), (0, 1, 0, CLOSE), (0, 1, 0, CLOSE), (0, 0.9, 0, CLOSE))
    lowered = move(state, (0, 0, -1, CLOSE), (0, 0, -1, CLOSE))
    assert lowered.ee_B3[0, 2] == pytest.approx(3 * HALF)
    dropped = move(state, (0, 0, 0, OPEN))
    assert dropped.object_BM3[0, 0, 2] == pytest.approx(3 * HALF)
    assert dropped.object_BM3[0, 1, 2] == pytest.approx(HALF)


@pytest.mark.parametrize("goal", range(4))
def test_pushing_moves_the_cube_the_way_the_camera_sees_it(goal: int) -> None:
    """Starting in contact (5 cm from the centre), two full steps move the cube 9 cm; left is -y, forward is -x."""
    way = {"left": (0.0, -1.0), "right": (0.0, 1.0), "forward": (-1.0, 0.0), "back": (1.0, 0.0)}[DIRECTIONS[goal]]
    state, fixed = world(PUSH, (-0.05 * way[0], -0.05 * way[1], 0.03), other=(0.2, 0.2), goal=goal, closed=True)
    state = move(state, (*way, 0, CLOSE))
    assert not physics.success(state, fixed)
    state = move(state, (*way, 0, CLOSE))
    torch.testing.assert_close(state.object_BM3[0, 0, :2], torch.tensor(way) * 0.09, atol=1e-5, rtol=0)
    assert physics.success(state, fixed)
    for wrong in set(range(4)) - {goal}:
        assert not physics.success(state, replace(fixed, way_B2=scene.directions(torch.device("cpu"))[[wrong]]))


def test_pushed_cube_pushes_its_neighbour_and_stops_at_the_rim() -> None:
    state, _ = world(PUSH, (0.0, -0.05, 0.03), other=(0.0, 0.10), closed=True)
    state = move(state, (0, 1, 0, CLOSE), (0, 1, 0, CLOSE))
    torch.testing.assert_close(state.object_BM3[0, :, 1], torch.tensor([0.09, 0.09 + 2 * HALF]), atol=1e-5, rtol=0)
    state = move(state, *[(0, 1, 0, CLOSE)] * 8)
    assert state.object_BM3[0, :, 1].max() <= scene.REACH[1] + 1e-6


def test_closed_gripper_rests_on_a_cube_and_open_one_passes() -> None:
    state, _ = world(TOUCH, (0.0, 0.0, 0.12), closed=True)
    blocked = move(state, (0, 0, -1, CLOSE), (0, 0, -1, CLOSE), (0, 0, -1, CLOSE))
    assert blocked.ee_B3[0, 2] == pytest.approx(2 * HALF + physics.FINGER_DOWN)
    torch.testing.assert_close(blocked.object_BM3, state.object_BM3)
    state, _ = world(TOUCH, (0.0, 0.0, 0.12))
    through = move(state, (0, 0, -1, OPEN), (0, 0, -1, OPEN), (0, 0, -1, OPEN))
    assert through.ee_B3[0, 2] == pytest.approx(0.02)
    torch.testing.assert_close(through.object_BM3, state.object_BM3)


def test_touch_needs_nearness_and_no_other_object_in_hand() -> None:
    state, fixed = world(TOUCH, (0.03, 0.0, 0.05))
    assert physics.success(state, fixed)
    assert not physics.success(replace(state, held_B=torch.tensor([1])), fixed)
    assert physics.success(replace(state, held_B=torch.tensor([0])), fixed)
    assert not physics.success(replace(state, ee_B3=torch.tensor([[0.04, 0.0, 0.05]])), fixed)
    assert not physics.success(replace(state, ee_B3=torch.tensor([[0.0, 0.0, 0.09]])), fixed)


def test_progress_rises_to_one() -> None:
    state, fixed = world(PUT, (0.0, 0.2, 0.034))
    assert physics.progress(state, fixed) == pytest.approx(0.3 * 0.5)  # 20 cm of 40 cm
    state, fixed = world(PUT, (0.0, 0.0, 0.034))
    held = move(state, (0, 0, 0, CLOSE))
    assert physics.progress(held, fixed) == pytest.approx(0.4 + 0.5 * (1 - 0.15 / 0.4), abs=1e-5)
    state, fixed = world(PUSH, (0.0, -0.05, HALF), goal=1, closed=True)
    assert physics.progress(state, fixed) == pytest.approx(0.3, abs=1e-5)
    assert physics.progress(move(state, (0, 1, 0, CLOSE)), fixed) == pytest.approx(0.3 + 0.6 * 0.045 / 0.08, abs=1e-4)
