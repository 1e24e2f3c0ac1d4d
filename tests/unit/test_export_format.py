"""Export: the published layout, verified after reading it back; shards and one file, adapters apart and merged, are the same policy."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlarl import serial
from vlarl.errors import CheckpointError, RecipeError
from vlarl.policies.adapter import read_adapter
from vlarl.policies.checkpoint import TRAINED, Live, load_policy, save_policy
from vlarl.policies.layout import resolve_folder
from vlarl.policies.probe import probe_logits
from vlarl.policies.weight_files import read_header, read_weights
from vlarl.recipe.load import load_recipe
from vlarl.recipe.schema import Lora
from vlarl.worker import export
from vlarl.worker.export import Wanted, verify, write
from vlarl_cli.evaluate import EvalOptions, eval_recipe
from vlarl_cli.export import BESIDE, _stated, output_bytes
from vlarl_cli.shipped import shipped_recipes

APART, MERGED = Wanted(False, 10**9, None, {}), Wanted(True, 10**9, None, {})


def adapt(folder: Path, base: str) -> Path:
    """A checkpoint's policy folder after training with adapters."""
    policy = load_policy(base, lora=Lora(rank=4, alpha=8))
    for name, parameter in policy.module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    save_policy(folder, policy, policy.module.state_dict())
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapt(tmp_path_factory.mktemp("adapted") / "policy", "bundled:tiny-sft")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16 and in shards, as published ones are, with some code beside it, and adapters trained on it."""
    made = tmp_path_factory.mktemp("narrow")
    (made / "base").mkdir()
    write("bundled:tiny-sft", made / "base", Wanted(False, 1_000_000, "bfloat16", {}))
    (made / "base" / "train_utils.py").write_text("raise SystemExit\n")
    adapt(made / "policy", str(made / "base"))
    return made


def difference(manifest: dict[str, object]) -> float:
    (comparison,) = manifest["comparisons"]  # type: ignore[misc]
    return float(comparison["max_logit_difference"])


@pytest.mark.parametrize("shard_bytes", [10**9, 2_000_000])
def test_a_model_comes_back_identical_in_one_file_or_in_shards(tmp_path: Path, shard_bytes: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write("bundled:tiny-sft", out, Wanted(False, shard_bytes, None, {}))
    manifest = verify(out)
    assert difference(manifest) == 0.0 and manifest["layout"] == "model"
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
    for wanted in (APART, MERGED):
        out = tmp_path / str(wanted.merge)
        out.mkdir()
        write(str(adapted), out, wanted)
        manifest = verify(out)
        assert manifest["comparisons"][0]["with"] == "the base model with its adapters apart, as trained"
        assert manifest["layout"] == ("model" if wanted.merge else "adapter")
        assert 0 < difference(manifest) < 1e-3
        logits[wanted.merge] = probe_logits(load_policy(str(out)))
        assert (out / "adapter_model.safetensors").exists() is not wanted.merge
        assert (out / "model.safetensors").exists() is wanted.merge
    assert (logits[True] - logits[False]).abs().max() < 1e-3
    again = tmp_path / "again"  # an exported adapter, merged later
    again.mkdir()
    write(str(tmp_path / "False"), again, MERGED)
    assert difference(verify(again)) < 1e-3
    assert torch.equal(probe_logits(load_policy(str(again))), logits[False])
    heads = [load_policy(str(folder)).module.value_head.state_dict() for folder in (adapted, tmp_path / "False", again)]
    assert all(torch.equal(heads[0][name], head[name]) for head in heads for name in head)


@pytest.mark.parametrize(("dtype", "stored"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_a_merge_keeps_the_base_s_dtype_or_takes_the_one_asked_for(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None, stored: torch.dtype
) -> None:
    monkeypatch.setattr("vlarl.policies.weights.BLOCK_BYTES", 4096)  # a few rows at a time
    write(str(narrow / "policy"), tmp_path, Wanted(True, 1_000_000, dtype, {}))
    manifest = verify(tmp_path)
    assert difference(manifest) < (1e-3 if dtype else manifest["comparisons"][0]["limit"])
    base, written, adapter = read_weights(narrow / "base"), read_weights(tmp_path), read_adapter(narrow / "policy")
    assert base.keys() == written.keys() and len(list(tmp_path.glob("model-*.safetensors"))) > 1
    values = {t.key: t for file in {t.file for t in base.values()} for t in read_header(file).values()}
    for name, tensor in written.items():
        before, after = (load_file(t.file)[name] for t in (values[name], tensor))
        layer = name.removesuffix(".weight")
        if name.startswith("value_head."):
            continue
        assert after.dtype == stored
        expected = before.float()
        if layer in adapter.layers:
            a, b = (load_file(t.file)[t.key] for t in adapter.layers[layer])
            expected = expected + adapter.scale * (b.flatten(1) @ a.flatten(1)).view(expected.shape)
        assert torch.allclose(after.float(), expected.to(stored).float(), atol=1e-6, rtol=0.0 if dtype else 2**-7)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == (dtype or "bfloat16")
    assert (tmp_path / "train_utils.py").read_text() == "raise SystemExit\n" and not (tmp_path / ".zeros").exists()


def test_adapters_by_themselves_have_no_dtype_to_choose(adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exported as they are"):
        write(str(adapted), tmp_path, Wanted(False, 10**9, "bfloat16", {}))


def test_an_export_is_compared_with_the_policy_in_training(tmp_path: Path) -> None:
    """Its logits lie in the checkpoint; a fault in gathering or writing, which the checkpoint's files would share, is noticed."""
    policy = load_policy("bundled:tiny-sft")
    live = Live(probe_logits(policy), torch.float32)
    for name in ("sound", "faulty"):
        state = dict(policy.module.state_dict())
        if name == "faulty":
            state["projector.fc1.weight"] = state["projector.fc1.weight"].roll(1, 0)
        save_policy(tmp_path / name, policy, state, live)
        (tmp_path / f"{name}-out").mkdir()
        write(str(tmp_path / name), tmp_path / f"{name}-out", APART)
    sound = verify(tmp_path / "sound-out")
    assert [(c["with"], c["max_logit_difference"]) for c in sound["comparisons"]] == [
        ("the policy in training, when the checkpoint was written", 0.0),
        ("the checkpoint's weights", 0.0),
    ]
    assert sound["unnorm_key"] == policy.spec.unnorm_key and (tmp_path / "sound-out" / TRAINED).is_file()
    with pytest.raises(CheckpointError, match="from those of the policy in training"):
        verify(tmp_path / "faulty-out")


