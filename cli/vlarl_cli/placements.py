"""Owns the planner's tables on the command line: placements compared by prediction, the block to paste, prediction against a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

from vlarl.errors import PlanError
from vlarl.plan.choose import Candidate, candidates, compare
from vlarl.plan.cluster import CORES_PER_GPU, GPUS_PER_NODE, Cluster, discover
from vlarl.plan.compile import compile_plan, rank_count
from vlarl.plan.costs import predict
from vlarl.plan.placement import Phase, PlacementPlan
from vlarl.plan.profile import Profile, check_chunk
from vlarl.plan.specs import policy_spec, simulator_spec
from vlarl.recipe.load import LoadedRecipe
from vlarl.recipe.rules import show
from vlarl.recipe.schema import Placement, Recipe
from vlarl_cli import render

ROWS_SHOWN = 16


def imagined_cluster(devices: int) -> Cluster:
    """So many GPUs that need not be here, in nodes of eight where that works out. Their memory is unknown and not checked."""
    nodes = devices // GPUS_PER_NODE if devices % GPUS_PER_NODE == 0 else 1
    per_node = devices // nodes
    return Cluster(
        nodes=nodes,
        devices_per_node=per_node,
        device="cuda",
        device_name="GPU",
        cores=per_node * CORES_PER_GPU,
        reason=f"--devices {devices}; memory is not checked",
    )


def compared(recipe: Recipe, cluster: Cluster, profile: Profile, placements: list[Placement] | None = None) -> list[Candidate]:
    """Predictions for all sensible placements of a recipe (or for those given), fastest first."""
    policy, env = policy_spec(recipe), simulator_spec(recipe.env)

    def build(placement: Placement) -> PlacementPlan:
        return compile_plan(replace(recipe, placement=placement), cluster, policy, env, profile=profile)

    return compare(placements or candidates(rank_count(recipe, cluster), wanted=recipe.placement), build, profile)


def show_comparison(
    loaded: LoadedRecipe, devices: int | None, cluster: Cluster | None, profile: Profile, quiet: bool = False
) -> PlacementPlan:
    """Print the table and the winner's block (unless quiet); returns the winner's plan. Raises PlanError where nothing fits."""
    check_chunk(profile, policy_spec(loaded.recipe).chunk, loaded.recipe.policy.checkpoint)
    recipe = loaded.recipe if devices is None else replace(loaded.recipe, ranks=None, device="cuda")
    there = imagined_cluster(devices) if devices is not None else cluster or discover(recipe.device)
    rows = compared(recipe, there, profile)
    if rows[0].prediction is None:
        raise PlanError(f"No placement of {recipe.name} fits {rank_count(recipe, there)} ranks: {rows[0].refusal}")
    chosen = replace(recipe, placement=rows[0].placement)
    plan = compile_plan(chosen, there, policy_spec(recipe), simulator_spec(recipe.env), "train", loaded.origins, profile)
    if not quiet:
        _print_comparison(rows, rank_count(recipe, there), profile)
        render.note(block(rows[0].placement, plan.rollout.overlap))
    return plan


def _print_comparison(rows: list[Candidate], ranks: int, profile: Profile) -> None:
    fine = [row for row in rows if row.prediction is not None]
    render.note(f"costs: {profile.name} ({profile.source}): {profile.provenance.strip()}")
    render.candidates(fine[:ROWS_SHOWN], ranks)
    render.note(f"{len(fine)} placements fit and {len(rows) - len(fine)} do not; the {min(len(fine), ROWS_SHOWN)} fastest are shown.")
    render.note(f"winner, as predicted: {rows[0].label}")


def block(placement: Placement, overlap: bool) -> str:
    """The `placement:` line to paste into a recipe. overlap: what was decided where the recipe leaves it open."""
    placement = replace(placement, overlap="on") if overlap else placement
    fields = {name: getattr(placement, name) for name in ("mode", "stages", "env", "rollout", "learner")}
    fields |= {name: getattr(placement, name) for name in ("overlap", "offload") if getattr(placement, name) != "auto"}
    return "placement: {" + ", ".join(f"{name}: {show(value)}" for name, value in fields.items() if value is not None) + "}"


def against_prediction(plan: PlacementPlan, profile: Profile, run_dir: Path) -> str:
    """`predicted ..., measured ...` for a finished run; "" where it left no figures."""
    speeds = [row["rollout/frames_per_second"] for row in _metrics(run_dir) if row.get("rollout/frames_per_second")]
    if not speeds:
        return ""
    predicted, measured = predict(plan, profile).frames_per_second, median(speeds[1:] or speeds)  # the first update warms up
    return f"predicted {predicted:,.0f} frames/s, measured {measured:,.0f} ({measured / predicted - 1:+.0%})"


def memory_against_prediction(run_dir: Path) -> str:
    """Peak memory of a finished run, per phase, of the rank that used most; "" where it left no figures."""
    rows, parts = _metrics(run_dir), []
    for phase in get_args(Phase):
        measured = [row for row in rows if row.get(f"memory/measured_peak_bytes_{phase}")]
        if measured:
            peak = max(row[f"memory/measured_peak_bytes_{phase}"] for row in measured)
            predicted = measured[-1][f"memory/predicted_peak_bytes_{phase}"]
            expected, found = render.size(int(predicted)), render.size(int(peak))
            parts.append(f"{phase} {expected} predicted, {found} measured ({peak / predicted - 1:+.0%})")
    return f"peak memory per rank: {'; '.join(parts)}" if parts else ""


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
