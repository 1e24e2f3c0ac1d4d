"""Owns the way of trajectories from the ranks that acted to the ranks that learn from them, by global slot.

A learner's batch is the one that it would have collected itself had it simulated and acted for its sample slots in one stage.
Frames travel as uint8, from host to host, each once.
"""
from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vlarl.distributed.links import Link, Links, Pending
from vlarl.plan.placement import PlacementPlan, stage_parts
from vlarl.types import TrajectoryBatch

TENSORS = tuple(f.name for f in fields(TrajectoryBatch) if "_TB" in f.name or f.name == "last_value_BJ")


class Router:
    """This rank's part in routing."""

    def __init__(self, rank: int, plan: PlacementPlan, links: Links) -> None:
        self._rank = rank
        acted = acted_slots(plan)
        wanted = {r.rank: range(*r.sample_slots) for r in plan.ranks if "learner" in r.roles}
        self._wanted = wanted.get(rank, range(0))
        self._to = {peer: common for peer, slots in wanted.items() if (common := _common(acted.get(rank, ()), slots))}
        self._from = {peer: common for peer, slots in acted.items() if (common := _common(slots, self._wanted))}
        self._links: dict[int, Link] = {peer: links.to(peer) for peer in (*self._to, *self._from) if peer != rank}
        self._stays = all(acted.get(r) == list(slots) for r, slots in wanted.items()) and len(acted) == len(wanted)

    def route(self, batch: TrajectoryBatch | None) -> TrajectoryBatch | None:
        """batch: what this rank collected (None: it does not act). Returns what it learns from (None: it does not learn)."""
        if self._stays:
            return batch
        sending: list[_Sending] = []
        parts = []
        for peer, slots in self._to.items():
            assert batch is not None
            part = take_slots(batch, slots)
            if peer == self._rank:
                parts.append(part)
            else:
                sending.append(_send(self._links[peer], part))
        parts += [_receive(self._links[peer]) for peer in self._from if peer != self._rank]
        for message in sending:
            message.wait()
        return _merge(parts, self._wanted) if self._wanted else None


def acted_slots(plan: PlacementPlan) -> dict[int, list[int]]:
    """Global slots that each rollout rank acts for, in the order of its columns."""
    acted: dict[int, list[int]] = {r.rank: [] for r in plan.ranks if "rollout" in r.roles}
    for stage in range(plan.rollout.stages):
        for part in stage_parts(plan.ranks, plan.rollout.stages, stage):
            acted[part.rollout_rank] += range(part.start, part.end)
    return acted


def _common(slots: Sequence[int], others: Sequence[int]) -> list[int]:
    return sorted(set(slots) & set(others))


@dataclass(frozen=True)
class _Sending:
    """Messages under way and the tensors that they read."""

    pending: list[Pending]
    tensors: list[Tensor]

    def wait(self) -> None:
        for pending in self.pending:
            pending.wait()


def _send(link: Link, part: TrajectoryBatch) -> _Sending:
    """Start sending a part of a batch: its size, its facts, its tensors."""
    tensors = [getattr(part, name).contiguous() for name in TENSORS]
    facts = {
        "tensors": [(t.dtype, tuple(t.shape)) for t in tensors],
        "slots": part.slot_B.tolist(),
        "instructions": part.instructions,
        "episodes": part.episodes,
        "policy_version": part.policy_version,
    }
    packed = torch.frombuffer(bytearray(pickle.dumps(facts)), dtype=torch.uint8)
    messages = [torch.tensor([packed.numel()]), packed, *(t for t in tensors if t.numel())]
    return _Sending([link.send(m, "trajectories") for m in messages], messages)


def _receive(link: Link) -> TrajectoryBatch:
    size = torch.zeros(1, dtype=torch.int64)
    link.recv(size, "trajectories").wait()
    packed = torch.zeros(int(size), dtype=torch.uint8)
    link.recv(packed, "trajectories").wait()
    facts = pickle.loads(packed.numpy().tobytes())
    tensors = [torch.zeros(shape, dtype=dtype) for dtype, shape in facts["tensors"]]
    for pending in [link.recv(t, "trajectories") for t in tensors if t.numel()]:
        pending.wait()
    return TrajectoryBatch(
        **dict(zip(TENSORS, tensors, strict=True)),
        instructions=facts["instructions"],
        slot_B=torch.tensor(facts["slots"]),
        episodes=facts["episodes"],
        policy_version=facts["policy_version"],
    )


