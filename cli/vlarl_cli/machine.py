"""Owns the commands that look at this machine and at what is shipped: simulators, the check-up, the recipes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

envs = typer.Typer(help="Simulators: install them, and see whether they work.", no_args_is_help=True)


@envs.command("install")
def install_envs(
    simulators: Annotated[list[str], typer.Argument(metavar="NAME...", help="maniskill, libero, robotwin.")],
    system: Annotated[bool, typer.Option("--system", help="As root: install the system packages too that they render with.")] = False,
) -> None:
    """Install simulators, in the releases that this vlarl knows; what is there stays, and what was interrupted goes on."""
    from vlarl_cli import render
    from vlarl_cli import simulators as known
    from vlarl_cli import system_packages as packages

    wanted = known.names(simulators)
    missing = packages.missing(wanted)
    if missing and system and packages.is_root():
        render.note(f"system packages: {', '.join(missing)}")
        packages.install(missing)
    elif missing:
        render.system_commands(missing, packages.commands(missing))
    known.install(wanted, render.note)


@envs.command("list")
def list_envs() -> None:
    """Try every simulator: is it installed, does it import and draw a picture, and what to do if not."""
    from vlarl_cli import render
    from vlarl_cli.simulators import examine_all

    render.simulators(examine_all())


def doctor() -> None:
    """Check this machine: packages, devices, torch, limits, simulators; what is wrong, and what to do. For bug reports."""
    from vlarl_cli import doctor as checking
    from vlarl_cli import render
    from vlarl_cli.simulators import examine_all

    found = checking.examine()
    render.findings(found)
    render.simulators(examine_all())
    raise typer.Exit(2 if any(finding.problem for finding in found) else 0)


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
