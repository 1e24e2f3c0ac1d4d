"""Owns rollout videos: captions and MP4 files. PyAV brings its own codecs, so no ffmpeg needs to be installed.

Shape legend: T frames, H W C image (RGB, uint8 0..255).
"""
from __future__ import annotations

import contextlib
import math
import textwrap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlarl.errors import MachineError

MIN_PIXELS = 256  # the shorter side of a video; smaller frames are enlarged
BORDER_PIXELS = 6
FONT_PIXELS = 15
_GREEN, _RED, _GREY = (40, 160, 70), (200, 50, 40), (120, 120, 120)

Frames = NDArray[np.uint8]


def enlarge(frames_THWC: Tensor | Frames) -> Frames:
    """The frames with every pixel repeated so often that the shorter side has at least MIN_PIXELS. uint8 (T, H', W', 3)."""
    frames = frames_THWC.cpu().numpy() if isinstance(frames_THWC, Tensor) else np.asarray(frames_THWC)
    assert frames.ndim == 4 and frames.shape[-1] == 3 and frames.dtype == np.uint8, (frames.shape, frames.dtype)
    factor = math.ceil(MIN_PIXELS / min(frames.shape[1:3]))
    return frames if factor <= 1 else frames.repeat(factor, axis=1).repeat(factor, axis=2)


def annotate(frames_THWC: Tensor | Frames, text: str, success: bool | None) -> Frames:
    """Enlarged frames under a strip with `text`, framed green (success), red (failure) or grey (None: not known). uint8 (T, H', W', 3)."""
    from PIL import Image, ImageDraw, ImageFont  # heavy and rarely needed

    frames = enlarge(frames_THWC)
    count, height, width, _ = frames.shape
    font = ImageFont.load_default(FONT_PIXELS)
    column = max(1, int(width / font.getlength("n")))
    caption = "\n".join(textwrap.wrap(text, column)) or " "
    strip_height = (caption.count("\n") + 1) * (FONT_PIXELS + 5) + 4
    strip = Image.new("RGB", (width, strip_height), (20, 20, 20))
    ImageDraw.Draw(strip).multiline_text((4, 2), caption, fill=(240, 240, 240), font=font)

    edge = BORDER_PIXELS
    colour = _GREY if success is None else _GREEN if success else _RED
    canvas = np.empty((count, strip_height + height + 2 * edge, width + 2 * edge, 3), dtype=np.uint8)
    canvas[:] = colour
    canvas[:, edge : edge + strip_height, edge:-edge] = np.asarray(strip)
    canvas[:, edge + strip_height : -edge, edge:-edge] = frames
    return canvas


def write_mp4(path: Path, frames_THWC: Tensor | Frames, fps: int) -> None:
    """Writes frames (uint8, RGB; at least one) as an MP4: H.264 where the codec is there, else MPEG-4 part 2.

    Small frames are enlarged; odd sizes lose their last row or column (chroma is stored at half size). The file appears complete or
    not at all. Raises MachineError when the disk refuses.
    """
    import av  # heavy and rarely needed

    frames = enlarge(frames_THWC)
    assert len(frames) > 0, "a video needs a frame"
    height, width = (size - size % 2 for size in frames.shape[1:3])
    codec, options = ("libx264", {"crf": "20", "preset": "fast"}) if "libx264" in av.codecs_available else ("mpeg4", {"qscale:v": "3"})
    draft = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(draft), "w", format="mp4") as container:
            stream = container.add_stream(codec, rate=fps, options=options)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1  # the ranks own the cores
            for image_HWC in frames[:, :height, :width]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")))
            container.mux(stream.encode())
        draft.replace(path)
    except OSError as error:  # PyAV's errors of the disk are OSErrors too
        with contextlib.suppress(OSError):
            draft.unlink()
        hint = "Free some space, or set eval.videos and log.video_every to 0."
        raise MachineError(f"Cannot write {path}: {error.strerror or error}.", hint) from error
