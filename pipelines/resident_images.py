"""A small data set decoded once and kept on the device; the loaders of one process share it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from dataset_tools.sources import Split
from pipelines.cores import available_cores
from pipelines.decode import UnreadableImageError, decode_rgb, image_size, next_index, none_readable
from pipelines.packed_images import PackedImages

_SIZE_SAMPLES = 64
_MEMORY_SHARE = 0.8


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

    Raises ValueError if no image can be read or if the pixels do not fit in memory.
    """
    copies = _LOADED.setdefault(split, {})
    if device not in copies:
        copies[device] = _decode_all(split, device, workers)
    return copies[device]


_LOADED: WeakKeyDictionary[Split, dict[torch.device, ResidentImages]] = WeakKeyDictionary()


def _decode_all(split: Split, device: torch.device, workers: int | None) -> ResidentImages:
    heights = np.ones(len(split), dtype=np.int64)
    widths = np.ones(len(split), dtype=np.int64)
    unreadable: dict[int, str] = {}
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
        num_decodes=len(decoded),
        source_index=_readable_source(split, unreadable),
    )


def _readable_source(split: Split, unreadable: dict[int, str]) -> npt.NDArray[np.int64]:
    if len(unreadable) == len(split):
        raise none_readable(split, unreadable)
    source = np.arange(len(split), dtype=np.int64)
    for index in unreadable:
        substitute = index
        while substitute in unreadable:
            substitute = next_index(substitute, len(split))
        source[index] = substitute
    return source


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
