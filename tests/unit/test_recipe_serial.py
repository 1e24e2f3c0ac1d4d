"""Recipes and plans survive the way through JSON, and nothing else passes for one."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlarl import serial
from vlarl.errors import VlarlError
from vlarl.recipe.schema import Grpo, Lora, Policy, Recipe, Warmstart

POLICY = Policy(checkpoint="scratch:tiny", lora=Lora(targets=("q_proj",)))
RECIPE = Recipe(name="a", policy=POLICY, algorithm=Grpo(), warmstart=(Warmstart(steps=3),))


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(serial.dumps(RECIPE))
    assert serial.load(Recipe, path) == RECIPE


def test_every_field_is_written() -> None:
    written = json.loads(serial.dumps(RECIPE))
    assert written["algorithm"]["kind"] == "grpo"
    assert written["env"]["horizon"] == 48
    assert written["policy"]["lora"]["targets"] == ["q_proj"]


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("env", "parallel", "64", "env.parallel is '64', expected int"),
        ("env", "parallel", True, "env.parallel is True, expected int"),
        ("env", "wrist_camera", 1, "env.wrist_camera is 1, expected bool"),
        ("env", "reward", "rich", "env.reward is 'rich'"),
        ("algorithm", "clip", [0.2], "algorithm.clip has 1 entries, expected 2"),
        ("algorithm", "kind", "dqn", "algorithm.kind is 'dqn'"),
        ("env", "colour", 3, "env.colour is unknown"),
    ],
)
def test_a_misfit_is_named(section: str, key: str, value: Any, says: str) -> None:
    written = serial.to_dict(RECIPE)
    written[section][key] = value
    with pytest.raises(VlarlError, match="not a Recipe") as caught:
        serial.from_dict(Recipe, written)
    assert says in caught.value.message


def test_a_missing_field_a_cut_file_and_no_file(tmp_path: Path) -> None:
    written = serial.to_dict(RECIPE)
    del written["update"]["updates"]
    with pytest.raises(VlarlError, match="update.updates is missing"):
        serial.from_dict(Recipe, written)
    path = tmp_path / "recipe.json"
    with pytest.raises(VlarlError, match="does not exist"):
        serial.load(Recipe, path)
    path.write_text(serial.dumps(RECIPE)[:100])
    with pytest.raises(VlarlError, match="cannot be read"):
        serial.load(Recipe, path)


def test_whole_numbers_serve_as_floats() -> None:
    written = serial.to_dict(RECIPE)
    written["update"]["grad_clip"] = 5
    grad_clip = serial.from_dict(Recipe, written).update.grad_clip
    assert (grad_clip, type(grad_clip)) == (5.0, float)
