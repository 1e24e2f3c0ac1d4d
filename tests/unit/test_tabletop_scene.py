"""Tabletop's scenes and pictures: layout, unambiguous colours, windows that hold what they must."""
from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vlarl.envs.spec import EpisodeSpec
from vlarl.envs.tabletop import physics, render, scene
from vlarl.envs.tabletop.spec import TASKS, VARIATIONS
from vlarl.envs.tabletop.variations import ROWS

CPU = torch.device("cpu")


def drawn(variation: str, count: int = 300) -> tuple[scene.Scene, scene.State]:
    episodes = [EpisodeSpec(i, i % 3, i, 11) for i in range(count)]
    return scene.draw(*scene.keys(episodes, TASKS, CPU), ROWS[variation])


@pytest.mark.parametrize("variation", VARIATIONS)
def test_layout_is_free_of_overlap_within_reach_and_unambiguous(variation: str) -> None:
    fixed, state = drawn(variation)
    things = torch.cat([state.object_BM3[..., :2], state.plate_BP2, fixed.move_to_B2[:, None]], 1)
    gap = (things[:, :, None] - things[:, None]).abs().amax(-1) + torch.eye(things.shape[1])
    assert gap.min() > 2 * scene.HALF
    assert (things[..., 0].abs() <= scene.REACH[0]).all() and (things[..., 1].abs() <= scene.REACH[1]).all()
    for colours in (fixed.colour_BM, fixed.plate_colour_BP):
        assert all(len(set(row)) == len(row) for row in colours.tolist())
    assert state.object_BM3.shape[1] >= 2  # a distractor is always there


def test_every_target_goal_family_and_start_is_drawn() -> None:
    fixed, _ = drawn("train")
    pairs = set(zip(fixed.family_B.tolist(), fixed.goal_B.tolist(), strict=True))
    assert pairs >= {(1, g) for g in range(4)} | {(0, 0), (0, 1)}
    assert set(fixed.target_B.tolist()) == {0, 1} and set(fixed.colour_BM.flatten().tolist()) == {0, 1, 2, 3}


def test_execution_leaves_the_cells_of_training_and_moves_half_of_the_targets() -> None:
    fixed, state = drawn("execution")
    outside = (state.object_BM3[..., :2].abs() > torch.tensor([0.16, 0.23])).any(-1)
    assert outside.float().mean() > 0.4
    assert 0.35 < (fixed.move_step_B >= 0).float().mean() < 0.65


def test_a_moved_target_moves_once() -> None:
    fixed, state = drawn("execution", 60)
    before = state
    for _ in range(12):
        state = physics.step(physics.move_target(state, fixed), torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0]]).expand(60, 7))
    moves = fixed.move_step_B >= 0
    put = fixed.family_B == scene.PUT
    goal = scene.pick(state.plate_BP2, fixed.goal_B.clamp(max=1))
    target = scene.pick(state.object_BM3, fixed.target_B)[:, :2]
    assert torch.equal(goal[moves & put], fixed.move_to_B2[moves & put])
    assert torch.equal(target[moves & ~put], fixed.move_to_B2[moves & ~put])
    assert torch.equal(state.plate_BP2[~moves], before.plate_BP2[~moves])
    torch.testing.assert_close(state.object_BM3[~moves], before.object_BM3[~moves])


def test_windows_hold_every_solid() -> None:
    """The bounds of the windows, checked at the reachable volume's corners with the camera at its extreme shifts."""
    shift = max(row.camera_shift for row in ROWS.values())
    x, y = physics.GRIPPER_REACH
    reach = torch.tensor([[sx * x, sy * y] for sx in (-1, 1) for sy in (-1, 1)])
    shifts = torch.tensor([[a, b, c] for a in (-shift, shift) for b in (-shift, shift) for c in (-shift, shift)])
    camera = render.third_person(shifts, 64)
    top = {render.OBJECT_BOUND: physics.HEIGHT[1], render.GRIPPER_BOUND: physics.HEIGHT[1] + 0.10, render.SHADOW_BOUND: 0.0}
    for (_, depth), height in top.items():
        points = torch.cat([reach, torch.full((4, 1), height)], 1)
        local = render._to_camera(camera, points.expand(len(shifts), 4, 3))
        assert local[..., 2].min() >= depth
    boxes = torch.tensor([[0.012, 0.008, 0.036], [0.020, 0.029, 0.014], [0.022, 0.022, 0.024]])
    assert boxes.square().sum(1).sqrt().max() <= render.GRIPPER_BOUND[0]
    assert math.sqrt(3) * scene.HALF <= render.OBJECT_BOUND[0]


def test_windowed_picture_equals_casting_every_pixel() -> None:
    fixed, state = drawn("semantics", 40)
    camera = render.third_person(fixed.camera_B3, 64)
    back = render.background(camera, fixed, state.plate_BP2, 64)
    whole = render.Camera(camera.eye_F3, camera.axes_F33, camera.spread, 64, 64, 64)
    assert torch.equal(render.picture(camera, fixed, state, back, 64, True), render.picture(whole, fixed, state, back, 64, True))


def test_colours_land_where_the_camera_projects_the_cubes() -> None:
    """Project each cube's top by hand: the pixel there has the cube's colour, unless a nearer cube hides it."""
    fixed, state = drawn("train", 30)
    state = replace(state, ee_B3=torch.tensor([[-0.33, 0.37, 0.34]]).expand(30, 3))
    camera = render.third_person(fixed.camera_B3, 64)
    image = render.picture(camera, fixed, state, render.background(camera, fixed, state.plate_BP2, 64), 64, False)
    top = render._to_camera(camera, state.object_BM3 + torch.tensor([0.0, 0.0, scene.HALF]))
    pixel = ((top[..., :2] / top[..., 2:] / render.SPREAD + 1) * 32).long()
    seen = image[torch.arange(30)[:, None], pixel[..., 1], pixel[..., 0]].float()
    agree = (seen / 255 - fixed.rgb_BM3).abs().amax(-1) < 0.15
    assert agree.float().mean() > 0.9


def test_rotation_is_orthonormal_and_yaw_turns_x_to_y() -> None:
    turn = render.rotation(torch.tensor([[0.3, -0.4, 0.5], [0.0, 0.0, torch.pi / 2]]))
    torch.testing.assert_close(turn @ turn.mT, torch.eye(3).expand(2, 3, 3))
    torch.testing.assert_close(turn[1] @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))


def test_spec_is_torch_free() -> None:
    code = "import sys, vlarl.envs.tabletop.spec as s; s.env_spec(('put',), 32, 64, False); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
