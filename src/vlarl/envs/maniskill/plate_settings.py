"""Owns the table of the 25-object plate suite's settings, and its sentences. Stdlib only: the planner reads it.

The suite is the one behind the ManiSkill tables of RL4VLA (arXiv 2505.19789) and RLinf-VLA (arXiv 2510.06710): put one of 25 objects
on a plate, in scenes that are drawn over photographs of tables. In the order of their asset tables 16 objects, 16 photographs and 1 plate
are for training, the rest is unseen.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Layout = Literal["pair", "outer pair", "third object", "third plate"]
Extra = Literal["", "texture", "sentence", "arm", "object", "plate"]
OBJECTS, PLATES, PHOTOS = 25, 17, 21  # in the asset tables
SENTENCES = (  # {o}: object, {p}: plate. The first is the one of training, 1 to 16 are drawn by the setting Instruct
    "put {o} on {p}", "Place the {o} on the {p}", "set {o} on {p}", "move the {o} to the {p}", "Take the {o} and put it on the {p}",
    "pick up {o} and set it down on {p}", "please put the {o} on the {p}", "Put {o} onto {p}.", "place the {o} onto the {p} surface",
    "Make sure {o} is on {p}.", "on the {p}, put the {o}", "put the {o} where the {p} is", "Move the {o} from the table to the {p}",
    "Move {o} so it’s on {p}.", "Can you put {o} on {p}?", "{o} on the {p}, please.", "the {o} should be placed on the {p}.",
)


@dataclass(frozen=True)
class Setting:
    """One distribution of episodes. Pairs are (how many, the first).

    published: id under which the benchmark lists it; axis: the group in which its score is averaged. extra: what the additional digit
    picks, out of `extras` from `extra_first` on; a distractor's digit counts on from the thing it distracts from, modulo `extra_modulo`.
    layout: places of things. texture_mix: largest weight of the texture. whole: it covers the frame, not robot and objects alone.
    moves: the object jumps to the third place in mid-episode.
    """

    published: str
    axis: Literal["in distribution", "vision", "semantic", "execution"]
    objects: tuple[int, int] = (16, 0)
    plates: tuple[int, int] = (1, 0)
    photos: tuple[int, int] = (16, 0)
    layout: Layout = "pair"
    extra: Extra = ""
    extras: int = 1
    extra_first: int = 0
    extra_modulo: int = 0
    texture_mix: float = 0.0
    whole: bool = False
    moves: bool = False


def _id(name: str) -> str:
    return f"PutOnPlateInScene25{name}-v1"


_TEXTURE = Setting(_id("VisionTexture03"), "vision", extra="texture", extras=16, extra_first=1, texture_mix=0.3)
_MULTI_OBJECT = Setting(_id("MultiCarrot"), "semantic", layout="third object", extra="object", extras=15, extra_modulo=16)
_MULTI_PLATE = Setting(
    _id("MultiPlate"), "semantic", photos=(PHOTOS, 0), layout="third plate", extra="plate", extras=16, extra_modulo=17
)
SETTINGS = {
    "train": Setting("PutOnPlateInScene25Main-v3", "in distribution"),
    "VisionImage": Setting(_id("VisionImage"), "vision", photos=(5, 16)),
    "VisionTexture03": _TEXTURE,
    "VisionTexture05": replace(_TEXTURE, published=_id("VisionTexture05"), texture_mix=0.5),
    "VisionWhole03": replace(_TEXTURE, published=_id("VisionWhole03"), whole=True),
    "VisionWhole05": replace(_TEXTURE, published=_id("VisionWhole05"), whole=True, texture_mix=0.5),
    "Carrot": Setting(_id("Carrot"), "semantic", objects=(9, 16)),
    "Plate": Setting(_id("Plate"), "semantic", plates=(16, 1)),
    "Instruct": Setting(_id("Instruct"), "semantic", extra="sentence", extras=16, extra_first=1),
    "MultiCarrot": replace(_MULTI_OBJECT, objects=(9, 16), extras=8, extra_modulo=9, extra_first=16),
    "MultiPlate": replace(_MULTI_PLATE, plates=(16, 1), extras=15, extra_modulo=16, extra_first=1),
    "MultiCarrot-train": _MULTI_OBJECT,
    "MultiPlate-train": _MULTI_PLATE,
    "Position": Setting(_id("Position"), "execution", layout="outer pair"),
    "EEPose": Setting(_id("EEPose"), "execution", extra="arm", extras=14375, extra_first=1),
    "PositionChangeTo": Setting(_id("PositionChangeTo"), "execution", layout="third object", moves=True),
}


def sentence(number: int, object_name: str, plate_name: str) -> str:
    """The instruction of one episode."""
    return SENTENCES[number].format(o=object_name, p=plate_name)
