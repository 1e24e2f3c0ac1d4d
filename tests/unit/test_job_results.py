"""What jobs tell: how far an evaluation is while ranks play it, the table at the end of a training, which policy was evaluated."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlarl.distributed import manifest
from vlarl.evaluation.protocol import Protocol
from vlarl.evaluation.report import EpisodeRow
from vlarl.metrics.sinks import MetricsWriter
from vlarl.metrics.status import Heartbeat, read_status, write_status
from vlarl.worker import evaluate
from vlarl.worker.evaluate import _Watch
from vlarl.worker.jobs import _evaluated, _training_result
from vlarl.worker.progress import Progress

PROTOCOL = Protocol("test", "tabletop", ("put",), "train", 8, 10, 32, 1, 4, 0.0, 5)


def ranks_that_watch(run_dir: Path) -> list[_Watch]:
    """Two ranks of one evaluation, four episodes each; the first of them is the main one."""
    write_status(run_dir, phase="evaluation", update=1, updates=2, line="x")
    runs: list[Any] = [
        SimpleNamespace(run_dir=run_dir, heartbeat=Heartbeat(run_dir, rank), world=SimpleNamespace(is_main=rank == 0, world_size=2))
        for rank in range(2)
    ]
    return [_Watch(run, PROTOCOL, 4) for run in runs]


def rows(count: int, successes: int) -> list[EpisodeRow]:
    return [EpisodeRow(n, 0, n, 5, n < successes, 1.0, 10) for n in range(count)]


def test_the_main_rank_tells_how_far_all_ranks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: now[0])
    main, other = ranks_that_watch(tmp_path)
    before = read_status(tmp_path)
    main([], 0)
    assert read_status(tmp_path)["evaluation"] == {"played": 0, "of": 8, "successes": 0, "eta_seconds": None}
    other(rows(3, 2), 0)
    assert read_status(tmp_path)["evaluation"]["played"] == 0  # of which only the main rank writes
    now[0] += 0.5
    main(rows(1, 1), 10)
    assert read_status(tmp_path)["evaluation"]["played"] == 0  # so soon it does not
    now[0] += 1.5
    main(rows(1, 1), 10)  # one episode has ended, the others have come as far as another one
    assert read_status(tmp_path) == before | {"evaluation": {"played": 4, "of": 8, "successes": 3, "eta_seconds": 2.0}}
    other.tell(rows(4, 2), 0)
    main.tell(rows(4, 1), 0)
    assert read_status(tmp_path)["evaluation"] == {"played": 8, "of": 8, "successes": 3, "eta_seconds": 0.0}
    main.end()
    other.end()
    assert read_status(tmp_path) == before
    assert not any("evaluation" in json.loads(path.read_text()) for path in tmp_path.glob("heartbeat/*.json"))


def training_rows(run_dir: Path, progress: Progress, evaluations: dict[int, tuple[int, int]]) -> dict[str, str]:
    writer = MetricsWriter(run_dir, tensorboard=False, wandb=False, resume_from=None)
    for step, (successes, episodes) in evaluations.items():
        writer.write(step, {"eval/success": successes / episodes, "eval/successes": float(successes), "eval/episodes": float(episodes)})
        writer.write(step + 1, {"train/episodes": 3})
    writer.close()
    run: Any = SimpleNamespace(run_dir=run_dir, recipe=SimpleNamespace(name="mine"))
    return dict(_training_result(run, progress)["table"]["rows"])


def test_the_table_of_a_training(tmp_path: Path) -> None:
    progress = Progress(update=50, episodes=300, seconds=300.0, recent=[True] * 3 + [False] * 213, best=(0.815, 25))
    told = training_rows(tmp_path, progress, {0: (16, 200), 25: (163, 200), 50: (150, 200)})
    assert told.pop("time of this command").endswith((" s", " minutes", " hours"))
    assert told == {
        "updates": "50",
        "episodes": "300",
        "time of all updates": "5.0 minutes",
        "success, last 216 training episodes": "3/216 = 1.4 % (0.5 to 4.0 %)",
        "evaluation before training": "16/200 = 8.0 % (5.0 to 12.6 %)",
        "best evaluation (update 25, checkpoints/best)": "163/200 = 81.5 % (75.5 to 86.3 %)",
        "last evaluation (update 50)": "150/200 = 75.0 % (68.6 to 80.5 %)",
    }


def test_the_table_without_evaluations_or_with_the_first_alone(tmp_path: Path) -> None:
    assert not any("evaluation" in name for name in training_rows(tmp_path, Progress(update=2), {}))
    # A checkpoint of an earlier version may call update 0 the best; no checkpoint holds it.
    told = training_rows(tmp_path, Progress(update=2, best=(0.08, 0)), {0: (16, 200)})
    assert [name for name in told if "evaluation" in name] == ["evaluation before training"]


def test_which_policy_was_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(checkpoint: str) -> tuple[str, dict[str, Any]]:
        run: Any = SimpleNamespace(recipe=SimpleNamespace(policy=SimpleNamespace(checkpoint=checkpoint)))
        return _evaluated(run)

    monkeypatch.chdir(tmp_path)
    folders = [manifest.checkpoint_folder(tmp_path / "runs" / "d", update) for update in (100, 125)]
    for folder, update in zip(folders, (100, 125), strict=True):
        (folder / "policy").mkdir(parents=True)
        (folder / manifest.MANIFEST).write_text(json.dumps({"complete": True, "format": manifest.FORMAT, "update": update, "files": {}}))
    manifest.mark_best(folders[1])
    source = str(folders[1] / "policy")
    assert told(source) == ("policy: runs/d/checkpoints/update-000125 (best)", {"path": source, "update": 125, "best": True})
    line, kept = told(str(folders[0] / "policy"))
    assert (line, kept["best"]) == ("policy: runs/d/checkpoints/update-000100", False)
    assert told("bundled:tiny-sft")[1] == {"path": "bundled:tiny-sft", "update": None, "best": None}
    (tmp_path / "elsewhere").mkdir()
    assert told(str(tmp_path / "elsewhere"))[0] == "policy: elsewhere"
