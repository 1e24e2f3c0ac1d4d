"""Owns how `vlarl eval` turns a checkpoint folder into a recipe: which policy, which simulator settings, which sets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlarl.distributed.manifest import MANIFEST, best, checkpoints, latest, verify
from vlarl.errors import CheckpointError, RecipeError
from vlarl.plan.cluster import discover
from vlarl.plan.compile import rank_count
from vlarl.policies.layout import read_json, read_policy_spec, resolve_folder, stated_settings
from vlarl.policies.published import PUBLISHED
from vlarl.policies.spec import PolicySpec
from vlarl.recipe.document import dotted, overrides, read
from vlarl.recipe.load import LoadedRecipe, load_with_origins
from vlarl.recipe.rules import SIMULATOR_VARIATIONS, nearest, recipe_clashes, sentence
from vlarl.recipe.schema import Env, Eval, Placement, Ppo, Recipe, Update
from vlarl_cli import render, run
from vlarl_cli.shipped import shipped_recipes

EXPORT = "export.json"  # of `vlarl export`
NOTED = {"env": "env", "eval": "eval", "policy.unnorm_key": "unnorm_key"}  # a recipe's field -> where an export's manifest keeps it
HOME = Env().simulator  # where a policy is judged that says nothing else; its own policies' statistics have the same name
SECTIONS = ("env", "policy", "eval")  # of a recipe, that an evaluation takes
OPTIONS = {"policy.checkpoint": "--ckpt", "env.variation": "--set", "eval.episodes": "--episodes", "seed": "--seed", "device": "--device"}
TRAINING = ("policy.lora", "policy.freeze", "eval.every")
# Stands in for what an evaluation does not do: its rules must not stop one whose env is another than training's.
UNPLAYED = ("warmstart=[]", "algorithm={kind: ppo, critic_warmup: 0}", "update.updates=1", "placement.stages=1", "placement.offload=auto")


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
    recipe: str | None = None
    """File or shipped name: says the simulator, the policy's switches and the eval settings in the place of the training recipe."""
    overrides: tuple[str, ...] = ()
    """`env.key=value` items and the like, over whichever recipe it is; what `policy` says wins."""


