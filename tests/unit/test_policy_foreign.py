"""What published folders hold that ours do not: other people's value heads, towers of their own, a family that only a row names."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.fakes import NoSpans
from vlarl.envs.pool import LocalPool
from vlarl.envs.tabletop.env import Tabletop
from vlarl.errors import CheckpointError
from vlarl.evaluation.protocol import Protocol, episodes
from vlarl.evaluation.runner import EpisodeRecorder, play_episodes
from vlarl.plan.cluster import Cluster
from vlarl.plan.compile import compile_plan
from vlarl.plan.specs import policy_spec, simulator_spec
from vlarl.policies.base import VLAPolicy
from vlarl.policies.checkpoint import load_policy, save_policy
from vlarl.policies.families import POLICIES, Family
from vlarl.policies.layout import OpenVLAConfig, read_policy_spec, resolve_folder
from vlarl.policies.openvla import OpenVLA
from vlarl.policies.openvla_oft import decode_in_parallel
from vlarl.recipe.schema import Env, Policy, Recipe
from vlarl.rollout.episodes import ListFeed
from vlarl.rollout.play import Sampler
from vlarl.types import Observation

FIXTURE = Path(__file__).parent.parent / "data" / "openvla_tiny"
TINY = resolve_folder("scratch:tiny")[0]
OBS = Observation(
    torch.randint(0, 256, (2, 1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)),
    torch.zeros(2, 8),
    ("put the red cube on the green plate", "touch the blue cube"),
)
KEY, OFT = "tiny_spatial", {"kind": "openvla-oft"}


def values(policy: VLAPolicy) -> Tensor:
    return policy.act(OBS, None, 1.0, 0).value_BJ


# ---------------------------------------------------------------- value heads


def test_values_are_as_stored_where_the_recipe_is_silent(tmp_path: Path) -> None:
    assert Policy(checkpoint="x").value is None
    policy = load_policy("scratch:tiny", value="action", seed=1)
    torch.nn.init.normal_(policy.module.value_head.mlp[4].weight)
    save_policy(tmp_path, policy, policy.module.state_dict())
    recipe = Recipe(name="x", env=Env(), policy=Policy(checkpoint=str(tmp_path)))
    again = load_policy(str(tmp_path), value=recipe.policy.value)
    assert torch.equal(values(again), values(policy))
    assert policy_spec(recipe).values == again.spec.values == 4
    assert read_policy_spec("scratch:tiny").values == load_policy("scratch:tiny").spec.values == 1
    assert read_policy_spec("scratch:tiny", value="action").values == 4
    # Where the recipe has other chunks, neither number fits, and it is not the file that is wrong.
    longer = load_policy(str(tmp_path), stated={"chunk": 5})
    assert (values(longer).shape, longer.spec.values, len(longer.notices)) == ((2, 1), 1, 1)
    # A number that the recipe asks for, or the folder promises, is never made up.
    with pytest.raises(CheckpointError, match=r"value_head.mlp.4.weight is \(4, 128\), expected \(1, 128\).*policy.value"):
        load_policy(str(tmp_path), value="chunk")
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"value_head.mlp.2.bias": torch.zeros(5)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"value_head.mlp.2.bias is \(5,\), expected \(128,\)"):
        load_policy(str(tmp_path))


def foreign(folder: Path, head: dict[str, Tensor]) -> Path:
    """The published fixture with a value head in its weights."""
    for name in ("config.json", "dataset_statistics.json"):
        shutil.copyfile(FIXTURE / name, folder / name)
    shutil.copyfile(TINY / "tokenizer.json", folder / "tokenizer.json")
    save_file(load_file(FIXTURE / "model.safetensors") | head, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def layers(names: tuple[str, str, str], outputs: int, inputs: int = 20) -> dict[str, Tensor]:
    torch.manual_seed(2)
    first, second, last = (f"value_head.{name}." for name in names)
    weights = {f"{first}weight": torch.randn(512, inputs), f"{first}bias": torch.randn(512), f"{second}weight": torch.randn(128, 512)}
    return weights | {f"{second}bias": torch.randn(128), f"{last}weight": torch.randn(outputs, 128)}


RL4VLA, RLINF = ("head_l1", "head_l2", "head_l3"), ("mlp.0", "mlp.2", "mlp.4")


@pytest.mark.parametrize(("names", "outputs"), [(RL4VLA, 1), (RLINF, 8), (RLINF, 1)])
def test_heads_of_others_are_taken_over(tmp_path: Path, names: tuple[str, str, str], outputs: int) -> None:
    head = layers(names, outputs)
    folder = str(foreign(tmp_path, head))
    policy = load_policy(folder, KEY, stated=OFT)
    assert policy.notices == ()
    assert read_policy_spec(folder, KEY, OFT).values == policy.spec.values == values(policy).shape[1] == outputs
    for ours, theirs in zip((0, 2, 4), names, strict=True):
        assert torch.equal(policy.module.value_head.mlp[ours].weight, head[f"value_head.{theirs}.weight"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("head", "value", "told"),
    [
        (layers(RLINF, 8), "chunk", "mlp.4.weight is (8, 128) in the checkpoint, and is (1, 128) in this policy"),
        (layers(RLINF, 3), None, "mlp.4.weight is (3, 128)"),
        (layers(RL4VLA, 1, 7 * 20), "chunk", "mlp.0.weight is (512, 140)"),  # RL4VLA's mode that reads all seven tokens
        ({"value_head.net.weight": torch.zeros(3)}, None, "net.weight is (3,) in the checkpoint, and is not there"),
        ({"value_head.mlp.0.bias": torch.zeros(512)}, None, "is not there in the checkpoint"),
    ],
)
def test_heads_of_others_that_do_not_fit_are_left_out(tmp_path: Path, head: dict[str, Tensor], value: Any, told: str) -> None:
    policy = load_policy(str(foreign(tmp_path, head)), KEY, value, stated=OFT)
    (line,) = policy.notices
    assert line.startswith("value head left out, a fresh one starts: value_head.")
    assert told in line
    assert values(policy).tolist() == [[0.0], [0.0]]  # fresh heads start at zero
    assert read_policy_spec(str(tmp_path), KEY, OFT, value).values == 1


# ---------------------------------------------------------------- towers

SHAPE: dict[str, Any] = {"patch": 16, "width": 32, "depth": 3, "heads": 2, "mlp": 48, "class_token": True, "registers": 2}
SHAPE |= {"layer_scale": True, "attention_pool": False, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}


def with_tower(folder: Path, shape: object, extras: dict[str, Any]) -> str:
    raw = json.loads((TINY / "config.json").read_text())
    folder.mkdir(exist_ok=True)
    for name in ("dataset_statistics.json", "tokenizer.json"):
        shutil.copyfile(TINY / name, folder / name)
    raw["vlarl"] = extras | {"towers": {"mine_16": shape}}
    (folder / "config.json").write_text(json.dumps(raw | {"timm_model_ids": ["mine_16", raw["timm_model_ids"][1]]}))
    return str(folder)


def test_a_checkpoint_brings_a_tower_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = json.loads((TINY / "config.json").read_text())["vlarl"]
    source = with_tower(tmp_path / "own", SHAPE, ours)
    with monkeypatch.context() as patched:
        patched.setattr("vlarl.policies.checkpoint.resolve_folder", lambda name: (Path(name), True))
        policy = load_policy(source, seed=1)
    assert read_policy_spec(source) == policy.spec
    held = sum(p.numel() for n, p in policy.module.named_parameters() if not n.startswith("value_head."))
    assert (policy.spec.vision_width, policy.spec.parameters) == (32 + 96, held)
    assert policy.module.vision_backbone.shift.flatten()[:3].tolist() == pytest.approx([-0.1 / 0.5, -0.2 / 0.6, -0.3 / 0.7])
    before = policy.evaluate(OBS, torch.zeros(2, 28, dtype=torch.int64), 1.0, 0)
    before.logprob_BN.sum().backward()
    tower = policy.module.vision_backbone.featurizer
    assert tower.reg_token.shape == (1, 2, 32) and float(tower.reg_token.grad.abs().sum()) > 0
    save_policy(tmp_path / "saved", policy, policy.module.state_dict())
    again = load_policy(str(tmp_path / "saved"))
    assert torch.equal(again.evaluate(OBS, torch.zeros(2, 28, dtype=torch.int64), 1.0, 0).logprob_BN, before.logprob_BN)
    # Others describe a tower, and none of our settings.
    published = with_tower(tmp_path / "published", SHAPE, {})
    assert read_policy_spec(published, stated={"kind": "openvla-oft"}).chunk == 8


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"depth": 1}, "depth is 1, expected a whole number of at least 2"),
        ({"patch": 16.0}, "patch is 16.0, expected a whole number of at least 1"),
        ({"registers": True}, "registers is True, expected a whole number of at least 0"),
        ({"class_token": 1}, "class_token is 1, expected true or false"),
        ({"mean": [0.5, 0.5]}, r"mean is \[0.5, 0.5\], expected three numbers"),
        ({"std": [0.5, 0.5, 0]}, r"std is \[0.5, 0.5, 0\], expected three positive numbers"),
        ({"heads": 3}, "heads is 3, which does not divide its width 32"),
        ({"layers": 3}, "must hold exactly patch, width, .*; differs in layers"),
        ({"patch": 32}, "its towers make 4 and 16 patches"),
        (None, "is None, expected an object"),
    ],
)
def test_a_tower_that_is_not_one_is_refused(tmp_path: Path, change: dict[str, Any] | None, told: str) -> None:
    ours = json.loads((TINY / "config.json").read_text())["vlarl"]
    with pytest.raises(CheckpointError, match=told):
        read_policy_spec(with_tower(tmp_path, change if change is None else SHAPE | change, ours))


# ---------------------------------------------------------------- a family


def build_third(config: OpenVLAConfig, value_outputs: int) -> OpenVLA:
    return OpenVLA(config, value_outputs, decode_in_parallel)


def test_a_third_family_needs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Family(f"{__name__}:build_third", kv_cache=True, one_action=False, chunk=3, stop_token=False, epsilon=True)
    monkeypatch.setitem(POLICIES, "third", row)
    raw = json.loads((TINY / "config.json").read_text())
    ours = raw.pop("vlarl")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for name in ("dataset_statistics.json", "tokenizer.json"):
        shutil.copyfile(TINY / name, tmp_path / name)
    published = read_policy_spec(str(tmp_path), stated={"kind": "third"})
    assert (published.kind, published.chunk, published.kv_cache) == ("third", 3, True)
    with pytest.raises(CheckpointError, match="policy kind 'fourth' is not known. Known: openvla, openvla-oft, third"):
        read_policy_spec(str(tmp_path), stated={"kind": "fourth"})
    # The toy's tokenizer has another blank than Llama's, which a published folder is taken to have.
    (tmp_path / "config.json").write_text(json.dumps(raw | {"vlarl": ours | {"kind": "third", "chunk": 3}}))
    with monkeypatch.context() as patched:
        patched.setattr("vlarl.policies.checkpoint.resolve_folder", lambda name: (Path(name), True))
        policy = load_policy(str(tmp_path))
    save_policy(tmp_path / "saved", policy, policy.module.state_dict())
    again = load_policy(str(tmp_path / "saved"))
    chunk = again.act(OBS, None, 1.0, 0)
    assert chunk.action_BKA.shape == (2, 3, 7)
    assert (again.evaluate(OBS, chunk.token_BN, 1.0, 0).logprob_BN - chunk.logprob_BN).abs().max() < 1e-5
    recipe = Recipe(name="x", env=Env(parallel=4), policy=Policy(checkpoint=str(tmp_path / "saved"), kind="third"))
    cluster = Cluster(cores=4, host_bytes=16 << 30)
    spec = policy_spec(recipe)
    plan = compile_plan(recipe, cluster, spec, simulator_spec(recipe.env))
    assert spec == again.spec
    assert plan.rollout.chunks_per_episode == -(-recipe.env.horizon // 3)
    protocol = Protocol("test", "tabletop", ("touch",), "train", 3, 6, 64, 1, 3, 1.0, 5)
    env = Tabletop(3, protocol.tasks, "train", protocol.horizon, protocol.image_size, False, "sparse", torch.device("cpu"))
    pool = LocalPool([env], 0, 3, 3, ListFeed(episodes(protocol), 3), "none")
    recorder = EpisodeRecorder(lambda uid: False)
    play_episodes(pool, Sampler(again, 5, 21, 1.0, 0), recorder, NoSpans())
    assert len(recorder.rows) == 3
