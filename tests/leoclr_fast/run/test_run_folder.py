"""Who holds a run folder, and for how long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from leoclr_fast.report.run_record import read_run
from leoclr_fast.run import folder as run_folder
from leoclr_fast.run.folder import RunFolder
from tests.leoclr_fast.written_run import start, step_record, written_run

HOLDER = """
import os, sys, time
from pathlib import Path
from leoclr_fast.run.folder import RunFolder

with RunFolder(Path(sys.argv[1])).locked():
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(300)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(written_run(tmp_path / "run", [start(), step_record(10)]))


@pytest.fixture
def holder(folder: RunFolder) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the folder, and a child that it forked meanwhile, as a loader forks its workers."""
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_a_worker_that_outlives_its_killed_parent_holds_nothing(
    folder: RunFolder, holder: tuple[subprocess.Popen[str], int]
) -> None:
    process, child = holder
    assert read_run(folder.path).is_being_written
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not read_run(folder.path).is_being_written
    with folder.locked():
        os.kill(child, 0)  # it is still there


def test_a_child_that_ends_does_not_give_the_folder_free(
    folder: RunFolder, holder: tuple[subprocess.Popen[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, child = holder
    os.kill(child, signal.SIGKILL)
    while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert 2 <= run_folder.LOCK_WAIT_S < 20
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0.2)
    with pytest.raises(RuntimeError, match=r"another process is writing to .*/run; wait for it"), folder.locked():
        pass


def test_a_second_writer_waits_a_moment_for_one_that_is_about_to_go(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 60.0)
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with folder.locked():
            held.set()
            go.wait(60)
            time.sleep(0.3)

    first = threading.Thread(target=hold)
    first.start()
    assert held.wait(60)
    began = time.monotonic()
    go.set()
    with folder.locked():
        assert time.monotonic() - began >= 0.3
    first.join()
    assert not run_folder._held_locks
