"""Owns the paired comparison of two evaluations: the episodes that both played, and what they say. Torch-free."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlarl.evaluation.statistics import mcnemar, paired_episodes_needed, wilson

SCENES = ("simulator", "tasks", "variation", "horizon", "seed", "options")  # what makes an episode the same one for two policies
ACTING = ("image_size", "views", "chunk", "temperature")  # what may differ, and is then said


@dataclass(frozen=True)
class Paired:
    """One task's episodes, or all of them (task: "all"). only_a, only_b: episodes in which only that policy succeeded."""

    variation: str
    task: str
    episodes: int
    a: int
    b: int
    only_a: int
    only_b: int

    @property
    def gain(self) -> float:
        """Success rate of B minus that of A."""
        return (self.b - self.a) / self.episodes

    @property
    def p_value(self) -> float:
        """Of equal rates (McNemar, exact, two-sided)."""
        return mcnemar(self.only_a, self.only_b)

    def interval(self) -> tuple[float, float]:
        """95 % interval of `gain`: Newcombe's for paired proportions (1998, method 10), from the Wilson intervals of both rates."""
        n, rate_a, rate_b = self.episodes, self.a / self.episodes, self.b / self.episodes
        (low_a, high_a), (low_b, high_b) = wilson(self.a, n), wilson(self.b, n)
        phi = self._correlation()
        below = (rate_b - low_b) ** 2 - 2 * phi * (rate_b - low_b) * (high_a - rate_a) + (high_a - rate_a) ** 2
        above = (high_b - rate_b) ** 2 - 2 * phi * (high_b - rate_b) * (rate_a - low_a) + (rate_a - low_a) ** 2
        return self.gain - max(0.0, below) ** 0.5, self.gain + max(0.0, above) ** 0.5

    def _correlation(self) -> float:
        """Newcombe's phi: that of the two outcomes, with a continuity correction where it is positive."""
        n, both = self.episodes, self.a - self.only_a
        neither = n - both - self.only_a - self.only_b
        product = self.a * (n - self.a) * self.b * (n - self.b)
        if product == 0:
            return 0.0
        cross = both * neither - self.only_a * self.only_b
        return (max(cross - n / 2, 0) if cross > 0 else cross) / product**0.5


def clashes(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Why the episodes of two reports of one variation are not the same: a sentence for each setting."""
    first, second = a["protocol"], b["protocol"]
    return [f"{name}: {first[name]} and {second[name]}" for name in SCENES if first[name] != second[name]]


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What else differs between the two ways to play them."""
    first, second = a["protocol"], b["protocol"]
    return [f"{name} {first[name]} and {second[name]}" for name in ACTING if first[name] != second[name]]


def pair(a: dict[str, Any], b: dict[str, Any]) -> list[Paired]:
    """Per task, then all of them if they are several. Only episodes that both reports hold count: the first ones of the longer."""
    first, second = ({(row["task"], row["init_state"], row["seed"]): row["success"] for row in report["rows"]} for report in (a, b))
    shared, variation = [key for key in first if key in second], a["protocol"]["variation"]
    tasks = [name for name in a["protocol"]["tasks"] if any(key[0] == name for key in shared)]
    groups = [(name, [key for key in shared if key[0] == name]) for name in tasks]
    if len(groups) > 1:
        groups.append(("all", shared))
    rows = []
    for name, keys in groups:
        outcomes = [(bool(first[key]), bool(second[key])) for key in keys]
        counts = (sum(x for x, _ in outcomes), sum(y for _, y in outcomes), outcomes.count((True, False)), outcomes.count((False, True)))
        rows.append(Paired(variation, name, len(keys), *counts))
    return rows


def verdict(row: Paired) -> str:
    """What the episodes of one row show, and how many more would be needed where they show nothing."""
    if row.only_a + row.only_b == 0:
        return "The two succeed and fail in the same episodes."
    if row.p_value < 0.05:
        return f"{'B' if row.gain > 0 else 'A'} is better (p = {row.p_value:.2g})."
    if row.gain == 0:
        return "No difference shown: each wins as many episodes as it loses."
    needed = paired_episodes_needed(row.only_a / row.episodes, row.only_b / row.episodes)
    return f"No difference shown (p = {row.p_value:.2g}). If it is as large as it looks, about {needed:,} episodes show it (power 80 %)."
