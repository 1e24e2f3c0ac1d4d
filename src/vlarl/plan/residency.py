"""Owns the decision what a learner's device does without in each phase, and the refusal of what does not fit even so. Pure."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal, get_args

from vlarl.errors import PlanError
from vlarl.plan.placement import MemoryRow, Phase, Residency, phase_bytes
from vlarl.recipe.schema import Part

MARGIN = 0.92  # share of a memory that may be planned for; the rest is fragmentation
PARTS: tuple[Part, ...] = get_args(Part)
PHASES: tuple[Phase, ...] = get_args(Phase)
PINNED_ROUNDING = 2  # torch rounds pinned blocks up to a power of two
ADVICE = {
    "activations while": "Lower env.parallel, or use more ranks.",
    "activations of captured": "Lower env.parallel, or policy.engine.batch_sizes, or do without policy.engine.cuda_graphs.",
    "activations of": "Lower update.microbatch, or set update.activation_checkpointing.",
    "frozen towers' features": "Set update.features to recompute.",
    "rollout buffer": "Lower env.parallel, or what is collected per update.",
    "simulator processes": "Lower env.parallel or eval.parallel; every slot is a simulator of its own.",
    "drawing, by": "Set env.slots_per_host, so that fewer processes draw, or lower env.parallel or eval.parallel.",
    "simulator's scenes": "Lower env.parallel, eval.parallel or placement.stages.",
    "camera frames": "Lower env.parallel or env.image_size.",
}


def decide(
    offload: Literal["auto", "none"] | tuple[Part, ...], rows: tuple[MemoryRow, ...], capacity: int | None, device: Literal["cpu", "cuda"]
) -> Residency:
    """What is away in which phase. rows: the estimate with every part on the device. capacity: bytes of the device (None: unknown).

    auto: on a GPU, in each phase the parts with the fewest bytes that let it fit on every rank; all of them where even that is too little.
    """
    if offload == "none":
        return Residency(reason="nothing leaves the device, as the recipe asks")
    if offload != "auto":
        asked = {phase: tuple(p for p in PARTS if p in offload and p in _movable(rows, phase)) for phase in PHASES}
        return Residency(**asked, reason="as the recipe asks")
    if device == "cpu":
        return Residency(reason="nothing leaves the device: its memory is the host's")
    if capacity is None:
        return Residency(reason="nothing leaves the device: how much memory it has is unknown")
    away = {phase: _least(rows, phase, capacity) for phase in PHASES}
    if not any(away.values()):
        return Residency(reason="nothing leaves the device: everything fits at once")
    needs = {phase: phase_bytes(rows, phase) / 2**30 for phase in PHASES if away[phase]}
    listed = ", ".join(f"{phase} {need:.1f} GiB" for phase, need in needs.items())
    return Residency(**away, reason=f"with everything on the device: {listed}, of {capacity * MARGIN / 2**30:.1f} GiB")


def place(rows: tuple[MemoryRow, ...], residency: Residency, device: Literal["cpu", "cuda"]) -> tuple[MemoryRow, ...]:
    """The estimate under a decision: parts that are away are not on the device, and their host copies, once made, are kept (gradients
    have none: they are sharded)."""
    away = [row for row in rows if row.part in residency.away(row.phase)]
    moving = {(row.ranks, row.component): row for row in away if row.part != "gradients"}.values()
    where: Literal["device", "host"] = "host" if device == "cuda" else "device"
    rounding = PINNED_ROUNDING if device == "cuda" else 1
    copies = [
        replace(row, phase=phase, component=f"{row.component}: host copy", where=where, bytes=row.bytes * rounding, part=None)
        for ranks, phase in dict.fromkeys((row.ranks, row.phase) for row in rows)
        for row in moving
        if row.ranks == ranks
    ]
    return (*(row for row in rows if row not in away), *copies)


def check(rows: tuple[MemoryRow, ...], capacity: int | None, host: int | None, device_name: str, lora: bool) -> None:
    """Raises PlanError where phases do not fit on the device or beside it: all of them, each with the largest part and what to do about it.

    lora: whether only adapters are trained; then weights, gradients and moments shrink with more ranks alone.
    """
    problems, fixes = [], []
    for where, there, name in (("device", capacity, device_name), ("host", host, "the host")):
        for phase, ranks in dict.fromkeys((row.phase, row.ranks) for row in rows):
            need = phase_bytes(rows, phase, ranks, where == "host")
            if there is None or need <= there * MARGIN:
                continue
            here = [row for row in rows if (row.phase, row.ranks, row.where) == (phase, ranks, where)]
            largest = max(here, key=lambda row: row.bytes)
            fixes.append(_advice(here, there, lora))
            problems.append(
                f"The {phase} phase needs about {need / 2**30:.1f} GiB per rank, {largest.component} most of all "
                f"({largest.bytes / 2**30:.1f} GiB), and {name} has {there / 2**30:.1f} GiB per rank, of which "
                f"{MARGIN:.0%} are planned for."
            )
    if problems:
        raise PlanError("\n  ".join(problems), " ".join(dict.fromkeys(fixes)))


def _advice(rows: list[MemoryRow], there: int, lora: bool) -> str:
    """Where the rest leaves room, to lower the largest part that a setting changes; else what makes the rest smaller."""
    adjustable = {row: text for row in rows for start, text in ADVICE.items() if row.component.startswith(start)}
    rest = [row for row in rows if row not in adjustable]
    if adjustable and sum(row.bytes for row in rest) <= there * MARGIN:
        return adjustable[max(adjustable, key=lambda row: row.bytes)]
    if sum(row.bytes for row in rest if "sharded" not in row.component) > there * MARGIN:
        return "Use GPUs with more memory: who acts holds the whole policy. More ranks share the rest."
    return "Use more ranks, which share the weights." if lora else "Use more ranks or policy.lora."


def _movable(rows: tuple[MemoryRow, ...], phase: Phase) -> set[Part]:
    return {row.part for row in rows if row.phase == phase and row.part is not None}


def _least(rows: tuple[MemoryRow, ...], phase: Phase, capacity: int) -> tuple[Part, ...]:
    """The parts to move: every choice is tried, there are few."""
    movable = [part for part in PARTS if part in _movable(rows, phase)]
    choices = [choice for count in range(len(movable) + 1) for choice in combinations(movable, count)]

    def moved(choice: Sequence[Part]) -> int:
        return sum(row.bytes for row in rows if row.phase == phase and row.part in choice)

    def fits(choice: Sequence[Part]) -> bool:
        return phase_bytes(tuple(row for row in rows if row.part not in choice), phase) <= capacity * MARGIN

    return min(filter(fits, choices), key=moved, default=tuple(movable))
