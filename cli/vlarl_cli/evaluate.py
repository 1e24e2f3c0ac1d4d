"""Owns how `vlarl eval` turns a checkpoint folder into a recipe: which policy, which simulator settings, which sets."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from vlarl.distributed.manifest import MANIFEST, best, checkpoints, latest, verify
from vlarl.errors import CheckpointError, RecipeError
from vlarl.plan.cluster import discover
from vlarl.plan.compile import rank_count
from vlarl.policies.layout import read_policy_spec, stated_settings
from vlarl.recipe.document import overrides
from vlarl.recipe.load import LoadedRecipe, load_with_origins
from vlarl.recipe.rules import SIMULATOR_VARIATIONS, nearest, recipe_clashes, sentence
from vlarl.recipe.schema import Env, Eval, Placement, Policy, Ppo, Recipe, Update


@dataclass(frozen=True)
class EvalOptions:
    """None: as in training."""

    checkpoint: str
    sets: str
    episodes: int
    parallel: int | None
    tasks: tuple[str, ...] | None
    temperature: float | None
    seed: int
    device: str
    policy: tuple[str, ...] = ()
    """`KEY=VALUE` items of a recipe's `policy` section: what the files of a published checkpoint do not say."""


def eval_recipe(options: EvalOptions) -> tuple[LoadedRecipe, tuple[str, ...]]:
    """The recipe of an evaluation, and the sets to play. Raises CheckpointError where there is no policy, RecipeError for bad options."""
    source, run_dir = find_policy(options.checkpoint)
    trained = _training_recipe(source, run_dir, [f"policy.{item}" for item in options.policy])
    env = trained.env if options.tasks is None else replace(trained.env, tasks=options.tasks)
    variations = variation_names(options.sets, env.simulator)
    temperature = trained.eval.temperature if options.temperature is None else options.temperature
    recipe = Recipe(
        name=f"eval-{trained.name}",
        seed=options.seed,
        device=options.device,  # type: ignore[arg-type]
        stall_seconds=trained.stall_seconds,
        env=replace(env, variation=variations[0]),
        policy=replace(trained.policy, checkpoint=source, adapter=None, lora=None, freeze=()),
        algorithm=Ppo(critic_warmup=0),
        update=Update(updates=1),
        placement=Placement(),
        eval=Eval(episodes=options.episodes, temperature=temperature, videos=trained.eval.videos),
    )
    ranks = rank_count(recipe, discover(recipe.device))
    wanted = min(options.parallel or trained.eval.parallel or env.parallel, options.episodes)
    parallel = -(-wanted // ranks) * ranks
    recipe = replace(recipe, env=replace(recipe.env, parallel=parallel), eval=replace(recipe.eval, parallel=parallel))
    clashes = recipe_clashes(recipe)
    if clashes:
        origins = {"env.tasks": "--tasks"}
        raise RecipeError([sentence(c, recipe, origins) for c in clashes], "vlarl eval")
    return LoadedRecipe(recipe, {}), variations


def variation_names(sets: str, simulator: str) -> tuple[str, ...]:
    """`train`, `vision,semantics` or `all` -> names of scene distributions."""
    known = SIMULATOR_VARIATIONS[simulator]
    if sets == "all":
        return known
    names = tuple(s.strip() for s in sets.split(",") if s.strip())
    unknown = [n for n in names if n not in known]
    if unknown or not names:
        got = unknown[0] if unknown else sets
        raise RecipeError([f"--set {got}: {simulator} has no such set. {nearest(got, (*known, 'all'))}"], "vlarl eval")
    return names


def find_policy(checkpoint: str) -> tuple[str, Path | None]:
    """The policy folder (or built-in name, or Hub id) that `--ckpt` means, and the run folder it belongs to.

    A run folder gives its best checkpoint, else its newest, else its warm start; a checkpoint folder gives the policy in it.
    """
    path = Path(checkpoint)
    if not path.exists():
        return checkpoint, None  # the policy's own reader knows the other kinds of names, and says so where it does not
    path = path.absolute()
    chosen = path
    if (path / "checkpoints").is_dir():
        chosen = best(path) or latest(path) or path / "warmstart"
        if not chosen.is_dir():
            raise CheckpointError(f"The run {path} holds no finished checkpoint.", "Let it run until its first one (checkpoint.every).")
    if (chosen / MANIFEST).is_file():
        verify(chosen, hashes=False)
        chosen = chosen / "policy"
    elif not (chosen / "config.json").is_file():
        found = ", ".join(p.name for p in checkpoints(chosen.parent.parent)[-3:]) or "none"
        hint = f"Give a run folder, a checkpoint in its checkpoints/ (finished there: {found}), or a policy folder."
        raise CheckpointError(f"{chosen} holds no policy: no config.json and no {MANIFEST}.", hint)
    run_dir = next((p for p in (chosen, *chosen.parents[:4]) if (p / "recipe.json").is_file()), None)
    return str(chosen), run_dir


def _training_recipe(source: str, run_dir: Path | None, settings: list[str]) -> Recipe:
    """The recipe that the policy was trained with; without a run folder, one with the simulator's defaults that fits the policy."""
    if run_dir is not None:
        return load_with_origins(run_dir / "recipe.json", [*settings, f"policy.checkpoint={json.dumps(source)}"]).recipe
    document = overrides(settings)
    try:
        values = {"checkpoint": source, **document.values.get("policy", {})}
        policy = TypeAdapter(Policy).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        wrong = [f"--policy {'.'.join(map(str, e['loc']))}: {e['msg']}." for e in error.errors(include_url=False)]
        raise RecipeError([*document.problems, *wrong], "vlarl eval") from None
    if document.problems:
        raise RecipeError(list(document.problems), "vlarl eval")
    spec = read_policy_spec(source, policy.unnorm_key, stated_settings(policy))
    env = Env(image_size=max(32, min(224, spec.image_size)), wrist_camera=spec.views > 1)
    name = source.replace(":", "-").rstrip("/").split("/")[-1]
    return Recipe(name=name, env=env, policy=policy)
