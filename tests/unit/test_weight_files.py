"""Safetensors headers: read without torch, and every kind of damage named."""
from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlarl.errors import CheckpointError
from vlarl.plan.specs import check_weights, policy_spec
from vlarl.policies.layout import resolve_folder
from vlarl.policies.weight_files import Stored, read_header, read_weights, write_file, write_weights
from vlarl.recipe.schema import Policy, Recipe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6, dtype=torch.int64).view(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}, file)
    return file


def test_header(path: Path) -> None:
    header = read_header(path)
    assert {n: (t.dtype, t.shape, t.bytes) for n, t in header.items()} == {"a": ("I64", (2, 3), 48), "b": ("BF16", (3,), 6)}
    first = header["a"]
    assert struct.unpack("<6q", path.read_bytes()[first.start : first.start + 48]) == (0, 1, 2, 3, 4, 5)


def test_a_configuration_shipped_without_weights() -> None:
    with pytest.raises(CheckpointError) as refused:
        read_weights(resolve_folder("bundled:tiny-openvla")[0])
    assert "scratch:tiny-openvla" in refused.value.hint


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -7, -1])
def test_a_file_cut_anywhere_is_noticed(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
        read_header(path)


def test_a_file_with_more_bytes_or_another_header_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    for wrong in (whole + b"x", struct.pack("<Q", 10**15) + whole[8:], struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": {}}'):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_header(path)


def test_copies_are_the_same_tensors(path: Path, tmp_path: Path) -> None:
    header = read_header(path)
    write_file(tmp_path / "copy", {"second": header["b"], "first": header["a"]})
    copy = load_file(tmp_path / "copy")
    assert torch.equal(copy["first"], torch.arange(6).view(2, 3)) and copy["second"].dtype == torch.bfloat16
    write_weights(tmp_path, {"x": header["a"], "y": header["b"]}, 50)
    assert sorted(p.name for p in tmp_path.glob("model-*")) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 54
    assert read_weights(tmp_path).keys() == {"x", "y"}
    cut = Stored(path, "a", "I64", (2, 3), header["a"].start, 10**6)
    with pytest.raises(CheckpointError, match="ends within a"):
        write_file(tmp_path / "never", {"a": cut})


def test_a_policy_cut_short_is_refused_without_torch(tmp_path: Path) -> None:
    folder, _ = resolve_folder("bundled:tiny-sft")
    for source in folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    recipe = Recipe(name="x", policy=Policy(checkpoint=str(tmp_path)))
    check_weights(recipe)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cannot be read: it has 5316327 bytes, its header describes 5316328"):
        check_weights(recipe)
    weights.unlink()
    with pytest.raises(CheckpointError, match="lacks this file"):
        check_weights(recipe)
    assert policy_spec(recipe).unnorm_key == "tabletop"  # planning needs no weights
