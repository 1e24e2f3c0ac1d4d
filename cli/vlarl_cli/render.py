"""Owns everything that is printed: plans, progress, results, errors. Nothing else prints."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vlarl.errors import VlarlError
from vlarl.plan.choose import Candidate
from vlarl.plan.placement import PlacementPlan, phase_bytes

if TYPE_CHECKING:
    from vlarl_cli.doctor import Finding
    from vlarl_cli.simulators import Status

PLAIN_SECONDS = 15.0  # between progress lines where the output is not a terminal
RANKS_SHOWN = 16
LOG_COLUMNS = 160

# Tables in a log file are not squeezed into a terminal's 80 columns.
out = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_COLUMNS)
err = Console(stderr=True, highlight=False)


def error(problem: VlarlError) -> None:
    """One message in red, and what to do about it."""
    err.print(Text("error: ", style="bold red") + Text(problem.message, style="red"), soft_wrap=True)
    if problem.hint:
        err.print(Text(problem.hint), soft_wrap=True)


def note(text: str) -> None:
    """One plain line."""
    out.print(Text(text), soft_wrap=True)


def plan(placement: PlacementPlan) -> None:
    """Ranks, roles, slots, the batch equation, and the memory estimate of one device."""
    note(f"{placement.name}: {placement.reason}")
    slots = ("env slots",) if placement.mode == "collocated" else ("env slots", "acts for", "learns from")
    ranks = Table("rank", "device", "threads", "roles", *slots, title="ranks", title_justify="left")
    for rank in placement.ranks[:RANKS_SHOWN]:
        held = [_span(part) for part in (rank.slots, rank.policy_slots, rank.sample_slots)][: len(slots)]
        where = rank.device if placement.workers.nnodes == 1 else f"node {rank.node}, {rank.device}"
        ranks.add_row(str(rank.rank), where, str(rank.threads), ", ".join(rank.roles), *held)
    if len(placement.ranks) > RANKS_SHOWN:
        ranks.add_row("...", f"{len(placement.ranks) - RANKS_SHOWN} more")
    out.print(ranks)
    stages = f", in {placement.rollout.stages} stages" if placement.rollout.stages > 1 else ""
    stages += ", simulating beside acting" if placement.rollout.overlap else ""
    note(f"batch: {placement.equation}")
    note(f"mode: {placement.mode}{stages}; dtype: {placement.dtype}; backend: {placement.workers.backend}; seed: {placement.seed}")
    for ranks_named in dict.fromkeys(row.ranks for row in placement.memory):
        out.print(_memory_table(placement, ranks_named))
    note(f"offload: {offload(placement)}")


def _span(slots: tuple[int, int]) -> str:
    return f"{slots[0]}-{slots[1] - 1}" if slots[0] < slots[1] else "-"


def offload(placement: PlacementPlan) -> str:
    """What leaves the device in which phase, and why."""
    residency = placement.residency
    away = [f"{', '.join(parts)} away during {phase}" for phase in ("rollout", "evaluation") if (parts := residency.away(phase))]
    away += ["gradients and weights sharded after every forward pass of an update"] if residency.update else []
    return "; ".join([*away, residency.reason])


def _memory_table(placement: PlacementPlan, ranks: str) -> Table:
    whose = "one rank" if ranks == "every rank" else f"one rank: {ranks}"
    table = Table("component", title=f"memory of {whose}, estimated", title_justify="left")
    rows = [row for row in placement.memory if row.ranks == ranks]
    phases = list(dict.fromkeys(row.phase for row in rows))
    for phase in phases:
        table.add_column(phase, justify="right")
    sizes: Counter[tuple[str, str]] = Counter()
    for row in rows:  # an evaluation's own simulators come on top of training's, under the same name
        sizes[row.component, row.phase] += row.bytes
    beside = placement.workers.backend == "nccl"
    device_title = "on the device" if beside else "together"
    memories = (("device", device_title, placement.capacity_bytes), ("host", "on the host", placement.host_bytes))
    for where, title, there in memories:
        components = dict.fromkeys(row.component for row in rows if row.where == where)
        if not components:
            continue
        table.add_section()
        for component in components:
            table.add_row(component, *(size(sizes.get((component, phase))) for phase in phases))
        table.add_section()
        table.add_row(title, *(size(phase_bytes(placement.memory, phase, ranks, where == "host")) for phase in phases), style="bold")
        table.add_row("there is", *("unknown" if there is None else size(there) for _ in phases))
    return table


def result(value: dict[str, Any]) -> None:
    """A worker's result.json: one table and some notes."""
    if "table" in value:
        described = value["table"]
        table = Table(*(str(c) for c in described["columns"]), title=escape(str(described["title"])), title_justify="left")
        for row in described["rows"]:
            table.add_row(*(escape(str(cell)) for cell in row))
        out.print(table)
    for line in value.get("notes", []):
        note(str(line))


