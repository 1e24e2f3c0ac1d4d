"""Reads a finished run's metrics.jsonl: samples per second of rollout and update, and each phase's share of an update. Medians."""
from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

WARM_UP = 2  # first updates left out: allocation, compilation, caches


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians with smallest and largest over the updates in `rows` (training rows of metrics.jsonl)."""
    series = {
        "rollout chunks/s": [row["rollout/chunks"] / row["time/rollout_seconds"] for row in rows],
        "update samples/s": [row["update/samples"] / row["time/update_seconds"] for row in rows],
        "frames/s of the whole update": [row["rollout/frames_per_second"] for row in rows],
        "seconds per update": [row["time/update_wall_seconds"] for row in rows],
        "share simulation": [row["time/env_seconds"] / row["time/update_wall_seconds"] for row in rows],
        "share action generation": [row["time/act_seconds"] / row["time/update_wall_seconds"] for row in rows],
        "share learning": [row["time/update_seconds"] / row["time/update_wall_seconds"] for row in rows],
    }
    return {name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in series.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    lines = (options.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "update/samples" in row][WARM_UP:]
    if not rows:
        parser.error(f"{options.run} has fewer than {WARM_UP + 1} updates")
    figures = summarise(rows)
    print(f"{options.run}: {len(rows)} updates on {platform.machine()}, {platform.processor() or 'processor not named'}")
    for name, of in figures.items():
        shown = "{:8.1%}   ({:.1%} to {:.1%})" if name.startswith("share") else "{:8.1f}   ({:.1f} to {:.1f})"
        print(f"{name:30s}{shown.format(of['median'], of['min'], of['max'])}")
    if options.json:
        options.json.write_text(json.dumps({"run": options.run.name, "updates": len(rows), "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
