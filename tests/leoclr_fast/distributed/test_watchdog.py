"""Ranks that are silent, hang or are slow, and stores and masters that are not there. The ranks here are threads."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch.distributed as dist

from leoclr_fast.distributed import heartbeat, watchdog
from leoclr_fast.distributed.heartbeat import Heartbeat, Pulse
from leoclr_fast.distributed.process_group import JoinError, Rendezvous
from leoclr_fast.distributed.step_agreement import StepReport
from leoclr_fast.distributed.step_times import RankTimes
from leoclr_fast.distributed.watchdog import Watchdog, WatchdogLimits
from tests.leoclr_fast.held_port import held_port

LIMIT_S = 30.0


def rendezvous(rank: int, port: int, *, has_host: bool = True) -> Rendezvous:
    return Rendezvous(address="localhost", port=port, rank=rank, world_size=2, attempt=0, has_host=has_host)


Work = Callable[[Watchdog, threading.Event], None]
"""What the main thread of a rank does, until the event says that the test is over."""


class Rank:
    """A rank whose main thread is a thread, and which notes its end instead of ending the process."""

    def __init__(self, rank: int, port: int, limits: WatchdogLimits, work: Work, over: threading.Event) -> None:
        self.sentence = ""
        self.code: int | None = None
        self.ended = threading.Event()
        self.watchdog: Watchdog | None = None
        made = threading.Event()

        def main() -> None:
            self.watchdog = Watchdog(
                rendezvous(rank, port), limits, last_words=self._last_words, end_process=self._end_process
            )
            made.set()
            work(self.watchdog, over)

        self._main = threading.Thread(target=main, daemon=True)
        self._main.start()
        assert made.wait(LIMIT_S)

    def _last_words(self, sentence: str) -> None:
        self.sentence = sentence

    def _end_process(self, code: int) -> None:
        assert self.watchdog is not None
        self.code = code
        self.watchdog.close()
        self.ended.set()

    def close(self) -> None:
        """Once the test is over: no thread and no connection is left."""
        assert self.watchdog is not None
        self.watchdog.close()
        self._main.join(LIMIT_S)
        assert not self._main.is_alive()
        self.watchdog = None


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Processes that would have been, and by what: it would be this one."""
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append((process, number)))
    return killed


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a store that lives as long as the test; the watchdogs look ten times as often as usual."""
    monkeypatch.setattr(watchdog, "_BEAT_S", 0.1)
    monkeypatch.setattr(watchdog, "_LAST_WORDS_S", 0.5)
    store = opened_store()
    yield store.port
    del store


def opened_store() -> dist.TCPStore:
    return dist.TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False)


def watchdogs_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("watchdog _")]


def join_watchdogs() -> None:
    for thread in watchdogs_threads():
        thread.join(LIMIT_S)
    assert watchdogs_threads() == []


@contextmanager
def two_ranks(port: int, limits: WatchdogLimits, first: Work, second: Work) -> Iterator[list[Rank]]:
    over, ranks = threading.Event(), list[Rank]()
    try:
        for rank, work in enumerate((first, second)):
            ranks.append(Rank(rank, port, limits, work, over))
        yield ranks
    finally:
        over.set()
        for made in ranks:
            made.close()
        join_watchdogs()


def trains(own: Watchdog, over: threading.Event) -> None:
    own.start_steps(0)
    step = 0
    while not over.wait(0.05):
        step += 1
        own.progress(step)


def stands_by(own: Watchdog, over: threading.Event) -> None:
    """Never overdue, however slow the machine is."""
    with own.phase("a test", 10 * LIMIT_S):
        over.wait()


def hangs_after_three_steps(own: Watchdog, over: threading.Event) -> None:
    own.start_steps(3)
    over.wait()


def limits(**given: float) -> WatchdogLimits:
    return WatchdogLimits(**{"silence_s": 20.0, "step_s": 20.0, "phase_s": 20.0} | given)


def test_a_rank_that_hangs_is_named_by_all(port: int) -> None:
    with two_ranks(port, limits(step_s=1.0), stands_by, hangs_after_three_steps) as ranks:
        for rank in ranks:
            assert rank.ended.wait(LIMIT_S)
            assert rank.code == 75
            assert rank.sentence.startswith(f"rank 1 on {socket.gethostname()} (process ")
            assert "last step 3, in training" in rank.sentence
            assert "no progress for" in rank.sentence


def test_a_phase_may_take_longer_than_a_step(port: int) -> None:
    evaluated = threading.Event()

    def evaluates(own: Watchdog, over: threading.Event) -> None:
        own.start_steps(0)
        with own.phase("evaluation"):
            over.wait(3.0)
            evaluated.set()
            stands_by(own, over)

    with two_ranks(port, limits(step_s=1.0), stands_by, evaluates) as ranks:
        assert evaluated.wait(LIMIT_S)
        assert not ranks[0].ended.wait(0.5)


def test_a_phase_has_a_limit_too(port: int) -> None:
    def evaluates(own: Watchdog, over: threading.Event) -> None:
        own.start_steps(0)
        with own.phase("evaluation"):
            over.wait()

    with two_ranks(port, limits(phase_s=2.5), stands_by, evaluates) as ranks:
        assert ranks[0].ended.wait(LIMIT_S)
        assert "last step 0, in evaluation" in ranks[0].sentence


def test_slow_steps_are_known_from_the_second_one(port: int) -> None:
    """The first one compiles; ten times the second one is what the others may take."""
    done = threading.Event()

    def trains_slowly(own: Watchdog, over: threading.Event) -> None:
        own.start_steps(0)
        with own.first_steps(typical=False):
            over.wait(1.0)
        own.progress(1)
        with own.first_steps(typical=True):
            over.wait(0.5)
        own.progress(2)
        over.wait(2.0)
        own.end_steps()
        done.set()
        over.wait()

    with two_ranks(port, limits(step_s=0.6), stands_by, trains_slowly) as ranks:
        assert done.wait(LIMIT_S)
        assert not ranks[0].ended.wait(0.5)


def test_what_is_being_written_is_waited_for(port: int) -> None:
    waited: list[float] = []
    hanging = rendezvous(0, port), limits(step_s=0.5, silence_s=2.0)
    ended = threading.Event()

    def end_process(_code: int) -> None:
        own.close()
        ended.set()

    own = Watchdog(*hanging, finish_writing=waited.append, advice="Advice.", end_process=end_process)
    own.start_steps(7)
    assert ended.wait(LIMIT_S)
    join_watchdogs()
    assert waited == [watchdog._CHECKPOINT_S]


def test_a_rank_that_is_silent(port: int, killed: list[tuple[int, int]]) -> None:
    """Its process is killed where it is a sibling: one that is stopped would outlive torchrun's SIGTERM."""

    def falls_silent(own: Watchdog, over: threading.Event) -> None:
        own.close()  # no more signs of life, as of a process that is stopped

    with two_ranks(port, limits(silence_s=2.0), trains, falls_silent) as ranks:
        assert ranks[0].ended.wait(LIMIT_S)
        assert ranks[0].code == 75
        assert ranks[0].sentence.startswith(f"rank 1 on {socket.gethostname()} (process ")
        assert re.search(r"no sign of life for \d+ s", ranks[0].sentence)
        assert killed == [(os.getpid(), signal.SIGKILL)]