def candidates(rows: list[Candidate], devices: int) -> None:
    """Predicted iterations of several placements, fastest first."""
    columns = ("placement", "frames/s", "rollout s", "update s", "sync s", "overlap", "idle: mean", "most", "of the fastest")
    table = Table(columns[0], title=f"{devices} devices, predicted", title_justify="left")
    for name in columns[1:]:
        table.add_column(name, justify="right")
    best = max((row.prediction.frames_per_second for row in rows if row.prediction), default=0.0)
    for row in rows:
        p = row.prediction
        if p is None:
            continue
        seconds = (f"{value:.2f}" for value in (p.rollout_seconds, p.update_seconds, p.sync_seconds))
        shares = (f"{value:.0%}" for value in (p.overlap_efficiency, sum(p.idle) / len(p.idle), max(p.idle), p.frames_per_second / best))
        table.add_row(row.label, f"{p.frames_per_second:,.0f}", *seconds, *shares)
    out.print(table)


def bench_table(rows: list[dict[str, Any]], title: str) -> None:
    """Measured (or emulated) iterations of several placements, in the order given."""
    speed = "frames/s (emulated)" if rows[0]["emulated"] else "frames/s"
    columns = ["placement", speed, "predicted", "rollout s", "update s", "sync s", "overlap", "idle per rank"]
    columns += ["over disaggregated k=1", "over slowest"]
    table = Table(columns[0], title=escape(title), title_justify="left")
    for name in columns[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row[name]:.2f}" for name in ("rollout_seconds", "update_seconds", "sync_seconds")]
        cells.append(f"{row['overlap_efficiency']:.0%}")
        predicted = row["predicted_frames_per_second"]
        expected = f"{predicted:,.0f} ({row['frames_per_second'] / predicted - 1:+.0%})" if predicted else "-"
        runs = [(share, len(list(same))) for share, same in groupby(f"{share:.0%}" for share in row["idle"])]
        idle = ", ".join(f"{count} x {share}" if count > 1 else share for share, count in runs[:RANKS_SHOWN])
        over = row["speedup_over_disaggregated"]
        ratios = (f"{over:.2f}x" if over else "-", f"{row['speedup_over_slowest']:.2f}x")
        table.add_row(row["label"], f"{row['frames_per_second']:,.0f}", expected, *cells, idle, *ratios)
    out.print(table)


def recipe_list(rows: list[tuple[str, str]]) -> None:
    """Shipped recipes with one line each."""
    table = Table("recipe", "what it does", box=None, pad_edge=False)
    for name, text in rows:
        table.add_row(escape(name), escape(text))
    out.print(table)


def system_commands(packages: list[str], commands: list[str]) -> None:
    """What root has to run before a simulator can render."""
    note(f"System packages are missing: {', '.join(packages)}. As root, run:")
    for line in commands:
        note(f"    {line}")


def findings(rows: list[Finding]) -> None:
    """What `vlarl doctor` saw of the machine, and the fixes."""
    table = Table("what", "found", "well", title="this machine", title_justify="left")
    for row in rows:
        table.add_row(row.name, Text(row.found), "no" if row.problem else "yes")
    out.print(table)
    for row in rows:
        if row.problem is not None:
            note(f"{row.name}: {row.problem} {row.fix}")


