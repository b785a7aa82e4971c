"""NVIDIA DALI decodes each image once, on a GPU or on the CPU, and `crop_resize` cuts all of its views there.

The order and the encoded bytes are ours and are fed in, and so are the boxes, so that the crops are those of every
other loader. On the CPU they are Pillow's to the last bit; on a GPU its decoder's rounding is the one difference. The
GPU path was written without a GPU at hand; but for the device, it is the code that runs on the CPU.

The graph is a classic `Pipeline`: DALI's dynamic mode took 3 to 6 % more CPU time for the same work, and is
experimental. nvImageCodec, which decodes in it, has a Python package of its own; its images go to torch by DLPack,
which needs a driver even for those of its CPU decoder (0.9.0), so that nothing around it could be tried without a GPU.
"""

from __future__ import annotations

import io
import math
from collections import deque
from concurrent.futures import CancelledError
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from dataset_tools.sources import Split
from dataset_tools.sources.converted import ConvertedSplit
from pipelines.byte_readers import base_of
from pipelines.encoded_batches import Bytes, EncodedBatch
from pipelines.encoded_loader import EncodedLoader, Pass
from pipelines.loader import DecodedBatch

_PREALLOCATED_PIXELS = 1 << 28
"""Over all decoding threads: what nvJPEG may keep for the largest image, 0.75 GiB."""


class DaliLoader(EncodedLoader):
    """Bytes in, crops out: one decode of each image, one resize for each view.

    DALI decodes ``prefetch_batches`` ahead, beside as many that are read ahead; only the decoding thread talks to it. A
    batch that DALI cannot decode is fed again without the images at fault.
    Raises ImportError where DALI is not installed.
    """

    name = "dali"
    package = "nvidia.dali"
    installing = "pip install 'leoclr-fast[dali]'"
    decoder = "DALI"
    queues_batches = True
    auto_places: ClassVar = {"cuda": 1, "cpu": 2}
    drawbacks: ClassVar = {"cpu": "slower on a .beton"}
    decodes_on_gpu = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _import_dali()
        self._hints = _decoder_hints(self.split, self.order.max_local_batch_size, self.num_threads)
        # What follows belongs to the decoding thread.
        self._pipeline: Any = None
        self._in_flight: deque[EncodedBatch] = deque()
        self._current: Pass | None = None
        """The pass whose batches are in flight."""

    # ---- what the decoding thread does ----------------------------------------------------------------------------

    def decode_next(self, current: Pass) -> DecodedBatch:
        try:
            if self._current is not current:
                if self._in_flight:  # of a pass that was left
                    self._drop_pipeline()
                self._current = current
            self._feed_ahead(current)
            while (decoded := self._decoded()) is None:
                self._feed_again()
            self._in_flight.popleft()
            return decoded
        except CancelledError:
            raise
        except BaseException:
            self._drop_pipeline()  # who knows what state it is in
            raise

    def _feed_ahead(self, current: Pass) -> None:
        while len(self._in_flight) < self.config.prefetch_batches and not current.is_read:
            self._feed(self.next_read(current))

    def _feed(self, batch: EncodedBatch) -> None:
        self._in_flight.append(batch)  # DALI copies nothing: the bytes have to stay until it is through
        if not len(batch):
            return
        batch.images = [image if image.ndim == 1 else _as_ppm(image) for image in batch.images]
        if self._pipeline is None:
            self._doing = "starting DALI"
            self._pipeline = self._started_pipeline()
        self._feed_pipeline(self._pipeline, batch.images)
        self._num_decodes += len(batch)

    def _decoded(self) -> DecodedBatch | None:
        """The oldest batch in flight; None if it has to be fed again."""
        batch = self._in_flight[0]
        self._doing = f"decoding step {batch.step} of epoch {batch.epoch}"
        if not len(batch):
            return self.cut(batch, [])
        try:
            (images,) = self._pipeline.share_outputs()
        except RuntimeError as error:
            self.find_fault(batch, error)
            return None
        decoded = None
        if self.has_true_sizes(batch, np.array(images.shape(), dtype=np.int64)[:, :2]):
            decoded = self.cut(batch, (torch.from_dlpack(images[row]) for row in range(len(batch))))
        del images
        self._pipeline.release_outputs()
        return decoded

    def try_to_decode(self, batch: EncodedBatch, rows: list[int]) -> None:
        probe = self._built_pipeline(batch_size=len(rows), prefetch=1, num_threads=self.num_threads)
        self._feed_pipeline(probe, [batch.images[row] for row in rows])
        probe.share_outputs()

    def _feed_again(self) -> None:
        """A pipeline that has failed is not valid any more: everything in flight goes through another one."""
        again = [(batch.epoch, batch.step) for batch in self._in_flight]
        self._drop_pipeline()
        for epoch, step in again:
            self._doing = f"reading the images of step {step} again"
            self._feed(self.prepare(epoch, step))

    def _drop_pipeline(self) -> None:
        self._pipeline = None
        self._in_flight.clear()

    def give_back(self) -> None:
        self._drop_pipeline()
        if self.device.type == "cuda":
            import_module("nvidia.dali.backend").ReleaseUnusedMemory()  # it pools what its pipelines have let go

    def _feed_pipeline(self, pipeline: Any, images: list[Bytes], *, run: bool = True) -> None:
        pipeline.feed_input("encoded", images)
        if run:
            pipeline.schedule_run()

    def _started_pipeline(self) -> Any:
        """A pipeline that has run once. The first run fills its whole queue, so that an epoch shorter than that would
        never get through.
        """
        prefetch = self.config.prefetch_batches
        pipeline = self._built_pipeline(self.order.max_local_batch_size, prefetch, self.num_threads)
        for _ in range(prefetch):
            self._feed_pipeline(pipeline, [_SMALL_JPEG], run=False)
        pipeline.schedule_run()
        for _ in range(prefetch):
            pipeline.share_outputs()
            pipeline.release_outputs()
        return pipeline

    def _built_pipeline(self, batch_size: int, prefetch: int, num_threads: int) -> Any:
        """Its output: the images, B times uint8 [H, W, 3], on the device."""
        pipeline_class, fn, types = _import_dali()
        on_gpu = self.device.type == "cuda"
        pipeline = pipeline_class(
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=prefetch,
        )
        mixed = {"hw_decoder_load": self.config.hw_decoder_load, "jpeg_fancy_upsampling": True, **self._hints}
        with pipeline:
            images = fn.decoders.image(
                fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True),
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,  # torchvision does not rotate either
                **(mixed if on_gpu else {}),
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline


