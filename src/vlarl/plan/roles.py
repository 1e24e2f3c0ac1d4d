"""Owns who does what: ranks per role and slots per rank, for collocated, disaggregated and hybrid placements. Pure, torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Literal

from vlarl.recipe.rules import Clash, multiples_near, parse_ranks
from vlarl.recipe.schema import Placement

Mode = Literal["collocated", "disaggregated", "hybrid"]
Range = tuple[int, int]
SPLITS_SHOWN = 3


@dataclass(frozen=True)
class Roles:
    """Ranks of each role, ascending."""

    mode: Mode
    env: tuple[int, ...]
    rollout: tuple[int, ...]
    learner: tuple[int, ...]

    def of(self, rank: int) -> tuple[Literal["env", "rollout", "learner"], ...]:
        """The roles of one rank."""
        names: tuple[Literal["env", "rollout", "learner"], ...] = ("env", "rollout", "learner")
        return tuple(name for name in names if rank in getattr(self, name))

    @property
    def split(self) -> str:
        """`4 env, 4 rollout, 8 learner`."""
        return f"{len(self.env)} env, {len(self.rollout)} rollout, {len(self.learner)} learner"


def stated_ranks(placement: Placement) -> int | None:
    """How many ranks the placement asks for, where it says so for every role; None else."""
    if placement.mode not in ("disaggregated", "hybrid"):
        return None
    given = [placement.env, placement.rollout] + ([placement.learner] if placement.mode == "disaggregated" else [])
    sizes = []
    for text in given:
        chosen = parse_ranks(text) if text is not None else None
        if chosen is None:
            return None
        sizes.append(chosen if isinstance(chosen, int) else len(chosen))
    return sum(sizes)


def assign(placement: Placement, ranks: int, nodes: int) -> tuple[Roles | None, list[Clash]]:
    """Ranks for every role of a placement whose mode is decided, or what is wrong with it.

    Roles given as ranges come first; counts take the lowest ranks left, in hybrid mode the same number on every node where that works
    out, so that observations need not leave the node. Learners of a disaggregated placement stay together.
    """
    everyone = tuple(range(ranks))
    if placement.mode not in ("disaggregated", "hybrid"):
        return Roles("collocated", everyone, everyone, everyone), []
    hybrid = placement.mode == "hybrid"
    names = ("env", "rollout") if hybrid else ("env", "rollout", "learner")
    if ranks < len(names):
        rule = f"needs at least {len(names)} ranks, one per role, and there {_is(ranks)}. Set ranks, or use collocated."
        return None, [Clash("placement.mode", rule, ("ranks",))]
    given = {name: getattr(placement, name) for name in names}
    wanted = {name: parse_ranks(text) for name, text in given.items() if text is not None}
    clashes = [
        Clash(f"placement.{name}", f"ranks are 0 to {ranks - 1}. Set ranks to {max(chosen) + 1}, or name others.", ("ranks",))
        for name, chosen in wanted.items()
        if isinstance(chosen, tuple) and max(chosen) >= ranks
    ]
    if clashes or None in wanted.values():
        return None, clashes
    counts = {name: chosen if isinstance(chosen, int) else len(chosen) for name, chosen in wanted.items() if chosen is not None}
    sizes = _fill(counts, names, ranks)
    if sizes is None or sum(sizes.values()) != ranks or min(sizes.values()) < 1:
        return None, [_total_clash(placement.mode, counts, names, ranks)]
    taken = {name: chosen for name, chosen in wanted.items() if isinstance(chosen, tuple)}
    for name in names:
        if name not in taken:
            free = [rank for rank in everyone if all(rank not in held for held in taken.values())]
            taken[name] = _take(free, sizes[name], ranks // nodes, nodes if hybrid else 1)
    return Roles(placement.mode, taken["env"], taken["rollout"], everyone if hybrid else taken["learner"]), []


def _fill(counts: dict[str, int], names: tuple[str, ...], ranks: int) -> dict[str, int] | None:
    """Counts for the roles that the recipe leaves open: the rest; a learner gets half, and env and rollout share alike."""
    sizes, left = dict(counts), ranks - sum(counts.values())
    missing = [name for name in names if name not in counts]
    if not missing:
        return sizes
    if missing == ["env", "rollout", "learner"]:
        sizes["learner"] = max(1, ranks // 2)
    elif len(missing) == 2 and "learner" in missing:
        (known,) = counts.values()
        sizes["env" if "env" in missing else "rollout"] = known
    left, missing = ranks - sum(sizes.values()), [name for name in names if name not in sizes]
    if left < len(missing):
        return None
    for i, name in enumerate(missing):
        sizes[name] = left // (len(missing) - i)
        left -= sizes[name]
    return sizes


def _take(free: list[int], count: int, per_node: int, nodes: int) -> tuple[int, ...]:
    """The lowest free ranks, evenly over the nodes where that works out."""
    if nodes > 1 and count % nodes == 0:
        by_node = [[rank for rank in free if rank // per_node == node][: count // nodes] for node in range(nodes)]
        if all(len(part) == count // nodes for part in by_node):
            return tuple(rank for part in by_node for rank in part)
    return tuple(free[:count])


def _total_clash(mode: str, counts: dict[str, int], names: tuple[str, ...], ranks: int) -> Clash:
    total = sum(counts.values())
    stated = " + ".join(f"{count} {name}" for name, count in counts.items())
    others = tuple(f"placement.{name}" for name in list(counts)[1:])
    field = f"placement.{next(iter(counts))}"
    if len(counts) == len(names):
        rule = f"{mode} uses every rank once: {stated} = {total} ranks, and there {_is(ranks)}. Set ranks to {total}, or other numbers."
    else:
        need = total + len(names) - len(counts)
        rule = f"{stated} of {ranks} ranks leave none for the other roles. Use fewer, or set ranks to at least {need}."
    return Clash(field, rule, (*others, "ranks"))


def _is(ranks: int) -> str:
    return "is 1" if ranks == 1 else f"are {ranks}"


# ---------------------------------------------------------------- slots


def env_slots(roles: Roles, parallel: int) -> dict[int, Range]:
    """Equal contiguous ranges of global slots, in the order of the env ranks."""
    return _ranges(roles.env, parallel, 1)


def policy_slots(roles: Roles, parallel: int) -> dict[int, Range]:
    """Equal contiguous ranges of global slots, in the order of the rollout ranks."""
    return _ranges(roles.rollout, parallel, 1)


def sample_slots(roles: Roles, parallel: int, group: int) -> dict[int, Range]:
    """Contiguous ranges of whole groups, equal or one group apart, in the order of the learner ranks."""
    return _ranges(roles.learner, parallel, group)


def _ranges(ranks: tuple[int, ...], parallel: int, unit: int) -> dict[int, Range]:
    units, count = parallel // unit, len(ranks)
    return {rank: (i * units // count * unit, (i + 1) * units // count * unit) for i, rank in enumerate(ranks)}


def slots_fit(roles: Roles, parallel: int, stages: int, group: int) -> bool:
    """Whether slots split evenly over env ranks and stages and over rollout ranks, groups whole, and no learner goes without."""
    even = parallel % slot_step(len(roles.env), len(roles.rollout), stages, group) == 0
    return even and parallel // group >= len(roles.learner)


def slot_step(envs: int, rollouts: int, stages: int, group: int) -> int:
    """env.parallel must be a multiple of this."""
    return lcm(envs * stages, rollouts) * group


def split_clash(roles: Roles, parallel: int, stages: int, group: int) -> Clash:
    """What to say where slots do not split over separate env and rollout ranks: the nearest numbers and the nearest splits that do."""
    envs, rollouts, learners = len(roles.env), len(roles.rollout), len(roles.learner)
    together = envs + rollouts
    whole = f", groups of {group} whole" if group > 1 else ""
    step = slot_step(envs, rollouts, stages, group)
    fits = [e for e in range(1, together) if parallel % slot_step(e, together - e, stages, group) == 0 and e != envs]
    near = sorted(sorted(fits, key=lambda e: abs(e - envs))[:SPLITS_SHOWN])
    splits = ", or " + " or ".join(f"env {e} and rollout {together - e}" for e in near) if near else ""
    fewer = [s for s in (1, 2, 4, 8) if s < stages and parallel % slot_step(envs, rollouts, s, group) == 0]
    lower = f", or placement.stages: {fewer[-1]}" if fewer else ""
    numbers = multiples_near(max(parallel, learners * group), step)
    in_stages = f" in {stages} stages" if stages > 1 else ""
    rule = (
        f"{parallel} parallel episodes do not split over {envs} env ranks{in_stages} and {rollouts} rollout ranks{whole}. "
        f"Use {numbers}{splits}{lower}."
    )
    if parallel // group < learners:
        unit = "groups" if group > 1 else "parallel episodes"
        rule = f"{learners} learner ranks share {parallel // group} {unit}: too few. Use {numbers}, or fewer learner ranks."
    others = ("placement.env", "placement.rollout", "placement.stages", "ranks")
    return Clash("env.parallel", rule, others)
