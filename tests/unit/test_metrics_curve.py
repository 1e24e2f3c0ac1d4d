"""The learning curve: pooled counts by hand, and a picture wherever there is something to draw."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from vlarl.metrics.curve import draw_curve, pooled_success


def _train(step: int, successes: int, episodes: int) -> dict[str, Any]:
    return {"step": step, "train/successes": successes, "train/episodes": episodes, "train/return": 0.5, "rollout/frames": 100 * step}


def test_pooled_success_pools_counts_backwards() -> None:
    rows = [_train(1, 1, 10), {"step": 1, "eval/episodes": 4}, _train(2, 5, 10), _train(3, 0, 0), _train(4, 9, 10)]
    assert pooled_success(rows, window_episodes=15) == [(1, 1, 10), (2, 6, 20), (4, 14, 20)]


def test_a_picture_from_training_and_evaluation_rows(tmp_path: Path) -> None:
    evaluation = {"step": 0, "eval/successes": 2, "eval/episodes": 4}
    broken = {"step": 3, "train/successes": 0, "train/episodes": 2, "train/return": None}
    rows = [evaluation, _train(1, 3, 8), _train(2, 5, 8), broken, evaluation | {"step": 3, "eval/successes": 4}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (960, 720)
        assert picture.convert("RGB").getextrema()[0][0] < 100  # something dark was drawn


def test_evaluations_alone_are_enough(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/successes": 2, "eval/episodes": 4}\n')
    assert draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert not draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()
