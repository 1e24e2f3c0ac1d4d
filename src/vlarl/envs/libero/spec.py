"""Owns the simulator-free facts about LIBERO: suites, tasks, its EnvSpec. Stdlib only, Python 3.8 grammar (env hosts import it)."""
from __future__ import annotations

from vlarl.envs.spec import EVAL_INIT_STATE, EnvSpec

SUITES = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_90": 90, "libero_10": 10}  # tasks of each
MERGED = "libero_130"  # all of them
TASK_SETS = (*SUITES, MERGED)
VARIATIONS = ("train",)
INIT_STATES = 50  # stored per task
STATE_DIM = 8
ACTION_DIM = 7
PROCESS_GPU_BYTES = 490 * 2**20  # with EGL, two cameras of 128 pixels: what the driver says on an H200
SLOT_BYTES = 2 * 2**30  # measured: 1.7 to 1.9 GiB, with the scene and its renderer


def expand(name: str) -> tuple[str, ...] | None:
    """Task names that `name` stands for: those of a suite (`libero_goal`), all 130, or one (`libero_goal-3`); None where it is unknown."""
    if name == MERGED:
        return tuple(task for suite in SUITES for task in expand(suite) or ())
    if name in SUITES:
        return tuple(f"{name}-{n}" for n in range(SUITES[name]))
    suite, _, number = name.rpartition("-")
    known = suite in SUITES and number.isdigit() and int(number) < SUITES[suite] and str(int(number)) == number
    return (name,) if known else None


def split(task: str) -> tuple[str, int]:
    """`libero_goal-3` -> its suite and its number in it."""
    suite, _, number = task.rpartition("-")
    return suite, int(number)


def stored_state(init_state: int) -> int:
    """Which of a task's stored states an episode starts from. Evaluation takes them in order from 0, so that 50 rounds play each once."""
    return (init_state - EVAL_INIT_STATE if init_state >= EVAL_INIT_STATE else init_state) % INIT_STATES


def reset_seed(seed: int, init_state: int) -> int:
    """numpy's seed for a reset: it places the fixtures (cabinet, stove, rack), which a stored state does not. Below 2**32."""
    return (seed * 1000003 + init_state) % 2**32


def env_spec(tasks: tuple[str, ...], horizon: int, image_size: int, wrist_camera: bool, gl: str) -> EnvSpec:
    """What `plan` checks a policy against. tasks: names that `expand` knows. gl: the renderer, of which OSMesa needs no GPU."""
    names = tuple(one for name in tasks for one in expand(name) or ())
    views = 2 if wrist_camera else 1
    drawing = 0 if gl == "osmesa" else PROCESS_GPU_BYTES
    return EnvSpec("libero", names, views, image_size, image_size, STATE_DIM, ACTION_DIM, horizon, SLOT_BYTES, process_gpu_bytes=drawing)
