"""A second group of all ranks, on the hosts' CPUs, for what goes on beside the steps: values, files, errors."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch.distributed as dist

from dataset_tools.stop_signals import StoppedBySignalError
from leoclr_fast.distributed.collectives import Ranks

Value = TypeVar("Value")


class OtherRankError(RuntimeError):
    """Another rank cannot go on, so this one does not either."""

    exit_code = 75  # sysexits.h's EX_TEMPFAIL: the same command continues the run


class HostGroup:
    """With one rank, each method is what it would be without a group.

    It uses gloo, also where training uses NCCL, so nothing here waits for a GPU.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        """timeout_s: how long a rank waits here for the others before it fails."""
        self.ranks = ranks
        timeout = timedelta(seconds=timeout_s)
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout) if ranks.world_size > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an orderly end the ranks leave together: torchrun ends all as soon as one has left with an error."""
        if self.group is not None and (kind is None or issubclass(kind, StoppedBySignalError)):
            dist.barrier(group=self.group)

    def gathered(self, value: Value) -> list[Value]:
        """The value of every rank, a picklable one, in rank order."""
        return self.ranks.gathered(value, self.group)

    def together(self, action: Callable[[], Value]) -> Value:
        """The result of an action that every rank does for itself; if it fails on one, it fails on all.

        Raises, on a rank where the action failed, its error; on the others OtherRankError with the message and the name
        of the first rank that failed.
        """
        if self.group is None:
            return action()
        value: Value | None = None
        error: Exception | None = None
        try:
            value = action()
        except Exception as own:
            error = own
        failures = self.gathered(None if error is None else self._named(error))
        if error is not None:
            raise error
        for failure in failures:
            if failure is not None:
                raise OtherRankError(failure)
        return value  # type: ignore[return-value]

    def from_main(self, action: Callable[[], Value]) -> Value:
        """The result, a picklable one, of an action that only the first rank does; if it fails there, it fails on all.

        Raises as `together`.
        """
        value = self.together(lambda: action() if self.ranks.is_main else None)
        return self.ranks.from_main(value, self.group)  # type: ignore[return-value]

    def _named(self, error: Exception) -> str:
        return f"rank {self.ranks.rank} on {socket.gethostname()}: {describe(error)}"


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = str(error) if isinstance(error, ValueError | RuntimeError | OSError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