def eval_recipe(options: EvalOptions) -> tuple[LoadedRecipe, tuple[str, ...]]:
    """The recipe of an evaluation, and the sets to play. Raises CheckpointError where there is no policy, RecipeError for bad options."""
    source, run_dir = find_policy(options.checkpoint)
    if source not in PUBLISHED:
        resolve_folder(source)
    given = [*options.overrides, *(f"policy.{item}" for item in options.policy)]
    said = _check_given(given)
    loaded = _judging_recipe(options, source, run_dir, given)
    trained = loaded.recipe
    variations = variation_names(options.sets, trained.env.simulator)
    temperature = trained.eval.temperature if options.temperature is None else options.temperature
    adapter = trained.policy.adapter if "policy.adapter" in said else None
    if options.recipe is not None and trained.policy.adapter != adapter:
        fix = f"--policy adapter={trained.policy.adapter}"
        render.note(f"{trained.name}'s policy.adapter is left out: the weights are --ckpt's alone. To put it on them, add {fix}.")
    recipe = Recipe(
        name=f"eval-{trained.name}",
        seed=options.seed,
        device=options.device,  # type: ignore[arg-type]
        stall_seconds=trained.stall_seconds,
        env=replace(trained.env, variation=variations[0]),
        policy=replace(trained.policy, checkpoint=source, adapter=adapter, lora=None, freeze=()),
        algorithm=Ppo(critic_warmup=0),
        update=Update(updates=1),
        placement=Placement(),
        eval=Eval(episodes=options.episodes, temperature=temperature, videos=trained.eval.videos),
    )
    ranks = rank_count(recipe, discover(recipe.device))
    wanted = min(options.parallel or trained.eval.parallel or trained.env.parallel, options.episodes)
    parallel = -(-wanted // ranks) * ranks
    recipe = replace(recipe, env=replace(recipe.env, parallel=parallel), eval=replace(recipe.eval, parallel=parallel))
    origins = _origins(loaded.origins, said, options)
    clashes = recipe_clashes(recipe)
    if clashes:
        raise RecipeError([sentence(c, recipe, origins) for c in clashes], "vlarl eval")
    return LoadedRecipe(recipe, origins), variations


def _check_given(given: list[str]) -> set[str]:
    """The fields that overrides name, dotted. RecipeError for those that an evaluation would not heed."""
    document = overrides(given)
    problems, said = list(document.problems), {dotted(key) for key in document.origins}
    for name in sorted(said):
        if name in OPTIONS:
            problems.append(f"{name} (override): vlarl eval has an option for it. Use {OPTIONS[name]}.")
        elif name in TRAINING or ("." not in name and name not in SECTIONS):
            rule = f"an evaluation does not use it. Give fields of {', '.join(SECTIONS)}, such as env.horizon=300, or remove it."
            problems.append(f"{name} (override): {rule}")
    if problems:
        raise RecipeError(problems, "vlarl eval")
    return said


def _origins(written: Mapping[str, str], said: set[str], options: EvalOptions) -> dict[str, str]:
    """Where the fields that an evaluation takes were written. Overrides that are not the user's own are named for what they are."""
    kept = {name: where for name, where in written.items() if name.split(".")[0] in SECTIONS and (where != "override" or name in said)}
    kept |= {"policy.checkpoint": "--ckpt", "env.variation": "--set"}
    kept |= {} if options.tasks is None else {"env.tasks": "--tasks"}
    return kept


def _judging_recipe(options: EvalOptions, source: str, run_dir: Path | None, given: list[str]) -> LoadedRecipe:
    """The recipe named, that of the policy's run, or one made of what its export noted or of its files."""
    tasks = [] if options.tasks is None else [f"env.tasks={json.dumps(options.tasks)}"]
    items = [*UNPLAYED, *given, *tasks, f"policy.checkpoint={json.dumps(source)}"]
    if options.recipe is not None:
        return run.load(options.recipe, items)
    if run_dir is not None:
        return load_with_origins(run_dir / "recipe.json", items)
    name = source.replace(":", "-").rstrip("/").split("/")[-1]
    items = [f"name={json.dumps(name)}", *_noted(source), *items]
    try:
        _check_simulator(items)
        loaded = load_with_origins(Path(os.devnull), items)
    except RecipeError as error:
        raise RecipeError(error.problems, "vlarl eval") from None
    return replace(loaded, recipe=_fitted(loaded))


def _check_simulator(items: list[str]) -> None:
    """RecipeError where overrides alone name another simulator, and not what has no default that would mean anything there."""
    document = overrides(items)
    said = {dotted(key) for key in document.origins}
    others = tuple(name for name in SIMULATOR_VARIATIONS if name != HOME)
    if "env.simulator" not in said or document.values["env"]["simulator"] not in others:
        return
    named = f"env.simulator={document.values['env']['simulator']}"
    rule = f"required beside {named}, and not given: the default is {HOME}'s. Add it, or take everything from --recipe."
    missing = [f"{name}: {rule}" for name in ("env.tasks", "env.horizon") if name not in said]
    if missing:
        raise RecipeError(missing, "vlarl eval")


def _noted(source: str) -> list[str]:
    """What `vlarl export` noted of the training recipe, as overrides; nothing where the folder is no export, or its training unknown."""
    manifest = Path(source).expanduser() / EXPORT
    if not manifest.is_file():
        return []
    kept = read_json(manifest)
    return [f"{field}={json.dumps(kept[name])}" for field, name in NOTED.items() if name in kept and kept[name] is not None]


def _fitted(loaded: LoadedRecipe) -> Recipe:
    """A recipe without a file, its cameras as the policy wants them where nobody has said; where it is judged is not left unsaid."""
    recipe, said = loaded.recipe, loaded.origins
    env, policy = recipe.env, recipe.policy
    spec = read_policy_spec(policy.checkpoint, policy.unnorm_key, stated_settings(policy))
    if "env.simulator" not in said and spec.unnorm_key != HOME:
        choose = f"{_recipes_for(spec)}env.simulator=NAME env.tasks=[NAME] env.horizon=STEPS"
        render.note(f"judged on {HOME}, though its actions are scaled as those of {spec.unnorm_key}: for another simulator, add {choose}.")
    if "env.image_size" not in said:
        env = replace(env, image_size=max(32, min(224, spec.image_size)))
    if "env.wrist_camera" not in said and env.simulator in ("tabletop", "libero"):  # others name their cameras
        env = replace(env, wrist_camera=spec.views > 1)
    return replace(recipe, env=env)


def _recipes_for(spec: PolicySpec) -> str:
    """`--recipe NAME, or `: the shipped recipes for policies of this kind and with these action statistics."""
    if spec.head != "tokens":
        return ""  # shipped recipes are for training; their switches are those of other policies
    shipped, found = shipped_recipes(), []
    for name, path in shipped.items():
        policy = {"kind": None, "unnorm_key": None} | read(path, shipped).values["policy"]
        if policy["kind"] == spec.kind and policy["unnorm_key"] in (spec.unnorm_key, f"{spec.unnorm_key}_no_noops"):
            found.append(name)
    return f"--recipe {' or '.join(found) or 'RECIPE (vlarl recipes lists some)'}, or "


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
