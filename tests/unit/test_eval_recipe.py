"""`vlarl eval`: on which simulator and under which settings a policy is judged; what is refused, and what is said."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import Vlarl, command_line
from vlarl import serial
from vlarl.errors import CheckpointError, PlanError, RecipeError
from vlarl.launch.rundir import RunDir
from vlarl.policies.layout import resolve_folder
from vlarl.recipe.schema import Env, Eval
from vlarl_cli import run
from vlarl_cli.evaluate import EvalOptions, eval_recipe

TINY = EvalOptions("bundled:tiny-sft", "train", 2, None, None, None, 1, "cpu")
LIBERO = ("env.simulator=libero", "env.tasks=[libero_goal]", "env.horizon=300")
MINE = """\
name: mine
env: {simulator: libero, tasks: [libero_object], horizon: 280, parallel: 8, image_size: 96, libero: {settle_steps: 10}}
policy: {checkpoint: somebody/else, chunk: 2, crop: true, adapter: their/adapter, lora: {rank: 2}, freeze: [vision]}
algorithm: {kind: grpo, group_size: 8, episodes_per_update: 8, kl_coef: 0.1}
placement: {offload: [reference]}
eval: {every: 5, temperature: 0.7, parallel: 4, videos: 1}
"""


@pytest.fixture
def vlarl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Vlarl:
    def fake(command: Any, folder: RunDir, *arguments: Any) -> None:
        """No ranks are started: a result is left."""
        folder.result.write_text("{}")

    monkeypatch.setattr(run, "supervise", fake)
    return command_line(monkeypatch, capsys, tmp_path)


def published(folder: Path, key: str, views: int = 1, state: int = 0, head: str = "tokens") -> str:
    """A folder without weights, of a tiny policy whose statistics are of `key`."""
    shutil.copytree(resolve_folder("scratch:tiny")[0], folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["vlarl"] |= {"views": views, "proprio_dim": state, "head": head}
    (folder / "config.json").write_text(json.dumps(raw))
    (statistics,) = json.loads((folder / "dataset_statistics.json").read_text()).values()
    (folder / "dataset_statistics.json").write_text(json.dumps({key: statistics}))
    return str(folder)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(MINE)
    return str(tmp_path / "mine.yaml")


def problems(options: EvalOptions) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        eval_recipe(options)
    return caught.value.problems


def test_a_shipped_recipe_says_where_and_how_and_ckpt_says_the_weights(tmp_path: Path) -> None:
    ckpt = published(tmp_path / "ckpt", "libero_goal_no_noops")
    recipe = eval_recipe(replace(TINY, checkpoint=ckpt, recipe="libero-goal-oft-grpo", episodes=100))[0].recipe
    assert (recipe.env.simulator, recipe.env.tasks, recipe.env.horizon, recipe.env.image_size) == ("libero", ("libero_goal",), 512, 256)
    assert recipe.policy.checkpoint == ckpt
    assert (recipe.policy.kind, recipe.policy.chunk, recipe.policy.resize) == ("openvla-oft", 8, "tensor")
    assert (recipe.policy.unnorm_key, recipe.policy.stop_token) == ("libero_goal_no_noops", False)
    assert (recipe.eval.temperature, recipe.eval.episodes, recipe.env.parallel, recipe.device) == (1.6, 100, 64, "cpu")


def test_a_recipe_file_without_its_training(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = eval_recipe(replace(TINY, recipe=mine, episodes=50))[0].recipe
    env = recipe.env
    assert (recipe.name, env.tasks, env.image_size, env.libero.settle_steps) == ("eval-mine", ("libero_object",), 96, 10)
    assert (recipe.policy.chunk, recipe.policy.crop, recipe.policy.lora, recipe.policy.freeze) == (2, True, None, ())
    assert (recipe.eval.temperature, recipe.eval.parallel, recipe.eval.videos, recipe.eval.every) == (0.7, 4, 1, 0)
    assert recipe.policy.adapter is None and recipe.placement.offload == "auto" and recipe.algorithm.kind == "ppo"
    assert "mine's policy.adapter is left out" in capsys.readouterr().out
    assert eval_recipe(replace(TINY, recipe=mine, policy=("adapter=there",)))[0].recipe.policy.adapter == "there"
    assert not capsys.readouterr().out


def test_options_win_over_policy_items_over_overrides_over_the_recipe(mine: str) -> None:
    changed = replace(TINY, recipe=mine, overrides=("policy.chunk=3", "policy.crop=false", "eval.temperature=0.2", "env.parallel=3"))
    recipe = eval_recipe(replace(changed, policy=("chunk=1",)))[0].recipe
    assert (recipe.policy.chunk, recipe.policy.crop, recipe.eval.temperature, recipe.env.horizon) == (1, False, 0.2, 280)
    changes = ("env.tasks=[libero_10]", "eval.parallel=4", "eval.temperature=0.2")
    options = replace(TINY, recipe=mine, overrides=changes, temperature=0.0, parallel=8, tasks=("libero_goal-3",), episodes=8)
    recipe = eval_recipe(options)[0].recipe
    assert (recipe.env.tasks, recipe.eval.temperature, recipe.eval.parallel) == (("libero_goal-3",), 0.0, 8)


def test_a_runs_recipe_is_changed_by_overrides_and_replaced_by_another(vlarl: Vlarl, tmp_path: Path, mine: str) -> None:
    """Whose warm start only tabletop's expert can play, which is no matter here."""
    assert vlarl("train", "quickstart-warmstart", "device=cpu", "--out", "trained")[0] == 0
    (tmp_path / "trained" / "warmstart").symlink_to(resolve_folder("scratch:tiny")[0])
    options = replace(TINY, checkpoint=str(tmp_path / "trained"))
    assert eval_recipe(options)[0].recipe.env.simulator == "tabletop"
    moved = eval_recipe(replace(options, overrides=(*LIBERO, "env.reward=sparse")))[0].recipe
    assert (moved.env.simulator, moved.env.horizon, moved.name) == ("libero", 300, "eval-quickstart-warmstart")
    assert eval_recipe(replace(options, recipe=mine))[0].recipe.env.tasks == ("libero_object",)


