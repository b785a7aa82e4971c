"""Starts runs within a second, since it has imported everything before: `-m tests.leoclr_fast.fork_server`.

Reads requests from stdin, one JSON object a line, and answers each in a line. A run is the command line in a process
(or session) of its own; with several ranks it is torch's own elastic agent, as torchrun uses it, with forked ranks.
Runs write no report, but with the argument `pages`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import leoclr_fast.commands.pretrain
import leoclr_fast.training.loop  # noqa: F401
from leoclr_fast.cli import run_command
from tests.leoclr_fast.forked_ranks import load_kernels
from tests.leoclr_fast.pages import leave_out


def rank_main(arguments: list[str], pids: str) -> None:
    """One rank, until its end."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # the agent's are inherited
    rank = os.environ.get("RANK", "0")
    (Path(pids) / f"rank-{rank}").write_text(str(os.getpid()))
    code = run_command(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != 0 or "TORCHELASTIC_RUN_ID" not in os.environ:
        os._exit(code)


def run(request: dict[str, Any]) -> None:
    """In the forked process: all of a run."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    if request["ranks"] == 1:
        rank_main(request["arguments"], request["pids"])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=request["ranks"],
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=request["max_restarts"],
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, rank_main)(request["arguments"], request["pids"])


def serve() -> None:
    """Until stdin is closed; then every run that is left is killed."""
    running: set[int] = set()
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], 0.02)
        if readable:
            line = sys.stdin.readline()
            if not line:
                break
            read_end, write_end = os.pipe()
            process = os.fork()
            if process == 0:
                os.setsid()
                os.close(write_end)
                os.close(read_end)
                code = 1
                try:
                    run(json.loads(line))
                    code = 0
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                finally:
                    os._exit(code)
            os.close(write_end)
            os.read(read_end, 1)  # ends when the process leads its session: whoever kills the group finds it
            os.close(read_end)
            running.add(process)
            print(json.dumps({"started": process}), flush=True)
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                running.discard(process)
                print(json.dumps({"ended": process, "code": os.waitstatus_to_exitcode(status)}), flush=True)
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1:] != ["pages"]:
        leave_out()
    load_kernels()
    serve()
