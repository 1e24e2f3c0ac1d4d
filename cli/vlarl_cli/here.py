"""Owns what a recipe needs of this machine besides devices and weights: folders, interpreters, packages. Torch-free.

Asked before a run folder is made. Not when a recipe is read: it may be planned here for another machine.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from vlarl.datasets.layout import INFO
from vlarl.envs.homes import environment_python
from vlarl.envs.robotwin.assets import VARIABLE, find_assets
from vlarl.errors import CheckpointError, MachineError, RecipeError
from vlarl.policies.adapter import stored_weights
from vlarl.policies.layout import resolve_folder
from vlarl.recipe.load import LoadedRecipe
from vlarl.recipe.rules import line_order, show
from vlarl.recipe.schema import Env, Policy, Recipe

LEARNING = ("train", "sft")  # jobs that clone, log and train adapters; the others play only


def check_here(loaded: LoadedRecipe, job: str) -> None:
    """RecipeError with everything that this machine lacks for a job: train, sft, eval or record."""
    problems = missing_here(loaded, job)
    if problems:
        raise RecipeError(problems, loaded.recipe.name)


def missing_here(loaded: LoadedRecipe, job: str) -> list[str]:
    """One sentence each, as `check_here` reports them."""
    recipe, origins = loaded.recipe, loaded.origins
    found = _simulator(recipe.env, origins)
    if job in LEARNING:
        found += _datasets(recipe, origins) + _adapters(recipe.policy, origins)
    if job == "train" and recipe.log.wandb and importlib.util.find_spec("wandb") is None:
        found.append(f"{_said('log.wandb', True, origins)}: wandb is not installed. Run: pip install 'vlarl[wandb]', or set it to false.")
    return sorted(found, key=line_order)


def _said(field: str, value: object, origins: Mapping[str, str]) -> str:
    return f"{field} = {show(value)} ({origins.get(field, 'default')})"


def _datasets(recipe: Recipe, origins: Mapping[str, str]) -> list[str]:
    found = []
    for i, phase in enumerate(recipe.warmstart):
        if phase.data is None or (Path(phase.data).expanduser() / INFO).is_file():
            continue
        why = f"holds no LeRobot dataset ({INFO})" if Path(phase.data).expanduser().is_dir() else "no such folder"
        said = _said(f"warmstart[{i}].data", phase.data, origins)
        found.append(f"{said}: {why}. Record one first: vlarl record RECIPE --out FOLDER, or name the one you have.")
    return found


def _simulator(env: Env, origins: Mapping[str, str]) -> list[str]:
    """Interpreter and files of a simulator in processes of its own."""
    if env.simulator == "tabletop":
        return []
    found = []
    if env.python is not None and shutil.which(Path(env.python).expanduser()) is None:
        rule = "no such program. Name the Python of the environment that has the simulator, or null for vlarl's own."
        found.append(f"{_said('env.python', env.python, origins)}: {rule}")
    if env.simulator == "robotwin":
        own = env.robotwin
        try:
            find_assets(own.assets, own.root)
        except MachineError as error:
            folder = Path(env.python or environment_python("robotwin") or sys.executable).parent
            fix = f"Download them with `{folder / 'robotwin-download-assets'} --output FOLDER`, and name FOLDER here or in {VARIABLE}."
            found.append(f"{_said('env.robotwin.assets', own.assets, origins)}: {error.message} {fix}")
        for name in ("seeds", "eval_seeds"):
            path = getattr(own, name)
            if path is not None and not Path(path).expanduser().is_file():
                rule = "no such file. Find seeds with `vlarl seeds`, or set it to null."
                found.append(f"{_said(f'env.robotwin.{name}', path, origins)}: {rule}")
    return found


def _adapters(policy: Policy, origins: Mapping[str, str]) -> list[str]:
    """Names of layers that no stored weight has. What is frozen is not looked into here; the rank that adds adapters does."""
    if policy.lora is None or policy.lora.targets == "all-linear" or policy.lora.start == "adapter":
        return []
    try:
        if resolve_folder(policy.checkpoint)[1]:
            return []  # random weights: nothing is stored
        names = stored_weights(policy.checkpoint, policy.adapter)[0]
    except CheckpointError:
        return []  # told by whoever reads the weights
    layers = {parts[-2] for name in names if len(parts := name.split(".")) > 1 and parts[-1] == "weight"}
    unknown = [target for target in policy.lora.targets if target.rsplit(".", 1)[-1] not in layers]
    if len(unknown) < len(policy.lora.targets):
        return []
    rule = "no layer of the policy has such a name. Use all-linear, or names such as q_proj."
    return [f"{_said('policy.lora.targets', policy.lora.targets, origins)}: {rule}"]
