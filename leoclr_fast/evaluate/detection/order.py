"""Which images form a training batch: a pure function of the seed.

Endless permutations of all images; as in detectron2, a batch has only wide or only tall images, so that little of it is
padding. There, two images of each GPU go together; here it is the whole global batch, so that the ranks' number does
not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import numpy.typing as npt

from pipelines.counter_rng import ORDER_STREAM, permutation


@dataclass(frozen=True, slots=True)
class Draw:
    """An image in an epoch: what its augmentation is drawn from."""

    epoch: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedOrder:
    """Global batches of images of one orientation."""

    wide: npt.NDArray[np.bool_]
    """Of each image, whether it is wider than high."""
    batch_size: int
    seed: int

    def batches(self, start: int = 0) -> Iterator[list[Draw]]:
        """The batches from number `start` on, without an end."""
        yield from islice(self._all_batches(), start, None)

    def _all_batches(self) -> Iterator[list[Draw]]:
        waiting: dict[bool, list[Draw]] = {False: [], True: []}
        for epoch in count():
            for index in permutation(self.seed, epoch, len(self.wide), ORDER_STREAM).tolist():
                group = waiting[bool(self.wide[index])]
                group.append(Draw(epoch, index))
                if len(group) == self.batch_size:
                    yield group.copy()
                    group.clear()
