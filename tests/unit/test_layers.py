"""The architecture as a test: who may import whom, what stays free of torch, how large a file may be."""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "src" / "vlarl"
CLI = ROOT / "cli" / "vlarl_cli"
MAX_LINES = 500

# Module or package -> what it may import of vlarl, besides itself. The longest matching name decides.
ALLOWED = {
    "errors": (),
    "rng": (),
    "envs.spec": (),
    "policies.spec": (),
    "policies.published": (),
    "policies.families": ("errors",),
    "serial": ("errors",),
    "types": ("envs.spec",),
    "envs.tabletop.spec": ("envs.spec", "errors"),
    "envs.libero.spec": ("envs.spec",),
    "envs.maniskill.spec": ("envs.spec", "envs.maniskill.plate_settings"),
    "envs.maniskill.plate_settings": (),
    "envs.robotwin.spec": ("envs.spec",),
    "envs.robotwin.seeds": ("errors", "envs.robotwin", "launch.lifeline"),
    "envs.homes": (),
    "envs.host": ("errors", "envs.spec", "launch.lifeline"),
    "recipe": (
        *("errors", "envs.spec", "envs.tabletop.spec", "envs.libero.spec", "envs.maniskill.spec", "envs.robotwin.spec"),
        *("policies.published", "policies.families"),
    ),
    "plan": (
        *("errors", "serial", "recipe", "envs.spec", "envs.tabletop.spec", "envs.libero.spec", "envs.maniskill.spec"),
        *("envs.robotwin.spec", "policies.spec", "policies.layout", "policies.adapter"),
    ),
    "launch": ("errors", "serial", "recipe", "plan"),
    "launch.lifeline": (),
    "envs": ("errors", "rng", "types"),
    "policies": ("errors", "rng", "types", "recipe.schema"),
    "algorithms": ("rng", "types"),
    "metrics": ("errors", "evaluation.statistics"),
    "datasets": ("errors",),
    "distributed": ("errors", "types", "plan.placement"),
    "rollout": ("errors", "rng", "types", "envs.spec", "envs.base", "envs.pool", "policies.base"),
    "learner": ("errors", "rng", "types", "recipe.schema", "envs.base", "envs.pool", "policies", "algorithms", "distributed", "datasets"),
    "evaluation": ("errors", "rng", "types", "envs.spec", "envs.base", "envs.pool", "policies.base", "rollout"),
    "emulate": ("errors", "types", "envs.spec", "plan.profile", "policies.spec", "policies.engine", "distributed", "learner.targets"),
    # Composition roots.
    "worker": (
        *("errors", "rng", "serial", "types", "recipe.schema", "plan.placement", "plan.profile", "plan.specs", "launch.lifeline"),
        *("envs", "policies", "algorithms", "emulate"),
        *("metrics", "distributed", "rollout", "learner", "evaluation", "datasets"),
    ),
}
# What the control process is made of.
TORCH_FREE = ("errors", "serial", "recipe", "plan", "launch", "envs.spec", "envs.tabletop.spec", "envs.libero.spec", "envs.maniskill.spec")
TORCH_FREE += ("envs.homes", "envs.robotwin.spec", "policies.spec", "policies.layout", "policies.published", "policies.families")
TORCH_FREE += ("policies.adapter", "policies.weight_files", "policies.value_heads")
TORCH_FREE += ("metrics.status", "distributed.manifest", "envs.robotwin.assets", "datasets.layout")
TORCH_FREE += ("evaluation.protocol", "evaluation.statistics", "evaluation.report", "evaluation.compare")


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imports(path: Path) -> set[str]:
    """Full names of everything imported anywhere in a file, `from a import b` as both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def own_modules(path: Path) -> set[str]:
    """Modules of vlarl that a file imports, as they are called inside vlarl."""
    known = {module_name(p) for p in sources(LIBRARY)}
    return {name.removeprefix("vlarl.") for name in imports(path) if name.removeprefix("vlarl.") in known and name.startswith("vlarl.")}


@pytest.mark.parametrize("path", [p for p in sources(LIBRARY) if module_name(p)], ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    name = module_name(path)
    owner = max((p for p in ALLOWED if inside(name, p)), key=len)
    packages = {module_name(p) for p in sources(LIBRARY) if p.name == "__init__.py"}
    bad = [
        used
        for used in own_modules(path) - packages
        if not inside(used, owner) and not any(inside(used, allowed) for allowed in ALLOWED[owner])
    ]
    assert not bad, f"{name} ({owner}) may not import {', '.join(sorted(bad))}"
    assert not any(inside(used, "vlarl_cli") for used in imports(path))


def test_only_distributed_names_torch_distributed() -> None:
    bad = [
        module_name(path)
        for path in sources(LIBRARY)
        if any(inside(used, "torch.distributed") for used in imports(path)) and not inside(module_name(path), "distributed")
    ]
    assert bad == []


def test_what_the_control_process_imports_leaves_torch_alone() -> None:
    modules = [f"vlarl.{module_name(p)}" for p in sources(LIBRARY) if any(inside(module_name(p), free) for free in TORCH_FREE)]
    modules += [f"vlarl_cli.{p.stem}" for p in sources(CLI) if p.stem != "__init__"]
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_the_command_line_uses_the_torch_free_half_only() -> None:
    for path in sources(CLI):
        bad = [used for used in own_modules(path) if not any(inside(used, free) for free in TORCH_FREE)]
        assert not bad, f"{path.name} may not import {bad}"


def test_env_hosts_speak_python_3_8_and_leave_torch_alone() -> None:
    modules = ["envs/spec.py", "envs/sapien_renderer.py", "errors.py", "launch/lifeline.py"]
    modules += [f"envs/{name}" for name in ("host", "libero", "robotwin")]
    for path in [p for name in modules for p in ([LIBRARY / name] if name.endswith(".py") else sources(LIBRARY / name))]:
        ast.parse(path.read_text(), feature_version=(3, 8))
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "pydantic", "scipy"}, path


def test_only_render_prints() -> None:
    """In the control process; ranks print into their logs."""
    control = [p for p in sources(LIBRARY) if any(inside(module_name(p), free) for free in ("recipe", "plan", "launch", "serial"))]
    for path in [*control, *(p for p in sources(CLI) if p.stem != "render")]:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert not any(call.func.id == "print" for call in calls), path  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sources(LIBRARY) + sources(CLI), ids=lambda p: p.stem)
def test_files_are_short_and_say_what_they_own(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), "the first line of a module says what it owns"
