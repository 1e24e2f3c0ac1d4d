"""Owns where numbers go: metrics.jsonl (the record), TensorBoard and, when asked for, Weights & Biases (views of it)."""
from __future__ import annotations

import json
import math
import os
import textwrap
import time
import uuid
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from vlarl.errors import MachineError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl in file order; null where a value was not finite. [] if there is no file.

    A last line cut short by a killed process is left out; a broken line elsewhere raises MachineError.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise MachineError(f"{path} line {number} is not JSON: {error}.", "Remove that line, or restore the file.") from error
    return rows


class MetricsWriter:
    """Writes one row of scalars per update. Only rank 0 has one.

    resume_from: last update whose rows stand; later ones (written by a run that died after its checkpoint) are dropped from
    metrics.jsonl and hidden in TensorBoard. None: a new record. recipe: what is being run, as a nested dict: a text in TensorBoard, the
    configuration in W&B. Raises MachineError when the disk refuses.
    """

    def __init__(
        self, run_dir: Path, tensorboard: bool, wandb: bool, resume_from: int | None, recipe: dict[str, Any] | None = None
    ) -> None:
        self._path = run_dir / METRICS_FILE
        self._file = _open_record(self._path, resume_from)
        self._board = _open_tensorboard(run_dir, resume_from) if tensorboard else None
        if self._board is not None and recipe is not None:
            # Indented, Markdown shows it as it is. A run that goes on, perhaps with other settings, adds the recipe of then.
            self._board.add_text("recipe", textwrap.indent(json.dumps(recipe, indent=2), "    "), resume_from or 0)
        self._wandb = _open_wandb(run_dir, recipe) if wandb else None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Appends {"step", "time" (Unix seconds), name: value, ...} as strict JSON, flushed to the file before it returns."""
        row = {"step": step, "time": round(time.time(), 3)} | {name: _strict(value) for name, value in scalars.items()}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise _refused(self._path, error) from error
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step} | scalars)

    def histogram(self, name: str, tensor: Tensor, step: int) -> None:
        """TensorBoard only: the distribution of `tensor`'s finite values (any shape, dtype and device); nothing if there are none."""
        if self._board is None:
            return
        values = tensor.detach().flatten().float().cpu()
        values = values[values.isfinite()]
        if len(values):
            self._board.add_histogram(name, values, step)

    def close(self) -> None:
        """Flushes and closes every sink. May be called twice."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _strict(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _refused(path: Path, error: OSError) -> MachineError:
    return MachineError(f"Cannot write {path}: {error.strerror or error}.", "Free some space or choose another folder with --out.")


def _open_record(path: Path, resume_from: int | None) -> IO[str]:
    try:
        if resume_from is None:
            return path.open("w", encoding="utf-8")
        kept = [row for row in read_metrics(path) if row["step"] <= resume_from]
        draft = path.with_suffix(".jsonl.tmp")
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise _refused(path, error) from error


def _open_tensorboard(run_dir: Path, resume_from: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # slow to import: only the rank that writes pays

    purge_step = None if resume_from is None else resume_from + 1
    return SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=purge_step)


def _open_wandb(run_dir: Path, recipe: dict[str, Any] | None) -> Any:
    """A W&B run that a resumed training continues. WANDB_MODE=offline works: nothing here needs the network."""
    try:
        import wandb
    except ImportError as error:
        raise MachineError("log.wandb is true, but wandb is not installed.", "Install it with: pip install 'vlarl[wandb]'") from error
    id_file = run_dir / "wandb-id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    group, tags = (None, None) if recipe is None else (recipe["name"], [recipe["algorithm"]["kind"], recipe["env"]["simulator"]])
    wandb_id = id_file.read_text(encoding="utf-8")
    run = wandb.init(project="vlarl", name=run_dir.name, id=wandb_id, dir=str(run_dir), resume="allow", group=group, tags=tags)
    if recipe is not None:
        run.config.update(recipe, allow_val_change=True)  # a resume may change settings
    run.define_metric("*", step_metric="step")  # W&B's own counter cannot go back on resume; ours can
    return run
