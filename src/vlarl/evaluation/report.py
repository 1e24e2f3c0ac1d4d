"""Owns the result of an evaluation: k/n with 95 % Wilson intervals per task and pooled, every episode's row, versions. Torch-free."""
from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vlarl.evaluation.protocol import Protocol, digest, episodes
from vlarl.evaluation.statistics import wilson

REPORT_VERSION = 1
_PACKAGES = ("vlarl", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class EpisodeRow:
    """One played episode. task: index into the protocol's tasks. return_: undiscounted sum of rewards. length: executed actions."""

    uid: int
    task: int
    init_state: int
    seed: int
    success: bool
    return_: float
    length: int


def build_report(protocol: Protocol, rows: list[EpisodeRow], hashes: dict[str, str]) -> dict[str, Any]:
    """The JSON-able result of playing all of the protocol's episodes; rows in any order.

    hashes: what was evaluated, e.g. {"model.safetensors": sha256}. Keys: version, protocol (with its digest), pooled and tasks (see
    `_summary`), rows (sorted by uid, tasks by name), versions, hashes.
    """
    ordered = sorted(rows, key=lambda row: row.uid)
    played = [(row.uid, row.task, row.init_state, row.seed) for row in ordered]
    wanted = [(spec.uid, spec.task, spec.init_state, spec.seed) for spec in episodes(protocol)]
    assert played == wanted, "the rows are not the protocol's episodes"
    by_task = {name: [row for row in ordered if row.task == index] for index, name in enumerate(protocol.tasks)}
    return {
        "version": REPORT_VERSION,
        "protocol": asdict(protocol) | {"tasks": list(protocol.tasks), "options": list(protocol.options), "digest": digest(protocol)},
        "pooled": _summary(ordered),
        "tasks": {name: _summary(of_task) for name, of_task in by_task.items() if of_task},
        "rows": [asdict(row) | {"task": protocol.tasks[row.task]} for row in ordered],
        "versions": versions(),
        "hashes": hashes,
    }


def versions() -> dict[str, str | None]:
    """Python, platform and the packages that can change a result; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def result_table(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """{"title", "columns", "rows"} of strings for the terminal: per report its tasks, then all of them pooled if they are several."""
    table_rows = []
    for report in reports:
        variation = report["protocol"]["variation"]
        table_rows += [_table_row(variation, name, summary) for name, summary in report["tasks"].items()]
        if len(report["tasks"]) > 1:
            table_rows.append(_table_row(variation, "all", report["pooled"]))
    protocol = reports[0]["protocol"]
    decoding = "greedy" if protocol["temperature"] == 0 else f"temperature {protocol['temperature']:g}"
    return {
        "title": f"{protocol['simulator']}, {protocol['episodes']} episodes, {decoding}",
        "columns": ["set", "task", "success", "rate", "95 % interval", "mean length"],
        "rows": table_rows,
    }


def _summary(rows: list[EpisodeRow]) -> dict[str, Any]:
    """successes, episodes, rate, wilson95 [low, high], mean_return, mean_length (executed actions)."""
    successes, count = sum(row.success for row in rows), len(rows)
    return {
        "successes": successes,
        "episodes": count,
        "rate": successes / count,
        "wilson95": list(wilson(successes, count)),
        "mean_return": sum(row.return_ for row in rows) / count,
        "mean_length": sum(row.length for row in rows) / count,
    }


def _table_row(variation: str, task: str, summary: dict[str, Any]) -> list[str]:
    low, high = summary["wilson95"]
    return [
        variation,
        task,
        f"{summary['successes']}/{summary['episodes']}",
        f"{summary['rate']:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{summary['mean_length']:.1f}",
    ]
