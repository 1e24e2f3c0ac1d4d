"""What differs between published checkpoints: family, head, state, stop token; told from files or by the recipe."""
from __future__ import annotations

import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vlarl.errors import CheckpointError
from vlarl.policies.actions import build_codec
from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import build_module, load_policy
from vlarl.policies.layout import OpenVLAConfig, read_config, read_policy_spec, resolve_folder, stated_settings, switches
from vlarl.policies.openvla import OpenVLA
from vlarl.policies.openvla_oft import L1Head
from vlarl.policies.probe import check_policy
from vlarl.policies.tokenizer import PromptTable, load_tokenizer
from vlarl.policies.weights import side_tensors
from vlarl.recipe.schema import Policy
from vlarl.types import Observation

TINY = resolve_folder("scratch:tiny")[0]
ENTRY = {
    "action": {"q01": [-1.0] * 7, "q99": [3.0] * 7, "min": [-2.0] * 7, "max": [2.0] * 7},
    "proprio": {"q01": [0.0, -1.0], "q99": [2.0, 1.0], "min": [0.0, 0.0], "max": [4.0, 8.0]},
}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as others publish it: config.json without our settings, one data set's statistics in it."""
    raw = json.loads((TINY / "config.json").read_text())
    del raw["vlarl"]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"norm_stats": {"kitchen": ENTRY}}))
    return tmp_path


def make_policy(config: OpenVLAConfig) -> VLAPolicy:
    torch.manual_seed(0)
    module = build_module(config, 1)
    assert isinstance(module, OpenVLA)
    cpu = torch.device("cpu")
    prompts = PromptTable(load_tokenizer(TINY), config.bos_id, config.pad_id, config.blank_id, cpu)
    codec = build_codec({"toy": ENTRY}, "toy", "quantiles", True, 7, cpu)
    return VLAPolicy(module, config, read_policy_spec("scratch:tiny"), prompts, codec, cpu, TINY, 1.0, "")


def seen(state: Tensor) -> Observation:
    image = torch.zeros(len(state), 1, 64, 64, 3, dtype=torch.uint8)
    return Observation(image, state, ("touch the red cube", "push the blue cube left")[: len(state)])


def test_a_model_without_statistics_of_its_own_is_openvla(published: Path) -> None:
    config = read_config(published)
    assert (config.kind, config.chunk, config.stop_token, config.epsilon, config.action_dim) == ("openvla", 1, False, False, 7)
    assert read_config(published, {"kind": "openvla-oft"}).chunk == 8


def test_a_fine_tuned_model_needs_to_be_told(published: Path) -> None:
    (published / "dataset_statistics.json").write_text(json.dumps({"kitchen": ENTRY}))
    with pytest.raises(CheckpointError, match=r"do not tell .* Set policy.kind to openvla or openvla-oft"):
        read_config(published)
    assert read_config(published, {"kind": "openvla"}).kind == "openvla"
    oft = read_config(published, {"kind": "openvla-oft", "stop_token": False, "crop": True})
    assert (oft.kind, oft.chunk, oft.stop_token, oft.epsilon, oft.crop, oft.head) == ("openvla-oft", 8, False, True, True, "tokens")


def test_side_files_tell_oft(published: Path) -> None:
    (published / "dataset_statistics.json").write_text(json.dumps({"kitchen": ENTRY}))
    (published / "proprio_projector--150000_checkpoint.pt").touch()
    assert (read_config(published).kind, read_config(published).proprio_dim, read_config(published).head) == ("openvla-oft", 2, "tokens")
    tokens = read_config(published)
    assert (tokens.resize, tokens.crop, tokens.views) == ("pil", False, 1)
    (published / "action_head--150000_checkpoint.pt").touch()
    assert read_config(published).head == "l1"
    assert read_policy_spec(str(published)).head == "l1"


def test_regression_heads_come_with_the_frames_of_their_authors(published: Path) -> None:
    for part in ("action_head", "proprio_projector"):
        (published / f"{part}--150000_checkpoint.pt").touch()
    libero = read_config(published)
    assert (libero.resize, libero.crop, libero.views, libero.chunk, libero.normalization) == ("lanczos", True, 2, 8, "quantiles")
    told = "policy runs with lanczos resize, centre crop, 2 views, a stop token, quantiles normalisation, a state of 2"
    assert switches(libero) == told
    own = read_config(published, {"resize": "pil", "crop": False, "views": 1, "proprio": False, "stop_token": False})
    assert switches(own) == "policy runs with pil resize, no crop, 1 view, no stop token, quantiles normalisation, no state"
    arms = {part: {name: row * 2 for name, row in numbers.items()} for part, numbers in ENTRY.items()}
    (published / "dataset_statistics.json").write_text(json.dumps({"aloha": arms}))
    aloha = read_config(published)
    assert (aloha.resize, aloha.crop, aloha.views, aloha.chunk, aloha.normalization) == ("lanczos", True, 3, 25, "bounds")


