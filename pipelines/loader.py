"""What every loader is: a context manager that hands out `CropBatch`es, epoch by epoch, from any step."""

from __future__ import annotations

import atexit
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import ClassVar, Self
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dataset_tools.sources import Split
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.crops import Boxes
from pipelines.decode import ALWAYS_TOLERATED, max_unreadable, none_readable
from pipelines.order import Order
from pipelines.views import ViewRecipe

log = logging.getLogger(__name__)


@dataclass(slots=True)
class DecodedBatch:
    """What a loader decodes for one step. Legend: B images, V views, S side of a view."""

    crops: Tensor
    """uint8 [B, V, S, S, 3], on the device, or on the host for `Loader` to copy (pinned, if the device is a GPU)."""
    indices: npt.NDArray[np.int64]
    """int64 [B]: index of each image in its split; of the substitute where an image could not be read."""
    boxes: Boxes
    """int32 [B, V, 8]: the placed box of each view, see `pipelines.crops`, pixels."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """Index of each image that had to be replaced here -> the reason."""
    is_done: torch.cuda.Event | None = None
    """When the crops may be used by another stream than the one that makes them."""

    def pin_memory(self) -> DecodedBatch:
        """Pin the crops, where torch's DataLoader asks for it."""
        self.crops = self.crops.pin_memory()
        return self


