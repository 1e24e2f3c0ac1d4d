"""Owns what recipe, policy, simulator and machine must have in common, memory apart; each clash says what would fit. Pure."""

from __future__ import annotations

from vlarl.envs.spec import EnvSpec
from vlarl.plan.cluster import Cluster
from vlarl.plan.memory import Job
from vlarl.plan.roles import Roles, slots_fit, split_clash
from vlarl.policies.spec import PolicySpec
from vlarl.recipe.rules import Clash, multiples_near
from vlarl.recipe.schema import Grpo, Recipe


def cluster_clashes(recipe: Recipe, cluster: Cluster, ranks: int) -> list[Clash]:
    found = []
    if cluster.device == "cuda" and ranks > cluster.nodes * cluster.devices_per_node:
        gpus = cluster.nodes * cluster.devices_per_node
        there = "there is 1 GPU" if gpus == 1 else f"there are {gpus} GPUs"
        found.append(Clash("ranks", f"{there}, and a rank needs one of its own. Use at most {gpus}, or device: cpu.", ("device",)))
    if ranks % cluster.nodes:
        found.append(Clash("ranks", f"does not spread evenly over {cluster.nodes} nodes. Use {multiples_near(ranks, cluster.nodes)}."))
    per_node = -(-ranks // cluster.nodes)
    if recipe.threads and recipe.threads * per_node > cluster.cores:
        rule = (
            f"{per_node} ranks of {recipe.threads} threads want {per_node * recipe.threads} cores and there are {cluster.cores}; "
            f"oversubscribed cores are ten times slower. Use at most {max(1, cluster.cores // per_node)}, or null."
        )
        found.append(Clash("threads", rule, ("ranks",)))
    return found


def slot_clashes(recipe: Recipe, roles: Roles, job: Job) -> list[Clash]:
    """Slots split evenly over env ranks and stages and over rollout ranks; a GRPO group stays on one rank of each role, in one stage."""
    parallel, stages, ranks = recipe.env.parallel, recipe.placement.stages, len(roles.env)
    group = recipe.algorithm.group_size if isinstance(recipe.algorithm, Grpo) and job != "eval" else 1
    found = []
    if roles.mode != "collocated":
        if not slots_fit(roles, parallel, stages, group):
            found.append(split_clash(roles, parallel, stages, group))
    elif parallel % ranks:
        rule = (
            f"{parallel} parallel episodes do not split over {ranks} ranks. Use {multiples_near(parallel, ranks * stages * group)}"
            f"{_fewer_ranks(recipe, ranks, group)}."
        )
        found.append(Clash("env.parallel", rule, ("ranks",)))
    elif (parallel // ranks) % stages:
        fits = [s for s in range(1, min(parallel // ranks, 16) + 1) if (parallel // ranks) % (s * group) == 0]
        rule = (
            f"{parallel} parallel envs on {ranks} rank{'s' if ranks > 1 else ''} do not split into {stages} stages. "
            f"Use {_either(fits)}, or set env.parallel to {multiples_near(parallel, ranks * stages * group)}"
            f"{_fewer_ranks(recipe, ranks, group)}."
        )
        found.append(Clash("placement.stages", rule, ("env.parallel", "ranks")))
    elif group > 1 and (parallel // ranks // stages) % group:
        part = parallel // ranks // stages
        fits = [g for g in range(2, part + 1) if part % g == 0][-4:]
        rule = (
            f"a group stays on one rank and in one stage, and each of {ranks} x {stages} holds {part} of {parallel} parallel episodes. "
            f"Use {_either(fits) if fits else 'fewer ranks or stages'}, "
            f"or set env.parallel to {multiples_near(parallel, ranks * stages * group)}{_fewer_ranks(recipe, ranks, group)}."
        )
        found.append(Clash("algorithm.group_size", rule, ("env.parallel", "ranks")))
    if recipe.eval.parallel and recipe.eval.parallel % len(roles.learner):
        learners = len(roles.learner)
        rule = f"does not split over {learners} ranks. Use {multiples_near(recipe.eval.parallel, learners)}, or null."
        found.append(Clash("eval.parallel", rule, ("ranks",)))
    return found


def fit_clashes(recipe: Recipe, policy: PolicySpec, env: EnvSpec, job: Job) -> list[Clash]:
    """Policy against simulator."""
    checkpoint, found = recipe.policy.checkpoint, []
    if recipe.policy.kind not in (None, policy.kind):
        found.append(Clash("policy.kind", f"{checkpoint} holds a policy of kind {policy.kind}. Set policy.kind to {policy.kind}."))
    if policy.head == "l1" and job != "eval":
        rule = "its L1 head gives actions without probabilities, so it can be evaluated, not trained. Use a checkpoint with action tokens."
        found.append(Clash("policy.checkpoint", rule))
    if policy.action_dim != env.action_dim:
        rule = (
            f"it emits {policy.action_dim} numbers per action and {env.name} takes {env.action_dim}. Use a policy trained for {env.name}."
        )
        found.append(Clash("policy.checkpoint", rule, ("env.simulator",)))
    if policy.views != env.views:
        rule = f"{env.name} gives {_views(env.views)} and the policy {checkpoint} takes {_views(policy.views)}. "
        if env.name in ("maniskill", "robotwin"):
            found.append(Clash(f"env.{env.name}.cameras", rule + "Name as many cameras.", ("policy.checkpoint",)))
        else:
            rule += f"Set env.wrist_camera to {'true' if policy.views > 1 else 'false'}."
            found.append(Clash("env.wrist_camera", rule, ("policy.checkpoint",)))
    if policy.proprio_dim not in (0, env.state_dim):
        rule = (
            f"it reads a state of {policy.proprio_dim} numbers and {env.name} gives {env.state_dim}. Use a policy trained for {env.name}."
        )
        found.append(Clash("policy.checkpoint", rule, ("env.simulator",)))
    if min(env.height, env.width) < policy.image_size:
        rule = f"the policy {checkpoint} looks at {policy.image_size} pixels; smaller frames would be blown up. Use {policy.image_size}."
        found.append(Clash("env.image_size", rule, ("policy.checkpoint",)))
    if policy.chunk > env.horizon:
        rule = f"shorter than one chunk of the policy ({policy.chunk} actions). Use at least {policy.chunk}."
        found.append(Clash("env.horizon", rule, ("policy.checkpoint",)))
    return found


def batch_clashes(recipe: Recipe, roles: Roles, samples: int) -> list[Clash]:
    found, ranks, fewer = [], len(roles.learner), 0
    if roles.mode == "collocated":  # more ranks than split the slots are told of by `slot_clashes`; minibatches are not to blame for them
        group = recipe.algorithm.group_size if isinstance(recipe.algorithm, Grpo) else 1
        ranks = _fitting_ranks(recipe, ranks, group) or ranks
        fewer = _fitting_ranks(recipe, samples // recipe.update.minibatches, group)
    limit = max(1, samples // ranks)
    if recipe.update.minibatches > limit:
        rule = f"an update has {samples} samples on {ranks} ranks, so some minibatches would be empty. Use at most {limit}"
        rule += f", or fewer ranks: at most {fewer}." if fewer else "."
        found.append(Clash("update.minibatches", rule, ("env.parallel",)))
    everyone = len({*roles.env, *roles.rollout, *roles.learner})
    for phase in recipe.warmstart:
        if phase.batch % everyone:  # ranks of all roles clone
            rule = f"a phase's batch of {phase.batch} does not split over {everyone} ranks. Use {multiples_near(phase.batch, everyone)}."
            found.append(Clash("warmstart", rule, ("ranks",)))
    return found


def _fitting_ranks(recipe: Recipe, ranks: int, group: int) -> int:
    """The most ranks, up to so many, over which slots, stages and groups split; 0 where none will do."""
    unit = recipe.placement.stages * group
    return max((r for r in range(1, ranks + 1) if recipe.env.parallel % (r * unit) == 0), default=0)


def _fewer_ranks(recipe: Recipe, ranks: int, group: int) -> str:
    """The way out for whoever asked for too many."""
    fitting = _fitting_ranks(recipe, ranks, group)
    return f", or fewer ranks: at most {fitting}" if fitting else ""


def _views(count: int) -> str:
    return f"{count} camera view" + ("s" if count > 1 else "")


def _either(numbers: list[int]) -> str:
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
