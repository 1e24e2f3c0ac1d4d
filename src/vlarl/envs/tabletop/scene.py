"""Owns what a scene is (Scene: fixed for an episode; State: what moves) and how an EpisodeSpec draws one.

Shape legend: B slots, F slots being reset, M movable objects, P plates. World frame: origin at the table's centre, x towards the
camera, y to its right, z up; metres and radians. Every draw is keyed by (seed, init_state, family, stream), one number per key,
so that an episode is bit-identical whatever the batch around it; sums over axes are written out for the same reason.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from vlarl import rng
from vlarl.envs.spec import EpisodeSpec
from vlarl.envs.tabletop.spec import TASKS
from vlarl.envs.tabletop.variations import Variation

HALF = 0.034  # half the edge of a cube; every object's half height and half width for contact
PLATES = 2
PLATE_TOP = 0.01
PLATE_RADIUS = 0.06
REACH = (0.27, 0.31)  # |x|, |y| that the objects' centres stay within
TARGET_SHIFT = 0.08  # push: distance that counts as pushed
PUT, PUSH, TOUCH = range(3)

# Streams of random numbers: one per purpose; never renumber, or every seed's scenes change.
(_CELLS, _JITTER, _COLOUR, _PLATE_COLOUR, _TARGET, _GOAL, _START, _YAW, _SHAPE, _TEMPLATE, _LUCK, _MISS, _MOVE, _SHADE, _TABLE, _LIGHT,
 _CAMERA) = range(17)


@dataclass(frozen=True)
class State:
    """What moves. ee_B3: point between the finger tips. euler_B3: roll, pitch, yaw. closed_B bool. held_B int64: object or -1.
    object_BM3: centres. yaw_BM. plate_BP2: centres. origin_B2: where the target object stood at the start. step_B int64: actions taken."""

    ee_B3: Tensor
    euler_B3: Tensor
    closed_B: Tensor
    held_B: Tensor
    object_BM3: Tensor
    yaw_BM: Tensor
    plate_BP2: Tensor
    origin_B2: Tensor
    step_B: Tensor


@dataclass(frozen=True)
class Scene:
    """What stays. family_B, target_B (object), goal_B (plate of put, direction of push), template_B: int64. way_B2: unit vector of the
    push. colour_BM, plate_colour_BP, shape_BM: int64. luck_B float64: the expert is clumsy where this is below its clumsiness.
    miss_B2: aim offset of a clumsy expert (put, touch), metres; short_B: shift at which it stops pushing. move_step_B: -1 or the step
    before which the target moves to move_to_B2. The rest is looks: rgb_BM3, plate_rgb_BP3, table_B23, texture_B, backdrop_B3,
    light_B3 (unit, towards the light), ambient_B, camera_B3 (shift, metres)."""

    family_B: Tensor
    target_B: Tensor
    goal_B: Tensor
    way_B2: Tensor
    template_B: Tensor
    colour_BM: Tensor
    plate_colour_BP: Tensor
    shape_BM: Tensor
    luck_B: Tensor
    miss_B2: Tensor
    short_B: Tensor
    move_step_B: Tensor
    move_to_B2: Tensor
    rgb_BM3: Tensor
    plate_rgb_BP3: Tensor
    table_B23: Tensor
    texture_B: Tensor
    backdrop_B3: Tensor
    light_B3: Tensor
    ambient_B: Tensor
    camera_B3: Tensor


Record = TypeVar("Record", Scene, State)


def pick(values_BM: Tensor, index_B: Tensor) -> Tensor:
    """values[b, index[b]], for any trailing shape."""
    return values_BM[torch.arange(values_BM.shape[0], device=values_BM.device), index_B]


def directions(device: torch.device) -> Tensor:
    """Unit vectors (4, 2) of left, right, forward, back as the camera sees them."""
    return torch.tensor([[0.0, -1.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]], device=device)


def keys(episodes: Sequence[EpisodeSpec], tasks: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(family_F, key_F) int64. The family, not its place in `tasks`, keys the draws."""
    family = torch.tensor([TASKS.index(tasks[e.task]) for e in episodes], dtype=torch.int64, device=device)
    seed = torch.tensor([e.seed for e in episodes], dtype=torch.int64, device=device)
    init_state = torch.tensor([e.init_state for e in episodes], dtype=torch.int64, device=device)
    return family, rng.fold(seed, init_state, family)


