"""Runs checks, each in a process of its own: one that hangs or crashes has failed, and stops no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from leoclr_fast.doctor.checks import Check
from leoclr_fast.doctor.result import Result, failed

_MAX_AT_ONCE = 4
_END_WITHIN_S = 2.0


def examine(
    checks: Sequence[Check], *, data: str, out: str, began: Callable[[str], None] = lambda name: None
) -> list[Result]:
    """The results, in the order of `checks`. data, out: paths, or empty. began: is called as each check begins."""

    def one(check: Check) -> Result:
        began(check.name)
        return run_apart(check, {"data": data, "out": out})

    results = {check.name: one(check) for check in checks if check.alone}
    together = [check for check in checks if not check.alone]
    with ThreadPoolExecutor(min(_MAX_AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        results |= zip((check.name for check in together), pool.map(one, together), strict=True)
    return [results[check.name] for check in checks]


def run_apart(check: Check, given: dict[str, str]) -> Result:
    """Run a check in a process of its own, which is killed at the check's limit. Never raises."""
    command = [sys.executable, "-m", "leoclr_fast.doctor.one_check", check.name, json.dumps(given)]
    # Files in memory: a pipe could be held open by what the check has started, and no disk is to be relied on.
    with os.fdopen(os.memfd_create("answer"), "w+") as answer, os.fdopen(os.memfd_create("errors"), "w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=answer, stderr=errors, start_new_session=True
        )
        try:
            process.wait(check.limit_s)
        except subprocess.TimeoutExpired:
            return failed(f"no answer within {check.limit_s:.0f} s", check.when_late)
        finally:
            _kill(process)
        answer.seek(0)
        errors.seek(0)
        return _result(check, process.returncode, answer.read(), errors.read())


def _result(check: Check, returncode: int, answer: str, errors: str) -> Result:
    if returncode == 0:
        with suppress(ValueError, TypeError):
            return Result(**json.loads(answer))
    last_line = [line.strip() for line in errors.splitlines() if line.strip()][-1:]
    ending = f": {last_line[0][:300]}" if last_line else ""
    how = f"by {_signal_name(-returncode)}" if returncode < 0 else f"with code {returncode} and no answer"
    return failed(
        f"the check {'was ended' if returncode < 0 else 'ended'} {how}{ending}",
        f"Install it again, or look at the whole story: python -m leoclr_fast.doctor.one_check {check.name!r}",
    )


def _kill(process: subprocess.Popen[Any]) -> None:
    """The process and what it started. One that waits for a dead disk cannot be killed, and is not waited for."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_WITHIN_S)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
