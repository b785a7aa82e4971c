"""WorkerPool: order, dying workers, descriptors. Tasks are plain numbers here."""

from __future__ import annotations

import errno
import faulthandler
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dataset_tools.conversion import workers
from dataset_tools.conversion.workers import WorkerDiedError, WorkerPool

Pieces = tuple[int, int]


def results(pool: WorkerPool[Any, Any], tasks: Any) -> list[tuple[Any, Any, bytes]]:
    return [(done.task, done.result, bytes(done.payload)) for done in pool.map(tasks) if done is not None]


def open_descriptors() -> set[tuple[str, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def children() -> set[int]:
    """Of this thread of this process; other tests' helpers (multiprocessing's tracker, a fork server) among them."""
    return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    children_before, descriptors_before = children(), open_descriptors()
    yield
    gc.collect()
    assert children() <= children_before
    assert open_descriptors() - descriptors_before == set()


def dies(by: signal.Signals, at: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """Work that doubles a number, or kills its own process."""

    def work(task: Any) -> tuple[Any, list[bytes]]:
        if at(task):
            faulthandler.disable()  # pytest's
            if by == signal.SIGHUP:
                signal.signal(by, signal.SIG_DFL)  # nohup ignores it
            os.kill(os.getpid(), by)
        return task, [repr(task).encode()]

    return work


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("num_tasks", [0, 1, 3, 200])
def test_every_task_once_and_in_order(num_workers: int, num_tasks: int) -> None:
    def work(task: int) -> tuple[int, list[bytes]]:
        time.sleep(0.002 * (task * 7 % 5))  # later ones are done earlier
        return task * task, [b"x" * (task % 3), b"", bytes([task])]

    before = children()
    with WorkerPool(work, num_workers) as pool:
        found = results(pool, range(num_tasks))
        assert len(children() - before) <= min(num_workers, num_tasks)
    assert found == [(task, task * task, b"x" * (task % 3) + bytes([task])) for task in range(num_tasks)]
    assert pool.restarts == 0


def test_ended_early_nothing_is_left() -> None:
    pool = WorkerPool(lambda task: (task, [b"payload"]), 3)
    generator = pool.map(range(1000))
    while (done := next(generator)) is None:
        pass
    assert (done.task, bytes(done.payload)) == (0, b"payload")
    generator.close()
    pool.close()
    with suppress(KeyError), WorkerPool(lambda task: (task, [b"payload"]), 3) as pool:
        for done in pool.map(range(1000)):
            if done is not None and done.task == 20:
                raise KeyError
    assert done is not None
    assert done.task == 20


def test_an_error_of_the_machine_comes_in_its_own_words() -> None:
    def work(task: int) -> tuple[int, list[bytes]]:
        raise OSError(errno.EIO, "cannot read sample 'a.jpg'")

    with (
        WorkerPool(work, 1, describe="image {}".format) as pool,
        pytest.raises(OSError, match=r"image 7: cannot read sample 'a\.jpg'$"),
    ):
        list(pool.map([7]))


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_that_ask_for_an_end_are_for_the_parent(stop_signal: signal.Signals) -> None:
    with WorkerPool(dies(stop_signal, lambda task: True), 2) as pool:
        assert [task for task, _, _ in results(pool, list(range(5)))] == list(range(5))
    assert pool.restarts == 0


def test_an_exception_comes_with_its_traceback() -> None:
    def divide(task: int) -> tuple[float, list[bytes]]:
        return 1 / (task - 3), []

    with (
        WorkerPool(divide, 2, describe=lambda task: f"task number {task}") as pool,
        pytest.raises(RuntimeError, match=r"(?s)task number 3: Traceback .*in divide.*ZeroDivisionError"),
    ):
        results(pool, range(10))


TENS = [(start, start + 10) for start in range(0, 100, 10)]
IN_PIECES = [*TENS[:2], *((i, i + 1) for i in range(20, 30)), *TENS[3:]]


def dying_pool(by: signal.Signals, at: Callable[[Pieces], bool]) -> WorkerPool[Any, Any]:
    """Two workers, of which one dies at some ranges of numbers, which can be cut in single ones."""
    return WorkerPool(
        dies(by, at),
        2,
        pieces=lambda task: [(i, i + 1) for i in range(*task)],
        crashed=lambda task, reason: ("crashed", task, reason),
        describe="images {}".format,
    )


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGHUP])
def test_a_worker_that_is_killed_each_time(by: signal.Signals) -> None:
    """By something from outside, such as the lack of memory: no image is to blame, so the work stops."""
    with (
        dying_pool(by, lambda task: task[0] <= 23 < task[1]) as pool,
        pytest.raises(WorkerDiedError, match=rf"killed by {by.name} at images \(23, 24\),.*same command continues"),
    ):
        results(pool, TENS)


@pytest.mark.parametrize("by", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL])
def test_a_task_that_crashes_its_worker(by: signal.Signals) -> None:
    with dying_pool(by, lambda task: task[0] <= 23 < task[1]) as pool:
        found = results(pool, TENS)
    assert [task for task, _, _ in found] == IN_PIECES
    by_task = {task: (result, payload) for task, result, payload in found}
    reason = f"decoding it killed the worker twice (killed by {by.name})"
    assert by_task.pop((23, 24)) == (("crashed", (23, 24), reason), b"")
    assert all(found == (task, repr(task).encode()) for task, found in by_task.items())
    assert pool.restarts == 2