def test_the_command_takes_them_all(vlarl: Vlarl, tmp_path: Path) -> None:
    named = ("--recipe", "libero-spatial-tiny-grpo", "--policy", "crop=true", "env.horizon=16", "eval.videos=0")
    code, text, errors = vlarl("eval", "--ckpt", "bundled:tiny-sft", "--episodes", "2", "--out", "there", *named)
    assert code == 0, errors
    assert "judged on" not in text
    written = json.loads((tmp_path / "there" / "recipe.json").read_text())
    assert (written["env"]["simulator"], written["env"]["horizon"], written["policy"]["crop"]) == ("libero", 16, True)
    assert json.loads((tmp_path / "there" / "plan.json").read_text())["workers"]["ranks_per_node"] >= 1


def test_without_a_recipe_it_is_said_where_a_foreign_policy_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_recipe(TINY)[0].recipe.env.simulator == "tabletop"
    assert not capsys.readouterr().out
    known, unknown = published(tmp_path / "goal", "libero_goal"), published(tmp_path / "own", "kitchen", views=2)
    l1 = published(tmp_path / "l1", "libero_goal", head="l1")
    ways = {known: "--recipe libero-goal-oft-grpo, or env.s", unknown: "--recipe RECIPE (vlarl recipes lists some), or env.s", l1: "env.s"}
    for ckpt, way in ways.items():
        assert eval_recipe(replace(TINY, checkpoint=ckpt))[0].recipe.env.simulator == "tabletop"
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("judged on tabletop, though its actions are scaled as those of ") and f"add {way}" in line
    env = eval_recipe(replace(TINY, checkpoint=unknown, overrides=LIBERO))[0].recipe.env
    assert (env.simulator, env.image_size, env.wrist_camera) == ("libero", 64, True)  # cameras as the policy wants them
    assert not capsys.readouterr().out


