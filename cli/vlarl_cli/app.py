"""Owns the command line: names, options, help, and what an error does to the exit code. Commands import what they need when they run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlarl.errors import VlarlError
from vlarl_cli import machine

if TYPE_CHECKING:
    from vlarl_cli.run import Nodes

app = typer.Typer(
    name="vlarl",
    help="Post-train vision-language-action robot policies with reinforcement learning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(machine.envs, name="envs")


def _complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes for the shell's completion; files are the shell's own where none of these fits."""
    from vlarl_cli.shipped import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as update.updates=10.")]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped recipe.", autocompletion=_complete_recipe)
]
ClusterText = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="GPUSxMEMORY",
        help="Plan for other machines: 8x80GB (GPUs x memory of each), 2x8x80GB (nodes x GPUs x memory), or a JSON file with some of "
        "nodes, devices_per_node, device_bytes, cores, host_bytes (each per node).",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder. Default: runs/<name>-<time>.")]


def main() -> None:
    """Entry point of the `vlarl` script. Exit codes: 0, 2 for a mistake the user can mend, 1 for a failed worker, 128 + n for signal n."""
    try:
        app()
    except VlarlError as problem:
        from vlarl_cli import render

        render.error(problem)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"vlarl {version('vlarl')}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Post-train vision-language-action robot policies with reinforcement learning."""


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped recipe.", autocompletion=_complete_recipe),
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN_DIR", help="Go on with this run from its newest checkpoint.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    in_process: Annotated[bool, typer.Option("--in-process", help="One rank in this process, for breakpoints.")] = False,
    nnodes: Annotated[int, typer.Option(min=1, help="Machines; run the same command on each, with --out on a disk they all see.")] = 1,
    rdzv_endpoint: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the machines meet: node 0, any free port.")] = None,
    node_rank: Annotated[
        int | None, typer.Option(min=0, envvar="SLURM_NODEID", help="Which of the machines this is; 0 makes the run folder.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print an sbatch file for this command, and start nothing.")] = False,
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="GPUSxMEMORY", help="With --slurm: the job's nodes, as in `vlarl plan --cluster`.")
    ] = None,
) -> None:
    """Train a policy as the recipe says: warm start if it has one, then reinforcement learning."""
    from vlarl.plan.cluster import described
    from vlarl_cli import run

    changes = list(overrides or [])
    if slurm:
        if recipe is None or resume is not None or out is not None or rdzv_endpoint is not None:
            raise typer.BadParameter("--slurm takes RECIPE, overrides, --nnodes and --cluster; its file states the rest.")
        typer.echo(run.slurm_file(recipe, changes, nnodes, described(cluster) if cluster is not None else None), nl=False)
        return
    if cluster is not None:
        raise typer.BadParameter("--cluster is for --slurm: training runs here. `vlarl plan --cluster` plans for other machines.")
    nodes = _nodes(nnodes, rdzv_endpoint, node_rank, resume or out)
    if dry_run and nodes is not None:
        raise typer.BadParameter("--dry-run plans one machine; see `vlarl plan --devices` for more.")
    if resume is not None:
        if out is not None:
            raise typer.BadParameter("--resume goes on in the run's own folder; leave --out away.")
        if recipe is not None and "=" not in recipe:
            raise typer.BadParameter("--resume takes the run's own recipe; give overrides only.")
        launch = run.Launch("train", resume=True, in_process=in_process, nodes=nodes)
        raise typer.Exit(run.resume(resume, ([recipe] if recipe else []) + changes, launch, dry_run))
    if recipe is None:
        raise typer.BadParameter("Name a recipe file or a shipped recipe (see `vlarl recipes`), or use --resume RUN_DIR.")
    if dry_run:
        plan(recipe, changes)
        return
    raise typer.Exit(run.start(run.load(recipe, changes), run.Launch("train", out, in_process=in_process, nodes=nodes)))


