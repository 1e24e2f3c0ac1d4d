"""Two evaluations compared: shared episodes are paired by scene, counted by hand, and what cannot be compared is refused."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helpers.command_line import Vlarl, command_line
from vlarl.evaluation.compare import Paired, clashes, pair, verdict
from vlarl.evaluation.protocol import Protocol, episodes
from vlarl.evaluation.report import EpisodeRow, build_report

PROTOCOL = Protocol(
    name="tabletop-train", simulator="tabletop", tasks=("put", "touch"), variation="train", episodes=8, horizon=48, image_size=64, views=1,
    chunk=4, temperature=0.0, seed=7,
)  # fmt: skip


def report(successes: set[int], hashes: dict[str, str] | None = None, protocol: Protocol = PROTOCOL) -> dict:
    rows = [EpisodeRow(e.uid, e.task, e.init_state, e.seed, e.uid in successes, 0.0, 9) for e in episodes(protocol)]
    return build_report(protocol, rows, hashes or {})


@pytest.fixture
def vlarl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Vlarl:
    return command_line(monkeypatch, capsys, tmp_path)


def write(folder: Path, name: str, *reports: dict) -> str:
    path = folder / name
    path.mkdir()
    (path / "eval.json").write_text(json.dumps(reports))
    return str(path)


def test_outcomes_are_paired_by_hand() -> None:
    put, touch, both = pair(report({0, 2, 1}), report({0, 4, 1, 3, 5}))
    assert put == Paired("train", "put", episodes=4, a=2, b=2, only_a=1, only_b=1)
    assert touch == Paired("train", "touch", episodes=4, a=1, b=3, only_a=0, only_b=2)
    assert both == Paired("train", "all", episodes=8, a=3, b=5, only_a=1, only_b=3)
    assert both.gain == 0.25
    assert both.p_value == 2 * (1 + 4) / 16
    assert touch.p_value == 0.5


def test_a_longer_evaluation_is_cut_to_the_shared_episodes() -> None:
    longer = dataclasses.replace(PROTOCOL, episodes=12)
    assert pair(report({1}), report({1, 9, 10, 11}, protocol=longer))[-1] == Paired("train", "all", 8, 1, 1, 0, 0)


def test_the_interval_is_newcombes() -> None:
    """Newcombe (1998), method 10: his example of 36, 12, 2 and 0 pairs; the second has no correlation to correct for."""
    low, high = Paired("train", "put", episodes=50, a=38, b=48, only_a=2, only_b=12).interval()
    assert (low, high) == (pytest.approx(0.0569, abs=5e-5), pytest.approx(0.3404, abs=5e-5))
    assert Paired("train", "put", episodes=54, a=54, b=54, only_a=0, only_b=0).interval() == pytest.approx((-0.0664, 0.0664), abs=1e-4)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Paired("train", "all", 100, 50, 70, 5, 25), "B is better (p = 0.00032)."),
        (Paired("train", "all", 100, 70, 50, 25, 5), "A is better (p = 0.00032)."),
        (Paired("train", "all", 100, 50, 50, 0, 0), "The two succeed and fail in the same episodes."),
        (Paired("train", "all", 100, 50, 50, 9, 9), "No difference shown: each wins as many episodes as it loses."),
    ],
)
def test_verdicts(row: Paired, said: str) -> None:
    assert verdict(row) == said


def test_too_few_episodes_are_told_how_many_it_takes() -> None:
    text = verdict(Paired("train", "all", 100, 50, 54, 8, 12))
    assert text.startswith("No difference shown (p = 0.5). If it is as large as it looks, about 979 episodes show it"), text


def test_clashes_name_what_makes_other_episodes() -> None:
    other = dataclasses.replace(PROTOCOL, seed=8, horizon=60, chunk=1)
    assert clashes(report(set()), report(set(), protocol=other)) == ["horizon: 48 and 60", "seed: 7 and 8"]


def test_the_command_prints_one_table(vlarl: Vlarl, tmp_path: Path) -> None:
    vision = dataclasses.replace(PROTOCOL, variation="vision")
    a = write(tmp_path, "a", report({0, 1, 2}), report({1}, protocol=vision))
    b = write(tmp_path, "b", report({0, 1, 3, 5, 7}, protocol=dataclasses.replace(PROTOCOL, chunk=1)))
    code, text, _ = vlarl("compare", a, f"{b}/eval.json")
    assert code == 0
    table_row = next(line for line in text.splitlines() if " all " in line)
    assert [cell.strip() for cell in table_row.split("│")[3:7]] == ["3/8 37.5%", "5/8 62.5%", "+25.0", "-20.1 to +58.7"]
    assert "vision:" not in text
    assert "Played otherwise: chunk 4 and 1." in text
    figures = json.loads(vlarl("compare", a, b, "--json")[1])
    assert figures["rows"][-1]["only_b"] == 3
    assert figures["rows"][-1]["p_value"] == 0.625


def test_the_same_weights_are_noticed(vlarl: Vlarl, tmp_path: Path) -> None:
    a, b = (write(tmp_path, name, report({0}, {"model.safetensors": "ab"})) for name in "ab")
    assert "A and B are the same weights." in vlarl("compare", a, b)[1]


def test_what_cannot_be_compared_is_refused(vlarl: Vlarl, tmp_path: Path) -> None:
    a = write(tmp_path, "a", report({0}))
    others = {
        "seed": (report({0}, protocol=dataclasses.replace(PROTOCOL, seed=8)), "set train: seed: 7 and 8"),
        "set": (report({0}, protocol=dataclasses.replace(PROTOCOL, variation="vision")), "share no set: train; vision"),
        "version": (report({0}) | {"version": 9}, "is of version [9]; this vlarl reads 1"),
        "half": ({"protocol": {}}, "is not the result of an evaluation"),
    }
    for name, (other, said) in others.items():
        code, _, text = vlarl("compare", a, write(tmp_path, name, other))
        assert (code, said in text.replace("\n", " ")) == (2, True), text
    code, _, text = vlarl("compare", a, str(tmp_path / "nowhere.json"))
    assert (code, "nowhere.json: No such file or directory" in text.replace("\n", " ")) == (2, True), text
