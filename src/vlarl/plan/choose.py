"""Owns the choice of a placement: which are sensible, how they compare by predicted costs, the rule of thumb without costs. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from vlarl.errors import PlanError
from vlarl.plan.costs import Prediction, predict
from vlarl.plan.placement import PlacementPlan
from vlarl.plan.profile import Profile
from vlarl.recipe.schema import Placement

RATIOS = ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3))  # env to rollout ranks
LEARNER_SHARES = ((1, 2), (1, 4), (3, 4))  # of a disaggregated placement's ranks
MODES = ("collocated", "hybrid", "disaggregated")
STAGES = (1, 2, 4)
TIE = 0.01  # a simpler placement is taken as long as it is no slower than this; MODES begins with the simplest

DEFAULT = Placement()

Build = Callable[[Placement], PlacementPlan]


@dataclass(frozen=True)
class Candidate:
    """One placement and what is predicted for it; or why it cannot be."""

    placement: Placement
    prediction: Prediction | None
    refusal: str = ""

    @property
    def label(self) -> str:
        """`hybrid 4:4, 2 stages`: env, rollout and (disaggregated) learner ranks."""
        return label(self.placement)


def label(placement: Placement) -> str:
    """A placement in a few words."""
    split = ":".join(str(n) for n in (placement.env, placement.rollout, placement.learner) if n is not None)
    return f"{placement.mode}{f' {split}' if split else ''}, {placement.stages} stage{'s' if placement.stages > 1 else ''}"


def candidates(
    ranks: int, modes: tuple[str, ...] = MODES, stages: tuple[int, ...] = STAGES, wanted: Placement = DEFAULT
) -> list[Placement]:
    """Placements worth comparing on so many ranks; even splits first. What may leave the device, and overlap, are as in `wanted`."""
    found: list[Placement] = []
    if "collocated" in modes:
        found += [Placement(mode="collocated", stages=k) for k in stages]
    if "hybrid" in modes and ranks >= 2:
        found += [Placement(mode="hybrid", stages=k, env=e, rollout=r) for e, r in splits(ranks) for k in stages]
    if "disaggregated" in modes and ranks >= 3:
        learners = dict.fromkeys(max(1, ranks * a // b) for a, b in LEARNER_SHARES)
        for learner in (n for n in learners if ranks - n >= 2):
            for e, r in splits(ranks - learner):
                found += [Placement(mode="disaggregated", stages=k, env=e, rollout=r, learner=learner) for k in stages]
    return [replace(placement, offload=wanted.offload, overlap=wanted.overlap) for placement in found]


def splits(ranks: int) -> list[tuple[int, int]]:
    """Env and rollout ranks in simple ratios; as even as can be where none divides."""
    even = [(ranks * a // (a + b), ranks * b // (a + b)) for a, b in RATIOS if ranks % (a + b) == 0]
    return list(dict.fromkeys(even)) or [(ranks // 2, ranks - ranks // 2)]


def compare(placements: list[Placement], build: Build, profile: Profile) -> list[Candidate]:
    """Predictions, fastest first; among near-equals the simpler placement first. What cannot be built comes last, with the reason."""
    rows = []
    for placement in placements:
        try:
            rows.append(Candidate(placement, predict(build(placement), profile)))
        except PlanError as problem:
            rows.append(Candidate(placement, None, problem.message))
    fine = sorted((row for row in rows if row.prediction), key=_speed, reverse=True)
    if fine:
        close = [row for row in fine if _speed(row) >= (1 - TIE) * _speed(fine[0])]
        first = min(close, key=lambda row: (MODES.index(row.placement.mode), row.placement.stages))
        fine = [first] + [row for row in fine if row is not first]
    return fine + [row for row in rows if row.prediction is None]


def choose(ranks: int, wanted: Placement, build: Build, profile: Profile) -> tuple[Placement, str]:
    """The placement predicted to be fastest, and why. """
    stages = STAGES if wanted.stages == 1 else (wanted.stages,)
    rows = compare(candidates(ranks, stages=stages, wanted=wanted), build, profile)
    best = rows[0]
    if best.prediction is None:  # nothing can be built; the simplest placement says why
        return replace(wanted, mode="collocated", profile=None), best.refusal
    others = []
    for mode in MODES:
        rival = next((row for row in rows if row.placement.mode == mode and row is not best and row.prediction), None)
        if rival is not None and mode != best.placement.mode:
            others.append(f"{_speed(rival):,.0f} with {rival.label}")
    against = f", against {' and '.join(others)}" if others else ""
    kind = "assumed" if profile.source == "assumed" else "measured"
    reason = f"{best.label}: {_speed(best):,.0f} frames/s predicted from the {kind} costs of {profile.name}{against}"
    return best.placement, reason


def rule_of_thumb(ranks: int, wanted: Placement, on_gpu: bool, chunk: int) -> tuple[Placement, str]:
    """Without measured costs. on_gpu: whether ranks simulate on a GPU, in their own process.

    Such a simulator takes about as long as a policy that generates one action token by token, so that two halves of the ranks, pipelined,
    keep each other busy (hybrid). With action chunks, or a simulator on the CPU, simulation outweighs inference by far and nothing is
    gained by setting ranks apart for either (collocated).
    """
    if ranks >= 2 and ranks % 2 == 0 and on_gpu and chunk == 1:
        placement = replace(wanted, mode="hybrid", stages=max(2, wanted.stages), env=ranks // 2, rollout=ranks // 2, profile=None)
        why = "simulation on the GPU and an action per forward pass cost about the same, so two halves of the ranks work in turn"
        return placement, f"{label(placement)}: {why} (rule of thumb; name measured costs in placement.profile)"
    collocated = replace(wanted, mode="collocated", profile=None)
    if ranks == 1:
        return collocated, "collocated: a single rank does everything"
    return collocated, "collocated: every rank simulates, acts and learns on its own slots, so nothing waits for another device"


def _speed(row: Candidate) -> float:
    assert row.prediction is not None
    return row.prediction.frames_per_second
