"""Protocols fix their episodes; reports count them; neither needs torch."""
from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from vlarl.envs.spec import EVAL_INIT_STATE, EpisodeSpec
from vlarl.evaluation.protocol import Protocol, digest, episodes
from vlarl.evaluation.report import EpisodeRow, build_report, result_table

PROTOCOL = Protocol(
    name="tabletop-train",
    simulator="tabletop",
    tasks=("put", "touch"),
    variation="train",
    episodes=5,
    horizon=48,
    image_size=64,
    views=1,
    chunk=4,
    temperature=0.0,
    seed=7,
)


def _rows(successes: set[int]) -> list[EpisodeRow]:
    return [
        EpisodeRow(spec.uid, spec.task, spec.init_state, spec.seed, spec.uid in successes, float(spec.uid in successes), 10 + spec.uid)
        for spec in reversed(episodes(PROTOCOL))
    ]


def test_episodes_are_listed_by_hand() -> None:
    base = EVAL_INIT_STATE
    assert episodes(PROTOCOL) == (
        EpisodeSpec(uid=0, task=0, init_state=base, seed=7),
        EpisodeSpec(uid=1, task=1, init_state=base, seed=7),
        EpisodeSpec(uid=2, task=0, init_state=base + 1, seed=7),
        EpisodeSpec(uid=3, task=1, init_state=base + 1, seed=7),
        EpisodeSpec(uid=4, task=0, init_state=base + 2, seed=7),
    )


def test_more_episodes_only_append() -> None:
    assert episodes(dataclasses.replace(PROTOCOL, episodes=9))[:5] == episodes(PROTOCOL)


def test_digest_sees_everything_but_the_name() -> None:
    assert digest(dataclasses.replace(PROTOCOL, name="other")) == digest(PROTOCOL)
    assert digest(dataclasses.replace(PROTOCOL, temperature=1.0)) != digest(PROTOCOL)


def test_report_counts_per_task_and_pooled() -> None:
    report = build_report(PROTOCOL, _rows({0, 1, 4}), hashes={"model.safetensors": "ab"})
    assert json.loads(json.dumps(report)) == report
    pooled, put, touch = report["pooled"], report["tasks"]["put"], report["tasks"]["touch"]
    assert (pooled["successes"], pooled["episodes"], pooled["rate"]) == (3, 5, 0.6)
    assert (put["successes"], put["episodes"]) == (2, 3)
    assert (touch["successes"], touch["episodes"]) == (1, 2)
    assert pooled["mean_length"] == 12.0 and pooled["mean_return"] == 0.6
    # Wilson, 3 of 5, z = 1.959964: centre (0.6 + z^2/10)/(1 + z^2/5) = 0.556552, half-width 0.325827
    assert pooled["wilson95"] == pytest.approx([0.230724, 0.882379], abs=1e-6)
    assert [row["uid"] for row in report["rows"]] == [0, 1, 2, 3, 4]
    assert report["rows"][1]["task"] == "touch"
    assert report["hashes"] == {"model.safetensors": "ab"}
    assert set(report["versions"]) == {"python", "platform", "vlarl", "torch", "transformers", "numpy"}
    assert report["protocol"]["digest"] == digest(PROTOCOL)


def test_a_missing_episode_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        build_report(PROTOCOL, _rows(set())[1:], hashes={})


def test_table_has_a_line_per_task_and_one_pooled() -> None:
    table = result_table([build_report(PROTOCOL, _rows({0, 1, 4}), hashes={})])
    assert table["title"] == "tabletop, 5 episodes, greedy"
    assert [row[:4] for row in table["rows"]] == [
        ["train", "put", "2/3", "66.7%"],
        ["train", "touch", "1/2", "50.0%"],
        ["train", "all", "3/5", "60.0%"],
    ]
    assert table["rows"][2][4:] == ["23.1% to 88.2%", "12.0"]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_protocol_and_report_do_not_import_torch() -> None:
    code = "import sys, vlarl.evaluation.report, vlarl.metrics.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
