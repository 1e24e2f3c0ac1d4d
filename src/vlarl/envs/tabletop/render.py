"""Owns the pictures: batched ray casting of table, plates, shadows, objects and gripper, from a fixed or a wrist camera.

Everything is cast in the camera's frame (x right, y down, z forward), where the rays are (x, y, 1) and the ray parameter is the
depth. The table and the plates are one plane each: a background picture, kept per slot by the caller since it rarely changes. Each
solid is cast only inside a window of fixed size around its projected centre. A pixel is one int32, red | green << 8 | blue << 16;
solids are merged by the smallest (depth, colour) key, which no order can change. No sums over a batch, no matrix products:
pictures are bit-identical whatever the batch.
Shape legend: F frames, S pixels a side, K solids, W window side.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlarl.envs.tabletop.scene import HALF, PLATE_RADIUS, PLATE_TOP, Scene, State

TABLE = (0.30, 0.34)  # half size of the table's top
EYE = (0.64, 0.0, 1.00)  # third-person camera
LOOK_AT = (0.035, 0.0, 0.04)
SPREAD = math.tan(math.radians(32) / 2)  # third-person: half a picture's width at depth 1
# Third-person windows: (radius of the bounding ball, least depth) of what they must hold; a test checks the depths.
OBJECT_BOUND, GRIPPER_BOUND, SHADOW_BOUND = (0.0595, 0.65), (0.040, 0.57), (0.056, 0.92)
WRIST_EYE = (0.075, 0.0, 0.10)  # in the gripper's frame
WRIST_LOOK_AT = (0.03, 0.0, -0.02)
WRIST_SPREAD = math.tan(math.radians(75) / 2)
BALL, CAN = 0.036, 0.030  # radii
BACK = 0x7F000000 << 32  # key of the background: a depth beyond any solid
MISS = 0x7F7FFFFF << 32
STEEL, GRIP_DARK = (0.30, 0.31, 0.34), (0.16, 0.17, 0.20)
SHADOW = 0.42  # share of light that a shadow's middle takes


@dataclass(frozen=True)
class Camera:
    """eye_F3, axes_F33: rows right, down, forward, in the world. spread: half width at depth 1. Windows, pixels a side: of an object,
    of a part of the gripper, of a shadow."""

    eye_F3: Tensor
    axes_F33: Tensor
    spread: float
    object_window: int
    gripper_window: int
    shadow_window: int


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over a last axis of 3, written out: its order must not depend on the batch."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a[..., 1] * b[..., 2] - a[..., 2] * b[..., 1], a[..., 2] * b[..., 0] - a[..., 0] * b[..., 2],
                        a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]], -1)


def _unit(a: Tensor) -> Tensor:
    return a / _dot(a, a).sqrt()[..., None]


def _axes(forward_F3: Tensor, up: Tensor) -> Tensor:
    forward = _unit(forward_F3)
    right = _unit(_cross(forward, up.expand_as(forward)))
    return torch.stack([right, _cross(forward, right), forward], -2)


def third_person(shift_F3: Tensor, size: int) -> Camera:
    """The fixed camera, moved by shift_F3 metres; it always looks at the same point."""
    eye = torch.tensor(EYE, device=shift_F3.device) + shift_F3
    forward = torch.tensor(LOOK_AT, device=eye.device) - eye
    bounds = (OBJECT_BOUND, GRIPPER_BOUND, SHADOW_BOUND)
    windows = [min(size, 2 * math.ceil(radius / depth / SPREAD * size / 2) + 2) for radius, depth in bounds]
    return Camera(eye, _axes(forward, torch.tensor([0.0, 0.0, 1.0], device=eye.device)), SPREAD, *windows)


def wrist(state: State, size: int) -> Camera:
    """The camera on the gripper; windows are the whole picture."""
    turn = rotation(state.euler_B3)
    place = lambda point: state.ee_B3 + _turned(turn, torch.tensor(point, device=turn.device).expand_as(state.ee_B3))  # noqa: E731
    eye, look_at = place(WRIST_EYE), place(WRIST_LOOK_AT)
    up = _turned(turn, torch.tensor([-1.0, 0.0, 0.0], device=turn.device).expand_as(eye))
    return Camera(eye, _axes(look_at - eye, up), WRIST_SPREAD, size, size, size)


def rotation(euler_F3: Tensor) -> Tensor:
    """Rz(yaw) Ry(pitch) Rx(roll), (F, 3, 3) float32; sines in float64, whose rounding to float32 is the same in vector and scalar code."""
    c, s = euler_F3.double().cos().float(), euler_F3.double().sin().float()
    (cr, cp, cy), (sr, sp, sy) = c.unbind(-1), s.unbind(-1)
    first = [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr]
    second = [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr]
    return torch.stack([*first, *second, -sp, cp * sr, cp * cr], -1).unflatten(-1, (3, 3))


def _turned(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix @ vector over the last axes."""
    return torch.stack([_dot(matrix[..., i, :], vector) for i in range(3)], -1)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for (..., 3, 3)."""
    return torch.stack([_turned(a, b[..., i]) for i in range(3)], -1)


def _pixels(size: int, spread: float, device: torch.device) -> Tensor:
    return ((torch.arange(size, device=device) + 0.5) * 2 / size - 1) * spread


def _pack(rgb: Tensor) -> Tensor:
    """0..1 colours (..., 3) to int32 pixels."""
    r, g, b = (rgb.clamp(0, 1) * 255 + 0.5).to(torch.int32).unbind(-1)
    return r | g << 8 | b << 16


def _scaled(pixel: Tensor, factor: Tensor) -> Tensor:
    """Packed colours times factor (0..1), two channels at a time."""
    m = (factor * 256).to(torch.int32)
    return (((pixel & 0xFF00FF) * m) >> 8) & 0xFF00FF | (((pixel & 0x00FF00) * m) >> 8) & 0x00FF00


def _plane(camera: Camera, x_W: Tensor, y_W: Tensor, height: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays meet the plane z = height: world x, y and the ray parameter (not positive: no hit). x_W, y_W broadcast to (F, W, W)."""
    a = camera.axes_F33[..., None, None]
    d = [x_W * a[:, 0, i] + (y_W * a[:, 1, i] + a[:, 2, i]) for i in range(3)]
    eye = camera.eye_F3[..., None, None]
    t = (height - eye[:, 2]) / d[2]
    return eye[:, 0] + t * d[0], eye[:, 1] + t * d[1], t