def test_nobody_is_given_up_while_all_train(port: int) -> None:
    with two_ranks(port, limits(silence_s=4.0, step_s=4.0), trains, trains) as ranks:
        assert not ranks[0].ended.wait(5.0)
        assert not ranks[1].ended.is_set()


def test_a_store_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_BEAT_S", 0.1)
    monkeypatch.setattr(watchdog, "_LAST_WORDS_S", 0.5)
    store = opened_store()
    port = store.port
    with two_ranks(port, limits(silence_s=3.0), trains, trains) as ranks:
        deadline = time.monotonic() + LIMIT_S
        while not all(heard_all(rank) for rank in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        del store
        for rank in ranks:
            assert rank.ended.wait(LIMIT_S)
            assert rank.code == 75
            assert rank.sentence.startswith(f"the store of the run at localhost:{port} has not answered for ")


def heard_all(rank: Rank) -> bool:
    assert rank.watchdog is not None
    return all(pulse.beat is not None for pulse in rank.watchdog._pulses.values())


class TestSilence:
    """What is concluded from how long the store and another rank, of a live process of this host, were not heard."""

    @pytest.fixture
    def own(self, port: int) -> Callable[..., Watchdog]:
        def watchdog_of(rank: int, *, store_silent_s: float, other_silent_s: float, has_host: bool = True) -> Watchdog:
            # Given numbers are hundreds of seconds apart, so that those which the test itself takes do not count.
            watchdog = Watchdog(rendezvous(rank, port, has_host=has_host), limits(silence_s=1000.0))
            watchdog.close()
            join_watchdogs()
            other = watchdog._pulses[1 - rank]
            other.beat = Heartbeat(number=1, step=0, phase="start")
            now_s = time.monotonic()
            watchdog._heard_store_s, other.heard_s = now_s - store_silent_s, now_s - other_silent_s
            return watchdog

        return watchdog_of

    @pytest.mark.parametrize("rank", [0, 1])
    @pytest.mark.parametrize("store_silent_s", [300, 900])
    def test_a_rank_cannot_be_heard_without_the_store(
        self, own: Callable[..., Watchdog], killed: list[tuple[int, int]], rank: int, store_silent_s: float
    ) -> None:
        watchdog = own(rank, store_silent_s=store_silent_s, other_silent_s=1200)
        assert watchdog._sentence() == ""
        watchdog._kill_silent_siblings()
        assert killed == []

    @pytest.mark.parametrize("rank", [0, 1])
    def test_the_store_is_named_although_a_rank_was_heard_even_earlier(
        self, own: Callable[..., Watchdog], killed: list[tuple[int, int]], rank: int
    ) -> None:
        watchdog = own(rank, store_silent_s=1200, other_silent_s=1500)
        assert "has not answered for 1200 s" in watchdog._sentence()
        watchdog._kill_silent_siblings()
        assert killed == []

    @pytest.mark.parametrize("rank", [0, 1])
    @pytest.mark.parametrize("store_silent_s", [0, 300])
    def test_a_rank_that_the_store_had_not_heard_either(
        self, own: Callable[..., Watchdog], killed: list[tuple[int, int]], rank: int, store_silent_s: float
    ) -> None:
        watchdog = own(rank, store_silent_s=store_silent_s, other_silent_s=store_silent_s + 1200)
        assert watchdog._sentence().startswith(f"rank {1 - rank} on ")
        assert "no sign of life for 1200 s" in watchdog._sentence()
        watchdog._kill_silent_siblings()
        assert killed == [(os.getpid(), signal.SIGKILL)]

    def test_the_first_rank_is_stopped_with_the_store_that_it_hosts(
        self, own: Callable[..., Watchdog], killed: list[tuple[int, int]]
    ) -> None:
        watchdog = own(1, store_silent_s=1200, other_silent_s=1201, has_host=False)
        assert "has not answered for 1200 s" in watchdog._sentence()
        watchdog._kill_silent_siblings()
        assert killed == [(os.getpid(), signal.SIGKILL)]

    @pytest.mark.parametrize(("store_silent_s", "other_silent_s"), [(5000, 5001), (0, 5000)])
    def test_what_was_not_heard_in_this_process_s_own_sleep(
        self, own: Callable[..., Watchdog], store_silent_s: float, other_silent_s: float
    ) -> None:
        """Whether or not the courier was awake before the judge, and heard the store but no new beat."""
        watchdog = own(0, store_silent_s=store_silent_s, other_silent_s=other_silent_s)
        watchdog._forgive(5000)
        assert watchdog._sentence() == ""


def test_clocks_of_other_hosts_do_not_matter() -> None:
    """A heartbeat holds no time of the day: what counts is when the reader heard something new."""
    assert {field.name for field in fields(Heartbeat)} == {
        "number", "step", "phase", "overdue_s", "waits", "place", "host", "process",
    }  # fmt: skip
    pulse = Pulse()
    pulse.heard_s -= 50
    assert 50 <= pulse.silent_s < 60
    pulse.hear(Heartbeat(number=1, step=0, phase="start"))
    assert pulse.silent_s < 10
    pulse.heard_s -= 50
    pulse.hear(Heartbeat(number=1, step=0, phase="start"))
    assert pulse.silent_s >= 50


def test_where_a_thread_is() -> None:
    place, waits = heartbeat.place_of_thread(threading.get_ident())
    assert place.startswith("place_of_thread, leoclr_fast/distributed/heartbeat.py line ")
    assert not waits
    assert heartbeat.place_of_thread(1) == ("", False)


class TestJoining:
    """Each wait is bounded and ends in what to do."""

    def test_a_port_that_another_program_has(self) -> None:
        with socket.create_server(("", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(ValueError, match=rf"port {port}, which the ranks .* choose another MASTER_PORT"):
                rendezvous(0, port, has_host=False).connect(5)

    def test_something_else_listens_at_the_port(self) -> None:
        with socket.create_server(("", 0)) as other:
            port, start_s = other.getsockname()[1], time.monotonic()
            with pytest.raises(JoinError, match=rf"found no torch store at localhost:{port}.*another MASTER_PORT"):
                rendezvous(1, port).connect(1)
            assert time.monotonic() - start_s < LIMIT_S

    def test_a_master_that_does_not_come(self) -> None:
        told = r"waited 0.5 s for the master localhost:\d+.*--monitor.join-limit-s"
        with held_port() as port, pytest.raises(JoinError, match=told):
            rendezvous(1, port).connect(0.5)

    def test_a_rank_that_does_not_come(self) -> None:
        told = r"after 0.5 s, rank 1 of 2 did not come to localhost:\d+; here: rank 0 on"
        with held_port() as port:
            first = rendezvous(0, port, has_host=False)
            store = first.connect(LIMIT_S)
            with pytest.raises(JoinError, match=told):
                first.wait_for_all(store, 0.5)

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"MASTER_PORT": None}, "RANK and WORLD_SIZE are set and MASTER_PORT not"),
            ({"RANK": "one"}, "RANK=one is not allowed: give a number"),
            ({"RANK": "2"}, "RANK=2 is not allowed with WORLD_SIZE=2: ranks count from 0"),
        ],
    )
    def test_an_environment_that_is_not_whole(
        self, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], told: str
    ) -> None:
        whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
        for name, value in (whole | changed).items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=told):
            Rendezvous.of_environment()


