"""Owns messages between two ranks: tensors sent in a fixed order, each wait with a deadline that names the peer; and the learners' orders.

Observations and actions have a process group each: a GPU's communicator works off its operations one after another, so a receive that
waits in one direction would hold up a send in the other. Everything else travels over the control group, from host to host.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from vlarl.distributed.mesh import World
from vlarl.errors import WorkerError
from vlarl.plan.placement import PlacementPlan

Kind = Literal["observations", "actions", "trajectories", "orders"]
Order = Literal["collect", "weights", "report", "keep", "end"]

TAGS: dict[Kind, int] = {"observations": 1, "actions": 2, "trajectories": 3, "orders": 4}
ORDERS: tuple[Order, ...] = ("collect", "weights", "report", "keep", "end")
PATIENCE = 10  # deadlines that a slow peer may take; it proves meanwhile by its heartbeats that it is alive, or the launcher names it
POLL_SECONDS = 50e-6


@dataclass(frozen=True)
class Pending:
    """A message under way. what: what is waited for, with the peer, in words. on_gpu: its work does not block the host."""

    work: dist.Work
    what: str
    seconds: float
    on_gpu: bool

    def wait(self) -> None:
        """Block until the tensor may be read (received) or written again (sent). Raises WorkerError naming the peer."""
        try:
            if self.on_gpu:
                self._poll()
            else:
                self.work.wait(timedelta(seconds=self.seconds))
        except (dist.DistError, RuntimeError) as error:
            raise _in_vain(self.what, self.seconds, error) from error

    def _poll(self) -> None:
        deadline = time.monotonic() + self.seconds
        while not self.work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError("nothing came")
            time.sleep(POLL_SECONDS)
        self.work.wait()


def _in_vain(what: str, seconds: float, error: Exception) -> WorkerError:
    message = f"Waited in vain for {what} (deadline {seconds:.0f} s): {error}"
    return WorkerError(message, "The rank that failed first says why in its own log.")


class Link:
    """Messages to and from one peer; both sides send and receive those of a kind in the same order. Tensors are contiguous; observations
    and actions lie on the world's device, the rest on the host."""

    def __init__(self, world: World, peer: int, name: str, groups: dict[Kind, dist.ProcessGroup | None]) -> None:
        """peer: global rank. name: it and its roles, in words."""
        self._world, self._peer, self._name, self._groups = world, peer, name, groups

    def send(self, tensor: Tensor, kind: Kind) -> Pending:
        """Start sending; leave `tensor` alone until the message is done."""
        return self._start(dist.isend, tensor, f"{self._name} to take {kind}", kind)

    def recv(self, tensor: Tensor, kind: Kind) -> Pending:
        """Start receiving into `tensor`."""
        return self._start(dist.irecv, tensor, f"{kind} of {self._name}", kind)

    def _start(self, transfer: Callable[..., dist.Work | None], tensor: Tensor, what: str, kind: Kind) -> Pending:
        rollout = kind in ("observations", "actions")
        seconds = self._world.timeout_seconds * PATIENCE
        try:
            work = transfer(tensor, self._peer, self._groups[kind], TAGS[kind])
        except (dist.DistError, RuntimeError) as error:  # gloo says so at once where the peer is known to be gone
            raise _in_vain(what, seconds, error) from error
        assert work is not None, "both ranks are members of the group"
        return Pending(work, what, seconds, rollout and self._world.device.type == "cuda")


class Links:
    """A rank's links to its peers. Collective to build."""

    def __init__(self, world: World, plan: PlacementPlan) -> None:
        self._world, self._plan = world, plan
        self._groups: dict[Kind, dist.ProcessGroup | None] = {"trajectories": world.control, "orders": world.control}
        split = any(r.roles != plan.ranks[0].roles for r in plan.ranks)
        kinds: tuple[Kind, ...] = ("observations", "actions")
        # Past its deadline NCCL ends the process without a word: twice ours, so that Pending names the peer first.
        timeout = timedelta(seconds=2 * PATIENCE * world.timeout_seconds)
        for kind in kinds:  # gloo tells kinds apart by their tags
            self._groups[kind] = dist.new_group(timeout=timeout) if split and world.device.type == "cuda" else None

    def to(self, peer: int) -> Link:
        """The link to global rank `peer`."""
        return Link(self._world, peer, describe(self._plan, peer), self._groups)


def describe(plan: PlacementPlan, rank: int) -> str:
    """A rank and its roles, in words."""
    return f"rank {rank} ({', '.join(plan.ranks[rank].roles)})"


class Orders:
    """What the learners ask of the ranks that do not learn, so that all do the same things in the same order. Nothing where all learn."""

    def __init__(self, world: World, plan: PlacementPlan, links: Links) -> None:
        self._main = world.is_main
        self._helpers = [links.to(r.rank) for r in plan.ranks if "learner" not in r.roles]
        self._master = links.to(world.main)

    def give(self, order: Order, number: int = 0) -> None:
        """Learners: ask every helper for `order`. number: what it is about, such as an update."""
        if self._main:
            message = torch.tensor([ORDERS.index(order), number])
            for pending in [helper.send(message, "orders") for helper in self._helpers]:
                pending.wait()

    def take(self) -> tuple[Order, int]:
        """Helpers: wait for the next order."""
        message = torch.zeros(2, dtype=torch.int64)
        self._master.recv(message, "orders").wait()
        return ORDERS[int(message[0])], int(message[1])