def background(camera: Camera, scene: Scene, plates_F22: Tensor, size: int) -> Tensor:
    """Table, plates and surroundings, int32 pixels (F, S*S)."""
    line = _pixels(size, camera.spread, plates_F22.device)
    x, y = line[None, None, :], line[None, :, None]
    wx, wy, t = _plane(camera, x, y, 0.0)
    checks = ((wx * 10).floor() + (wy * 10).floor()).to(torch.int32) & 1
    stripes = (wy * 16).floor().to(torch.int32) & 1
    kind = scene.texture_B[:, None, None]
    second = torch.where(kind == 1, checks, torch.where(kind == 2, stripes, 0)).bool()
    table = _pack(scene.table_B23)
    light = 0.94 + 0.06 * scene.light_B3[:, 2, None, None] - 0.12 * (wx * wx + wy * wy)  # a little darker towards the edges
    top = _scaled(torch.where(second, table[:, 1, None, None], table[:, 0, None, None]), light.clamp(0, 1))
    on = (wx.abs() < TABLE[0]) & (wy.abs() < TABLE[1]) & (t > 0)
    edge = (wx.abs() < TABLE[0] + 0.02) & (wy.abs() < TABLE[1] + 0.02) & (t > 0)
    backdrop = _pack(scene.backdrop_B3)[:, None, None]
    image = torch.where(on, top, torch.where(edge, _scaled(table[:, :1, None], torch.full_like(t, 0.62)), backdrop))
    px, py, pt = _plane(camera, x, y, PLATE_TOP)
    plate = _pack(scene.plate_rgb_BP3)
    rim = _pack(0.55 + 0.45 * scene.plate_rgb_BP3)
    for p in range(plates_F22.shape[1]):
        cx, cy = plates_F22[:, p, 0, None, None], plates_F22[:, p, 1, None, None]
        below = (wx - cx) * (wx - cx) + (wy - cy) * (wy - cy)
        square = (px - cx) * (px - cx) + (py - cy) * (py - cy)
        foot = (below < (PLATE_RADIUS + 0.004) ** 2) & (t > 0)
        image = torch.where(foot, _scaled(image, torch.full_like(t, 0.7)), image)
        image = torch.where((square < PLATE_RADIUS**2) & (pt > 0), rim[:, p, None, None], image)
        image = torch.where((square < (PLATE_RADIUS - 0.009) ** 2) & (pt > 0), plate[:, p, None, None], image)
    return image.flatten(1)


