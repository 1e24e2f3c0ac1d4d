"""Owns evaluation on worker ranks: the protocol's episodes shared out over the learners, each with simulators of its own."""
from __future__ import annotations

import time
from typing import Any

from vlarl.distributed.reduce import all_gather_objects
from vlarl.envs.hosts import HostedEnv
from vlarl.envs.pool import FinalFrames, LocalPool
from vlarl.evaluation.protocol import Protocol, episodes
from vlarl.evaluation.report import EpisodeRow, build_report
from vlarl.evaluation.runner import EpisodeRecorder, play_episodes
from vlarl.metrics.status import evaluation_counts, read_status, replace_status, write_evaluation
from vlarl.plan.specs import simulator_spec
from vlarl.policies.base import VLAPolicy
from vlarl.recipe.schema import Env
from vlarl.rollout.episodes import ListFeed
from vlarl.worker.context import Context
from vlarl.worker.films import write_films
from vlarl.worker.setup import build_sampler, evaluation_env, evaluation_slots

FILMED = 8  # episodes filmed for each one kept: successes and failures cannot be told before they end
SECONDS_BETWEEN_REPORTS = 1.0
TRAINING_SEED_OFFSET = 1_000_003  # evaluations during training see other scenes than `vlarl eval`, which so stays unseen


def evaluate(run: Context, policy: VLAPolicy, variation: str, seed: int, hashes: dict[str, str], prefix: str) -> dict[str, Any]:
    """Play one protocol with gathered weights (inside `acting`); the report, on every learner. Videos are written by each rank."""
    env, settings = run.recipe.env, run.recipe.eval
    protocol = Protocol(
        name=f"{env.simulator}-{variation}",
        simulator=env.simulator,
        tasks=run.tasks,
        variation=variation,
        episodes=settings.episodes,
        horizon=env.horizon,
        image_size=env.image_size,
        views=simulator_spec(env).views,
        chunk=policy.spec.chunk,
        temperature=settings.temperature,
        seed=seed,
        options=_options(env),
    )
    world = run.world.learners
    assert world is not None, "learners evaluate, with simulators of their own"
    ranks = world.world_size
    slots_per_rank = evaluation_slots(run)
    feed = ListFeed(episodes(protocol), slots_per_rank * ranks)
    first = world.rank * slots_per_rank
    watch = _Watch(run, protocol, sum(row % (slots_per_rank * ranks) // slots_per_rank == world.rank for row in range(protocol.episodes)))
    final: FinalFrames = "all" if settings.videos else "none"
    env_of_slots = evaluation_env(run, range(first, first + slots_per_rank), variation)
    pool = LocalPool([env_of_slots], first, slots_per_rank, policy.spec.chunk, feed, final)
    recorder = EpisodeRecorder(lambda uid: uid < FILMED * settings.videos, watch)
    sampler = build_sampler(policy, policy.spec, seed, settings.temperature, 0)
    play_episodes(pool, sampler, recorder, run)
    watch.tell(recorder.rows, 0)
    if not isinstance(env_of_slots, HostedEnv):  # hosts stay for the next evaluation
        pool.close()
    write_films(run, recorder.films, prefix, settings.videos)
    run.meet(world, "the end of an evaluation")
    rows: list[EpisodeRow] = [row for part in all_gather_objects(world, recorder.rows) for row in part]
    watch.end()
    return build_report(protocol, rows, hashes)


class _Watch:
    """Tells, while an evaluation is played, how far it is: each rank in its heartbeat, the main rank of all of them in status.json. No
    collective: ranks are not in step here."""

    def __init__(self, run: Context, protocol: Protocol, mine: int) -> None:
        """Before simulators start, which have a status of their own. mine: episodes that this rank plays."""
        self._run, self._protocol, self._mine = run, protocol, mine
        self._status = read_status(run.run_dir) if run.world.is_main else None
        self._started = self._told = 0.0

    def __call__(self, rows: list[EpisodeRow], open_actions: int) -> None:
        """See EpisodeRecorder."""
        if time.monotonic() - self._told >= SECONDS_BETWEEN_REPORTS:
            self.tell(rows, open_actions)

    def end(self) -> None:
        """After all ranks have met: the counts of one that is done belong to the whole until then, and to no evaluation afterwards."""
        self._run.heartbeat.evaluating(None)
        if self._status is not None:
            replace_status(self._run.run_dir, self._status)

    def tell(self, rows: list[EpisodeRow], open_actions: int) -> None:
        """At once."""
        self._told = now = time.monotonic()
        self._started = self._started or now
        self._run.heartbeat.evaluating((len(rows), sum(row.success for row in rows)))
        if self._status is None:
            return
        # Open episodes count by their length, or nothing would be known until the first has ended, which may take minutes.
        share = (len(rows) + open_actions / self._protocol.horizon) / self._mine
        left = (now - self._started) * max(0.0, 1 / share - 1) if share else None
        played, successes = evaluation_counts(self._run.run_dir, self._run.world.world_size)
        write_evaluation(
            self._run.run_dir, self._status, played=played, of=self._protocol.episodes, successes=successes, eta_seconds=left
        )


def _options(env: Env) -> tuple[str, ...]:
    """Settings of one simulator alone that change what is played or seen."""
    names = {
        "libero": ("render", "settle_steps"),
        "maniskill": ("control_mode", "gripper", "cameras", "shader", "show_goals"),
        "robotwin": ("embodiment", "motion", "camera", "cameras", "shader", "instructions", "eval_seeds"),
    }
    return tuple(f"{name}={getattr(getattr(env, env.simulator), name)}" for name in names.get(env.simulator, ()))


def evaluate_training(run: Context, policy: VLAPolicy, update: int) -> dict[str, float]:
    """An evaluation during training, as metrics."""
    seed = run.recipe.seed + TRAINING_SEED_OFFSET
    report = evaluate(run, policy, run.recipe.env.variation, seed, {}, f"eval-{update:06d}")
    pooled = report["pooled"]
    scores = {
        "eval/success": pooled["rate"],
        "eval/successes": float(pooled["successes"]),
        "eval/episodes": float(pooled["episodes"]),
        "eval/length": pooled["mean_length"],
    }
    return scores | {f"eval/success_{name}": summary["rate"] for name, summary in report["tasks"].items()}
