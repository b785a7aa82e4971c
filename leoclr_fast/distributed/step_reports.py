"""What all ranks agree on after each step, so that they stop and log at the same one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from leoclr_fast.distributed.host_group import HostGroup


class StepReports:
    """Every rank reports after each step, and gets what all of them reported one step before: reports travel on the
    CPU while the next step runs. With one rank, it gets its own of this step.
    """

    def __init__(self, host: HostGroup) -> None:
        self._host = host
        self._on_the_way: tuple[dist.Work | None, Tensor] | None = None

    def exchange(self, *, stop: bool, num_arrived: int = 0) -> tuple[bool, int]:
        """stop: whether a signal asked this rank to end. num_arrived: how many of the metrics that were sent to the
        host have arrived there.

        Returns, the same on every rank, whether any of them is to end, and the least that has arrived; no and 0 after
        the first step of several ranks. Raises RuntimeError if a rank is gone.
        """
        if self._host.group is None:
            return stop, num_arrived
        before = self.settle()
        values = torch.tensor([int(stop), -num_arrived])
        self._on_the_way = (dist.all_reduce(values, dist.ReduceOp.MAX, self._host.group, async_op=True), values)
        return before

    def settle(self) -> tuple[bool, int]:
        """What is still on its way; after it the group is free for others."""
        if self._on_the_way is None:
            return False, 0
        work, values = self._on_the_way
        self._on_the_way = None
        if work is not None:
            work.wait()
        stop, arrived = values.tolist()
        return bool(stop), -arrived
