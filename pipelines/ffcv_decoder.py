"""Batches of JPEGs decoded once each, by the TurboJPEG that FFCV is linked to, and cut into views in the same threads.

FFCV's library is loaded, and nothing of FFCV is imported: it would change how many threads torch and numba use. Its own
`imdecode` asks for TurboJPEG's fast DCT, which is a few percent faster and one level of 255 off; here the accurate one
is asked for, so that pixels are Pillow's, as far as both have the same libjpeg-turbo inside.
Legend: B images of a batch, V views, S side of a view.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from pipelines.crop_resize_numba import packed, resize_box, scratch_size
from pipelines.encoded_batches import EncodedBatch
from pipelines.threads import run_in_threads

_SHARES = 8  # that each thread takes, about: some images are larger than others
_PIXEL_RGB, _ACCURATE_DCT = 0, 4096  # TJPF_RGB, TJFLAG_ACCURATEDCT

_ADDRESS = types.intp
_read_header = types.ExternalFunction(
    "tjDecompressHeader3", types.int32(_ADDRESS, _ADDRESS, types.uint64, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS)
)
_decompress = types.ExternalFunction(
    "tjDecompress2",
    types.int32(
        _ADDRESS, _ADDRESS, types.uint64, _ADDRESS, types.int32, types.int32, types.int32, types.int32, types.int32
    ),
)


@cache
def load_turbojpeg() -> ctypes.CDLL:
    """The library; compiled code knows its functions by name. Raises ImportError, with the reason, if it is missing."""
    spec = find_spec("ffcv")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for path in sorted(folder.glob("_libffcv*.so"))]
    if not found:
        raise ImportError("there is no _libffcv in the package ffcv" if spec else "No module named 'ffcv'")
    try:
        library = ctypes.CDLL(str(found[0]))
        library.tjInitDecompress.restype = ctypes.c_void_p
        library.tjDestroy.argtypes = [ctypes.c_void_p]
        for name in ("tjDecompressHeader3", "tjDecompress2"):
            llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    except OSError as error:
        raise ImportError(str(error)) from error
    except AttributeError as error:
        raise ImportError(f"FFCV's library has no TurboJPEG behind it: {error}") from error
    return library


class BatchDecoder:
    """Decodes batches in ``num_threads`` threads, each with a decompressor and memory of its own."""

    def __init__(self, num_threads: int, view_size: int, fill: tuple[int, int, int]) -> None:
        self._library = load_turbojpeg()
        self._view_size, self._fill = view_size, packed(fill)
        self._decompressors = [int(self._library.tjInitDecompress()) for _ in range(num_threads)]

    def decode(self, batch: EncodedBatch, crops: Tensor) -> npt.NDArray[np.int64]:
        """Fill ``crops``, uint8 [B, V, S, S, 3] on the host, with the views of a batch at its boxes.

        Returns height and width of each image, int64 [B, 2], pixels: 0 where TurboJPEG gave an error or a warning.
        Where they are not those of the batch, the crops mean nothing.
        """
        is_encoded = np.array([image.ndim == 1 for image in batch.images], dtype=np.bool_)
        addresses = np.array([image.__array_interface__["data"][0] for image in batch.images], dtype=np.int64)
        num_bytes = np.array([len(image) for image in batch.images], dtype=np.int64)
        sizes = np.stack((batch.heights, batch.widths), axis=1)
        true_sizes = sizes.copy()
        boxes = batch.boxes.astype(np.int64)
        target = crops.numpy().view(np.int8).reshape(-1)  # not uint8: FFCV, imported, makes numba's type read-only
        pixels_size = 3 * int((batch.heights * batch.widths).max()) + 1
        resize_size = scratch_size(batch.boxes.reshape(-1, 8), self._view_size)

        num_threads = min(len(self._decompressors), len(batch))
        num_shares = min(len(batch), _SHARES * num_threads) if num_threads > 1 else 1
        shares = iter([np.arange(share, len(batch), num_shares) for share in range(num_shares)])
        decompressors = iter(self._decompressors)

        def work() -> None:
            decompressor = next(decompressors)
            header = np.zeros(4, dtype=np.int32)  # width, height, subsampling, colour space
            pixels, scratch = np.empty(pixels_size, dtype=np.uint8), np.empty(resize_size, dtype=np.uint32)
            for rows in shares:
                _decode_rows(
                    rows, addresses, num_bytes, is_encoded, sizes, boxes, true_sizes, target, self._view_size,
                    self._fill, decompressor, header, pixels, scratch,
                )  # fmt: skip

        run_in_threads(work, num_threads)
        return true_sizes

    def close(self) -> None:
        """When nothing is decoded any more; may be called twice."""
        while self._decompressors:
            self._library.tjDestroy(self._decompressors.pop())


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer to bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(types.int64), generate


@njit(nogil=True, error_model="numpy")
def _decode_rows(  # type: ignore[no-untyped-def]
    rows, addresses, num_bytes, is_encoded, sizes, boxes, true_sizes, crops, view_size, fill,
    decompressor, header, pixels, scratch,
):  # fmt: skip
    """Decodes and cuts some images of a batch; those that Pillow has decoded are only cut."""
    length = 3 * view_size * view_size
    place = header.ctypes.data
    for row in rows:
        height, width = sizes[row]
        image = pixels
        if not is_encoded[row]:
            image = carray(_pointer(addresses[row]), (3 * height * width,), np.uint8)
        else:
            true_sizes[row] = 0
            if _read_header(
                decompressor, addresses[row], num_bytes[row], place, place + 4, place + 8, place + 12
            ) != 0:  # fmt: skip
                continue
            if header[0] != width or header[1] != height:  # TurboJPEG would scale it without a word
                true_sizes[row, 0], true_sizes[row, 1] = header[1], header[0]
                continue
            result = _decompress(
                decompressor, addresses[row], num_bytes[row], pixels.ctypes.data,
                width, 0, height, _PIXEL_RGB, _ACCURATE_DCT,
            )  # fmt: skip
            if result != 0:  # an error, or only a warning: the host looks again, with Pillow
                continue
            true_sizes[row, 0], true_sizes[row, 1] = height, width
        for view in range(boxes.shape[1]):
            first = (row * boxes.shape[1] + view) * length
            resize_box(image, width, boxes[row, view], view_size, fill, crops[first : first + length], scratch)
