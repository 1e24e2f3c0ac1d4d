"""Owns where the plate suite's files lie and what they say: objects, plates, photographs of tables, textures. Simulator-free.

Layout, as published (FOLDER is `data/tasks/put_on_plate_25` in ManiSkill's asset folder):

    FOLDER/carrot/more_carrot/model_db.json   25 objects: {folder: {name, bbox: {min, max}, density, scale}}
    FOLDER/carrot/more_plate/model_db.json    17 plates, alike
        .../{folder}/collision.obj and textured.obj, .dae or .glb
    FOLDER/carrot/more_table/model_db.json    21 tables: {photograph: {texture, mix}}
        .../imgs/{photograph}, .../textures/{texture}
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlarl.envs.maniskill.plate_settings import OBJECTS, PHOTOS, PLATES
from vlarl.errors import MachineError

PLACE = "tasks/put_on_plate_25"  # under ManiSkill's data folder
DOWNLOAD = "hf download --repo-type dataset RLinf/maniskill_assets --local-dir {}"
VISUALS = ("textured.obj", "textured.dae", "textured.glb")
DENSITY, SCALE = 1000.0, 1.0  # kg/m3 and factor of a model that says none


@dataclass(frozen=True)
class Model:
    """A thing to grasp or to put it on. name: in sentences. size: metres along its own axes, scaled. density: kg/m3."""

    name: str
    collision: Path
    visual: Path
    density: float
    scale: float
    size: tuple[float, float, float]


@dataclass(frozen=True)
class PlateAssets:
    """All files of the suite, in the order of the asset tables, which episode ids count by. mix: weight of each texture, 0..1."""

    objects: tuple[Model, ...]
    plates: tuple[Model, ...]
    photos: tuple[Path, ...]
    textures: tuple[Path, ...]
    mix: tuple[float, ...]


def read_assets(folder: Path) -> PlateAssets:
    """The suite's files under `folder`. MachineError where some are missing: which, where they belong, how to get them."""
    root = folder / "carrot"
    tables = [root / name / "model_db.json" for name in ("more_carrot", "more_plate", "more_table")]
    _require([t for t in tables if not t.is_file()], folder)
    objects, plates, photos = [_table(t, count) for t, count in zip(tables, (OBJECTS, PLATES, PHOTOS), strict=True)]
    place = root / "more_table"
    assets = PlateAssets(
        objects=tuple(_model(root / "more_carrot" / name, row) for name, row in objects.items()),
        plates=tuple(_model(root / "more_plate" / name, row) for name, row in plates.items()),
        photos=tuple(place / "imgs" / name for name in photos),
        textures=tuple(place / "textures" / row["texture"] for row in photos.values()),
        mix=tuple(float(row["mix"]) for row in photos.values()),
    )
    models = assets.objects + assets.plates
    files = [m.collision for m in models] + [m.visual for m in models] + list(assets.photos) + list(assets.textures)
    _require([f for f in files if not f.is_file()], folder)
    return assets


def _table(path: Path, count: int) -> dict[str, Any]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if len(rows) != count:
        raise MachineError(f"{path} lists {len(rows)} things, expected {count}.", "Fetch the files anew.")
    return rows


def _model(folder: Path, row: dict[str, Any]) -> Model:
    # The published code draws one of several scales with a seed of its own; every published model has a single one.
    scale = float(row["scale"][0]) if row.get("scale") else SCALE
    low, high = row["bbox"]["min"], row["bbox"]["max"]
    size = tuple((b - a) * scale for a, b in zip(low, high, strict=True))
    visual = next((folder / name for name in VISUALS if (folder / name).is_file()), folder / VISUALS[0])
    density = float(row["density"]) if "density" in row else DENSITY
    return Model(row["name"], folder / "collision.obj", visual, density, scale, (size[0], size[1], size[2]))


def _require(missing: list[Path], folder: Path) -> None:
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        listed = ", ".join(str(path) for path in missing[:3])
        raise MachineError(
            f"the 25-object plate suite misses files: {listed}{more}.", "Get them with: " + DOWNLOAD.format(folder)
        )
