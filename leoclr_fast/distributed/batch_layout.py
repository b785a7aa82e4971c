"""Where each image of a global batch lies: in which micro-batch, on which rank, in which row there."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipelines.order import rank_slice, rank_slices

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLayout:
    """Images are numbered by their place in the global batch. A rank's rows are its images, in ascending order."""

    batch_size: int
    """Of the global batch."""
    micro_batches: int = 1
    rank: int = 0
    world_size: int = 1
    owners: Indices = field(init=False)
    """int64 [batch_size]: the rank that has an image."""
    rows: Indices = field(init=False)
    """int64 [batch_size]: the row of an image on that rank."""

    def __post_init__(self) -> None:
        owners, rows = np.empty(self.batch_size, np.int64), np.empty(self.batch_size, np.int64)
        for rank in range(self.world_size):
            own = np.concatenate([np.arange(part.start, part.stop) for part in self.shares(rank)])
            owners[own], rows[own] = rank, np.arange(len(own))
        object.__setattr__(self, "owners", owners)
        object.__setattr__(self, "rows", rows)

    @property
    def parts(self) -> list[slice]:
        """The micro-batches, as slices of the global batch."""
        return [rank_slice(self.batch_size, number, self.micro_batches) for number in range(self.micro_batches)]

    def shares(self, rank: int) -> list[slice]:
        """What a rank has of each micro-batch, as slices of the global batch."""
        return rank_slices(self.batch_size, rank, self.world_size, self.micro_batches)

    @property
    def own(self) -> list[slice]:
        """What this rank has of each micro-batch, as slices of the global batch."""
        return self.shares(self.rank)

    @property
    def own_sizes(self) -> list[int]:
        """How many images this rank has of each micro-batch: the sizes of the parts of its batch, in order."""
        return [part.stop - part.start for part in self.own]

    @property
    def local_size(self) -> int:
        """How many images this rank has."""
        return sum(self.own_sizes)