def _draw(key_F: Tensor, stream: int, count: int) -> Tensor:
    """float64 (F, count) uniform in [0, 1)."""
    return rng.uniform(rng.fold(key_F[:, None], stream, torch.arange(count, device=key_F.device)[None]))


def _choice(u: Tensor, values: Sequence[object]) -> Tensor:
    """One of `values` (numbers or nested tuples of them) for each u."""
    table = torch.tensor(values, device=u.device)
    return table[(u * len(values)).to(torch.int64)]


def _order(key_F: Tensor, stream: int, count: int) -> Tensor:
    """A random order of 0..count-1 for each key, int64 (F, count)."""
    return _draw(key_F, stream, count).argsort(dim=1, stable=True)


def draw(family_F: Tensor, key_F: Tensor, row: Variation) -> tuple[Scene, State]:
    """The scenes and starting states of F episodes: a pure function of (family, key, variation)."""
    count = row.objects
    cells = torch.tensor([(x, y) for x in row.cells_x for y in row.cells_y], device=key_F.device)
    jitter = ((2 * _draw(key_F, _JITTER, 2 * len(cells)) - 1) * row.jitter).float().view(-1, len(cells), 2)
    place = cells[_order(key_F, _CELLS, len(cells))] + jitter
    objects, plates, spare = place[:, :count], place[:, count : count + PLATES], place[:, count + PLATES]
    target = rng.integers(rng.fold(key_F, _TARGET), count)
    u = _draw(key_F, _START, 6)
    ee = torch.stack([(2 * u[:, 0] - 1) * row.start_xy, (2 * u[:, 1] - 1) * row.start_xy,
                      row.start_z[0] + u[:, 2] * (row.start_z[1] - row.start_z[0])], -1).float()
    move = _draw(key_F, _MOVE, 2)
    move_step = torch.where(move[:, 0] < row.move_probability, 3 + (move[:, 1] * 7).to(torch.int64), -1)
    pushed_from = torch.where((move_step >= 0)[:, None], spare, pick(objects, target))
    blocked = _blocked(objects, target, pushed_from)
    way = (_draw(key_F, _GOAL, 5)[:, :4] - blocked.double()).argmax(1)
    goal = torch.where(family_F == PUSH, way, rng.integers(rng.fold(key_F, _GOAL, 4), PLATES))
    state = State(
        ee_B3=ee, euler_B3=((2 * u[:, 3:] - 1) * row.start_angle).float(), closed_B=torch.zeros_like(target, dtype=torch.bool),
        held_B=torch.full_like(target, -1), object_BM3=torch.cat([objects, torch.full_like(objects[..., :1], HALF)], -1),
        yaw_BM=((2 * _draw(key_F, _YAW, count) - 1) * row.object_yaw).float(), plate_BP2=plates, origin_B2=pick(objects, target),
        step_B=torch.zeros_like(target),
    )
    miss, short = _miss(key_F, family_F, state, target, goal)
    scene = Scene(
        family_B=family_F, target_B=target, goal_B=goal, way_B2=directions(key_F.device)[goal],
        template_B=row.templates[0] + rng.integers(rng.fold(key_F, _TEMPLATE), row.templates[1] - row.templates[0]),
        colour_BM=_order(key_F, _COLOUR, 4)[:, :count], plate_colour_BP=_order(key_F, _PLATE_COLOUR, 4)[:, :PLATES],
        shape_BM=_choice(_draw(key_F, _SHAPE, count), row.shapes), luck_B=rng.uniform(rng.fold(key_F, _LUCK)),
        miss_B2=miss, short_B=short, move_step_B=move_step, move_to_B2=spare, **_looks(key_F, row, count),
    )
    return scene, state


def _blocked(objects_FM2: Tensor, target_F: Tensor, start_F2: Tensor) -> Tensor:
    """bool (F, 4): another object stands where a push of the target that way would need room, or the way leaves the reach."""
    way = directions(objects_FM2.device)
    rel = objects_FM2[:, None] - start_F2[:, None, None]
    along = rel[..., 0] * way[None, :, None, 0] + rel[..., 1] * way[None, :, None, 1]
    across = rel[..., 0] * way[None, :, None, 1] - rel[..., 1] * way[None, :, None, 0]
    other = torch.arange(objects_FM2.shape[1], device=objects_FM2.device)[None] != target_F[:, None]
    inside = (across.abs() < 0.08) & (along > -0.16) & (along < 0.17) & other[:, None]
    end = start_F2[:, None] + 0.10 * way[None]
    off = (end[..., 0].abs() > REACH[0] - 0.01) | (end[..., 1].abs() > REACH[1] - 0.01)
    return inside.any(-1) | off


