"""Owns where the tests find LIBERO."""
from __future__ import annotations

import os
import sys
from importlib.util import find_spec


def interpreter() -> str | None:
    """A Python that has LIBERO: the one named in VLARL_LIBERO_PYTHON, else this one if it has; None where there is none."""
    named = os.environ.get("VLARL_LIBERO_PYTHON")
    return named or (sys.executable if find_spec("libero") is not None else None)
