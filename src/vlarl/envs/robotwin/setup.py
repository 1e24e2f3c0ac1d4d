"""Owns how RoboTwin 2.0 is brought up in an env host: which code, which assets, which robot, what draws. Python 3.8 grammar, numpy.

Two layouts of its code are known: the package `robotwin` (rlinf-robotwin-runtime, or its source), and a checkout of RoboTwin's branch
RLinf_support, which has the same tasks in `envs`. Everything that would ask, download or need a GPU without use is turned aside here.
"""
from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from vlarl.envs.robotwin.assets import VARIABLE, find_assets, require_assets
from vlarl.envs.robotwin.spec import CONFIGURATIONS, WRIST_CAMERAS
from vlarl.envs.sapien_renderer import has_gpu, install_brdf_table, no_renderer
from vlarl.envs.spec import EnvSpec
from vlarl.errors import MachineError

_HOW_TO_INSTALL = "Run `vlarl envs install robotwin`, or name in env.python an interpreter that has rlinf-robotwin-runtime==0.1.3."


class Layout(NamedTuple):
    """Where RoboTwin's code is. tasks: package of the task modules, and its folder. describe: module that makes instructions.
    configs: folder of its YAML files."""

    tasks: str
    folder: str
    describe: str
    configs: str


class Runtime(NamedTuple):
    """make: a task's name -> a fresh task of RoboTwin's. describe: RoboTwin's maker of instructions. arguments: of `setup_demo`, but for
    what is an episode's. limits: of actions in an episode, by task."""

    make: Callable[[str], Any]
    describe: Callable[..., Any]
    arguments: dict[str, Any]
    limits: dict[str, int]


def bring_up(settings: dict[str, Any], spec: EnvSpec) -> Runtime:
    """Import RoboTwin. settings: the recipe's env section. Safe to call again. Raises MachineError naming what is missing."""
    own = settings["robotwin"]
    layout = find_layout(own["root"])
    root = find_assets(own["assets"], own["root"])
    clutter = settings["variation"] == "randomized" or layout.tasks == "envs"  # which a checkout reads when it is imported
    require_assets(root, spec.tasks, layout.folder, own["embodiment"], clutter)
    os.environ[VARIABLE] = os.environ["ASSETS_PATH"] = root
    if own["planner"] == "curobo" and find_spec("curobo") is None:
        raise MachineError(
            f"env.robotwin.planner = curobo: cuRobo is not installed for {sys.executable}.", "Install it (it needs CUDA), or use mplib."
        )
    try:
        _prepare_renderer(own["shader"], spec)
        if "open3d" not in sys.modules and find_spec("open3d") is None:
            sys.modules["open3d"] = types.ModuleType("open3d")  # imported at the top, used for point clouds alone
        describe = import_module(layout.describe).generate_episode_descriptions
        with ExitStack() as stack:
            if own["planner"] == "mplib":  # an alarming traceback would tell that cuRobo is not there
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            import_module(layout.tasks + "._base_task")
    except ImportError as error:
        raise MachineError(f"RoboTwin cannot be imported by {sys.executable}: {error}.", _HOW_TO_INSTALL) from None

    def make(task: str) -> Any:
        return getattr(import_module(f"{layout.tasks}.{task}"), task)()

    return Runtime(make, describe, _arguments(settings, layout, root), _yaml(os.path.join(layout.configs, "_eval_step_limit.yml")))


def find_layout(root: str | None) -> Layout:
    """The code in `root`, or of the installed package. MachineError where there is none."""
    if root is None:
        found = find_spec("robotwin")
        if found is None or not found.submodule_search_locations:
            raise MachineError(f"RoboTwin is not installed for {sys.executable}.", _HOW_TO_INSTALL)
        package = list(found.submodule_search_locations)[0]
    else:
        root = os.path.abspath(os.path.expanduser(root))
        package = os.path.join(root, "robotwin")
        base = os.path.join("envs", "_base_task.py")
        checkout = os.path.isfile(os.path.join(root, base))
        if not checkout and not os.path.isfile(os.path.join(package, base)):
            raise MachineError(
                f"env.robotwin.root = {root}: it has neither envs/_base_task.py nor robotwin/envs/_base_task.py.",
                "Name a checkout of RoboTwin's branch RLinf_support, or leave it away to use the installed package.",
            )
        if root not in sys.path:
            sys.path.insert(0, root)
        if checkout:
            describe = "description.utils.generate_episode_instructions"
            return Layout("envs", os.path.join(root, "envs"), describe, os.path.join(root, "task_config"))
    configs = os.path.join(package, "configs", "task")
    return Layout("robotwin.envs", os.path.join(package, "envs"), "robotwin.description", configs)


def _arguments(settings: dict[str, Any], layout: Layout, root: str) -> dict[str, Any]:
    """What `setup_demo` is told about robot, table and cameras: RoboTwin's configuration with the recipe's choices in it."""
    own = settings["robotwin"]
    arguments = _yaml(os.path.join(layout.configs, CONFIGURATIONS[settings["variation"]] + ".yml"))
    known = _yaml(os.path.join(layout.configs, "_embodiment_config.yml"))
    names = own["embodiment"]
    for side, name in (("left", names[0]), ("right", names[-1])):
        if name not in known:
            raise MachineError(f"env.robotwin.embodiment: RoboTwin has no robot {name!r}.", "Known: {}.".format(", ".join(known)))
        folder = os.path.join(root, known[name]["file_path"])
        arguments[f"{side}_robot_file"] = folder
        arguments[f"{side}_embodiment_config"] = _yaml(os.path.join(folder, "config.yml"))
    arguments["camera"].update(
        head_camera_type=own["camera"],
        wrist_camera_type=own["camera"],
        collect_head_camera=True,
        collect_wrist_camera=any(name in WRIST_CAMERAS for name in own["cameras"]),
    )
    arguments.update(
        planner_backend=own["planner"],
        dual_arm_embodied=len(names) == 1,
        embodiment_dis=own["arm_distance"],
        eval_mode=True,  # as in RoboTwin's own VectorEnv: tables and walls of randomised scenes have the textures kept for evaluation
        eval_video_log=False,
        save_data=False,
        render_freq=0,
    )
    return arguments


def _yaml(path: str) -> dict[str, Any]:
    import yaml

    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)


def _prepare_renderer(shader: str, spec: EnvSpec) -> None:
    """Choose how cameras draw, and their size. RoboTwin itself traces rays and denoises on a GPU."""
    import sapien
    import sapien.render
    from sapien.wrapper.scene import Scene

    if shader == "auto":
        shader = "rt" if has_gpu() else "default"
    if not hasattr(Scene, "vlarl_full_add_camera"):
        Scene.vlarl_full_add_camera = Scene.add_camera
    full = Scene.vlarl_full_add_camera

    def add_camera(scene: Any, name: str, width: int, height: int, **lens: Any) -> Any:
        return full(scene, name=name, width=spec.width, height=spec.height, **lens)

    Scene.add_camera = add_camera
    if shader == "default":
        install_brdf_table()
        if not hasattr(sapien.render, "vlarl_set_shader"):
            sapien.render.vlarl_set_shader = sapien.render.set_camera_shader_dir
        sapien.render.set_camera_shader_dir = lambda _: sapien.render.vlarl_set_shader("default")
        sapien.render.set_ray_tracing_denoiser = lambda _: None
    try:
        sapien.SapienRenderer()
    except RuntimeError as error:
        problem = no_renderer(error)
        if problem is not None:
            raise problem from None
        raise