def test_a_state_may_be_done_without(published: Path) -> None:
    (published / "proprio_projector--5_checkpoint.pt").touch()
    assert [read_config(published, said).proprio_dim for said in ({}, {"proprio": True}, {"proprio": False})] == [2, 2, 0]
    (published / "dataset_statistics.json").write_text(json.dumps({"kitchen": {"action": ENTRY["action"]}}))
    with pytest.raises(CheckpointError, match=r"they hold no proprio.* set policy.proprio to false .*--policy proprio=false"):
        read_config(published)
    assert read_config(published, {"proprio": False, "kind": "openvla-oft"}).proprio_dim == 0
    with pytest.raises(CheckpointError, match="policy.proprio = true, and the checkpoint holds nothing that reads a state"):
        read_policy_spec("scratch:tiny", stated={"proprio": True})
    assert read_policy_spec("scratch:tiny-robotwin", stated={"proprio": False}).proprio_dim == 0
    assert stated_settings(Policy(checkpoint="x", proprio=False)) == {"proprio": False}


def test_a_state_projector_among_the_weights_is_seen(published: Path) -> None:
    header = json.dumps({"proprio_projector.fc1.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (published / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert read_config(published).proprio_dim == 2
    (published / "model.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
        read_config(published)


@pytest.mark.parametrize(("name", "what"), [("noisy_action_projector", "diffusion head"), ("vision_backbone", "FiLM")])
def test_heads_that_are_not_supported_are_named(published: Path, name: str, what: str) -> None:
    (published / f"{name}--50000_checkpoint.pt").touch()
    with pytest.raises(CheckpointError, match=f"{name}--50000.*{what}"):
        read_config(published)
    (published / "config.json").write_text((TINY / "config.json").read_text())  # a folder of ours says so, too
    with pytest.raises(CheckpointError, match=f"{name}--50000.*{what}"):
        read_config(published)


def test_a_diffusion_head_is_known_by_its_weights(tmp_path: Path) -> None:
    file = tmp_path / "action_head--50000_checkpoint.pt"
    torch.save({"module.noise_predictor.mlp_resnet.fc1.weight": torch.zeros(1)}, file)
    module = build_module(replace(read_config(TINY), head="l1"), 1)
    with pytest.raises(CheckpointError, match="action_head--50000.*a diffusion head is not supported"):
        side_tensors(tmp_path, module)


def test_frames_that_cannot_be_prepared_are_refused(published: Path) -> None:
    raw = json.loads((published / "config.json").read_text())
    changes = {"'stretch', which is not known": {"image_resize_strategy": "stretch"}, "one size": {"image_sizes": [64, 224]}}
    for message, change in changes.items():
        (published / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(CheckpointError, match=message):
            read_config(published)


def test_recipes_state_what_files_do_not_say() -> None:
    assert stated_settings(Policy(checkpoint="x")) == {}
    policy = Policy(checkpoint="x", kind="openvla-oft", chunk=25, stop_token=False, normalization="bounds")
    assert stated_settings(policy) == {"kind": "openvla-oft", "chunk": 25, "stop_token": False, "normalization": "bounds"}
    spec = read_policy_spec("scratch:tiny", stated={"chunk": 5, "views": 2})
    assert (spec.chunk, spec.views) == (5, 2)
    assert load_policy("scratch:tiny", stated={"chunk": 5, "views": 2}).spec == spec
    with pytest.raises(CheckpointError, match="one action at a time, not 2"):
        read_policy_spec("scratch:tiny-openvla", stated={"chunk": 2})


def test_a_folder_that_names_its_kind_keeps_it() -> None:
    assert read_config(TINY, {"kind": "openvla"}).kind == "openvla-oft"


def test_state_is_normalised_and_read() -> None:
    codec = build_codec({"toy": ENTRY}, "toy", "quantiles", True, 7, torch.device("cpu"))
    ours = codec.normalize_state(torch.tensor([[0.5, 0.0], [9.0, -1.0]]))
    assert ours.flatten().tolist() == pytest.approx([-0.5, 0.0, 1.0, -1.0], abs=1e-7)
    bounds = build_codec({"toy": ENTRY}, "toy", "bounds", True, 7, torch.device("cpu"))
    assert bounds.normalize_state(torch.tensor([[1.0, 8.0]]))[0].tolist() == pytest.approx([-0.5, 1.0], abs=1e-7)
    for kind, chunk in (("openvla-oft", 4), ("openvla", 1)):
        policy = make_policy(replace(read_config(TINY), proprio_dim=2, kind=kind, chunk=chunk))
        assert sum(p.numel() for n, p in policy.module.named_parameters() if not n.startswith("value_head.")) == policy.config.parameters
        token = torch.zeros(2, 7 * chunk, dtype=torch.int64)
        here, there = (policy.evaluate(seen(torch.tensor([[0.5, 0.0], [x, 0.5]])), token, 1.0, 0).logprob_BN for x in (0.5, 1.5))
        assert (here[0] - there[0]).abs().max() < 1e-5
        assert (here[1] - there[1]).abs().max() > 1e-3


def test_l1_head_by_its_formula() -> None:
    torch.manual_seed(0)
    head = L1Head(chunk=2, action_dim=3, hidden=4)
    hidden = torch.randn(5, 6, 4)
    x = torch.cat([hidden[:, :3].reshape(5, 1, 12), hidden[:, 3:].reshape(5, 1, 12)], 1)  # an action's hidden states side by side
    m = head.model
    x = torch.relu(nn.functional.layer_norm(x, (12,)) @ m.fc1.weight.T + m.fc1.bias)
    for n in (0, 1):
        linear = m.mlp_resnet_blocks[n].ffn[1]
        x = x + torch.relu(nn.functional.layer_norm(x, (4,)) @ linear.weight.T + linear.bias)
    expected = nn.functional.layer_norm(x, (4,)) @ m.fc2.weight.T + m.fc2.bias
    assert (head(hidden) - expected).abs().max() < 1e-6
    keys = ["layer_norm1", "fc1", "layer_norm2", "fc2", *(f"mlp_resnet_blocks.{n}.ffn.{layer}" for n in (0, 1) for layer in (0, 1))]
    assert set(head.state_dict()) == {f"model.{k}.{w}" for k in keys for w in ("weight", "bias")}


def test_l1_policy_acts_in_environment_units() -> None:
    policy = make_policy(replace(read_config(TINY), head="l1"))
    obs = seen(torch.zeros(2, 2))
    chunk = policy.act(obs, torch.rand(2, 28, dtype=torch.float64), 1.0, 0)
    prompt = policy.prompts(obs.instruction)
    with torch.no_grad():
        value_BKA, _ = policy.module(obs.image_BVHWC, prompt.ids_BL, prompt.mask_BL)
    assert value_BKA.shape == (2, 4, 7)
    torch.testing.assert_close(chunk.action_BKA, 0.5 * (value_BKA + 1) * 4 - 1)
    assert chunk.logprob_BN.tolist() == [[0.0] * 28] * 2
    scores = policy.evaluate(obs, chunk.token_BN, 1.0, 0)  # the nearest bins: at most half a bin away, at density exp(-|x|) / 2
    assert (scores.logprob_BN + math.log(2)).abs().max() <= max(1 / 255, float(value_BKA.abs().max()) - 254 / 255) + 1e-6
    assert sum(p.numel() for n, p in policy.module.named_parameters() if not n.startswith("value_head.")) == policy.config.parameters


def test_l1_head_and_state_projector_come_from_side_files(tmp_path: Path) -> None:
    fixture = Path(__file__).parent.parent / "data" / "openvla_tiny"
    for name in ("config.json", "dataset_statistics.json", "model.safetensors"):
        shutil.copyfile(fixture / name, tmp_path / name)
    shutil.copyfile(TINY / "tokenizer.json", tmp_path / "tokenizer.json")
    files = {part: tmp_path / f"{part}--150000_checkpoint.pt" for part in ("action_head", "proprio_projector")}
    for file in files.values():
        file.touch()
    torch.manual_seed(0)
    written = build_module(read_config(tmp_path), 1).state_dict()
    for part, file in files.items():  # as saved by their authors, who wrapped each part for data parallelism
        torch.save({f"module.{n.removeprefix(part + '.')}": t for n, t in written.items() if n.startswith(f"{part}.")}, file)
    without = load_policy(str(tmp_path), "tiny_spatial", stated={"proprio": False})
    assert (without.spec.head, without.spec.proprio_dim, hasattr(without.module, "proprio_projector")) == ("l1", 0, False)
    policy = load_policy(str(tmp_path), "tiny_spatial")
    assert (policy.spec.kind, policy.spec.head) == ("openvla-oft", "l1")
    assert policy.spec.proprio_dim > 0
    for name, tensor in policy.module.state_dict().items():
        if name.startswith(tuple(files)):
            assert torch.equal(tensor, written[name]), name
    check_policy(policy, torch.float32)
    chunk = policy.act(seen(torch.zeros(2, policy.spec.proprio_dim)), None, 1.0, 0)
    assert chunk.action_BKA.shape == (2, 8, 7)
    assert chunk.action_BKA.isfinite().all()
