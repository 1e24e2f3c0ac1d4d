"""What leaves the device: decisions by hand, their tables, and what is refused even so."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from vlarl.envs.spec import EnvSpec
from vlarl.errors import PlanError, RecipeError
from vlarl.plan.cluster import Cluster
from vlarl.plan.compile import compile_plan
from vlarl.plan.placement import MemoryRow, PlacementPlan, Residency, phase_bytes
from vlarl.plan.residency import check, decide, place
from vlarl.policies.spec import PolicySpec
from vlarl.recipe.load import load_recipe
from vlarl.recipe.schema import Env, Eval, Grpo, Lora, Part, Placement, Policy, Ppo, Recipe, Update
from vlarl_cli.placements import block, memory_against_prediction

GIB = 2**30
OPENVLA = PolicySpec("openvla-oft", 224, 1, 8, 7, 0, "tabletop", 7_500_000_000, 4096, 32, 300)
ENV = EnvSpec("tabletop", ("put",), 1, 224, 224, 8, 7, 48)
RECIPE = Recipe(
    name="a",
    env=Env(parallel=16),
    policy=Policy(checkpoint="x", lora=Lora()),
    algorithm=Ppo(chunks_per_update=4),
    update=Update(microbatch=2, activation_checkpointing=True),
)
DEBUG = Path(__file__).parents[2] / "recipes" / "debug.yaml"


def gpus(count: int, gib: int, host_gib: int = 1024) -> Cluster:
    return Cluster(devices_per_node=count, device="cuda", device_name="GPU", cores=64, device_bytes=gib * GIB, host_bytes=host_gib * GIB)


def learner(moments: int, reference: int, weights: int, acting: int, learning: int) -> tuple[MemoryRow, ...]:
    """One kind of rank, sizes in GiB: what is held, and what either phase needs besides."""
    held: tuple[tuple[str, int, Part], ...] = (
        ("moments", moments, "optimizer"),
        ("reference", reference, "reference"),
        ("weights", weights, "weights"),
    )
    rollout = [MemoryRow("rollout", name, "device", size * GIB, part=part) for name, size, part in held]
    update = [replace(row, phase="update", part=None) for row in rollout]
    rollout.append(MemoryRow("rollout", "policy gathered for acting", "device", acting * GIB))
    update.append(MemoryRow("update", "activations of 2 samples", "device", learning * GIB))
    return (*rollout, *update)


# 0.92 of 100 GiB may be used: 92. All of it: 20 + 10 + 30 + acting.
@pytest.mark.parametrize(
    ("acting", "away"),
    [
        (32, ()),  # 92 fit
        (33, ("reference",)),  # 93 - 10: the least that helps
        (43, ("optimizer",)),  # 103 - 10 is 93 still; 103 - 20
        (53, ("weights",)),  # 113 - 20 is 93; 113 - 30, in one part rather than two
        (63, ("reference", "weights")),  # 123 - 30 is 93; 123 - 40
        (73, ("optimizer", "weights")),
        (83, ("optimizer", "reference", "weights")),
        (93, ("optimizer", "reference", "weights")),  # too much, and refused later
    ],
)
def test_auto_moves_the_fewest_bytes_that_suffice(acting: int, away: tuple[Part, ...]) -> None:
    rows = learner(20, 10, 30, acting, 1)
    residency = decide("auto", rows, 100 * GIB, "cuda")
    assert (residency.rollout, residency.evaluation, residency.update) == (away, (), ())
    if away:
        assert residency.reason == f"with everything on the device: rollout {60 + acting}.0 GiB, of 92.0 GiB"


def test_every_kind_of_rank_must_fit() -> None:
    small = learner(1, 1, 1, 1, 1)
    large = tuple(replace(row, ranks="rank 1") for row in learner(20, 10, 30, 43, 1))
    assert decide("auto", small + large, 100 * GIB, "cuda").rollout == ("optimizer",)


def test_when_nothing_is_to_be_decided() -> None:
    rows = learner(20, 10, 30, 93, 1)
    assert decide("none", rows, 100 * GIB, "cuda").rollout == ()
    assert decide("auto", rows, 100 * GIB, "cpu").rollout == ()  # the host's memory is the device's
    assert decide("auto", rows, None, "cuda").rollout == ()
    assert decide(("weights", "optimizer"), rows, None, "cpu") == Residency(("optimizer", "weights"), reason="as the recipe asks")
    without = tuple(row for row in rows if row.part != "optimizer")
    assert decide(("optimizer",), without, 100 * GIB, "cuda").rollout == ()


def test_the_table_after_a_decision() -> None:
    """Away from the device while acting; the pinned copy stays, rounded up to at most twice the size."""
    rows = learner(20, 10, 30, 43, 1)
    residency = Residency(("optimizer",))
    placed = place(rows, residency, "cuda")
    assert phase_bytes(placed, "rollout") == (10 + 30 + 43) * GIB
    assert phase_bytes(placed, "update") == (20 + 10 + 30 + 1) * GIB
    assert [phase_bytes(placed, phase, host=True) for phase in ("rollout", "update")] == [40 * GIB, 40 * GIB]
    on_cpu = place(rows, residency, "cpu")  # nothing is gained there
    assert [phase_bytes(on_cpu, phase) for phase in ("rollout", "update")] == [(60 + 43) * GIB, (60 + 1 + 20) * GIB]
    assert place(rows, Residency(), "cuda") == rows


def test_refusals_name_the_memory_that_is_lacking() -> None:
    rows = place(learner(20, 10, 30, 43, 1), Residency(("optimizer",)), "cuda")
    check(rows, 100 * GIB, 50 * GIB, "GPU", lora=False)
    with pytest.raises(PlanError, match=r"rollout phase needs about 40\.0 GiB per rank, moments: host copy .* the host has 40\.0 GiB"):
        check(rows, 100 * GIB, 40 * GIB, "GPU", lora=False)
    with pytest.raises(PlanError, match=r"rollout phase needs about 83\.0 GiB per rank, policy gathered .* GPU has 80\.0 GiB"):
        check(rows, 80 * GIB, None, "GPU", lora=False)
    with pytest.raises(PlanError) as refused:
        check(rows, 50 * GIB, 39 * GIB, "GPU", lora=False)
    phases = (("rollout", 83.0), ("update", 61.0), ("rollout", 40.0), ("update", 40.0))
    named = [f"{phase} phase needs about {size} GiB" for phase, size in phases]
    assert [text in line for text, line in zip(named, refused.value.message.splitlines(), strict=True)] == [True] * 4
    assert "Lower update.microbatch" not in refused.value.hint and "Use GPUs with more memory" in refused.value.hint


def plan_of(recipe: Recipe, cluster: Cluster) -> PlacementPlan:
    return compile_plan(recipe, cluster, OPENVLA, ENV)


def test_openvla_with_adapters_on_gpus_of_three_sizes() -> None:
    """7.5 billion frozen weights are 14.0 GiB, and the copy that acts as much: together 28 and more, against 0.92 of 80, 30 and 16 GiB."""
    assert plan_of(RECIPE, gpus(1, 80)).residency == Residency(reason="nothing leaves the device: everything fits at once")
    tight = plan_of(RECIPE, gpus(1, 30))
    assert (tight.residency.rollout, tight.residency.update) == (("weights",), ("gradients",))
    rows = {(row.phase, row.component): row for row in tight.memory}
    assert ("rollout", "weights, sharded") not in rows
    adapters = 32 * 32 * 7 * 3 * 4096  # in float32, on top of bfloat16
    assert rows["update", "weights, sharded"].bytes == 15_000_000_000 + 4 * adapters
    assert rows["update", "weights, sharded: host copy"].bytes == 2 * (15_000_000_000 + 4 * adapters)
    assert rows["update", "weights, sharded: host copy"].where == "host"
    assert {rows[phase, "rollout buffer (frames as uint8)"].where for phase in ("rollout", "update")} == {"host"}
    assert phase_bytes(tight.memory, "rollout") <= 0.92 * 30 * GIB
    with pytest.raises(PlanError, match="The rollout phase needs about .* policy gathered for acting most of all"):
        plan_of(RECIPE, gpus(1, 16))
    with pytest.raises(PlanError, match="host copy most of all .* and the host has 30.0 GiB per rank"):
        plan_of(RECIPE, gpus(1, 30, host_gib=30))


def test_gradients_are_kept_whole_between_passes_where_there_is_room() -> None:
    name = "the same, kept whole between passes"
    rows = {row.component: row.bytes for row in plan_of(RECIPE, gpus(1, 80)).memory if row.phase == "update"}
    # Two of 32 layers are gathered anyway; adapters of rank 32 have fewer gradients than those two layers.
    assert rows[name] == (7_500_000_000 - 468_750_000) * 2
    assert rows["gradients, sharded"] == 32 * 32 * 7 * 3 * 4096 * 4
    one_pass = replace(RECIPE, update=replace(RECIPE.update, microbatch=16))
    assert name not in {row.component for row in plan_of(one_pass, gpus(1, 80)).memory}
    tight = plan_of(RECIPE, gpus(1, 30))
    assert not {row.component for row in tight.memory} & {name, f"{name}: host copy"}


def test_a_reference_policy_and_evaluation_are_counted() -> None:
    recipe = replace(RECIPE, algorithm=replace(RECIPE.algorithm, kl_coef=0.1), eval=Eval(every=1, episodes=8))
    plan = plan_of(recipe, gpus(1, 46))
    # Three times 14.0 GiB and more are above 0.92 of 46: while the policy acts, the reference waits on the host.
    assert plan.residency.rollout == plan.residency.evaluation == ("reference",)
    assert "reference policy, sharded" in {row.component for row in plan.memory if row.phase == "update"}
    evaluation = {row.component: row.bytes for row in plan.memory if row.phase == "evaluation"}
    assert evaluation["camera frames being drawn"] == 8 * 224 * 224 * 64  # eight episodes, not sixteen
    assert {row.phase for row in plan_of(RECIPE, gpus(1, 80)).memory} == {"rollout", "update"}


def test_only_ranks_that_act_with_a_copy_do_without_their_weights() -> None:
    hybrid = Placement(mode="hybrid", env="1", rollout="1", offload=("weights",))
    plan = plan_of(replace(RECIPE, placement=hybrid), gpus(2, 80))
    masters = {row.ranks for row in plan.memory if row.phase == "rollout" and row.component == "weights, sharded"}
    copies = {row.ranks for row in plan.memory if row.component.endswith("host copy")}
    assert masters == {"env, learner (rank 0)"} and copies == {"rollout, learner (rank 1)"}


def test_the_recipes_word_is_kept_by_every_mode() -> None:
    wanted = Placement(offload=("optimizer",))
    assert plan_of(replace(RECIPE, placement=wanted), gpus(2, 80)).residency.rollout == ("optimizer",)
    assert block(replace(wanted, mode="collocated"), False) == "placement: {mode: collocated, stages: 1, offload: [optimizer]}"
    assert block(Placement(mode="collocated"), False) == "placement: {mode: collocated, stages: 1}"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[optimizer, optimizer]", "placement.offload = [optimizer, optimizer] (override): a part is listed twice"),
        ("[reference]", "there is no reference policy: algorithm.kl_coef is 0"),
        ("[moments]", "expected auto or none, or a list, each entry optimizer, reference, weights or gradients, not empty."),
        ("[]", "not empty"),
        ("nothing", "expected auto or none"),
    ],
)
def test_mistakes(value: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEBUG, [f"placement.offload={value}"])
    assert says in caught.value.message
    fine = load_recipe(DEBUG, ["placement.offload=[reference, weights]", "algorithm.kl_coef=0.1"])
    assert fine.placement.offload == ("reference", "weights")


def test_grpo_has_a_reference_too() -> None:
    recipe = replace(RECIPE, algorithm=Grpo(group_size=8, episodes_per_update=16, kl_coef=0.1))
    assert "reference policy, sharded" in {row.component for row in plan_of(recipe, gpus(2, 80)).memory}


def test_a_run_ends_with_predicted_against_measured(tmp_path: Path) -> None:
    def row(phase: str, predicted: int, measured: int) -> dict[str, int]:
        return {f"memory/predicted_peak_bytes_{phase}": predicted * GIB, f"memory/measured_peak_bytes_{phase}": measured * GIB}

    assert memory_against_prediction(tmp_path) == ""
    rows = [row("evaluation", 8, 9), row("rollout", 4, 2) | row("update", 10, 6), row("rollout", 4, 3) | row("update", 10, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert memory_against_prediction(tmp_path) == (
        "peak memory per rank: rollout 4.0 GiB predicted, 3.0 GiB measured (-25%); "
        "update 10.0 GiB predicted, 6.0 GiB measured (-40%); evaluation 8.0 GiB predicted, 9.0 GiB measured (+12%)"
    )


def test_features_are_kept_where_they_fit_and_where_the_recipe_insists() -> None:
    """7B: 256 patches of 2176 numbers of 2 bytes, 1.1 MB per sample; 16 slots, 4 chunks and a spare: 80 samples."""
    openvla = replace(OPENVLA, patches=256, vision_width=2176)
    recipe = replace(RECIPE, policy=replace(RECIPE.policy, freeze=("vision",)))

    def plan(cluster: Cluster, features: Literal["auto", "reuse", "recompute"]) -> PlacementPlan:
        return compile_plan(replace(recipe, update=replace(recipe.update, features=features)), cluster, openvla, ENV)

    roomy, tight = gpus(1, 80, 64), gpus(1, 8000, 20)
    kept = plan(roomy, "auto")
    rows = {row.phase: row for row in kept.memory if row.component.startswith("frozen towers' features")}
    assert kept.update.reuse_features and {row.bytes for row in rows.values()} == {80 * 256 * 2176 * 2}
    assert set(rows) == {"rollout", "update"} and {row.where for row in rows.values()} == {"host"}
    assert not plan(roomy, "recompute").update.reuse_features and not plan_of(RECIPE, roomy).update.reuse_features
    recipe = replace(recipe, env=replace(recipe.env, parallel=4096))
    assert not plan(tight, "auto").update.reuse_features
    with pytest.raises(PlanError, match="frozen towers' features, kept for the update most of all .21.2 GiB") as caught:
        plan(tight, "reuse")
    assert caught.value.hint == "Set update.features to recompute."
