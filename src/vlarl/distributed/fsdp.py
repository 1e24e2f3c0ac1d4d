"""Owns sharding of the policy's weights (FSDP2): wrap, act without collectives, sum gradients, clip, gather, load.

Convention: the gradient after backward is the SUM over ranks of the ranks' local gradients (FSDP's own average is switched off).
A loss written as local sum / global count therefore has the same gradient on any number of ranks, with no factor anywhere.
"""
from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from vlarl.errors import CheckpointError

# Below this a rank holds the gathered weights easily, and one large collective beats many small ones (latency bound).
ONE_UNIT_PARAMETERS = 50_000_000


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    units: Sequence[nn.Module] = (),
    forward_methods: Sequence[str] = (),
    activation_checkpointing: bool = False,
) -> None:
    """Shard `module`'s parameters over `mesh`, in place; build the optimiser afterwards. An empty module (meta device) stays empty.

    What is trained keeps its dtype as masters (float32, or float64 runs); forward and backward run in `compute_dtype` where it differs,
    gradients are reduced in the masters' dtype. What is not trained is held in the compute dtype, as it is used. Inputs and buffers are
    not cast: the module does that itself.
    units: transformer blocks, each gathered just before its forward; models under 50 M parameters are sharded as one unit.
    forward_methods: methods besides `forward` that are called from outside and use the weights. They, and `forward`, must return
    tensors, or tuples, lists or dicts of tensors: FSDP finds the tensors that need a gradient by walking the output.
    activation_checkpointing: recompute each unit's forward in backward.
    """
    parameters = list(module.parameters())
    master_dtypes = {p.dtype for p in parameters if p.requires_grad}
    assert len(master_dtypes) <= 1, f"masters must have one dtype, got {master_dtypes}"
    for parameter in parameters:
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(compute_dtype)
    mixed = bool(master_dtypes - {compute_dtype})

    def policy(unit: nn.Module) -> MixedPrecisionPolicy:
        trained = any(p.requires_grad for p in unit.parameters())
        return MixedPrecisionPolicy(
            param_dtype=compute_dtype if mixed else None,
            # Units without gradients have nothing to reduce, and FSDP would look for it also in those that no forward pass has used yet.
            reduce_dtype=next(iter(master_dtypes)) if mixed and trained else None,
            cast_forward_inputs=False,  # sampling noise and log-probs among the inputs must keep their precision
        )

    if activation_checkpointing:
        for unit in units:
            unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)  # type: ignore[method-assign]
    if sum(p.numel() for p in parameters) >= ONE_UNIT_PARAMETERS:
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=policy(unit))
    fully_shard(module, mesh=mesh, mp_policy=policy(module))
    for wrapped in _fsdp_modules(module):
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)  # else the factor asks for a reduction that gloo lacks
    for name in forward_methods:
        torch.distributed.fsdp.register_fsdp_forward_method(module, name)


class Shards(Protocol):
    """The sharded weights of one unit, which can leave the device."""

    def leave(self) -> None: ...

    def come_back(self) -> None: ...


@contextmanager
def acting(module: nn.Module, away: Mapping[FSDPModule, Shards] = MappingProxyType({})) -> Iterator[None]:
    """Gather all weights once (collective), act without gradients or collectives, and free them at the end.

    Ranks may call `module` any number of times inside, none included. The weights and the forward code are those of learning.
    A module that is not sharded is whole already.
    away: shards that leave the device as soon as their unit is gathered, and come back when it is freed, so that the device holds
    shards and copy of one unit at a time.
    """
    if not isinstance(module, FSDPModule):
        with torch.no_grad():
            yield
        return
    root, units = _root(module), _fsdp_modules(module)
    root._get_fsdp_state()._lazy_init()  # else the first unit called by itself would take itself for the root
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.reshard()  # a forward outside, without backward, may have left old weights gathered
            unit.unshard()
            if unit in away:
                away[unit].leave()
        with torch.no_grad():
            yield
    finally:
        for unit in units:
            unit.reshard()
            if unit in away:
                away[unit].come_back()
            unit.set_reshard_after_forward(unit is not root, recurse=False)  # the root's weights are needed first in backward


