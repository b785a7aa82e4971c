"""Small data sets, decoded once and resident on the device; every view is cut there. For CIFAR-10 and STL-10."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from dataset_tools.progress import progress
from dataset_tools.sources import Split
from pipelines.crop_resize import cut_views
from pipelines.decode import Substitutes, UnreadableImageError, decode_rgb, image_size, none_readable
from pipelines.loader import DecodedBatch, Loader
from pipelines.node_memory import made_once, num_local_ranks
from pipelines.packed_images import PackedImages
from pipelines.views import draw_boxes

_SIZE_SAMPLES = 64
_MEMORY_SHARE = 0.8
_BLOCK = 64
"""Images that a thread is given at a time: a signal ends the run within these, and a million futures take gigabytes."""


class ResidentLoader(Loader):
    """One decode per image, node and run. Raises ValueError if the decoded split does not fit in memory."""

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
    """How many images this rank decoded for it: none where another rank of its node did."""
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

    The loaders of one process share it, and the ranks of a node the pixels on the host. Raises ValueError if no image
    can be read or if the pixels do not fit in memory.
    """
    copies = _LOADED.setdefault(split, {})
    if device not in copies:
        copies[device] = _loaded(split, device, workers)
    return copies[device]


_LOADED: WeakKeyDictionary[Split, dict[torch.device, ResidentImages]] = WeakKeyDictionary()


def _loaded(split: Split, device: torch.device, workers: int | None) -> ResidentImages:
    cores = len(os.sched_getaffinity(0)) if workers is None else max(1, workers * num_local_ranks())
    key = "" if num_local_ranks() == 1 else _identity(split)
    arrays, is_ours = made_once(key, lambda: _decode_all(split, device, cores))
    if not is_ours and device.type == "cuda":  # who decoded has looked before
        _require_room(len(arrays["pixels"]), device)
    unreadable: dict[str, str] = json.loads(arrays["unreadable"].tobytes())
    return ResidentImages(
        images=PackedImages.side_by_side(
            torch.from_numpy(arrays["pixels"]).to(device), arrays["heights"], arrays["widths"]
        ),
        unreadable={int(index): reason for index, reason in unreadable.items()},
        num_decodes=int(arrays["num_decodes"][0]) if is_ours else 0,
        source_index=arrays["source_index"],
    )


def _identity(split: Split) -> str:
    """Of the images, by their names, labels and some of their bytes: 32 digits, the same on all ranks."""
    digest = hashlib.sha256(split.names.blob + split.names.offsets.tobytes() + split.labels.tobytes())
    for index in np.linspace(0, len(split) - 1, min(_SIZE_SAMPLES, len(split))).astype(int).tolist():
        with suppress(OSError):
            digest.update(split.read(index))
    return digest.hexdigest()[:32]


def _decode_all(split: Split, device: torch.device, num_threads: int) -> dict[str, npt.NDArray[Any]]:
    """The pixels of all images, and what `ResidentImages` has beside them."""
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

    with ThreadPoolExecutor(num_threads) as pool:
        blocks = [range(start, min(start + _BLOCK, len(split))) for start in range(0, len(split), _BLOCK)]
        list(pool.map(partial(_for_each, measure), blocks))
        sizes = 3 * heights * widths
        offsets = np.cumsum(sizes) - sizes
        for place in dict.fromkeys((device, torch.device("cpu"))):
            _require_room(int(sizes.sum()), place)
        pixels = np.zeros(int(sizes.sum()), dtype=np.uint8)
        with progress("decoding, once", len(split)) as advance:
            for done in pool.map(partial(_for_each, decode), blocks):
                advance(done)

    if len(unreadable) == len(split):
        raise none_readable(split, unreadable)
    return {
        "pixels": pixels,
        "heights": heights,
        "widths": widths,
        "source_index": substitutes.replace(np.arange(len(split), dtype=np.int64)),
        "num_decodes": np.array([len(decoded)]),
        "unreadable": np.frombuffer(json.dumps(dict(sorted(unreadable.items()))).encode(), dtype=np.uint8),
    }


def _for_each(call: Callable[[int], None], block: range) -> int:
    for index in block:
        call(index)
    return len(block)


def room_for_pixels(device: torch.device) -> int:
    """Bytes that decoded images may take on a device, and on the host, where they are decoded."""
    return int(_MEMORY_SHARE * min(_available_bytes(place) for place in {device, torch.device("cpu")}))


def _require_room(num_bytes: int, place: torch.device) -> None:
    available = _available_bytes(place)
    if num_bytes > _MEMORY_SHARE * available:
        raise ValueError(
            f"the decoded images take {num_bytes / 2**30:.1f} GiB, but {place} has {available / 2**30:.1f} GiB free "
            f"and at most {_MEMORY_SHARE:.0%} of that may be used; choose --loader torchvision"
        )


def _available_bytes(place: torch.device) -> int:
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    # Not SC_AVPHYS_PAGES: that leaves out the page cache, which a first pass over the data fills.
    with open("/proc/meminfo") as lines:
        sizes_kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return 1024 * sizes_kib["MemAvailable"]