def test_a_worker_that_stands_still(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flag = tmp_path / "stopped"

    def work(task: int) -> tuple[int, list[bytes]]:
        if task == 5 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return task, [b"payload"]

    began = time.monotonic()
    with WorkerPool(work, 2, stall_s=1.5) as pool:
        assert [task for task, _, _ in results(pool, range(30))] == list(range(30))
    assert "has not answered for 2 s and is killed" in caplog.text
    assert pool.restarts >= 1
    assert time.monotonic() - began < 60


def test_a_worker_that_stands_still_in_the_midst_of_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half of its payload is with the parent, which does not wait for the rest for ever."""
    monkeypatch.setattr(workers, "ANSWER_S", 1)
    flag, write_pieces = tmp_path / "stopped", workers.write_pieces

    def write_half(descriptor: int, pieces: list[bytes]) -> None:
        if pieces == [b"payload of 3"] and not flag.exists():
            flag.touch()
            os.write(descriptor, pieces[0][:5])
            os.kill(os.getpid(), signal.SIGSTOP)
        write_pieces(descriptor, pieces)

    monkeypatch.setattr(workers, "write_pieces", write_half)
    with WorkerPool(lambda task: (task, [b"payload of %d" % task]), 2) as pool:
        assert results(pool, range(9)) == [(task, task, b"payload of %d" % task) for task in range(9)]
    assert pool.restarts == 1


def test_many_payloads_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Behind a slow first task no more is handed out than HELD_BYTES, and what had been handed out."""
    monkeypatch.setattr(workers, "HELD_BYTES", 3000)

    def work(task: int) -> tuple[int, list[bytes]]:
        (tmp_path / str(task)).touch()
        time.sleep(1.0 if task == 0 else 0.0)
        return len(os.listdir(tmp_path)), [bytes(1000)]

    with WorkerPool(work, 2) as pool:
        found = results(pool, range(40))
    assert [task for task, _, _ in found] == list(range(40))
    assert found[0][1] <= 8  # of nine that the window allows


def test_the_limit_of_descriptors_is_raised() -> None:
    """A machine of 200 cores needs 600 for its workers, and may allow 256."""
    script = (
        "import resource\n"
        "from dataset_tools.conversion.workers import WorkerPool\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 500))\n"
        "with WorkerPool(lambda task: (task, []), 20) as pool:\n"
        "    assert [done.task for done in pool.map(range(40)) if done is not None] == list(range(40))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("(500, 500)\n", 0), done.stderr


def test_workers_end_with_their_parent() -> None:
    """Killed while workers are in the middle of a task of minutes."""
    script = (
        "import os, signal, time\n"
        "from dataset_tools.conversion.workers import WorkerPool\n"
        "with WorkerPool(lambda task: (time.sleep(600), []), 3) as pool:\n"
        "    for number, _ in enumerate(pool.map(range(9))):\n"
        "        if number == 1:\n"
        "            path = f'/proc/{os.getpid()}/task/{os.getpid()}/children'\n"
        "            print(open(path).read(), flush=True)\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pids = done.stdout.split()
    assert len(pids) == 3
    end = time.monotonic() + 60
    while alive := [pid for pid in pids if os.path.exists(f"/proc/{pid}") and not _is_zombie(pid)]:
        assert time.monotonic() < end, f"still alive: {alive}"
        time.sleep(0.05)


def _is_zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
