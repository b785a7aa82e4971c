"""A second group of all ranks, on the hosts' CPUs, for what goes on beside the steps: values, files, errors."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
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
        if kind is None or issubclass(kind, StoppedBySignalError):
            self.barrier()

    def gathered(self, value: Value) -> list[Value]:
        """The value of every rank, a picklable one, in rank order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: Callable[[], Value]) -> Value:
        """The result of an action that every rank does for itself; if it fails on one, it fails on all.

        Raises, on a rank where the action failed, its error; on the others OtherRankError with the message and the name
        of the first rank that failed.
        """
        if self.group is None:
            return action()
        value, error = _attempt(action)
        errors = self.gathered(None if error is None else self._named(error))
        if error is not None:
            raise error
        _raise_first(errors)
        return value  # type: ignore[return-value]

    def from_main(self, action: Callable[[], Value]) -> Value:
        """The result, a picklable one, of an action that only the first rank does; if it fails there, it fails on all.

        Raises as `together`.
        """
        if self.group is None:
            return action()
        value, error = _attempt(action) if self.ranks.is_main else (None, None)
        outcome: list[Any] = [(value, None if error is None else self._named(error))]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if error is not None:
            raise error
        value, failure = outcome[0]
        _raise_first([failure])
        return value

    def bytes_from_main(self, content: bytes | None) -> bytes:
        """The first rank's bytes (the others give None), on every rank."""
        if self.group is None:
            assert content is not None
            return content
        size = torch.tensor([0 if content is None else len(content)])
        dist.broadcast(size, src=0, group=self.group)
        if content is None:
            received = torch.empty(int(size), dtype=torch.uint8)
        else:
            received = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(received, src=0, group=self.group)
        return received.numpy().tobytes() if content is None else content

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def _named(self, error: Exception) -> str:
        return f"rank {self.ranks.rank} on {socket.gethostname()}: {describe(error)}"


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = str(error) if isinstance(error, ValueError | RuntimeError | OSError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _raise_first(errors: list[str | None]) -> None:
    first = next((text for text in errors if text is not None), None)
    if first is not None:
        raise OtherRankError(first)


def _attempt(action: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error
