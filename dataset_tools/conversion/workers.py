"""Processes that do tasks in order, of which any may die at any time."""

from __future__ import annotations

import errno
import logging
import mmap
import multiprocessing
import os
import resource
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Generic, TypeVar

from dataset_tools.file_io import write_pieces

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

TICK_S = 0.25
STALL_S = 300.0
"""A worker that has not answered for this long is killed."""
TASKS_AT_HAND = 2
"""A worker has the next task when it is done with one."""
TASKS_AHEAD = 4
"""For each worker: more are not begun before the first one in order is done."""
SPARE_DESCRIPTORS = 256
"""For everything that is open beside pipes and payloads, and for the pieces of a task that is done again."""
PARENT_EVERY_S = 1.0
HELD_BYTES = 1 << 30
"""Of payloads whose turn has not come: with more, only the task whose turn it is is handed out."""
BURIAL_S = 5.0
"""How long a killed worker is waited for: one that hangs in the system's own code does not die."""
ANSWER_S = 30.0
"""Between the two messages of an answer."""
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
"""Signals by which code that a damaged image led astray dies. Others come from outside."""


def settled_workers(workers: int | None) -> int:
    """`workers`, or the cores that this process may use. Raises ValueError for less than one."""
    if workers is None:
        return len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"--workers {workers} is not allowed: give at least 1")
    return workers


class _WorkerGoneError(Exception):
    """The worker is dead, or about to be."""


class WorkerDiedError(RuntimeError):
    """A worker died twice on the same task, and not by the task's own fault."""


@dataclass(frozen=True, slots=True)
class Done(Generic[T, R]):
    """A task that is done."""

    task: T
    result: R
    payload: memoryview
    """Bytes that came with the result; they are gone when the next task is asked for."""


Work = Callable[[T], tuple[R, list[bytes]]]
"""Does a task, in a worker; returns a result, which is pickled, and a payload, which is not."""


@dataclass(slots=True, eq=False)
class _Job(Generic[T, R]):
    task: T
    deaths: int = 0
    stalled: bool = False
    done: bool = False
    result: R | None = None
    payload: int | None = None  # a descriptor of shared memory
    payload_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Worker(Generic[T, R]):
    process: BaseProcess
    connection: Connection
    jobs: deque[_Job[T, R]] = field(default_factory=deque)
    """What it was given and has not answered, in order: it is at the first one."""
    since: float = field(default_factory=time.monotonic)
    """When it began, at the latest, with that one."""