def test_what_bfloat16_may_round_is_less_than_what_a_fault_makes(tmp_path: Path) -> None:
    policy = load_policy("bundled:tiny-sft", dtype=torch.bfloat16)
    live = Live(probe_logits(policy), torch.bfloat16)
    save_policy(tmp_path / "policy", policy, load_policy("bundled:tiny-sft").module.state_dict(), live)
    (tmp_path / "out").mkdir()
    write(str(tmp_path / "policy"), tmp_path / "out", Wanted(False, 10**9, "bfloat16", {}))
    in_training, files = verify(tmp_path / "out")["comparisons"]
    assert in_training["dtype"] == "bfloat16"
    for comparison in (in_training, files):
        assert 0 < comparison["max_logit_difference"] < comparison["limit"] / 2 and comparison["limit"] == pytest.approx(
            export.COARSE * float(live.logits.abs().max()), rel=0.05
        )


def test_a_changed_copy_is_noticed(tmp_path: Path) -> None:
    write("bundled:tiny-sft", tmp_path, APART)
    state = load_file(tmp_path / "model.safetensors")
    state["projector.fc1.weight"][0] += 0.01
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="logits differ by"):
        verify(tmp_path)


def test_where_it_was_trained_is_noted_and_handed_on(tmp_path: Path) -> None:
    trained, first, second = (tmp_path / name for name in ("trained", "first", "second"))
    for folder in (trained, first, second):
        folder.mkdir()
    settings = ["env.tasks=[push]", "env.horizon=20", "eval.temperature=0.5"]
    (trained / "recipe.json").write_text(serial.dumps(load_recipe(shipped_recipes()["debug"], settings)))
    write("bundled:tiny-sft", first, replace(APART, run=trained))
    write(str(first), second, APART)
    for out in (first, second):
        recipe = eval_recipe(EvalOptions(str(out), "train", 4, None, None, None, 1, "cpu"))[0].recipe
        assert (recipe.env.tasks, recipe.env.horizon, recipe.eval.temperature) == (("push",), 20, 0.5)
    other = tmp_path / "other"
    other.mkdir()
    manifest = write("bundled:tiny-sft", other, APART)
    assert manifest["env"] is None and manifest["eval"] is None


