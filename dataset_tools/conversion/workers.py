"""Processes that do tasks in order, of which any may die at any time.

`concurrent.futures.ProcessPoolExecutor` would be shorter, but is not enough: a worker that dies breaks the whole pool,
which tells neither the task nor the signal, a worker that hangs is waited for without end, and every result passes
through a second thread and a pickle: 3.9 s to read, hash and hand on 4,000 JPEGs (420 MB), where this pool took 1.6 s
(two cores, medians of five rounds in turn).
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import socket
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import numpy as np

from dataset_tools.files import allow_open_files, write_pieces
from dataset_tools.stop_signals import HANDLED

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

TICK_S = 0.25
STALL_S = 300.0
"""A worker that has not answered for this long is killed."""
TASKS_AT_HAND = 2
"""A worker has the next task when it is done with one."""
TASKS_AHEAD = 4
"""More tasks than this for each worker are not begun before the first one in order is done."""
PARENT_EVERY_S = 1.0
HELD_BYTES = 1 << 30
"""With more bytes of payloads that wait, only the first task in order is handed out."""
KILLED_WAIT_S = 5.0
"""How long a killed worker is waited for: one that hangs in the system's own code does not die."""
NOTHING = memoryview(b"")
ANSWER_S = 30
"""A worker that stands still for this long in the midst of an answer is taken for dead."""
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
"""Signals by which code that a damaged image led astray dies. Others come from outside."""


def settled_workers(workers: int | None) -> int:
    """`workers`, or the cores that this process may use. Raises ValueError for less than one."""
    if workers is None:
        return len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"--workers {workers} is not allowed: give at least 1")
    return workers


class WorkerDiedError(RuntimeError):
    """A worker died twice on the same task, and not by the task's own fault."""


Work = Callable[[T], tuple[R, list[bytes]]]
"""Does a task, in a worker; returns a result, which is pickled, and a payload, which is not."""


@dataclass(slots=True, eq=False)
class Task(Generic[T, R]):
    """A task, and once it is done its result, and its payload: the bytes that came with the result."""

    task: T
    deaths: int = 0
    stalled: bool = False
    done: bool = False
    result: R = None  # type: ignore[assignment]
    payload: memoryview = NOTHING


@dataclass(slots=True, eq=False)
class _Worker(Generic[T, R]):
    process: BaseProcess
    connection: Connection
    tasks: deque[Task[T, R]] = field(default_factory=deque)
    """The tasks that it was given and has not answered, in order: it does the first one."""
    since: float = field(default_factory=time.monotonic)
    """When it began, at the latest, with that one."""