def before_capture(module: nn.Module) -> None:
    """Call before a CUDA graph of `module`'s forward is captured inside `acting`: FSDP's streams then wait for a past event, instead of
    for the stream under capture, which would draw them into it."""
    if isinstance(module, FSDPModule):
        module.set_post_optim_event(torch.cuda.current_stream().record_event())


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """False: the next backward passes keep gradients and weights local and whole; True: the next one adds gradients up over ranks.

    For gradient accumulation: one gather and one reduction per optimiser step instead of one per microbatch, at the price of
    unsharded weights and gradients in between. Where that memory is lacking, leave it True: the gradients are the same.
    """
    _root(module).set_requires_gradient_sync(enabled)
    _root(module).set_reshard_after_backward(enabled)


@torch.no_grad()
def clip_grad_norm(module: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`. Returns the norm before: scalar, equal on all ranks.

    Not finite if any gradient is not. Works on the local shards: one reduction, no per-parameter collectives. Collective.
    """
    parameters = [p for p in module.parameters() if p.grad is not None]
    if not parameters:
        return torch.zeros(())
    grads = [local_shard(p.grad) for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    square = norms.square().sum()
    first = parameters[0]
    if isinstance(first, DTensor) and first.device_mesh.size() > 1:
        dist.all_reduce(square, group=first.device_mesh.get_group())
    norm = square.sqrt()
    torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def full_state_dict(module: nn.Module, names: Container[str] | None = None) -> dict[str, Tensor]:
    """Parameters and persistent buffers (those in `names`; None: all), whole, as CPU copies in the dtype of their shards, on the first
    learner; {} elsewhere. Collective.

    Gathered one tensor at a time, so a device never holds more than its shard and one whole tensor.
    """
    first = next(module.parameters())
    keep = first.device_mesh.get_local_rank() == 0 if isinstance(first, DTensor) else dist.get_rank() == 0
    result = {}
    for name, value in module.state_dict().items():
        if names is not None and name not in names:
            continue
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            result[name] = whole.detach().to("cpu", copy=True)
    return result


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors (read on rank 0 only; others may pass {}) into the sharded module. Collective.

    Raises CheckpointError on every rank if names or shapes differ.
    """
    problem = [_misfit(module, state) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(problem, src=0, device=next(module.parameters()).device)
    if problem[0]:
        raise CheckpointError(f"The weights do not fit the policy: {problem[0]}.", "Use a checkpoint of the same configuration.")
    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def parameters_by_unit(module: nn.Module) -> dict[FSDPModule, list[nn.Parameter]]:
    """The parameters that each unit gathers, sharded; {} for a module that is not sharded. What is gathered is freed."""
    free_gathered(module)
    owned: dict[FSDPModule, list[nn.Parameter]] = {}
    taken: set[nn.Parameter] = set()
    for unit in reversed(_fsdp_modules(module)):  # inner units come after those around them
        assert isinstance(unit, nn.Module)
        owned[unit] = [p for p in unit.parameters() if p not in taken]
        taken |= set(owned[unit])
    return owned


def free_gathered(module: nn.Module) -> None:
    """Free what a forward without backward may have left gathered."""
    for unit in _fsdp_modules(module):
        unit.reshard()


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a tensor that `shard` spread (by rows, as torch.chunk divides them), sharing its memory, and its first row."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    axis = next(i for i, placement in enumerate(tensor.placements) if placement.is_shard(0))
    mesh = tensor.device_mesh
    rows = tensor.shape[0]
    return tensor.to_local(), min(rows, -(-rows // mesh.size(axis)) * mesh.get_local_rank(axis))


def _misfit(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What keeps `state` from being loaded into `module`; empty if nothing does."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing:
        return f"{len(missing)} tensor(s) missing, such as {missing[0]}"
    if unknown:
        return f"{len(unknown)} unknown tensor(s), such as {unknown[0]}"
    for name, shape in own.items():
        if tuple(state[name].shape) != shape:
            return f"{name} has shape {tuple(state[name].shape)}, expected {shape}"
    return ""


def _fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def _root(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule), "the module is not sharded yet: call shard() first"
    return module
