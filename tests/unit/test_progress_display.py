"""What a running command shows: the contents of status.json, on a terminal and in plain output."""
from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from vlarl_cli import render
from vlarl_cli.render import PLAIN_SECONDS, PlainProgress

TRAINING: dict[str, Any] = {
    "phase": "training", "update": 25, "updates": 60, "frames_per_second": 1234.0, "success": 0.5, "recent": [32, 64], "episodes": 64,
    "eta_seconds": 65.0, "line": "update 61%", "evaluation": None, "evaluated": "",
}  # fmt: skip
EVALUATING = TRAINING | {
    "phase": "evaluation", "line": "25 of 60 updates done", "frames_per_second": None,
    "evaluation": {"played": 12, "of": 200, "successes": 9, "eta_seconds": 40.0},
}  # fmt: skip
SENTENCE = "evaluation after 25 updates: 163/200 = 81.5 % (75.5 to 86.3 %)"


def plain(*statuses: tuple[float, dict[str, Any]]) -> list[str]:
    """The lines printed for statuses at these seconds."""
    lines: list[str] = []
    now = [0.0]
    progress = PlainProgress(lines.append, lambda: now[0])
    for seconds, status in statuses:
        now[0] = seconds
        progress(status)
    return lines


def test_training_and_evaluation() -> None:
    before = EVALUATING | {"evaluation": {"played": 0, "of": 200, "successes": 0, "eta_seconds": None}}
    assert plain((0.0, TRAINING), (1.0, before), (2.0 + PLAIN_SECONDS, EVALUATING)) == [
        "training  25/60  1,234 frames/s  training success 32/64 = 50.0 %  64 episodes  1:05 left  update 61%",
        "evaluation  0/200 episodes  25 of 60 updates done",
        "evaluation  12/200 episodes  success 9/12 = 75.0 %  0:40 left  25 of 60 updates done",
    ]


def test_cloning_shows_samples() -> None:
    (line,) = plain((0.0, TRAINING | {"phase": "warm start", "recent": None, "episodes": 0}))
    assert line == "warm start  25/60  1,234 samples/s  1:05 left  update 61%"


def test_an_evaluation_is_printed_once() -> None:
    told = {"evaluated": SENTENCE}
    simulators = TRAINING | {"phase": "simulators: 1 of 2 are up"}  # whose status does not know of evaluations
    lines = plain((0.0, TRAINING), (1.0, TRAINING | told), (2.0, TRAINING | told), (3.0, simulators), (4.0, TRAINING | told))
    assert lines.count(SENTENCE) == 1
    again = {"evaluated": SENTENCE.replace("25", "50")}
    assert SENTENCE.replace("25", "50") in plain((0.0, TRAINING | told), (1.0, TRAINING | again))


def test_the_evaluation_after_the_last_update_does_not_flood() -> None:
    last = [status | {"update": 60} for status in (TRAINING, EVALUATING)]
    assert len(plain((0.0, TRAINING), (1.0, last[0]), *((2.0 + n, last[1]) for n in range(10)))) == 3


def test_on_a_terminal_the_evaluation_stays_above_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    monkeypatch.setattr(render, "out", Console(file=screen, force_terminal=True, width=80, highlight=False))
    with render.progress() as show:
        show(EVALUATING)
        show(TRAINING | {"evaluated": SENTENCE})
        show(TRAINING | {"evaluated": SENTENCE})
        show(TRAINING | {"recent": [123, 400], "episodes": 123456, "eta_seconds": 12345.0})
    assert screen.getvalue().count(SENTENCE) == 1
    assert "3:25:45 left\n1,234 frames/s  training success 123/400 = 30.8 %  123,456 episodes\n" in screen.getvalue()
