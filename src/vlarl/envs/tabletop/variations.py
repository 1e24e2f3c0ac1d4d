"""Owns the distributions of scenes: one frozen row of numbers per variation, all drawn by the same code."""
from __future__ import annotations

from dataclasses import dataclass, replace

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Variation:
    """One distribution of scenes. Lengths in metres, angles in radians, colours 0..1.

    objects: movable objects per scene. shapes: numbers of the shapes drawn (0 cube, 1 ball, 2 can). templates: range of the
    sentences drawn. cells_x, cells_y: grid on which things are laid, each moved by up to `jitter` a side.
    object_yaw: largest rotation of an object.
    start_xy, start_z, start_angle: gripper's start (half-range, range, half-range of each Euler angle).
    move_probability: share of episodes whose target moves once. object_rgb, plate_rgb: by colour number; shade: half-range of a
    brightness factor. tables: pairs of table colours; textures: numbers drawn (0 plain, 1 checks, 2 stripes). backdrop: colours
    around the table. ambient: range; light_tilt: half-range of the light's direction. camera_shift: half-range of its position.
    """

    objects: int
    shapes: tuple[int, ...]
    templates: tuple[int, int]
    cells_x: tuple[float, ...]
    cells_y: tuple[float, ...]
    jitter: float
    object_yaw: float
    start_xy: float
    start_z: tuple[float, float]
    start_angle: float
    move_probability: float
    object_rgb: tuple[RGB, RGB, RGB, RGB]
    plate_rgb: tuple[RGB, RGB, RGB, RGB]
    shade: float
    tables: tuple[tuple[RGB, RGB], ...]
    textures: tuple[int, ...]
    backdrop: tuple[RGB, ...]
    ambient: tuple[float, float]
    light_tilt: float
    camera_shift: float


TRAIN = Variation(
    objects=2, shapes=(0,), templates=(0, 1), cells_x=(-0.14, 0.0, 0.14), cells_y=(-0.21, -0.07, 0.07, 0.21), jitter=0.02, object_yaw=0.2,
    start_xy=0.05, start_z=(0.17, 0.22), start_angle=0.0, move_probability=0.0,
    object_rgb=((0.86, 0.13, 0.12), (0.10, 0.62, 0.20), (0.10, 0.26, 0.88), (0.98, 0.80, 0.08)),
    plate_rgb=((0.95, 0.55, 0.53), (0.55, 0.84, 0.58), (0.53, 0.66, 0.97), (0.99, 0.92, 0.55)),
    shade=0.0, tables=(((0.73, 0.65, 0.55), (0.70, 0.62, 0.52)),), textures=(0,), backdrop=((0.26, 0.29, 0.34),),
    ambient=(0.62, 0.62), light_tilt=0.0, camera_shift=0.0,
)
ROWS = {
    "train": TRAIN,
    "vision": replace(
        TRAIN, object_rgb=((0.72, 0.06, 0.20), (0.30, 0.72, 0.10), (0.12, 0.45, 0.80), (0.85, 0.70, 0.25)),
        plate_rgb=((0.88, 0.42, 0.48), (0.62, 0.80, 0.42), (0.42, 0.68, 0.85), (0.90, 0.84, 0.42)), shade=0.15,
        tables=(
            ((0.42, 0.44, 0.47), (0.50, 0.52, 0.55)), ((0.90, 0.89, 0.86), (0.78, 0.79, 0.80)), ((0.45, 0.30, 0.20), (0.53, 0.36, 0.24)),
        ),
        textures=(0, 1, 2), backdrop=((0.55, 0.60, 0.64), (0.15, 0.16, 0.20), (0.44, 0.38, 0.42)), ambient=(0.45, 0.75), light_tilt=0.6,
        camera_shift=0.04,
    ),
    "semantics": replace(TRAIN, objects=4, shapes=(0, 1, 2), templates=(1, 4)),
    "execution": replace(
        TRAIN, cells_x=(-0.21, -0.07, 0.07, 0.21), cells_y=(-0.27, -0.14, 0.0, 0.14, 0.27), jitter=0.02, object_yaw=0.4, start_xy=0.16,
        start_z=(0.10, 0.30), start_angle=0.35, move_probability=0.5,
    ),
}
