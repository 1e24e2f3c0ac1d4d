"""Owns the process groups: one World per process, set up from torchrun's environment, or alone without any port; and the learners' part."""
from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from vlarl.errors import MachineError, PlanError, WorkerError
from vlarl.plan.placement import PlacementPlan

LEARNER_AXIS = "learner"


@dataclass(frozen=True)
class World:
    """What a rank knows of its peers.

    rank, world_size: among its members. device: this rank's. learner: 1-D mesh (axis `learner`) over which weights are sharded
    and gradients summed; None on a rank that does not learn. control: gloo group over all members for small CPU objects, apart
    from the tensor traffic.
    timeout_seconds: how long any wait for a peer may last. main: the rank that writes files, the first of those that learn.
    group: of the tensor traffic (None: the default one). learners: the world of the ranks that learn, which sums their losses;
    None on a rank that does not.
    """

    rank: int
    world_size: int
    device: torch.device
    learner: DeviceMesh | None
    control: dist.ProcessGroup
    timeout_seconds: float
    main: int = 0
    group: dist.ProcessGroup | None = None
    learners: World | None = None

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and speaks to the user."""
        return self.rank == self.main


def init_world(plan: PlacementPlan, timeout_seconds: float = 600.0) -> World:
    """Join the plan's ranks; collective. Sets the default device (CUDA) and torch's thread count.

    Reads RANK and WORLD_SIZE as torchrun sets them; without them this is the only process, and no port is opened to find peers.
    Raises PlanError if the plan has another number of ranks, MachineError if its device is absent, WorkerError if peers do not come.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != len(plan.ranks):
        raise PlanError(
            f"The plan has {len(plan.ranks)} ranks, but {world_size} process(es) were started.",
            f"Start it with torchrun and {len(plan.ranks)} processes, or set `ranks: {world_size}` in the recipe.",
        )
    rank_plan = plan.ranks[rank]
    device = _claim_device(rank_plan.device)
    torch.set_num_threads(rank_plan.threads)
    if plan.workers.nnodes == 1:
        use_loopback()
    timeout = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group(
            plan.workers.backend,
            store=None if "RANK" in os.environ else dist.HashStore(),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        learners = [r.rank for r in plan.ranks if "learner" in r.roles]
        learner = _learner_mesh(device, learners, world_size, timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
        everyone = World(rank, world_size, device, learner, control, timeout_seconds, main=learners[0])
        return replace(everyone, learners=_learner_world(everyone, learners, timeout))
    except (dist.DistError, RuntimeError) as error:
        raise WorkerError(f"Rank {rank} of {world_size} could not join the others within {timeout_seconds:.0f} s: {error}") from error


def shutdown() -> None:
    """Leave the world; safe to call when none was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _claim_device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda":
        index, count = device.index or 0, torch.cuda.device_count()
        if index >= count:
            message = f"The plan places a rank on {name}, but this machine has {count} CUDA device(s)."
            raise MachineError(message, "Plan again on this machine.")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def _learner_mesh(device: torch.device, learners: list[int], world_size: int, timeout: timedelta) -> DeviceMesh | None:
    """None on a rank that does not learn. Collective. A mesh that made its own group would give it torch's deadline, 10 to 30 minutes."""
    group = dist.group.WORLD if len(learners) == world_size else dist.new_group(learners, timeout=timeout)
    if dist.get_rank() not in learners:
        return None
    assert group is not None
    return DeviceMesh.from_group(group, device.type, mesh_dim_names=(LEARNER_AXIS,))


def _learner_world(world: World, learners: list[int], timeout: timedelta) -> World | None:
    """The same world, or the part of it that learns. Collective."""
    if len(learners) == world.world_size:
        return world
    control = dist.new_group(learners, backend="gloo", timeout=timeout)
    if world.learner is None:
        return None
    group = world.learner.get_group()
    return replace(world, rank=learners.index(world.rank), world_size=len(learners), control=control, main=0, group=group)


def use_loopback() -> None:
    """One node needs no network: gloo would otherwise look up the host's name, which fails in many containers."""
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