def _windows(camera: Camera, centre_FK3: Tensor, side: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Windows around points of the camera's frame: ray coordinates x (F, K, 1, W), y (F, K, W, 1), flat pixel index (F, K, W, W)."""
    depth = centre_FK3[..., 2:].clamp(min=0.05)
    pixel = (centre_FK3[..., :2] / depth / camera.spread + 1) * (size / 2) - side / 2
    corner = pixel.round().clamp(0, size - side).to(torch.int64)
    steps = torch.arange(side, device=corner.device)
    column, row = corner[..., 0, None] + steps, corner[..., 1, None] + steps
    line = _pixels(size, camera.spread, corner.device)
    return line[column][:, :, None], line[row][..., None], row[..., None] * size + column[:, :, None]


def _to_camera(camera: Camera, point_FK3: Tensor) -> Tensor:
    return _turned(camera.axes_F33[:, None], point_FK3 - camera.eye_F3[:, None])


def _box_hits(camera: Camera, centre: Tensor, half: Tensor, turn: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slab test of K boxes: depth, hit, and bools telling whether the face is along the box's z or y axis. centre: camera frame.
    half (F or 1, K, 3). turn (F, K, 3, 3): columns are the box's axes in the world."""
    axes = _matmul(camera.axes_F33[:, None], turn)  # columns: the box's axes in the camera's frame
    near, far = [], []
    for i in range(3):
        axis = axes[..., i]
        origin = -_dot(axis, centre)[..., None, None]
        h = half[..., i, None, None]
        inverse = 1 / (x * axis[..., 0, None, None] + (y * axis[..., 1, None, None] + axis[..., 2, None, None]))
        t1, t2 = (-h - origin) * inverse, (h - origin) * inverse
        near.append(torch.minimum(t1, t2))
        far.append(torch.maximum(t1, t2))
    enter = torch.maximum(torch.maximum(near[0], near[1]), near[2])
    leave = torch.minimum(torch.minimum(far[0], far[1]), far[2])
    return enter, (enter < leave) & (enter > 0), enter == near[2], enter == near[1]


def _box_keys(camera: Camera, scene: Scene, boxes: tuple[Tensor, Tensor, Tensor, Tensor], local: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Keys (F, K, W, W) of boxes (centre, half, turn, rgb) in the windows x, y. local: their centres in the camera's frame."""
    centre, half, turn, rgb = boxes
    depth, hit, is_z, is_y = _box_hits(camera, local, half, turn, x, y)
    face_x, face_y, face_z = (c[..., None, None] for c in _face_colours(camera, scene, centre, turn, rgb))
    return _key(depth, hit, torch.where(is_z, face_z, torch.where(is_y, face_y, face_x)))


def _face_colours(camera: Camera, scene: Scene, centre_world: Tensor, turn: Tensor, rgb: Tensor) -> list[Tensor]:
    """Packed colours (F, K), int64, of the three faces of each box that the camera can see, along its x, y, z axes."""
    out = []
    for i in range(3):
        axis = turn[..., i]
        side = torch.where(_dot(axis, camera.eye_F3[:, None] - centre_world) > 0, 1.0, -1.0)
        facing = (_dot(axis, scene.light_B3[:, None]) * side).clamp(min=0)
        shade = scene.ambient_B[:, None] + (1 - scene.ambient_B[:, None]) * facing
        out.append(_pack(rgb * shade[..., None]).to(torch.int64))
    return out


def _gripper(state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gripper's boxes, K = 5: centre (F, K, 3), half (F, K, 3), turn (F, K, 3, 3), rgb (F, K, 3). Two fingers, the palm in two halves
    (smaller windows), a stub of the arm."""
    device, frames = state.ee_B3.device, state.ee_B3.shape[0]
    turn = rotation(state.euler_B3)[:, None]
    opening = torch.where(state.closed_B, torch.where(state.held_B >= 0, HALF + 0.008, 0.009), HALF + 0.016)
    side = torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0], device=device) * opening[:, None]
    side = side + torch.tensor([0.0, 0.0, -0.029, 0.029, 0.0], device=device)
    high = torch.tensor([0.018, 0.018, 0.066, 0.066, 0.10], device=device).expand(frames, -1)
    centre = state.ee_B3[:, None] + _turned(turn, torch.stack([torch.zeros_like(side), side, high], -1))
    finger, palm = [0.012, 0.008, 0.036], [0.020, 0.029, 0.014]
    half = torch.tensor([finger, finger, palm, palm, [0.022, 0.022, 0.024]], device=device).expand(frames, -1, -1)
    rgb = torch.tensor([GRIP_DARK, GRIP_DARK, STEEL, STEEL, STEEL], device=device).expand(frames, -1, -1)
    return centre, half, turn.expand(-1, 5, -1, -1), rgb


def _objects(state: State, scene: Scene) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The objects as boxes, in the same form."""
    zero = torch.zeros_like(state.yaw_BM)
    turn = rotation(torch.stack([zero, zero, state.yaw_BM], -1))
    return state.object_BM3, torch.full_like(state.object_BM3, HALF), turn, scene.rgb_BM3


def _round_keys(camera: Camera, scene: Scene, local: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Keys (F, M, W, W) of balls and cans (shapes 1 and 2) in the objects' windows; meaningless for cubes."""
    centre = local[..., None, None]
    light = _turned(camera.axes_F33, scene.light_B3)[:, None, :, None, None]
    up = camera.axes_F33[:, None, :, 2, None, None]  # the world's z in the camera's frame
    ones = torch.ones_like(x * y)
    ray = [x * ones, y * ones, ones]
    dot = lambda a, b: a[0] * b[0] + a[1] * b[1] + a[2] * b[2]  # noqa: E731
    c, v = centre.unbind(2), up.unbind(2)
    rr, rc, cc, rv, cv = dot(ray, ray), dot(ray, c), dot(c, c), dot(ray, v), dot(c, v)
    gap = rc * rc - rr * (cc - BALL * BALL)
    ball = (rc - gap.clamp(min=0).sqrt()) / rr
    # A can: the ball's formula without the part along its axis, cut at its height, and the lid.
    qa, qb, qc = rr - rv * rv, rc - rv * cv, cc - cv * cv - CAN * CAN
    side_gap = qb * qb - qa * qc
    side = (qb - side_gap.clamp(min=0).sqrt()) / qa
    side_hit = (side_gap > 0) & ((side * rv - cv).abs() < HALF) & (side > 0)
    lid = (cv + HALF) / rv
    off = [lid * r - m for r, m in zip(ray, c, strict=True)]
    lid_hit = (dot(off, off) - HALF * HALF < CAN * CAN) & (lid > 0) & (~side_hit | (lid < side))
    is_can = (scene.shape_BM == 2)[..., None, None]
    depth = torch.where(is_can, torch.where(lid_hit, lid, side), ball)
    hit = torch.where(is_can, lid_hit | side_hit, (gap > 0) & (ball > 0))
    normal = [depth * r - m for r, m in zip(ray, c, strict=True)]
    along = dot(normal, v)
    normal = [torch.where(is_can, torch.where(lid_hit, w, (n - along * w) / CAN), n / BALL) for n, w in zip(normal, v, strict=True)]
    ambient = scene.ambient_B[:, None, None, None]
    shade = ambient + (1 - ambient) * dot(normal, light.unbind(2)).clamp(0, 1)
    return _key(depth, hit, _scaled(_pack(scene.rgb_BM3)[..., None, None], shade.clamp(0, 1)).to(torch.int64))


def _shadows(image: Tensor, camera: Camera, state: State, scene: Scene, size: int) -> Tensor:
    """Soft discs on the table under objects and gripper; the gripper's tells its height and place."""
    count = state.object_BM3.shape[1]
    above = torch.cat([state.object_BM3, state.ee_B3[:, None]], 1)
    lift = (above[..., 2] - HALF).clamp(min=0)
    lean = -scene.light_B3[:, None, :2] * 0.25 * (lift[..., None] + 0.02)
    ground = torch.cat([above[..., :2] + lean, torch.zeros_like(lift[..., None])], -1)
    x, y, index = _windows(camera, _to_camera(camera, ground), camera.shadow_window, size)
    for k in range(count + 1):
        wx, wy, t = _plane(camera, x[:, k], y[:, k], 0.0)
        rx, ry = wx - ground[:, k, 0, None, None], wy - ground[:, k, 1, None, None]
        radius = 0.055 if k < count else 0.05
        dark = (1.35 - 1.35 * (rx * rx + ry * ry) / (radius * radius)).clamp(0, 1) * (t > 0)
        flat = index[:, k].flatten(1)
        image.scatter_(1, flat, _scaled(image.gather(1, flat), 1 - SHADOW * dark.flatten(1)))
    return image


def _key(depth: Tensor, hit: Tensor, colour: Tensor) -> Tensor:
    """int64 depth << 32 | colour (int64); positive floats order like their bits."""
    return torch.where(hit, depth.contiguous().view(torch.int32).to(torch.int64) << 32 | colour, MISS)


def _merge(nearest: Tensor, key: Tensor, index: Tensor) -> None:
    """Writes the K solids' keys where they are the nearest so far. nearest (F, S*S) int64, in place."""
    for k in range(key.shape[1]):
        flat = index[:, k].flatten(1)
        nearest.scatter_(1, flat, torch.minimum(nearest.gather(1, flat), key[:, k].flatten(1)))


def picture(camera: Camera, scene: Scene, state: State, background_FP: Tensor, size: int, round_shapes: bool) -> Tensor:
    """uint8 (F, S, S, 3). background_FP: of this camera, not changed. round_shapes: the variation has balls and cans."""
    image = _shadows(background_FP.clone(), camera, state, scene, size)
    nearest = image.to(torch.int64) | BACK
    boxes = _gripper(state)
    local = _to_camera(camera, boxes[0])
    x, y, index = _windows(camera, local, camera.gripper_window, size)
    _merge(nearest, _box_keys(camera, scene, boxes, local, x, y), index)
    boxes = _objects(state, scene)
    local = _to_camera(camera, boxes[0])
    x, y, index = _windows(camera, local, camera.object_window, size)
    key = _box_keys(camera, scene, boxes, local, x, y)
    if round_shapes:
        key = torch.where((scene.shape_BM > 0)[..., None, None], _round_keys(camera, scene, local, x, y), key)
    _merge(nearest, key, index)
    return nearest.view(torch.uint8).view(-1, size, size, 8)[..., :3].contiguous()