def reports(*own_s: float) -> list[StepReport]:
    longest = max(own_s)
    return [StepReport(stop=False, rows_on_host=0, step_s=longest, data_wait_s=own / 4, own_s=own) for own in own_s]


class TestStragglers:
    def test_a_slow_rank_is_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        times = RankTimes()
        for own_s in (0.1, 0.4, 0.4):
            for _ in range(10):
                times.add(reports(0.1, 0.1, own_s))
            with caplog.at_level(logging.WARNING):
                means = times.take()
            assert means == {
                "rank_step_s": [own_s] * 3,
                "rank_data_wait_s": [0.025, 0.025, own_s / 4],
                "rank_own_s": [0.1, 0.1, own_s],
            }
        assert [record.getMessage() for record in caplog.records] == [
            "rank 2 is slow: 0.400 s of its own in a step, the ranks' median is 0.100 s, and all wait for it; data "
            "wait 0.100 s"
        ]

    def test_the_noise_of_a_step_is_none(self, caplog: pytest.LogCaptureFixture) -> None:
        times = RankTimes()
        for own_s in (0.1, 0.5, *[0.1] * 18):
            times.add(reports(0.1, own_s))
        times.take()
        assert not caplog.records

    def test_a_single_rank_has_no_times(self) -> None:
        times = RankTimes()
        times.add(reports(0.1))
        assert times.take() == {}