def _nodes(count: int, endpoint: str | None, rank: int | None, out: Path | None) -> Nodes | None:
    """The machines of a run over several; None for one. out: the run folder, if it was named."""
    from vlarl_cli.run import Nodes

    if count == 1:
        return None
    if endpoint is None or out is None or rank is None:
        raise typer.BadParameter("--nnodes needs --rdzv-endpoint HOST:PORT, --node-rank, and --out DIR on a disk that all machines see.")
    if not re.fullmatch(r"\S+:\d+", endpoint):
        raise typer.BadParameter(f"expected HOST:PORT, got {endpoint}.", param_hint="--rdzv-endpoint")
    if rank >= count:
        raise typer.BadParameter(f"machines are 0 to {count - 1}, got {rank}.", param_hint="--node-rank")
    return Nodes(count, endpoint, rank)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    cluster: ClusterText = None,
    devices: Annotated[
        int | None, typer.Option(min=1, max=512, help="Compare placements on so many GPUs, here or not; needs --profile.")
    ] = None,
    profile: Annotated[str | None, typer.Option(metavar="FILE", help="Costs to predict from: a file or a shipped profile.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a recipe would do here: ranks, roles, env slots, batch arithmetic, memory. Starts nothing.

    With --profile, all sensible placements are compared by predicted costs first.
    """
    from vlarl import serial
    from vlarl.plan.cluster import described, part_for
    from vlarl_cli import placements, render, run, shipped
    from vlarl_cli.here import missing_here

    loaded = run.load(recipe, list(overrides or []))
    there = part_for(described(cluster), loaded.recipe.device) if cluster is not None else None
    if devices is not None and profile is None:
        raise typer.BadParameter("--devices compares placements by predicted costs; name them with --profile.")
    if devices is not None and cluster is not None:
        raise typer.BadParameter("--devices and --cluster both name a machine; give one of them.")
    if profile is not None:
        placement = placements.show_comparison(loaded, devices, there, shipped.read_profile(profile), quiet=as_json)
    else:
        placement = run.make_plan(loaded, "train", there)
    if as_json:
        typer.echo(serial.dumps(placement), nl=False)
        return
    render.plan(placement)
    if there is None and devices is None:  # a plan for other machines says nothing of this one's files
        for problem in missing_here(loaded, "train"):
            render.note(f"before it can run here: {problem}")


@app.command("bench-placement")
def bench_placement(
    recipe: RecipeName,
    overrides: Overrides = None,
    modes: Annotated[str, typer.Option(help="With commas: collocated, hybrid, disaggregated.")] = "collocated,hybrid,disaggregated",
    stages: Annotated[str, typer.Option(help="Numbers of pipelined sub-batches, with commas.")] = "1,2",
    all_splits: Annotated[bool, typer.Option("--all-splits", help="Every division into env, rollout and learner ranks.")] = False,
    updates: Annotated[int, typer.Option(min=1, help="Timed updates per placement.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Updates before them that do not count.")] = 1,
    devices: Annotated[int | None, typer.Option(min=1, help="Ranks. Default: the recipe's, else one per GPU, else 4.")] = None,
    emulate: Annotated[
        str | None, typer.Option(metavar="FILE", help="Sleep the costs of this profile (a file or a shipped one) instead of computing.")
    ] = None,
    profile: Annotated[str | None, typer.Option(metavar="FILE", help="Costs to predict from, for real runs.")] = None,
    write_profile: Annotated[
        Path | None, typer.Option("--write-profile", metavar="FILE", help="Measure this recipe's costs on one device, and write them.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder; one that was interrupted goes on.")] = None,
) -> None:
    """Run a recipe for a few updates under several placements, and say which is fastest."""
    from vlarl.plan.choose import MODES
    from vlarl_cli import bench, run, shipped

    loaded = run.load(recipe, list(overrides or []))
    if write_profile is not None:
        raise typer.Exit(bench.write_profile(loaded, write_profile, out))
    chosen = tuple(dict.fromkeys(m.strip() for m in modes.split(",")))
    if not set(chosen) <= set(MODES):
        raise typer.BadParameter(f"expected some of {', '.join(MODES)}.", param_hint="--modes")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", stages.replace(" ", "")):
        raise typer.BadParameter("expected numbers with commas, such as 1,2,4.", param_hint="--stages")
    counts = tuple(dict.fromkeys(int(k) for k in stages.split(",")))
    slept = shipped.read_profile(emulate) if emulate else None
    costs = shipped.read_profile(profile) if profile else None
    options = bench.BenchOptions(chosen, counts, all_splits, updates, warmup, devices, slept, costs, out)
    raise typer.Exit(bench.bench(loaded, options))


@app.command()
def seeds(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="JSON file of seeds; one that is there is extended.")],
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=1, help="Seeds to find, of each task.")] = 100,
    first: Annotated[int, typer.Option(min=0, help="Where a new list begins.")] = 0,
    tries: Annotated[int | None, typer.Option(min=1, help="Seeds to try, of each task, before giving up. Default: 3 x count.")] = None,
) -> None:
    """Find RoboTwin's seeds that its own scripted expert solves, for env.robotwin.seeds and eval_seeds."""
    from vlarl_cli.seeds import find_seeds

    raise typer.Exit(find_seeds(recipe, list(overrides or []), out, count, first, 3 * count if tries is None else tries))


@app.command()
def sft(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Out = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="One rank in this process, for breakpoints.")] = False,
) -> None:
    """Run a recipe's warm start alone: clone recorded episodes or the simulator's expert, and write the policy folder."""
    from vlarl_cli import run

    raise typer.Exit(run.start(run.load(recipe, list(overrides or [])), run.Launch("sft", out, in_process=in_process)))