class WorkerPool(Generic[T, R]):
    """Does tasks on `num_workers` forked processes and hands the results out in the order of the tasks.

    A worker that dies is noticed at once: its task is cut in `pieces`, which are done again, once, with a warning. If
    one dies again, `crashed(task, reason)` says what becomes of the task where a crash of its own killed the worker;
    else WorkerDiedError is raised. What `work` raises is raised again, an OSError as it is, others as RuntimeError. A
    worker closes the `descriptors` that it inherits, such as that of a lock.
    """

    def __init__(
        self,
        work: Work[T, R],
        num_workers: int,
        *,
        pieces: Callable[[T], list[T]] = lambda task: [task],
        crashed: Callable[[T, str], R] | None = None,
        describe: Callable[[T], str] = str,
        descriptors: tuple[int, ...] = (),
        stall_s: float = STALL_S,
    ) -> None:
        self._work, self._pieces, self._crashed, self._describe = work, pieces, crashed, describe
        self._descriptors, self._stall_s = descriptors, stall_s
        self._context = multiprocessing.get_context("fork")
        self._order: deque[Task[T, R]] = deque()
        self._waiting: deque[Task[T, R]] = deque()
        self._workers: list[_Worker[T, R]] = []
        self._num_workers = num_workers
        self.restarts = 0
        """How many workers died and were replaced."""

    def map(self, tasks: Iterable[T]) -> Iterator[Task[T, R] | None]:
        """Each task once it is done, in order. None at least every quarter of a second, for clock and signals."""
        source = iter(tasks)
        exhausted = False
        while True:
            while not exhausted and len(self._order) <= TASKS_AHEAD * self._num_workers and not self._holds_much():
                try:
                    task: Task[T, R] = Task(next(source))
                except StopIteration:
                    exhausted = True
                else:
                    self._order.append(task)
                    self._waiting.append(task)
            if not self._order:
                return
            self._hand_out()
            self._collect(0.0 if self._order[0].done else TICK_S)
            if not self._order[0].done:
                yield None
            while self._order and self._order[0].done:
                yield self._order.popleft()
                self._hand_out()
                self._collect(0.0)

    def _hand_out(self) -> None:
        while len(self._workers) < min(self._num_workers, len(self._order)):
            self._workers.append(self._start())
        for at_hand in range(1, TASKS_AT_HAND + 1):
            for worker in self._workers:
                if len(worker.tasks) < at_hand and self._waiting:
                    if self._holds_much() and self._waiting[0] is not self._order[0]:
                        return
                    self._give(worker, self._waiting.popleft())

    def _holds_much(self) -> bool:
        return sum(len(task.payload) for task in self._order) > HELD_BYTES

    def _give(self, worker: _Worker[T, R], task: Task[T, R]) -> None:
        if not worker.tasks:
            worker.since = time.monotonic()
        worker.tasks.append(task)
        with suppress(OSError):  # it is dead, which _collect will see
            worker.connection.send(task.task)

    def _collect(self, timeout: float) -> None:
        """Takes in what workers have sent, and replaces those that died or stand still."""
        ready = wait([worker.connection for worker in self._workers], timeout)
        for worker in [worker for worker in self._workers if worker.connection in ready]:
            try:
                result, error, num_bytes = worker.connection.recv()
                payload = _read(worker.connection.fileno(), num_bytes)
            except (EOFError, OSError):
                self._replace(worker)
            else:
                self._finish(worker, result, error, payload)
        for worker in list(self._workers):
            if worker.tasks and time.monotonic() - worker.since > self._stall_s:
                logger.warning("worker %d has not answered for %.0f s and is killed", worker.process.pid, self._stall_s)
                worker.tasks[0].stalled = True
                self._replace(worker)

    def _finish(self, worker: _Worker[T, R], result: R, error: OSError | str, payload: memoryview) -> None:
        """Raises what the work raised: OSError as it was, others as RuntimeError."""
        task = worker.tasks.popleft()
        worker.since = time.monotonic()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{self._describe(task.task)}: {error.strerror}")
        if error:
            raise RuntimeError(f"{self._describe(task.task)}: {error}")
        task.result, task.payload, task.done = result, payload, True

    def _replace(self, worker: _Worker[T, R]) -> None:
        """The worker is dead, or is killed now: its task is done again by others, or given up."""
        worker.process.kill()
        worker.process.join(KILLED_WAIT_S)
        worker.connection.close()
        self._workers.remove(worker)
        self.restarts += 1
        code, task = worker.process.exitcode, worker.tasks.popleft() if worker.tasks else None
        self._waiting.extendleft(reversed(worker.tasks))
        number = -code if code is not None and code < 0 else 0
        how = f"was killed by {signal.Signals(number).name}" if number else f"ended with exit code {code}"
        if task is None:
            logger.warning("worker %d %s; another one takes its place", worker.process.pid, how)
            return
        what = self._describe(task.task)
        if not task.deaths:
            logger.warning("worker %d %s at %s; they are done again", worker.process.pid, how, what)
            pieces = [Task[T, R](piece, deaths=1) for piece in self._pieces(task.task)]
            place = self._order.index(task)
            self._order.remove(task)
            for piece in reversed(pieces):
                self._order.insert(place, piece)
            self._waiting.extendleft(reversed(pieces))
        elif (number in CRASHES or task.stalled) and self._crashed:
            why = f"took more than {self._stall_s:.0f} s" if task.stalled else f"killed the worker twice ({how[4:]})"
            task.result, task.done = self._crashed(task.task, f"decoding it {why}"), True
        else:
            raise WorkerDiedError(
                f"a worker {how} at {what}, and so did another one that did the same again. If the machine is "
                "short of memory, use fewer --workers; the same command continues"
            )

    def _start(self) -> _Worker[T, R]:
        allow_open_files()  # three for each worker
        ours, theirs = self._context.Pipe()
        with socket.socket(fileno=os.dup(ours.fileno())) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", ANSWER_S, 0))
        arguments = self._work, theirs, self._descriptors, os.getpid()
        process = self._context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def close(self) -> None:
        """End the workers at once."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(KILLED_WAIT_S)
            worker.connection.close()
        self._workers.clear()

    def __enter__(self) -> WorkerPool[T, R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(descriptor: int, num_bytes: int) -> memoryview:
    """So many bytes, copied once, where `Connection.recv_bytes` copies them three times. Raises EOFError, OSError."""
    payload = np.empty(num_bytes, dtype=np.uint8).data  # bytearray would fill it with zeros first
    done = 0
    while done < num_bytes:
        if not (more := os.readv(descriptor, [payload[done:]])):
            raise EOFError
        done += more
    return payload


def _serve(work: Work[Any, Any], connection: Connection, descriptors: tuple[int, ...], parent: int) -> None:
    """A worker does this until its parent is gone."""
    for stop_signal in HANDLED:  # they may reach the whole group; the parent decides
        signal.signal(stop_signal, signal.SIG_IGN)
    for descriptor in descriptors:
        os.close(descriptor)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        while True:
            task = connection.recv()
            result, payload = None, list[bytes]()
            error: OSError | str = ""
            try:
                result, payload = work(task)
            except MemoryError:
                error = OSError(errno.ENOMEM, "there is not enough memory; use fewer --workers")
            except OSError as failure:  # of the machine, and in words of its own
                error = OSError(failure.errno, failure.strerror or str(failure))
            except Exception:
                error = traceback.format_exc()
            connection.send((result, error, sum(map(len, payload))))
            write_pieces(connection.fileno(), payload)
    except (EOFError, OSError):  # the parent is gone
        os._exit(0)


def _end_with(parent: int) -> None:
    """End this worker in the midst of a task once nobody waits for it."""
    while os.getppid() == parent:
        time.sleep(PARENT_EVERY_S)
    os._exit(0)
