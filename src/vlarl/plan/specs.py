"""Owns the look-up of a recipe's simulator and policy facts for the planner. Torch-free."""

from __future__ import annotations

from pathlib import Path

from vlarl.envs.libero import spec as libero
from vlarl.envs.maniskill import spec as maniskill
from vlarl.envs.robotwin import spec as robotwin
from vlarl.envs.spec import EnvSpec
from vlarl.envs.tabletop import spec as tabletop
from vlarl.policies.adapter import check_continued, stored_weights
from vlarl.policies.layout import read_policy_spec, resolve_folder, stated_settings
from vlarl.policies.spec import PolicySpec
from vlarl.recipe.schema import Env, Recipe


def simulator_spec(env: Env) -> EnvSpec:
    """What the recipe's simulator offers under its settings."""
    if env.simulator == "maniskill":
        return maniskill.env_spec(env.tasks, env.horizon, env.image_size, len(env.maniskill.cameras), env.maniskill.sim_backend == "auto")
    if env.simulator == "robotwin":
        own = env.robotwin
        return robotwin.env_spec(env.tasks, env.horizon, env.image_size, own.camera, len(own.cameras))
    if env.simulator == "libero":
        return libero.env_spec(env.tasks, env.horizon, env.image_size, env.wrist_camera, env.libero.gl)
    return tabletop.env_spec(env.tasks, env.horizon, env.image_size, env.wrist_camera)


def policy_spec(recipe: Recipe) -> PolicySpec:
    """What the recipe's policy expects and emits, from its JSON files. Raises CheckpointError where its folder is missing or damaged."""
    policy = recipe.policy
    return read_policy_spec(policy.checkpoint, policy.unnorm_key, stated_settings(policy), policy.value)


def check_weights(recipe: Recipe) -> None:
    """CheckpointError where a weight file of the recipe's policy, or of its adapter, is missing, damaged or cut short."""
    weight_files(recipe)


def weight_files(recipe: Recipe) -> list[Path]:
    """The safetensors files that the recipe's policy is read from, its adapter's among them; none for random weights. Headers are read;
    damage is a CheckpointError, as is an adapter that cannot be trained on as the recipe says."""
    if resolve_folder(recipe.policy.checkpoint)[1]:
        return []
    lora = recipe.policy.lora
    stored, _, adapter = stored_weights(recipe.policy.checkpoint, recipe.policy.adapter)
    if lora is not None and lora.start == "adapter":
        check_continued(lora, adapter, recipe.policy.checkpoint)
    factors = [] if adapter is None else [factor for pair in adapter.layers.values() for factor in pair]
    return sorted({tensor.file for tensor in (*stored.values(), *factors)})
