"""What all ranks report after each step: so they stop and log at the same step, and slow ones are named."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from leoclr_fast.distributed.host_group import HostGroup

log = logging.getLogger(__name__)

STRAGGLER_FACTOR = 1.5
"""A rank is slow if its own part of a step takes so many times as long as the ranks' median."""
_LEAST_SHARE = 0.1
_LEAST_STEPS = 10
_COLUMNS = ("stop", "rows_on_host", "step_s", "data_wait_s", "own_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a rank has to say after a step."""

    stop: bool
    """Whether a signal asked it to end."""
    rows_on_host: int
    """How many of the metrics that were sent to the host have arrived there."""
    step_s: float
    """Seconds since its last step ended."""
    data_wait_s: float
    """How many of them it waited for its batch."""
    own_s: float
    """How many of them it did not wait for other ranks or for its GPU."""


class StepReports:
    """Every rank gives a report after each step, and gets those that all ranks gave one step before: they travel on the
    CPU while the next step runs. With one rank, the reports are those of this step.
    """

    def __init__(self, host: HostGroup) -> None:
        self._host = host
        self._on_the_way: tuple[dist.Work | None, Tensor] | None = None

    def exchange(self, report: StepReport) -> list[StepReport]:
        """The reports of all ranks, in rank order, the same on every rank; empty after the first step of several ranks.

        Raises RuntimeError if a rank is gone.
        """
        if self._host.group is None:
            return [report]
        arrived = self.settle()
        own = torch.tensor([[float(getattr(report, name)) for name in _COLUMNS]], dtype=torch.float64)
        table = own.new_empty(self._host.ranks.world_size, len(_COLUMNS))
        work = dist.all_gather_into_tensor(table, own, group=self._host.group, async_op=True)
        self._on_the_way = (work, table)
        return arrived

    def settle(self) -> list[StepReport]:
        """The reports that are still on their way; after it the group is free for others."""
        if self._on_the_way is None:
            return []
        work, table = self._on_the_way
        self._on_the_way = None
        if work is not None:
            work.wait()
        return [_report(row) for row in table.tolist()]


def _report(row: list[float]) -> StepReport:
    stop, rows_on_host, step_s, data_wait_s, own_s = row
    return StepReport(
        stop=bool(stop), rows_on_host=int(rows_on_host), step_s=step_s, data_wait_s=data_wait_s, own_s=own_s
    )


class StepStopwatch:
    """Seconds of this rank's step: all, those that it waited for data, and those in which it waited for nobody else."""

    def __init__(self, data_wait_s: Callable[[], float], waits_for_others_s: Callable[[], float]) -> None:
        """The two functions tell, ever growing, for how long this rank has waited."""
        self._data_wait_s = data_wait_s
        self._waits_for_others_s = waits_for_others_s
        self.start()

    def start(self) -> None:
        """The step begins, with waiting for its batch."""
        self._start = time.perf_counter(), self._data_wait_s(), self._waits_for_others_s()

    def read(self) -> tuple[float, float, float]:
        """Since the start: all, data wait, own."""
        start, data_wait_s, others_s = self._start
        step_s = time.perf_counter() - start
        return step_s, self._data_wait_s() - data_wait_s, max(0.0, step_s - (self._waits_for_others_s() - others_s))


class RankTimes:
    """The times of all ranks between two looks at the metrics. The same on every rank."""

    def __init__(self, *, warns: bool = True) -> None:
        """warns: whether it is this rank that logs a warning."""
        self._warns = warns
        self._reports: list[list[StepReport]] = []
        self._recent: list[list[StepReport]] = []
        self._slow: set[int] = set()

    def add(self, reports: list[StepReport]) -> None:
        """The reports of all ranks on one step."""
        if len(reports) > 1:
            self._reports.append(reports)
            self._recent.append(reports)

    def take(self) -> dict[str, list[float]]:
        """Means over the steps since the last time, one number for each rank: rank_step_s, rank_data_wait_s,
        rank_own_s (without waiting for other ranks, or on a GPU for the device); empty for a single rank.

        Warns of a rank that makes the others wait for ten steps or longer, once until it is as fast as they are.
        """
        if len(self._recent) >= _LEAST_STEPS:
            self._name_slow_ones(_means(self._recent))
            self._recent = []
        means = _means(self._reports) if self._reports else {}
        self._reports = []
        return {name: [round(value, 6) for value in values] for name, values in means.items()}

    def _name_slow_ones(self, means: dict[str, list[float]]) -> None:
        own_s = means["rank_own_s"]
        slow = slow_ranks(own_s, statistics.median(means["rank_step_s"]))
        for rank in sorted(slow - self._slow) if self._warns else ():
            log.warning(
                "rank %d is slow: %.3f s of its own in a step, the ranks' median is %.3f s, and all wait for it; data "
                "wait %.3f s",
                rank,
                own_s[rank],
                statistics.median_low(own_s),
                means["rank_data_wait_s"][rank],
            )
        self._slow = slow


def _means(reports: list[list[StepReport]]) -> dict[str, list[float]]:
    """Over the steps, one for each rank."""
    by_rank = list(zip(*reports, strict=True))
    return {
        f"rank_{name}": [statistics.fmean(getattr(report, name) for report in rank) for rank in by_rank]
        for name in ("step_s", "data_wait_s", "own_s")
    }


def slow_ranks(own_s: list[float], step_s: float) -> set[int]:
    """Ranks whose own part of a step is 1.5 times the median of all, and by a tenth of the step longer.

    The median is the lower one: of two ranks, the slower one is named.
    """
    median_s = statistics.median_low(own_s)
    least_s = max(STRAGGLER_FACTOR * median_s, median_s + _LEAST_SHARE * step_s)
    return {rank for rank, own in enumerate(own_s) if own > least_s}