def take_slots(batch: TrajectoryBatch, slots: Sequence[int]) -> TrajectoryBatch:
    """The columns of `slots`, with the episodes that finished in them."""
    column = {slot: b for b, slot in enumerate(batch.slot_B.tolist())}
    index = torch.tensor([column[slot] for slot in slots])
    tensors = {name: getattr(batch, name).index_select(0 if name == "last_value_BJ" else 1, index) for name in TENSORS}
    kept = [row for row, e in enumerate(batch.episodes) if e.slot in set(slots)]
    tensors["episode_TB"] = _renumber(tensors["episode_TB"], kept, len(batch.episodes))
    return replace(batch, **tensors, slot_B=torch.tensor(list(slots)), episodes=tuple(batch.episodes[row] for row in kept))


def _renumber(episode_TB: Tensor, order: Sequence[int], count: int) -> Tensor:
    """Rows of `episodes` after only those in `order` are kept, in that order."""
    new = torch.full((count + 1,), -1, dtype=torch.int64)  # the last entry is where -1 points
    new[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
    return new[episode_TB]


def _merge(parts: Sequence[TrajectoryBatch], slots: range) -> TrajectoryBatch:
    """One batch of the columns of all parts, in the order of the slots."""
    order = torch.cat([p.slot_B for p in parts]).argsort()
    steps = max(_steps(p) for p in parts)
    joined = {n: _join([getattr(p, n) for p in parts], steps if "_TB" in n else None, order) for n in TENSORS}
    sentences = [s for p in parts for s in p.instructions]
    offset = [sum(len(p.instructions) for p in parts[:i]) for i in range(len(parts))]
    instruction = [p.instruction_TB + start for p, start in zip(parts, offset, strict=True)]
    joined["instruction_TB"], instructions = _by_appearance(_join(instruction, steps, order), joined["active_TB"], sentences)
    episodes = [e for p in parts for e in p.episodes]
    offset = [sum(len(p.episodes) for p in parts[:i]) for i in range(len(parts))]
    rows = [torch.where(p.episode_TB >= 0, p.episode_TB + start, -1) for p, start in zip(parts, offset, strict=True)]
    episode_TB = _join(rows, steps, order, -1)
    ended = _by_end(episode_TB, len(episodes))
    joined["episode_TB"] = _renumber(episode_TB, ended, len(episodes))
    return TrajectoryBatch(
        **joined,
        instructions=instructions,
        slot_B=torch.tensor(list(slots)),
        episodes=tuple(episodes[row] for row in ended),
        policy_version=parts[0].policy_version,
    )


def _steps(part: TrajectoryBatch) -> int:
    """Chunk steps until the last column was idle."""
    played = part.active_TB.any(1).nonzero()
    return int(played[-1]) + 1 if len(played) else 0


def _join(parts: Sequence[Tensor], steps: int | None, order: Tensor, fill: int = 0) -> Tensor:
    """Columns side by side in `order`, every part cut or filled up to `steps` rows (None: no time axis)."""
    if steps is None:
        return torch.cat(list(parts))[order]
    first = parts[0]
    result = torch.full((steps, len(order), *first.shape[2:]), fill, dtype=first.dtype)
    place = order.argsort()
    start = 0
    for part in parts:
        rows, columns = min(steps, part.shape[0]), part.shape[1]
        result[:rows, place[start : start + columns]] = part[:rows]
        start += columns
    return result


def _by_appearance(instruction_TB: Tensor, active_TB: Tensor, sentences: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Sentences numbered as they come up in time, slot by slot; 0 where a slot idles."""
    table: dict[str, int] = {}
    number = torch.zeros(max(len(sentences), 1), dtype=torch.int64)
    seen = instruction_TB[active_TB]
    for i in dict.fromkeys(seen.tolist()):
        number[i] = table.setdefault(sentences[i], len(table))
    return torch.where(active_TB, number[instruction_TB], 0), tuple(table)


def _by_end(episode_TB: Tensor, count: int) -> list[int]:
    """Rows of episodes by the time of their end, then by slot."""
    T, B = episode_TB.shape
    last = torch.full((count + 1,), -1, dtype=torch.int64)
    when_TB = torch.arange(T * B).view(T, B)
    # In the order of time, so that an episode's last chunk is what remains: columns do not share episodes.
    last.scatter_reduce_(0, torch.where(episode_TB >= 0, episode_TB, count).flatten(), when_TB.flatten(), "amax")
    return last[:count].argsort().tolist()
