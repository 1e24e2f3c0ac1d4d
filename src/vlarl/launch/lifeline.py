"""Owns what makes processes end together: parent-death signals and a watch on the launcher. Stdlib only; ranks call `hold()` first thing.

`python -m vlarl.launch.lifeline ARGS...` becomes `python ARGS...`, to be killed by the kernel when its parent dies.
A rank is held twice: the kernel kills it when torchrun dies, and a watcher thread when the launcher does.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

LAUNCHER_PID = "VLARL_LAUNCHER_PID"
LOG_FOLDER = "VLARL_LOG_FOLDER"
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 1.0  # where the system has no pidfd


def hold() -> None:
    """Tie this rank to torchrun and to the launcher named in the environment, and send its output to logs/rank{r}.log.

    SIGUSR1 writes every thread's stack there. Does nothing where no launcher is named: started by hand, or in-process.
    """
    if LAUNCHER_PID not in os.environ:
        return
    if LOG_FOLDER in os.environ:
        log_to(Path(os.environ[LOG_FOLDER]) / f"rank{os.environ.get('RANK', '0')}.log")
    faulthandler.enable()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    die_with_parent()
    launcher = int(os.environ[LAUNCHER_PID])
    threading.Thread(target=_watch, args=(launcher,), name="lifeline", daemon=True).start()


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent dies (Linux; elsewhere the watch on the launcher has to do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def log_to(path: Path) -> None:
    """Append stdout and stderr to a file, also what C libraries write."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (sys.stdout, sys.stderr):
        standard.flush()
        os.dup2(descriptor, standard.fileno())
    os.close(descriptor)


def _watch(launcher: int) -> None:
    """Wait until the launcher is gone, then end this process at once: nobody is left to read its results."""
    try:
        descriptor = os.pidfd_open(launcher)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    except (AttributeError, OSError):
        while _alive(launcher):
            time.sleep(POLL_SECONDS)
    else:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.poll()
    os.kill(os.getpid(), signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def main() -> None:
    """Become `python ARGS...`; the parent-death signal outlives exec."""
    die_with_parent()
    if os.getppid() != int(os.environ[LAUNCHER_PID]):  # the launcher died before the kernel was asked
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
