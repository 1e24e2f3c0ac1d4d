"""What the launcher tests share; run as a script, it supervises fake ranks: `launch_helpers.py FOLDER BEHAVIOURS`."""
from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from vlarl.envs.spec import EnvSpec
from vlarl.launch import rundir
from vlarl.launch.supervisor import supervise
from vlarl.launch.torchrun import Command, command, worker_arguments
from vlarl.plan.cluster import Cluster
from vlarl.plan.compile import compile_plan
from vlarl.policies.spec import PolicySpec
from vlarl.recipe.schema import Policy, Recipe

RECIPE = Recipe(name="fake", ranks=2, policy=Policy(checkpoint="scratch:tiny"))
PLAN = compile_plan(
    RECIPE,
    Cluster(cores=4, host_bytes=2**35),
    PolicySpec("openvla-oft", 64, 1, 4, 7, 0, "tabletop", 1_000_000, 96, 3, 68),
    EnvSpec("tabletop", ("put",), 1, 64, 64, 8, 7, 48),
)


def fake_command(run: rundir.RunDir, behaviours: str) -> Command:
    """The real torchrun command, with the fake worker in the worker's place."""
    real = command(PLAN, run.path, worker_arguments(run.path, "train"), {**os.environ, "VLARL_FAKE": behaviours}, os.getpid())
    argv = list(real.argv)
    where = argv.index("vlarl.worker")
    argv[where - 1 : where + 1] = [str(Path(__file__).with_name("fake_worker.py"))]
    return replace(real, argv=tuple(argv))


if __name__ == "__main__":
    folder = rundir.create(Path(sys.argv[1]), RECIPE, PLAN, 0)
    stopped = supervise(fake_command(folder, sys.argv[2]), folder, 2, 60.0, lambda status: None, grace_seconds=2.0)
    sys.exit(0 if stopped is None else 128 + stopped.value)
