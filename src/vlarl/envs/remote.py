"""Owns simulation on one rank for actors on others: RemotePool, an EnvPool over messages, and `serve`, which answers it from a LocalPool.

Both sides take the stages in the same order and end them by the same rule (`_Turns.shown`), so that no message announces the next one.
A line is silent once its slots idle. While an actor thinks about one stage, the next one's frames are under way (two buffers each).
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from vlarl.envs.messages import StepMessage
from vlarl.envs.pool import EnvPool
from vlarl.envs.spec import EnvSpec
from vlarl.types import ChunkResult, EnvStep, Observation


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