def test_an_exported_policy_is_judged_where_it_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(published(tmp_path / "out", "libero_10_no_noops"))
    statistics = json.loads((folder / "dataset_statistics.json").read_text())
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics | {"other": statistics["libero_10_no_noops"]}))
    env = Env(simulator="libero", tasks=("libero_10",), horizon=520, parallel=6)
    noted = {"env": serial.to_dict(env), "eval": serial.to_dict(Eval(every=5, temperature=1.5)), "unnorm_key": "libero_10_no_noops"}
    (folder / "export.json").write_text(json.dumps(noted))
    options = replace(TINY, checkpoint=str(folder), episodes=12)
    recipe = eval_recipe(options)[0].recipe
    assert recipe.env == replace(env, parallel=6) and recipe.eval.temperature == 1.5 and recipe.policy.unnorm_key == "libero_10_no_noops"
    assert eval_recipe(replace(options, overrides=("env.horizon=99",)))[0].recipe.env.horizon == 99
    assert eval_recipe(replace(options, recipe="debug", policy=("unnorm_key=other",)))[0].recipe.env.simulator == "tabletop"
    (folder / "export.json").write_text(json.dumps(dict.fromkeys(noted)))  # of a policy whose training is not known
    assert eval_recipe(replace(options, policy=("unnorm_key=other",)))[0].recipe.env.simulator == "tabletop"
    assert "judged on tabletop" in capsys.readouterr().out


def test_mistakes(mine: str) -> None:
    for options, says in [
        ({"recipe": "libero-gaol"}, "no shipped recipe of this name"),
        ({"recipe": mine, "overrides": ("env.horizn=3",)}, "env.horizn (override): unknown field. Did you mean env.horizon?"),
        ({"overrides": ("env.simulator=libro",)}, "Did you mean libero?"),
        ({"overrides": ("seed=3",)}, "seed (override): vlarl eval has an option for it. Use --seed."),
        ({"overrides": ("env.variation=vision",)}, "Use --set."),
        ({"overrides": ("update.updates=3",)}, "update (override): an evaluation does not use it."),
        ({"overrides": ("policy.lora.rank=3",)}, "policy.lora (override): an evaluation does not use it."),
        ({"overrides": ("there",)}, "override 'there': expected key.sub=value"),
        ({"recipe": mine, "overrides": ("env.reward=shaped",)}, "libero has no such reward"),
        ({"recipe": mine, "sets": "vision"}, "libero has no such set"),
    ]:  # fmt: skip
        (problem,) = problems(replace(TINY, **options))  # type: ignore[arg-type]
        assert says in problem
    missing = problems(replace(TINY, overrides=("env.simulator=libero",)))
    assert [text.split(":")[0] for text in missing] == ["env.tasks", "env.horizon"]
    with pytest.raises(CheckpointError, match="no such policy folder"):
        eval_recipe(replace(TINY, checkpoint="nowhere", recipe="debug"))


@pytest.mark.parametrize(
    ("ckpt", "changes", "says"),
    [
        ({"views": 2}, (), "env.wrist_camera = false (default): libero gives 1 camera view and the policy .* takes 2 camera views"),
        ({}, ("env.wrist_camera=true",), r"env.wrist_camera = true \(override\): libero gives 2 camera views"),
        ({"state": 14}, (), r"policy.checkpoint = .* \(--ckpt\): it reads a state of 14 numbers and libero gives 8"),
        ({}, ("env.image_size=32",), r"env.image_size = 32 \(override\): .* looks at 64 pixels"),
    ],
)  # fmt: skip
def test_a_policy_that_does_not_fit_the_simulator(tmp_path: Path, ckpt: dict[str, Any], changes: tuple[str, ...], says: str) -> None:
    folder = published(tmp_path / "ckpt", "libero_spatial", **ckpt)
    loaded, _ = eval_recipe(replace(TINY, checkpoint=folder, recipe="libero-spatial-tiny-grpo", overrides=changes))
    with pytest.raises(PlanError, match=says.replace("(default)", r"\(default\)")):
        run.make_plan(loaded, "eval")


def test_an_l1_head_is_planned_for_evaluation_on_libero_and_not_for_training(tmp_path: Path) -> None:
    folder = published(tmp_path / "ckpt", "libero_spatial", views=2, state=8, head="l1")
    loaded, _ = eval_recipe(replace(TINY, checkpoint=folder, recipe="libero-spatial-tiny-grpo", overrides=("env.wrist_camera=true",)))
    assert run.make_plan(loaded, "eval").rollout.parallel == 2
    with pytest.raises(PlanError, match="can be evaluated, not trained"):
        run.make_plan(loaded, "train")
