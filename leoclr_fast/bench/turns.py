"""Contestants that train in turns, in one process: seconds, data wait and energy of every turn."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from leoclr_fast.bench.contestant import Contestant
from leoclr_fast.bench.feeds import Feeds
from leoclr_fast.bench.stopwatch import peak_memory_gib, synchronize
from leoclr_fast.bench.turns_config import LEAST_ROUNDS, TurnsConfig
from leoclr_fast.machine.energy import EnergyMeter, energy_between
from pipelines.batch import CropBatch

_STEPS_AHEAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Some steps of a contestant, one after the other; the device was idle before and after."""

    steps: int
    seconds: float
    data_wait_s: float
    """Of them, in which the device had nothing to do because its next batch was not there."""
    energy_j: float | None

    @property
    def step_ms(self) -> float:
        return 1000 * self.seconds / self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A contestant that has trained for a while."""

    contestant: Contestant
    peak_memory_gib: float | None
    """Of all its tensors, at most, since it was made; None on a CPU."""


def prepare(make: Callable[[], Contestant], feeds: Feeds, device: torch.device, steps: int) -> Prepared:
    """Make a contestant and let it train for some steps."""
    made: list[Contestant] = []

    def make_and_train() -> None:
        made.append(make())
        _train(made[0], feeds[made[0].views], steps)

    peak = peak_memory_gib(make_and_train, device)
    return Prepared(contestant=made[0], peak_memory_gib=peak)


def take_turns(
    contestants: Sequence[Contestant],
    feeds: Feeds,
    device: torch.device,
    config: TurnsConfig,
    say: Callable[[str], None] = lambda _: None,
) -> list[list[Turn]]:
    """Warm all up, then let them train in turns: the turns of each, one of every round. `say` is told of every turn.

    feeds: batches without end for the views of each contestant. Those with the same views share one.
    """
    start = time.perf_counter()
    meter = EnergyMeter.of(device)
    turns: list[list[Turn]] = [[] for _ in contestants]
    for contestant in contestants:
        _train(contestant, feeds[contestant.views], config.warmup_steps)
    places = list(range(len(contestants)))
    for number in range(config.rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > config.max_s:
            say(f"stopped after {number} of {config.rounds} rounds: {config.max_s:g} s have gone")
            break
        for place in places if number % 2 == 0 else reversed(places):
            contestant = contestants[place]
            turns[place].append(_turn(contestant, feeds[contestant.views], device, config, meter))
            say(f"round {number + 1}/{config.rounds}: {contestant.name} {turns[place][-1].step_ms:,.1f} ms a step")
    return turns


def _turn(
    contestant: Contestant, feed: Iterator[CropBatch], device: torch.device, config: TurnsConfig, meter: EnergyMeter
) -> Turn:
    _train(contestant, feed, config.lead_steps)
    synchronize(device)
    before_j, data_wait_s = meter.read_j(), 0.0
    done: deque[torch.cuda.Event] = deque()
    start = time.perf_counter()
    for _ in range(config.steps):
        asked = time.perf_counter()
        batch = next(feed)
        if not done or done[-1].query():  # else the device was still busy when the batch came
            data_wait_s += time.perf_counter() - asked
        contestant.step(batch)
        if device.type == "cuda":
            done.append(torch.cuda.Event())
            done[-1].record()
            if len(done) > _STEPS_AHEAD:
                done.popleft().synchronize()  # a host far ahead would take the waiting for batches as its own pace
    synchronize(device)
    seconds = time.perf_counter() - start
    energy_j = energy_between(before_j, meter.read_j())
    return Turn(steps=config.steps, seconds=seconds, data_wait_s=data_wait_s, energy_j=energy_j)


def _train(contestant: Contestant, feed: Iterator[CropBatch], steps: int) -> None:
    for batch in islice(feed, steps):
        contestant.step(batch)
