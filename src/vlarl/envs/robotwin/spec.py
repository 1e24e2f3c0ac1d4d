"""Owns the simulator-free facts about RoboTwin 2.0: tasks, cameras, its EnvSpec. Stdlib only, Python 3.8 grammar (env hosts import it)."""
from __future__ import annotations

from collections.abc import Sequence

from vlarl.envs.spec import EVAL_INIT_STATE, EnvSpec

TASKS = (
    *("adjust_bottle", "beat_block_hammer", "blocks_ranking_rgb", "blocks_ranking_size", "click_alarmclock", "click_bell"),
    *("dump_bin_bigbin", "grab_roller", "handover_block", "handover_mic", "hanging_mug", "lift_pot", "move_can_pot"),
    *("move_pillbottle_pad", "move_playingcard_away", "move_stapler_pad", "open_laptop", "open_microwave", "pick_diverse_bottles"),
    *("pick_dual_bottles", "place_a2b_left", "place_a2b_right", "place_bread_basket", "place_bread_skillet", "place_burger_fries"),
    *("place_can_basket", "place_cans_plasticbox", "place_container_plate", "place_dual_shoes", "place_empty_cup", "place_fan"),
    *("place_mouse_pad", "place_object_basket", "place_object_scale", "place_object_stand", "place_phone_stand", "place_shoe"),
    *("press_stapler", "put_bottles_dustbin", "put_object_cabinet", "rotate_qrcode", "scan_object", "shake_bottle"),
    *("shake_bottle_horizontally", "stack_blocks_three", "stack_blocks_two", "stack_bowls_three", "stack_bowls_two", "stamp_seal"),
    "turn_switch",
)
CONFIGURATIONS = {"train": "demo_clean", "randomized": "demo_randomized"}  # RoboTwin's own names, by ours
VARIATIONS = tuple(CONFIGURATIONS)
ASPECT = {"D435": (4, 3), "Large_D435": (4, 3), "L515": (16, 9), "Large_L515": (16, 9)}  # width : height, by type of camera
WRIST_CAMERAS = ("left_camera", "right_camera")
STATE_DIM = 14  # six joints (rad) and the gripper (0 closed, 1 open) of the left arm, then of the right
ACTION_DIM = 14
SLOT_BYTES = 1_400_000_000  # of a process with one scene: 1.2 GB were measured with boxes and three cameras; meshes come on top
PROCESS_GPU_BYTES = 820 * 2**20  # as measured of ManiSkill, which draws with the same library; with traced rays it was not measured


def scene_seed(listed: Sequence[int], init_state: int) -> int:
    """RoboTwin's seed for an initial state: out of a list (evaluation takes it in order from its start), else the state's own number."""
    if not listed:
        return init_state
    return listed[(init_state - EVAL_INIT_STATE if init_state >= EVAL_INIT_STATE else init_state) % len(listed)]


def env_spec(tasks: tuple[str, ...], horizon: int, image_size: int, camera: str, views: int) -> EnvSpec:
    """What `plan` checks a policy against. image_size: height of frames, pixels; the type of camera gives the width."""
    across, down = ASPECT[camera]
    width = round(image_size * across / down)
    sizes = (views, image_size, width, STATE_DIM, ACTION_DIM)
    return EnvSpec("robotwin", tuple(tasks), *sizes, horizon, SLOT_BYTES, process_gpu_bytes=PROCESS_GPU_BYTES)
