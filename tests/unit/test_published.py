"""Published checkpoints: what is known of them without their files, and what is said where the files are needed."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.command_line import Vlarl, command_line
from vlarl import serial
from vlarl.errors import CheckpointError
from vlarl.plan.cluster import Cluster
from vlarl.policies.adapter import read_adapter
from vlarl.policies.layout import read_policy_spec
from vlarl.policies.published import OPENVLA_7B, PUBLISHED, download_hint
from vlarl_cli import run

GPUS = Cluster(devices_per_node=8, device="cuda", device_name="H100", device_bytes=80 * 2**30, cores=64, host_bytes=2**40)
OFT = "Haozhan72/Openvla-oft-SFT-libero-goal-traj1"


@pytest.fixture
def vlarl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Vlarl:
    return command_line(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_download_has_the_facts_that_were_known_before_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, key, length, state = PUBLISHED[name]
    known = read_policy_spec(name)
    projector = state * 4096 + 4096 + 4096 * 4096 + 4096 if state else 0
    assert known.parameters == 7_541_237_184 + projector  # of the 982 tensors in the published index, and what reads a state
    assert (known.action_dim, known.proprio_dim) == (length, state)
    assert (known.kind, known.unnorm_key, known.image_size, known.layers, known.hidden_size) == (kind, key, 224, 32, 4096)
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(OPENVLA_7B))
    statistics = {key: {"action": {"q01": [0.0] * length, "q99": [1.0] * length}}}
    if state:
        statistics[key]["proprio"] = {"q01": [0.0] * state, "q99": [1.0] * state}
        (folder / "proprio_projector--5_checkpoint.pt").touch()
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    monkeypatch.chdir(tmp_path)
    assert read_policy_spec(name, key, {"kind": kind}) == known
    assert read_policy_spec(str(folder), key, {"kind": kind}) == known
    (folder / "dataset_statistics.json").write_text(json.dumps({"mine": statistics[key]}))
    assert read_policy_spec(name, None, {"kind": kind}).unnorm_key == "mine"  # the folder speaks for itself


def test_settings_of_a_recipe_count_before_the_download() -> None:
    with_stop, without = read_policy_spec(OFT), read_policy_spec(OFT, None, {"stop_token": False, "chunk": 4})
    assert (without.chunk, with_stop.sequence_length - without.sequence_length) == (4, 1 + 4 * 7)
    assert read_policy_spec(OFT, "libero_goal").unnorm_key == "libero_goal_no_noops"
    with pytest.raises(CheckpointError, match="policy.unnorm_key = 'bridge_orig' is not among"):
        read_policy_spec(OFT, "bridge_orig")


def test_hints_name_the_command_only_where_a_name_may_be_a_hub_id() -> None:
    for path in ("a/b/c", "x"):
        assert download_hint(path, "Give one.") == "Give one."
    for path in ("/data/openvla", "runs/openvla", "./data"):
        assert "hf download" not in download_hint(path, "Give one.")
    assert download_hint("a/b-7b", "Give one.") == "Give one. From the Hub: `hf download a/b-7b --local-dir a/b-7b`."
    with pytest.raises(CheckpointError) as caught:
        read_adapter(Path("RLinf/some-lora"))
    assert "`hf download RLinf/some-lora --local-dir RLinf/some-lora`" in str(caught.value.hint)


def test_a_run_is_planned_without_its_checkpoint_and_starts_only_with_it(
    vlarl: Vlarl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = tmp_path / "cluster.json"
    cluster.write_text(serial.dumps(GPUS))
    code, text, _ = vlarl("plan", "libero-goal-oft-grpo", "--cluster", str(cluster), "--json")
    assert code == 0
    assert json.loads(text)["update"]["samples"] == 64 * 16 * 64  # slots x episodes x chunks
    small = replace(GPUS, devices_per_node=1)
    cluster.write_text(serial.dumps(small))
    for changes, fix in (((), "env.slots_per_host"), (("env.slots_per_host=8",), "policy.lora")):
        code, _, text = vlarl("plan", "libero-goal-oft-grpo", *changes, "--cluster", str(cluster))
        assert (code, fix in text) == (2, True)
    monkeypatch.setattr(run, "discover", lambda device: GPUS)
    code, _, text = vlarl("train", "libero-goal-oft-grpo", "--out", "out")
    assert code == 2
    assert f"{OFT}: there is no such policy folder." in text
    assert f"`hf download {OFT} --local-dir {OFT}`" in text
    assert not (tmp_path / "out").exists()


def test_a_mistyped_folder_is_answered_with_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/quickstart", "runs/other", "mine/policy"):
        (tmp_path / name).mkdir(parents=True)
    assert download_hint("runs/quikstart", "Give one.") == "Give one. In runs there is: quickstart."
    assert download_hint("mine/polcy", "Give one.") == "Give one. In mine there is: policy."
    assert "There is no folder runs/no either." in download_hint("runs/no/way", "Give one.")
    assert "hf download" in download_hint("openvla/openvla-7b", "Give one.")
