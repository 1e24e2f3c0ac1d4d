"""Owns the rank's side of env hosts: HostedEnv, a BatchedEnv whose slots are played by child processes, which may die and are brought back.

A host that dies is started again; its open episodes are reset to their EpisodeSpec and the actions they had played are played again,
unseen, so that an episode goes on exactly where it was and nothing that was collected becomes wrong. Every wait has a deadline that names
the peer.
"""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlarl.envs.host.protocol import PROTOCOL, Channel, Frames, Gone, Late
from vlarl.envs.spec import EnvSpec, EpisodeSpec
from vlarl.errors import MachineError, WorkerError
from vlarl.types import ChunkResult, Observation

ATTEMPTS = 2  # at one order, each with a fresh host; then the run ends
CLOSING_SECONDS = 5.0
LOG_LINES = 12
MAIN = Path(__file__).parent / "host" / "__main__.py"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Hosting:
    """How hosts are run. adapter: `module:callable`, called in the host as (settings, spec) for each slot. settings: JSON, for the adapter.

    python: the interpreter. per_host: slots of one host. start_seconds, step_seconds: for the start, and for a reset, a chunk, or one
    played again, each times the slots of a host. environment: added to the host's. log_dir: host{first slot}.log goes there.
    """

    adapter: str
    settings: Mapping[str, Any]
    python: str
    per_host: int
    start_seconds: float
    step_seconds: float
    environment: Mapping[str, str]
    log_dir: Path


