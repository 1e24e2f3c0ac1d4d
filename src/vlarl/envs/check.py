"""Owns the check of a simulator where it is to run: `python .../envs/check.py NAME`, by its interpreter. Imports it and draws a picture.

The last line that it prints is JSON: {"problem": null, or a sentence, "fix": what to do about it}. Python 3.8 grammar; vlarl need not be
installed for the interpreter.
"""
from __future__ import annotations

import json
import sys
import traceback
from typing import Any

SIZE = 32  # pixels of the picture that is drawn
SCENE = """<mujoco><worldbody><light pos="0 0 3"/><geom type="sphere" size=".3" rgba="1 0 0 1"/></worldbody></mujoco>"""


def check_maniskill() -> Any:
    """Import ManiSkill, draw with SAPIEN. Returns the picture, uint8 (H, W, 3)."""
    import mani_skill.envs  # noqa: F401

    return _sapien_picture()


def check_libero() -> Any:
    """Import LIBERO, its assets found, draw with MuJoCo. Returns the picture, uint8 (H, W, 3)."""
    from vlarl.envs.libero.setup import bring_up

    bring_up("auto", None, False)
    import mujoco

    renderer = mujoco.Renderer(mujoco.MjModel.from_xml_string(SCENE), SIZE, SIZE)
    data = mujoco.MjData(renderer.model)
    mujoco.mj_forward(renderer.model, data)
    renderer.update_scene(data)
    return renderer.render()


def check_robotwin() -> Any:
    """Import what RoboTwin stands on, draw with SAPIEN. Returns the picture, uint8 (H, W, 3)."""
    import mplib  # noqa: F401
    import robotwin  # noqa: F401
    import toppra  # noqa: F401

    return _sapien_picture()


def _sapien_picture() -> Any:
    import sapien

    from vlarl.envs.sapien_renderer import has_gpu, install_brdf_table

    device = "cuda" if has_gpu() else "cpu"
    install_brdf_table()
    scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem(sapien.Device(device))])
    scene.set_ambient_light([0.5, 0.5, 0.5])
    builder = scene.create_actor_builder()
    builder.add_sphere_visual(radius=0.3, material=[1.0, 0.0, 0.0])
    ball = builder.build_static(name="ball")
    ball.set_pose(sapien.Pose([1.0, 0.0, 0.0]))
    camera = scene.add_camera("camera", SIZE, SIZE, fovy=1.0, near=0.1, far=10.0)
    scene.update_render()
    camera.take_picture()
    return (camera.get_picture("Color")[..., :3] * 255).astype("uint8")


def problem_of(name: str) -> tuple[str, str] | None:
    """What keeps a simulator from working, and the fix; None where it works."""
    from vlarl.errors import VlarlError

    install = f"Run `vlarl envs install {name}`."
    try:
        picture = {"maniskill": check_maniskill, "libero": check_libero, "robotwin": check_robotwin}[name]()
    except VlarlError as error:
        return error.message, error.hint
    except ImportError as error:
        return f"It cannot be imported: {error}.", install
    except Exception as error:
        traceback.print_exc()
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"It does not render: {said[0].rstrip('.')}.", install + " It names the system packages."
    if int(picture.max()) - int(picture.min()) < 50:
        return "It renders a picture of one colour.", install + " It names the system packages."
    return None


def main() -> None:
    from host.__main__ import find_vlarl  # this file's folder is where Python looks first

    del sys.path[0]
    find_vlarl()
    problem = problem_of(sys.argv[1])
    print("\n" + json.dumps({"problem": problem and problem[0], "fix": problem and problem[1]}), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    import os

    os._exit(0)  # some simulators' libraries crash or hang while Python takes them down
