"""Owns the exceptions that a user may see; every one says what, where, got, expected and what to do. Imports nothing."""
from __future__ import annotations

EXIT_USER = 2  # bad input: recipe, checkpoint, folder, disk, machine
EXIT_WORKER = 1  # a worker rank failed for a reason that is not the user's


class VlarlError(Exception):
    """A mistake the user can mend. Printed without a traceback; the command exits with `exit_code`.

    `message` is one sentence: what, where, got, expected. `hint` is what to do about it (may be empty).
    """

    exit_code = EXIT_USER

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class RecipeError(VlarlError):
    """One or many mistakes in a recipe, all reported at once. `problems` holds one sentence each."""

    def __init__(self, problems: list[str], source: str) -> None:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  {p}" for p in problems))
        self.problems = problems


class PlanError(VlarlError):
    """The recipe is valid but cannot run on this cluster; says which numbers clash and the nearest that fit."""


class MachineError(VlarlError):
    """The machine lacks something: a driver, a system library, disk space, a writable folder."""


class CheckpointError(VlarlError):
    """A checkpoint or policy folder is missing, truncated, or does not fit."""


class WorkerError(VlarlError):
    """A worker rank died, stalled or raised; names rank, phase and cause."""

    exit_code = EXIT_WORKER
