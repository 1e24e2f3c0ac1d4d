"""Owns a running worker group: starts torchrun, follows the run folder, and sees to it that everything ends together.

Ends for one of five reasons: every rank is done; a rank left an error file (the earliest one is the cause); a rank died without one;
a rank's heartbeat stopped; a signal came. Whatever the reason, no process of the group is left when `supervise` returns.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import psutil

from vlarl.errors import MachineError, VlarlError, WorkerError
from vlarl.launch.rundir import RunDir, read_json
from vlarl.launch.torchrun import Command

POLL_SECONDS = 0.2
CENSUS_SECONDS = 2.0  # between looks at who descends from torchrun; each reads the whole process table
START_SECONDS = 120.0  # at least so long until a rank's first heartbeat: torch is imported, perhaps from a cold disk
AFTERMATH_SECONDS = 8.0  # left to the other ranks to end by themselves, and to torchrun for its report, once one has failed
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
KILL_SECONDS = 5.0  # a process in the middle of a device call takes a moment to die
FULL_DISK_BYTES = 64 << 10  # with less, a rank cannot say why it ended
STACK_SECONDS = 0.5  # left to a stalled rank to write its stacks
SHOWN_RANKS = 4  # by name in a message
# Signals that end the rank which is at fault; SIGTERM is torchrun's, and a communicator that lost its peers aborts.
KILLED = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class _Group:
    """torchrun and everything below it. Ranks live in sessions of their own, so they are found by descent."""

    process: subprocess.Popen[bytes]
    log_start: int  # where its part of torchrun.log begins: a resumed run appends to it
    members: dict[tuple[int, float], psutil.Process] = field(default_factory=dict)

    def refresh(self) -> None:
        try:
            parent = psutil.Process(self.process.pid)
            found = [parent, *parent.children(recursive=True)]
        except psutil.Error:
            return
        for member in found:
            _quietly(lambda m=member: self.members.setdefault((m.pid, m.create_time()), m))  # type: ignore[misc]

    def ranks(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.Error:
            return []

    def end(self, grace_seconds: float, hurry: Callable[[], bool]) -> None:
        """SIGTERM to torchrun, which passes it on; SIGKILL to whoever is left after the grace period (or at once when `hurry()`)."""
        self.refresh()
        if self.process.poll() is None:
            self.process.terminate()
        deadline = time.monotonic() + grace_seconds
        while self.process.poll() is None and time.monotonic() < deadline and not hurry():
            self.refresh()
            time.sleep(POLL_SECONDS)
        self.refresh()
        for member in self.members.values():
            _quietly(member.kill)
        self.process.wait()
        while any(_running(member) for member in self.members.values()) and time.monotonic() < deadline + KILL_SECONDS:
            time.sleep(0.02)


def supervise(
    command: Command,
    run: RunDir,
    ranks: int,
    stall_seconds: float,
    on_progress: Callable[[dict[str, Any]], None],
    grace_seconds: float = GRACE_SECONDS,
) -> signal.Signals | None:
    """Run to the end. Returns the signal that stopped the run, or None when every rank is done.

    on_progress: called with the contents of status.json whenever they change. Raises VlarlError for a rank's user error, WorkerError where
    a rank failed, died or stalled for `stall_seconds`.
    """
    caught: list[signal.Signals] = []
    with _handlers(caught), run.torchrun_log.open("ab") as log:
        try:
            process = subprocess.Popen(
                command.argv, env=dict(command.env), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        except OSError as error:
            raise MachineError(f"{command.argv[0]} cannot be started: {error.strerror}.") from None
        group = _Group(process, log.tell())
        try:
            failure = _follow(group, run, ranks, stall_seconds, on_progress, caught)
        finally:
            group.end(grace_seconds, lambda: len(caught) > 1)
    if caught:
        return caught[0]
    if failure is None and process.returncode != 0:
        failure = _cause(group, run, ranks, "") or _silent_death(group, run)
    if failure is not None:
        raise failure
    return None


def _follow(
    group: _Group,
    run: RunDir,
    ranks: int,
    stall_seconds: float,
    on_progress: Callable[[dict[str, Any]], None],
    caught: list[signal.Signals],
) -> VlarlError | None:
    """Poll until the group ends, fails, stalls or is told to stop."""
    started, seen, census = time.time(), None, 0.0
    while not caught:
        ended = group.process.poll() is not None
        status = read_json(run.status)
        if isinstance(status, dict) and status != seen:
            seen = status
            on_progress(status)
        if ended:
            return _cause(group, run, ranks, "")
        if time.monotonic() - census > CENSUS_SECONDS:
            group.refresh()
            census = time.monotonic()
        if first_failure(run, ranks) is not None:
            missing = _missing(run, ranks, started, stall_seconds)  # now: soon torchrun ends those that are well
            _wait(group.process, AFTERMATH_SECONDS)  # so that an earlier cause on another rank is on disk too
            return _cause(group, run, ranks, missing)
        stalled = _stalled(run, ranks, started, stall_seconds)
        if stalled is not None:
            for member in group.ranks():
                _quietly(lambda m=member: m.send_signal(signal.SIGUSR1))  # type: ignore[misc]
            time.sleep(STACK_SECONDS)
            return stalled
        time.sleep(POLL_SECONDS)
    return None


def first_failure(run: RunDir, ranks: int) -> VlarlError | None:
    """The earliest error that a rank left in logs/rank{r}.error.json, as the exception to raise; None if there is none."""
    found = [(row["time"], rank, row) for rank in range(ranks) if isinstance(row := read_json(run.error(rank)), dict)]
    if not found:
        return None
    _, rank, row = min(found, key=lambda item: item[:2])
    if row["kind"] == "user":
        return VlarlError(row["message"], row["hint"])
    return WorkerError(
        f"{_named(run, rank)} failed in phase {row['phase']!r}: {row['message']}", f"{row['hint']} Log: {run.log(rank)}".strip()
    )


def _cause(group: _Group, run: RunDir, ranks: int, missing: str) -> VlarlError | None:
    """Why the ranks ended, if one of them said so. One that the system killed says nothing, and the others only that they lost it.

    missing: who else had fallen silent by then: whoever waits in a collective knows the collective and not who is not there."""
    told = first_failure(run, ranks)
    if not isinstance(told, WorkerError):
        return told
    killed = [(rank, code) for rank, code in _exit_codes(group, run) if code in KILLED]
    return _death(run, *killed[0], f"{told.message} ") if killed else WorkerError(told.message, f"{missing}{told.hint}")


def _silent_death(group: _Group, run: RunDir) -> VlarlError:
    """A rank that died without a word: torchrun's report names it, unless a full disk took the words away."""
    if shutil.disk_usage(run.path).free < FULL_DISK_BYTES:
        return MachineError(f"The disk of {run.path} is full.", "Free some space, then go on from the last checkpoint with --resume.")
    codes = _exit_codes(group, run)
    if not codes:
        code = group.process.returncode
        return WorkerError(f"torchrun ended with exit code {code} before any rank reported.", f"Log: {run.torchrun_log}")
    return _death(run, *next((row for row in codes if row[1] in KILLED), codes[0]), "")


