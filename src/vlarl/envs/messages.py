"""Owns the flat buffers in which an EnvStep travels between ranks: what lies where, packing and unpacking."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from math import prod

import torch
from torch import Tensor

from vlarl.envs.spec import EnvSpec, EpisodeSpec
from vlarl.errors import VlarlError
from vlarl.types import ChunkResult, EnvStep, Observation

INSTRUCTION_BYTES = 256  # of a sentence in UTF-8
IDLE = -1  # uid in a slot without an episode
EPISODE_FIELDS = 5


class _Frames:
    """Observations of `rows` slots in one flat buffer."""

    def __init__(self, rows: int, spec: EnvSpec, device: torch.device) -> None:
        shapes = _frame_shapes(rows, spec)
        self.buffer = torch.zeros(_size(shapes), dtype=torch.uint8, device=device)
        self._view = _views(self.buffer, shapes)

    def write(self, obs: Observation, rows: Tensor) -> None:
        _write_frames(self._view, obs.select(rows))

    def read(self) -> Observation:
        return _read_frames(self._view, self._view)


class StepMessage:
    """One line's EnvStep in one flat buffer, pictures last; final frames travel in a second message where there are any."""

    def __init__(self, rows: int, spec: EnvSpec, chunk: int, device: torch.device) -> None:
        self._rows, self._spec, self._device = rows, spec, device
        self._shapes: _Shapes = {
            "final_count": (torch.int64, (1,)),
            "final_index": (torch.int64, (rows,)),
            "episode": (torch.int64, (rows, EPISODE_FIELDS)),
            "chunk_index": (torch.int64, (rows,)),
            "reward": (torch.float32, (rows, chunk)),
            "terminated": (torch.bool, (rows, chunk)),
            "truncated": (torch.bool, (rows, chunk)),
            "valid": (torch.bool, (rows, chunk)),
            "success": (torch.bool, (rows,)),
        }
        self._shapes = _aligned(self._shapes | _frame_shapes(rows, spec))
        self.buffer = torch.zeros(_size(self._shapes), dtype=torch.uint8, device=device)
        self._view = _views(self.buffer, self._shapes)
        self._facts_bytes = self.buffer.numel() - prod(self._shapes["image"][1])

    def write_idle(self) -> None:
        """No episode anywhere."""
        self._view["episode"].fill_(IDLE)

    def write(self, step: EnvStep, rows: slice) -> _Frames | None:
        """Pack the slots `rows` of a stage's step; returns the second message, if there is one."""
        view, result = self._view, step.result
        final = ((step.final_index >= rows.start) & (step.final_index < rows.stop)).nonzero()[:, 0]
        episodes = [astuple(e) if e is not None else (IDLE,) * EPISODE_FIELDS for e in step.episode[rows]]
        view["final_count"].fill_(len(final))
        view["final_index"][: len(final)] = (step.final_index[final] - rows.start).to(self._device)
        view["episode"].copy_(torch.tensor(episodes, dtype=torch.int64))
        view["chunk_index"].copy_(step.chunk_index_B[rows])
        view["reward"].copy_(result.reward_BK[rows])
        view["terminated"].copy_(result.terminated_BK[rows])
        view["truncated"].copy_(result.truncated_BK[rows])
        view["valid"].copy_(result.valid_BK[rows])
        view["success"].copy_(result.success_B[rows])
        obs = step.obs
        _write_frames(view, Observation(obs.image_BVHWC[rows], obs.state_BD[rows], obs.instruction[rows]))
        if len(final) == 0 or step.final_obs is None:
            return None
        frames = _Frames(len(final), self._spec, self._device)
        frames.write(step.final_obs, final)
        return frames

    def final_count(self) -> _Frames | None:
        """Room for the second message that belongs to this one, if there is one."""
        count = int(self._view["final_count"])
        return _Frames(count, self._spec, self._device) if count else None

    def read(self, final: _Frames | None) -> EnvStep:
        """Unpack: pictures and states stay on the device, everything else goes to the host."""
        view = _views(self.buffer[: self._facts_bytes].cpu(), {n: s for n, s in self._shapes.items() if n != "image"})
        count = int(view["final_count"])
        return EnvStep(
            obs=_read_frames(view, self._view),
            result=ChunkResult(view["reward"], view["terminated"], view["truncated"], view["valid"], view["success"]),
            episode=tuple(None if row[0] == IDLE else EpisodeSpec(*row) for row in view["episode"].tolist()),
            chunk_index_B=view["chunk_index"],
            final_index=view["final_index"][:count],
            final_obs=None if final is None else final.read(),
        )


_Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _frame_shapes(rows: int, spec: EnvSpec) -> _Shapes:
    return {
        "state": (torch.float32, (rows, spec.state_dim)),
        "instruction": (torch.uint8, (rows, INSTRUCTION_BYTES)),
        "image": (torch.uint8, (rows, spec.views, spec.height, spec.width, 3)),
    }


def _aligned(shapes: _Shapes) -> _Shapes:
    """Widest numbers first, so that each lies at a multiple of its size; pictures last."""
    return dict(sorted(shapes.items(), key=lambda item: (-item[1][0].itemsize, item[0] == "image")))


def _size(shapes: _Shapes) -> int:
    return sum(prod(shape) * dtype.itemsize for dtype, shape in shapes.values())


def _views(buffer: Tensor, shapes: _Shapes) -> dict[str, Tensor]:
    views, at = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = prod(shape) * dtype.itemsize
        views[name] = buffer[at : at + size].view(dtype).view(shape)
        at += size
    return views


def _write_frames(view: dict[str, Tensor], obs: Observation) -> None:
    view["image"].copy_(obs.image_BVHWC)
    view["state"].copy_(obs.state_BD)
    view["instruction"].copy_(_encode(obs.instruction))


def _read_frames(facts: dict[str, Tensor], frames: dict[str, Tensor]) -> Observation:
    return Observation(frames["image"], frames["state"], _decode(facts["instruction"]))


def _encode(sentences: Sequence[str]) -> Tensor:
    """Sentences as rows of UTF-8, filled up with zeros."""
    rows = bytearray()
    for sentence in sentences:
        text = sentence.encode()
        if len(text) > INSTRUCTION_BYTES:
            message = f"An instruction has {len(text)} bytes, and {INSTRUCTION_BYTES} travel between ranks: {sentence[:60]!r}..."
            raise VlarlError(message, "Use a collocated placement, or shorter instructions.")
        rows += text.ljust(INSTRUCTION_BYTES, b"\0")
    return torch.frombuffer(rows, dtype=torch.uint8).view(len(sentences), INSTRUCTION_BYTES)


def _decode(rows: Tensor) -> tuple[str, ...]:
    texts = rows.cpu().numpy().tobytes()
    return tuple(texts[i : i + INSTRUCTION_BYTES].rstrip(b"\0").decode() for i in range(0, len(texts), INSTRUCTION_BYTES))
