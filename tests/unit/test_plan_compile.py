"""The plan's arithmetic by hand, its refusals, and every shipped recipe on machines of several sizes."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlarl import serial
from vlarl.envs.spec import EnvSpec
from vlarl.errors import PlanError
from vlarl.plan.cluster import Cluster
from vlarl.plan.compile import compile_plan, rank_count
from vlarl.plan.memory import DRAWING, checkpoint_bytes
from vlarl.plan.placement import PlacementPlan, phase_bytes
from vlarl.plan.specs import policy_spec, simulator_spec
from vlarl.policies.published import PUBLISHED, ROBOTWIN_TASKS
from vlarl.policies.spec import PolicySpec
from vlarl.recipe.load import load_recipe
from vlarl.recipe.schema import Env, Eval, Grpo, Lora, Placement, Policy, Ppo, Recipe, Update, Warmstart
from vlarl.recipe.simulators import Libero, Maniskill

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
PUBLISHED_RUNS = [path for path in SHIPPED if load_recipe(path, []).policy.checkpoint in PUBLISHED]
RECIPES = [path for path in SHIPPED if path not in PUBLISHED_RUNS]
POLICY = PolicySpec("openvla-oft", 64, 1, 4, 7, 0, "tabletop", 1_000_000, 96, 3, 68)
ENV = EnvSpec("tabletop", ("put",), 1, 64, 64, 8, 7, 48)
LAPTOP = Cluster(cores=8, host_bytes=16 * 2**30, reason="test")
RECIPE = Recipe(name="a", policy=Policy(checkpoint="scratch:tiny"), algorithm=Ppo(chunks_per_update=12), update=Update(minibatches=4))


def gpus(count: int, nodes: int = 1, gib: int = 80) -> Cluster:
    memory = {"device_bytes": gib * 2**30, "host_bytes": 2**40}
    return Cluster(nodes=nodes, devices_per_node=count, device="cuda", device_name="H100", cores=64, **memory)


def with_(recipe: Recipe = RECIPE, **changes: Any) -> Recipe:
    return replace(recipe, **changes)


@pytest.mark.parametrize(
    ("cores", "parallel", "algorithm", "ranks"),
    [(2, 128, Ppo(), 2), (1, 128, Ppo(), 1), (6, 128, Ppo(), 4), (64, 128, Ppo(), 8), (8, 6, Ppo(), 2), (8, 48, Grpo(group_size=8), 2)],
)
def test_a_cpu_is_shared_out_among_ranks(cores: int, parallel: int, algorithm: Ppo | Grpo, ranks: int) -> None:
    """The largest of 1, 2, 4, 8 within the cores that splits the slots, groups whole."""
    recipe = with_(env=Env(parallel=parallel), algorithm=algorithm)
    assert rank_count(recipe, replace(LAPTOP, cores=cores)) == ranks


def test_more_ranks_than_cores_are_remarked_on() -> None:
    two = replace(LAPTOP, cores=2)
    assert compile_plan(with_(ranks=4), two, POLICY, ENV).reason.endswith("; 4 ranks share 2 cores and slow each other down")
    assert "share" not in compile_plan(with_(ranks=2), two, POLICY, ENV).reason
    assert "share" not in compile_plan(with_(ranks=4), replace(gpus(4), cores=2), POLICY, ENV).reason


def test_ppo_arithmetic() -> None:
    plan = compile_plan(with_(ranks=2), LAPTOP, POLICY, ENV)
    # 64 slots x 12 chunks = 768 samples; 4 minibatches of 192; a rank has 32 slots x 3 chunks = 96 of each, one pass of at most 128.
    assert plan.update.samples == 768
    assert plan.update.minibatch_samples == 192
    assert (plan.update.microbatch, plan.update.accumulation) == (96, 1)
    assert (plan.rollout.chunk_steps, plan.rollout.episodes_per_slot, plan.rollout.group_size) == (12, 0, 1)
    assert [r.slots for r in plan.ranks] == [(0, 32), (32, 64)]
    assert [r.threads for r in plan.ranks] == [4, 4]
    assert (plan.dtype, plan.workers.backend, plan.mode) == ("float32", "gloo", "collocated")


def test_a_slots_chunks_that_do_not_divide_are_rounded_up_per_slot() -> None:
    plan = compile_plan(with_(update=Update(minibatches=5, microbatch=50), ranks=1), LAPTOP, POLICY, ENV)
    # 12 chunks in 5 parts: at most 3 of a slot; 64 x 3 = 192 samples in passes of 50 -> 4.
    assert plan.update.minibatch_samples == 154  # ceil(768 / 5)
    assert plan.update.accumulation == 4


def test_grpo_arithmetic() -> None:
    recipe = with_(algorithm=Grpo(group_size=8, episodes_per_update=256), ranks=4)
    plan = compile_plan(recipe, LAPTOP, POLICY, replace(ENV, horizon=50))
    # horizon 50 in chunks of 4 -> 13; 256 episodes over 64 slots -> 4; 64 x 4 x 13 samples at most.
    assert (plan.rollout.chunks_per_episode, plan.rollout.episodes_per_slot) == (13, 4)
    assert plan.update.samples == 3328
    assert plan.rollout.group_size == 8
    thrice = compile_plan(replace(recipe, algorithm=replace(recipe.algorithm, resample_rounds=2)), LAPTOP, POLICY, replace(ENV, horizon=50))
    assert thrice.update.samples == 3 * 3328 and "x rounds (<= 3)" in thrice.equation
    once, three = (sum(row.bytes for row in p.memory if "buffer" in row.component) for p in (plan, thrice))
    assert three == 3 * once


def test_gpus_and_nodes() -> None:
    plan = compile_plan(with_(), gpus(2, nodes=2), POLICY, ENV)
    assert [(r.rank, r.node, r.local_rank, r.device) for r in plan.ranks] == [
        (0, 0, 0, "cuda:0"), (1, 0, 1, "cuda:1"), (2, 1, 0, "cuda:0"), (3, 1, 1, "cuda:1"),
    ]  # fmt: skip
    assert (plan.dtype, plan.workers.backend, plan.workers.ranks_per_node) == ("bfloat16", "nccl", 2)


@pytest.mark.parametrize(
    ("changes", "policy", "says"),
    [
        ({"ranks": 3}, {}, "64 parallel episodes do not split over 3 ranks. Use 63 or 66, or fewer ranks: at most 2."),
        (
            {"placement": Placement(stages=3)},
            {},
            "placement.stages = 3 (recipe line 9): 64 parallel envs on 1 rank do not split into 3 stages. "
            "Use 1, 2, 4, 8 or 16, or set env.parallel to 63 or 66.",
        ),
        ({"algorithm": Grpo(group_size=8), "ranks": 16}, {}, "algorithm.group_size = 8 (default): a group stays on one rank"),
        ({"placement": Placement(mode="hybrid"), "ranks": 1}, {}, "placement.mode = hybrid (default): needs at least 2 ranks"),
        ({"threads": 9}, {}, "want 9 cores and there are 8"),
        ({"eval": Eval(parallel=5), "ranks": 2}, {}, "eval.parallel = 5 (default): does not split over 2 ranks. Use 4 or 6, or null."),
        ({"update": Update(minibatches=769), "ranks": 1}, {}, "Use at most 768."),
        ({"warmstart": (Warmstart(steps=1, batch=3),), "ranks": 2}, {}, "a phase's batch of 3 does not split over 2 ranks."),
        (
            {"warmstart": (Warmstart(steps=1, batch=64),), "ranks": 3, "placement": Placement(mode="disaggregated")},
            {},
            "a phase's batch of 64 does not split over 3 ranks. Use 63 or 66.",
        ),
        ({}, {"action_dim": 14}, "it emits 14 numbers per action and tabletop takes 7"),
        ({}, {"views": 2}, "Set env.wrist_camera to true."),
        ({}, {"proprio_dim": 9}, "it reads a state of 9 numbers and tabletop gives 8"),
        ({}, {"image_size": 224}, "env.image_size = 64 (default): the policy scratch:tiny looks at 224 pixels"),
        ({}, {"chunk": 50}, "env.horizon = 48 (default): shorter than one chunk"),
        ({"policy": Policy(kind="openvla-oft", checkpoint="x")}, {"kind": "openvla"}, "x holds a policy of kind openvla"),
    ],
)
def test_refusals(changes: dict[str, Any], policy: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        compile_plan(with_(**changes), LAPTOP, replace(POLICY, **policy), ENV, "train", {"placement.stages": "recipe line 9"})
    assert says in caught.value.message


def test_all_clashes_are_reported_at_once() -> None:
    with pytest.raises(PlanError, match="3 problems"):
        compile_plan(with_(ranks=3), LAPTOP, replace(POLICY, action_dim=14, views=2), ENV)


def test_more_ranks_than_gpus() -> None:
    with pytest.raises(PlanError, match="there are 2 GPUs"):
        compile_plan(with_(ranks=4), gpus(2), POLICY, ENV)


def test_memory_refusal_names_the_largest_part_and_a_remedy() -> None:
    openvla = replace(POLICY, parameters=7_500_000_000, hidden_size=4096, layers=32, sequence_length=300)
    with pytest.raises(PlanError, match="Adam.s moments, sharded most of all") as caught:
        compile_plan(with_(env=Env(parallel=8)), gpus(1), openvla, ENV)
    assert "Use more ranks or policy.lora." in caught.value.hint
    frugal = Update(microbatch=4, activation_checkpointing=True)
    lora = with_(env=Env(parallel=8), policy=Policy(checkpoint="x", lora=Lora()), update=frugal)
    plan = compile_plan(lora, gpus(4), openvla, replace(ENV, height=224, width=224))
    assert phase_bytes(plan.memory, "update") < 80 * 2**30


def test_memory_rows_by_hand() -> None:
    plan = compile_plan(with_(ranks=2), LAPTOP, POLICY, ENV)
    rows = {(row.phase, row.component): row for row in plan.memory}
    assert rows["update", "weights, sharded"].bytes == 1_000_000 * 4 // 2
    assert rows["update", "Adam's moments, sharded"].bytes == 1_000_000 * 8 // 2
    # 32 slots x 13 rows x (64*64*3 frame + 8*4 state + 28 tokens x 12 + 4 actions x 11 + 16)
    assert rows["rollout", "rollout buffer (frames as uint8)"].bytes == 32 * 13 * (12288 + 32 + 336 + 44 + 16)
    assert {row.where for row in plan.memory} == {"device"}  # a CPU's memory is the host's
    evaluation = compile_plan(with_(ranks=2), LAPTOP, POLICY, ENV, "eval")
    assert {row.phase for row in evaluation.memory} == {"evaluation"}
    # weights and exported policy, Adam's two moments, float32: 16 bytes a parameter, in keep + 2 copies
    assert checkpoint_bytes(RECIPE, POLICY, "float32") == 16_000_000 * 4


def test_a_decoder_with_a_cache_needs_room_for_it() -> None:
    acting = [
        next(row.bytes for row in compile_plan(with_(ranks=2), LAPTOP, policy, ENV).memory if row.component == "activations while acting")
        for policy in (POLICY, replace(POLICY, kv_cache=True))
    ]
    # Rows x positions x (keys, values) x hidden x layers x float32. 32 slots, and PPO's critic judges as many last frames at once.
    assert acting[1] - acting[0] == 2 * 32 * 68 * 2 * 96 * 3 * 4


def test_an_l1_head_is_for_evaluation_only() -> None:
    regression = replace(POLICY, head="l1")
    with pytest.raises(PlanError, match=r"policy.checkpoint.*L1 head.*evaluated, not trained"):
        compile_plan(RECIPE, LAPTOP, regression, ENV)
    assert compile_plan(RECIPE, LAPTOP, regression, ENV, "eval").memory


def test_the_plan_survives_json() -> None:
    plan = compile_plan(with_(ranks=2), LAPTOP, POLICY, ENV)
    assert serial.from_dict(PlacementPlan, json.loads(serial.dumps(plan))) == plan


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("cluster", [LAPTOP, gpus(1), gpus(2), gpus(8)], ids=["cpu", "1 gpu", "2 gpus", "8 gpus"])
def test_shipped_recipes_compile(path: Path, cluster: Cluster) -> None:
    recipe = load_recipe(path, [])
    # A recipe for the CPU sees no GPUs, wherever it runs.
    plan = compile_plan(recipe, LAPTOP if recipe.device == "cpu" else cluster, policy_spec(recipe), simulator_spec(recipe.env))
    assert plan.ranks[-1].slots[1] == recipe.env.parallel
    assert len(path.read_text().splitlines()) <= 30
    assert recipe.summary


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("path", [p for p in RECIPES if load_recipe(p, []).env.simulator == "tabletop"], ids=lambda p: p.stem)
def test_shipped_recipes_compile_on_cpu_ranks(path: Path, ranks: int) -> None:
    recipe = load_recipe(path, [f"ranks={ranks}"])
    assert len(compile_plan(recipe, LAPTOP, POLICY, simulator_spec(recipe.env)).ranks) == ranks


def test_there_is_a_recipe_for_every_published_checkpoint() -> None:
    recipes = {load_recipe(path, []).policy.checkpoint for path in PUBLISHED_RUNS}
    (robotwin,) = (name for name in recipes if "RoboTwin" in name)  # one stands for its seven tasks
    assert recipes - {robotwin} == {name for name in PUBLISHED if "RoboTwin" not in name} and robotwin in PUBLISHED


# lr, value lr, Adam's eps, gradient clip, clip low and high, level of log-probs, training temperature and top-k, evaluation's temperature,
# LoRA rank. RLinf-VLA's configurations; betas, weight decay, discount, lambda and Huber's delta are the same in all of them.
MANISKILL = {"openvla-ppo": (1e-4, 3e-3, 1e-8, 10, 0.2, 0.2, "action", 1.0, 0, 0.6, 32)}
MANISKILL |= {"oft-ppo": (1e-4, 3e-3, 1e-8, 10, 0.2, 0.28, "token", 1.0, 0, 0.6, 32)}
MANISKILL |= {"oft-grpo": (1e-4, None, 1e-8, 10, 0.2, 0.28, "token", 1.0, 0, 0.6, 32)}
MANISKILL |= {"openvla-grpo": (1e-5, None, 1e-8, 1, 0.2, 0.28, "token", 1.0, 50, 0.6, None)}
LIBERO = (2e-5, None, 1e-8, 1, 0.2, 0.28, "token", 1.6, 0, 1.6, None)
ROBOTWIN = (2e-4, None, 1e-5, 1, 0.2, 0.28, "token", 1.6, 0, 0.0, 32)


@pytest.mark.parametrize("path", PUBLISHED_RUNS, ids=lambda p: p.stem)
def test_published_runs_have_the_published_settings(path: Path) -> None:
    recipe = load_recipe(path, [])
    family = path.stem.removeprefix("maniskill-") if recipe.env.simulator == "maniskill" else recipe.env.simulator
    wanted = {**MANISKILL, "libero": LIBERO, "robotwin": ROBOTWIN}[family]
    u, a, lora = recipe.update, recipe.algorithm, recipe.policy.lora
    value = u.value_learning_rate if isinstance(a, Ppo) else None
    got = (u.learning_rate, value, u.eps, u.grad_clip, *a.clip, a.logprob, recipe.rollout.temperature, recipe.rollout.top_k)
    assert (*got, recipe.eval.temperature, lora.rank if lora is not None else None) == wanted
    assert (u.betas, u.weight_decay, u.epochs, u.lr_decay, u.lr_warmup) == ((0.9, 0.999), 0.01, 1, False, 0)
    assert (a.entropy_coef, a.kl_coef, a.dual_clip) == (0, 0, None)
    if isinstance(a, Ppo):
        assert (a.gamma, a.gae_lambda, a.value_clip, a.huber, a.bootstrap, a.critic_warmup) == (0.99, 0.95, 0.2, 10, "always", 0)
    if lora is not None and lora.start == "zero":
        assert "lm_head" in lora.targets and "q_proj" in lora.targets and "fc3" in lora.targets


@pytest.mark.parametrize("task", ROBOTWIN_TASKS)
def test_the_robotwin_run_takes_the_other_published_tasks(task: str) -> None:
    path = next(path for path in PUBLISHED_RUNS if path.stem == "robotwin-oft-grpo")
    checkpoint = f"policy.checkpoint=RLinf/RLinf-OpenVLAOFT-RoboTwin-SFT-{task}"
    recipe = load_recipe(path, [f"env.tasks=[{task}]", checkpoint, f"policy.unnorm_key={task}_1k"])
    policy, env = policy_spec(recipe), simulator_spec(recipe.env)
    assert (policy.chunk, policy.action_dim, policy.proprio_dim) == (25, 14, 14) and (env.height, env.width) == (240, 320)
    assert len(compile_plan(recipe, gpus(8), policy, env).ranks) == 8


@pytest.mark.parametrize("path", PUBLISHED_RUNS, ids=lambda p: p.stem)
def test_published_runs_fit_eight_gpus_and_say_what_smaller_machines_need(path: Path) -> None:
    def planned(cluster: Cluster, *changes: str) -> PlacementPlan:
        recipe = load_recipe(path, list(changes))
        return compile_plan(recipe, cluster, policy_spec(recipe), simulator_spec(recipe.env))

    recipe = load_recipe(path, [])
    assert len(path.read_text().splitlines()) <= 30
    assert recipe.summary
    whole = planned(gpus(8))
    published = {"maniskill": 640, "libero": 16384, "robotwin": 1024}  # samples an optimiser step
    assert whole.update.minibatch_samples == published[recipe.env.simulator]
    assert len(planned(gpus(4)).ranks) == 4
    # On one card, fewer processes draw: 64 of LIBERO's would take 31 GiB of it, 128 of RoboTwin's more than there is.
    few = () if recipe.env.simulator == "maniskill" else ("env.slots_per_host=8", f"env.parallel={min(recipe.env.parallel, 64)}")
    if recipe.policy.lora is None:
        with pytest.raises(PlanError, match="Adam.s moments, sharded most of all") as full:
            planned(gpus(1), *few)
        assert full.value.hint.startswith("Use more ranks or policy.lora.")
    lora = "policy.lora={rank: 32}"
    assert planned(gpus(1), lora, "eval.parallel=64", *few).update.minibatch_samples == whole.update.minibatch_samples
    # 7.5 billion frozen weights are 14.0 GiB in bfloat16: one card of 24 GiB holds either those or the copy that acts, one of 16 neither.
    small = (lora, *few, "env.parallel=8", "eval.parallel=8", "update.microbatch=4")
    with pytest.raises(PlanError) as tight:  # with adapters, but as many slots and samples a pass as on a large card
        planned(gpus(1, gib=24), lora, *few)
    assert "more memory" not in tight.value.hint and ("env.parallel" in tight.value.hint or "update.microbatch" in tight.value.hint)
    assert "of which 92% are planned for" in tight.value.message
    alone = planned(gpus(1, gib=24), *small)
    assert alone.residency.rollout[-1:] == ("weights",) and alone.residency.update == ("gradients",)
    with pytest.raises(PlanError, match=r"policy gathered for acting most of all \(14\.[01] GiB\)") as little:
        planned(gpus(1, gib=16), *small)
    assert little.value.hint.startswith("Use GPUs with more memory")
    assert len(planned(gpus(8, gib=24), *small, "env.parallel=64").ranks) == 8


def test_processes_that_draw_on_a_gpu_take_some_of_it() -> None:
    def rows(cluster: Cluster, **settings: Any) -> dict[str, int]:
        env = Env(parallel=4, **settings)
        plan = compile_plan(with_(env=env), cluster, replace(POLICY, views=1), simulator_spec(env))
        return {row.where: row.bytes for row in plan.memory if (row.phase, row.component) == ("rollout", DRAWING)}

    assert rows(gpus(1), simulator="libero", tasks=("libero_goal",)) == {"device": 4 * 490 * 2**20}
    assert rows(gpus(1), simulator="libero", tasks=("libero_goal",), slots_per_host=2) == {"device": 2 * 490 * 2**20}
    assert rows(gpus(1), simulator="libero", tasks=("libero_goal",), libero=Libero(gl="osmesa")) == {}
    cube, on_cpu = ("PickCube-v1",), Maniskill(sim_backend="physx_cpu")
    assert rows(gpus(1), simulator="maniskill", tasks=cube) == {}  # in the rank
    assert rows(gpus(1), simulator="maniskill", tasks=cube, maniskill=on_cpu) == {"device": 4 * 820 * 2**20}
    assert rows(LAPTOP, simulator="libero", tasks=("libero_goal",)) == {}


def test_maniskill_lives_in_the_rank_on_a_gpu_and_beside_it_on_a_cpu() -> None:
    env = Env(simulator="maniskill", tasks=("PickCube-v1",), parallel=4)
    rows = [
        {row.component: row for row in compile_plan(with_(env=env), cluster, POLICY, simulator_spec(env)).memory if row.phase == "update"}
        for cluster in (replace(LAPTOP, cores=1), gpus(1))
    ]
    assert rows[0]["simulator processes: 4 x 1 env, 1.0 GiB each"].bytes == 4 * 1_100_000_000
    assert rows[1]["simulator's scenes, never moved"].bytes == 3 * 2**29 + 4 * 2**25
    assert rows[1]["simulator's scenes, never moved"].where == "device"
    assert not any("simulator processes" in component for component in rows[1])