def _exit_codes(group: _Group, run: RunDir) -> list[tuple[int, int]]:
    """(rank, exit code; -n for signal n) of the ranks that torchrun reports as failed, the first one first."""
    if not run.torchrun_log.exists():
        return []
    text = run.torchrun_log.read_bytes()[group.log_start :].decode(errors="replace")
    rows = [(int(rank), int(code)) for rank, code in re.findall(r"rank\s*:\s*(\d+) .*\n\s*exitcode\s*:\s*(-?\d+)", text)]
    first = re.search(r"Root Cause.*?rank\s*:\s*(\d+)", text, re.DOTALL)
    return sorted(rows, key=lambda row: first is None or row[0] != int(first.group(1)))


def _death(run: RunDir, rank: int, code: int, others: str) -> WorkerError:
    """others: what its peers say of it."""
    beat = read_json(run.heartbeat(rank))
    phase = repr(beat["phase"]) if isinstance(beat, dict) else "the start"
    if code == -signal.SIGKILL:
        cause = "was killed (SIGKILL); the system does that when memory runs out"
    elif code < 0:
        cause = f"was ended by {signal.Signals(-code).name}"
    else:
        cause = f"ended with exit code {code}"
    return WorkerError(f"{_named(run, rank)} {cause}, in phase {phase}.", f"{others}Logs: {run.log(rank)}, {run.torchrun_log}")


