"""Stand-ins for ManiSkill's files that no package index has: a WidowX of boxes, a table, coloured shapes. For tests, never for figures.

Importing this sets MS_ASSET_DIR, which ManiSkill reads when it is imported: import it first.
"""
from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(tempfile.mkdtemp(prefix="maniskill-standin-"))
os.environ["MS_ASSET_DIR"] = str(ROOT)
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
DATA = ROOT / "data"
BRIDGE = DATA / "tasks" / "bridge_v2_real2sim_dataset"
STAGE_SHIFT = np.array([2.0634, 2.8313, 0.0])
INERTIA = '<inertial><mass value="{}"/><inertia ixx="1e-3" ixy="0" ixz="0" iyy="1e-3" iyz="0" izz="1e-3"/></inertial>'
# link, its box (m), the box's middle, mass (kg)
LINKS = (
    ("base_link", (0.12, 0.12, 0.07), (0, 0, 0.035), 1.0),
    ("shoulder_link", (0.06, 0.06, 0.05), (0, 0, 0), 0.5),
    ("upper_arm_link", (0.05, 0.05, 0.25), (0.02, 0, 0.125), 0.5),
    ("upper_forearm_link", (0.17, 0.04, 0.04), (0.085, 0, 0), 0.3),
    ("lower_forearm_link", (0.07, 0.04, 0.04), (0.035, 0, 0), 0.3),
    ("wrist_link", (0.06, 0.04, 0.04), (0.03, 0, 0), 0.2),
    ("gripper_link", (0.05, 0.09, 0.03), (0.03, 0, 0), 0.2),
    ("ee_gripper_link", None, (0, 0, 0), 0.01),
    ("left_finger_link", (0.07, 0.008, 0.02), (0.035, 0, 0), 0.05),
    ("right_finger_link", (0.07, 0.008, 0.02), (0.035, 0, 0), 0.05),
)
# joint, kind, parent, child, origin (m), axis, limits
JOINTS = (
    ("waist", "revolute", "base_link", "shoulder_link", (0, 0, 0.072), (0, 0, 1), (-3.14, 3.14)),
    ("shoulder", "revolute", "shoulder_link", "upper_arm_link", (0, 0, 0.03865), (0, 1, 0), (-1.88, 1.99)),
    ("elbow", "revolute", "upper_arm_link", "upper_forearm_link", (0.04975, 0, 0.25), (0, 1, 0), (-2.15, 1.6)),
    ("forearm_roll", "revolute", "upper_forearm_link", "lower_forearm_link", (0.175, 0, 0), (1, 0, 0), (-3.14, 3.14)),
    ("wrist_angle", "revolute", "lower_forearm_link", "wrist_link", (0.075, 0, 0), (0, 1, 0), (-1.75, 2.15)),
    ("wrist_rotate", "revolute", "wrist_link", "gripper_link", (0.065, 0, 0), (1, 0, 0), (-3.14, 3.14)),
    ("ee_gripper", "fixed", "gripper_link", "ee_gripper_link", (0.12, 0, 0), (1, 0, 0), (0, 0)),
    ("left_finger", "prismatic", "gripper_link", "left_finger_link", (0.06, 0, 0), (0, 1, 0), (0.015, 0.037)),
    ("right_finger", "prismatic", "gripper_link", "right_finger_link", (0.06, 0, 0), (0, -1, 0), (0.015, 0.037)),
)


def write_all() -> None:
    """Everything that the plate suite and PutCarrotOnPlateInScene read."""
    if BRIDGE.exists():
        return
    write_robot(DATA / "robots" / "widowx" / "wx250s.urdf")
    write_stage(BRIDGE / "stages" / "bridge_table_1_v1.glb")
    write_carrot(BRIDGE)
    write_plate_suite(DATA / "tasks" / "put_on_plate_25" / "carrot")