def simulators(rows: list[Status]) -> None:
    """What became of trying each simulator, and the fixes."""
    table = Table("simulator", "installed", "imports and renders", "in", "interpreter")
    for row in rows:
        works = "yes" if row.problem is None else "no" if row.version else "-"
        table.add_row(row.name, row.version or "no", works, f"{row.seconds:.1f} s" if row.version else "-", row.python)
    out.print(table)
    for row in rows:
        if row.problem is not None:
            note(f"{row.name}: {row.problem} {row.fix}")


@contextmanager
def progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A display for the contents of status.json: live on a terminal, a line now and then elsewhere."""
    if not out.is_terminal:
        yield PlainProgress(note, time.monotonic)
        return
    with Live(Text("starting ..."), console=out, refresh_per_second=4, transient=True) as live:
        evaluations = _Evaluations(note)  # lands above the display

        def show(status: dict[str, Any]) -> None:
            evaluations(status)
            live.update(_display(status))

        yield show


class _Evaluations:
    """Prints what came of each evaluation while training, once: it stands in every later status."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._printed = write, ""

    def __call__(self, status: dict[str, Any]) -> None:
        if status["evaluated"] and status["evaluated"] != self._printed:
            self._printed = status["evaluated"]
            self._write(self._printed)


class PlainProgress:
    """Prints a line when the phase changes or some time has passed, and for the last update; and one for each evaluation."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._write, self._clock = write, clock
        self._evaluations = _Evaluations(write)
        self._phase: str | None = None
        self._update: int | None = None
        self._printed = 0.0

    def __call__(self, status: dict[str, Any]) -> None:
        self._evaluations(status)
        last = 0 < status["updates"] == status["update"] != self._update  # an evaluation after it has many a status
        if status["phase"] == self._phase and self._clock() - self._printed < PLAIN_SECONDS and not last:
            return
        self._phase, self._update, self._printed = status["phase"], status["update"], self._clock()
        self._write("  ".join([status["phase"], _count(status), *_figures(status), *_left(status), status["line"]]).rstrip())


def _display(status: dict[str, Any]) -> Group:
    row = Table.grid(padding=(0, 2))
    done, of = _done(status)
    bar = ProgressBar(total=max(1, of), completed=min(done, of), width=30)
    row.add_row(Text(status["phase"], style="bold"), bar, _count(status), *_left(status))
    return Group(row, Text("  ".join(_figures(status))), Text(status["line"], style="dim"))  # a line each, as 80 columns hold


def _done(status: dict[str, Any]) -> tuple[int, int]:
    """Of the evaluation in progress, else of the command."""
    evaluation = status["evaluation"]
    return (evaluation["played"], evaluation["of"]) if evaluation else (status["update"], status["updates"])


def _count(status: dict[str, Any]) -> str:
    done, of = _done(status)
    return f"{done}/{of} episodes" if status["evaluation"] else f"{done}/{of}"


def _figures(status: dict[str, Any]) -> list[str]:
    """What is known of speed and success; of the evaluation in progress alone while there is one."""
    evaluation = status["evaluation"]
    if evaluation:
        return _success(evaluation["successes"], evaluation["played"])
    found = []
    if status["frames_per_second"] is not None:
        unit = "samples" if status["phase"] == "warm start" else "frames"  # cloning plays nothing
        found.append(f"{status['frames_per_second']:,.0f} {unit}/s")
    if status["recent"] is not None:
        found += [f"training {text}" for text in _success(*status["recent"])]
    if status["episodes"]:
        found.append(f"{status['episodes']:,} episodes")
    return found


def _success(successes: int, episodes: int) -> list[str]:
    return [f"success {successes}/{episodes} = {100 * successes / episodes:.1f} %"] if episodes else []


def _left(status: dict[str, Any]) -> list[str]:
    seconds = (status["evaluation"] or status)["eta_seconds"]
    if seconds is None:
        return []
    minutes, seconds = divmod(int(seconds), 60)
    return [f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left" if minutes >= 60 else f"{minutes}:{seconds:02d} left"]


def size(count: int | None) -> str:
    """Bytes in the largest unit that gives at least 1."""
    if count is None:
        return "-"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
