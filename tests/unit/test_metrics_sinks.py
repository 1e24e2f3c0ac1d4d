"""metrics.jsonl: strict rows, exact resume, clear errors."""
from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlarl.errors import MachineError
from vlarl.metrics.sinks import MetricsWriter, read_metrics


def _values(path: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(path)]


def test_rows_are_strict_json_and_on_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb=False, resume_from=None)
    writer.write(1, {"train/success": 0.25, "train/episodes": 8, "update/approx_kl": math.nan, "update/ratio": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=pytest.fail)
    assert list(row)[:2] == ["step", "time"]
    assert _values(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/success": 0.25, "train/episodes": 8, "update/approx_kl": None, "update/ratio": None}
    ]
    writer.close()
    writer.close()


def test_resume_drops_later_rows_and_a_half_written_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "time": 0.0, "x": step / 10}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "ti')
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb=False, resume_from=2)
    writer.write(3, {"x": 7.0})
    writer.close()
    assert _values(path) == [{"step": 1, "x": 0.1}, {"step": 2, "x": 0.2}, {"step": 3, "x": 7.0}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_record_replaces_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "time": 0.0}\n')
    MetricsWriter(tmp_path, tensorboard=False, wandb=False, resume_from=None).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(MachineError, match="line 2"):
        read_metrics(path)


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_an_unwritable_folder_is_a_machine_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="Cannot write"):
        MetricsWriter(tmp_path / "absent", tensorboard=False, wandb=False, resume_from=None)


def test_a_full_disk_is_a_machine_error(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to(full)
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb=False, resume_from=None)
    with pytest.raises(MachineError, match="No space left"):
        writer.write(1, {"x": 1.0})


def test_tensorboard_holds_scalars_and_histograms_and_hides_rows_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tensorboard=True, wandb=False, resume_from=None)
    for step in (1, 2, 3):
        writer.write(step, {"train/success": step / 4})
    writer.histogram("advantage", torch.tensor([1.0, 2.0, math.nan]), 1)
    writer.histogram("empty", torch.tensor([math.inf]), 1)
    writer.close()
    writer = MetricsWriter(tmp_path, tensorboard=True, wandb=False, resume_from=2)
    writer.write(3, {"train/success": 0.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/success")] == [(1, 0.25), (2, 0.5), (3, 0.5)]
    assert events.Tags()["histograms"] == ["advantage"]
    assert events.Histograms("advantage")[0].histogram_value.num == 2


RECIPE = {"name": "mine", "algorithm": {"kind": "ppo", "gamma": 0.99}, "env": {"simulator": "tabletop"}}


def test_tensorboard_holds_the_recipe(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    MetricsWriter(tmp_path, tensorboard=True, wandb=False, resume_from=None, recipe=RECIPE).close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("recipe/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert all(line.startswith("    ") for line in shown.splitlines()) and json.loads(shown) == RECIPE


def test_wandb_gets_the_recipe_group_and_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for wandb, which need not be installed."""
    told: dict[str, Any] = {}
    config = SimpleNamespace(update=lambda values, allow_val_change: told.update(config=values, may_change=allow_val_change))
    run = SimpleNamespace(config=config, define_metric=lambda name, step_metric: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: told.update(given) or run))
    MetricsWriter(tmp_path, tensorboard=False, wandb=True, resume_from=None, recipe=RECIPE).close()
    assert (told["config"], told["may_change"]) == (RECIPE, True)
    assert (told["group"], told["tags"], told["resume"]) == ("mine", ["ppo", "tabletop"], "allow")
    first = told["id"]
    MetricsWriter(tmp_path, tensorboard=False, wandb=True, resume_from=3, recipe=RECIPE).close()
    assert told["id"] == first