def test_random_weights_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="random weights"):
        write("scratch:tiny", tmp_path, APART)


@pytest.mark.parametrize("beside", [None, "proprio_projector--150000_checkpoint.pt"])
def test_a_side_file_is_written_for_parts_that_others_read_from_one(tmp_path: Path, beside: str | None) -> None:
    """A made-up policy whose folder holds a state projector inside its weights, as RL codes save it, and perhaps the one that it had
    before it was trained, in a file beside them."""
    folder, out = tmp_path / "policy", tmp_path / "out"
    policy = load_policy("bundled:tiny-sft")
    out.mkdir()
    save_policy(folder, policy, policy.module.state_dict())
    state = load_file(folder / "model.safetensors") | {"proprio_projector.fc1.weight": torch.arange(6.0).view(2, 3)}
    save_file(state, folder / "model.safetensors")
    if beside is not None:
        torch.save({"module.fc1.weight": torch.zeros(2, 3), "module.fc1.bias": torch.ones(2)}, folder / beside)
    write(str(folder), out, APART)
    (path,) = out.glob("proprio_projector--*")
    assert path.name == (beside or "proprio_projector--0_checkpoint.pt")
    side = torch.load(path, weights_only=True)
    assert side["fc1.weight"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert beside is None or side["fc1.bias"].tolist() == [1.0, 1.0]
    assert "proprio_projector.fc1.weight" not in read_weights(out)
    assert difference(verify(out)) == 0.0


def test_what_was_stated_is_written_down(tmp_path: Path) -> None:
    """So that the export says what it is, and nobody has to say it again; the fields of others stay as they are."""
    source, _ = resolve_folder("bundled:tiny-sft")
    raw = json.loads((source / "config.json").read_text())
    stop = not raw["vlarl"]["stop_token"]
    write("bundled:tiny-sft", tmp_path, Wanted(False, 10**9, None, {"stop_token": stop, "unnorm_key": "tabletop"}))
    manifest = verify(tmp_path)
    assert difference(manifest) == 0.0 and manifest["unnorm_key"] == "tabletop"
    assert not torch.equal(probe_logits(load_policy(str(tmp_path))), probe_logits(load_policy("bundled:tiny-sft")))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["vlarl"]["stop_token"] is stop
    assert {name: written[name] for name in raw if name != "vlarl"} == {name: raw[name] for name in raw if name != "vlarl"}


def test_policy_items_of_the_command_line() -> None:
    assert _stated("somewhere", ("kind=openvla-oft", "chunk=5", "unnorm_key=bridge_orig")) == {
        "kind": "openvla-oft",
        "chunk": 5,
        "unnorm_key": "bridge_orig",
    }
    assert _stated("somewhere", ()) == {}
    for items, says in [(("kind=else",), "--policy kind"), (("lora=null",), "an export does not use it"), (("chunk=x",), "--policy chunk")]:
        with pytest.raises(RecipeError, match=says):
            _stated("somewhere", items)


def test_the_room_asked_for_is_what_is_written(narrow: Path, tmp_path: Path) -> None:
    for number, (merge, dtype) in enumerate([(False, None), (True, None), (True, "float32")]):
        out = tmp_path / str(number)
        out.mkdir()
        write(str(narrow / "policy"), out, Wanted(merge, 10**9, dtype, {}))
        size = sum(path.stat().st_size for path in out.iterdir())
        assert size - BESIDE < output_bytes(str(narrow / "policy"), merge, dtype) - BESIDE < size
