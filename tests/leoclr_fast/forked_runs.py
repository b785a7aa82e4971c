"""Runs on one rank or on several, which tests start, disturb and wait for; every wait is bounded."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 120.0


class ForkedRuns:
    """The fork server, and what it has said."""

    def __init__(self, pages: bool = False) -> None:
        """pages: whether the runs write their report."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.leoclr_fast.fork_server", *["pages"] * pages],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )
        self._codes: dict[int, int] = {}
        self._rest = b""

    def start(
        self, arguments: list[str], log: Path, *, ranks: int = 1, max_restarts: int = 0, **environment: str
    ) -> ForkedRun:
        """Start a command line. environment: variables that are set in it."""
        pids = log.with_suffix(".pids")
        pids.mkdir(parents=True, exist_ok=True)
        for old in pids.iterdir():
            old.unlink()
        request = {
            "arguments": arguments,
            "log": str(log),
            "pids": str(pids),
            "ranks": ranks,
            "max_restarts": max_restarts,
            "environment": environment,
        }
        assert self._process.stdin is not None
        outs = [Path(argument.removeprefix("--out=")) for argument in arguments if argument.startswith("--out=")]
        num_starts = num_starts_of(outs[-1]) if outs else 0
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return ForkedRun(self, self._next("started"), log, pids, num_starts)

    def code(self, process: int) -> int | None:
        """The exit code of a run; None while it runs."""
        while process not in self._codes and self._readable(0):
            self._next("ended")
        return self._codes.get(process)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIMIT_S)  # it may still be importing

    def _readable(self, timeout_s: float) -> bool:
        return b"\n" in self._rest or bool(select.select([self._process.stdout], [], [], timeout_s)[0])

    def _next(self, kind: str) -> int:
        """Read messages until one is of this kind; returns its process."""
        assert self._process.stdout is not None
        while True:
            if not self._readable(LIMIT_S):
                raise TimeoutError("the fork server does not answer")
            while b"\n" not in self._rest:
                content = os.read(self._process.stdout.fileno(), 65536)
                if not content:
                    raise RuntimeError("the fork server has died")
                self._rest += content
            line, _, self._rest = self._rest.partition(b"\n")
            message: dict[str, Any] = json.loads(line)
            if "ended" in message:
                self._codes[message["ended"]] = message["code"]
            if kind in message:
                return int(message[kind])


@dataclass
class ForkedRun:
    """A run that was started."""

    server: ForkedRuns
    process: int
    """Of the single rank, or of the agent of all ranks; its session holds all of them."""
    log: Path
    pids: Path
    num_starts_before: int
    """How often the log of the run said that it started, before this process."""
    started_s: float = field(default_factory=time.monotonic)

    def rank(self, rank: int) -> int:
        """The process of a rank."""
        return int((self.pids / f"rank-{rank}").read_text())

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def code(self) -> int | None:
        return self.server.code(self.process)

    def wait_for_step(self, out: Path, step: int) -> None:
        """Until this process, not one that wrote to the run before it, has logged this step or a later one."""
        deadline = time.monotonic() + LIMIT_S
        while finished_steps(out, self.num_starts_before + 1) < step:
            assert self.code() is None, self.output()
            assert time.monotonic() < deadline, f"step {step} did not come: {self.output()}"
            time.sleep(0.002)

    def kill_all(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """The exit code, once no process of the run is left. Raises AssertionError after the limit."""
        deadline = time.monotonic() + limit_s
        while self.code() is None or self._is_left():
            if time.monotonic() > deadline:
                self.kill_all()
                raise AssertionError(f"processes are left after {limit_s:g} s: {self.output()}")
            time.sleep(0.01)
        code = self.code()
        assert code is not None
        return code

    def _is_left(self) -> bool:
        try:
            os.killpg(self.process, 0)
        except ProcessLookupError:
            return False
        return True


@contextmanager
def fork_server(pages: bool = False) -> Iterator[ForkedRuns]:
    runs = ForkedRuns(pages)
    try:
        yield runs
    finally:
        runs.close()


def finished_steps(out: Path, from_start: int = 0) -> int:
    """The last step in the log of a run; from_start: of those that were logged after it had started so many times."""
    num_starts, last = 0, 0
    for record in _records(out):
        num_starts += record["kind"] == "start"
        if record["kind"] == "step" and num_starts >= from_start:
            last = max(last, record["step"])
    return last


def num_starts_of(out: Path) -> int:
    return sum(record["kind"] == "start" for record in _records(out))


def _records(out: Path) -> list[dict[str, Any]]:
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
