"""The command line: quick, torch-free, and clear about mistakes."""
from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import Vlarl, command_line
from vlarl import serial
from vlarl.distributed.manifest import FORMAT
from vlarl.errors import CheckpointError, RecipeError
from vlarl.launch.rundir import RunDir
from vlarl.policies.layout import resolve_folder
from vlarl_cli import run
from vlarl_cli.evaluate import EvalOptions, eval_recipe, find_policy, variation_names
from vlarl_cli.render import PLAIN_SECONDS, PlainProgress
from vlarl_cli.shipped import shipped_recipes

STATUS = {
    "phase": "rollout", "update": 1, "updates": 9, "frames_per_second": 1234.0, "success": 0.5, "recent": [32, 64], "episodes": 64,
    "eta_seconds": 65.0, "line": "update 61%", "evaluation": None, "evaluated": "",
}  # fmt: skip


@pytest.fixture
def vlarl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Vlarl:
    return command_line(monkeypatch, capsys, tmp_path)


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """No ranks are started: `supervise` notes the command and leaves a result."""
    started: list[tuple[str, ...]] = []

    def fake(command: Any, folder: RunDir, ranks: int, stall_seconds: float, on_progress: Callable[[dict[str, Any]], None]) -> None:
        started.append(command.argv)
        on_progress(STATUS)
        folder.result.write_text(json.dumps({"table": {"title": "t", "columns": ["c"], "rows": [["98.5%"]]}, "notes": ["done so"]}))

    monkeypatch.setattr(run, "supervise", fake)
    return started


def test_help_is_quick_and_leaves_torch_alone() -> None:
    code = "import sys; sys.argv = ['vlarl', '--help']\nfrom vlarl_cli.app import main\n"
    code += "try: main()\nfinally: assert not {'torch', 'pydantic', 'psutil'} & set(sys.modules)"
    seconds = []
    for _ in range(2):  # the first may have to compile
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_the_shell_completes_recipes_without_torch() -> None:
    code = "import sys; sys.argv = ['vlarl']\nfrom vlarl_cli.app import main\n"
    code += "try: main()\nfinally: assert not {'torch', 'psutil'} & set(sys.modules)"
    asked = {"_VLARL_COMPLETE": "complete_bash", "COMP_WORDS": "vlarl train quick", "COMP_CWORD": "2"}
    told = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, check=True, capture_output=True, text=True)
    assert told.stdout.split() == ["quickstart-grpo", "quickstart-warmstart", "quickstart"]


def test_version_and_list(vlarl: Vlarl) -> None:
    assert vlarl("--version")[1].startswith("vlarl 0.")
    code, text, _ = vlarl("recipes")
    assert code == 0
    assert all(name in text for name in shipped_recipes())
    assert json.loads(vlarl("recipes", "--json-schema")[1])["title"] == "Recipe"


def test_a_plan_is_printed_and_nothing_is_started(vlarl: Vlarl, tmp_path: Path) -> None:
    code, text, _ = vlarl("plan", "debug", "device=cpu", "ranks=1")
    assert code == 0
    assert "ranks (1) x slots (8) x chunks (4) = 32 samples = 2 minibatches of 16" in text
    assert "env, rollout, learner" in text
    assert "weights, sharded" in text
    assert vlarl("train", "debug", "device=cpu", "ranks=1", "--dry-run")[1] == text
    assert list(tmp_path.iterdir()) == []
    assert json.loads(vlarl("plan", "debug", "device=cpu", "--json")[1])["rollout"]["parallel"] == 8


