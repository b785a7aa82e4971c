"""Which images form a batch: a pure function of (seed, epoch, step); a rank takes a share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipelines.counter_rng import ORDER_STREAM, permutation


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that ``rank`` takes; sizes differ by at most one (256 on 3 ranks: 86, 85, 85)."""
    base, extra = divmod(batch_size, world_size)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


def rank_slices(batch_size: int, rank: int, world_size: int, micro_batches: int = 1) -> list[slice]:
    """What ``rank`` takes of each micro-batch, as slices of the global batch.

    The global batch is cut into micro-batches first and each of these is shared by the ranks, so that a micro-batch
    holds the same images for any number of ranks.
    """
    slices = []
    for number in range(micro_batches):
        part = rank_slice(batch_size, number, micro_batches)
        own = rank_slice(part.stop - part.start, rank, world_size)
        slices.append(slice(part.start + own.start, part.start + own.stop))
    return slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Order(ABC):
    """Global batches of image indices, the same for any number of ranks, and each rank's slice of them."""

    num_images: int
    batch_size: int
    """Images per global batch, over all ranks."""
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1
    """Parts of a global batch that are worked through one after the other; each is shared by all ranks."""

    def __post_init__(self) -> None:
        least = self.micro_batches * self.world_size
        if self.batch_size < least:
            parts = f" in {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
            raise ValueError(
                f"a global batch of {self.batch_size}{parts} cannot be shared by {self.world_size} ranks: each needs "
                f"at least one image of every micro-batch; raise --batch-size to {least} or more, or take fewer "
                "--micro-batches or ranks"
            )

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""

    @abstractmethod
    def global_indices(self, epoch: int, step: int) -> npt.NDArray[np.int64]:
        """Indices of the whole batch: int64 [at most batch_size]."""

    def indices(self, epoch: int, step: int) -> npt.NDArray[np.int64]:
        """Indices of this rank's share of the batch, micro-batch by micro-batch: int64 [local batch]; may be empty
        where a batch is not full."""
        batch = self.global_indices(epoch, step)
        slices = rank_slices(len(batch), self.rank, self.world_size, self.micro_batches)
        return batch[slices[0]] if len(slices) == 1 else np.concatenate([batch[part] for part in slices])

    @property
    def max_local_batch_size(self) -> int:
        """Images of this rank in a full batch."""
        slices = rank_slices(self.batch_size, self.rank, self.world_size, self.micro_batches)
        return sum(part.stop - part.start for part in slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOrder(Order):
    """A fresh permutation of all images every epoch, cut into global batches; the incomplete last one is dropped."""

    seed: int
    keep_incomplete: bool = False
    """Keep the incomplete last batch: every image in every epoch, as in MoCo's linear evaluation."""

    def __post_init__(self) -> None:
        Order.__post_init__(self)
        if self.num_images < self.batch_size and not self.keep_incomplete:
            raise ValueError(
                f"the data has {self.num_images} images, fewer than one batch of {self.batch_size}; "
                f"give more images or a --batch-size of at most {self.num_images}"
            )

    @property
    def steps_per_epoch(self) -> int:
        num_steps = self.num_images // self.batch_size
        return num_steps + (self.keep_incomplete and num_steps * self.batch_size < self.num_images)

    def global_indices(self, epoch: int, step: int) -> npt.NDArray[np.int64]:
        start = step * self.batch_size
        return _epoch_permutation(self.seed, epoch, self.num_images)[start : start + self.batch_size]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialOrder(Order):
    """Every image once, in the order of the data; the last batch may be smaller. For evaluation."""

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_images // self.batch_size)

    def global_indices(self, epoch: int, step: int) -> npt.NDArray[np.int64]:
        start = step * self.batch_size
        return np.arange(start, min(start + self.batch_size, self.num_images), dtype=np.int64)


@lru_cache(maxsize=2)
def _epoch_permutation(seed: int, epoch: int, num_images: int) -> npt.NDArray[np.int64]:
    indices = permutation(seed, epoch, num_images, ORDER_STREAM)
    indices.setflags(write=False)  # it is cached, and batches are views of it
    return indices
