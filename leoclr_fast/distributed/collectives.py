"""Ranks under torchrun, and the few collectives that training needs. With one rank each is a no-op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.order import rank_slice

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all of a run."""

    rank: int = 0
    world_size: int = 1
    meter: Callable[[str, Tensor], AbstractContextManager[None]] | None = field(default=None, compare=False, repr=False)
    """Surrounds each collective of tensors, given its kind and the tensor, where a benchmark counts them."""
    store: dist.Store | None = field(default=None, compare=False, repr=False)
    """Where the ranks have met, and leave each other why they fail; None for a single one."""

    def __deepcopy__(self, memo: object) -> Ranks:
        """Copies of a network talk to the same ranks."""
        return self

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def local_size(self, global_size: int) -> int:
        """This rank's share of a global batch."""
        part = rank_slice(global_size, self.rank, self.world_size)
        return part.stop - part.start

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors of one dtype over the ranks, in place, as one flat buffer: in the same order in every step."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._metered("all_reduce", flat):
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])

    def begin_all_reduce_sum(self, buffer: Tensor) -> Callable[[], None]:
        """Begin to sum a contiguous buffer over the ranks, in place; what is returned waits until that is done."""
        work = dist.all_reduce(buffer, async_op=True)

        def wait() -> None:
            with self._metered("all_reduce", buffer):  # the time that nothing else was done in
                work.wait()

        return wait

    def all_gather_rows(self, rows: Tensor, global_size: int) -> Tensor:
        """Rows of all ranks in rank order, [global_size, ...]; each rank gives its `local_size` of them."""
        if self.world_size == 1:
            return rows
        largest = -(-global_size // self.world_size)
        gathered = self.all_gather_padded(rows, largest).unflatten(0, (self.world_size, largest))
        slices = [rank_slice(global_size, rank, self.world_size) for rank in range(self.world_size)]
        return torch.cat([part[: s.stop - s.start] for part, s in zip(gathered, slices, strict=True)])

    def all_gather_padded(self, rows: Tensor, num_rows: int) -> Tensor:
        """Rows of all ranks in rank order, [world size * num_rows, ...]: so many of each, zeros after those it has."""
        if self.world_size == 1:
            return rows
        padded = rows
        if len(rows) < num_rows:
            padded = torch.cat((rows, rows.new_zeros(num_rows - len(rows), *rows.shape[1:])))
        gathered = rows.new_empty(self.world_size * num_rows, *rows.shape[1:])
        with self._metered("all_gather", gathered):
            dist.all_gather_into_tensor(gathered, padded.contiguous())
        return gathered

    def all_to_all_rows(self, rows: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        """Hand out rows, the first `send_sizes[0]` to rank 0 and so on; returns those that came, from rank 0 first."""
        if self.world_size == 1:
            return rows
        received = rows.new_empty(sum(receive_sizes), *rows.shape[1:])
        with self._metered("all_to_all", rows):
            dist.all_to_all_single(received, rows.contiguous(), receive_sizes, send_sizes)
        return received

    def any_says(self, answer: bool, device: torch.device) -> bool:
        """Whether the answer of at least one rank is yes, on every rank."""
        if self.world_size == 1:
            return answer
        flag = torch.tensor([float(answer)], device=device)
        dist.all_reduce(flag)
        return bool(flag.item())

    def gathered(self, value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
        """The value of every rank, a picklable one, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group)
        return values

    def require_equal(self, value: int, what: str) -> None:
        """Raises RuntimeError if the ranks do not have the same value, which would hang or corrupt them later."""
        values = self.gathered(value)
        if len(set(values)) > 1:
            raise RuntimeError(
                f"{what} differs between the ranks: {values} on ranks 0 to {self.world_size - 1}; all ranks must "
                "see the same files"
            )

    def merged(self, own: dict[str, Value]) -> dict[str, Value]:
        """The entries of all ranks' dicts, picklable ones."""
        return {key: value for part in self.gathered(own) for key, value in part.items()}

    def from_main(self, value: Value, group: dist.ProcessGroup | None = None) -> Value:
        """The first rank's value, a picklable one, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=group)
        return values[0]

    def _metered(self, kind: str, tensor: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self.meter is None else self.meter(kind, tensor)
