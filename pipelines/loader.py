"""What every loader is: a context manager that hands out `CropBatch`es, epoch by epoch, from any step."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Self

import torch

from dataset_tools.sources import Split
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.decode import none_readable
from pipelines.order import Order
from pipelines.views import ViewRecipe

log = logging.getLogger(__name__)

_MAX_BAD_FRACTION = 0.01
_ALWAYS_TOLERATED = 10


def max_unreadable(num_images: int) -> int:
    """How many unreadable images a run puts up with."""
    return max(_ALWAYS_TOLERATED, int(_MAX_BAD_FRACTION * num_images))


class Loader(ABC):
    """Images of a split as crops on a device.

    Which images, in which order, with which boxes is decided by ``order``, ``views`` and ``seed`` alone: two loaders
    with the same three hand out the same crops, and ``batches(epoch, start_step)`` continues exactly where a run
    was left. An image that cannot be read is replaced by the next one, with that one's own boxes and label; it is
    logged by name once, and too many of them stop the run.
    """

    name: ClassVar[str]

    def __init__(
        self,
        split: Split,
        views: ViewRecipe,
        view_config: ViewConfig,
        config: LoaderConfig,
        order: Order,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.split = split
        self.views = views
        self.view_config = view_config
        self.config = config
        self.order = order
        self.seed = seed
        self.device = device
        self.unreadable: dict[int, str] = {}
        """Index of each image that could not be read -> the reason."""
        self._num_decodes = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def num_decodes(self) -> int:
        """How many times this loader has decoded an image so far: once for each image of an epoch, and no more."""
        return self._num_decodes

    @abstractmethod
    def batches(self, epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
        """The batches of this rank from ``start_step`` to the end of ``epoch``."""

    def close(self) -> None:  # noqa: B027 - most loaders have nothing to give back
        """Give back workers and memory; closing twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def report_unreadable(self, index: int, reason: str) -> None:
        """Note an image that could not be read; log it once.

        Raises RuntimeError when more than 1 % of the images (and more than ten) are unreadable, ValueError when all
        are.
        """
        if index in self.unreadable:
            return
        self.unreadable[index] = reason
        log.warning("cannot read %s (%s); the next image takes its place", self.split.names[index], reason)
        if len(self.unreadable) == len(self.split):
            raise none_readable(self.split, self.unreadable)
        limit = max_unreadable(len(self.split))
        if len(self.unreadable) > limit:
            raise RuntimeError(
                f"{len(self.unreadable)} of {len(self.split)} images cannot be read, more than the {limit} that are "
                f"tolerated (1 %, at least {_ALWAYS_TOLERATED}); the last one is {self.split.names[index]}: {reason}. "
                "Check the data set."
            )
