"""Owns the recipe's `env` section: the simulator, and what each one alone has."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le, MaxLen, MinLen

from vlarl.recipe.fields import STRICT, Count, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class Libero:
    """What only LIBERO has."""

    __pydantic_config__ = STRICT
    render: Literal["full", "fast"] = "full"
    """fast: no anti-aliasing, no reflections; twice the speed, slightly other pictures (not for scores that are compared)."""
    settle_steps: NonNegative = 15
    """Steps without motion after a reset, in which things come to rest; not counted as the episode's."""
    reset: Literal["hard", "soft"] = "hard"
    """soft: keeps the loaded scene between episodes of a task; 0.5 s instead of 4 s."""
    assets: str | None = None
    """Folder with LIBERO's assets; null: found among the installed packages."""
    gl: Literal["auto", "egl", "osmesa"] = "auto"
    """Renderer; auto: EGL where there is a GPU, else OSMesa."""


@dataclass(frozen=True, kw_only=True)
class Maniskill:
    """What only ManiSkill has."""

    __pydantic_config__ = STRICT
    register: tuple[str, ...] = ()
    """Python modules to import first, which register tasks of your own."""
    sim_backend: Literal["auto", "physx_cpu"] = "auto"
    """auto: a rank with a GPU simulates all its scenes there, in its own process, else as physx_cpu: on the CPU, a process per scene."""
    control_mode: str | None = None
    """Controller of the robot's hand; takes x, y, z, three angles and the gripper, or those of them that it knows. null: pd_ee_delta_pose,
    or the only one of a robot in BridgeData's scenes."""
    gripper: Literal["sign", "unit", "continuous"] = "sign"
    """What opens it: sign: a number above 0; unit: above 0.5 (OpenVLA on BridgeData); continuous: 1 open, -1 closed, between: between."""
    cameras: tuple[str, ...] = ()
    """Views, by the names of the task's cameras; none: its first."""
    shader: Literal["minimal", "default", "rt", "rt-fast"] = "default"
    """Shader pack; the rt packs trace rays and want a GPU."""
    show_goals: bool = False
    """Draw the marks of goals that the simulator hides from cameras (PickCube's green ball), for policies that know pictures alone."""
    instructions: tuple[str, ...] = ()
    """What the policy is told, one sentence per task; none: the task's own or a shipped one."""
    assets: str | None = None
    """Folder of ManiSkill's files (which hold data/); null: MS_ASSET_DIR, or ~/.maniskill."""


@dataclass(frozen=True, kw_only=True)
class Robotwin:
    """What only RoboTwin has."""

    __pydantic_config__ = STRICT
    root: str | None = None
    """A checkout of RoboTwin's branch RLinf_support (or of the package's source); null: the installed package."""
    assets: str | None = None
    """Folder that holds RoboTwin's assets/; null: ROBOTWIN_ASSETS_ROOT, or the checkout."""
    embodiment: Annotated[tuple[str, ...], MinLen(1), MaxLen(2)] = ("aloha-agilex",)
    """One robot with two arms, or the left and the right one."""
    arm_distance: Positive = 0.6
    """Of two robots, metres."""
    planner: Literal["mplib", "curobo"] = "mplib"
    """Of the expert's paths; curobo needs CUDA, and two different robots need it. Actions are joints and need neither."""
    shader: Literal["auto", "rt", "default"] = "auto"
    """rt: traced rays, as in published runs, on a GPU. default: rasterised. auto: rt where there is a GPU."""
    camera: Literal["D435", "Large_D435", "L515", "Large_L515"] = "D435"
    """Type of every camera: its angle and its aspect. env.image_size is the frames' height (240: as published)."""
    cameras: Annotated[tuple[str, ...], MinLen(1)] = ("head_camera",)
    """Views, in the policy's order: head_camera, left_camera, right_camera (the wrists'), or another that the robot has."""
    motion: Literal["action", "chunk"] = "action"
    """action: every action is a movement by itself. chunk: one smooth movement through all actions of a chunk."""
    instructions: Literal["seen", "unseen"] = "seen"
    """Which of RoboTwin's two sets of sentences; drawn anew for every initial state."""
    seeds: str | None = None
    """JSON file with the seeds of training, by task (`vlarl seeds` writes one); null: any."""
    eval_seeds: str | None = None
    """The same for evaluation, which takes them in order; null: seeds that training never sees."""
    setup_attempts: Count = 10
    """Seeds tried, one after another, where a scene does not settle or its task fails to start."""
    setup_seconds: Positive = 120.0
    """Time for all of them."""


@dataclass(frozen=True, kw_only=True)
class Env:
    """The simulator and how many episodes it plays at once."""

    __pydantic_config__ = STRICT
    simulator: Literal["tabletop", "libero", "maniskill", "robotwin"] = "tabletop"
    tasks: Annotated[tuple[str, ...], MinLen(1)] = ("put", "push", "touch")
    """Tasks to train on. tabletop: put, push, touch. libero: suites (libero_spatial, ..., libero_130) or single tasks (libero_goal-3).
    maniskill: ids of registered tasks (PickCube-v1). robotwin: names of its 50 tasks (lift_pot)."""
    variation: str = "train"
    """Distribution of scenes. tabletop: train, vision, semantics or execution. libero: train. maniskill: train, or a setting of the
    plate suite (VisionImage, Carrot, EEPose, ...). robotwin: train (clean tables) or randomized."""
    parallel: Count = 64
    """Episodes played at once, over all ranks (environment slots)."""
    horizon: Count = 48
    """Control steps after which an episode is truncated. RoboTwin's tasks have limits of their own besides."""
    image_size: Annotated[int, Ge(32), Le(1024)] = 64
    """Height and width of the camera frames, pixels."""
    wrist_camera: bool = False
    """Render a second view from the gripper."""
    reward: Literal["sparse", "shaped", "dense", "relative"] = "sparse"
    """sparse: 1 on success. shaped (tabletop): sparse plus a potential difference. dense (maniskill): the task's own, at most 1 a step;
    relative: how much that has grown in the step."""
    python: str | None = None
    """Interpreter that runs the simulator's processes (of an environment of its own); null: vlarl's."""
    slots_per_host: Count = 1
    """Environment slots of one simulator process."""
    start_seconds: Positive = 300.0
    """A simulator process that takes longer to start is given up."""
    step_seconds: Positive = 300.0
    """A simulator process that takes longer for a reset or a chunk is taken for hung and replaced."""
    libero: Libero = field(default_factory=Libero)
    maniskill: Maniskill = field(default_factory=Maniskill)
    robotwin: Robotwin = field(default_factory=Robotwin)
