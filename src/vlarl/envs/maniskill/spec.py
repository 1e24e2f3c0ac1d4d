"""Owns the simulator-free facts about ManiSkill: instructions, actions, its EnvSpec. Stdlib only."""
from __future__ import annotations

import re

from vlarl.envs.maniskill.plate_settings import SETTINGS
from vlarl.envs.spec import EnvSpec

STATE_DIM = 8
SLOT_BYTES = 1_100_000_000  # of a process with one scene and pictures: 0.8 to 1.3 GB were measured
# On a GPU, not measured by us: assumed from about 2.2 GB reported for 32 scenes with cameras. A batch: PhysX's buffers, heaps and the
# renderer; a scene: its bodies, and a camera of 640 x 480 pixels with colour, position and segmentation, twice.
GPU_BATCH_BYTES = 3 * 2**29
GPU_SLOT_BYTES = 32 * 2**20
PROCESS_GPU_BYTES = 820 * 2**20  # what the driver says of a process that simulates on the CPU and draws on a GPU (H200, 64 to 128 pixels)
ACTION_DIM = 7
PLATE_TASK = "PutOnPlateInScene25Main-v3"  # plays every setting of the plate suite, by env.variation
VARIATIONS = tuple(SETTINGS)
# What a policy is told; tasks not listed say it themselves, or their id is spelt out, or the recipe says it.
INSTRUCTIONS = {
    "PickCube-v1": "pick up the red cube and move it to the green ball",
    "PickCubeSO100-v1": "pick up the red cube and move it to the green ball",
    "PushCube-v1": "push the blue cube into the red and white target",
    "PullCube-v1": "pull the blue cube into the red and white target",
    "StackCube-v1": "stack the red cube on the green cube",
    "StackPyramid-v1": "put the red cube beside the green cube and the blue cube on both",
    "PokeCube-v1": "poke the cube with the peg",
    "PlaceSphere-v1": "place the ball into the bin",
    "RollBall-v1": "roll the ball into the red and white target",
    "PullCubeTool-v1": "pull the cube closer with the L-shaped tool",
    "LiftPegUpright-v1": "lift the peg upright",
    "PegInsertionSide-v1": "insert the peg into the hole of the box",
    "PlugCharger-v1": "plug the charger into the receptacle",
    "PushT-v1": "push the T onto its outline",
}
# Which of the policy's numbers (x, y, z, three angles, gripper) a controller takes, by how many it takes.
ACTION_PARTS = {7: (0, 1, 2, 3, 4, 5, 6), 6: (0, 1, 2, 3, 4, 5), 4: (0, 1, 2, 6), 3: (0, 1, 2)}


def is_task_id(name: str) -> bool:
    """Whether a name has the form of a registered task's id, such as PickCube-v1; which exist is known to the simulator alone."""
    return re.fullmatch(r"[\w.-]+-v\d+", name) is not None


def spelt_out(task: str) -> str:
    """An id as words: `LiftPegUpright-v1` gives `lift peg upright`."""
    stem = re.sub(r"-v\d+$", "", task)
    return " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", stem)).lower()


def env_spec(tasks: tuple[str, ...], horizon: int, image_size: int, cameras: int, on_gpu: bool) -> EnvSpec:
    """What `plan` checks a policy against. cameras: how many are named; none stands for the task's first. on_gpu: whether a rank that has
    a GPU simulates there."""
    memory = (SLOT_BYTES, GPU_BATCH_BYTES if on_gpu else 0, GPU_SLOT_BYTES if on_gpu else 0, PROCESS_GPU_BYTES)
    return EnvSpec("maniskill", tuple(tasks), max(1, cameras), image_size, image_size, STATE_DIM, ACTION_DIM, horizon, *memory)