def test_a_run_remembers_which_weights_it_began_with(vlarl: Vlarl, supervised: list[tuple[str, ...]], tmp_path: Path) -> None:
    shutil.copytree(resolve_folder("bundled:tiny-sft")[0], tmp_path / "update-000001")
    (tmp_path / "best").symlink_to("update-000001")
    assert vlarl("train", "debug", "device=cpu", "ranks=1", "policy.checkpoint=best", "--out", "run")[0] == 0
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["policy"]["checkpoint"] == str(tmp_path / "update-000001")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ((), ""),
        (("algorithm.kl_coef=0.1",), "the reference of its KL term"),
        (("algorithm.kl_coef=0.1", "warmstart=[{steps: 1}]"), ""),  # the reference is the warm start's own folder
        (("policy.lora={rank: 2}",), "the base of its adapters"),
    ],
)
def test_a_policy_folder_that_is_gone_is_replaced_only_where_that_is_exact(tmp_path: Path, changes: tuple[str, ...], says: str) -> None:
    base, run_dir = tmp_path / "base", tmp_path / "run"
    shutil.copytree(resolve_folder("bundled:tiny-sft")[0], base)
    run_dir.mkdir()
    loaded = run.load("debug", [f"policy.checkpoint={base}", *changes])
    (run_dir / "recipe.json").write_text(serial.dumps(loaded.recipe))
    newest = tmp_path / "run" / "checkpoints" / "update-000001"
    assert run._policy_override(run_dir, newest, []) == []
    base.rename(tmp_path / "moved")
    if not says:
        expected = [f'policy.checkpoint="{newest / "policy"}"', "policy.adapter=null"]
        assert run._policy_override(run_dir, newest, []) == expected
    else:
        with pytest.raises(CheckpointError, match=says):
            run._policy_override(run_dir, newest, [])
        assert run._policy_override(run_dir, newest, [f"policy.checkpoint={tmp_path / 'moved'}"]) == []


