"""Owns the dynamics: one control step of every slot, kinematic and quasi-static; and what counts as success and progress.

Actions (dx, dy, dz, droll, dpitch, dyaw, gripper) in [-1, 1]: STEP metres and TURN radians per unit; the gripper CLOSES where the
seventh number is > 0 and OPENS otherwise. Objects are axis-aligned boxes for contact. A closed, empty gripper pushes what it
meets; an open one passes over objects (they fit between its fingers), so that grasping is forgiving.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlarl.envs.tabletop.scene import HALF, PLATE_RADIUS, PLATE_TOP, PUSH, PUT, REACH, TARGET_SHIFT, Scene, State, pick

STEP = 0.045  # metres per unit of translation
TURN = 0.1  # radians per unit of rotation
TILT_LIMIT = 1.0  # Euler angles are clamped here
GRASP_ANGLE = 0.5  # a grasp needs smaller tilt and yaw than this
GRASP_XY, GRASP_Z = 0.038, 0.035
FINGER_DOWN = 0.012  # finger tips reach this far below ee
FINGER_SIDE = 0.016  # half width of the closed fingers
GRIPPER_REACH = (0.33, 0.37)  # |x|, |y| of ee: it can stand behind any object
HEIGHT = (0.02, 0.34)  # z of ee
SUBSTEPS = 2  # STEP / SUBSTEPS is less than HALF: nothing is jumped over
PUT_RADIUS = 0.05
TOUCH_XY, TOUCH_Z = 0.035, 0.048


def step(state: State, action_BA: Tensor) -> State:
    """The state after one action in every slot. action_BA: float (B, 7), clamped to [-1, 1]."""
    action = action_BA.float().clamp(-1, 1)
    euler = (state.euler_B3 + action[:, 3:6] * TURN).clamp(-TILT_LIMIT, TILT_LIMIT)
    ee, objects = state.ee_B3, state.object_BM3
    number = torch.arange(objects.shape[1], device=ee.device)
    holding = state.held_B >= 0
    held_BM = number == state.held_B[:, None]
    move = action[:, :3] * (STEP / SUBSTEPS)
    for _ in range(SUBSTEPS):
        moved = _within_reach(ee + move)
        floor = _support(moved[:, None], objects, state.plate_BP2, held_BM)[:, 0]  # a held object is not lowered through things
        moved = torch.cat([moved[:, :2], torch.where(holding, torch.maximum(moved[:, 2], floor), moved[:, 2])[:, None]], -1)
        objects = torch.where(held_BM[..., None], moved[:, None], objects)
        ee, objects = _contact(ee, moved, objects, held_BM, state.closed_B & ~holding)
    yaw = state.yaw_BM + torch.where(held_BM, (euler - state.euler_B3)[:, 2:], 0.0)
    closed = action[:, 6] > 0
    held = torch.where(closed, torch.where(holding, state.held_B, _grasp(state, ee, euler, objects, closed)), -1)
    held_BM = number == held[:, None]
    objects = torch.where(held_BM[..., None], ee[:, None], objects)
    height = torch.where(held_BM, objects[..., 2], _support(objects, objects, state.plate_BP2, held_BM))  # what is not held falls
    objects = torch.cat([objects[..., :2], height[..., None]], -1)
    return replace(state, ee_B3=ee, euler_B3=euler, closed_B=closed, held_B=held, object_BM3=objects, yaw_BM=yaw, step_B=state.step_B + 1)


def _within_reach(ee: Tensor) -> Tensor:
    x, y, z = ee.unbind(-1)
    return torch.stack([x.clamp(-GRIPPER_REACH[0], GRIPPER_REACH[0]), y.clamp(-GRIPPER_REACH[1], GRIPPER_REACH[1]), z.clamp(*HEIGHT)], -1)


def move_target(state: State, scene: Scene) -> State:
    """Variation `execution`: before its step `move_step_B`, the goal plate (put) or the target object (unless held) is moved."""
    now = state.step_B == scene.move_step_B
    put = scene.family_B == PUT
    number = torch.arange(state.plate_BP2.shape[1], device=now.device)
    plate = (now & put)[:, None] & (number == scene.goal_B[:, None])
    number = torch.arange(state.object_BM3.shape[1], device=now.device)
    free = now & ~put & (state.held_B != scene.target_B)
    moved = free[:, None] & (number == scene.target_B[:, None])
    to = scene.move_to_B2[:, None]
    xy = torch.where(moved[..., None], to, state.object_BM3[..., :2])
    return replace(
        state, plate_BP2=torch.where(plate[..., None], to, state.plate_BP2), object_BM3=torch.cat([xy, state.object_BM3[..., 2:]], -1),
        origin_B2=torch.where(free[:, None], scene.move_to_B2, state.origin_B2),
    )


def _contact(ee: Tensor, moved: Tensor, objects: Tensor, held_BM: Tensor, pusher_B: Tensor) -> tuple[Tensor, Tensor]:
    """The gripper goes from ee to moved; closed and empty it rests on what is below and pushes what is beside."""
    top = objects[..., 2] + HALF + FINGER_DOWN
    reach = HALF + FINGER_SIDE
    rel = objects[..., :2] - moved[:, None, :2]
    depth = reach - rel.abs()
    touching = (depth[..., 0] > 0) & (depth[..., 1] > 0) & (moved[:, None, 2] < top - 1e-4) & pusher_B[:, None] & ~held_BM
    above = touching & (ee[:, None, 2] >= top - 1e-4)
    height = torch.where(above, top, 0.0).amax(1)
    pushed = touching & ~above
    along_x = depth[..., 0] <= depth[..., 1]
    travel = (moved - ee)[:, None, :2].abs() + 0.004  # closing beside an object does not make it jump
    shift = torch.minimum(depth, travel) * torch.where(rel >= 0, 1.0, -1.0)
    shift = torch.where(torch.stack([along_x, ~along_x], -1) & pushed[..., None], shift, 0.0)
    xy = _separate(objects[..., :2] + shift, objects[..., 2], pushed | held_BM)
    moved = torch.cat([moved[:, :2], torch.maximum(moved[:, 2], height)[:, None]], -1)
    return moved, torch.stack([xy[..., 0].clamp(-REACH[0], REACH[0]), xy[..., 1].clamp(-REACH[1], REACH[1]), objects[..., 2]], -1)


def _separate(xy: Tensor, z: Tensor, fixed_BM: Tensor) -> Tensor:
    """Objects that overlap at one height move apart along the axis of least overlap; a fixed one moves the other."""
    out = xy
    for j in range(xy.shape[1]):
        rel = xy - xy[:, j : j + 1]
        depth = 2 * HALF - rel.abs()
        level = (z - z[:, j : j + 1]).abs() < 2 * HALF - 0.006
        overlap = (depth[..., 0] > 0) & (depth[..., 1] > 0) & level & ~fixed_BM
        overlap = overlap & (torch.arange(xy.shape[1], device=xy.device) != j)[None]
        share = torch.where(fixed_BM[:, j : j + 1], 1.0, 0.5)
        along_x = depth[..., 0] <= depth[..., 1]
        push = depth * torch.where(rel >= 0, 1.0, -1.0) * share[..., None]
        out = out + torch.where(torch.stack([along_x, ~along_x], -1) & overlap[..., None], push, 0.0)
    return out


def _support(centre_BN3: Tensor, objects: Tensor, plates: Tensor, held_BM: Tensor) -> Tensor:
    """Height (B, N) of the centre of an object that lies on what is under centre_BN3: table, plate or an object not held."""
    rel = centre_BN3[:, :, None, :2] - plates[:, None]
    on_plate = (rel[..., 0] * rel[..., 0] + rel[..., 1] * rel[..., 1] < PLATE_RADIUS * PLATE_RADIUS).any(-1)
    floor = torch.where(on_plate, PLATE_TOP + HALF, HALF)
    rel = (centre_BN3[:, :, None, :2] - objects[:, None, :, :2]).abs()
    under = objects[:, None, :, 2] + 0.02 < centre_BN3[:, :, None, 2]
    covers = (rel[..., 0] < 1.4 * HALF) & (rel[..., 1] < 1.4 * HALF) & under & ~held_BM[:, None]
    stacked = torch.where(covers, objects[:, None, :, 2] + 2 * HALF, 0.0).amax(-1)
    return torch.maximum(floor, stacked)


def _grasp(state: State, ee: Tensor, euler: Tensor, objects: Tensor, closed_B: Tensor) -> Tensor:
    """int64 (B,): the object that closing fingers take, -1 for none. Needs an open gripper before, near and upright."""
    rel = objects - ee[:, None]
    square = rel[..., 0] * rel[..., 0] + rel[..., 1] * rel[..., 1]
    quarter = torch.pi / 2
    turn = euler[:, 2:] - state.yaw_BM
    turn = (turn - (turn / quarter).round() * quarter).abs()
    upright = (euler[:, 0].abs() < GRASP_ANGLE) & (euler[:, 1].abs() < GRASP_ANGLE)
    near = (square < GRASP_XY * GRASP_XY) & (rel[..., 2].abs() < GRASP_Z) & (turn < GRASP_ANGLE)
    near = near & (upright & closed_B & ~state.closed_B)[:, None]
    best = torch.where(near, square, torch.inf).argmin(1)
    return torch.where(near.any(1), best, -1)


def pushed_distance(state: State, scene: Scene) -> Tensor:
    """Metres (B,) that the target moved along the goal direction since the start (meaningful for push)."""
    way = scene.way_B2
    rel = pick(state.object_BM3, scene.target_B)[:, :2] - state.origin_B2
    return rel[:, 0] * way[:, 0] + rel[:, 1] * way[:, 1]


def success(state: State, scene: Scene) -> Tensor:
    """bool (B,). put: the target rests on the goal plate (centre within 5 cm), gripper empty. push: it moved 8 cm or more the right
    way, lies on the table or a plate and is not held. touch: ee within 3.5 cm (height 4.8 cm) of it, no other object held."""
    target = pick(state.object_BM3, scene.target_B)
    plate = pick(state.plate_BP2, scene.goal_B.clamp(max=state.plate_BP2.shape[1] - 1))
    rel = target[:, :2] - plate
    resting = (target[:, 2] - PLATE_TOP - HALF).abs() < 0.005
    put = (rel[:, 0] * rel[:, 0] + rel[:, 1] * rel[:, 1] < PUT_RADIUS * PUT_RADIUS) & resting & (state.held_B < 0)
    push = (pushed_distance(state, scene) >= TARGET_SHIFT) & (state.held_B < 0) & (target[:, 2] < PLATE_TOP + HALF + 0.005)
    gap = state.ee_B3 - target
    touch = (gap[:, 0] * gap[:, 0] + gap[:, 1] * gap[:, 1] < TOUCH_XY * TOUCH_XY) & (gap[:, 2].abs() < TOUCH_Z)
    touch = touch & ((state.held_B < 0) | (state.held_B == scene.target_B))
    return torch.where(scene.family_B == PUT, put, torch.where(scene.family_B == PUSH, push, touch))


def progress(state: State, scene: Scene) -> Tensor:
    """Potential (B,) in [0, 1] for the shaped reward; 1 where the task is solved.

    put: up to 0.3 for nearing the object, 0.4 to 0.9 while carrying it to the plate. push: up to 0.3 for nearing the spot behind
    the object, 0.6 for the way pushed. touch: nearness. Nearness is 1 - distance / 0.4 m, not below 0.
    """
    target = pick(state.object_BM3, scene.target_B)
    plate = pick(state.plate_BP2, scene.goal_B.clamp(max=state.plate_BP2.shape[1] - 1))
    way = scene.way_B2
    behind = torch.cat([target[:, :2] - way * (HALF + FINGER_SIDE), target[:, 2:]], -1)
    near, near_behind = _nearness(state.ee_B3, target), _nearness(state.ee_B3, behind)
    carry = _nearness(target[:, :2], plate)
    put = torch.where(state.held_B == scene.target_B, 0.4 + 0.5 * carry, 0.3 * near)
    push = 0.3 * near_behind + 0.6 * (pushed_distance(state, scene) / TARGET_SHIFT).clamp(0, 1)
    shaped = torch.where(scene.family_B == PUT, put, torch.where(scene.family_B == PUSH, push, 0.9 * near))
    return torch.where(success(state, scene), 1.0, shaped)


def _nearness(a: Tensor, b: Tensor) -> Tensor:
    square = (a[:, 0] - b[:, 0]) * (a[:, 0] - b[:, 0]) + (a[:, 1] - b[:, 1]) * (a[:, 1] - b[:, 1])
    if a.shape[1] == 3:
        square = square + (a[:, 2] - b[:, 2]) * (a[:, 2] - b[:, 2])
    return (1 - square.sqrt() / 0.4).clamp(min=0)
