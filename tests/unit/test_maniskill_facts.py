"""What is known of ManiSkill without it: recipes, sentences, the BRDF table, pictures of the plate suite, missing files."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlarl.envs.base import HOSTED, SIMULATORS
from vlarl.envs.maniskill import plate_pictures, simulation
from vlarl.envs.maniskill.plate_assets import read_assets
from vlarl.envs.maniskill.spec import PLATE_TASK, is_task_id, spelt_out
from vlarl.envs.sapien_renderer import brdf_table
from vlarl.errors import MachineError, PlanError
from vlarl.plan.cluster import Cluster
from vlarl.plan.compile import compile_plan
from vlarl.plan.memory import HOSTS, SCENES
from vlarl.plan.specs import simulator_spec
from vlarl.policies.spec import PolicySpec
from vlarl.recipe.rules import recipe_clashes
from vlarl.recipe.schema import Eval, Placement, Policy, Recipe, Update
from vlarl.recipe.simulators import Env, Maniskill
from vlarl.worker.setup import drawing_device


def blamed(**env: Any) -> list[str]:
    settings = {"simulator": "maniskill", "tasks": ("PickCube-v1",)} | env
    return [clash.field for clash in recipe_clashes(Recipe(name="x", env=Env(**settings), policy=Policy(checkpoint="scratch:tiny")))]


def test_rules() -> None:
    assert blamed() == blamed(reward="relative") == blamed(tasks=(PLATE_TASK,), variation="EEPose") == []
    assert blamed(tasks=("pick",)) == ["env.tasks"]
    assert blamed(variation="EEPose") == ["env.variation"]
    assert blamed(variation="nonsense") == ["env.variation"] * 2
    assert blamed(reward="shaped") == ["env.reward"]
    assert blamed(wrist_camera=True) == ["env.wrist_camera"]
    assert blamed(maniskill=Maniskill(instructions=("a", "b"))) == ["env.maniskill.instructions"]


def test_facts() -> None:
    spec = simulator_spec(Env(simulator="maniskill", tasks=("PickCube-v1",), image_size=96, maniskill=Maniskill(cameras=("a", "b"))))
    assert (spec.views, spec.height, spec.state_dim, spec.action_dim) == (2, 96, 8, 7)
    assert simulator_spec(Env(simulator="maniskill", tasks=("PickCube-v1",))).views == 1
    assert is_task_id("MS-AntWalk-v1") and not is_task_id("libero_goal-3")
    assert spelt_out("LiftPegUpright-v1") == "lift peg upright"


def test_memory_is_counted_where_the_scenes_are() -> None:
    """64 scenes in processes of 1.1 GB each overflow 64 GiB; on a GPU they are two batches in the rank, and 16 more evaluate."""
    env = Env(simulator="maniskill", tasks=("PickCube-v1",), parallel=64)
    placement, evaluation = Placement(mode="collocated", stages=2), Eval(every=1, parallel=16)
    update, chosen = Update(minibatches=1), Policy(checkpoint="x")
    recipe = Recipe(name="a", ranks=1, env=env, policy=chosen, update=update, placement=placement, eval=evaluation)
    policy = PolicySpec("openvla-oft", 64, 1, 4, 7, 0, "x", 1_000_000, 96, 3, 68)
    gpu = Cluster(devices_per_node=1, device="cuda", cores=8, device_bytes=80 * 2**30, host_bytes=64 * 2**30)
    plan = compile_plan(recipe, gpu, policy, simulator_spec(env))
    assert not any(row.component.startswith(HOSTS) for row in plan.memory)
    scenes = [(row.phase, row.where, row.bytes / 2**29) for row in plan.memory if row.component == SCENES]
    kept, evaluated = 2 * 3 + 64 / 16, 3 + 16 / 16  # in units of 512 MiB: 3 per batch, 1 per 16 scenes
    assert scenes == [(phase, "device", kept) for phase in ("rollout", "update", "evaluation")] + [("evaluation", "device", evaluated)]
    with pytest.raises(PlanError, match="simulator processes: 64 x 1 env, 1.0 GiB each most of all"):
        compile_plan(recipe, Cluster(cores=8, host_bytes=64 * 2**30), policy, simulator_spec(env))


@pytest.mark.parametrize("name", ["tabletop", "libero", "maniskill"])
def test_specs_say_where_the_scenes_are(name: str) -> None:
    spec = simulator_spec(Env(simulator=name))  # type: ignore[arg-type]
    assert (spec.slot_bytes > 0, spec.gpu_slot_bytes > 0) == (name in HOSTED, name in HOSTED and name in SIMULATORS)


def test_brdf_table() -> None:
    """A mirror seen from the front reflects with its own colour: scale 1, bias 0; at a grazing angle everything does: scale 0, bias 1.
    Scale + bias is the share of light that is reflected by a white surface: at most 1, and less the rougher it is."""
    table = brdf_table(16, 512)
    assert table.shape == (16, 16, 4) and table.dtype == np.float32
    assert table[15, 0, :2] == pytest.approx([1, 0], abs=0.02)
    assert table[0, 0, 1] > 0.7 > 0.3 > table[0, 0, 0]
    white = table[8, :, 0] + table[8, :, 1]
    assert white.max() < 1.01 and (np.diff(white[2:]) < 0.005).all()


def test_boxes() -> None:
    masks = torch.zeros(2, 4, 6, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    assert [side.tolist() for side in plate_pictures.box(masks)] == [[2, 0], [4, 0], [1, 0], [2, 0]]


def test_foreground_is_pasted_and_blended() -> None:
    rgb, photo = torch.full((1, 4, 6, 3), 100, dtype=torch.uint8), torch.full((1, 4, 6, 3), 20, dtype=torch.uint8)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 1:3, 2:6] = True
    picture = plate_pictures.paste(rgb, mask, photo)
    assert picture[0, 1, 2, 0] == 100 and picture[0, 0, 0, 0] == 20
    # A texture of two columns, 0 and 200, stretched over a box of 2 x 4 pixels: centres at 0, 50, 150, 200 as align_corners=False has it.
    texture = torch.tensor([0, 200], dtype=torch.uint8)[None, None, :, None].expand(1, 2, 2, 3)
    blended = plate_pictures.blend_foreground(picture, mask, texture, torch.tensor([0.5]))
    assert blended[0, 1, :, 0].tolist() == [20, 20, 50, 75, 125, 150]
    assert plate_pictures.to_bytes(blended)[0, 1, 3].tolist() == [75] * 3


def test_the_whole_frame_is_blended_with_a_window_that_follows_the_robot() -> None:
    picture, mask = torch.zeros(2, 4, 6, 3), torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[0, 2:4, 3:6] = True  # columns 3 to 5, rows 2 to 3: middle (4, 2); nothing: (1, 1), the smallest
    texture = (torch.arange(8)[:, None] * 12 + torch.arange(12)).to(torch.uint8)[None, :, :, None].expand(2, 8, 12, 3)
    blended = plate_pictures.blend_whole(picture, mask, texture, torch.tensor([1.0, 0.5]))
    assert blended[0, 0, 0, 0] == 2 * 12 + 4 and blended[0, 3, 5, 0] == 5 * 12 + 9
    assert blended[1, 0, 0, 0] == (12 + 1) / 2


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"more_carrot/model_db.json.*hf download .*RLinf/maniskill_assets --local-dir .*") as caught:
        read_assets(tmp_path / "put_on_plate_25")
    assert str(tmp_path) in caught.value.message and str(tmp_path) in caught.value.hint


def test_scenes_are_simulated_and_drawn_by_the_ranks_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    third = {"sim_backend": "physx_cuda:2", "render_backend": "sapien_cuda:2"}
    assert simulation.backends(torch.device("cuda", 2)) == third
    for there, drawn in ((True, "gpu"), (False, "cpu")):
        monkeypatch.setattr(simulation, "has_gpu", lambda there=there: there)
        assert simulation.backends(torch.device("cpu")) == {"sim_backend": "physx_cpu", "render_backend": drawn}


def test_hosts_draw_on_their_ranks_gpu() -> None:
    second = torch.device("cuda", 1)
    assert drawing_device(torch.device("cpu"), "0,1") == {}
    assert drawing_device(second, None) == {"CUDA_VISIBLE_DEVICES": "1", "MUJOCO_EGL_DEVICE_ID": "1"}
    assert drawing_device(second, "4, 6") == {"CUDA_VISIBLE_DEVICES": "6", "MUJOCO_EGL_DEVICE_ID": "6"}
    assert drawing_device(second, "GPU-a,GPU-b") == {"CUDA_VISIBLE_DEVICES": "GPU-b"}
