"""A small data set decoded once and kept on the device; the loaders of one process share it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from dataset_tools.sources import Split
from pipelines.crop_resize import PackedImages
from pipelines.decode import UnreadableImageError, decode_rgb, image_size

_SIZE_SAMPLES = 64
_MEMORY_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class ResidentImages:
    """All images of a split, decoded."""

    images: PackedImages
    unreadable: dict[int, str]
    """Index of each image that could not be decoded -> the reason; it has a size of 1 x 1 here."""
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
    """Decode a split on ``workers`` threads (one per core by default), or hand out the copy made earlier.

    Raises ValueError if no image can be read or if the pixels do not fit in memory.
    """
    copies = _LOADED.setdefault(split, {})
    if device not in copies:
        copies[device] = _decode_all(split, device, workers)
    return copies[device]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


_LOADED: WeakKeyDictionary[Split, dict[torch.device, ResidentImages]] = WeakKeyDictionary()


def _decode_all(split: Split, device: torch.device, workers: int | None) -> ResidentImages:
    heights = np.ones(len(split), dtype=np.int64)
    widths = np.ones(len(split), dtype=np.int64)
    unreadable: dict[int, str] = {}

    def measure(index: int) -> None:
        try:
            heights[index], widths[index] = image_size(split, index)
        except UnreadableImageError as error:
            unreadable[index] = str(error)

    def decode(index: int) -> None:
        if index in unreadable:
            return
        try:
            image = np.asarray(decode_rgb(split, index))
            start = offsets[index]
            pixels[start : start + image.size] = image.reshape(-1)
        except UnreadableImageError as error:
            unreadable[index] = str(error)

    with ThreadPoolExecutor(workers or available_cores()) as pool:
        list(pool.map(measure, range(len(split)), chunksize=64))
        sizes = 3 * heights * widths
        offsets = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        _check_memory(int(sizes.sum()), device)
        pixels = np.zeros(int(sizes.sum()), dtype=np.uint8)
        list(pool.map(decode, range(len(split)), chunksize=64))

    return ResidentImages(
        images=PackedImages(
            pixels=torch.from_numpy(pixels).to(device), offsets=offsets, heights=heights, widths=widths
        ),
        unreadable=dict(sorted(unreadable.items())),
        source_index=_readable_source(len(split), unreadable),
    )


def _readable_source(num_images: int, unreadable: dict[int, str]) -> npt.NDArray[np.int64]:
    if len(unreadable) == num_images:
        index, reason = next(iter(unreadable.items()))
        raise ValueError(f"none of the {num_images} images can be read; image {index}: {reason}")
    source = np.arange(num_images, dtype=np.int64)
    for index in unreadable:
        substitute = index
        while substitute in unreadable:
            substitute = (substitute + 1) % num_images
        source[index] = substitute
    return source


def _check_memory(num_bytes: int, device: torch.device) -> None:
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > _MEMORY_SHARE * available:
        raise ValueError(
            f"the decoded images take {num_bytes / 2**30:.1f} GiB, but {device} has {available / 2**30:.1f} GiB free "
            f"and at most {_MEMORY_SHARE:.0%} of that may be used; choose --loader torchvision"
        )
