"""Owns the step from intent to numbers: recipe, cluster, policy and simulator give a PlacementPlan. Pure; all clashes are told at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

from vlarl.envs.spec import EnvSpec
from vlarl.errors import PlanError
from vlarl.plan.choose import choose, label, rule_of_thumb
from vlarl.plan.cluster import Cluster
from vlarl.plan.memory import Job, Sizes, estimate
from vlarl.plan.placement import PLAN_VERSION, MemoryRow, PlacementPlan, RankPlan, Residency, RolloutPlan, UpdatePlan, WorkerGroup
from vlarl.plan.profile import Profile, check_chunk
from vlarl.plan.residency import check, decide, place
from vlarl.plan.roles import Roles, assign, env_slots, policy_slots, sample_slots, stated_ranks
from vlarl.plan.rules import batch_clashes, cluster_clashes, fit_clashes, slot_clashes
from vlarl.policies.spec import PolicySpec
from vlarl.recipe.rules import line_order, sentence
from vlarl.recipe.schema import Grpo, Placement, Ppo, Recipe

CPU_RANKS = (1, 2, 4, 8)  # rank counts chosen from on a machine without a GPU
_Fitted = tuple[UpdatePlan, Residency, tuple[MemoryRow, ...]]
WORTH_A_THREAD = 0.1  # share of the shorter of simulation and inference that must disappear behind the other


def compile_plan(
    recipe: Recipe,
    cluster: Cluster,
    policy: PolicySpec,
    env: EnvSpec,
    job: Job = "train",
    origins: Mapping[str, str] | None = None,
    profile: Profile | None = None,
) -> PlacementPlan:
    """Everything derived. Raises PlanError with every rule that recipe, policy, simulator and cluster break together.

    origins: dotted field -> where it was written, for the messages. profile: costs that mode auto chooses by, and overlap.
    """
    if profile is not None and recipe.placement.mode == "auto":
        check_chunk(profile, policy.chunk, recipe.policy.checkpoint)
    recipe, reason = _with_mode(recipe, cluster, policy, env, job, profile)
    ranks = rank_count(recipe, cluster)
    roles, clashes = assign(recipe.placement, ranks, cluster.nodes)
    clashes += cluster_clashes(recipe, cluster, ranks) + fit_clashes(recipe, policy, env, job)
    if roles is not None:
        if job != "eval":
            samples = recipe.env.parallel * _chunks_per_slot(recipe, -(-env.horizon // policy.chunk))
            clashes += batch_clashes(recipe, roles, samples)
        clashes += slot_clashes(recipe, roles, job)
    if clashes:
        raise PlanError(_listed([sentence(c, recipe, origins or {}) for c in clashes]))
    assert roles is not None
    dtype = compute_dtype(recipe, cluster)
    rollout = _rollout_plan(recipe, policy, env, _overlap(recipe, env, roles, cluster, profile))
    rank_plans = _rank_plans(recipe, cluster, roles, rollout.group_size)
    update = _update_plan(recipe, rollout, rank_plans)
    kinds = _kinds_of_ranks(rank_plans, roles, dtype, cluster, _evaluation_slots(recipe, job, len(roles.learner)))
    capacity, host = _capacity(cluster, ranks)

    def fitted(update: UpdatePlan) -> _Fitted:
        rows = tuple(row for sizes in kinds for row in estimate(recipe, policy, env, rollout, update, sizes, job))
        residency = decide(recipe.placement.offload, rows, capacity, cluster.device)
        rows = place(rows, residency, cluster.device)
        check(rows, capacity, host, cluster.device_name, recipe.policy.lora is not None)
        return update, residency, rows

    update, residency, memory = _with_features(recipe, job, update, fitted)
    return PlacementPlan(
        version=PLAN_VERSION,
        name=recipe.name,
        mode=roles.mode,
        reason=f"{reason}; {_where(cluster, ranks)}",
        seed=recipe.seed,
        dtype=dtype,
        workers=WorkerGroup(cluster.nodes, ranks // cluster.nodes, "nccl" if cluster.device == "cuda" else "gloo"),
        ranks=rank_plans,
        rollout=rollout,
        update=update,
        memory=memory,
        equation=_equation(recipe, roles, rollout, update),
        capacity_bytes=capacity,
        host_bytes=host,
        residency=residency,
    )


def _with_mode(
    recipe: Recipe, cluster: Cluster, policy: PolicySpec, env: EnvSpec, job: Job, profile: Profile | None
) -> tuple[Recipe, str]:
    """The recipe with its placement decided, and why. Warm start and evaluation have no roles to share out: collocated."""
    wanted = recipe.placement
    if job != "train":
        collocated = Placement(mode="collocated", offload=wanted.offload)
        return replace(recipe, placement=collocated), "collocated: outside training every rank works alike"
    if wanted.mode != "auto":
        return recipe, f"{label(wanted)}, as the recipe asks"
    ranks = rank_count(recipe, cluster)
    if profile is None or ranks == 1:
        placement, reason = rule_of_thumb(ranks, wanted, cluster.device == "cuda" and not env.hosted("cuda"), policy.chunk)
        return replace(recipe, placement=placement), reason
    placement, reason = choose(
        ranks,
        wanted,
        lambda tried: compile_plan(replace(recipe, placement=tried), cluster, policy, env, job, profile=profile),
        profile,
    )
    return replace(recipe, placement=placement), reason


def rank_count(recipe: Recipe, cluster: Cluster) -> int:
    """Processes over all nodes: as the recipe says, else one per GPU, else (on a CPU) as the placement says, else as many as share the
    cores best: the largest power of two up to the cores and CPU_RANKS that splits the slots evenly. Small policies are made of small
    operations, which threads speed up less than ranks do.
    """
    if recipe.ranks is not None:
        return recipe.ranks
    if cluster.device == "cuda":
        return cluster.nodes * max(1, cluster.devices_per_node)
    stated = stated_ranks(recipe.placement)
    if stated is not None:
        return stated
    whole = recipe.placement.stages * (recipe.algorithm.group_size if isinstance(recipe.algorithm, Grpo) else 1)
    fitting = [r for r in CPU_RANKS if r * (recipe.threads or 1) <= cluster.cores and recipe.env.parallel % (r * whole) == 0]
    return cluster.nodes * max(fitting, default=1)


def compute_dtype(recipe: Recipe, cluster: Cluster) -> Literal["float32", "float64", "bfloat16"]:
    """auto: bfloat16 on GPUs; float32 on CPUs, where bfloat16 without matrix instructions is ten times slower."""
    if recipe.dtype == "auto":
        return "bfloat16" if cluster.device == "cuda" else "float32"
    return recipe.dtype


def _listed(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems\n" + "\n".join(f"  {p}" for p in sorted(problems, key=line_order))


# ---------------------------------------------------------------- numbers


def _chunks_per_slot(recipe: Recipe, chunks_per_episode: int) -> int:
    """Chunks that a slot plays per round of collecting, at most."""
    if isinstance(recipe.algorithm, Ppo):
        return recipe.algorithm.chunks_per_update
    return recipe.algorithm.episodes_per_update // recipe.env.parallel * chunks_per_episode


def _overlap(recipe: Recipe, env: EnvSpec, roles: Roles, cluster: Cluster, profile: Profile | None) -> bool:
    """Whether ranks that simulate and act do both at once: as the recipe says; by itself where it costs nothing or is known to pay."""
    wanted, stages = recipe.placement.overlap, recipe.placement.stages
    if wanted == "off" or stages == 1 or not set(roles.env) & set(roles.rollout):
        return False
    return wanted == "on" or env.hosted(cluster.device) or (profile is not None and profile.overlap >= WORTH_A_THREAD)


def _rollout_plan(recipe: Recipe, policy: PolicySpec, env: EnvSpec, overlap: bool) -> RolloutPlan:
    algorithm, parallel = recipe.algorithm, recipe.env.parallel
    ppo = isinstance(algorithm, Ppo)
    return RolloutPlan(
        parallel=parallel,
        stages=recipe.placement.stages,
        chunk_steps=algorithm.chunks_per_update if isinstance(algorithm, Ppo) else 0,
        episodes_per_slot=0 if isinstance(algorithm, Ppo) else algorithm.episodes_per_update // parallel,
        chunks_per_episode=-(-env.horizon // policy.chunk),
        group_size=1 if ppo else algorithm.group_size,  # type: ignore[union-attr]
        rounds=1 if ppo else 1 + algorithm.resample_rounds,  # type: ignore[union-attr]
        overlap=overlap,
    )


def _update_plan(recipe: Recipe, rollout: RolloutPlan, ranks: tuple[RankPlan, ...]) -> UpdatePlan:
    """A minibatch takes an even share of every slot's chunks, so a rank's part is at most slots x ceil(chunks / minibatches)."""
    chunks = _chunks_per_slot(recipe, rollout.chunks_per_episode) * rollout.rounds
    minibatches = recipe.update.minibatches
    rank_samples = max(r.sample_slots[1] - r.sample_slots[0] for r in ranks) * -(-chunks // minibatches)
    microbatch = min(recipe.update.microbatch, rank_samples)
    return UpdatePlan(
        samples=rollout.parallel * chunks,
        epochs=recipe.update.epochs,
        minibatches=minibatches,
        minibatch_samples=-(-rollout.parallel * chunks // minibatches),
        microbatch=microbatch,
        accumulation=-(-rank_samples // microbatch),
    )


def _with_features(recipe: Recipe, job: Job, update: UpdatePlan, fitted: Callable[[UpdatePlan], _Fitted]) -> _Fitted:
    """The plan for the memory, with the frozen towers' features kept where the recipe asks for it or, left to us, where they fit."""
    wanted = recipe.update.features
    if job != "train" or wanted == "recompute" or "vision" not in recipe.policy.freeze:
        return fitted(update)
    try:
        return fitted(replace(update, reuse_features=True))
    except PlanError:
        if wanted == "reuse":
            raise
        return fitted(update)


