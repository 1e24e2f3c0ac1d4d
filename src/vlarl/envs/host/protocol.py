"""Owns what a rank and its env hosts say to each other: messages, their version, the frames' shared memory, and what an adapter offers.

A message is one line of JSON over a socket pair. The host speaks first; then the rank orders and the host answers, once per order:

                                                      {"hello": PROTOCOL, "python": version}
    {"open": {adapter, settings, spec, slots, places}}      {"opened": true}
    {"reset": [[place, episode, [chunk, ...]], ...]}        {"rows": [[place, instruction], ...]}
    {"step": [[place, chunk], ...]}                         {"rows": [[place, rewards, terminated, truncated, success], ...]}
    {"expert": [[place, clumsiness], ...]}                  {"rows": [[place, action], ...]}

place: a slot's number in the rank's batch of `slots`. episode: the fields of EpisodeSpec in order. chunk: K lists of A numbers; those of a
reset are played again, unseen, to bring a lost episode back. A reset and a step leave the frames and states of the places they name in
shared memory; asking the expert changes nothing. An answer may instead be {"mistake": [message, hint]}, which the
user can mend, or {"crash": traceback}.
"""
from __future__ import annotations

import json
import mmap
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from vlarl.envs.spec import EnvSpec, EpisodeSpec

PROTOCOL = 2
BLOCK = 64  # bytes; each part of the shared memory starts at a multiple
READ_BYTES = 1 << 16
BEAT_SECONDS = 1.0


class Played(NamedTuple):
    """What came of a chunk: a reward per executed action (fewer than asked for only where the episode ended), and how it ended.

    truncated: a limit of the task's own was reached, before the horizon.
    """

    reward: Sequence[float]
    terminated: bool
    success: bool
    truncated: bool = False


class Simulator(Protocol):
    """One slot of a simulator, as an adapter offers it. Everything it does follows from the EpisodeSpec and the actions."""

    def reset(self, episode: EpisodeSpec) -> str:
        """Start an episode; returns its instruction."""
        ...

    def play(self, action_KA: np.ndarray) -> Played:
        """Execute float32 (K, A) up to the episode's end; render nothing. The host cuts the chunk where the horizon ends."""
        ...

    def observe(self, image_VHWC: np.ndarray, state_D: np.ndarray) -> None:
        """Write what the cameras see now (uint8, upright, RGB) and the robot's state (float32) into these arrays."""
        ...

    def close(self) -> None: ...


class Teacher(Simulator, Protocol):
    """A Simulator that knows how its tasks are done, from what a policy does not see."""

    def expert(self, clumsiness: float) -> np.ndarray:
        """The next action, float32 (A,), by what is there now alone; in a share `clumsiness` of the episodes it misses its aim."""
        ...


class Gone(Exception):
    """The other end has closed, died, or does not speak this protocol."""


class Late(Exception):
    """No message within the time allowed."""


class Channel:
    """Lines of JSON over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._rest = b""

    def send(self, message: dict[str, Any]) -> None:
        """Raises Gone where nobody listens any more."""
        try:
            self._socket.settimeout(None)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise Gone(str(error)) from None

    def receive(self, seconds: float | None = None, beat: Callable[[], object] | None = None) -> dict[str, Any]:
        """The next message, waited for at most so long; `beat` is called every second meanwhile. Raises Late or Gone."""
        deadline = None if seconds is None else time.monotonic() + seconds
        parts = [self._rest]
        while b"\n" not in parts[-1]:
            left = None if deadline is None else deadline - time.monotonic()
            try:
                if left is not None and left <= 0:
                    raise TimeoutError
                self._socket.settimeout(left if beat is None or left is None else min(left, BEAT_SECONDS))
                part = self._socket.recv(READ_BYTES)
            except TimeoutError:
                if beat is not None and deadline is not None and time.monotonic() < deadline:
                    beat()
                    continue
                self._rest = b"".join(parts)
                raise Late from None
            except OSError as error:
                raise Gone(str(error)) from None
            if not part:
                raise Gone("closed")
            parts.append(part)
        line, self._rest = b"".join(parts).split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        self._socket.close()


class Frames:
    """Arrays in memory that a rank shares with its hosts: a byte per slot that is worked on, frames, states."""

    def __init__(self, descriptor: int, slots: int, spec: EnvSpec) -> None:
        """Map the file behind `descriptor`, which has `Frames.size` bytes. busy_B uint8, image_BVHWC uint8, state_BD float32."""
        self._memory = mmap.mmap(descriptor, self.size(slots, spec))
        image = (slots, spec.views, spec.height, spec.width, 3)
        self.busy_B = self._view(0, (slots,), np.uint8)
        self.image_BVHWC = self._view(_up(slots), image, np.uint8)
        self.state_BD = self._view(_up(slots) + _up(_product(image)), (slots, spec.state_dim), np.float32)

    @staticmethod
    def size(slots: int, spec: EnvSpec) -> int:
        """Bytes needed."""
        return _up(slots) + _up(slots * spec.views * spec.height * spec.width * 3) + _up(slots * spec.state_dim * 4)

    def _view(self, offset: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        return np.frombuffer(self._memory, dtype, _product(shape), offset).reshape(shape)


def _up(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _product(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
