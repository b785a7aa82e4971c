"""Runs checks, each in a process of its own: one that hangs or crashes is a finding, and stops no other."""

from __future__ import annotations

import difflib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from leoclr_fast.doctor.checks import CHECKS, Check
from leoclr_fast.doctor.finding import Finding, failed

_MOST_AT_ONCE = 4
_END_WITHIN_S = 2.0
_CRASHED = "Install it again, or look at the whole story: python -m leoclr_fast.doctor.one_check {!r}"


def chosen_checks(names: Sequence[str]) -> list[Check]:
    """The checks of these names, or all. Raises ValueError for a name that does not exist."""
    known = {check.name: check for check in CHECKS}
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=2)
            hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
            raise ValueError(f"there is no check {name!r}.{hint} Allowed: {', '.join(known)}.")
    return [check for check in CHECKS if not names or check.name in names]


def examine(
    checks: Sequence[Check], *, data: str, out: str, began: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """The findings, in the order of `checks`. data, out: paths, or empty. began: told each check as it begins."""
    given = {"data": data, "out": out}

    def one(check: Check) -> Finding:
        began(check.name)
        return run_apart(check, given)

    findings = {check.name: one(check) for check in checks if check.alone}
    with ThreadPoolExecutor(min(_MOST_AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        together = [check for check in checks if not check.alone]
        findings |= zip((check.name for check in together), pool.map(one, together), strict=True)
    return [findings[check.name] for check in checks]


def run_apart(check: Check, given: dict[str, str]) -> Finding:
    """Run a check in a process of its own, which is killed at the check's limit. Never raises."""
    command = [sys.executable, "-m", "leoclr_fast.doctor.one_check", check.name, json.dumps(given)]
    # Files in memory: a pipe could be held open by what the check has started, and no disk is to be relied on.
    with _memory_file("answer") as answer, _memory_file("errors") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=answer, stderr=errors, start_new_session=True
        )
        try:
            process.wait(check.limit_s)
        except subprocess.TimeoutExpired:
            return failed(f"no answer within {check.limit_s:.0f} s", check.when_late)
        finally:
            _kill(process)
        return _finding(check, process.returncode, _content(answer), _content(errors))


def _finding(check: Check, returncode: int, answer: str, errors: str) -> Finding:
    remedy = _CRASHED.format(check.name)
    if returncode == 0:
        with suppress(ValueError, TypeError):
            return Finding(**json.loads(answer))
    last_words = [line.strip() for line in errors.splitlines() if line.strip()][-1:]
    told = f": {last_words[0][:300]}" if last_words else ""
    if returncode < 0:
        return failed(f"the check was ended by {_signal_name(-returncode)}{told}", remedy)
    return failed(f"the check ended with code {returncode} and no answer{told}", remedy)


def _kill(process: subprocess.Popen[Any]) -> None:
    """The process and what it started. One that waits for a dead disk cannot be killed, and is not waited for."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_WITHIN_S)


def _memory_file(name: str) -> Any:
    return os.fdopen(os.memfd_create(name), "w+b")


def _content(file: Any) -> str:
    file.seek(0)
    content: bytes = file.read()
    return content.decode(errors="replace")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
