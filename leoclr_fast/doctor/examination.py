"""Runs checks, each in a process of its own: one that hangs or crashes has failed, and stops no other.

`python -m leoclr_fast.doctor.examination NAME` is that process, and prints a check's result as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict

from leoclr_fast.doctor.checks import Check, chosen_checks
from leoclr_fast.doctor.result import Result, failed, in_short

_MAX_AT_ONCE = 4
_END_WITHIN_S = 2.0


def examine(checks: Sequence[Check], *, data: str, out: str) -> list[Result]:
    """The results, in the order of `checks`. data, out: paths, or empty."""
    with ThreadPoolExecutor(min(_MAX_AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(lambda check: run_apart(check, {"data": data, "out": out}), checks))


def run_apart(check: Check, given: dict[str, str]) -> Result:
    """Run a check in a process of its own, which is killed at the check's limit. Never raises."""
    command = [sys.executable, "-m", "leoclr_fast.doctor.examination", check.name, json.dumps(given)]
    # Files in memory: a pipe could be held open by what the check has started, and no disk is to be relied on.
    with os.fdopen(os.memfd_create("answer"), "w+") as answer, os.fdopen(os.memfd_create("errors"), "w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=answer, stderr=errors, start_new_session=True
        )
        try:
            process.wait(check.limit_s)
        except subprocess.TimeoutExpired:
            return failed(f"no answer within {check.limit_s:.0f} s", check.when_late)
        finally:  # the process and what it started; one that waits for a dead disk cannot be killed
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_WITHIN_S)
        answer.seek(0)
        errors.seek(0)
        if process.returncode == 0:
            with suppress(ValueError, TypeError):
                return Result(**json.load(answer))
        last_line = ": ".join(["", *[line.strip()[:300] for line in errors if line.strip()][-1:]])
    code = process.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code} and no answer"
    return failed(f"the check {how}{last_line}", f"Install it again, or look at the whole story: {_command(check)}")


def _command(check: Check) -> str:
    return f"`python -m leoclr_fast.doctor.examination {check.name!r}`"


def main() -> None:
    """Libraries may print what they like: that goes to stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, *rest = sys.argv[1:]
    (check,) = chosen_checks([name])
    try:
        result = check.run(json.loads(rest[0]) if rest else {"data": "", "out": "."})
    except Exception as error:
        traceback.print_exc()
        result = failed(in_short(error), f"See the whole story with {_command(check)}.")
    answer.write(json.dumps(asdict(result)))
    answer.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries that were only half loaded may hang as they are torn down


if __name__ == "__main__":
    main()