def _unit_angle(angle_F: Tensor) -> Tensor:
    """(cos, sin) float32, through float64: the last bit of float32 ones can differ between vector and scalar code."""
    return torch.stack([angle_F.double().cos(), angle_F.double().sin()], -1).float()


def _miss(key_F: Tensor, family_F: Tensor, state: State, target_F: Tensor, goal_F: Tensor) -> tuple[Tensor, Tensor]:
    """How a clumsy expert errs. put: lets go 8-11 cm from the plate, on the side it comes from; touch: stops 7-8 cm before the
    object; both within 0.5 rad of that side. push: stops after 4-5 cm."""
    u = _draw(key_F, _MISS, 3)
    cube = pick(state.object_BM3, target_F)[:, :2]
    put = (family_F == PUT)[:, None]
    back = torch.where(put, cube - pick(state.plate_BP2, goal_F.clamp(max=PLATES - 1)), state.ee_B3[:, :2] - cube)
    length = (back[:, 0] * back[:, 0] + back[:, 1] * back[:, 1]).sqrt().clamp(min=1e-3)
    unit = back / length[:, None]
    turn = _unit_angle((2 * u[:, 0] - 1) * 0.5)
    unit = torch.stack([unit[:, 0] * turn[:, 0] - unit[:, 1] * turn[:, 1], unit[:, 0] * turn[:, 1] + unit[:, 1] * turn[:, 0]], -1)
    radius = torch.where(put[:, 0], 0.08 + 0.03 * u[:, 1], 0.07 + 0.01 * u[:, 1]).float()
    return unit * radius[:, None], (0.04 + 0.01 * u[:, 2]).float()


def _looks(key_F: Tensor, row: Variation, count: int) -> dict[str, Tensor]:
    """The fields of Scene that only the renderer reads."""
    device = key_F.device
    shade = (1 + (2 * _draw(key_F, _SHADE, count + PLATES) - 1) * row.shade).float()[..., None]
    colour, plate_colour = _order(key_F, _COLOUR, 4)[:, :count], _order(key_F, _PLATE_COLOUR, 4)[:, :PLATES]
    table, light = _draw(key_F, _TABLE, 3), _draw(key_F, _LIGHT, 3)
    tilt = (2 * light[:, :2] - 1) * row.light_tilt
    towards = torch.stack([0.35 + tilt[:, 0], -0.45 + tilt[:, 1], torch.ones_like(tilt[:, 0])], -1)
    norm = (towards[:, 0] * towards[:, 0] + towards[:, 1] * towards[:, 1] + towards[:, 2] * towards[:, 2]).sqrt()
    return {
        "rgb_BM3": (torch.tensor(row.object_rgb, device=device)[colour] * shade[:, :count]).clamp(max=1),
        "plate_rgb_BP3": (torch.tensor(row.plate_rgb, device=device)[plate_colour] * shade[:, count:]).clamp(max=1),
        "table_B23": _choice(table[:, 0], row.tables), "texture_B": _choice(table[:, 1], row.textures),
        "backdrop_B3": _choice(table[:, 2], row.backdrop), "light_B3": (towards / norm[:, None]).float(),
        "ambient_B": (row.ambient[0] + light[:, 2] * (row.ambient[1] - row.ambient[0])).float(),
        "camera_B3": ((2 * _draw(key_F, _CAMERA, 3) - 1) * row.camera_shift).float(),
    }


def write_rows(whole: Record, index_F: Tensor, rows: Record) -> None:
    """whole[index] = rows, field by field, in place."""
    for f in fields(whole):
        getattr(whole, f.name)[index_F] = getattr(rows, f.name)


def read_rows(whole: Record, index_F: Tensor) -> Record:
    """A record holding the rows `index_F` of every field."""
    return replace(whole, **{f.name: getattr(whole, f.name)[index_F] for f in fields(whole)})


def choose(mask_B: Tensor, new: State, old: State) -> State:
    """new where mask, old elsewhere."""
    picked = {}
    for f in fields(new):
        a, b = getattr(new, f.name), getattr(old, f.name)
        picked[f.name] = torch.where(mask_B.view(-1, *[1] * (a.dim() - 1)), a, b)
    return replace(new, **picked)
