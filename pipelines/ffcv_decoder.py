"""What FFCV runs for a batch: each image read, decoded once, and cut into its views. Importing this needs FFCV.

Two things are not done as FFCV's own decoders do them. Encoded images are read with `pread` and not through a memory
map: a mapped file that is cut short while training kills the process (SIGBUS). And the TurboJPEG that FFCV is linked to
is asked for the accurate DCT: FFCV's `imdecode` asks for the fast one, which is a few percent faster and one level of
255 off; it also leaks a decompressor for each thread there ever was.
Legend: B images of a batch, V views, S side of a view, T threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ffcv._libffcv
import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from ffcv.loader import Loader
from ffcv.pipeline import Compiler, PipelineSpec
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.extending import intrinsic

from dataset_tools.formats.records import RAW
from pipelines.box_resize import resize_box, scratch_size

DESCRIPTOR, CROPS_ADDRESS, NEXT_ROW = range(3)
"""Places in `DecodeState.control`."""

_PIXEL_RGB, _ACCURATE_DCT = 0, 4096  # TJPF_RGB, TJFLAG_ACCURATEDCT


def _turbojpeg() -> ctypes.CDLL:
    """The library that FFCV's own is linked to, with the functions we use; compiled code knows them by name."""
    library = ctypes.CDLL(ffcv._libffcv.__file__)
    try:
        library.tjInitDecompress.restype = ctypes.c_void_p
        library.tjDestroy.argtypes = [ctypes.c_void_p]
        for name in ("tjDecompressHeader3", "tjDecompress2"):
            llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    except AttributeError as error:
        raise ImportError(f"FFCV's library has no TurboJPEG behind it: {error}") from error
    return library


_LIBRARY = _turbojpeg()
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
_pread = types.ExternalFunction("pread", types.intp(types.int32, _ADDRESS, types.uint64, types.int64))


@dataclass(frozen=True, slots=True)
class DecodeState:
    """Everything that a batch is decoded with, in arrays that stay where they are: FFCV takes them once an epoch.

    Scratch is per thread; FFCV's own decoders have it for each sample of each batch ahead.
    """

    control: npt.NDArray[np.int64]  # [3], see above
    num_bytes: npt.NDArray[np.int64]  # [B], of each encoded image
    boxes: npt.NDArray[np.int64]  # [B, V, 4]
    failed: npt.NDArray[np.bool_]  # [B], out: this row was not decoded
    num_decodes: npt.NDArray[np.int64]  # [T], out: calls of tjDecompress2
    decompressors: npt.NDArray[np.int64]  # [T], TurboJPEG's handles, between `open` and `close`
    headers: npt.NDArray[np.int32]  # [T, 4]: width, height, subsampling, color space
    encoded: npt.NDArray[np.uint8]  # [T, largest file]
    pixels: npt.NDArray[np.uint8]  # [T, largest image and a byte]
    resize_scratch: npt.NDArray[np.uint32]  # [T, ·]

    @classmethod
    def allocate(
        cls,
        num_threads: int,
        batch_size: int,
        num_views: int,
        view_size: int,
        heights: npt.NDArray[np.int64],
        widths: npt.NDArray[np.int64],
        num_bytes: npt.NDArray[np.int64],
    ) -> DecodeState:
        """heights, widths, num_bytes: int64 [N], of all images that may come."""
        max_pixels = int((heights * widths).max())
        resize_size = scratch_size(int(heights.max()), int(widths.max()), view_size)
        return cls(
            control=np.zeros(3, dtype=np.int64),
            num_bytes=np.zeros(batch_size, dtype=np.int64),
            boxes=np.zeros((batch_size, num_views, 4), dtype=np.int64),
            failed=np.zeros(batch_size, dtype=np.bool_),
            num_decodes=np.zeros(num_threads, dtype=np.int64),
            decompressors=np.zeros(num_threads, dtype=np.int64),
            headers=np.zeros((num_threads, 4), dtype=np.int32),
            encoded=np.empty((num_threads, int(num_bytes.max())), dtype=np.uint8),
            pixels=np.empty((num_threads, 3 * max_pixels + 1), dtype=np.uint8),
            resize_scratch=np.empty((num_threads, resize_size), dtype=np.uint32),
        )

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """As `decode_batch` takes them: in the order above."""
        return (
            self.control, self.num_bytes, self.boxes, self.failed, self.num_decodes, self.decompressors, self.headers,
            self.encoded, self.pixels, self.resize_scratch,
        )  # fmt: skip

    def open(self) -> None:
        """Before batches are decoded."""
        self.decompressors[:] = [_LIBRARY.tjInitDecompress() for _ in self.decompressors]

    def close(self) -> None:
        """When nothing is decoded any more; may be called twice."""
        for handle in self.decompressors[self.decompressors != 0].tolist():
            _LIBRARY.tjDestroy(handle)
        self.decompressors[:] = 0


