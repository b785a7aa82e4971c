"""Batches of JPEGs decoded once each, by the TurboJPEG that FFCV is linked to, and cut into views in the same threads.

FFCV's library is loaded, and nothing of FFCV is imported: it would change how many threads torch and numba use. Its own
`imdecode` asks for TurboJPEG's fast DCT, which is a few percent faster and one level of 255 off; here the accurate one
is asked for, so that pixels are Pillow's, as far as both have the same libjpeg-turbo inside.
Legend: B images of a batch, V views, S side of a view.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipelines.crop_resize_numba import box_geometry, compiled_kernel, packed, scratch_size
from pipelines.encoded_batches import EncodedBatch
from pipelines.threads import WorkerThreads

_SHARES = 4  # of a batch that each thread takes, about: some images are larger than others
_PIXEL_RGB, _ACCURATE_DCT = 0, 4096  # TJPF_RGB, TJFLAG_ACCURATEDCT


@cache
def load_turbojpeg() -> ctypes.CDLL:
    """The library. Raises ImportError, with the reason, if it is missing."""
    spec = find_spec("ffcv")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for path in sorted(folder.glob("_libffcv*.so"))]
    if not found:
        raise ImportError("there is no _libffcv in the package ffcv" if spec else "No module named 'ffcv'")
    try:
        library = ctypes.CDLL(str(found[0]))
        library.tjInitDecompress.restype = ctypes.c_void_p
        library.tjDestroy.argtypes = [ctypes.c_void_p]
        image, place, number = (ctypes.c_void_p, ctypes.c_ulong), ctypes.c_void_p, ctypes.c_int
        library.tjDecompress2.argtypes = [ctypes.c_void_p, *image, place, number, number, number, number, number]
    except OSError as error:
        raise ImportError(str(error)) from error
    except AttributeError as error:
        raise ImportError(f"FFCV's library has no TurboJPEG behind it: {error}") from error
    return library


@dataclass(slots=True)
class _Memory:
    """What one image at a time is decoded and cut with."""

    decompressor: int
    pixels: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    scratch: npt.NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, dtype=np.uint32))


class BatchDecoder:
    """Decodes several batches at a time in ``num_threads`` threads: they go on to the next one at once."""

    def __init__(
        self, num_threads: int, view_size: int, fill: tuple[int, int, int], at_start: Callable[[], None]
    ) -> None:
        """at_start: each thread calls it first."""
        self._library, self._resize = load_turbojpeg(), compiled_kernel()
        self._view_size, self._fill, self._num_shares = view_size, packed(fill), _SHARES * num_threads
        self._idle = SimpleQueue[_Memory]()
        for _ in range(num_threads):
            self._idle.put(_Memory(int(self._library.tjInitDecompress())))
        self._threads = WorkerThreads("FFCV decoder", num_threads, at_start)

    def start(self, batch: EncodedBatch, crops: Tensor) -> list[Future[list[int]]]:
        """Begin to fill ``crops``, uint8 [B, V, S, S, 3] on the host, with the views of a batch at its boxes.

        The results of the futures are the rows of which TurboJPEG gave an error or a warning; their crops mean nothing.
        """
        if not len(batch):
            return []
        boxes, num_views = batch.boxes.reshape(-1, 8), batch.boxes.shape[1]
        widths = np.repeat(batch.widths, num_views)
        geometry = box_geometry(np.zeros_like(widths), widths, boxes)
        target = crops.numpy().view(np.int8).reshape(-1)  # not uint8: FFCV, imported, makes numba's type read-only
        work = batch, geometry, target, scratch_size(boxes, self._view_size)
        count = min(len(batch), self._num_shares)
        return [self._threads.submit(self._decode, range(share, len(batch), count), *work) for share in range(count)]

    def _decode(
        self,
        rows: range,
        batch: EncodedBatch,
        geometry: npt.NDArray[np.int64],
        target: npt.NDArray[np.int8],
        scratch_needed: int,
    ) -> list[int]:
        """Some images; those that Pillow has decoded are only cut. Neither library holds Python's lock meanwhile."""
        memory, num_views, failed = self._idle.get(), batch.boxes.shape[1], list[int]()
        try:
            if len(memory.scratch) < scratch_needed:
                memory.scratch = np.empty(scratch_needed, dtype=np.uint32)
            for row in rows:
                image, height, width = batch.images[row], int(batch.heights[row]), int(batch.widths[row])
                if image.ndim == 1:
                    if len(memory.pixels) < 3 * height * width:
                        memory.pixels = np.empty(3 * height * width, dtype=np.uint8)
                    given, pixels = (_address(image), len(image)), _address(memory.pixels)
                    size = width, 0, height  # it would scale the image to another one
                    if self._library.tjDecompress2(
                        memory.decompressor, *given, pixels, *size, _PIXEL_RGB, _ACCURATE_DCT
                    ):
                        failed.append(row)
                        continue
                    image = memory.pixels
                numbers = np.arange(row * num_views, (row + 1) * num_views)
                self._resize(
                    image.reshape(-1), geometry, numbers, self._view_size, self._fill, target, memory.scratch
                )  # fmt: skip
        finally:
            self._idle.put(memory)
        return failed

    def close(self) -> None:
        """When nothing is decoded any more; may be called twice."""
        self._threads.close()
        while not self._idle.empty():
            self._library.tjDestroy(self._idle.get().decompressor)


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
