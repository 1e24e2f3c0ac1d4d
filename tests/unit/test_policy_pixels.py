"""Frames on their way to the towers, against PIL and against formulas written out."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlarl.policies.pixels import center_crop, fit_frames

SIZES = [(480, 640), (128, 96), (256, 256)]


def frames(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("size", SIZES)
def test_pil_bicubic_to_the_byte(size: tuple[int, int]) -> None:
    frame = frames(*size)
    expected = [np.asarray(Image.fromarray(f.numpy()).resize((224, 224), Image.Resampling.BICUBIC)) for f in frame]
    assert torch.equal(fit_frames(frame, 224, "pil", False, "resize-naive"), torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize("size", SIZES)
def test_lanczos_of_float_channels_to_the_byte(size: tuple[int, int]) -> None:
    frame = frames(*size)[:1]
    channels = [Image.fromarray(frame[0, ..., c].numpy().astype(np.float32), mode="F") for c in range(3)]
    resized = [np.asarray(c.resize((224, 224), Image.Resampling.LANCZOS)) for c in channels]
    expected = np.clip(np.rint(np.stack(resized, -1)), 0, 255).astype(np.uint8)
    assert torch.equal(fit_frames(frame, 224, "lanczos", False, "resize-naive")[0], torch.from_numpy(expected))


def test_tensor_bicubic_rounds_once_where_pil_rounds_twice() -> None:
    frame = frames(480, 640)
    pil, tensor = (fit_frames(frame, 224, kind, False, "resize-naive").int() for kind in ("pil", "tensor"))
    assert 0 < (pil - tensor).abs().max() <= 3


def test_crop_by_its_formula() -> None:
    frame = frames(30, 20)[:1]
    side, x = np.sqrt(np.float32(0.9)), frame[0].numpy().astype(np.float32) / np.float32(255)
    ours = center_crop(frame, 8)[0]
    for i, j in ((0, 0), (3, 5), (7, 7)):
        y, z = (np.float32((1 - side) / 2 * (n - 1) + k * (side * (n - 1) / 7)) for k, n in ((i, 30), (j, 20)))
        top, left, down, across = int(y), int(z), y - int(y), z - int(z)
        upper = x[top, left] + (x[top, left + 1] - x[top, left]) * across
        lower = x[top + 1, left] + (x[top + 1, left + 1] - x[top + 1, left]) * across
        expected = np.clip(upper + (lower - upper) * down, 0, 1) * 255.5
        assert np.abs(ours[i, j].numpy() - np.trunc(expected)).max() <= (np.abs(expected - np.rint(expected)).min() < 1e-3)


def test_crop_keeps_a_flat_frame_and_its_corners_lie_inside() -> None:
    assert (center_crop(torch.full((1, 40, 40, 3), 77, dtype=torch.uint8), 10) == 77).all()
    ramp = torch.arange(0, 201, dtype=torch.uint8)[None, :, None, None].expand(1, 201, 201, 3)
    # The first row lies (1 - sqrt 0.9) / 2 x 200 = 5.13 rows down, the last as far from the end.
    assert center_crop(ramp, 9)[0, :, 0, 0].tolist()[:: 8] == [5, 195]


def test_crop_takes_the_frame_itself_unless_lanczos_resizes_first() -> None:
    frame = frames(256, 256)
    direct = center_crop(frame, 224)
    assert torch.equal(fit_frames(frame, 224, "pil", True, "resize-naive"), direct)
    small = fit_frames(frame, 224, "lanczos", False, "resize-naive")
    assert torch.equal(fit_frames(frame, 224, "lanczos", True, "resize-naive"), center_crop(small, 224))


def test_letterbox_and_resize_crop() -> None:
    frame = torch.zeros(1, 20, 40, 3, dtype=torch.uint8)
    boxed = fit_frames(frame, 40, "pil", False, "letterbox")
    assert boxed[0, 9].tolist() == [[123, 116, 103]] * 40  # int(255 x 0.485), ...
    assert boxed[0, 10:30].sum() == 0
    wide = frames(50, 100)
    assert torch.equal(fit_frames(wide, 50, "pil", False, "resize-crop"), wide[:, :, 25:75])


def test_frames_of_the_right_size_are_left_alone() -> None:
    frame = frames(64, 64)
    assert fit_frames(frame, 64, "pil", False, "resize-naive") is frame
