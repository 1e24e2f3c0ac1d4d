"""Owns a Ctrl-C that works in every test process: a suite started in the background inherits an ignored one, and so would its children."""
from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
