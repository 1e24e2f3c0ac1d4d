"""Owns where the shipped recipes are: inside the package in a wheel, in the repository's recipes/ in a checkout."""

from __future__ import annotations

from pathlib import Path

from vlarl.errors import RecipeError
from vlarl.recipe.document import parse


def shipped_recipes() -> dict[str, Path]:
    """Name -> file, sorted by name."""
    here = Path(__file__).parent
    folder = here / "_recipes"
    if not folder.is_dir():
        folder = here.parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe file, or a shipped recipe by its name."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise RecipeError([f"no such file, and no shipped recipe of this name. Shipped: {', '.join(shipped)}."], name)


def summary(path: Path) -> str:
    """The recipe's own one-line description."""
    text = parse(path.read_text(encoding="utf-8"), path.name).values.get("summary")
    return str(text) if text else ""
