"""Owns Simulation: one ManiSkill scene, or a batch of them on a GPU, opened as the recipe says and stepped without looking.

Cameras render when `look` is called, never while stepping. What an episode does follows from its seed (or its ids, for tasks that read
`options["episode_id"]`) and its actions, whatever happens in the other scenes.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple
from zipfile import BadZipFile

import torch
import torch.nn.functional as F
from torch import Tensor

from vlarl.envs.maniskill.spec import ACTION_DIM, ACTION_PARTS, INSTRUCTIONS, PLATE_TASK, STATE_DIM, spelt_out
from vlarl.envs.sapien_renderer import has_gpu, install_brdf_table, no_renderer
from vlarl.envs.spec import EnvSpec, EpisodeSpec
from vlarl.errors import MachineError, PlanError
from vlarl.rng import fold, integers

PASTED = "rgb+segmentation"  # observation mode of tasks that paste robot and things onto a photograph; their camera has a fixed size
HAND_CONTROL = "pd_ee_delta_pose"
GRIPPER_THRESHOLD = {"sign": 0.0, "unit": 0.5, "continuous": None}


class Outcome(NamedTuple):
    """Of one action in every scene: reward float32, terminated and success bool, each (B,)."""

    reward: Tensor
    terminated: Tensor
    success: Tensor


class Simulation:
    """`scenes` scenes of one task. settings: the recipe's `env` section as a dict; device: where to simulate."""

    def __init__(self, task: str, scenes: int, settings: dict[str, Any], spec: EnvSpec, device: torch.device) -> None:
        """MachineError for missing files or a missing renderer, PlanError for a task, camera or controller that there is not."""
        own = settings["maniskill"]
        if own["assets"] is not None:
            os.environ["MS_ASSET_DIR"] = own["assets"]  # read when ManiSkill is imported
        self.task, self.scenes, self._spec, self._reward = task, scenes, spec, settings["reward"]
        row = _registered(task, own["register"])
        self._visual_mode = PASTED if list(row.cls.SUPPORTED_OBS_MODES) == [PASTED] else "rgb"
        make: dict[str, Any] = {
            "num_envs": scenes, "obs_mode": self._visual_mode, "reward_mode": self._reward_mode(row.cls),
            "control_mode": own["control_mode"] or (None if self._visual_mode == PASTED else HAND_CONTROL),  # None: the robot's first
            **backends(device),
        }
        if device.type == "cuda":
            _enable_gpu_physics()
        if self._visual_mode == "rgb":
            make["sensor_configs"] = {"width": spec.width, "height": spec.height, "shader_pack": own["shader"]}
        if task == PLATE_TASK:
            make["setting"] = settings["variation"]
        self.base = _make(row, make)
        if own["show_goals"]:
            for mark in self.base._hidden_objects:
                mark.show_visual()
            self.base._hidden_objects = []
        self._parts = self._action_parts()
        self._threshold = GRIPPER_THRESHOLD[own["gripper"]]
        self._cameras = self._choose_cameras(own["cameras"])
        told = dict(zip(settings["tasks"], own["instructions"], strict=True)) if own["instructions"] else {}
        self._instruction = told.get(task) or INSTRUCTIONS.get(task) or spelt_out(task)
        self._told = task in told
        self._by_id = hasattr(row.cls, "episodes_from_ids")
        self.device = self.base.device
        self.base._obs_mode = "none"  # steps and resets look at nothing from here on
        self._info: dict[str, Any] = {}
        self._dense_B = torch.zeros(scenes, device=self.device)

    def reset(self, rows: Sequence[int], episodes: Sequence[EpisodeSpec]) -> None:
        """Start episodes in the scenes `rows`; the other scenes go on undisturbed."""
        if self._by_id:
            ids = [int(integers(fold(e.seed, e.init_state), self.base.episodes())) for e in episodes]
            self._start(list(rows), 0, {"episode_id": torch.tensor(ids, dtype=torch.int64)})
        else:  # ManiSkill seeds a whole reset with one number, so each episode is reset by itself
            for row, episode in zip(rows, episodes, strict=True):
                self._start([row], int(integers(fold(episode.seed, episode.init_state), 2**31)), {})
        if self._reward == "relative":
            now = self.base.get_reward(obs={}, action=torch.zeros(self.scenes, len(self._parts), device=self.device), info=self._info)
            index = torch.tensor(list(rows), device=self.device)
            self._dense_B[index] = now[index].float()

    def step(self, action_BA: Tensor) -> Outcome:
        """Execute one action, float (B, 7), in every scene."""
        action = action_BA[:, list(self._parts)].to(self.device, torch.float32).clone()
        if self._threshold is not None and self._parts[-1] == ACTION_DIM - 1:
            action[:, -1] = torch.where(action[:, -1] > self._threshold, 1.0, -1.0)
        _, dense, terminated, _, self._info = self.base.step(action)
        success = self._info["success"].bool().clone() if "success" in self._info else torch.zeros_like(terminated)
        if self._reward == "sparse":
            return Outcome(success.float(), terminated.bool(), success)
        dense = dense.float()
        reward = dense - self._dense_B if self._reward == "relative" else dense
        self._dense_B = dense.clone()
        return Outcome(reward, terminated.bool(), success)

    def look(self) -> Tensor:
        """What the cameras see now, uint8 (B, V, H, W, 3), upright, RGB."""
        self.base._obs_mode = self._visual_mode
        try:
            seen = self.base.get_obs(self._info, unflattened=True)["sensor_data"]
        finally:
            self.base._obs_mode = "none"
        return torch.stack([_resized(seen[name]["rgb"], self._spec.height, self._spec.width) for name in self._cameras], 1)

    def feel(self) -> Tensor:
        """The robot's state, float32 (B, 8): tool centre x, y, z (m), axis times angle (rad), the last two joints (fingers, m).
        Zero where the robot has no tool centre."""
        from mani_skill.utils.geometry.rotation_conversions import quaternion_to_axis_angle

        agent, state = self.base.agent, torch.zeros(self.scenes, STATE_DIM, device=self.device)
        links = agent.robot.links_map
        tool = getattr(agent, "tcp", None) or links.get("ee_gripper_link")
        if tool is not None:
            state[:, :3], state[:, 3:6] = tool.pose.p, quaternion_to_axis_angle(tool.pose.q)
            state[:, 6:] = agent.robot.get_qpos()[:, -2:]
        return state

    def instructions(self) -> list[str]:
        """One sentence per scene: the recipe's, else the task's own, else ours."""
        own = getattr(self.base, "get_language_instruction", None)
        if own is None or self._told:
            return [self._instruction] * self.scenes
        said = own()
        return [said] * self.scenes if isinstance(said, str) else list(said)

    def freeze(self, rows: Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        """Note the present state of the scenes `rows` (int64) in `kept` (what an earlier call gave, or empty)."""
        return _overwrite(kept, self.base.get_state_dict(), rows) if kept else _copy(self.base.get_state_dict())

    def thaw(self, rows: Tensor, kept: dict[str, Any]) -> None:
        """Put the scenes `rows` back to their noted state, to be looked at."""
        self.base.set_state_dict(_take(kept, rows), rows)

    def close(self) -> None:
        self.base.close()

    def _start(self, rows: list[int], seed: int, options: dict[str, Any]) -> None:
        index = torch.tensor(rows, device=self.device)
        before = _copy(self.base.agent.get_controller_state())
        _, self._info = self.base.reset(seed=[seed] * self.scenes, options=dict(options, env_idx=index))
        after = self.base.agent.get_controller_state()
        if len(rows) < self.scenes and after:  # a reset makes every scene's controller forget its target
            self.base.agent.set_controller_state(_overwrite(before, after, index))

    def _reward_mode(self, task_class: Any) -> str:
        if self._reward == "sparse":
            return "none" if "none" in task_class.SUPPORTED_REWARD_MODES else task_class.SUPPORTED_REWARD_MODES[0]
        if "normalized_dense" not in task_class.SUPPORTED_REWARD_MODES:
            raise PlanError(f"env.reward = {self._reward}: {self.task} has no dense reward.", "Set env.reward to sparse.")
        return "normalized_dense"

    def _action_parts(self) -> Sequence[int]:
        control_mode = str(self.base.control_mode)
        size = sum(getattr(self.base.single_action_space, "shape", None) or ())  # several robots have a dict of spaces
        if size not in ACTION_PARTS or "ee" not in control_mode:
            modes = [m for m in getattr(self.base.agent, "supported_control_modes", ()) if "ee" in m]
            raise PlanError(
                f"env.maniskill.control_mode = {control_mode}: {self.task} takes {size} numbers, not a hand's motion and the gripper.",
                "Choose one of: {}.".format(", ".join(modes) or "none of this robot's"),
            )
        return ACTION_PARTS[size]

    def _choose_cameras(self, wanted: Sequence[str]) -> list[str]:
        there = list(self.base.scene.sensors)
        if not there:
            raise PlanError(f"env.tasks: {self.task} has no camera.", "Choose a task that has one.")
        unknown = [name for name in wanted if name not in there]
        if unknown:
            raise PlanError(
                f"env.maniskill.cameras: {self.task} has no camera {unknown[0]!r}.", "It has: {}.".format(", ".join(there))
            )
        return list(wanted) or there[:1]


def _registered(task: str, modules: Sequence[str]) -> Any:
    """The task's row in ManiSkill's table, its files present."""
    try:
        import mani_skill.envs  # noqa: F401
    except ImportError as error:
        raise MachineError(f"ManiSkill cannot be imported: {error}.", "Run `vlarl envs install maniskill`.") from error
    from mani_skill.utils.registration import REGISTERED_ENVS

    from vlarl.envs.maniskill.assets import refuse_questions, require_assets

    for module in modules:
        import_module(module)
    if task.startswith("PutOnPlateInScene25"):
        from vlarl.envs.maniskill.plate_task import register_suite

        register_suite()
    if task not in REGISTERED_ENVS:
        near = get_close_matches(task, list(REGISTERED_ENVS), n=3, cutoff=0.5)
        raise PlanError(
            f"env.tasks: ManiSkill has no task {task!r}.",
            "Did you mean {}? Tasks of your own are found through env.maniskill.register.".format(" or ".join(near) or "another one"),
        )
    require_assets(task)
    refuse_questions()
    install_brdf_table()
    return REGISTERED_ENVS[task]


def _make(row: Any, make: dict[str, Any]) -> Any:
    try:
        return row.cls(**dict(row.default_kwargs, **make))
    except RuntimeError as error:
        problem = no_renderer(error)
        if problem is not None:
            raise problem from error
        raise


def backends(device: torch.device) -> dict[str, str]:
    """ManiSkill's names of what simulates and what draws. A CPU's scenes are drawn by a GPU where there is one."""
    if device.type == "cpu":
        return {"sim_backend": "physx_cpu", "render_backend": "gpu" if has_gpu() else "cpu"}
    number = device.index or 0
    return {"sim_backend": f"physx_cuda:{number}", "render_backend": f"sapien_cuda:{number}"}


def _enable_gpu_physics() -> None:
    """Load PhysX's GPU library, which SAPIEN fetches at its first use."""
    from sapien import physx

    try:
        physx.enable_gpu()
    except (OSError, BadZipFile) as error:
        raise MachineError(
            f"SAPIEN could not fetch or load PhysX's GPU library: {error}.",
            f"Unzip linux-so.zip, of release {physx.version()} of github.com/sapien-sim/physx-precompiled, into "
            f"~/.sapien/physx/{physx.version()}; or simulate on the CPU: env.maniskill.sim_backend=physx_cpu.",
        ) from error


def _resized(image_BHWC: Tensor, height: int, width: int) -> Tensor:
    if image_BHWC.shape[1:3] == (height, width):
        return image_BHWC
    small = F.interpolate(image_BHWC.permute(0, 3, 1, 2).float(), (height, width), mode="bicubic", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, dict) else v.clone() for k, v in state.items()}


def _take(state: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    return {k: _take(v, rows) if isinstance(v, dict) else v[rows] for k, v in state.items()}


def _overwrite(old: dict[str, Any], new: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """`old` with the rows of `new`, in place; nested dicts of tensors."""
    for key, value in new.items():
        if isinstance(value, dict):
            _overwrite(old[key], value, rows)
        else:
            old[key][rows] = value[rows]
    return old
