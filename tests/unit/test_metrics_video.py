"""Videos: what is written can be read back; captions and borders are where they should be."""
from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vlarl.errors import MachineError
from vlarl.metrics.video import BORDER_PIXELS, annotate, enlarge, write_mp4


def test_enlarge_repeats_pixels() -> None:
    frames = torch.arange(2 * 100 * 90 * 3, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(2, 100, 90, 3)
    large = enlarge(frames)
    assert large.shape == (2, 300, 270, 3)
    assert np.array_equal(large[:, 1::3, 2::3], frames.numpy())
    assert enlarge(large) is large


@pytest.mark.parametrize(("success", "channel"), [(True, 1), (False, 0), (None, None)])
def test_annotate_frames_the_picture(success: bool | None, channel: int | None) -> None:
    frames = torch.full((3, 64, 64, 3), 77, dtype=torch.uint8)
    framed = annotate(frames, "put the red cube on the green plate " * 3, success)
    assert framed.dtype == np.uint8 and framed.shape[0] == 3 and framed.shape[2] == 256 + 2 * BORDER_PIXELS
    border = framed[0, 0, 0]
    if channel is None:
        assert border[0] == border[1] == border[2]
    else:
        assert border.argmax() == channel
    edge = BORDER_PIXELS
    assert (framed[:, -256 - edge : -edge, edge:-edge] == 77).all()
    strip = framed[0, edge : -256 - edge, edge:-edge]
    assert strip.min() < 40 and strip.max() > 200


def test_mp4_round_trip_with_odd_size(tmp_path: Path) -> None:
    frames = np.zeros((7, 301, 257, 3), dtype=np.uint8)
    frames[..., 0] = np.linspace(20, 230, 7).astype(np.uint8)[:, None, None]
    path = tmp_path / "videos" / "success-0.mp4"
    write_mp4(path, frames, fps=10)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 10
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert read.shape == (7, 300, 256, 3)
    assert np.abs(read[:, 150, 128, 0].astype(int) - frames[:, 0, 0, 0]).max() < 12
    assert [p.name for p in path.parent.iterdir()] == ["success-0.mp4"]


def test_an_unwritable_path_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="Cannot write"):
        write_mp4(tmp_path / "file" / "a.mp4", np.zeros((1, 64, 64, 3), dtype=np.uint8), fps=10)
