"""The LIBERO adapter, for real: `vlarl envs install libero`."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import vlarl
from vlarl.envs.base import HOSTED
from vlarl.envs.hosts import HostedEnv, Hosting
from vlarl.envs.libero import setup
from vlarl.envs.libero.spec import SUITES, env_spec, expand, reset_seed, split, stored_state
from vlarl.envs.spec import EVAL_INIT_STATE, EpisodeSpec
from vlarl.errors import MachineError

needs_libero = pytest.mark.usefixtures("libero")
OPTIONS = {"gl": "auto", "assets": None, "render": "full", "settle_steps": 1, "reset": "soft"}


def test_names_of_tasks() -> None:
    assert expand("libero_goal-3") == ("libero_goal-3",) and split("libero_goal-3") == ("libero_goal", 3)
    assert expand("libero_10") == tuple(f"libero_10-{n}" for n in range(10))
    merged = expand("libero_130")
    assert merged is not None and len(set(merged)) == len(merged) == 130
    assert [expand(name) for name in ("libero_goal-10", "libero_goal-03", "libero_goal-x", "libero_100", "goal-1")] == [None] * 5
    assert env_spec(("libero_90", "libero_10-2"), 5, 64, False, "auto").tasks[-2:] == ("libero_90-89", "libero_10-2")
    assert sum(SUITES.values()) == 130


def test_evaluation_plays_every_stored_state_once_in_fifty_rounds() -> None:
    assert [stored_state(EVAL_INIT_STATE + n) for n in range(100)] == [*range(50), *range(50)]
    assert stored_state(53) == 3 and reset_seed(7, 3) != reset_seed(7, 53) and 0 <= reset_seed(2**31, EVAL_INIT_STATE) < 2**32


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, libero: None) -> Any:
    """What libero_facts.py found."""
    out = tmp_path_factory.mktemp("libero") / "facts.npz"
    script = Path(__file__).parents[1] / "helpers" / "libero_facts.py"
    source = Path(vlarl.__path__[0]).parent
    home = out.parent / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, str(script), str(source), str(out)], stdin=subprocess.DEVNULL, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = [file for file in home.rglob("*") if file.is_file() and "mesa_shader_cache" not in str(file)]
    assert not written, "the user's home is left alone, but for the graphics driver's own cache"
    return np.load(out)


@needs_libero
def test_frames_and_states_are_those_of_liberos_own_step(facts: Any) -> None:
    assert np.array_equal(facts["chunk_image"], facts["reference_image"])
    assert np.array_equal(facts["chunk_state"], facts["reference_state"])


@needs_libero
def test_pictures_show_something_and_change_with_the_arm(facts: Any) -> None:
    image = facts["chunk_image"].astype(int)
    assert image.shape == (2, 2, 64, 64, 3) and all(view.std() > 20 for view in image[0])
    assert all(np.abs(image[1, v] - image[0, v]).mean() > 0.5 for v in range(2))


@needs_libero
def test_a_chunk_equals_single_steps_and_equal_specs_equal_episodes(facts: Any) -> None:
    for name in ("image", "state"):
        assert np.array_equal(facts[f"chunk_{name}"], facts[f"single_{name}"]), name


@needs_libero
def test_the_seed_places_the_fixtures(facts: Any) -> None:
    moved = np.abs(facts["other_image"][0, 0].astype(int) - facts["chunk_image"][0, 0]).mean()
    assert moved > 0.5
    assert np.abs(facts["other_state"][0] - facts["chunk_state"][0]).max() < 1e-3  # the stored state places the arm


@needs_libero
def test_a_soft_reset_shows_the_same(facts: Any) -> None:
    assert np.array_equal(facts["soft_image"][0], facts["chunk_image"][0])
    assert np.abs(facts["soft_state"] - facts["chunk_state"]).max() < 1e-4


@needs_libero
def test_fast_pictures_differ_a_little(facts: Any) -> None:
    apart = np.abs(facts["fast_image"].astype(int) - facts["chunk_image"]).mean()
    assert 0.05 < apart < 8  # edges, most of them at this size
    assert np.array_equal(facts["fast_state"], facts["chunk_state"])


@needs_libero
def test_pictures_are_upright_and_mirrored_as_the_training_datas_are(facts: Any) -> None:
    """Turned by 180 degrees from OpenGL's, whose rows run upwards: upright, and left for right."""
    low, left = json.loads(str(facts["facts"]))["seen"]
    assert low["upright"][0] > 40 and left["upright"][1] < 18 and low["size"] > 3 and left["size"] > 3  # of 64
    for thing in (low, left):
        assert abs(thing["seen"][0] - thing["upright"][0]) < 5 and abs(thing["seen"][1] - (64 - thing["upright"][1])) < 5


@needs_libero
def test_nothing_is_rendered_within_a_chunk(facts: Any) -> None:
    assert json.loads(str(facts["facts"]))["pictures"] == [0, 2]


@needs_libero
def test_the_instruction_is_the_tasks_and_the_host_leaves_torch_alone(facts: Any) -> None:
    found = json.loads(str(facts["facts"]))
    assert found["sentence"] == "pick up the alphabet soup and place it in the basket" and not found["torch"]


def hosting(folder: Path, per_host: int, **changes: Any) -> Hosting:
    return Hosting(HOSTED["libero"], {"libero": {**OPTIONS, **changes}}, sys.executable, per_host, 600.0, 300.0, {}, folder)


@needs_libero
def test_one_host_or_three_and_one_killed_within_an_episode_play_the_same(tmp_path: Path) -> None:
    spec, index = env_spec(("libero_object-0",), 20, 64, False, "auto"), torch.arange(3)
    actions = torch.from_numpy(np.random.RandomState(1).uniform(-1, 1, (2, 3, 2, 7)).astype(np.float32))
    seen = []
    for per_host in (3, 1):
        env = HostedEnv(3, 0, spec, hosting(tmp_path / str(per_host), per_host), torch.device("cpu"), lambda n, total: None)
        try:
            env.reset(index, [EpisodeSpec(n, 0, 11 + n // 2, 5) for n in range(3)])  # the first two are equal
            env.step_chunk(actions[0], torch.ones(3, dtype=torch.bool))
            if per_host == 1:
                os.kill(_hosts()[2], signal.SIGKILL)
                time.sleep(0.5)
            env.step_chunk(actions[1], torch.ones(3, dtype=torch.bool))
            seen.append(env.observe(index))
        finally:
            env.close()
    one, three = seen
    assert torch.equal(one.image_BVHWC, three.image_BVHWC) and torch.equal(one.state_BD, three.state_BD)
    assert not torch.equal(one.image_BVHWC[0], one.image_BVHWC[1])  # other actions


def _hosts() -> list[int]:
    return [p.pid for p in psutil.Process().children() if "host/__main__.py" in " ".join(p.cmdline())]


@needs_libero
def test_missing_assets_are_named(tmp_path: Path) -> None:
    spec = env_spec(("libero_object-0",), 20, 64, False, "auto")
    with pytest.raises(MachineError, match="lacks LIBERO's assets scenes"):
        HostedEnv(1, 0, spec, hosting(tmp_path, 1, assets=str(tmp_path)), torch.device("cpu"), lambda n, total: None)


def test_an_interpreter_without_libero_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    monkeypatch.setattr(setup, "_choose_renderer", lambda gl: None)
    with pytest.raises(MachineError, match=f"not installed for {sys.executable}.*vlarl envs install libero"):
        setup.bring_up("auto", None, False)