def test_mistakes_end_with_code_2_and_no_traceback(vlarl: Vlarl, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: a\nseed: -1\npolicy: {checkpoint: 'scratch:tiny', chekpoint: 1}\n")
    (tmp_path / "file").touch()
    for arguments, says in [
        (("train", "bad.yaml"), "seed = -1 (recipe line 2)"),
        (("train", "bad.yaml"), "Did you mean policy.checkpoint?"),
        (("train", "nothing"), "no shipped recipe of this name"),
        (("train", "quickstrt"), "Did you mean quickstart?"),
        (("train", "update.updates=3"), "the recipe is missing"),
        (("train", "."), "is a folder"),
        (("plan", "quickstart", "policy.kind=openvla"), "Set policy.kind to openvla-oft"),
        (("plan", "debug", "ranks=3"), "do not split over 3 ranks"),
        (("plan", "debug", "ranks=64"), "8 parallel episodes do not split over 64 ranks. Use 64, or"),
        (("plan", "debug", "ranks=8", "update.minibatches=5"), "Use at most 4, or fewer ranks: at most 4."),
        (("plan", "debug", "policy.checkpoint=bundled:none"), "bundled:none"),
        (("train", "debug", "--out", "file/run"), "cannot be written"),
        (("train", "--resume", "nowhere"), "is not a run folder"),
        (("sft", "debug"), "warmstart: required"),
        (("eval", "--ckpt", "nowhere"), "nowhere"),
        (("export", "--ckpt", "nowhere", "--out", "there"), "nowhere"),
        (("export", "--ckpt", "bundled:tiny-sft", "--out", "file"), "is not an empty folder"),
        (("eval", "--ckpt", "scratch:tiny", "--set", "night"), "no such set"),
        (("eval", "--ckpt", "scratch:tiny", "--tasks", "put,fly"), "has no task 'fly'"),
        (("train", "debug", "ranks=2", "--in-process", "--out", "two"), "--in-process runs one rank"),
    ]:
        code, _, text = vlarl(*arguments)
        assert code == 2, arguments
        assert says in text, arguments
    assert {p.name for p in tmp_path.iterdir()} <= {"bad.yaml", "file", "two"}


def test_what_this_machine_lacks_is_told_before_a_run_folder_is_made(
    vlarl: Vlarl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlarl_cli.here.importlib.util.find_spec", lambda name: None)  # no wandb
    lacking = ("maniskill-pushcube-tiny-ppo", "log.wandb=true", "env.python=/no/python", "policy.lora={targets: [nothing]}")
    code, _, text = vlarl("train", *lacking)
    assert code == 2 and not list(tmp_path.iterdir())
    for says in (
        f"warmstart[0].data = {tmp_path / 'pushcube-300'}"[:57],
        "recipe line 18): no such folder. Record one first",
        "log.wandb = true (override): wandb is not installed",
        "env.python = /no/python (override): no such program",
        "policy.lora.targets = [nothing] (override): no layer of the policy has such a name",
    ):
        assert says in text
    code, text, _ = vlarl("plan", "maniskill-pushcube-tiny-ppo")
    assert code == 0 and "before it can run here: warmstart[0].data = pushcube-300 (recipe line 18): no such folder" in text
    code, text, _ = vlarl("plan", "maniskill-pushcube-tiny-ppo", "--cluster", "1x80GB")  # its device is cpu, and it has 2 ranks
    assert code == 0 and "before it can run" not in text and "2 ranks on CPU (as described by 1x80GB" in text
    (tmp_path / "assets").mkdir()
    code, _, text = vlarl("train", "robotwin-tiny-grpo", f"env.robotwin.assets={tmp_path}", "env.robotwin.seeds=none.json")
    assert code == 2 and "lacks RoboTwin's assets: assets/background_texture" in text
    assert "env.robotwin.seeds = none.json (override): no such file" in text


def test_seeds_are_tried_three_times_as_often_as_they_are_wanted(vlarl: Vlarl, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("vlarl_cli.seeds.find_seeds", lambda *arguments: asked.append(arguments) or 0)
    vlarl("seeds", "robotwin-tiny-grpo", "--out", "seeds.json", "--count", "1000")
    vlarl("seeds", "robotwin-tiny-grpo", "--out", "seeds.json", "--tries", "7")
    assert [row[-1] for row in asked] == [3000, 7]


def test_misused_options(vlarl: Vlarl) -> None:
    for arguments in (("train",), ("train", "debug", "--resume", "x"), ("train", "--resume", "x", "--out", "y"), ("eval",)):
        assert vlarl(*arguments)[0] == 2


def test_train_prints_progress_and_the_result(vlarl: Vlarl, supervised: list[tuple[str, ...]], tmp_path: Path) -> None:
    code, text, _ = vlarl("train", "debug", "update.updates=3", "--out", "here")
    assert code == 0
    assert "rollout  1/9  1,234 frames/s  training success 32/64 = 50.0 %  64 episodes  1:05 left  update 61%" in text
    assert "98.5%" in text
    assert "done so" in text
    assert json.loads((tmp_path / "here" / "recipe.json").read_text())["update"]["updates"] == 3
    assert supervised[0][-4:] == ("--run-dir", str(tmp_path / "here"), "--job", "train")


def test_several_machines(vlarl: Vlarl, supervised: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    two = ("train", "debug", "device=cpu", "ranks=2", "--nnodes", "2", "--rdzv-endpoint", "head:29400", "--out", "shared")
    assert vlarl(*two, "--node-rank", "0")[0] == 0
    assert json.loads((tmp_path / "shared" / "plan.json").read_text())["workers"] == {"nnodes": 2, "ranks_per_node": 1, "backend": "gloo"}
    code, _, text = vlarl(*two, "--node-rank", "1")
    assert code == 2
    assert "has ended already" in text
    (tmp_path / "shared" / "result.json").unlink()
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert vlarl(*two)[0] == 0
    assert [argv[argv.index("--rdzv-endpoint") + 1] for argv in supervised] == ["head:29400"] * 2
    monkeypatch.setattr(run, "JOIN_SECONDS", 0.0)
    assert "has not appeared" in vlarl(*two[:-1], "nowhere")[2]
    assert vlarl(*two, "--node-rank", "2")[0] == 2
    assert vlarl("train", "debug", "--nnodes", "2")[0] == 2
    assert vlarl("train", "debug", "--nnodes", "2", "--rdzv-endpoint", "head", "--out", "x")[0] == 2


def test_a_batch_file_is_printed_and_nothing_started(
    vlarl: Vlarl, supervised: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text, _ = vlarl("train", "debug", "device=cpu", "ranks=4", "--nnodes", "2", "--slurm")
    assert code == 0
    assert "#SBATCH --nodes=2" in text
    assert supervised == []
    assert list(tmp_path.iterdir()) == []
    code, text, _ = vlarl("train", "maniskill-openvla-ppo", "--nnodes", "2", "--slurm", "--cluster", "8x80GB")
    assert code == 0 and {"#SBATCH --nodes=2", "#SBATCH --gres=gpu:8"} <= set(text.splitlines())
    assert "--nnodes 2" in vlarl("train", "maniskill-openvla-ppo", "--slurm", "--cluster", "2x8x80GB")[1]
    code, _, errors = vlarl("train", "maniskill-openvla-ppo", "--nnodes", "3", "--slurm", "--cluster", "2x8x80GB")
    assert code == 2 and "describes 2 nodes" in errors
    assert vlarl("train", "debug", "--cluster", "8x80GB")[0] == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, errors = vlarl("train", "maniskill-openvla-ppo", "--slurm")
    assert code == 2 and "--cluster 8x80GB (GPUs of one node" in errors
    code, text, errors = vlarl("train", "--resume", "nowhere", "--slurm")
    assert code == 2 and not text and "--slurm" in errors


def test_the_default_folder_carries_the_name(vlarl: Vlarl, supervised: list[tuple[str, ...]], tmp_path: Path) -> None:
    vlarl("train", "debug")
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("debug-")


def test_a_signal_sets_the_exit_code(vlarl: Vlarl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "supervise", lambda *arguments: signal.SIGTERM)
    code, text, _ = vlarl("train", "debug")
    assert code == 143
    assert "Stopped by SIGTERM" in text


def test_ranks_that_leave_no_result_are_an_error(vlarl: Vlarl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "supervise", lambda *arguments: None)
    code, _, text = vlarl("train", "debug")
    assert code == 1
    assert "without a result" in text


def checkpoint(run_dir: Path, update: int) -> Path:
    """A finished checkpoint folder with an empty policy."""
    folder = run_dir / "checkpoints" / f"update-{update:06d}"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "config.json").write_text("{}")
    files = {"policy/config.json": {"bytes": 2, "sha256": ""}}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "complete": True, "files": files}))
    return folder


def test_resume_refuses_another_placement(vlarl: Vlarl, supervised: list[tuple[str, ...]], tmp_path: Path) -> None:
    """Before anything is touched, naming both."""
    apart = ("placement.mode=disaggregated", "placement.env=1", "placement.rollout=1", "placement.learner=1")
    settings = ("debug", "device=cpu", "ranks=3", "threads=null", *apart)
    assert vlarl("train", *settings, "--out", "run")[0] == 0
    manifest = checkpoint(tmp_path / "run", 1) / "manifest.json"
    placement = "disaggregated on 3 ranks (env 0; rollout 1; learner 2), 8 slots in 1 stage"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"placement": placement}))
    plan = (tmp_path / "run" / "plan.json").read_text()
    hybrid = "hybrid on 3 ranks (env 0; rollout 1,2; learner 0,1,2), 8 slots in 1 stage"
    together = ("ranks=2", "placement.mode=collocated", *(f"placement.{role}=null" for role in ("env", "rollout", "learner")))
    others = {
        hybrid: ("placement.mode=hybrid", "placement.rollout=2", "placement.learner=null"),
        "collocated on 2 ranks (env 0,1; rollout 0,1; learner 0,1), 8 slots in 1 stage": together,
        "learner 2), 16 slots in 1 stage": ("env.parallel=16",),
    }
    for other, changes in others.items():
        code, _, text = vlarl("train", "--resume", "run", *changes)
        flat = " ".join(text.split())
        assert code == 2 and f"written by a run {placement}; this one is" in flat and other in flat, text
    assert (tmp_path / "run" / "plan.json").read_text() == plan and len(supervised) == 1
    assert vlarl("train", "--resume", "run")[0] == 0 and len(supervised) == 2


