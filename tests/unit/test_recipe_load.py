"""A recipe is read strictly, and all of its mistakes are reported at once."""
from __future__ import annotations

from pathlib import Path

import pytest

from vlarl.errors import RecipeError
from vlarl.recipe.load import json_schema, load_recipe, load_with_origins
from vlarl.recipe.schema import Grpo, Lora, Ppo

MINIMAL = "name: a\npolicy: {checkpoint: 'scratch:tiny'}\n"

TEN_MISTAKES = """\
nam: quickstart
seed: -1
device: gpu
env:
  paralel: 64
  tasks: [put, pussh]
  wrist_camera: yes
  image_size: 5000
policy: {checkpoint: 'scratch:tiny', lora: {rank: 0}}
algorithm: {kind: grop}
update: {updates: 3, minibatches: 2.5}
seed: 2
placement: {stages: 7}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), list(overrides))
    return caught.value.problems


def test_every_mistake_gets_its_own_sentence_with_line_value_rule_and_remedy(tmp_path: Path) -> None:
    assert problems(tmp_path, TEN_MISTAKES) == [
        "nam (recipe line 1): unknown field. Did you mean name?",
        "seed = -1 (recipe line 2): expected a whole number of at least 0.",
        "device = gpu (recipe line 3): expected auto, cpu or cuda. Did you mean cuda?",
        "env.paralel (recipe line 5): unknown field. Did you mean env.parallel?",
        "env.tasks = [put, pussh] (recipe line 6): tabletop has no task 'pussh'. Did you mean push?",
        "env.wrist_camera = yes (recipe line 7): expected true or false. Write true.",
        "env.image_size = 5000 (recipe line 8): expected a whole number from 32 to 1024.",
        "policy.lora.rank = 0 (recipe line 9): expected a whole number of at least 1.",
        "algorithm.kind = grop (recipe line 10): expected ppo or grpo. Did you mean grpo?",
        "update.minibatches = 2.5 (recipe line 11): expected a whole number of at least 1. Use 2 or 3.",
        "seed (recipe line 12): written twice, first in recipe line 2. Keep one of them.",
        "placement.stages = 7 (recipe line 13): 64 parallel episodes do not split into 7 stages. Set env.parallel to 63 or 70.",
        "name: required, and not given. Add text.",
    ]


def test_minimal_recipe_has_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), [])
    assert (recipe.env.parallel, recipe.algorithm, recipe.policy.lora) == (64, Ppo(), None)


def test_numbers_follow_yaml_1_2(tmp_path: Path) -> None:
    text = MINIMAL + "update: {learning_rate: 1e-4, grad_clip: 5, updates: 1_000}\nsummary: no\n"
    recipe = load_recipe(write(tmp_path, text), [])
    assert (recipe.update.learning_rate, recipe.update.grad_clip, recipe.update.updates, recipe.summary) == (1e-4, 5.0, 1000, "no")


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    overrides = ["env.tasks=[put]", "update.updates=7", "update.updates=8", "policy.lora={rank: 4}", "ranks=null"]
    loaded = load_with_origins(write(tmp_path, MINIMAL), overrides)
    assert loaded.recipe.env.tasks == ("put",)
    assert loaded.recipe.update.updates == 8
    assert loaded.recipe.policy.lora == Lora(rank=4)
    assert loaded.origins["update.updates"] == "override"


def test_a_wrong_override_names_itself(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL, "update.updates=many", "updates", "update.epoch=3") == [
        "override 'updates': expected key.sub=value, such as update.updates=10.",
        "update.epoch (override): unknown field. Did you mean update.epochs?",
        "update.updates = many (override): expected a whole number of at least 0.",
    ]


def test_a_field_of_another_section_is_found(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, MINIMAL + "microbatch: 3\n")
    assert found == "microbatch (recipe line 3): unknown field. It belongs to another section: update.microbatch."


def test_a_changed_kind_replaces_the_whole_section(tmp_path: Path) -> None:
    text = MINIMAL + "algorithm: {kind: ppo, gamma: 0.5}\n"
    assert load_recipe(write(tmp_path, text), ["algorithm.kind=grpo"]).algorithm == Grpo()
    assert load_recipe(write(tmp_path, text), ["algorithm.gae_lambda=0.5"]).algorithm == Ppo(gamma=0.5, gae_lambda=0.5)


def test_the_kind_of_a_policy_leaves_its_other_settings_alone(tmp_path: Path) -> None:
    policy = load_recipe(write(tmp_path, MINIMAL), ["policy.kind=openvla-oft"]).policy
    assert (policy.kind, policy.checkpoint) == ("openvla-oft", "scratch:tiny")


def test_numbers_in_quotes_are_shown_as_text(tmp_path: Path) -> None:
    text = MINIMAL + "update: {updates: '2', learning_rate: '1e-4'}\npolicy2: 1\nranks: x\n"
    assert problems(tmp_path, text) == [
        'update.learning_rate = "1e-4" (recipe line 3): expected a number above 0. In quotes it is text; write 1e-4.',
        'update.updates = "2" (recipe line 3): expected a whole number of at least 0. In quotes it is text; write 2.',
        "policy2 (recipe line 4): unknown field. Did you mean policy?",
        "ranks = x (recipe line 5): expected a whole number of at least 1 (or null).",
    ]


def test_a_field_in_a_list_of_sections_is_named(tmp_path: Path) -> None:
    text = MINIMAL + "warmstart:\n- {steps: 10, data: 3}\n- {steps: 10, batc: 3}\n- 7\n- {steps:5, data: [a]}\n"
    assert problems(tmp_path, text) == [
        "warmstart[0].data = 3 (recipe line 4): expected text (or null).",
        "warmstart[1].batc (recipe line 5): unknown field. Did you mean warmstart[1].batch?",
        "warmstart[2] = 7 (recipe line 6): expected a section (fields: steps, tasks, data, batch, learning_rate, lr_warmup, ...).",
        "warmstart[3].data = [a] (recipe line 7): expected text (or null).",
        "warmstart[3].steps:5 (recipe line 7): unknown field. Write `steps: 5`, with a space after the colon.",
        "warmstart[3].steps: required, and not given. Add a whole number of at least 1.",
    ]


def test_what_is_no_yaml_is_named_by_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "# Title\n\ntext\n    vlarl: [\n", "README.md")
    with pytest.raises(RecipeError, match=r"README\.md: 1 problem"):
        load_recipe(path, [])


def test_extends_merges_one_level_and_keeps_lines(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "env:\n  parallel: 32\n  horizon: 20\nsummary: base\n", "base.yaml")
    top = write(tmp_path, "extends: base\nname: b\nenv: {horizon: 24}\n")
    loaded = load_with_origins(top, [])
    assert (loaded.recipe.name, loaded.recipe.env.parallel, loaded.recipe.env.horizon, loaded.recipe.summary) == ("b", 32, 24, "")
    assert loaded.origins["env.parallel"] == "base.yaml line 4"
    assert loaded.origins["env.horizon"] == "recipe line 3"


def test_extends_a_shipped_recipe_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "shipped"
    folder.mkdir()
    shipped = {"basis": write(folder, MINIMAL, "basis.yaml")}
    assert load_recipe(write(tmp_path, "extends: basis\nseed: 4\n"), [], shipped).seed == 4


def test_extends_of_extends_and_of_nothing_are_refused(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "a.yaml")
    write(tmp_path, "extends: a\n", "b.yaml")
    assert "one level is allowed" in problems(tmp_path, MINIMAL + "extends: b\n")[0]
    assert "no such file beside the recipe" in problems(tmp_path, MINIMAL + "extends: zzz\n")[0]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("name: [a\nseed: 1\n", "recipe line 2: not valid YAML"),
        ("- a\n- b\n", "recipe line 1: expected `key: value` lines, got a list."),
        ("name: &x [*x]\n", "recipe line 1: nested too deep"),
        ("name: !!int x\n", "recipe: not valid YAML"),
    ],
)
def test_what_is_not_a_recipe_at_all(tmp_path: Path, text: str, start: str) -> None:
    assert problems(tmp_path, text)[0].startswith(start)


def test_a_missing_file_and_a_missing_policy(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the file does not exist"):
        load_recipe(tmp_path / "none.yaml", [])
    (found,) = problems(tmp_path, "name: a\npolicy: {checkpoint: runs/none}\n")
    assert found.startswith("policy.checkpoint = runs/none (recipe line 2): no such folder.")
    (found,) = problems(tmp_path, f"name: a\npolicy: {{checkpoint: {tmp_path / 'recipe.yaml'}}}\n")
    assert "is a file" in found


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("algorithm: {kind: grpo, group_size: 7}", "algorithm.group_size = 7"),
        ("algorithm: {kind: grpo, episodes_per_update: 100}", "algorithm.episodes_per_update = 100"),
        ("algorithm: {kind: grpo, filter: [0.5, 0.5]}", "algorithm.filter = [0.5, 0.5]"),
        ("algorithm: {clip: [1.5, 0.2]}", "algorithm.clip = [1.5, 0.2]"),
        ("algorithm: {critic_warmup: 100}", "algorithm.critic_warmup = 100"),
        ("update: {betas: [0.9, 1.0]}", "update.betas = [0.9, 1]"),
        ("update: {updates: 0}", "update.updates = 0"),
        ("env: {variation: night}", "env.variation = night"),
        ("env: {tasks: [put, put]}", "env.tasks = [put, put]"),
        ("placement: {learner: '2'}", "placement.learner = 2"),
    ],
)
def test_rules_between_fields(tmp_path: Path, text: str, field: str) -> None:
    (found,) = problems(tmp_path, MINIMAL + text + "\n")
    assert found.startswith(f"{field} (recipe line 3): ")


def test_a_pace_for_towers_that_do_not_learn(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "name: a\npolicy: {checkpoint: 'scratch:tiny', freeze: [vision]}\nupdate: {vision_scale: 0.5}\n")
    assert found.startswith("update.vision_scale = 0.5 (recipe line 3): the vision towers do not learn")


def test_json_schema_describes_fields_and_requires_some_where_nothing_is_extended() -> None:
    schema = json_schema()
    assert {"extends", "env", "policy", "algorithm"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False
    assert "required" not in schema and "required" not in schema["$defs"]["Policy"]
    assert schema["if"] == {"not": {"required": ["extends"]}}
    assert schema["then"] == {"required": ["name", "policy"], "properties": {"policy": {"required": ["checkpoint"]}}}
    assert schema["$defs"]["Env"]["properties"]["parallel"]["description"].startswith("Episodes played at once")
