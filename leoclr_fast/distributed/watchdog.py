"""Ends a run in which a rank is dead or hangs: every rank that is left says which one, and is gone within seconds.

Each rank has two threads beside its training. The courier tells the store of the process group once a second that the
rank lives, and reads: the first rank what all others tell, the others what the first one tells. Two or three requests a
second and rank are all it takes, and none of them is a collective. The judge looks at the clock and at what the courier
has heard, never waits for anything, and ends the process, whatever its main thread is stuck in.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from dataset_tools.stop_signals import StoppedBySignalError
from leoclr_fast.distributed.heartbeat import Heartbeat, Pulse, in_collective, place_of_thread
from leoclr_fast.distributed.process_group import Rendezvous
from leoclr_fast.distributed.side_group import OTHER_RANK_EXIT_CODE, OtherRankError, describe

log = logging.getLogger(__name__)

_BEAT_S, _JUDGE_S = 1.0, 0.25
_OVERDUE_FACTOR = 10
_ASLEEP_S = 5.0
_LAST_WORDS_S = 3.0
_EXIT_GRACE_S = 5.0
_LAST_RESORT_S = 20
_CHECKPOINT_S = 20.0  # less than torchrun waits for a rank after SIGTERM
_VERDICT, _FAILURE = "verdict", "failure"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogLimits:
    """When a rank is given up."""

    silence_s: float
    """Without a sign of life from its process."""
    step_s: float
    """Without progress in a step: at least so long, and ten times the longest step so far."""
    phase_s: float
    """Without progress in a phase that announced itself."""


class Watchdog:
    """Of this rank. With one rank it does nothing."""

    def __init__(
        self,
        rendezvous: Rendezvous | None,
        limits: WatchdogLimits,
        *,
        last_words: Callable[[str], None] = lambda _: None,
        finish_writing: Callable[[float], None] = lambda _: None,
        advice: str = "",
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        """last_words: gets the line that is said before the process is ended from outside its main thread.
        finish_writing: waits for what must not be cut off, at most so many seconds. advice: follows the line.
        """
        self._finish_writing = finish_writing
        self._advice = advice
        self._limits = limits
        self._last_words = last_words
        self._end_process = end_process
        self._main_thread = threading.get_ident()
        self._lock = threading.Lock()
        self._step, self._phase, self._limit_s = 0, "start", limits.phase_s
        self._since_s = time.monotonic()
        self._longest_step_s = 0.0
        self._rendezvous = rendezvous if rendezvous is not None and rendezvous.world_size > 1 else None
        self._closed = threading.Event()
        self._heard_store_s = time.monotonic()
        self._number = 0
        self._verdict = self._failure = ""
        self._failure_heard_s = 0.0
        if self._rendezvous is None:
            return
        self._rank = self._rendezvous.rank
        watched = range(self._rendezvous.world_size) if self._rank == 0 else (0,)
        self._pulses = {rank: Pulse() for rank in watched}
        self._store = self._rendezvous.another_connection(limits.silence_s)
        if self._rank == 0:
            self._store.set(_VERDICT, "")
            self._store.compare_set(_FAILURE, "", "")
        self._beat()
        for work in (self._carry, self._judge):
            threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True).start()

    def progress(self, step: int) -> None:
        """The main thread has finished `step` steps."""
        with self._lock:
            now_s = time.monotonic()
            self._step = step
            self._longest_step_s = max(self._longest_step_s, now_s - self._since_s)
            self._since_s = now_s

    @contextmanager
    def phase(self, name: str, limit_s: float | None = None) -> Iterator[None]:
        """What the main thread does in here may take longer than a step. limit_s: that of all phases if not given."""
        before = self._phase, self._limit_s
        self._enter(name, self._limits.phase_s if limit_s is None else limit_s)
        try:
            yield
        finally:
            self._enter(*before)

    @contextmanager
    def first_steps(self, *, typical: bool) -> Iterator[None]:
        """One of the first steps of this process may take its time. typical: the following ones take as long."""
        start_s = time.monotonic()
        with self.phase("the first steps"):
            yield
        if typical:
            with self._lock:
                self._longest_step_s = max(self._longest_step_s, time.monotonic() - start_s)

    def end_steps(self) -> None:
        """From here on, what is left to do may take its time."""
        self._enter("the end of the run", self._limits.phase_s)

    def start_steps(self, step: int) -> None:
        """From here on, with `step` finished steps, the limit is that of a step."""
        with self._lock:
            self._step = step
        self._enter("training", 0.0)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """If this rank fails in here, the others hear why; if it fails since another one did, it says what that one's
        reason was.

        Raises OtherRankError instead of what torch says when another rank is gone.
        """
        try:
            yield
        except OtherRankError:
            raise
        except BaseException as error:
            if not is_lost_connection(error):
                if not isinstance(error, StoppedBySignalError):  # then all ranks end by themselves
                    self._fail(error)
                raise
            cause = self._first_cause()
            self._fail(error)
            raise OtherRankError(cause or f"the connection to other ranks broke: {describe(error)}") from error

    def _fail(self, error: BaseException) -> None:
        """Tell the other ranks why this one ends, unless another one has told them before."""
        if self._rendezvous is None:
            return
        beat = self._state()
        text = (
            f"rank {self._rank} on {beat.host} (process {beat.process}) failed at step {beat.step}: {describe(error)}"
        )
        try:
            self._store.compare_set(_FAILURE, "", text)
        except RuntimeError:
            log.debug("the store is gone, nobody can be told")

    def _first_cause(self) -> str | None:
        """Why other ranks are gone, from themselves or from their silence; waits a few seconds for it."""
        if self._rendezvous is None:
            return None
        keys = [f"beat/{rank}" for rank in range(self._rendezvous.world_size)]
        try:
            before = self._store.multi_get(keys)
            deadline = time.monotonic() + _LAST_WORDS_S
            while time.monotonic() < deadline:
                failure = self._store.get(_FAILURE).decode()
                if failure:
                    return failure
                time.sleep(0.1)
            after = self._store.multi_get(keys)
        except RuntimeError:
            return f"the store of the run at {self._rendezvous.address}:{self._rendezvous.port} is gone"
        silent = [rank for rank, (old, new) in enumerate(zip(before, after, strict=True)) if old == new]
        if not silent:
            return None
        told = "; ".join(Heartbeat.decode(after[rank]).told(rank) for rank in silent[:4])
        return f"lost {told}: no sign of life for {_LAST_WORDS_S:g} s"

    def close(self, *, failed: bool = False) -> None:
        """Watch no longer. failed: the process is ended by force if it has not ended by itself soon."""
        self._closed.set()
        if failed and self._rendezvous is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_LAST_RESORT_S)

    def _enter(self, phase: str, limit_s: float) -> None:
        with self._lock:
            self._phase, self._limit_s, self._since_s = phase, limit_s, time.monotonic()

    def _state(self) -> Heartbeat:
        with self._lock:
            step, phase, limit_s, since_s = self._step, self._phase, self._limit_s, self._since_s
            longest_s = self._longest_step_s
        limit_s = limit_s or max(self._limits.step_s, _OVERDUE_FACTOR * longest_s)
        busy_s = time.monotonic() - since_s
        place, waits = place_of_thread(self._main_thread) if busy_s > min(0.5 * limit_s, 10.0) else ("", False)
        overdue_s = busy_s if busy_s > limit_s else 0.0
        return Heartbeat(number=self._number, step=step, phase=phase, overdue_s=overdue_s, waits=waits, place=place)

    # ---- the courier ----------------------------------------------------------------------------------------

    def _beat(self) -> None:
        self._number += 1
        self._store.set(f"beat/{self._rank}", self._state().encode())

    def _carry(self) -> None:
        others = [f"beat/{rank}" for rank in self._pulses]
        while not self._closed.wait(_BEAT_S):
            try:
                self._beat()
                verdict, failure, *beats = self._store.multi_get([_VERDICT, _FAILURE, *others])
            except RuntimeError:
                continue  # the judge notices that nothing is heard
            for pulse, beat in zip(self._pulses.values(), beats, strict=True):
                pulse.hear(Heartbeat.decode(beat))
            if failure and not self._failure:
                self._failure, self._failure_heard_s = failure.decode(), time.monotonic()
            self._verdict = verdict.decode()
            self._heard_store_s = time.monotonic()

    # ---- the judge ------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        last_s = time.monotonic()
        while not self._closed.wait(_JUDGE_S):
            now_s = time.monotonic()
            if now_s - last_s > _ASLEEP_S:
                self._forgive(now_s - last_s)  # this process slept itself
            last_s = now_s
            sentence = self._sentence()
            if sentence and not self._closed.is_set():
                self._end(sentence)

    def _forgive(self, slept_s: float) -> None:
        now_s = time.monotonic()  # what the other threads have noted since waking needs no forgiveness
        with self._lock:
            self._since_s = min(now_s, self._since_s + slept_s)
        self._heard_store_s = min(now_s, self._heard_store_s + slept_s)
        for pulse in self._pulses.values():
            pulse.heard_s = min(now_s, pulse.heard_s + slept_s)

    @property
    def _store_silent_s(self) -> float:
        return time.monotonic() - self._heard_store_s

    def _silent_s(self, pulse: Pulse) -> float:
        """How long a rank had told nothing new when the store last answered: after that nobody could be heard."""
        store_silent_s = self._store_silent_s  # first: the courier notes an answer after the pulses that it held
        return pulse.silent_s - store_silent_s

    def _hosts_silent_store(self, rank: int) -> bool:
        assert self._rendezvous is not None
        return rank == 0 and not self._rendezvous.has_host and self._store_silent_s > self._limits.silence_s

    def _sentence(self) -> str:
        """Why this process must end now; empty if it need not."""
        assert self._rendezvous is not None
        now_s, limit_s = time.monotonic(), self._limits.silence_s
        if self._verdict:
            return self._verdict
        if self._failure and now_s - self._failure_heard_s > _EXIT_GRACE_S:
            return self._failure
        store_silent_s = self._store_silent_s
        if store_silent_s > limit_s:
            return (
                f"the store of the run at {self._rendezvous.address}:{self._rendezvous.port} has not answered for "
                f"{store_silent_s:.0f} s: its host is down or cut off"
            )
        for rank, pulse in self._pulses.items():
            silent_s = self._silent_s(pulse)
            if rank != self._rank and silent_s > limit_s and pulse.beat is not None:
                return f"{pulse.beat.told(rank)}: no sign of life for {silent_s:.0f} s"
        return self._overdue() if self._rank == 0 else ""

    def _overdue(self) -> str:
        """The first rank's verdict on ranks that live and make no progress."""
        beats = {rank: pulse.beat for rank, pulse in self._pulses.items() if pulse.beat is not None}
        overdue = {rank: beat for rank, beat in beats.items() if beat.overdue_s}
        guilty = {rank: beat for rank, beat in overdue.items() if not beat.waits}
        if not guilty and overdue and len(overdue) == len(beats):  # all wait for each other
            first = min(beat.step for beat in overdue.values())
            guilty = {rank: beat for rank, beat in overdue.items() if beat.step == first}
        if not guilty:
            return ""
        told = "; ".join(beat.told(rank) for rank, beat in list(guilty.items())[:4])
        more = f" and {len(guilty) - 4} more" if len(guilty) > 4 else ""
        return f"{told}{more}: no progress for {max(beat.overdue_s for beat in guilty.values()):.0f} s"

    def _kill_silent_siblings(self) -> None:
        """A stopped process of this host would outlive SIGTERM, and torchrun would wait for it."""
        for rank, pulse in self._pulses.items():
            beat = pulse.beat
            if rank == self._rank or beat is None:
                continue
            if self._silent_s(pulse) <= self._limits.silence_s and not self._hosts_silent_store(rank):
                continue
            if beat.host == socket.gethostname() and _parent_of(beat.process) == os.getppid():
                with suppress(OSError):
                    os.kill(beat.process, signal.SIGKILL)

    def _end(self, sentence: str) -> None:
        own = self._rank
        words = threading.Thread(target=self._say, args=(sentence,), daemon=True)
        words.start()
        words.join(_LAST_WORDS_S)
        self._finish_writing(_CHECKPOINT_S)
        self._kill_silent_siblings()
        if own == 0:
            time.sleep(_LAST_WORDS_S)  # the others read the verdict before this end confuses them
        self._end_process(OTHER_RANK_EXIT_CODE)

    def _say(self, sentence: str) -> None:
        line = f"{sentence}. This process ends; the same command continues from the last checkpoint. {self._advice}"
        line = line.rstrip()
        print(f"error: rank {self._rank}: {line}", file=sys.stderr, flush=True)
        if self._rank == 0:
            with suppress(RuntimeError):  # the store may be what is gone
                self._store.set(_VERDICT, sentence)
        self._last_words(sentence)


@contextmanager
def watched(
    rendezvous: Rendezvous | None,
    limits: WatchdogLimits,
    *,
    last_words: Callable[[str], None] = lambda _: None,
    finish_writing: Callable[[float], None] = lambda _: None,
    advice: str = "",
) -> Iterator[Watchdog]:
    """A watchdog that watches while this is open. See `Watchdog` for the arguments, `Watchdog.explained` for errors."""
    watchdog = Watchdog(rendezvous, limits, last_words=last_words, finish_writing=finish_writing, advice=advice)
    try:
        with watchdog.explained():
            yield watchdog
    except BaseException as error:
        watchdog.close(failed=True)
        if rendezvous is not None and isinstance(error, StoppedBySignalError):
            # torchrun sends it to all as soon as one has left; the exit code shall tell of an orderly end.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    watchdog.close()


def _parent_of(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def is_lost_connection(error: BaseException) -> bool:
    """Whether torch raised it in a collective: another rank is gone, or the network."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return in_collective(traceback.extract_tb(error.__traceback__)) or "gloo" in str(error) or "NCCL" in str(error)