def test_what_ckpt_may_name(tmp_path: Path) -> None:
    assert find_policy("bundled:x") == ("bundled:x", None)
    (tmp_path / "recipe.json").write_text("{}")
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert find_policy(str(tmp_path)) == (str(second / "policy"), tmp_path)
    (tmp_path / "checkpoints" / "best").symlink_to(first.name)
    assert find_policy(str(tmp_path)) == (str(first / "policy"), tmp_path)
    assert find_policy(str(second)) == (str(second / "policy"), tmp_path)
    assert find_policy(str(second / "policy")) == (str(second / "policy"), tmp_path)
    with pytest.raises(CheckpointError, match="holds no policy"):
        find_policy(str(tmp_path / "checkpoints"))
    (second / "policy" / "config.json").write_text("")
    with pytest.raises(CheckpointError, match="has 0 bytes, expected 2"):
        find_policy(str(second))


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        find_policy(str(tmp_path))


def test_eval_takes_the_simulator_from_training(vlarl: Vlarl, supervised: list[tuple[str, ...]], tmp_path: Path) -> None:
    vlarl("train", "debug", "env.horizon=20", "env.tasks=[push]", "--out", "trained")
    policy = Path(run.__file__).parents[2] / "src" / "vlarl" / "assets" / "tiny"
    (tmp_path / "trained" / "warmstart").symlink_to(policy)
    options = EvalOptions(str(tmp_path / "trained"), "all", 30, 64, None, 0.5, 7, "cpu")
    loaded, variations = eval_recipe(options)
    env, settings = loaded.recipe.env, loaded.recipe.eval
    assert (env.tasks, env.horizon, env.parallel) == (("push",), 20, 30)
    assert (settings.episodes, settings.parallel, settings.temperature, loaded.recipe.seed) == (30, 30, 0.5, 7)
    assert variations == ("train", "vision", "semantics", "execution")


