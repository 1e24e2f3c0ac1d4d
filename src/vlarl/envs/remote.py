"""Owns simulation on one rank for actors on others: RemotePool, an EnvPool over messages, and `serve`, which answers it from a LocalPool.

Both sides take the stages in the same order and end them by the same rule (`_Line.ends`), so that no message announces the next one.
A line is silent once its slots idle. While an actor thinks about one stage, the next one's frames are under way (two buffers each).
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor

from vlarl.envs.pool import EnvPool
from vlarl.envs.spec import EnvSpec, EpisodeSpec
from vlarl.errors import VlarlError
from vlarl.types import ChunkResult, EnvStep, Observation

INSTRUCTION_BYTES = 256  # of a sentence in UTF-8
IDLE = -1  # uid in a slot without an episode
EPISODE_FIELDS = 5


class Pending(Protocol):
    """A message under way."""

    def wait(self) -> None: ...


class Link(Protocol):
    """Messages to and from one peer, in order; a tensor is left alone until its message is done."""

    def send(self, tensor: Tensor, kind: Literal["observations", "actions"]) -> Pending: ...

    def recv(self, tensor: Tensor, kind: Literal["observations", "actions"]) -> Pending: ...


class Spans(Protocol):
    """Names where time goes."""

    def span(self, name: str) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Line:
    """What two ranks talk about: the global slots [start, end) of one stage, simulated by one and acted for by the other."""

    link: Link
    stage: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


class RemotePool:
    """EnvPool over simulators of other ranks. The tensors of an EnvStep are overwritten by the stage's recv after the next."""

    span = "rollout/wait"

    def __init__(self, spec: EnvSpec, lines: Sequence[Line], chunk: int, max_chunks: int, device: torch.device) -> None:
        """lines: in the order of their slots within a stage. A stage in which this rank has no slots does not count."""
        self.spec, self.chunk = spec, chunk
        numbers = sorted({line.stage for line in lines})
        self._lines = [[_ActorEnd(line, spec, chunk, max_chunks, device) for line in lines if line.stage == s] for s in numbers]
        self.stages = len(self._lines)
        self._expected = 0

    def slots(self, stage: int) -> Sequence[int]:
        """The stage's global slot numbers."""
        return [slot for end in self._lines[stage] for slot in range(end.line.start, end.line.end)]

    def begin(self) -> None:
        """Start a rollout; the other side does so too."""
        for end in (end for stage in self._lines for end in stage):
            end.begin()
        self._expect(0)

    def recv(self, stage: int) -> EnvStep:
        """The stage's frames, from all of its simulators."""
        parts = [end.recv() for end in self._lines[stage]]
        following = [*range(stage + 1, self.stages), *range(stage + 1)]
        open_stage = next((s for s in following if any(end.open for end in self._lines[s])), None)
        if open_stage is not None:
            self._expect(open_stage)
        return _join(parts)

    def send(self, stage: int, action_BKA: Tensor) -> None:
        """Every simulator's share of the stage's actions."""
        ends = self._lines[stage]
        for end, part in zip(ends, action_BKA.split([len(end.line) for end in ends]), strict=True):
            end.send(part)

    def close(self) -> None:
        """Nothing to free: the simulators belong to other ranks."""

    def _expect(self, stage: int) -> None:
        for end in self._lines[stage]:
            end.expect()


def serve(pool: EnvPool, lines: Sequence[Line], max_chunks: int, device: torch.device, spans: Spans) -> None:
    """Simulate one rollout: frames out, actions in, stage by stage, until every slot idles or has played `max_chunks` chunks.

    Spans: rollout/env simulation and rendering, rollout/wait for actions, rollout/other packing.
    """
    spec, chunk = pool.spec, pool.chunk
    first = [pool.slots(s)[0] for s in range(pool.stages)]
    stages = [[_EnvEnd(line, first[s], spec, chunk, max_chunks, device) for line in lines if line.stage == s] for s in range(pool.stages)]
    action = [torch.zeros(len(pool.slots(s)), chunk, spec.action_dim) for s in range(pool.stages)]
    pool.begin()
    started = False
    while any(end.open for stage in stages for end in stage):
        for s, stage in enumerate(stages):
            talking = [end for end in stage if end.open]
            if not talking:
                continue
            if started:
                with spans.span("rollout/wait"):
                    for end in talking:
                        end.receive(action[s])
                pool.send(s, action[s])
            with spans.span("rollout/env"):
                step = pool.recv(s)
            with spans.span("rollout/other"):
                for end in talking:
                    end.send(step)
        started = True
    with spans.span("rollout/wait"):
        for end in (end for stage in stages for end in stage):
            end.finish()


class _Turns:
    """How long a line talks: as long on one side as on the other."""

    def __init__(self, max_chunks: int) -> None:
        self._max_chunks = max_chunks
        self._chunks = 0
        self.open = True

    def restart(self) -> None:
        self._chunks, self.open = 0, True

    def shown(self, idle: bool) -> None:
        """Frames went over the line: those of the last chunk end it, or those that show idle slots alone."""
        self.open = self._chunks < self._max_chunks and not idle
        self._chunks += 1


