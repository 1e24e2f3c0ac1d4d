"""Owns a torchrun that starts at once: it and its ranks are forked from a process that has imported everything already.

Its main, its report, and the ranks' entry are the real ones; only the interpreters' starts are saved.
"""
from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlarl.launch.lifeline import log_to


class _Forked:
    """What launcher and torchrun ask of subprocess.Popen, over a process that calls `body(argv)` in a session of its own."""

    def __init__(self, context: Any, body: Callable[[list[str]], None], argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._process = context.Process(target=_call, args=(body, list(argv), dict(env)))
        self._process.start()
        self.pid: int = self._process.pid
        self.terminate = self._process.terminate

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("forked process", timeout or 0.0)
        return code


def warm_torchrun(argv: Sequence[str], *, env: Mapping[str, str], stdout: Any, **others: Any) -> _Forked:
    """In the place of Popen, for the command of `launch.torchrun.command`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlarl.worker.jobs", "torch.distributed.run"])
    return _Forked(context, _torchrun, [stdout.name, *argv[argv.index("torch.distributed.run") + 1 :]], env)


def _call(body: Callable[[list[str]], None], argv: list[str], env: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # a process of its own does not inherit torchrun's
    body(argv)


def _torchrun(argv: list[str]) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    log_to(Path(argv[0]))
    context = multiprocessing.get_context("fork")
    subprocess_handler.Popen = lambda args, env, **others: _Forked(context, _rank, args, env)
    run.main(argv[1:])


def _rank(argv: list[str]) -> None:
    from vlarl.worker.__main__ import main

    os._exit(main(argv[argv.index("vlarl.worker") + 1 :]))
