"""Owns the check that a task's files are there before ManiSkill asks for them on the terminal, and what is said where they are not."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from vlarl.errors import MachineError


def require_assets(task: str) -> None:
    """MachineError where files that ManiSkill lists for a registered task are missing: which, where they belong, how to get them."""
    from mani_skill.utils.assets import data
    from mani_skill.utils.registration import REGISTERED_ENVS

    named = REGISTERED_ENVS[task].asset_download_ids or []
    require_sources([one for name in named for one in _sources(data, name)], task)


def require_sources(sources: list[str], wanted_by: str) -> None:
    """MachineError where one of ManiSkill's data sources is not on the disk."""
    from mani_skill.utils.assets import data

    missing = [name for name in sources if not data.is_data_source_downloaded(name)]
    if missing:
        places = [str(Path(data.DATA_SOURCES[name].output_dir) / str(data.DATA_SOURCES[name].target_path)) for name in missing]
        listed = ", ".join(f"{name} (belongs in {place})" for name, place in zip(missing, places, strict=True))
        raise MachineError(
            f"env.tasks: {wanted_by} needs files that are not there: {listed}.",
            "Get them with: " + " && ".join(f"python -m mani_skill.utils.download_asset {name} -y" for name in missing)
            + "; or set env.maniskill.assets to the folder that has them under data/.",
        )


def refuse_questions() -> None:
    """Whatever ManiSkill would still ask on the terminal, above all for a robot's files, becomes a MachineError with the question."""
    from mani_skill.utils import download_asset

    def refuse(message: str) -> bool:
        raise MachineError(
            f"ManiSkill misses files and asks: {message}",
            "Get them with python -m mani_skill.utils.download_asset (--list shows what there is).",
        )

    download_asset.prompt_yes_no = refuse


def _sources(data: Any, name: str) -> list[str]:
    return data.expand_data_group_into_individual_data_source_ids(name) if name in data.DATA_GROUPS else [name]