class WorkerPool(Generic[T, R]):
    """Does tasks on `num_workers` forked processes and hands the results out in the order of the tasks.

    A worker that dies is noticed at once: its task is cut in `pieces`, which are done again, once, and a warning
    tells. If one dies again, `crashed(task, reason)` says what becomes of the task where a crash of its own killed the
    worker; else WorkerDiedError is raised. What `work` raises is raised again, an OSError as it is, others as
    RuntimeError. `descriptors` are the file descriptors that a worker must not keep open.
    """

    def __init__(
        self,
        work: Work[T, R],
        num_workers: int,
        *,
        pieces: Callable[[T], list[T]] = lambda task: [task],
        crashed: Callable[[T, str], R] | None = None,
        describe: Callable[[T], str] = str,
        descriptors: Callable[[], list[int]] = list,
        stall_s: float = STALL_S,
    ) -> None:
        self._work, self._pieces, self._crashed, self._describe = work, pieces, crashed, describe
        self._descriptors, self._stall_s = descriptors, stall_s
        self._context = multiprocessing.get_context("fork")
        self._order: deque[_Job[T, R]] = deque()
        self._waiting: deque[_Job[T, R]] = deque()
        self._workers: list[_Worker[T, R]] = []
        self._num_workers = num_workers
        self.restarts = 0
        """How many workers died and were replaced."""

    def map(self, tasks: Iterable[T]) -> Iterator[Done[T, R] | None]:
        """Each task once, in order. None at least every quarter of a second, to look at the clock and at signals."""
        source = iter(tasks)
        exhausted = False
        window = _room_for_payloads(TASKS_AHEAD * self._num_workers + 1, self._num_workers)
        while True:
            while not exhausted and len(self._order) < window and not (self._order and self._holds_much()):
                try:
                    job: _Job[T, R] = _Job(next(source))
                except StopIteration:
                    exhausted = True
                else:
                    self._order.append(job)
                    self._waiting.append(job)
            if not self._order:
                return
            self._hand_out()
            self._collect(0.0 if self._order[0].done else TICK_S)
            if not self._order[0].done:
                yield None
            while self._order and self._order[0].done:
                self._hand_out()  # before the payload leaves the order, so that no new worker inherits it
                job = self._order.popleft()
                with _payload(job) as view:
                    yield Done(job.task, job.result, view)  # type: ignore[arg-type]
                self._collect(0.0)

    def _hand_out(self) -> None:
        while len(self._workers) < self._num_workers and len(self._workers) < len(self._order):
            self._workers.append(self._start())
        for at_hand in range(1, TASKS_AT_HAND + 1):
            for worker in self._workers:
                if len(worker.jobs) < at_hand and self._waiting:
                    if self._holds_much() and self._waiting[0] is not self._order[0]:
                        return
                    self._give(worker, self._waiting.popleft())

    def _holds_much(self) -> bool:
        return sum(job.payload_bytes for job in self._order if job.done) > HELD_BYTES

    def _give(self, worker: _Worker[T, R], job: _Job[T, R]) -> None:
        if not worker.jobs:
            worker.since = time.monotonic()
        worker.jobs.append(job)
        with suppress(OSError):  # it is dead, which _collect will see
            worker.connection.send(job.task)

    def _collect(self, timeout: float) -> None:
        """Takes in what workers have sent, and replaces those that died or stand still."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for ready in wait(list(by_connection), timeout):
            worker = by_connection[ready]  # type: ignore[index]
            try:
                self._receive(worker)
            except _WorkerGoneError:
                self._bury(worker)
        for worker in list(self._workers):
            if worker.jobs and time.monotonic() - worker.since > self._stall_s:
                logger.warning("worker %d has not answered for %.0f s and is killed", worker.process.pid, self._stall_s)
                worker.process.kill()
                worker.jobs[0].stalled = True
                self._bury(worker)

    def _receive(self, worker: _Worker[T, R]) -> None:
        """One answer. Raises _WorkerGoneError, or what the work raised: OSError as it was, others as RuntimeError."""
        try:
            result, error, payload_bytes = worker.connection.recv()
            descriptor = None
            if payload_bytes:
                if not worker.connection.poll(ANSWER_S):
                    worker.process.kill()
                    raise EOFError
                descriptor = recv_handle(worker.connection)
        except (EOFError, OSError) as gone:
            raise _WorkerGoneError from gone
        job = worker.jobs.popleft()
        worker.since = time.monotonic()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{self._describe(job.task)}: {error.strerror}")
        if error:
            raise RuntimeError(f"{self._describe(job.task)}: {error}")
        job.result, job.payload, job.payload_bytes, job.done = result, descriptor, payload_bytes, True

    def _bury(self, worker: _Worker[T, R]) -> None:
        """The worker is dead, or about to be: its task is done again by others, or given up."""
        worker.process.join(BURIAL_S)
        self._workers.remove(worker)
        worker.connection.close()
        code, job = worker.process.exitcode, worker.jobs.popleft() if worker.jobs else None
        self._waiting.extendleft(reversed(worker.jobs))
        number = -code if code is not None and code < 0 else 0
        how = f"was killed by {signal.Signals(number).name}" if number else f"ended with exit code {code}"
        self.restarts += 1
        if job is None:
            logger.warning("worker %d %s; another one takes its place", worker.process.pid, how)
            return
        what = self._describe(job.task)
        if not job.deaths:
            logger.warning("worker %d %s at %s; they are done again", worker.process.pid, how, what)
            pieces = [_Job[T, R](piece, deaths=1) for piece in self._pieces(job.task)]
            place = self._order.index(job)
            self._order.rotate(-place)
            self._order.popleft()
            self._order.extendleft(reversed(pieces))
            self._order.rotate(place)
            self._waiting.extendleft(reversed(pieces))
        elif (number in CRASHES or job.stalled) and self._crashed:
            why = f"took more than {self._stall_s:.0f} s" if job.stalled else f"killed the worker twice ({how[4:]})"
            job.result, job.done = self._crashed(job.task, f"decoding it {why}"), True
        else:
            raise WorkerDiedError(
                f"a worker {how} at {what}, and so did another one that did the same again. If the machine is "
                "short of memory, use fewer --workers; the same command continues"
            )

    def _start(self) -> _Worker[T, R]:
        ours, theirs = self._context.Pipe()
        inherited = [worker.connection.fileno() for worker in self._workers]
        inherited += [ours.fileno(), *self._descriptors()]
        inherited += [job.payload for job in self._order if job.payload is not None]
        process = self._context.Process(target=_serve, args=(self._work, theirs, inherited, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def close(self) -> None:
        """End the workers at once."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(BURIAL_S)
            worker.connection.close()
        self._workers.clear()
        for job in self._order:
            if job.payload is not None:
                os.close(job.payload)
        self._order.clear()

    def __enter__(self) -> WorkerPool[T, R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _payload:  # noqa: N801 - used as a function
    """The shared memory that came with a result, mapped for as long as it is needed."""

    def __init__(self, job: _Job[Any, Any]) -> None:
        self._job = job
        self._map: mmap.mmap | None = None
        self._view = memoryview(b"")

    def __enter__(self) -> memoryview:
        if self._job.payload is not None:
            # All pages at once: a fault for each would cost as much as writing them to disk.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._map = mmap.mmap(self._job.payload, self._job.payload_bytes, flags=flags, prot=mmap.PROT_READ)
            self._view = memoryview(self._map)
        return self._view

    def __exit__(self, *_: object) -> None:
        self._view.release()
        if self._map is not None:
            with suppress(BufferError):
                self._map.close()
        if self._job.payload is not None:
            os.close(self._job.payload)
            self._job.payload = None


def _room_for_payloads(wanted: int, num_workers: int) -> int:
    """How many payloads may wait, each being a descriptor. Where more are `wanted`, the soft limit is raised."""
    others = SPARE_DESCRIPTORS + 3 * num_workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + others:
        soft = wanted + others if hard == resource.RLIM_INFINITY else min(wanted + others, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, min(wanted, soft - others))
    return wanted


def _serve(work: Work[Any, Any], connection: Connection, inherited: list[int], parent: int) -> None:
    """What a worker does until its task-giver is gone."""
    for stop_signal in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the task-giver decides
        signal.signal(stop_signal, signal.SIG_IGN)
    for descriptor in inherited:
        os.close(descriptor)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        while True:
            task = connection.recv()
            try:
                result, payload = work(task)
            except MemoryError:
                connection.send((None, OSError(errno.ENOMEM, "there is not enough memory; use fewer --workers"), 0))
                continue
            except OSError as error:  # of the machine, and in words of its own
                connection.send((None, OSError(error.errno, error.strerror or str(error)), 0))
                continue
            except Exception:
                connection.send((None, traceback.format_exc(), 0))
                continue
            _answer(connection, result, payload)
    except (EOFError, OSError):  # the task-giver is gone
        os._exit(0)


def _end_with(parent: int) -> None:
    """A task may take hours (a hash of 100 GB); nobody waits for it once the task-giver is gone."""
    while os.getppid() == parent:
        time.sleep(PARENT_EVERY_S)
    os._exit(0)


def _answer(connection: Connection, result: Any, payload: list[bytes]) -> None:
    payload_bytes = sum(map(len, payload))
    if not payload_bytes:
        connection.send((result, "", 0))
        return
    descriptor = os.memfd_create("leoclr-payload")
    try:
        write_pieces(descriptor, payload)
        connection.send((result, "", payload_bytes))
        send_handle(connection, descriptor, os.getppid())
    finally:
        os.close(descriptor)
