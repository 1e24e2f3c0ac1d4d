"""Export: the published layout, verified after reading it back; shards and one file, adapters apart and merged, are the same policy."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlarl.errors import CheckpointError
from vlarl.policies.checkpoint import load_policy, save_policy
from vlarl.policies.probe import probe_logits
from vlarl.policies.weight_files import read_header, read_weights
from vlarl.recipe.schema import Lora
from vlarl.worker.export import verify, write


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's policy folder after training with adapters."""
    folder = tmp_path_factory.mktemp("adapted") / "policy"
    policy = load_policy("bundled:tiny-sft", lora=Lora(rank=4, alpha=8))
    for name, parameter in policy.module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    save_policy(folder, policy, policy.module.state_dict())
    return folder


@pytest.mark.parametrize("shard_bytes", [10**9, 2_000_000])
def test_a_model_comes_back_identical_in_one_file_or_in_shards(tmp_path: Path, shard_bytes: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write("bundled:tiny-sft", out, False, shard_bytes)
    manifest = verify(out)
    assert manifest["max_logit_difference"] == 0.0 and manifest["layout"] == "model"
    shards = sorted(out.glob("model*.safetensors"))
    assert len(shards) == (1 if shard_bytes == 10**9 else 3)
    original = load_file(load_policy("bundled:tiny-sft").folder / "model.safetensors")
    written = {name: t for shard in shards for name, t in load_file(shard).items()}
    assert written.keys() == {n for n in original if not n.startswith("value_head.")}
    assert all(torch.equal(written[name], original[name]) for name in written)
    assert load_file(out / "value_head.safetensors").keys() == {n for n in original if n.startswith("value_head.")}
    if len(shards) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in written.values())
        assert {index["weight_map"][n] for n in written} == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
        assert max(sum(t.bytes for t in read_header(shard).values()) for shard in shards) <= shard_bytes
    config = json.loads((out / "config.json").read_text())
    assert config["norm_stats"].keys() == {"tabletop"} and config["architectures"] == ["OpenVLAForActionPrediction"]
    assert set(manifest["files"]) == {p.name for p in out.iterdir()} - {"export.json"}
    assert {"tokenizer.json", "dataset_statistics.json", "preprocessor_config.json", "generation_config.json"} <= set(manifest["files"])


def test_adapters_apart_and_merged(adapted: Path, tmp_path: Path) -> None:
    logits = {}
    for merge in (False, True):
        out = tmp_path / str(merge)
        out.mkdir()
        write(str(adapted), out, merge, 10**9)
        manifest = verify(out)
        assert manifest["compared_with"] == "the base model with its adapters apart, as trained"
        assert manifest["layout"] == ("model" if merge else "adapter")
        assert 0 < manifest["max_logit_difference"] < 1e-3
        logits[merge] = probe_logits(load_policy(str(out)))
        assert (out / "adapter_model.safetensors").exists() is not merge and (out / "model.safetensors").exists() is merge
    assert (logits[True] - logits[False]).abs().max() < 1e-3
    again = tmp_path / "again"  # an exported adapter, merged later
    again.mkdir()
    write(str(tmp_path / "False"), again, True, 10**9)
    assert verify(again)["max_logit_difference"] < 1e-3
    assert torch.equal(probe_logits(load_policy(str(again))), logits[False])
    heads = [load_policy(str(folder)).module.value_head.state_dict() for folder in (adapted, tmp_path / "False", again)]
    assert all(torch.equal(heads[0][name], head[name]) for head in heads for name in head)


def test_a_changed_copy_is_noticed(tmp_path: Path) -> None:
    write("bundled:tiny-sft", tmp_path, False, 10**9)
    state = load_file(tmp_path / "model.safetensors")
    state["projector.fc1.weight"][0] += 0.01
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="logits differ by"):
        verify(tmp_path)


def test_random_weights_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="random weights"):
        write("scratch:tiny", tmp_path, False, 10**9)


def test_a_side_file_is_written_for_parts_that_others_read_from_one(tmp_path: Path) -> None:
    """A made-up policy whose folder holds a state projector inside its weights, as RL codes save it."""
    folder, out = tmp_path / "policy", tmp_path / "out"
    policy = load_policy("bundled:tiny-sft")
    out.mkdir()
    save_policy(folder, policy, policy.module.state_dict())
    state = load_file(folder / "model.safetensors") | {"proprio_projector.fc1.weight": torch.arange(6.0).view(2, 3)}
    save_file(state, folder / "model.safetensors")
    write(str(folder), out, False, 10**9)
    side = torch.load(out / "proprio_projector--0_checkpoint.pt", weights_only=True)
    assert {n: t.tolist() for n, t in side.items()} == {"fc1.weight": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]}
    assert "proprio_projector.fc1.weight" not in read_weights(out)
    assert verify(out)["max_logit_difference"] == 0.0
