"""Owns frames on their way to the towers: resizing and cropping, on the frames' device, with the bytes that published checkpoints saw.

Legend: B images, H W pixels, S the towers' size, T taps of a filter.
"""
from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vlarl.policies.layout import Resize, ResizeStrategy

CROP_AREA = 0.9
PIL_BITS = 22  # of the fixed-point weights in PIL's 8-bit resampling (32 - 8 - 2)
LETTERBOX_FILL = (123, 116, 103)  # int(255 x ImageNet's mean)


def fit_frames(frame_BHWC: Tensor, size: int, resize: Resize, crop: bool, strategy: ResizeStrategy) -> Tensor:
    """uint8 RGB (B,H,W,3) -> uint8 (B,S,S,3).

    strategy: resize-naive ignores the aspect, letterbox pads to a square, resize-crop resizes the short side and cuts out the middle.
    resize: pil (bicubic, the published image processor), tensor (bicubic on float tensors), lanczos (TensorFlow's lanczos3). crop: then
    take the middle 90 % of the area and scale it back, as policies trained with augmented frames want it (TensorFlow's crop_and_resize,
    bilinear); it takes frames of any size, so only lanczos resizes before it.
    """
    if strategy == "letterbox":
        frame_BHWC = _letterbox(frame_BHWC)
    height, width = frame_BHWC.shape[1:3]
    if strategy == "resize-crop" and height != width:
        short = min(height, width)
        frame_BHWC = _resize(frame_BHWC, height * size // short, width * size // short, resize)
        top, left = (round((side - size) / 2) for side in frame_BHWC.shape[1:3])
        frame_BHWC = frame_BHWC[:, top : top + size, left : left + size]
    elif not crop or resize == "lanczos":
        frame_BHWC = _resize(frame_BHWC, size, size, resize)
    return center_crop(frame_BHWC, size) if crop else frame_BHWC


def center_crop(frame_BHWC: Tensor, size: int) -> Tensor:
    """The middle CROP_AREA of the area, bilinear, in float32 with TensorFlow's order of operations and rounding: uint8 (B,S,S,3)."""
    image = frame_BHWC.float() / 255
    side = torch.full((), CROP_AREA, dtype=torch.float32, device=image.device).sqrt()

    def axis(length: int) -> tuple[Tensor, Tensor, Tensor]:
        offset = (1 - side) / 2
        place = offset * (length - 1) + torch.arange(size, device=image.device) * (side * (length - 1) / (size - 1))
        low = place.floor()
        return low.long(), place.ceil().long().clamp(max=length - 1), place - low

    top, bottom, down = axis(image.shape[1])
    left, right, across = axis(image.shape[2])
    down, across = down[:, None, None], across[:, None]

    def row(y: Tensor) -> Tensor:
        rows = image[:, y]
        first = rows[:, :, left]
        return first + (rows[:, :, right] - first) * across

    upper = row(top)
    return ((upper + (row(bottom) - upper) * down).clamp(0, 1) * 255.5).to(torch.uint8)


def _letterbox(frame_BHWC: Tensor) -> Tensor:
    """Pad to a square, the frame in the middle."""
    height, width = frame_BHWC.shape[1:3]
    side = max(height, width)
    square = frame_BHWC.new_tensor(LETTERBOX_FILL).expand(len(frame_BHWC), side, side, 3).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = frame_BHWC
    return square


def _resize(frame_BHWC: Tensor, height: int, width: int, resize: Resize) -> Tensor:
    if frame_BHWC.shape[1:3] == (height, width):
        return frame_BHWC
    if resize == "tensor":
        image = frame_BHWC.permute(0, 3, 1, 2).float()
        image = F.interpolate(image, (height, width), mode="bicubic", antialias=True, align_corners=False)
        return image.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    if resize == "pil":  # columns, then rows, each rounded to a byte
        return _pil_pass(_pil_pass(frame_BHWC, width, 2), height, 1)
    image = frame_BHWC.to(torch.float64)
    image = _filter(_filter(image, width, 2, "lanczos").float().double(), height, 1, "lanczos")
    return image.float().round().clamp(0, 255).to(torch.uint8)


def _pil_pass(frame_BHWC: Tensor, size: int, axis: int) -> Tensor:
    """One axis of PIL's 8-bit bicubic resampling, bit for bit: weights rounded to PIL_BITS, sums in integers."""
    if frame_BHWC.shape[axis] == size:
        return frame_BHWC
    index_ST, weight_ST = _taps(frame_BHWC.shape[axis], size, "bicubic", frame_BHWC.device)
    fixed_ST = (weight_ST * (1 << PIL_BITS) + torch.where(weight_ST < 0, -0.5, 0.5)).trunc().to(torch.int32)
    total = _weigh(frame_BHWC.to(torch.int32), index_ST, fixed_ST, axis) + (1 << (PIL_BITS - 1))
    return (total >> PIL_BITS).clamp(0, 255).to(torch.uint8)


def _filter(image_BHWC: Tensor, size: int, axis: int, kernel: str) -> Tensor:
    return _weigh(image_BHWC, *_taps(image_BHWC.shape[axis], size, kernel, image_BHWC.device), axis)


def _weigh(image_BHWC: Tensor, index_ST: Tensor, weight_ST: Tensor, axis: int) -> Tensor:
    """Weighted sums of taps along one axis, tap after tap: no array is larger than the result."""
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    total = image_BHWC.index_select(axis, index_ST[:, 0]) * weight_ST[:, 0].view(shape)
    for tap in range(1, index_ST.shape[1]):
        total += image_BHWC.index_select(axis, index_ST[:, tap]) * weight_ST[:, tap].view(shape)
    return total


@cache
def _taps(length: int, size: int, kernel: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sources (S,T) int64 and weights (S,T) float64 of an antialiased filter, as PIL's precompute_coeffs has them; unused taps weigh 0."""
    reach, weigh = KERNELS[kernel]
    scale = length / size
    stretch = max(scale, 1.0)
    rows = []
    for i in range(size):
        centre = (i + 0.5) * scale
        first = max(int(centre - reach * stretch + 0.5), 0)
        last = min(int(centre + reach * stretch + 0.5), length)
        weights = [weigh((x + first - centre + 0.5) * (1 / stretch)) for x in range(last - first)]
        total = sum(weights)
        rows.append((first, [w / total for w in weights]))
    taps = max(len(weights) for _, weights in rows)
    index = [[min(first + t, length - 1) for t in range(taps)] for first, _ in rows]
    padded = [weights + [0.0] * (taps - len(weights)) for _, weights in rows]
    return torch.tensor(index, device=device), torch.tensor(padded, dtype=torch.float64, device=device)


def _bicubic(x: float) -> float:
    """Keys' cubic with a = -0.5."""
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _lanczos(x: float) -> float:
    """sinc(x) sinc(x / 3), cut off at 3."""

    def sinc(y: float) -> float:
        return 1.0 if y == 0 else math.sin(y * math.pi) / (y * math.pi)

    return sinc(x) * sinc(x / 3) if -3 <= x < 3 else 0.0


KERNELS = {"bicubic": (2.0, _bicubic), "lanczos": (3.0, _lanczos)}