def _stalled(run: RunDir, ranks: int, started: float, stall_seconds: float) -> WorkerError | None:
    """The rank that has been silent longest, if longer than allowed."""
    late = [row for row in _silent(run, ranks, started, stall_seconds) if row[0] >= row[1]]
    if not late:
        return None
    seconds, limit, rank, phase = max(late)
    message = (
        f"{_named(run, rank)} has reported nothing for {seconds:.0f} s (the limit is {limit:g} s: stall_seconds); "
        f"its last phase was {phase!r}."
    )
    return WorkerError(message, f"{_elsewhere(run, ranks, rank)}Its threads' stacks are at the end of {run.log(rank)}.")


def _missing(run: RunDir, ranks: int, started: float, stall_seconds: float) -> str:
    """Of the ranks that report no failure, the one silent longest, if for half of what is allowed; else nothing."""
    silent = [row for row in _silent(run, ranks, started, stall_seconds) if row[0] >= row[1] / 2 and not run.error(row[2]).exists()]
    if not silent:
        return ""
    seconds, _, rank, phase = max(silent)
    return f"{_named(run, rank)} had reported nothing for {seconds:.0f} s by then; its last phase was {phase!r}. "


def _silent(run: RunDir, ranks: int, started: float, stall_seconds: float) -> list[tuple[float, float, int, str]]:
    """(seconds since the last heartbeat, seconds allowed, rank, its last phase) of every rank."""
    now, silent = time.time(), []
    for rank in range(ranks):
        beat = read_json(run.heartbeat(rank))
        if isinstance(beat, dict):
            silent.append((now - max(beat["time"], started), stall_seconds, rank, beat["phase"]))
        elif not run.heartbeat(rank).exists():
            silent.append((now - started, max(stall_seconds, START_SECONDS), rank, "start"))
        # else it was caught while it is being overwritten: alive
    return silent


def _elsewhere(run: RunDir, ranks: int, stalled: int) -> str:
    """What the other ranks are doing meanwhile: `The others: 'rollout/wait' on rank 0 (env). `"""
    phases: dict[str, list[str]] = {}
    for rank in (r for r in range(ranks) if r != stalled):
        beat = read_json(run.heartbeat(rank))
        if isinstance(beat, dict):
            phases.setdefault(beat["phase"], []).append(_named(run, rank).lower())
    texts = [f"{phase!r} on {', '.join(names[:SHOWN_RANKS])}{', ...' * (len(names) > SHOWN_RANKS)}" for phase, names in phases.items()]
    return f"The others: {'; '.join(texts)}. " if texts else ""


def _named(run: RunDir, rank: int) -> str:
    """`Rank 2`; with its roles, `Rank 2 (env, learner)`, where ranks differ in them."""
    plan = read_json(run.plan)
    roles = [row["roles"] for row in plan["ranks"]] if isinstance(plan, dict) else []
    return f"Rank {rank} ({', '.join(roles[rank])})" if any(r != roles[0] for r in roles) else f"Rank {rank}"


@contextmanager
def _handlers(caught: list[signal.Signals]) -> Iterator[None]:
    """Note Ctrl-C, SIGTERM and SIGHUP instead of dying of them; only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number))

    # What the caller told us to ignore stays ignored: nohup, background jobs.
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _running(process: psutil.Process) -> bool:
    """False for zombies: what is left of a process whose parent has not asked for its exit code yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _quietly(action: Callable[[], object]) -> None:
    """Signal a process that may be gone."""
    try:
        action()
    except (psutil.Error, OSError):
        return