class CropDecoder(Operation):
    """FFCV's decoder of the image field. The crops go where `DecodeState.control` says; returned is what failed."""

    def __init__(self, view_size: int, num_threads: int) -> None:
        super().__init__()
        self._view_size = view_size
        self._decode_batch = _decode_batch_alone if num_threads == 1 else _decode_batch_in_threads

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=True, shape=(), dtype=np.dtype(np.bool_)), None

    def generate_code(self) -> Callable[..., npt.NDArray[np.bool_]]:
        decode_batch, view_size = self._decode_batch, self._view_size

        def decode(batch_indices, memory, metadata, storage_state):  # type: ignore[no-untyped-def]
            return decode_batch(batch_indices, metadata, view_size, storage_state)

        return decode


def open_beton(path: str, image_decoder: CropDecoder, **settings: int) -> Loader:
    """The stock loader of a .beton, with our decoder and without labels; it still needs a memory manager and an order.

    settings: batch_size, num_workers, batches_ahead.
    """
    # FFCV makes numba's one and only type of uint8 arrays immutable; what is compiled for it would be found no more.
    bytes_type = types.uint8[::1]
    Compiler.set_enabled(False)  # our decoder is compiled, once for all loaders of the process
    try:
        loader = Loader(
            path,
            pipelines={"image": PipelineSpec("image", decoder=image_decoder), "label": None},
            os_cache=True,
            drop_last=False,
            seed=0,  # else it would be drawn from numpy's global generator
            **settings,
        )
    finally:
        Compiler.set_enabled(True)
        bytes_type.mutable = True
    loader.memory_manager = None  # its tables, several hundred bytes for each sample, serve FFCV's caches alone
    return loader


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer to bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(types.int64), generate


@intrinsic
def _take(typing_context: Any, address: Any) -> Any:
    """Adds one to the int64 at an address and returns what was there, as one step that no thread can interrupt."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.int64), generate


@njit(nogil=True, error_model="numpy")
def _decode_row(sample, row, thread, images, crops, state):  # type: ignore[no-untyped-def]
    """Reads, decodes and cuts one image. Returns whether it could."""
    control, all_num_bytes, boxes, _, num_decodes, decompressors, headers, all_encoded, all_pixels, scratch = state
    image = images[sample]
    height, width = np.int64(image["height"]), np.int64(image["width"])  # as uint16 their product would overflow
    num_bytes, offset = all_num_bytes[row], np.int64(image["data_ptr"])
    descriptor, decompressor = control[DESCRIPTOR], decompressors[thread]
    pixels, encoded, header = all_pixels[thread], all_encoded[thread], headers[thread]
    if image["mode"] == RAW:
        if num_bytes != 3 * height * width or _pread(descriptor, pixels.ctypes.data, num_bytes, offset) != num_bytes:
            return False
    else:
        if _pread(descriptor, encoded.ctypes.data, num_bytes, offset) != num_bytes:
            return False
        place = header.ctypes.data
        if _read_header(decompressor, encoded.ctypes.data, num_bytes, place, place + 4, place + 8, place + 12) != 0:
            return False
        if header[0] != width or header[1] != height:  # TurboJPEG would scale it without a word
            return False
        num_decodes[thread] += 1
        result = _decompress(
            decompressor, encoded.ctypes.data, num_bytes, pixels.ctypes.data,
            width, 0, height, _PIXEL_RGB, _ACCURATE_DCT,
        )  # fmt: skip
        if result != 0:  # an error, or only a warning: the host looks again, with Pillow
            return False
    for view in range(boxes.shape[1]):
        top, left, box_height, box_width = boxes[row, view]
        crop = crops[row, view].reshape(-1)
        resize_box(pixels, width, top, left, box_height, box_width, crops.shape[2], crop, scratch[thread])
    return True


def _decode_batch(samples, images, view_size, state):  # type: ignore[no-untyped-def]
    """Returns which rows failed: bool [B].

    Iteration t uses scratch number t and takes one row after the other from a common counter: no two threads share
    scratch, whichever of them runs an iteration, and none is idle while there are rows.
    """
    control, boxes, failed, num_decodes = state[0], state[2], state[3], state[4]
    count = len(samples)
    crops = carray(_pointer(control[CROPS_ADDRESS]), (count, boxes.shape[1], view_size, view_size, 3), np.uint8)
    control[NEXT_ROW] = 0
    counter = control.ctypes.data + 8 * NEXT_ROW
    for thread in prange(len(num_decodes)):
        row = _take(counter)
        while row < count:
            failed[row] = not _decode_row(samples[row], row, thread, images, crops, state)
            row = _take(counter)
    return failed[:count].copy()


_decode_batch_alone = njit(nogil=True, error_model="numpy")(_decode_batch)
_decode_batch_in_threads = njit(nogil=True, error_model="numpy", parallel=True)(_decode_batch)
