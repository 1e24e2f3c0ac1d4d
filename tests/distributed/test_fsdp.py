"""Owns: sharded training is the single-process computation, on any number of ranks."""
from __future__ import annotations

import pytest
import torch
from spawn import ToyPolicy, run_ranks, toy_batch, toy_loss_sum
from torch import Tensor, nn

from vlarl.distributed import fsdp
from vlarl.distributed.mesh import World
from vlarl.errors import CheckpointError
from vlarl.learner.optim import build_optimizer

F64 = torch.float64


def _optimizer(module: nn.Module) -> torch.optim.AdamW:
    return build_optimizer(module, 1e-2, 1e-1, 1.0, (0.9, 0.95), 1e-5, 0.1)


def _shard(module: ToyPolicy, world: World, per_block: bool, activation_checkpointing: bool = False, dtype: torch.dtype = F64) -> None:
    if per_block:
        fsdp.ONE_UNIT_PARAMETERS = 0
    units = list(module.language_model)
    fsdp.shard(module, world.learner, dtype, units, activation_checkpointing=activation_checkpointing)


def _train(world: World, per_block: bool, activation_checkpointing: bool, defer: bool) -> dict[str, Tensor]:
    """Three optimiser steps over 8 rows in microbatches of 2 rows, shared out among the ranks; gradients of the last, norms, weights."""
    module = ToyPolicy(F64)
    _shard(module, world, per_block, activation_checkpointing)
    optimizer = _optimizer(module)
    share = toy_batch(F64).chunk(world.world_size)[world.rank].split(2)
    for step in range(3):
        optimizer.zero_grad()
        for i, x in enumerate(share):
            fsdp.set_gradient_sync(module, not defer or i == len(share) - 1)
            (toy_loss_sum(module, x) / 8).backward()
        norm = fsdp.clip_grad_norm(module, 0.1 if step else 1e9)
        optimizer.step()
    grads = {f"grad.{n}": p.grad.full_tensor() for n, p in module.named_parameters() if p.grad is not None}
    return {**fsdp.full_state_dict(module), **grads, "norm": norm, "sharded": torch.tensor(len(fsdp._fsdp_modules(module)))}