def _import_dali() -> tuple[Any, Any, Any]:
    """DALI's Pipeline, functions and types. Raises ImportError, with what to do, where it is missing."""
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise ImportError(
            f"the loader dali needs NVIDIA DALI, which cannot be imported ({error}). Install it by "
            "`pip install 'leoclr-fast[dali]'` (CUDA 13) or 'leoclr-fast[dali-cu12]'; without it --loader auto, "
            "resident and torchvision work"
        ) from error
    return Pipeline, fn, types


def _decoder_hints(split: Split, batch_size: int, num_threads: int) -> dict[str, int]:
    """What DALI's GPU decoder should allocate at its start, where the data set knows how large its images are."""
    base, _ = base_of(split)
    if not isinstance(base, ConvertedSplit):
        return {}
    heights, widths = (np.asarray(base.records[side], dtype=np.int64) for side in ("height", "width"))
    decoded_bytes = 3 * heights * widths
    # The images of a batch lie behind one another; four standard deviations of its mean are never seen exceeded.
    bytes_per_image = decoded_bytes.mean() + 4 * decoded_bytes.std() / math.sqrt(batch_size)
    height, width = int(heights.max()), int(widths.max())
    scale = min(1.0, math.sqrt(_PREALLOCATED_PIXELS / (height * width * num_threads)))
    return {
        "bytes_per_sample_hint": int(min(bytes_per_image, decoded_bytes.max())),
        "preallocate_height_hint": int(height * scale),
        "preallocate_width_hint": int(width * scale),
    }


def _as_ppm(pixels: Bytes) -> Bytes:
    """pixels: uint8 [H, W, 3]."""
    header = b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0])
    return np.concatenate((np.frombuffer(header, dtype=np.uint8), pixels.reshape(-1)))


def _small_jpeg() -> Bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(encoded, "JPEG")
    return np.frombuffer(encoded.getvalue(), dtype=np.uint8)


_SMALL_JPEG = _small_jpeg()
