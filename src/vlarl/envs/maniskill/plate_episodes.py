"""Owns the arithmetic of the plate suite's episodes: what an id means, positions, yaws and arm poses. NumPy only.

An episode is one number, read as digits of mixed radix; ids mean the same scenes as published.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import pi, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlarl.envs.maniskill.plate_settings import Layout, Setting

CENTRE = (-0.16, 0.0)  # m, of the square in which things lie
HALF_EDGE = 0.075  # m
INNER_LINES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # in widths of the square
OUTER_LINES = (-0.2, *INNER_LINES, 1.2)
APART, FAR_APART = 0.07, 0.15  # m: two things lie further apart than that
HEIGHTS = {  # m above the floor, of object, plate and the third place; the table is 0.87 high, so things fall onto it
    "pair": (0.90, 0.90),
    "outer pair": (0.95, 0.95),
    "third object": (0.95, 0.92, 1.0),
    "third plate": (1.0, 0.92, 0.96),
}
YAWS = (0.0, pi / 4, pi / 2, pi * 3 / 4)  # rad
OUTER_YAWS = (-pi / 8, -pi * 3 / 8, -pi * 5 / 8, -pi * 7 / 8)
ARM_STEPS = (-0.15, -0.08, 0.0, 0.08, 0.15)  # rad, added to each of the first five joints of the arm
WRIST_STEPS = (-0.6, -0.3, 0.0, 0.3, 0.6)
MAX_LEAN = 0.25  # rad, of shoulder and elbow together


@dataclass(frozen=True)
class Selection:
    """What the episodes of some ids are made of: integers, shape (B,), rows of the asset tables and of `positions`, `yaws`, `arm_offsets`.

    extra: texture, sentence, arm pose or distractor, as Setting.extra says; 0 where there is none.
    """

    object: Any
    plate: Any
    photo: Any
    position: Any
    yaw: Any
    extra: Any


def _digits(setting: Setting) -> tuple[tuple[str, int], ...]:
    """Names and radices, most significant first."""
    numbers = {
        "object": setting.objects[0], "extra": setting.extras, "plate": setting.plates[0], "photo": setting.photos[0],
        "position": len(positions(setting.layout)), "yaw": len(yaws(setting.layout)),
    }
    order = ("object", "plate", "extra") if setting.extra == "plate" else ("object", "extra", "plate")
    return tuple((name, numbers[name]) for name in (*order, "photo", "position", "yaw"))


def trials(setting: Setting) -> int:
    """How many different episodes a setting has."""
    return prod(count for _, count in _digits(setting))


def decode(setting: Setting, episode_id: Any) -> Selection:
    """The contents of episodes. episode_id: int64 array or tensor (B,), taken modulo `trials(setting)`; fields come back as the same type.

    As published, an eighth of the ids of MultiCarrot name the object as its own distractor: it then lies alone at the third place.
    """
    rest, digit = episode_id % trials(setting), {}
    for name, count in reversed(_digits(setting)):
        digit[name] = rest % count
        rest = rest // count
    plate, extra = digit["plate"], digit["extra"]
    digit["object"] = digit["object"] + setting.objects[1]
    if setting.extra_modulo:
        extra = ((digit["object"] if setting.extra == "object" else plate) + extra + 1) % setting.extra_modulo
    digit["extra"] = extra + setting.extra_first
    digit["plate"] = plate + setting.plates[1]
    digit["photo"] = digit["photo"] + setting.photos[1]
    return Selection(**digit)


def _points(lines: tuple[float, ...]) -> NDArray[np.float64]:
    """Crossings of the lines, (P, 2) metres, x slowest."""
    grid = np.array(list(product(lines, lines))) * 2 - 1
    return grid * HALF_EDGE + np.array(CENTRE)


@cache
def positions(layout: Layout) -> NDArray[np.float64]:
    """Places of object, plate and, where there is a third, distractor or goal of the jump: (N, 2 or 3, 3) metres. Do not write to it."""
    points = _points(INNER_LINES)
    if layout == "outer pair":
        square = list(product(OUTER_LINES, OUTER_LINES))
        points = _points(OUTER_LINES)[[n for n, line in enumerate(square) if set(line) & {-0.2, 1.2}]]
    # Two distances lie on a threshold, so the ids hang on the last bit: this is what numpy.linalg.norm gives, pair by pair.
    gap = np.array([[np.linalg.norm(a - b) for b in points] for a in points])
    if layout in ("pair", "outer pair"):
        chosen = np.argwhere(gap > APART)
    else:
        object_third, plate_third = (FAR_APART, APART) if layout == "third object" else (APART, FAR_APART)
        chosen = np.argwhere((gap > APART)[:, :, None] & (gap > object_third)[:, None, :] & (gap > plate_third)[None])
    height = np.broadcast_to(np.array(HEIGHTS[layout]), chosen.shape)
    return np.concatenate([points[chosen], height[..., None]], -1)


def yaws(layout: Layout) -> tuple[float, ...]:
    """Rotations of objects about the vertical, radians. Plates are not rotated."""
    return OUTER_YAWS if layout == "outer pair" else YAWS


@cache
def arm_offsets() -> NDArray[np.float64]:
    """(14376, 8) radians and metres added to the joints at the start; row 0 is the usual start, the others are drawn by EEPose."""
    rows = [q for q in product(*[ARM_STEPS] * 5, WRIST_STEPS) if abs(q[1] + q[2]) <= MAX_LEAN]
    offsets = np.zeros((1 + len(rows), 8))
    offsets[1:, :6] = rows
    return offsets
