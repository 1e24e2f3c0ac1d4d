"""Owns where the shipped recipes and profiles are: inside the package in a wheel, at the repository's top in a checkout."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

import yaml

from vlarl import serial
from vlarl.errors import RecipeError, VlarlError
from vlarl.plan.profile import Profile, check
from vlarl.recipe.document import parse


def shipped_recipes() -> dict[str, Path]:
    """Name -> file, sorted by name."""
    return _shipped("recipes")


def shipped_profiles() -> dict[str, Path]:
    """Name -> file, sorted by name."""
    return _shipped("profiles")


def find_recipe(name: str) -> Path:
    """A recipe file, or a shipped recipe by its name."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    listed = f"Shipped: {', '.join(shipped)}."
    if path.is_dir():
        raise RecipeError([f"is a folder, expected a recipe file. {listed}"], name)
    if "=" in name:
        raise RecipeError([f"is an override, and the recipe is missing: name it first, as in `quickstart {name}`. {listed}"], name)
    close = get_close_matches(path.name.removesuffix(".yaml"), shipped, n=1, cutoff=0.6)
    meant = f"Did you mean {close[0]}? " if close else ""
    raise RecipeError([f"no such file, and no shipped recipe of this name. {meant}{listed}"], name)


def summary(path: Path) -> str:
    """The recipe's own one-line description."""
    text = parse(path.read_text(encoding="utf-8"), path.name).values.get("summary")
    return str(text) if text else ""


def read_profile(name: str) -> Profile:
    """A profile file, or a shipped profile by its name. Raises VlarlError where there is none or it is not one."""
    path, shipped = Path(name), shipped_profiles()
    if not path.is_file():
        if name not in shipped:
            raise VlarlError(f"{name}: no such file, and no shipped profile of this name.", f"Shipped: {', '.join(shipped)}.")
        path = shipped[name]
    try:
        document = parse(path.read_text(encoding="utf-8"), path.name)
        profile = serial.from_dict(Profile, document.values)
    except (OSError, UnicodeDecodeError) as error:
        raise VlarlError(f"{path} cannot be read: {error}.") from None
    except VlarlError as error:
        raise VlarlError(f"{path}: {error.message}", "Shipped profiles show every field.") from None
    return check(profile, str(path))


def profile_text(profile: Profile) -> str:
    """A profile as YAML: a line per field, curves as pairs."""
    lines = []
    for key, value in serial.to_dict(profile).items():
        if isinstance(value, list):
            pairs = ", ".join(f"[{size:g}, {seconds:.6g}]" for size, seconds in value)
            lines.append(f"{key}: [{pairs}]\n")
        else:
            lines.append(yaml.safe_dump({key: value}, width=130, allow_unicode=True))
    return "".join(lines)


def _shipped(kind: str) -> dict[str, Path]:
    here = Path(__file__).parent
    folder = here / f"_{kind}"
    if not folder.is_dir():
        folder = here.parent.parent / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