def _train_alone() -> dict[str, Tensor]:
    module = ToyPolicy(F64)
    optimizer = _optimizer(module)
    for step in range(3):
        optimizer.zero_grad()
        (toy_loss_sum(module, toy_batch(F64)) / 8).backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.1 if step else 1e9)
        optimizer.step()
    grads = {f"grad.{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {**module.state_dict(), **grads, "norm": norm}


@pytest.mark.parametrize(
    ("ranks", "per_block", "recompute", "defer"),
    [(1, False, False, True), (1, True, True, False), (2, False, False, True), (2, True, False, False), (2, True, True, True)],
)
def test_gradients_norm_and_weights_equal_a_single_process(ranks: int, per_block: bool, recompute: bool, defer: bool) -> None:
    expected = _train_alone()
    results = run_ranks(ranks, _train, per_block, recompute, defer)
    assert results[0]["sharded"].item() == (4 if per_block else 1)
    for name, value in expected.items():
        torch.testing.assert_close(results[0][name], value, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    if ranks == 2:
        assert "head.weight" not in results[1], "weights are gathered on rank 0 only"
        assert torch.equal(results[0]["norm"], results[1]["norm"])


def _act_unequally(world: World, per_block: bool) -> tuple[Tensor, Tensor, bool]:
    """Rank r acts 5 * r times (rank 0 never), then all learn; twice."""
    module = ToyPolicy(F64)
    _shard(module, world, per_block)
    acted, x = torch.zeros(0), toy_batch(F64)
    for _ in range(2):
        with fsdp.acting(module):
            for _ in range(5 * world.rank):
                acted = module(x)[0]
        module.zero_grad()
        learnt = module(x)[0]
        toy_loss_sum(module, x).backward()
    sharded_again = all(p.to_local().numel() < p.numel() for p in module.parameters() if p.shape[0] > 1)
    grad = module.projector.weight.grad.full_tensor()
    return grad, acted, world.rank == 0 or (torch.equal(acted, learnt.detach()) and sharded_again)


@pytest.mark.parametrize("per_block", [False, True])
def test_unequal_numbers_of_forwards_do_not_hang_and_act_with_the_learners_weights(per_block: bool) -> None:
    (grad, _, _), (_, acted, agrees) = run_ranks(2, _act_unequally, per_block)
    module, x = ToyPolicy(F64), toy_batch(F64)
    toy_loss_sum(module, x).backward()
    assert agrees and not acted.requires_grad
    torch.testing.assert_close(acted, module(x)[0].detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(grad, 2 * module.projector.weight.grad, rtol=0, atol=1e-12)  # a sum over ranks, not a mean


def _act_after_a_change(world: World) -> bool:
    """A forward without backward leaves the root gathered; acting must see what changed since."""
    module, x = ToyPolicy(F64), toy_batch(F64)
    _shard(module, world, per_block=False)
    shards = list(module.parameters())  # while none is gathered
    with torch.no_grad():
        module(x)
        for shard in shards:
            fsdp.local_shard(shard).zero_()
    with fsdp.acting(module):
        return bool((module(x)[0] == 0).all())


def test_acting_sees_the_newest_weights() -> None:
    assert run_ranks(2, _act_after_a_change) == [True, True]


def _mixed(world: World) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    module = ToyPolicy(torch.float32)
    _shard(module, world, per_block=False, dtype=torch.bfloat16)
    logits, value = module(toy_batch(torch.float32))
    (logits.sum() + value.sum()).backward()
    return logits.dtype, module.head.weight.dtype, module.head.weight.grad.dtype


def test_bfloat16_compute_keeps_float32_masters_and_gradients() -> None:
    assert run_ranks(1, _mixed)[0] == (torch.bfloat16, torch.float32, torch.float32)


def _load_full(world: World) -> tuple[str, dict[str, Tensor]]:
    source = ToyPolicy(F64, seed=7).state_dict()
    module = ToyPolicy(F64)
    _shard(module, world, per_block=True)
    fsdp.load_full_state_dict(module, source if world.is_main else {})
    bad = {name: value for name, value in source.items() if name != "head.bias"}
    try:
        fsdp.load_full_state_dict(module, bad if world.is_main else {})
    except CheckpointError as error:
        return error.message, fsdp.full_state_dict(module)
    return "", {}


def test_whole_weights_load_into_shards_and_misfits_are_named_on_every_rank() -> None:
    (message, state), (other_message, _) = run_ranks(2, _load_full)
    assert "head.bias" in message and message == other_message
    for name, value in ToyPolicy(F64, seed=7).state_dict().items():
        assert torch.equal(state[name], value), name


def _frozen(world: World) -> dict[str, Tensor]:
    module = ToyPolicy(F64)
    module.vision_backbone.requires_grad_(False)
    _shard(module, world, per_block=True)
    optimizer = _optimizer(module)
    module(toy_batch(F64))[0].sum().backward()  # the value head has no gradient either
    fsdp.clip_grad_norm(module, 1.0)
    optimizer.step()
    return fsdp.full_state_dict(module)


def test_frozen_and_unused_parameters_stay() -> None:
    state, before = run_ranks(2, _frozen)[0], ToyPolicy(F64).state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(state[name], before[name])}
    assert changed == {"projector", "language_model", "head"}


def _unused_block(world: World) -> torch.dtype | None:
    """A frozen block of its own that no pass uses (such as the last of a vision tower), gradients kept over two passes, as on a GPU."""
    module = ToyPolicy(torch.float32)
    module.idle = nn.Linear(7, 7).requires_grad_(False)
    fsdp.ONE_UNIT_PARAMETERS = 0
    fsdp.shard(module, world.learner, torch.bfloat16, [module.idle, *module.language_model])
    for last in (False, True):
        fsdp.set_gradient_sync(module, last)
        logits, value = module(toy_batch(torch.float32))
        (logits.sum() + value.sum()).backward()
    assert module.idle.weight.grad is None
    return module.head.weight.grad.dtype


def test_gradients_add_up_beside_a_block_that_is_not_used() -> None:
    assert run_ranks(1, _unused_block)[0] == torch.float32
