"""Owns the command line: names, options, help, and what an error does to the exit code. Commands import what they need when they run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlarl.errors import VlarlError

app = typer.Typer(
    name="vlarl",
    help="Post-train vision-language-action robot policies with reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as update.updates=10.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped recipe.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder. Default: runs/<name>-<time>.")]


def main() -> None:
    """Entry point of the `vlarl` script. Exit codes: 0, 2 for a mistake the user can mend, 1 for a failed worker, 128 + n for signal n."""
    try:
        app()
    except VlarlError as problem:
        from vlarl_cli import render

        render.error(problem)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"vlarl {version('vlarl')}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Post-train vision-language-action robot policies with reinforcement learning."""


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped recipe.")] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN_DIR", help="Go on with this run from its newest checkpoint.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    in_process: Annotated[bool, typer.Option("--in-process", help="One rank in this process, for breakpoints.")] = False,
) -> None:
    """Train a policy as the recipe says: warm start if it has one, then reinforcement learning."""
    from vlarl_cli import run

    changes = list(overrides or [])
    if resume is not None:
        if out is not None:
            raise typer.BadParameter("--resume goes on in the run's own folder; leave --out away.")
        if recipe is not None and "=" not in recipe:
            raise typer.BadParameter("--resume takes the run's own recipe; give overrides only.")
        raise typer.Exit(
            run.resume(resume, ([recipe] if recipe else []) + changes, run.Launch("train", resume=True, in_process=in_process))
        )
    if recipe is None:
        raise typer.BadParameter("Name a recipe file or a shipped recipe (see `vlarl recipes`), or use --resume RUN_DIR.")
    if dry_run:
        plan(recipe, changes)
        return
    raise typer.Exit(run.start(run.load(recipe, changes), run.Launch("train", out, in_process=in_process)))


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", metavar="FILE", help="Plan for the machine described in this JSON file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a recipe would do here: ranks, roles, env slots, batch arithmetic, memory. Starts nothing."""
    from vlarl import serial
    from vlarl.plan.cluster import from_file
    from vlarl_cli import render, run

    placement = run.make_plan(run.load(recipe, list(overrides or [])), "train", from_file(cluster) if cluster else None)
    if as_json:
        typer.echo(serial.dumps(placement), nl=False)
    else:
        render.plan(placement)


@app.command()
def sft(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Out = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="One rank in this process, for breakpoints.")] = False,
) -> None:
    """Run a recipe's warm start alone: clone the simulator's expert, and write the policy folder."""
    from vlarl_cli import run

    raise typer.Exit(run.start(run.load(recipe, list(overrides or [])), run.Launch("sft", out, in_process=in_process)))


@app.command("eval")
def evaluate(
    ckpt: Annotated[str, typer.Option("--ckpt", metavar="DIR", help="Run folder, checkpoint folder, policy folder or bundled:NAME.")],
    sets: Annotated[str, typer.Option("--set", help="Scenes: train, vision, semantics, execution, several with commas, or all.")] = "train",
    episodes: Annotated[int, typer.Option(min=1, help="Episodes per set.")] = 400,
    parallel: Annotated[int | None, typer.Option(min=1, help="Episodes at once. Default: as in training.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Task families, with commas. Default: as in training.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0: greedy. Default: the training recipe's eval.temperature.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of scenes and sampling; results with one seed share their episodes.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Out = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="One rank in this process, for breakpoints.")] = False,
) -> None:
    """Measure a checkpoint's success rate: k/n with 95 % Wilson intervals, per task and pooled."""
    from vlarl_cli import run
    from vlarl_cli.evaluate import EvalOptions, eval_recipe

    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter("expected auto, cpu or cuda.", param_hint="--device")
    names = tuple(t.strip() for t in tasks.split(",")) if tasks else None
    loaded, variations = eval_recipe(EvalOptions(ckpt, sets, episodes, parallel, names, temperature, seed, device))
    raise typer.Exit(run.start(loaded, run.Launch("eval", out, in_process=in_process, variations=variations)))


@app.command()
def recipes(
    json_schema: Annotated[bool, typer.Option("--json-schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """List the shipped recipes."""
    if json_schema:
        from vlarl.recipe.load import json_schema as schema

        typer.echo(json.dumps(schema(), indent=2))
        return
    from vlarl_cli import render
    from vlarl_cli.shipped import shipped_recipes, summary

    render.recipe_list([(name, summary(path)) for name, path in shipped_recipes().items()])


if __name__ == "__main__":
    main()