class HostedEnv:
    """A BatchedEnv of `slots` slots in child processes. Frames arrive on the CPU and are handed out on `device`."""

    def __init__(
        self, slots: int, first_slot: int, spec: EnvSpec, hosting: Hosting, device: torch.device, started: Callable[[int, int], None],
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        """first_slot: names slots in messages and logs. started(n, total): called as hosts come up. beat: called every second while a host
        is waited for, in whichever thread waits: a host's deadline may be longer than its rank may be silent. Raises MachineError,
        WorkerError."""
        self.spec = spec
        self._slots, self._hosting, self._device = slots, hosting, device
        self._memory = _shared_file(Frames.size(slots, spec))
        self._frames = Frames(self._memory, slots, spec)
        self._episode: list[EpisodeSpec | None] = [None] * slots
        self._played: list[list[list[list[float]]]] = [[] for _ in range(slots)]  # chunks of the open episode
        self._instruction = [""] * slots
        self._pending: dict[int, list[Any]] | None = None
        self.restarts = 0  # hosts that were replaced
        places = [range(start, min(start + hosting.per_host, slots)) for start in range(0, slots, hosting.per_host)]
        self._hosts = [_Host(p, first_slot, beat) for p in places]
        opening = {"adapter": hosting.adapter, "settings": dict(hosting.settings), "spec": asdict(spec), "slots": slots}
        self._opening = [{**opening, "places": list(p)} for p in places]
        try:
            hosting.log_dir.mkdir(parents=True, exist_ok=True)
            for number in range(len(self._hosts)):
                self._start(number)
            for number in range(len(self._hosts)):
                self._attempt(number, "start", [])
                started(number + 1, len(self._hosts))
        except BaseException:
            self.close()
            raise

    def reset(self, index: Tensor, episodes: Sequence[EpisodeSpec]) -> None:
        """Start `episodes` in the slots `index` (int64); hosts work side by side."""
        chosen = dict(zip(index.tolist(), episodes, strict=True))
        self._restore({place: (episode, []) for place, episode in chosen.items()})

    def start_chunk(self, action_BKA: Tensor, active_B: Tensor) -> None:
        """Let the hosts begin; `step_chunk` with the same arguments collects what came of it."""
        assert self._pending is None, "a chunk is under way"
        chunks = action_BKA.to("cpu", torch.float32).tolist()
        self._pending = self._by_host([[b, chunks[b]] for b in active_B.nonzero()[:, 0].tolist()])
        for number, rows in self._pending.items():
            self._hosts[number].order("step", rows)

    def step_chunk(self, action_BKA: Tensor, active_B: Tensor) -> ChunkResult:
        """Execute K actions in the active slots; the hosts render where each slot stands then."""
        if self._pending is None:
            self.start_chunk(action_BKA, active_B)
        assert self._pending is not None
        orders, self._pending = self._pending, None
        slots, chunk = action_BKA.shape[:2]
        reward_BK, success_B = torch.zeros(slots, chunk), torch.zeros(slots, dtype=torch.bool)
        terminated_BK, truncated_BK, valid_BK = (torch.zeros(slots, chunk, dtype=torch.bool) for _ in range(3))
        sent = {place: actions for rows in orders.values() for place, actions in rows}
        for number, rows in orders.items():
            for place, rewards, terminated, truncated, success in self._attempt(number, "step", rows):
                count = len(rewards)
                reward_BK[place, :count] = torch.tensor(rewards)
                valid_BK[place, :count] = True
                terminated_BK[place, count - 1], truncated_BK[place, count - 1], success_B[place] = terminated, truncated, success
                self._played[place].append(sent[place])
                if terminated or truncated:
                    self._episode[place] = None
        return ChunkResult(reward_BK, terminated_BK, truncated_BK, valid_BK, success_B)

    def expert_action(self, active_B: Tensor, clumsiness: float) -> Tensor:
        """See envs.base.Teacher."""
        action_BA = torch.zeros(self._slots, self.spec.action_dim)
        orders = self._by_host([[b, clumsiness] for b in active_B.nonzero()[:, 0].tolist()])
        for number, rows in orders.items():
            self._hosts[number].order("expert", rows)
        for number, rows in orders.items():
            for place, action in self._attempt(number, "expert", rows):
                action_BA[place] = torch.tensor(action)
        return action_BA

    def observe(self, index: Tensor) -> Observation:
        """Copies of what the slots `index` (int64) showed last."""
        rows = index.tolist()
        image, state = torch.from_numpy(self._frames.image_BVHWC[rows]), torch.from_numpy(self._frames.state_BD[rows])
        return Observation(image.to(self._device), state.to(self._device), tuple(self._instruction[b] for b in rows))

    def state_dict(self) -> dict[str, Any]:
        """Open episodes and the actions they have played: enough to bring them back."""
        return {"episode": [e and astuple(e) for e in self._episode], "played": [torch.tensor(p) for p in self._played]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring the open episodes back by playing their actions again."""
        played = [p.tolist() for p in state["played"]]
        self._restore({b: (EpisodeSpec(*e), played[b]) for b, e in enumerate(state["episode"]) if e is not None})

    def close(self) -> None:
        """End the hosts; those that do not go are killed."""
        for host in self._hosts:
            host.leave()
        deadline = time.monotonic() + CLOSING_SECONDS
        for host in self._hosts:
            host.end(deadline)
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _restore(self, chosen: Mapping[int, tuple[EpisodeSpec, list[list[list[float]]]]]) -> None:
        """Reset slots to episodes, some chunks into them."""
        for place, (episode, chunks) in chosen.items():
            self._episode[place], self._played[place] = episode, list(chunks)
        orders = self._by_host([[place] for place in chosen])
        rows = {number: self._resets([place for (place,) in part]) for number, part in orders.items()}
        for number, part in rows.items():
            self._hosts[number].order("reset", part)
        for number, part in rows.items():
            for place, instruction in self._attempt(number, "reset", part):
                self._instruction[place] = instruction

    def _resets(self, places: Sequence[int]) -> list[Any]:
        open_episodes = [(b, self._episode[b]) for b in places]
        return [[b, list(astuple(e)), self._played[b]] for b, e in open_episodes if e is not None]

    def _by_host(self, rows: list[list[Any]]) -> dict[int, list[Any]]:
        """Rows that begin with a place, by the host that has it."""
        found: dict[int, list[Any]] = {}
        for row in rows:
            found.setdefault(row[0] // self._hosting.per_host, []).append(row)
        return found

    def _attempt(self, number: int, phase: str, rows: list[Any]) -> list[Any]:
        """The answer to an order given before; where the host fails, a fresh one gets the order again."""
        host = self._hosts[number]
        for attempt in range(ATTEMPTS):
            try:
                if attempt:
                    self.restarts += 1
                    self._start(number)
                if attempt or phase == "start":
                    self._greet(number)
                if attempt and phase != "start":
                    lost = set(host.places) - ({row[0] for row in rows} if phase == "reset" else set())
                    host.order("reset", self._resets(sorted(lost)))
                    host.answer("reset", self._hosting.step_seconds)
                    host.order(phase, rows)
                return host.answer(phase, self._hosting.step_seconds) if phase != "start" else []
            except _Failure as failure:
                host.kill()
                cause, phase_reached = f"{failure.cause} {self._at_work(host)}".strip(), failure.phase
                print(f"env host {number} ({host.label}) {cause}", file=sys.stderr, flush=True)
        raise WorkerError(
            f"Env host {number} ({host.label}) {cause} It failed {ATTEMPTS} times in a row, last in its {phase_reached}.",
            f"Its output: {host.log}, which ends with:\n{_tail(host.log)}",
        )

    def _start(self, number: int) -> None:
        """Spawn a host and let it make its simulators."""
        self._hosts[number].start(self._hosting, self._memory)
        self._hosts[number].order("open", self._opening[number])

    def _greet(self, number: int) -> None:
        """Wait until a spawned host has its simulators."""
        host = self._hosts[number]
        hello = host.receive("start", self._hosting.start_seconds)
        if hello.get("hello") != PROTOCOL:
            raise MachineError(
                f"The env host run by {self._hosting.python} speaks protocol {hello.get('hello')} and this rank speaks {PROTOCOL}.",
                "Let both use the same version of vlarl.",
            )
        host.answer("start", self._hosting.start_seconds)

    def _at_work(self, host: _Host) -> str:
        """The slot that a failed host was busy with."""
        for b in host.places:
            episode = self._episode[b]
            if self._frames.busy_B[b]:
                self._frames.busy_B[b] = 0
                if episode is None:
                    return f"It was busy with slot {host.first + b}."
                where = f"{self.spec.tasks[episode.task]}, initial state {episode.init_state}, seed {episode.seed}"
                return f"It was busy with slot {host.first + b}, episode {episode.uid} ({where}), after {len(self._played[b])} chunks."
        return ""


class _Failure(Exception):
    """A host that has to be replaced. phase: start, reset or step. cause: a sentence's end."""

    def __init__(self, phase: str, cause: str) -> None:
        super().__init__(cause)
        self.phase, self.cause = phase, cause


class _Host:
    """One child process and the line to it. places: slots of the rank's batch that it plays; first: number of the batch's first slot."""

    def __init__(self, places: range, first: int, beat: Callable[[], object]) -> None:
        self.places, self.first, self._beat = places, first, beat
        self.label = f"slot {first + places[0]}" + (f"-{first + places[-1]}" if len(places) > 1 else "")
        self.log = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._replayed = 0

    def start(self, hosting: Hosting, memory: int) -> None:
        """Spawn the process: no stdin to wait on, output into its log, one thread for every numerical library."""
        self.log = hosting.log_dir / f"host{self.first + self.places[0]}.log"
        ours, theirs = socket.socketpair()
        arguments = [hosting.python, "-u", str(MAIN), str(theirs.fileno()), str(memory), str(os.getpid())]
        environment = {**os.environ, **ONE_THREAD, **hosting.environment}
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    pass_fds=(theirs.fileno(), memory),
                )
        except OSError as error:
            ours.close()
            raise MachineError(f"env.python: {hosting.python} cannot be run: {error.strerror}.", "Name a Python interpreter.") from None
        finally:
            theirs.close()
        self._channel = Channel(ours)

    def order(self, order: str, content: Any) -> None:
        """Send without waiting. A host that is gone is noticed when its answer is missed."""
        assert self._channel is not None
        self._replayed = max([len(row[2]) for row in content], default=0) if order == "reset" else 0
        with suppress(Gone):
            self._channel.send({order: content})

    def receive(self, phase: str, seconds: float) -> dict[str, Any]:
        """The next message. seconds: of one slot and chunk; the whole wait is for all slots and all chunks played again."""
        assert self._channel is not None
        allowed = seconds * len(self.places) * (1 + self._replayed)
        try:
            return self._channel.receive(allowed, self._beat)
        except Late:
            raise _Failure(phase, f"did not answer within {allowed:g} s of its {phase}.") from None
        except (Gone, ValueError):
            raise _Failure(phase, f"{self._death()} in its {phase}.") from None

    def answer(self, phase: str, seconds: float) -> list[Any]:
        """Rows of an answer. Raises MachineError for a mistake of the user's."""
        message = self.receive(phase, seconds)
        if "mistake" in message:
            raise MachineError(*message["mistake"])
        if "crash" in message:
            raise _Failure(phase, f"raised in its {phase}: {message['crash'].strip().splitlines()[-1]}.")
        return message.get("rows", [])

    def kill(self) -> None:
        """End the process now."""
        self.leave()
        self.end(0.0)

    def leave(self) -> None:
        """Close the line: a healthy host ends by itself."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def end(self, deadline: float) -> None:
        """Wait for the process until `deadline` (time.monotonic), then kill it."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _death(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its line"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _shared_file(size: int) -> int:
    """A descriptor of `size` bytes of memory that vanishes with its last user."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("vlarl-frames")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    except OSError:
        return ""
