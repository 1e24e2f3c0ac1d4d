"""Owns the small collectives: global sums and maxima, gathered objects, named barriers, meetings. All are no-ops on one rank."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vlarl.distributed.links import PATIENCE
from vlarl.distributed.mesh import World
from vlarl.errors import WorkerError

T = TypeVar("T")
MEETING_TAG = 5  # beside those of links


def all_reduce_sum(world: World, tensor: Tensor) -> Tensor:
    """Elementwise sum over all ranks; any shape, same dtype and device as `tensor`, which is left alone."""
    return _all_reduce(world, tensor, dist.ReduceOp.SUM)


def all_reduce_max(world: World, tensor: Tensor) -> Tensor:
    """Elementwise maximum over all ranks; any shape, same dtype and device as `tensor`, which is left alone."""
    return _all_reduce(world, tensor, dist.ReduceOp.MAX)


def gather_objects(world: World, value: T) -> list[T]:
    """One picklable object per rank, in rank order, on the main rank; an empty list elsewhere."""
    if world.world_size == 1:
        return [value]
    values: list[Any] | None = [None] * world.world_size if world.is_main else None
    with _deadline(world, "gather_objects"):
        dist.gather_object(value, values, group=world.control, group_dst=world.main)
    return values or []


def all_gather_objects(world: World, value: T) -> list[T]:
    """One picklable object per rank, in rank order, on every rank."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    with _deadline(world, "all_gather_objects"):
        dist.all_gather_object(values, value, group=world.control)
    return values


def broadcast_object(world: World, value: T | None) -> T:
    """The main rank's picklable object, on every rank (what the others pass is ignored)."""
    if world.world_size == 1:
        return value  # type: ignore[return-value]
    box: list[Any] = [value]
    with _deadline(world, "broadcast_object"):
        dist.broadcast_object_list(box, group=world.control, group_src=world.main)
    return box[0]


def barrier(world: World, name: str) -> None:
    """Wait for every rank. Raises WorkerError naming the barrier, and on rank 0 the ranks that did not come within the deadline."""
    if world.world_size == 1:
        return
    with _deadline(world, f"barrier {name!r}"):
        dist.monitored_barrier(world.control, timeout=timedelta(seconds=world.timeout_seconds), wait_all_ranks=True)


def meet(world: World, what: str) -> None:
    """Wait for the slowest rank with the patience of `links`, where a collective would have one deadline. Beat meanwhile.

    Messages, because only their waits can be longer than the deadline of the group. Raises WorkerError naming `what` and the peer."""
    if world.world_size == 1:
        return
    peers = [rank for rank in range(world.world_size) if rank != world.main] if world.is_main else [world.main]
    for send in (False, True) if world.is_main else (True, False):
        for peer in peers:
            with _deadline(world, f"{what}, waiting for rank {dist.get_global_rank(world.control, peer)}", PATIENCE):
                if send:
                    work = dist.isend(torch.zeros(1), group=world.control, group_dst=peer, tag=MEETING_TAG)
                else:
                    work = dist.irecv(torch.zeros(1), group=world.control, group_src=peer, tag=MEETING_TAG)
                assert work is not None, "both ranks are members of the group"
                work.wait(timedelta(seconds=PATIENCE * world.timeout_seconds))


def _all_reduce(world: World, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if world.world_size == 1:
        return tensor
    result = tensor.detach().clone()
    group = world.control if result.device.type == "cpu" else world.group  # NCCL moves CUDA tensors only
    with _deadline(world, "all_reduce"):
        dist.all_reduce(result, op, group=group)
    return result


@contextmanager
def _deadline(world: World, what: str, deadlines: int = 1) -> Iterator[None]:
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        seconds = deadlines * world.timeout_seconds
        message = f"Rank {world.rank} of {world.world_size} lost its peers in {what} (deadline {seconds:.0f} s): {error}"
        raise WorkerError(message, "The rank that failed first says why in its own log.") from error
