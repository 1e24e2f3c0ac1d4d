"""The plate suite's arithmetic: counts that were published, ids decoded by hand, the composition of the suite."""
from __future__ import annotations

from collections import Counter
from itertools import product
from math import sqrt

import numpy as np
import pytest
import torch

from vlarl.envs.maniskill import plate_episodes as plate
from vlarl.envs.maniskill.plate_episodes import decode, positions, trials
from vlarl.envs.maniskill.plate_settings import PHOTOS, SENTENCES, SETTINGS, sentence

TRAIN = SETTINGS["train"]
WITHIN = {1, 2, 4, 5}  # squared distances, in grid steps of 3 cm, that are not above 7 cm


def _pairs(cells: list[tuple[int, int]]) -> int:
    return sum((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 not in WITHIN | {0} for a, b in product(cells, cells))


def test_counts_are_the_published_ones() -> None:
    assert len(positions("pair")) == 784 == _pairs(list(product(range(6), range(6))))
    assert trials(TRAIN) == 16 * 16 * 1 * 784 * 4 == 802_816
    assert len(plate.arm_offsets()) - 1 == 14_375 == SETTINGS["EEPose"].extras
    assert len(np.unique(plate.arm_offsets()[1:], axis=0)) == 14_375


def test_the_ring_of_unseen_places_surrounds_the_square() -> None:
    ring = [c for c in product(range(8), range(8)) if {0, 7} & set(c)]
    places = positions("outer pair")
    assert len(ring) == 28 and len(places) == _pairs(ring)
    outside = np.abs(places[..., :2] - np.array(plate.CENTRE)).max(-1)
    assert np.allclose(outside, 0.105)  # 1.4 half edges
    assert trials(SETTINGS["Position"]) == 16 * 16 * len(places) * 4


@pytest.mark.parametrize(("layout", "far"), [("third object", (0, 2)), ("third plate", (1, 2))])
def test_the_third_place_keeps_its_distances(layout: str, far: tuple[int, int]) -> None:
    places = positions(layout)[..., :2]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        gap = np.linalg.norm(places[:, a] - places[:, b], axis=-1)
        assert gap.min() > (0.1499 if (a, b) == far else 0.07)
    assert len(np.unique(positions(layout).reshape(-1, 9), axis=0)) == len(places)


def test_an_id_is_read_as_digits() -> None:
    """802,815 is the last of all; 4 * (784 * (16 * 3 + 5) + 10) + 2 = 166,250."""
    got = decode(TRAIN, np.array([0, 3, 4, 166_250, 802_815, 802_816]))
    assert got.object.tolist() == [0, 0, 0, 3, 15, 0]
    assert got.photo.tolist() == [0, 0, 0, 5, 15, 0]
    assert got.position.tolist() == [0, 0, 1, 10, 783, 0]
    assert got.yaw.tolist() == [0, 3, 0, 2, 3, 0]
    assert got.plate.tolist() == got.extra.tolist() == [0] * 6


def test_the_extra_digit_stands_before_the_plate_or_after_it() -> None:
    textured = decode(SETTINGS["VisionTexture05"], np.array([16 * 784 * 4 * 2 + 1]))
    assert (textured.extra.item(), textured.plate.item(), textured.object.item(), textured.yaw.item()) == (3, 0, 0, 1)
    setting = SETTINGS["MultiPlate"]
    scenes = 21 * len(positions("third plate")) * 4
    got = decode(setting, np.array([scenes * 2, scenes * 15 * 4 + scenes * 14]))
    assert got.plate.tolist() == [1, 5] and got.extra.tolist() == [4, 4]  # 1 + (0 + 2 + 1) % 16, 1 + (4 + 14 + 1) % 16


@pytest.mark.parametrize("name", SETTINGS)
def test_every_id_names_things_that_exist(name: str) -> None:
    setting = SETTINGS[name]
    ids = np.append(np.random.default_rng(0).integers(0, trials(setting), 20_000), trials(setting) - 1)
    got = decode(setting, ids)
    for field, (count, first) in (("object", setting.objects), ("plate", setting.plates), ("photo", setting.photos)):
        assert set(getattr(got, field).tolist()) == set(range(first, first + count))
    assert got.position.max() < len(positions(setting.layout)) and got.yaw.max() < len(plate.yaws(setting.layout))
    limit = {"": 1, "texture": PHOTOS, "sentence": len(SENTENCES), "arm": 14_376, "object": 25, "plate": 17}[setting.extra]
    assert got.extra.min() >= 0 and got.extra.max() < limit
    as_tensor = decode(setting, torch.from_numpy(ids))
    assert as_tensor.extra.dtype == torch.int64 and as_tensor.extra.tolist() == got.extra.tolist()


@pytest.mark.parametrize(("name", "own"), [("MultiCarrot", 1 / 8), ("MultiCarrot-train", 0), ("MultiPlate", 0), ("MultiPlate-train", 0)])
def test_how_often_a_thing_is_its_own_distractor(name: str, own: float) -> None:
    setting = SETTINGS[name]
    scenes = setting.photos[0] * len(positions(setting.layout)) * 4
    kinds = setting.objects[0] * setting.extras * setting.plates[0]
    got = decode(setting, np.arange(kinds) * scenes)
    thing = got.object if setting.extra == "object" else got.plate
    assert (thing == got.extra).mean() == own


def test_the_suite_is_one_five_seven_three() -> None:
    assert Counter(s.axis for s in SETTINGS.values()) == {"in distribution": 1, "vision": 5, "semantic": 7, "execution": 3}
    assert len({s.published for s in SETTINGS.values()}) == 14


def test_places_in_metres() -> None:
    """The first object stands in a corner, its first partner three steps (9 cm) away."""
    first = positions("pair")[0]
    assert np.allclose(first, [[-0.235, -0.075, 0.9], [-0.235, 0.015, 0.9]])
    assert np.isclose(np.linalg.norm(first[0] - first[1]), 3 * 0.03) and sqrt(5.44) < 3
    assert sentence(3, "carrot", "plate") == "move the carrot to the plate"
