"""A call that takes a minute, in which a signal comes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

LONG_S = 60.0


def long_call(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, in whose `call`-th call a signal comes, and which then goes on for a minute."""
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
            until = time.monotonic() + LONG_S
            while time.monotonic() < until:
                time.sleep(0.01)
                options.get("go_on", lambda: None)()
        return function(*arguments, **options)

    return wrapped