class Loader(ABC):
    """Images of a split as crops on a device.

    Which images, in which order, with which boxes is decided by ``order``, ``views`` and ``seed`` alone: two loaders
    with the same three hand out the same crops, and ``batches(epoch, start_step)`` continues exactly where a run
    was left. An image that cannot be read is replaced by the next one, with that one's own boxes and label; it is
    logged by name once, and too many of them stop the run.

    A new loader is a subclass with a ``name`` and `decode_batches`, and an entry in `pipelines.factory.LOADERS`.
    """

    name: ClassVar[str]
    """What --loader calls it."""
    package: ClassVar[str | None] = None
    """An optional package that it needs, as it is imported."""
    installing: ClassVar[str] = ""
    """What installs that package."""
    auto_places: ClassVar[Mapping[str, int]] = {}
    """Type of a device -> place of this loader in the order in which ``auto`` tries them. Without one, it is not."""
    drawbacks: ClassVar[Mapping[str, str]] = {}
    """Type of a device -> why those that come before this loader are preferred."""
    shows_images: ClassVar[bool] = True
    """Whether the crops are those of the split's images."""
    decodes_on_gpu: ClassVar[bool] = False
    """Whether JPEGs are decoded by the device where that is a GPU, so that pixels differ a little from Pillow's."""
    repeats_chroma: ClassVar[bool] = False
    """Whether that decoder repeats a JPEG's chroma, of fewer pixels, instead of interpolating it."""
    copies_ahead: ClassVar[bool] = False
    """Whether a batch is asked for before the one before it is handed out, so that its copy to a GPU is under way."""
    remedy: ClassVar[str] = (
        "raise --loader.workers to the number of cores, or convert the data with --short-side 400, so that there is "
        "less to decode"
    )
    """What makes it faster when training on a GPU waits for it."""

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
        split.check()
        self.split = split
        self.views = views
        self.view_config = view_config
        self.config = config
        self.order = order
        self.seed = seed
        self.device = device
        if str(device) == "cuda" and torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.unreadable: dict[int, str] = {}
        """Index of each image that could not be read -> the reason."""
        self._num_decodes = 0
        self._decoding: Generator[DecodedBatch, None, None] | None = None
        """The pass that is under way."""
        self._is_open = False

    @classmethod
    def obstacle(cls, split: Split, device: torch.device) -> str | None:
        """Why ``auto`` cannot take this loader for a split on a device; None if it can."""
        if cls.package is not None and not is_installed(cls.package):
            return f"not installed: {cls.installing}"
        return None

    @abstractmethod
    def decode_batches(self, epoch: int, start_step: int) -> Generator[DecodedBatch, None, None]:
        """Generate the batches of this rank from ``start_step`` to the end of ``epoch``; closing it ends the pass."""

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def num_decodes(self) -> int:
        """How many times this loader has decoded an image so far: once for each image of an epoch, and no more."""
        return self._num_decodes

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
        """The batches of this rank from ``start_step`` to the end of ``epoch``. A new pass ends the one before."""
        self._end_pass()
        self._close_at_exit()
        decoding = self._decoding = self.decode_batches(epoch, start_step)
        upcoming = deque[DecodedBatch]()
        try:
            for step in range(start_step, self.steps_per_epoch):
                if not upcoming:
                    upcoming.append(self._received(next(decoding)))
                if self._is_copied_ahead and step + 1 < self.steps_per_epoch:
                    upcoming.append(self._received(next(decoding)))
                yield self._handed_out(upcoming.popleft(), epoch, step)
                assert self._decoding is decoding, "another pass over this loader has begun"
        finally:
            decoding.close()
            if self._decoding is decoding:
                self._decoding = None

    def close(self) -> None:
        """Give back workers and memory; closing twice is harmless."""
        self._end_pass()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_is_open", False):
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
                f"tolerated (1 %, at least {ALWAYS_TOLERATED}); the last one is {self.split.names[index]}: {reason}. "
                "Check the data set."
            )

    def use_device(self) -> None:
        """Every thread of a loader calls it first: a thread begins on the first GPU, and what is called there without
        naming a device, such as pinning memory, would leave some 500 MB of a context on it for every rank.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @cached_property
    def side_stream(self) -> torch.cuda.Stream | None:
        """For copies and cuts on a GPU beside what it trains; None for a CPU.

        torch has 32 streams of each priority, which it hands out in turn: of these nothing else here takes one, so that
        it never is the stream on which a step is captured.
        """
        return torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None

    @property
    def _is_copied_ahead(self) -> bool:
        return self.copies_ahead and self.device.type == "cuda"

    def _received(self, decoded: DecodedBatch) -> DecodedBatch:
        for index, reason in decoded.unreadable.items():
            self.report_unreadable(index, reason)  # raises where the loader gave up
        return self.on_device(decoded)

    def on_device(self, decoded: DecodedBatch) -> DecodedBatch:
        """Begins the copy to the device of crops that are not there; in any thread."""
        if self.device.type != "cuda":
            decoded.crops = decoded.crops.to(self.device)
        elif not decoded.crops.is_cuda:
            # torch hands pinned memory out again only when its copies are done.
            with torch.cuda.stream(self.side_stream):
                decoded.crops = decoded.crops.to(self.device, non_blocking=True)
                decoded.is_done = torch.cuda.current_stream().record_event()
        return decoded

    def _handed_out(self, decoded: DecodedBatch, epoch: int, step: int) -> CropBatch:
        if decoded.is_done is not None:  # the current stream waits, the host does not
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(decoded.is_done)
            decoded.crops.record_stream(stream)
        return CropBatch(
            crops=decoded.crops,
            labels=torch.from_numpy(self.split.labels[decoded.indices]),
            indices=decoded.indices,
            boxes=decoded.boxes,
            epoch=epoch,
            step=step,
        )

    def _end_pass(self) -> None:
        decoding, self._decoding = self._decoding, None
        if decoding is not None:
            decoding.close()

    def _close_at_exit(self) -> None:
        """Python would cut off threads that are at work. Last in, first out: DALI aborts if its own comes before."""
        self._is_open = True
        _OPEN.add(self)
        atexit.unregister(_close_all)
        atexit.register(_close_all)


_OPEN: WeakSet[Loader] = WeakSet()


def _close_all() -> None:
    for loader in list(_OPEN):
        loader.close()


def is_installed(package: str) -> bool:
    """Whether there is a package of this name; it is not imported."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # not even what it is part of
        return False
