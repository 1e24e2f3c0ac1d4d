"""Owns `vlarl compare`: finds two evaluations' results, pairs their episodes, and builds the table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlarl.errors import VlarlError
from vlarl.evaluation.compare import Paired, clashes, differences, pair, verdict
from vlarl.evaluation.report import REPORT_VERSION

EVALUATE = "Make both with `vlarl eval --ckpt DIR --out DIR`, and the same --set, --tasks and --seed."


def compare(a: Path, b: Path) -> tuple[list[Paired], list[str]]:
    """Rows of the sets that both played, in A's order, and notes. VlarlError where there is no result, or no shared episode."""
    first, second = _reports(a), _reports(b)
    shared = [name for name in first if name in second]
    if not shared:
        raise VlarlError(f"{a} and {b} share no set: {', '.join(first)}; {', '.join(second)}.", EVALUATE)
    wrong = [f"set {name}: {clash}" for name in shared for clash in clashes(first[name], second[name])]
    if wrong:
        raise VlarlError(f"{a} and {b} did not play the same episodes. Of A and of B: {'; '.join(wrong)}.", EVALUATE)
    rows, notes = [], []
    for name in shared:
        of_set = pair(first[name], second[name])
        rows += of_set
        notes.append(f"{name}: {verdict(of_set[-1])}")
    notes += [f"Played otherwise: {text}." for text in dict.fromkeys(d for name in shared for d in differences(first[name], second[name]))]
    if first[shared[0]]["hashes"] and first[shared[0]]["hashes"] == second[shared[0]]["hashes"]:
        notes.append("A and B are the same weights.")
    return rows, notes


def table(rows: list[Paired]) -> dict[str, Any]:
    """As `render.result` wants it."""
    cells = []
    for row in rows:
        low, high = row.interval()
        rates = [f"{count}/{row.episodes} {count / row.episodes:.1%}" for count in (row.a, row.b)]
        gain = [f"{100 * row.gain:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"]
        cells.append([row.variation, row.task, *rates, *gain, str(row.only_a), str(row.only_b), f"{row.p_value:.2g}"])
    columns = ["set", "task", "A", "B", "B - A, points", "95 % interval", "only A", "only B", "McNemar p"]
    return {"title": "paired by episode", "columns": columns, "rows": cells}


def as_json(rows: list[Paired], notes: list[str]) -> str:
    """The same figures for scripts."""
    figures = [asdict(row) | {"gain": row.gain, "interval95": row.interval(), "p_value": row.p_value} for row in rows]
    return json.dumps({"rows": figures, "notes": notes}, indent=2)


def _reports(path: Path) -> dict[str, dict[str, Any]]:
    """The reports of an evaluation's run folder, or of its eval.json, by set."""
    file = path / "eval.json" if path.is_dir() else path
    try:
        reports = json.loads(file.read_text(encoding="utf-8"))
        versions = {report["version"] for report in reports}
        found = {report["protocol"]["variation"]: report for report in reports}
    except OSError as error:
        raise VlarlError(f"{file}: {error.strerror}; expected the result of an evaluation.", EVALUATE) from error
    except (ValueError, TypeError, KeyError) as error:
        raise VlarlError(f"{file} is not the result of an evaluation.", EVALUATE) from error
    if versions != {REPORT_VERSION}:
        raise VlarlError(f"{file} is of version {sorted(versions)}; this vlarl reads {REPORT_VERSION}.", EVALUATE)
    return found