def _equation(recipe: Recipe, roles: Roles, rollout: RolloutPlan, update: UpdatePlan) -> str:
    named = "ranks" if roles.mode == "collocated" else "env ranks"
    slots = f"{named} ({len(roles.env)}) x slots ({rollout.parallel // len(roles.env)})"
    if isinstance(recipe.algorithm, Ppo):
        left = f"{slots} x chunks ({rollout.chunk_steps}) = {update.samples} samples"
    else:
        rounds = f"x rounds (<= {rollout.rounds}) " if rollout.rounds > 1 else ""
        left = (
            f"{slots} x episodes ({rollout.episodes_per_slot}) x chunks (<= {rollout.chunks_per_episode}) "
            f"{rounds}= at most {update.samples} samples "
            f"in {rollout.rounds * rollout.parallel * rollout.episodes_per_slot // rollout.group_size} groups of {rollout.group_size}"
        )
    rank_part = -(-update.minibatch_samples // len(roles.learner))
    learner = "per rank" if roles.mode == "collocated" else f"per learner rank ({len(roles.learner)})"
    passes = f"{update.accumulation} forward pass" + ("es" if update.accumulation > 1 else "")
    parts = f"{update.minibatches} minibatch" + ("es" if update.minibatches > 1 else "")
    right = f"{parts} of {update.minibatch_samples}; {learner} {rank_part}, in {passes} of <= {update.microbatch}"
    return f"{left} = {right}; epochs: {update.epochs}"


def _rank_plans(recipe: Recipe, cluster: Cluster, roles: Roles, group: int) -> tuple[RankPlan, ...]:
    """Every rank's device, threads, roles and ranges of global slots."""
    parallel = recipe.env.parallel
    ranks = max(roles.learner + roles.env + roles.rollout) + 1
    per_node = ranks // cluster.nodes
    threads = recipe.threads or max(1, cluster.cores // per_node)
    env, policy = env_slots(roles, parallel), policy_slots(roles, parallel)
    samples = env if roles.mode == "collocated" else sample_slots(roles, parallel, group)
    plans = []
    for rank in range(ranks):
        local = rank % per_node
        device = f"cuda:{local}" if cluster.device == "cuda" else "cpu"
        held = [part.get(rank, (0, 0)) for part in (env, policy, samples)]
        plans.append(RankPlan(rank, rank // per_node, local, device, threads, roles.of(rank), *held))
    return tuple(plans)


def _evaluation_slots(recipe: Recipe, job: Job, learners: int) -> int:
    """Episodes that a learner evaluates at once; 0 where nothing is evaluated."""
    if job == "sft" or (job == "train" and not recipe.eval.every):
        return 0
    return -(-min(recipe.eval.parallel or recipe.env.parallel, recipe.eval.episodes) // learners)


def _kinds_of_ranks(ranks: tuple[RankPlan, ...], roles: Roles, dtype: str, cluster: Cluster, evaluation_slots: int) -> list[Sizes]:
    """One entry for all ranks with the same roles, with the slots of the one that has most."""
    kinds: dict[tuple[str, ...], list[RankPlan]] = {}
    for rank in ranks:
        kinds.setdefault(rank.roles, []).append(rank)
    sizes = []
    for members in kinds.values():
        most = [max(held[1] - held[0] for held in part) for part in zip(*map(_held, members), strict=True)]
        name = "every rank" if len(kinds) == 1 else f"{', '.join(members[0].roles)} ({_ranges_text([m.rank for m in members])})"
        evaluated = evaluation_slots if "learner" in members[0].roles else 0
        sizes.append(Sizes(len(roles.learner), most[0], most[1], most[2], evaluated, dtype, cluster.device, name))
    return sizes


def _held(rank: RankPlan) -> tuple[tuple[int, int], ...]:
    return rank.slots, rank.policy_slots, rank.sample_slots


def _ranges_text(ranks: list[int]) -> str:
    """`rank 0-3, 8`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return "rank " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _where(cluster: Cluster, ranks: int) -> str:
    on = f"{ranks} rank{'s' if ranks > 1 else ''} on {cluster.device_name}"
    on += f" ({cluster.reason})" if cluster.reason else ""
    return "; ".join(filter(None, (on, crowding(cluster, ranks))))


def crowding(cluster: Cluster, ranks: int) -> str:
    """A remark on ranks that outnumber the cores of a CPU machine; "" where they do not. Results are the same, speed is not."""
    per_node = ranks // cluster.nodes
    if cluster.device != "cpu" or per_node <= cluster.cores:
        return ""
    return f"{per_node} ranks share {cluster.cores} core{'s' if cluster.cores > 1 else ''} and slow each other down"


def _capacity(cluster: Cluster, ranks: int) -> tuple[int | None, int | None]:
    """Memory of one device, and a rank's share of the host's beside it; on a CPU machine that share is the device's."""
    share = cluster.host_bytes // (ranks // cluster.nodes) or None
    return (cluster.device_bytes or None, share) if cluster.device == "cuda" else (share, None)
