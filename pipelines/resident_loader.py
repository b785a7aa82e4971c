"""Small data sets, decoded once and resident on the device; every view is cut there. For CIFAR-10 and STL-10."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from dataset_tools.progress import progress
from dataset_tools.sources import Split
from pipelines.crop_resize import PackedImages, cut_views
from pipelines.decode import Substitutes, UnreadableImageError, decode_rgb, image_size, none_readable
from pipelines.loader import DecodedBatch, Loader
from pipelines.threads import available_cores
from pipelines.views import draw_boxes

_SIZE_SAMPLES = 64
_MEMORY_SHARE = 0.8


class ResidentLoader(Loader):
    """One decode per image and run. Raises ValueError if the decoded split does not fit in memory."""

    name = "resident"
    remedy = "everything is decoded already: give it a GPU, or more CPU cores by --loader.workers"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resident = load_resident_images(self.split, self.device, self.config.workers)
        self._num_decodes = self._resident.num_decodes
        for index, reason in self._resident.unreadable.items():
            self.report_unreadable(index, reason)

    def decode_batches(self, epoch: int, start_step: int) -> Generator[DecodedBatch, None, None]:
        images = self._resident.images
        for step in range(start_step, self.steps_per_epoch):
            indices = self._resident.source_index[self.order.indices(epoch, step)]
            sizes = images.heights[indices], images.widths[indices]
            boxes = draw_boxes(self.views, self.view_config, *sizes, self.seed, epoch, indices)
            yield DecodedBatch(cut_views(images, indices, boxes, self.view_config), indices, boxes)


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class ResidentImages:
    """All images of a split, decoded."""

    images: PackedImages
    unreadable: dict[int, str]
    """Index of each image that could not be decoded -> the reason; its pixels here mean nothing."""
    num_decodes: int
    """How many images were decoded for it."""
    source_index: npt.NDArray[np.int64]
    """int64 [N]: the image itself, or for an unreadable one the next readable one, which takes its place."""


def estimate_decoded_bytes(split: Split) -> int:
    """Bytes that a split takes once decoded, from the headers of up to 64 images spread over it."""
    positions = np.unique(np.linspace(0, len(split) - 1, min(_SIZE_SAMPLES, len(split))).astype(np.int64))
    sizes = []
    for index in positions:
        try:
            height, width = image_size(split, int(index))
            sizes.append(3 * height * width)
        except UnreadableImageError:
            continue
    return int(np.mean(sizes) * len(split)) if sizes else 0


def load_resident_images(split: Split, device: torch.device, workers: int | None) -> ResidentImages:
    """Decode a split on ``workers`` threads (by default one for each core), or hand out the copy made earlier.

    The loaders of one process share it. Raises ValueError if no image can be read or if the pixels do not fit in
    memory.
    """
    copies = _LOADED.setdefault(split, {})
    if device not in copies:
        copies[device] = _decode_all(split, device, workers)
    return copies[device]


_LOADED: WeakKeyDictionary[Split, dict[torch.device, ResidentImages]] = WeakKeyDictionary()


def _decode_all(split: Split, device: torch.device, workers: int | None) -> ResidentImages:
    heights = np.ones(len(split), dtype=np.int64)
    widths = np.ones(len(split), dtype=np.int64)
    substitutes = Substitutes(split)
    unreadable = substitutes.unreadable
    decoded: list[int] = []

    def measure(index: int) -> None:
        try:
            heights[index], widths[index] = image_size(split, index)
        except UnreadableImageError as error:
            unreadable[index] = str(error)

    def decode(index: int) -> None:
        if index in unreadable:
            return
        decoded.append(index)
        try:
            image = np.asarray(decode_rgb(split, index))
        except UnreadableImageError as error:
            unreadable[index] = str(error)
            return
        if image.shape[:2] != (heights[index], widths[index]):  # must not spill over its neighbour
            unreadable[index] = f"it is {image.shape[0]} x {image.shape[1]} pixels, not as its header says"
            return
        pixels[offsets[index] : offsets[index] + image.size] = image.reshape(-1)

    num_threads = available_cores() if workers is None else max(1, workers)
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(measure, range(len(split))))
        sizes = 3 * heights * widths
        offsets = np.cumsum(sizes) - sizes
        _check_memory(int(sizes.sum()), device)
        pixels = np.zeros(int(sizes.sum()), dtype=np.uint8)
        with progress("decoding, once", len(split)) as advance:
            for _ in pool.map(decode, range(len(split))):
                advance(1)

    if len(unreadable) == len(split):
        raise none_readable(split, unreadable)
    return ResidentImages(
        images=PackedImages.side_by_side(torch.from_numpy(pixels).to(device), heights, widths),
        unreadable=dict(sorted(unreadable.items())),
        num_decodes=len(decoded),
        source_index=substitutes.replace(np.arange(len(split), dtype=np.int64)),
    )


def _check_memory(num_bytes: int, device: torch.device) -> None:
    available = _available_bytes(device)
    if num_bytes > _MEMORY_SHARE * available:
        raise ValueError(
            f"the decoded images take {num_bytes / 2**30:.1f} GiB, but {device} has {available / 2**30:.1f} GiB free "
            f"and at most {_MEMORY_SHARE:.0%} of that may be used; choose --loader torchvision"
        )


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Not SC_AVPHYS_PAGES: that leaves out the page cache, which a first pass over the data fills.
    with open("/proc/meminfo") as lines:
        sizes_kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return 1024 * sizes_kib["MemAvailable"]