class _ActorEnd:
    """One line as the actor sees it."""

    def __init__(self, line: Line, spec: EnvSpec, chunk: int, max_chunks: int, device: torch.device) -> None:
        self.line = line
        self._steps = [StepMessage(len(line), spec, chunk, device) for _ in range(2)]
        self._actions = [torch.zeros(len(line), chunk, spec.action_dim, device=device) for _ in range(2)]
        self._sending: list[Pending | None] = [None, None]
        self._nothing = StepMessage(len(line), spec, chunk, device)
        self._nothing.write_idle()
        self._turns = _Turns(max_chunks)
        self._arriving: Pending | None = None
        self._turn = 0

    @property
    def open(self) -> bool:
        return self._turns.open

    def begin(self) -> None:
        self._turns.restart()
        self._arriving = None

    def expect(self) -> None:
        """Let the next frames come in."""
        if self.open and self._arriving is None:
            self._turn = 1 - self._turn
            self._arriving = self.line.link.recv(self._steps[self._turn].buffer, "observations")

    def recv(self) -> EnvStep:
        """The slots' new frames; idle slots once the line is silent."""
        if not self.open:
            return self._nothing.read(None)
        assert self._arriving is not None, "frames are expected before they are read"
        self._arriving.wait()
        self._arriving = None
        message = self._steps[self._turn]
        final = message.final_count()
        if final is not None:
            self.line.link.recv(final.buffer, "observations").wait()
        step = message.read(final)
        self._turns.shown(all(e is None for e in step.episode))
        return step

    def send(self, action_BKA: Tensor) -> None:
        """Actions for the slots; nothing once the line is silent."""
        if not self.open:
            return
        before = self._sending[self._turn]
        if before is not None:
            before.wait()
        self._actions[self._turn].copy_(action_BKA)
        self._sending[self._turn] = self.line.link.send(self._actions[self._turn], "actions")


class _EnvEnd:
    """One line as the simulator sees it. first: the stage's first global slot."""

    def __init__(self, line: Line, first: int, spec: EnvSpec, chunk: int, max_chunks: int, device: torch.device) -> None:
        self.line = line
        self._rows = slice(line.start - first, line.end - first)
        self._steps = [StepMessage(len(line), spec, chunk, device) for _ in range(2)]
        self._sending: list[list[Pending]] = [[], []]
        self._action = torch.zeros(len(line), chunk, spec.action_dim, device=device)
        self._arriving: Pending | None = None
        self._turns = _Turns(max_chunks)
        self._turn = 0

    @property
    def open(self) -> bool:
        return self._turns.open

    def send(self, step: EnvStep) -> None:
        """Frames out; and, unless they were the last, let the actions come in."""
        self._turn = 1 - self._turn
        for pending in self._sending[self._turn]:
            pending.wait()
        message = self._steps[self._turn]
        final = message.write(step, self._rows)
        self._sending[self._turn] = [self.line.link.send(m.buffer, "observations") for m in (message, final) if m is not None]
        self._turns.shown(all(e is None for e in step.episode[self._rows]))
        if self.open:
            self._arriving = self.line.link.recv(self._action, "actions")

    def receive(self, action_BKA: Tensor) -> None:
        """Wait for the actions and put them where they belong in the stage's."""
        assert self._arriving is not None
        self._arriving.wait()
        action_BKA[self._rows] = self._action.to(action_BKA.device)

    def finish(self) -> None:
        """Wait until everything is delivered."""
        for pending in (p for sent in self._sending for p in sent):
            pending.wait()


# ---------------------------------------------------------------- messages


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


def _join(parts: Sequence[EnvStep]) -> EnvStep:
    """One stage's step from those of its lines, in order."""
    if len(parts) == 1:
        return parts[0]
    first = [sum(len(p.episode) for p in parts[:i]) for i in range(len(parts))]
    finals = [p.final_obs for p in parts if p.final_obs is not None]
    results = [p.result for p in parts]
    return EnvStep(
        obs=_join_frames([p.obs for p in parts]),
        result=ChunkResult(
            torch.cat([r.reward_BK for r in results]),
            torch.cat([r.terminated_BK for r in results]),
            torch.cat([r.truncated_BK for r in results]),
            torch.cat([r.valid_BK for r in results]),
            torch.cat([r.success_B for r in results]),
        ),
        episode=tuple(e for p in parts for e in p.episode),
        chunk_index_B=torch.cat([p.chunk_index_B for p in parts]),
        final_index=torch.cat([p.final_index + start for p, start in zip(parts, first, strict=True)]),
        final_obs=_join_frames(finals) if finals else None,
    )


def _join_frames(parts: Sequence[Observation]) -> Observation:
    image, state = torch.cat([p.image_BVHWC for p in parts]), torch.cat([p.state_BD for p in parts])
    return Observation(image, state, tuple(s for p in parts for s in p.instruction))
