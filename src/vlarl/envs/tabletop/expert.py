"""Owns the scripted expert: a reactive rule per family, from the true state to the next action.

It recovers from any state: a wrong object is let go, a lost one is approached again, tilt is turned back. A clumsy expert misses
its aim in the way that `Scene.miss_B2` and `short_B` say: cloned, it gives a mediocre policy for RL to mend.
"""
from __future__ import annotations

import torch
from torch import Tensor

from vlarl.envs.tabletop.physics import FINGER_SIDE, STEP, TURN, pushed_distance
from vlarl.envs.tabletop.scene import HALF, PLATE_TOP, PUSH, PUT, Scene, State, pick


def act(state: State, scene: Scene, clumsy_B: Tensor) -> Tensor:
    """The expert's next action in every slot, float32 (B, 7). clumsy_B bool: it misses its aim in this episode."""
    goal, close = _put(state, scene, clumsy_B)
    push_goal, push_close = _push(state, scene, clumsy_B)
    touch_goal, touch_close = _touch(state, scene, clumsy_B)
    put, push = scene.family_B == PUT, scene.family_B == PUSH
    goal = torch.where(put[:, None], goal, torch.where(push[:, None], push_goal, touch_goal))
    close = torch.where(put, close, torch.where(push, push_close, touch_close))
    move = ((goal - state.ee_B3) / STEP).clamp(-1, 1)
    turn = (-state.euler_B3 / TURN).clamp(-1, 1)
    return torch.cat([move, turn, torch.where(close, 1.0, -1.0)[:, None]], -1)


def _gap(a_B2: Tensor, b_B2: Tensor) -> Tensor:
    rel = a_B2 - b_B2
    return (rel[:, 0] * rel[:, 0] + rel[:, 1] * rel[:, 1]).sqrt()


def _point(xy_B2: Tensor, z_B: Tensor) -> Tensor:
    return torch.cat([xy_B2, z_B[:, None]], -1)


def _put(state: State, scene: Scene, clumsy_B: Tensor) -> tuple[Tensor, Tensor]:
    ee, cube = state.ee_B3, pick(state.object_BM3, scene.target_B)
    aim = pick(state.plate_BP2, scene.goal_B.clamp(max=state.plate_BP2.shape[1] - 1))
    aim = torch.where(clumsy_B[:, None], aim + scene.miss_B2, aim)
    holding = state.held_B == scene.target_B
    # Fetch: come down a funnel over the cube, close when there.
    gap = _gap(ee[:, :2], cube[:, :2])
    fetch = _point(cube[:, :2], cube[:, 2] + ((gap - 0.02) * 2).clamp(0, 0.09))
    there = (gap < 0.015) & ((ee[:, 2] - cube[:, 2]).abs() < 0.015)
    # Carry: rise before moving sideways, let go just above the plate.
    gap = _gap(ee[:, :2], aim)
    drop = PLATE_TOP + HALF + 0.01
    height = drop + ((gap - 0.015) * 2).clamp(0, 0.1)
    rising = height - ee[:, 2] > 0.06
    carry = _point(torch.where(rising[:, None], ee[:, :2], aim), height)
    let_go = (gap < 0.02) & (ee[:, 2] < drop + 0.02)
    done = ~holding & (_gap(cube[:, :2], aim) < 0.03) & (cube[:, 2] < drop)  # a clumsy expert believes so too
    goal = torch.where(holding[:, None], carry, fetch)
    goal = torch.where(done[:, None], _point(ee[:, :2], torch.full_like(gap, 0.2)), goal)
    turned = (state.euler_B3.abs() < 0.3).all(1)
    return goal, torch.where(holding, ~let_go, there & turned & ~done & ~state.closed_B)


def _push(state: State, scene: Scene, clumsy_B: Tensor) -> tuple[Tensor, Tensor]:
    ee, cube = state.ee_B3, pick(state.object_BM3, scene.target_B)
    way = scene.way_B2
    rel = ee[:, :2] - cube[:, :2]
    along = rel[:, 0] * way[:, 0] + rel[:, 1] * way[:, 1]
    across = rel - along[:, None] * way
    off_line = (across[:, 0] * across[:, 0] + across[:, 1] * across[:, 1]).sqrt()
    behind = cube[:, :2] - way * (HALF + FINGER_SIDE + 0.02)
    gap = _gap(ee[:, :2], behind)
    approach = _point(behind, 0.03 + ((gap - 0.015) * 2.5).clamp(0, 0.1))
    ready = (off_line < 0.02) & (along < -HALF) & (along > -0.15) & (ee[:, 2] < 0.055) & state.closed_B
    left = torch.where(clumsy_B, scene.short_B, 0.10) - pushed_distance(state, scene)
    contact = (-along - HALF - FINGER_SIDE).clamp(min=0)  # free way before the fingers touch
    shove = _point(ee[:, :2] - across + way * (left + contact)[:, None].clamp(0, STEP), torch.full_like(gap, 0.03))
    goal = torch.where(ready[:, None], shove, approach)
    # Held objects are let go, and fingers close only where they take nothing.
    near = state.object_BM3 - ee[:, None]
    inside = ((near[..., 0].abs() < 0.05) & (near[..., 1].abs() < 0.05) & (near[..., 2].abs() < 0.05)).any(1)
    stuck = ~state.closed_B & inside
    done = left < 0.005
    goal = torch.where((stuck | done)[:, None], _point(ee[:, :2], torch.full_like(gap, 0.2)), goal)
    return goal, (state.held_B < 0) & ~stuck


def _touch(state: State, scene: Scene, clumsy_B: Tensor) -> tuple[Tensor, Tensor]:
    cube = pick(state.object_BM3, scene.target_B)
    aim = torch.where(clumsy_B[:, None], cube[:, :2] + scene.miss_B2, cube[:, :2])
    gap = _gap(state.ee_B3[:, :2], aim)
    return _point(aim, cube[:, 2] + 0.015 + ((gap - 0.03) * 1.0).clamp(0, 0.08)), torch.zeros_like(clumsy_B)
