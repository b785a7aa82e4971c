"""What all ranks know of each other after a step, so that they do the same thing at the same step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from leoclr_fast.distributed.side_group import SideGroup

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


class StepAgreement:
    """Every rank gives a report after each step, and gets those that all ranks gave one step before: they travel on the
    CPU while the next step runs. With one rank, the reports are those of this step.
    """

    def __init__(self, side: SideGroup) -> None:
        self._side = side
        self._on_the_way: tuple[dist.Work | None, Tensor] | None = None

    def exchange(self, report: StepReport) -> list[StepReport]:
        """The reports of all ranks, in rank order, the same on every rank; empty after the first step of several ranks.

        Raises RuntimeError if a rank is gone.
        """
        if self._side.group is None:
            return [report]
        arrived = self.settle()
        own = torch.tensor([[float(getattr(report, name)) for name in _COLUMNS]], dtype=torch.float64)
        table = own.new_empty(self._side.ranks.world_size, len(_COLUMNS))
        work = dist.all_gather_into_tensor(table, own, group=self._side.group, async_op=True)
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
