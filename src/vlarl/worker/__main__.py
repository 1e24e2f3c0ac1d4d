"""Owns the entry of a worker rank: `python -m vlarl.worker --run-dir D --job J`, started by torchrun or by hand.

Exit codes: 0, EXIT_USER for a mistake the user can mend, EXIT_INTERRUPTED for Ctrl-C (by hand, in-process),
EXIT_WORKER for anything else. The cause is left in logs/rank{r}.error.json.
"""
from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
import traceback
from pathlib import Path

from vlarl.errors import EXIT_USER, EXIT_WORKER, VlarlError
from vlarl.launch.lifeline import hold

EXIT_INTERRUPTED = 130
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: list[str]) -> int:
    """Run one job in this process."""
    parser = argparse.ArgumentParser(prog="vlarl.worker")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--job", choices=("train", "sft", "eval", "record", "bench", "profile"), default="train")
    parser.add_argument("--resume", action="store_true", help="train: go on from the newest checkpoint")
    parser.add_argument("--variations", default="", help="eval: comma-separated scene distributions; empty: the recipe's")
    parser.add_argument("--updates", type=int, default=3, help="bench: timed updates")
    parser.add_argument("--warmup", type=int, default=1, help="bench: updates before them")
    parser.add_argument("--emulate", type=Path, help="bench: a profile.json whose costs are slept instead of computed")
    parser.add_argument("--dataset", type=Path, help="record: the folder to write")
    options = parser.parse_args(arguments)
    hold()
    from vlarl.worker.jobs import JobOptions, run_job  # torch and transformers: seconds, so after the arguments

    variations = tuple(v for v in options.variations.split(",") if v)
    try:
        told = JobOptions(variations, options.resume, options.updates, options.warmup, options.emulate, options.dataset)
        run_job(options.job, options.run_dir, told)
    except VlarlError as error:
        _record(options.run_dir, "user" if error.exit_code != EXIT_WORKER else "crash", error.message, error.hint)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            _record(options.run_dir, "user", f"The disk of {options.run_dir} is full.", "Free some space, then resume.")
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER
        _record(options.run_dir, "crash", f"{type(error).__name__}: {error}", "")
        traceback.print_exc()
        return EXIT_WORKER
    return 0


def _record(run_dir: Path, kind: str, message: str, hint: str) -> None:
    """Leave the cause where the launcher looks for it."""
    rank = os.environ.get("RANK", "0")
    try:
        phase = json.loads((run_dir / "heartbeat" / f"rank{rank}.json").read_text())["phase"]
    except (OSError, ValueError, KeyError):
        phase = "start"
    row = {"kind": kind, "message": message, "hint": hint, "time": time.time(), "phase": phase, "rank": int(rank)}
    try:
        (run_dir / "logs").mkdir(exist_ok=True)
        (run_dir / "logs" / f"rank{rank}.error.json").write_text(json.dumps(row))
    except OSError as error:  # a full disk must not hide the cause
        print(f"cannot write the error file: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(code) if (code := main(sys.argv[1:])) else sys.exit(0)