@app.command()
def record(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="New folder for the dataset.")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes to keep. Default: the recipe's record.episodes.")] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="CKPT", help="Who plays instead of the simulator's scripted expert; as eval's --ckpt.")
    ] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="One rank in this process, for breakpoints.")] = False,
) -> None:
    """Record episodes of the simulator's scripted expert, or of a policy, as a LeRobot v3 dataset (recipe: `record`)."""
    from vlarl_cli import record as recording
    from vlarl_cli import run

    if out is None:
        raise typer.BadParameter("name the dataset's folder.", param_hint="--out")
    changes = [*(overrides or []), *([f"record.episodes={episodes}"] if episodes is not None else [])]
    raise typer.Exit(recording.record(run.load(recipe, changes), out, policy, in_process))


@app.command("eval")
def evaluate(
    ckpt: Annotated[str, typer.Option("--ckpt", metavar="DIR", help="Run folder, checkpoint folder, policy folder or bundled:NAME.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of env, policy and eval, such as env.horizon=300.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="File, or shipped name: simulator, policy switches and eval settings are its. Default: the recipe of training, where "
            "there is one (run folders and their exports), else tabletop.",
        ),
    ] = None,
    sets: Annotated[
        str, typer.Option("--set", help="Scenes, several with commas, or all. tabletop: train, vision, semantics, execution.")
    ] = "train",
    episodes: Annotated[int, typer.Option(min=1, help="Episodes per set.")] = 400,
    parallel: Annotated[int | None, typer.Option(min=1, help="Episodes at once. Default: the recipe's.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks, with commas. Default: the recipe's.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0: greedy. Default: the recipe's eval.temperature.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of scenes and sampling; results with one seed share their episodes.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="KEY=VALUE",
            help="What a published checkpoint's files do not say, such as kind=openvla-oft. Wins over the recipe and over overrides.",
        ),
    ] = None,
    out: Out = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="One rank in this process, for breakpoints.")] = False,
) -> None:
    """Measure a checkpoint's success rate: k/n with 95 % Wilson intervals, per task and pooled.

    The weights are --ckpt's, everything else is as in training, or as --recipe says; overrides change either.
    """
    from vlarl_cli import run
    from vlarl_cli.evaluate import EvalOptions, eval_recipe

    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter("expected auto, cpu or cuda.", param_hint="--device")
    names = tuple(t.strip() for t in tasks.split(",")) if tasks else None
    changes = (tuple(policy or ()), recipe, tuple(overrides or ()))
    loaded, variations = eval_recipe(EvalOptions(ckpt, sets, episodes, parallel, names, temperature, seed, device, *changes))
    raise typer.Exit(run.start(loaded, run.Launch("eval", out, in_process=in_process, variations=variations)))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Run folder of `vlarl eval`, or its eval.json.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The same of another policy, on the same episodes.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Compare two evaluations episode by episode: who won which, and whether the difference is more than chance (McNemar's test)."""
    from vlarl_cli import compare as comparing
    from vlarl_cli import render

    rows, notes = comparing.compare(a, b)
    if as_json:
        typer.echo(comparing.as_json(rows, notes))
    else:
        render.result({"table": comparing.table(rows), "notes": notes})


@app.command()
def export(
    ckpt: Annotated[str, typer.Option("--ckpt", metavar="DIR", help="Run folder, checkpoint folder, policy folder or bundled:NAME.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the policy.")],
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora", help="Merge adapters into the weights. Default: the adapters by themselves, in PEFT's layout.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the model's weights: float32 or bfloat16. Default: as stored; merged, as in the base.")
    ] = None,
    shard_gb: Annotated[float, typer.Option("--shard-gb", min=0.001, help="Largest weight file, in GB (1e9 bytes).")] = 5.0,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="KEY=VALUE", help="What a published checkpoint's files do not say, such as kind=openvla-oft."),
    ] = None,
) -> None:
    """Write a policy in the layout in which OpenVLA checkpoints are published, load it again, and compare."""
    from vlarl_cli import export as exporting

    if dtype not in (None, *exporting.BYTES):
        raise typer.BadParameter("expected float32 or bfloat16.", param_hint="--dtype")
    raise typer.Exit(exporting.export(ckpt, out, exporting.ExportOptions(merge_lora, shard_gb, dtype, tuple(policy or ()))))


app.command()(machine.doctor)
app.command()(machine.recipes)

if __name__ == "__main__":
    main()
