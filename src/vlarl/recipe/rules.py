"""Owns the rules that tie several fields of a recipe together and need neither the machine nor the policy. Torch-free, pure.

Rules that need them are in `plan.compile`; both speak through `Clash`, so every mistake reads the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from vlarl.envs.libero import spec as libero
from vlarl.envs.maniskill import spec as maniskill
from vlarl.envs.robotwin import spec as robotwin
from vlarl.envs.tabletop import spec as tabletop
from vlarl.recipe.schema import Env, Grpo, Ppo, Recipe

# Named where one is not known.
SIMULATOR_TASKS = {
    "tabletop": tabletop.TASKS,
    "libero": libero.TASK_SETS,
    "maniskill": tuple(maniskill.INSTRUCTIONS),
    "robotwin": robotwin.TASKS,
}
SIMULATOR_VARIATIONS = {
    "tabletop": tabletop.VARIATIONS,
    "libero": libero.VARIATIONS,
    "maniskill": maniskill.VARIATIONS,
    "robotwin": robotwin.VARIATIONS,
}
SIMULATOR_REWARDS = {
    "tabletop": ("sparse", "shaped"),
    "libero": ("sparse",),
    "maniskill": ("sparse", "dense", "relative"),
    "robotwin": ("sparse",),
}
WITH_EXPERT = ("tabletop",)  # simulators whose scripted expert plays while it is cloned; others' experts are recorded first
ROLES = ("env", "rollout", "learner")
MAX_RANKS = 65536  # of one range: keeps a slip of the pen from filling the memory


@dataclass(frozen=True)
class Clash:
    """field: the one to blame, dotted. rule: what is wrong and what to do, full sentences. others: further fields that took part."""

    field: str
    rule: str
    others: tuple[str, ...] = ()


def sentence(clash: Clash, recipe: Recipe, origins: Mapping[str, str]) -> str:
    """`field = value (recipe line N): rule`. `origins` maps dotted fields to where they were written; others are defaults."""
    value: Any = recipe
    for part in clash.field.split("."):
        value = getattr(value, part)
    return f"{clash.field} = {show(value)} ({origins.get(clash.field, 'default')}): {clash.rule}"


def show(value: Any) -> str:
    """A value as one would write it in YAML, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(show(v) for v in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {show(v)}' for name, v in value.items())}}}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def line_order(text: str) -> tuple[int, str]:
    """Sort key: mistakes in the order in which they stand in the file."""
    found = re.search(r"line (\d+)", text)
    return (int(found.group(1)) if found else 10**6, text)


def nearest(value: str, known: tuple[str, ...]) -> str:
    """`Did you mean X?` or the list of what is known."""
    close = get_close_matches(str(value), known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."


def multiples_near(value: int, step: int) -> str:
    """`96 or 128`: the multiples of `step` around `value`, at least one step."""
    below, above = value // step * step, -(-value // step) * step
    return " or ".join(str(v) for v in sorted({below, above} - {0}))


def recipe_clashes(recipe: Recipe) -> list[Clash]:
    """Every broken rule among fields of the recipe alone."""
    return _env(recipe) + _algorithm(recipe) + _update(recipe) + _placement(recipe)


def _env(recipe: Recipe) -> list[Clash]:
    env, found = recipe.env, []
    known = SIMULATOR_TASKS[env.simulator]
    listed: list[str] = []
    for task in env.tasks:
        meant = _expand(env.simulator, task)
        if meant is None:
            found.append(Clash("env.tasks", f"{env.simulator} has no task {task!r}. {nearest(task, known)}", ("env.simulator",)))
            continue
        twice = next((one for one in meant if one in listed), None)
        if twice is not None:
            found.append(Clash("env.tasks", f"{twice!r} is listed twice. Every task is played equally often; list it once."))
        listed += meant
    if env.reward not in SIMULATOR_REWARDS[env.simulator]:
        rule = f"{env.simulator} has no such reward. Use {' or '.join(SIMULATOR_REWARDS[env.simulator])}."
        found.append(Clash("env.reward", rule, ("env.simulator",)))
    if env.simulator == "maniskill":
        found += _maniskill(env)
    if env.simulator == "robotwin":
        found += _robotwin(env)
    if env.simulator not in WITH_EXPERT and any(phase.data is None for phase in recipe.warmstart):
        rule = f"no expert of {env.simulator} plays while it is cloned. Record one first (vlarl record), and name the folder as `data`."
        found.append(Clash("warmstart", rule, ("env.simulator",)))
    if recipe.policy.unnorm_key is not None and any(phase.data is not None for phase in recipe.warmstart):
        rule = "a warm start on recorded episodes takes their statistics. Remove it."
        found.append(Clash("policy.unnorm_key", rule, ("warmstart",)))
    variations = SIMULATOR_VARIATIONS[env.simulator]
    if env.variation not in variations:
        found.append(
            Clash("env.variation", f"{env.simulator} has no such variation. {nearest(env.variation, variations)}", ("env.simulator",))
        )
    return found


def _expand(simulator: str, task: str) -> tuple[str, ...] | None:
    """The simulator's own names for what a recipe calls a task; None where it is unknown."""
    if simulator == "libero":
        return libero.expand(task)
    known = maniskill.is_task_id(task) if simulator == "maniskill" else task in SIMULATOR_TASKS[simulator]
    return (task,) if known else None


def _maniskill(env: Env) -> list[Clash]:
    found, said = [], env.maniskill.instructions
    if env.variation != "train" and env.tasks != (maniskill.PLATE_TASK,):
        rule = f"settings of the plate suite are played by {maniskill.PLATE_TASK}. Make it the only task, or set env.variation to train."
        found.append(Clash("env.variation", rule, ("env.tasks",)))
    if said and len(said) != len(env.tasks):
        rule = f"{len(said)} sentences for {len(env.tasks)} tasks. Give one per task, in their order, or none."
        found.append(Clash("env.maniskill.instructions", rule, ("env.tasks",)))
    if env.wrist_camera:
        found.append(Clash("env.wrist_camera", "ManiSkill's cameras are named. Set env.maniskill.cameras instead.", ("env.simulator",)))
    return found


def _robotwin(env: Env) -> list[Clash]:
    found, own = [], env.robotwin
    if env.wrist_camera:
        found.append(Clash("env.wrist_camera", "RoboTwin's cameras are named. Set env.robotwin.cameras instead.", ("env.simulator",)))
    if len(set(own.cameras)) < len(own.cameras):
        found.append(Clash("env.robotwin.cameras", "a camera is named twice. Name each once."))
    if own.planner == "mplib" and len(set(own.embodiment)) == 2:
        rule = "RoboTwin plans for two different robots with cuRobo alone. Set env.robotwin.planner to curobo, or name one robot twice."
        found.append(Clash("env.robotwin.embodiment", rule, ("env.robotwin.planner",)))
    if own.setup_seconds >= env.step_seconds:
        rule = f"a host is replaced after {env.step_seconds:g} s, before it could say what failed. Use less, or raise env.step_seconds."
        found.append(Clash("env.robotwin.setup_seconds", rule, ("env.step_seconds",)))
    return found


def _algorithm(recipe: Recipe) -> list[Clash]:
    algorithm, found = recipe.algorithm, []
    if algorithm.clip[0] >= 1:
        found.append(Clash("algorithm.clip", "the lower clip must be below 1, else the ratio is never clipped from below. Use about 0.2."))
    if isinstance(algorithm, Grpo):
        low, high = algorithm.filter
        if low >= high:
            found.append(Clash("algorithm.filter", "the lower success rate must be below the upper one, else every group is dropped."))
        parallel, group = recipe.env.parallel, algorithm.group_size
        if parallel % group:
            rule = (
                f"{parallel} parallel episodes do not split into groups of {group}. Set env.parallel to {multiples_near(parallel, group)}."
            )
            found.append(Clash("algorithm.group_size", rule, ("env.parallel",)))
        elif algorithm.episodes_per_update % parallel:
            fix = multiples_near(algorithm.episodes_per_update, parallel)
            rule = f"must be a multiple of env.parallel ({parallel}), so that every slot plays the same number of episodes. Use {fix}."
            found.append(Clash("algorithm.episodes_per_update", rule, ("env.parallel",)))
    if isinstance(algorithm, Ppo) and recipe.update.updates and algorithm.critic_warmup >= recipe.update.updates:
        rule = (
            f"the critic's warm-up would last all {recipe.update.updates} updates and the policy would never change. "
            f"Use at most {recipe.update.updates - 1}, or more update.updates."
        )
        found.append(Clash("algorithm.critic_warmup", rule, ("update.updates",)))
    return found


def _update(recipe: Recipe) -> list[Clash]:
    found = []
    if max(recipe.update.betas) >= 1:
        found.append(Clash("update.betas", "both must be below 1: Adam's averages would never move. Use 0.9 and 0.95."))
    if recipe.policy.lora is not None and recipe.policy.lora.targets == ():
        found.append(Clash("policy.lora.targets", "no module is named. Use all-linear, or list some."))
    if recipe.update.updates == 0 and not recipe.warmstart:
        found.append(Clash("update.updates", "nothing to do: no updates, and no `warmstart` phases. Set one of them.", ("warmstart",)))
    if recipe.update.features == "reuse" and "vision" not in recipe.policy.freeze:
        rule = "the vision towers learn, so their features change with every step. Add vision to policy.freeze, or use auto."
        found.append(Clash("update.features", rule, ("policy.freeze",)))
    if recipe.update.vision_scale != 1 and "vision" in recipe.policy.freeze:
        rule = "the vision towers do not learn: policy.freeze names vision. Remove it, or do not freeze them."
        found.append(Clash("update.vision_scale", rule, ("policy.freeze",)))
    return found


def _placement(recipe: Recipe) -> list[Clash]:
    placement, found = recipe.placement, []
    if placement.mode in ("auto", "collocated"):
        for name in ROLES:
            if getattr(placement, name) is not None:
                rule = f"ranks per role are for disaggregated and hybrid modes; this is {placement.mode}. Remove it, or change the mode."
                found.append(Clash(f"placement.{name}", rule, ("placement.mode",)))
    else:
        found += _roles(recipe)
    if placement.profile is not None and placement.mode != "auto":
        rule = f"costs are for mode auto to choose by; this is {placement.mode}. Remove it, or set placement.mode to auto."
        found.append(Clash("placement.profile", rule, ("placement.mode",)))
    if len(set(placement.offload)) < len(placement.offload) and not isinstance(placement.offload, str):
        found.append(Clash("placement.offload", "a part is listed twice, and leaves once. List each once."))
    if "reference" in placement.offload and recipe.algorithm.kl_coef == 0:
        rule = "there is no reference policy: algorithm.kl_coef is 0. Remove reference, or set algorithm.kl_coef."
        found.append(Clash("placement.offload", rule, ("algorithm.kl_coef",)))
    if recipe.env.parallel % placement.stages:
        parallel, stages = recipe.env.parallel, placement.stages
        rule = f"{parallel} parallel episodes do not split into {stages} stages. Set env.parallel to {multiples_near(parallel, stages)}."
        found.append(Clash("placement.stages", rule, ("env.parallel",)))
    return found


def _roles(recipe: Recipe) -> list[Clash]:
    """Ranks per role, as far as they can be judged without knowing how many ranks there are."""
    placement, found = recipe.placement, []
    if placement.mode == "hybrid" and placement.learner is not None:
        found.append(Clash("placement.learner", "in hybrid mode every rank learns. Remove it, or use disaggregated.", ("placement.mode",)))
    owner: dict[int, str] = {}
    for name in ROLES:
        text = getattr(placement, name)
        if name == "learner" and placement.mode == "hybrid" or text is None:
            continue
        chosen = parse_ranks(text)
        if chosen is None:
            found.append(Clash(f"placement.{name}", "expected a number of ranks, or ranks such as 0-3 or 0,2,4-7, each once."))
        elif not isinstance(chosen, int):
            taken = sorted(rank for rank in chosen if rank in owner)
            if taken:
                rule = f"rank {taken[0]} is listed under placement.{owner[taken[0]]} too, and can have one of the two roles only."
                found.append(Clash(f"placement.{name}", rule, (f"placement.{owner[taken[0]]}",)))
            owner |= dict.fromkeys(chosen, name)
    return found


def parse_ranks(text: int | str) -> int | tuple[int, ...] | None:
    """A number of ranks, or the ranks that `0,2,4-7` lists, ascending. None where it is neither or lists a rank twice."""
    if isinstance(text, int):
        return text
    if re.fullmatch(r"\s*\d+\s*", text):
        return int(text) or None
    ranks: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", part)
        if span is None:
            return None
        first, last = int(span[1]), int(span[2] or span[1])
        if last < first or last - first > MAX_RANKS:
            return None
        ranks += range(first, last + 1)
    return tuple(sorted(ranks)) if len(set(ranks)) == len(ranks) else None
