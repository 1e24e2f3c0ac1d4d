"""Owns the learning-curve picture: success against updates and frames, drawn from metrics.jsonl alone."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from vlarl.evaluation.statistics import wilson
from vlarl.metrics.sinks import read_metrics

Row = dict[str, Any]
WINDOW_EPISODES = 200  # training success is pooled over at least so many of the latest episodes
_TRAIN, _EVAL, _RETURN = "#3366aa", "#cc5500", "#777777"


def pooled_success(rows: list[Row], window_episodes: int = WINDOW_EPISODES) -> list[tuple[int, int, int]]:
    """(step, successes, episodes) per training row, pooled with the rows before it until `window_episodes` are reached.

    Counts are pooled, not rates averaged, so that a Wilson interval holds. Points before the first full window hold what there is.
    """
    counted = [row for row in rows if row.get("train/episodes")]
    points = []
    for last in range(len(counted)):
        successes = episodes = 0
        for row in reversed(counted[: last + 1]):
            successes += int(row["train/successes"])
            episodes += int(row["train/episodes"])
            if episodes >= window_episodes:
                break
        points.append((counted[last]["step"], successes, episodes))
    return points


def draw_curve(metrics_path: Path, png_path: Path) -> bool:
    """Draws success while training (95 % Wilson band), evaluations (95 % Wilson bars) and returns. False, and no file, without data.

    x: updates; upper axis: millions of environment frames. The picture replaces the old one in one step.
    """
    rows = read_metrics(metrics_path)
    train = pooled_success(rows)
    evals = [row for row in rows if row.get("eval/episodes")]
    if not train and not evals:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_success(top, train, evals)
    _draw_return(bottom, rows)
    _draw_frames_axis(top, rows)
    draft = png_path.with_name(f".{png_path.name}.tmp")
    figure.savefig(draft, dpi=120, format="png")
    draft.replace(png_path)
    return True


def _draw_success(axes: Any, train: list[tuple[int, int, int]], evals: list[Row]) -> None:
    if train:
        steps = [step for step, _, _ in train]
        bands = [wilson(k, n) for _, k, n in train]
        axes.fill_between(steps, [low for low, _ in bands], [high for _, high in bands], color=_TRAIN, alpha=0.2, linewidth=0)
        axes.plot(steps, [k / n for _, k, n in train], color=_TRAIN, label=f"while training (last {WINDOW_EPISODES} episodes)")
    if evals:
        counts = [(int(row["eval/successes"]), int(row["eval/episodes"])) for row in evals]
        rates = [k / n for k, n in counts]
        bands = [wilson(k, n) for k, n in counts]
        below = [rate - low for rate, (low, _) in zip(rates, bands, strict=True)]
        above = [high - rate for rate, (_, high) in zip(rates, bands, strict=True)]
        label = f"evaluation, last {counts[-1][0]}/{counts[-1][1]} = {rates[-1]:.1%}"
        axes.errorbar([row["step"] for row in evals], rates, yerr=[below, above], fmt="o", color=_EVAL, capsize=3, label=label)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("success (95 % Wilson)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _draw_return(axes: Any, rows: list[Row]) -> None:
    points = [(row["step"], row["train/return"]) for row in rows if row.get("train/return") is not None]
    axes.plot([step for step, _ in points], [value for _, value in points], color=_RETURN)
    axes.set_ylabel("mean return")
    axes.set_xlabel("update")
    axes.grid(alpha=0.3)


def _draw_frames_axis(axes: Any, rows: list[Row]) -> None:
    """Upper axis: frames so far at the ticks of the lower one."""
    frames = {0: 0.0} | {row["step"]: row["rollout/frames"] / 1e6 for row in rows if row.get("rollout/frames")}
    if len(frames) == 1:
        return
    known = sorted(frames)
    ticks = [tick for tick in axes.get_xticks() if known[0] <= tick <= known[-1]]
    upper = axes.twiny()
    upper.set_xlim(axes.get_xlim())
    upper.set_xticks(ticks, [f"{frames[max(step for step in known if step <= tick)]:.3g}" for tick in ticks])
    upper.set_xlabel("environment frames, millions")