def test_eval_is_told_what_a_published_checkpoint_does_not_say(tmp_path: Path) -> None:
    tiny = Path(run.__file__).parents[2] / "src" / "vlarl" / "assets" / "tiny"
    raw = json.loads((tiny / "config.json").read_text())
    del raw["vlarl"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shutil.copyfile(tiny / "dataset_statistics.json", tmp_path / "dataset_statistics.json")
    options = EvalOptions(str(tmp_path), "train", 4, None, None, None, 1, "cpu")
    with pytest.raises(CheckpointError, match="--policy kind="):
        eval_recipe(options)
    policy = eval_recipe(replace(options, policy=("kind=openvla-oft", "chunk=6", "crop=true")))[0].recipe.policy
    assert (policy.kind, policy.chunk, policy.crop) == ("openvla-oft", 6, True)
    with pytest.raises(RecipeError, match="policy.kind = dreams .*expected openvla or openvla-oft"):
        eval_recipe(replace(options, policy=("kind=dreams",)))


def test_sets() -> None:
    assert variation_names("vision, train", "tabletop") == ("vision", "train")
    with pytest.raises(RecipeError, match="Did you mean vision"):
        variation_names("visio", "tabletop")


def test_plain_progress_prints_now_and_then() -> None:
    lines: list[str] = []
    now = [0.0]
    progress = PlainProgress(lines.append, lambda: now[0])
    late = PLAIN_SECONDS + 1
    rows = [(0.0, 0, "start"), (1.0, 1, "rollout"), (2.0, 2, "rollout"), (late, 3, "rollout"), (late + 1, 9, "rollout")]
    for seconds, update, phase in rows:
        now[0] = seconds
        progress({**STATUS, "update": update, "phase": phase})
    assert [line.split()[:2] for line in lines] == [["start", "0/9"], ["rollout", "1/9"], ["rollout", "3/9"], ["rollout", "9/9"]]