def write_robot(path: Path) -> None:
    words = lambda numbers: " ".join(str(n) for n in numbers)  # noqa: E731
    parts = ['<robot name="wx250s">']
    for name, box, middle, mass in LINKS:
        shape = f'<origin xyz="{words(middle)}"/><geometry><box size="{words(box)}"/></geometry>' if box else ""
        seen = f"<visual>{shape}</visual><collision>{shape}</collision>" if box else ""
        parts.append(f'<link name="{name}">{INERTIA.format(mass)}{seen}</link>')
    for name, kind, parent, child, origin, axis, (low, high) in JOINTS:
        limit = f'<limit lower="{low}" upper="{high}" effort="100" velocity="3.14"/>' if kind != "fixed" else ""
        ends = f'<parent link="{parent}"/><child link="{child}"/><origin xyz="{words(origin)}"/><axis xyz="{words(axis)}"/>'
        parts.append(f'<joint name="{name}" type="{kind}">{ends}{limit}</joint>')
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([*parts, "</robot>"]))


def write_stage(path: Path) -> None:
    """A table top 0.87 m high where the task puts the stage: y-up, shifted."""
    import trimesh

    top = trimesh.creation.box((1.2, 0.9, 0.04))
    top.apply_translation(np.array([-0.1, 0.0, 0.85]) - STAGE_SHIFT)
    top.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0]))
    path.parent.mkdir(parents=True)
    _painted(top, (170, 130, 90)).export(path)


def write_carrot(root: Path) -> None:
    """A box for the carrot, a disc for the plate, a grey photograph."""
    import cv2
    import trimesh

    meshes = {
        "bridge_carrot_generated_modified": trimesh.creation.box((0.08, 0.025, 0.025)),
        "bridge_plate_objaverse_larger": trimesh.creation.cylinder(radius=0.075, height=0.012),
    }
    table = {name: _model(root / "custom" / "models" / name, mesh, (230, 110, 20)) for name, mesh in meshes.items()}
    (root / "custom" / "info_bridge_custom_v0.json").write_text(json.dumps(table))
    (root / "real_inpainting").mkdir()
    cv2.imwrite(str(root / "real_inpainting" / "bridge_real_eval_1.png"), np.full((480, 640, 3), 77, np.uint8))


def _model(place: Path, mesh, rgb):  # type: ignore[no-untyped-def]
    """Write a model's two files; its row in a table."""
    place.mkdir(parents=True)
    mesh.export(place / "collision.obj")
    _painted(mesh.copy(), rgb).export(place / "textured.glb")
    return {"bbox": {"min": mesh.bounds[0].tolist(), "max": mesh.bounds[1].tolist()}, "density": 500, "scales": [1.0]}


def write_plate_suite(root: Path) -> None:
    """25 boxes, 17 plates, 21 photographs of one colour each, as many textures."""
    import cv2
    import trimesh

    models = {
        "more_carrot": {f"thing{n:02d}": trimesh.creation.box((0.06 + 0.001 * n, 0.025, 0.025)) for n in range(25)},
        "more_plate": {f"plate{n:02d}": trimesh.creation.cylinder(radius=0.07 + 0.001 * n, height=0.012) for n in range(17)},
    }
    for folder, meshes in models.items():
        table = {}
        for n, (name, mesh) in enumerate(meshes.items()):
            row = _model(root / folder / name, mesh, (250 - 8 * n, 9 * n, 120))
            table[name] = {"name": f"{name[:5]} {n}", "scale": row.pop("scales"), **row}
        (root / folder / "model_db.json").write_text(json.dumps(table))
    tables = {}
    for n in range(21):
        for kind, colour in (("imgs", photo_rgb(n)), ("textures", texture_rgb(n))):
            (root / "more_table" / kind).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / "more_table" / kind / f"{n:02d}.png"), np.full((30, 40, 3), colour[::-1], np.uint8))
        tables[f"{n:02d}.png"] = {"texture": f"{n:02d}.png", "mix": 0.5}
    (root / "more_table" / "model_db.json").write_text(json.dumps(tables))


def photo_rgb(n: int) -> tuple[int, int, int]:
    """Colour of photograph n."""
    return (10 * n, 200 - 5 * n, 90)


def texture_rgb(n: int) -> tuple[int, int, int]:
    """Colour of texture n."""
    return (255 - 10 * n, 40, 11 * n)


def _painted(mesh, rgb):  # type: ignore[no-untyped-def]
    import trimesh

    paint = trimesh.visual.material.PBRMaterial(baseColorFactor=[*rgb, 255], roughnessFactor=0.8, metallicFactor=0.0)
    mesh.visual = trimesh.visual.TextureVisuals(material=paint)
    return mesh
