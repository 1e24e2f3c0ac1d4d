"""Owns the command line in the test's own process."""
from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlarl_cli import app, render

Vlarl = Callable[..., tuple[int, str, str]]


def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Vlarl:
    """`vlarl ARGUMENTS` in an empty folder, on a wide console: exit code, stdout, stderr."""
    monkeypatch.chdir(folder)
    for console in (render.out, render.err):  # they took the environment's width when they were imported
        monkeypatch.setattr(console, "_width", 250)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlarl", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(ended.value.code or 0), captured.out, captured.err

    return call
