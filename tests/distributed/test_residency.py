"""Owns: what leaves the device is really gone meanwhile, comes back bit for bit, and changes no result."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from spawn import ToyPolicy, run_ranks, toy_batch, toy_loss_sum
from torch import Tensor

from helpers.ranks import prepare, train_in_ranks
from vlarl.distributed import fsdp
from vlarl.distributed.manifest import latest
from vlarl.distributed.mesh import World
from vlarl.distributed.residency import Movable, Offload
from vlarl.learner.optim import build_optimizer
from vlarl.plan.placement import Residency

EVERYTHING = Residency(rollout=("optimizer", "reference", "weights"), evaluation=("weights",))


def device_bytes(tensors: list[Tensor]) -> int:
    """Memory behind the tensors, each storage once."""
    storages = [fsdp.local_shard(t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_tensors_leave_and_come_back() -> None:
    whole = torch.arange(10.0)
    tensors = [whole[:4], whole[4:], torch.full((3,), 7, dtype=torch.int64), torch.empty(0)]
    expected = [t.clone() for t in tensors]
    part = Movable(tensors)
    part.come_back()  # nothing has left
    for _ in range(2):
        part.leave()
        assert device_bytes(tensors) == 0
        assert part.bytes == 10 * 4 + 3 * 8
        part.come_back()
        assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))
        whole += 1
        expected = [t.clone() for t in tensors]
        copies = [copy.data_ptr() for copy in part._copies]
    assert copies == [copy.data_ptr() for copy in part._copies]  # allocated once


def _phases(world: World, per_block: bool) -> dict[str, Any]:
    """An update, a rollout with everything away, an evaluation, an update; what was seen, and the weights in the end."""
    if per_block:
        fsdp.ONE_UNIT_PARAMETERS = 0
    modules = []
    for seed in (0, 1):
        module = ToyPolicy(torch.float32, seed)
        fsdp.shard(module, world.learner, torch.float32, list(module.language_model))
        modules.append(module)
    module, reference = modules
    optimizer = build_optimizer(module, 1e-2, 1e-1, (0.9, 0.95), 1e-5, 0.1)
    x = toy_batch(torch.float32)

    def update() -> None:
        with torch.no_grad():
            target = reference(x)[1]
        (toy_loss_sum(module, x) + (module(x)[1] - target).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seen: dict[str, Any] = {}
    moments = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    held = {"moments": moments, "reference": list(reference.parameters()), "weights": list(module.parameters())}
    for plan in (Residency(), EVERYTHING):
        offload = Offload(plan, world.device, module, optimizer, reference)
        before = {kind: [fsdp.local_shard(t).clone() for t in tensors] for kind, tensors in held.items()}
        name = "away" if plan.rollout else "here"
        for phase in ("rollout", "evaluation"):
            with offload.phase(phase) as away, fsdp.acting(module, away):  # type: ignore[arg-type]
                seen[f"{name} {phase}"] = {kind: device_bytes(tensors) for kind, tensors in held.items()}
                seen[f"{name} {phase} logits"] = module(x)[0].clone()
        after = {kind: [fsdp.local_shard(t) for t in tensors] for kind, tensors in held.items()}
        seen[f"{name} same"] = all(torch.equal(a, b) for kind in held for a, b in zip(before[kind], after[kind], strict=True))
        with offload.phase("update"):
            update()
        seen[f"{name} peaks"] = offload.take_peaks()
        seen[f"{name} bytes"] = offload.bytes
        seen[f"{name} left"] = offload.take_peaks()
    return seen


@pytest.mark.parametrize(("ranks", "per_block"), [(1, False), (1, True), (2, True)])
def test_parts_are_gone_while_they_are_away(ranks: int, per_block: bool) -> None:
    for seen in run_ranks(ranks, _phases, per_block):
        full = seen["here rollout"]
        assert min(full.values()) > 0 and full["reference"] == full["weights"]
        assert full["moments"] <= 2 * full["weights"]  # shards are padded to equal rows, moments are not
        assert seen["away rollout"] == {"moments": 0, "reference": 0, "weights": 0}
        assert seen["away evaluation"] == full | {"weights": 0}
        assert seen["here same"] and seen["away same"]
        assert torch.equal(seen["away rollout logits"], seen["away evaluation logits"])
        assert torch.equal(seen["here rollout logits"], seen["here evaluation logits"])
        assert not torch.equal(seen["here rollout logits"], seen["away rollout logits"])  # an update in between
        assert (seen["here bytes"], seen["away bytes"]) == (0, sum(full.values()))
        assert set(seen["away peaks"]) == {"rollout", "evaluation", "update"} and seen["away left"] == {}
        assert min(seen["away peaks"].values()) > 2**20


def _peaks(world: World) -> dict[str, float]:
    offload = Offload(Residency(), world.device, None, None, None)
    with offload.phase("update"):
        torch.ones(1 << 24)  # 64 MiB for a moment
    with offload.phase("rollout"):
        pass
    return offload.take_peaks()


def test_a_peak_is_of_its_phase() -> None:
    (peaks,) = run_ranks(1, _peaks)
    assert peaks["update"] - peaks["rollout"] > 60 * 2**20


@pytest.mark.parametrize("ranks", [1, 2])  # one rank in several passes per step: sums over ranks and over passes do not commute bit for bit
def test_training_is_the_same_with_everything_away(tmp_path: Path, ranks: int) -> None:
    """Two updates and their evaluations in float32, bit for bit; and the run tells what it moved and what it used."""
    quiet = ("log.tensorboard=false", "log.video_every=0", "eval.videos=0", "algorithm.critic_warmup=0", "algorithm.kl_coef=0.1")
    quiet += ("update.microbatch=4",) if ranks == 1 else ()
    rows, weights = [], []
    for offload in ("none", "[optimizer, reference, weights, gradients]"):
        folder = prepare(tmp_path / offload.strip("["), *quiet, f"ranks={ranks}", f"placement.offload={offload}")
        train_in_ranks(folder, ranks)
        rows.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        newest = latest(folder)
        assert newest is not None and newest.name == "update-000002"
        weights.append(load_file(newest / "policy" / "model.safetensors"))
    here, away = weights
    assert all(torch.equal(here[name], away[name]) for name in here)
    results = [[{k: v for k, v in row.items() if k.startswith(("update", "train", "eval"))} for row in run] for run in rows]
    assert results[0] == results[1] and any(row for row in results[0])
    numbers = sum(w.numel() for w in here.values())
    for run, bytes_per_number in zip(rows, (0, 16), strict=True):  # float32: weights, reference, two moments
        updates = [row for row in run if "update/policy_loss" in row]
        # Shards are rounded up to whole rows.
        assert all(row["memory/offloaded_bytes"] == pytest.approx(numbers * bytes_per_number / ranks, rel=0.02) for row in updates)
        for phases, written in ((("rollout", "update"), updates), (("evaluation",), [row for row in run if "eval/success" in row])):
            assert len(written) == 2
            for figure in (row[f"memory/{kind}_peak_bytes_{p}"] for row in written for p in phases for kind in ("measured", "predicted")):
                assert 50 * 2**20 < figure < 8 * 2**30
