"""NVIDIA DALI decodes each image once; on a GPU it also cuts all of its views, on the CPU `crop_resize` does.

The order, the boxes and the encoded bytes are ours and are fed in, so that the crops are those of every other loader.
On the CPU they are Pillow's to the last bit; DALI's own resize takes several times as long. On a GPU it is DALI's,
whose filter reads beyond the box in the outer two pixels of a crop; inside, it differed from Pillow's by at most one
level when it was tried on a CPU. The GPU path was written without a GPU at hand and has not run yet.

The graph is a classic `Pipeline`: DALI's dynamic mode took 3 to 6 % more CPU time for the same work, and is
experimental.
Legend: B images, V views, S side of a view.
"""

from __future__ import annotations

import atexit
import io
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dataset_tools.sources import Split
from dataset_tools.sources.converted import ConvertedSplit
from dataset_tools.sources.split import SubsetSplit
from pipelines.batch import CropBatch
from pipelines.cores import available_cores
from pipelines.crop_resize import crop_resize
from pipelines.decode import UnreadableImageError, decode_rgb
from pipelines.encoded_batches import EncodedBatch, EncodedBatches
from pipelines.loader import Loader
from pipelines.packed_images import PackedImages
from pipelines.worker_threads import WorkerThreads

T = TypeVar("T")

_PREALLOCATED_PIXELS = 1 << 28
"""Over all decoding threads: what nvJPEG may keep for the largest image, 0.75 GiB."""


class DaliLoader(Loader):
    """Bytes and boxes in, crops out: one decode of each image, one resize for each view.

    Threads read ``prefetch_batches`` ahead; one more thread feeds DALI, which decodes as many ahead, and fetches what
    is done. Only that thread talks to DALI. A batch that DALI cannot decode is fed again without the images at fault.
    Raises ImportError where DALI is not installed, ValueError for a device that is not there.
    """

    name = "dali"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _import_dali()
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"DALI decodes on cpu or cuda, not on {self.device}; choose --loader torchvision")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"DALI is to decode on {self.device}, but this machine has no CUDA device; give --device cpu"
            )
        self._batches = EncodedBatches(self.split, self.views, self.view_config, self.order, seed=self.seed)
        self._hints = _decoder_hints(self.split, self.order.max_local_batch_size, self._num_threads)
        self._readers: WorkerThreads | None = None
        self._feeder: WorkerThreads | None = None
        self._pass: _Pass | None = None
        # What follows belongs to the feeder.
        self._pipeline: Any = None
        self._in_flight: deque[EncodedBatch] = deque()
        self._copy_stream: torch.cuda.Stream | None = None
        self._doing = "starting"

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
        feeder = self._open()
        if self._pass is not None:
            self._pass.cancel()
        current = self._pass = _Pass(epoch, start_step, self.steps_per_epoch)
        try:
            if start_step < self.steps_per_epoch:
                current.next_batch = feeder.submit(self._first_batch, current)
            for step in range(start_step, self.steps_per_epoch):
                assert current.next_batch is not None
                batch, crops = self._wait_for(feeder, current.next_batch)
                if step + 1 < self.steps_per_epoch:
                    current.next_batch = feeder.submit(self._next_batch, current)
                for index, reason in batch.unreadable.items():
                    self.report_unreadable(index, reason)
                if crops.is_cuda:  # it comes from the feeder's stream
                    crops.record_stream(torch.cuda.current_stream(crops.device))
                yield CropBatch(
                    crops=crops,
                    labels=torch.from_numpy(self.split.labels[batch.indices]),
                    indices=batch.indices,
                    boxes=batch.boxes,
                    epoch=epoch,
                    step=step,
                )
                del batch, crops
                # The feeder serves one pass at a time.
                assert self._pass is current, "another pass over this loader has begun"
        finally:
            current.cancel()

    def close(self) -> None:
        if self._pass is not None:
            self._pass.cancel()
            self._pass = None
        feeder, readers = self._feeder, self._readers
        self._feeder = self._readers = None
        if feeder is not None:
            feeder.submit(self._give_back)
            feeder.close()
        if readers is not None:
            readers.close()

    def __del__(self) -> None:
        if getattr(self, "_feeder", None) is not None:
            self.close()

    @property
    def _num_threads(self) -> int:
        return max(1, available_cores() if self.config.workers is None else self.config.workers)

    def _open(self) -> WorkerThreads:
        if self._feeder is None:
            self._readers = WorkerThreads("image reader", self.config.prefetch_batches)
            self._feeder = WorkerThreads("DALI feeder", 1)
            _OPEN.add(self)
            atexit.unregister(_close_all)
            atexit.register(_close_all)  # before DALI's own, which aborts if a feeder is still at work
        return self._feeder

    def _wait_for(self, worker: WorkerThreads, future: Future[T]) -> T:
        return worker.result(future, limit_s=self.config.stall_timeout_s, doing=lambda: self._doing)

    # ---- what the feeder does -------------------------------------------------------------------------------------

    def _first_batch(self, current: _Pass) -> tuple[EncodedBatch, Tensor]:
        self._drain()
        return self._next_batch(current)

    def _next_batch(self, current: _Pass) -> tuple[EncodedBatch, Tensor]:
        try:
            self._feed_ahead(current)
            while (crops := self._decoded()) is None:
                self._feed_again()
            return self._in_flight.popleft(), crops
        except BaseException:
            self._drop_pipeline()  # who knows what state it is in
            raise

    def _feed_ahead(self, current: _Pass) -> None:
        """Keep the readers and DALI busy, each with as many batches as may be prefetched."""
        ahead, readers = self.config.prefetch_batches, self._readers
        assert readers is not None
        while len(self._in_flight) < ahead and not current.is_used_up and not current.cancelled:
            while len(current.prepared) < ahead + 1 and current.next_step < current.end:
                current.prepared.append(readers.submit(self._read, current, current.next_step))
                current.next_step += 1
            self._doing = f"reading the images of step {current.next_step - len(current.prepared)}"
            self._feed(self._wait_for(readers, current.prepared.popleft()))

    def _read(self, current: _Pass, step: int) -> EncodedBatch:
        """By a reader thread."""
        if not current.cancelled:
            later = step + self.config.prefetch_batches
            if later < current.end:
                self._batches.will_need(current.epoch, later)
        return self._batches.prepare(current.epoch, step)

    def _feed(self, batch: EncodedBatch) -> None:
        self._in_flight.append(batch)  # DALI copies nothing: the bytes have to stay until it is through
        if not len(batch):
            return
        if self._pipeline is None:
            self._doing = "starting DALI"
            self._pipeline = self._started_pipeline()
        self._feed_pipeline(self._pipeline, batch.images, batch.boxes)
        self._num_decodes += len(batch)

    def _decoded(self) -> Tensor | None:
        """uint8 [B, V, S, S, 3], the crops of the oldest batch in flight; None if it has to be fed again."""
        batch = self._in_flight[0]
        self._doing = f"decoding step {batch.step} of epoch {batch.epoch}"
        if not len(batch):
            size = self.view_config.image_size
            return torch.empty(0, len(self.views), size, size, 3, dtype=torch.uint8, device=self.device)
        try:
            outputs = self._pipeline.share_outputs()
        except RuntimeError as error:
            self._doing = f"finding out which image of step {batch.step} DALI cannot decode"
            self._find_fault(batch, error)
            return None
        true_sizes = np.asarray(outputs[1].as_tensor())[:, :2].astype(np.int64)  # [B, 2]: height, width
        wrong = np.flatnonzero((true_sizes[:, 0] != batch.heights) | (true_sizes[:, 1] != batch.widths))
        for row in wrong.tolist():
            self._batches.correct_size(int(batch.indices[row]), *true_sizes[row].tolist())
        if len(wrong):
            crops = None
        elif self.device.type == "cpu":
            crops = self._cut(batch, outputs[0])
        else:
            crops = self._copied(outputs[0])
        del outputs
        self._pipeline.release_outputs()
        return crops

    def _cut(self, batch: EncodedBatch, images: Any) -> Tensor:
        """The views of decoded images on the CPU."""
        pixels = [np.asarray(images[row]).reshape(-1) for row in range(len(batch))]
        packed = PackedImages(
            pixels=torch.from_numpy(np.concatenate(pixels)),
            offsets=np.concatenate(([0], np.cumsum([len(image) for image in pixels])[:-1])).astype(np.int64),
            heights=batch.heights,
            widths=batch.widths,
        )
        num_views, size = len(self.views), self.view_config.image_size
        rows = np.repeat(np.arange(len(batch), dtype=np.int64), num_views)
        crops = crop_resize(packed, rows, batch.boxes.reshape(-1, 4), size, num_threads=self._num_threads)
        return crops.unflatten(0, (len(batch), num_views))

    def _copied(self, crops: Any) -> Tensor:
        """The crops on a GPU, when the copy is done."""
        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._copy_stream):
            # DALI does not know torch's streams: it would give its memory to the next batch while kernels still read.
            copied: Tensor = torch.from_dlpack(crops.as_tensor()).clone()
        self._copy_stream.synchronize()
        return copied

    def _find_fault(self, batch: EncodedBatch, error: RuntimeError) -> None:
        """Find the images that made DALI fail. What Pillow cannot read either is replaced from now on; what it can,
        and DALI not, is decoded by Pillow from now on. Raises RuntimeError if there is no such image, or if it is all
        of them.
        """
        found = False
        for index in np.unique(batch.indices).tolist():
            try:
                decode_rgb(self.split, index)
            except UnreadableImageError as reason:
                self._batches.mark_unreadable(index, str(reason))
                found = True
        if found:
            return
        refused = []
        for index, image, boxes in zip(batch.indices.tolist(), batch.images, batch.boxes, strict=True):
            probe = self._built_pipeline(batch_size=1, prefetch=1, num_threads=1)
            try:
                self._feed_pipeline(probe, [image], boxes[None])
                probe.share_outputs()
            except RuntimeError:
                refused.append(index)
        self._batches.mark_for_pillow(refused, len(batch), "DALI", error)
        if not refused:
            raise RuntimeError(
                f"DALI failed at step {batch.step} of epoch {batch.epoch}, though it can decode each of the images: "
                f"{error}"
            ) from error

    def _feed_again(self) -> None:
        """A pipeline that has failed is not valid any more: everything in flight goes through another one."""
        again = [(batch.epoch, batch.step) for batch in self._in_flight]
        self._drop_pipeline()
        for epoch, step in again:
            self._doing = f"reading the images of step {step} again"
            self._feed(self._batches.prepare(epoch, step))

    def _drain(self) -> None:
        """Let go of what an earlier pass has left in flight."""
        self._doing = "finishing what an earlier pass has begun"
        try:
            while self._in_flight:
                if len(self._in_flight[0]):
                    self._pipeline.share_outputs()
                    self._pipeline.release_outputs()
                self._in_flight.popleft()
        except RuntimeError:  # a batch that nobody waits for
            self._drop_pipeline()

    def _drop_pipeline(self) -> None:
        self._pipeline = None
        self._in_flight.clear()

    def _give_back(self) -> None:
        self._drop_pipeline()
        if self.device.type == "cuda":
            import_module("nvidia.dali.backend").ReleaseUnusedMemory()  # it pools what its pipelines have let go

    def _feed_pipeline(
        self, pipeline: Any, images: list[npt.NDArray[np.uint8]], boxes: npt.NDArray[np.int32], *, run: bool = True
    ) -> None:
        """images: B encoded ones; boxes: int32 [B, V, 4]."""
        pipeline.feed_input("encoded", images)
        if self.device.type == "cuda":
            start = np.ascontiguousarray(boxes[..., :2], dtype=np.float32)
            pipeline.feed_input("start", start)
            pipeline.feed_input("end", start + boxes[..., 2:].astype(np.float32))
        if run:
            pipeline.schedule_run()

    def _started_pipeline(self) -> Any:
        """A pipeline that has run once. The first run fills its whole queue, so that an epoch shorter than that would
        never get through.
        """
        prefetch = self.config.prefetch_batches
        pipeline = self._built_pipeline(self.order.max_local_batch_size, prefetch, self._num_threads)
        box = np.broadcast_to(np.array([0, 0, 64, 64], dtype=np.int32), (1, len(self.views), 4))
        for _ in range(prefetch):
            self._feed_pipeline(pipeline, [_SMALL_JPEG], box, run=False)
        pipeline.schedule_run()
        for _ in range(prefetch):
            pipeline.share_outputs()
            pipeline.release_outputs()
        return pipeline

    def _built_pipeline(self, batch_size: int, prefetch: int, num_threads: int) -> Any:
        """Outputs: on a GPU the crops, uint8 [B, V, S, S, 3], on the CPU the images, B times uint8 [H, W, 3]; and the
        shapes of the images, float32 [B, 3].
        """
        pipeline_class, fn, dali_math, types = _import_dali()
        on_gpu = self.device.type == "cuda"
        device_index = None
        if on_gpu:
            device_index = torch.cuda.current_device() if self.device.index is None else self.device.index
        pipeline = pipeline_class(
            batch_size=batch_size, num_threads=num_threads, device_id=device_index, prefetch_queue_depth=prefetch
        )
        side = self.view_config.image_size
        mixed = {"hw_decoder_load": self.config.hw_decoder_load, "jpeg_fancy_upsampling": True, **self._hints}
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,  # torchvision does not rotate either
                **(mixed if on_gpu else {}),
            )
            shapes = fn.peek_image_shape(encoded, dtype=types.FLOAT, adjust_orientation=False)
            if not on_gpu:  # our own resize is faster there, and Pillow's to the last bit
                pipeline.set_outputs(images, shapes)
            else:
                # Beyond the image DALI would read memory that is not its own, and boxes come from what a data set says.
                start = dali_math.min(
                    fn.external_source(name="start", dtype=types.FLOAT, ndim=2), shapes[:2] - 1
                )  # [V, 2]
                end = dali_math.min(fn.external_source(name="end", dtype=types.FLOAT, ndim=2), shapes[:2])
                boxes = [
                    {} if view.geometry == "original" else {"roi_start": start[number], "roi_end": end[number]}
                    for number, view in enumerate(self.views)  # a box of the whole image costs a fifth more than none
                ]
                resize = {"resize_x": side, "resize_y": side, "interp_type": types.INTERP_LINEAR, "antialias": True}
                crops = [fn.resize(images, **box, **resize) for box in boxes]
                pipeline.set_outputs(fn.stack(*crops), shapes)
        pipeline.build()
        return pipeline


@dataclass(slots=True, eq=False)
class _Pass:
    """One pass over an epoch. `prepared` and `next_step` belong to the feeder."""

    epoch: int
    next_step: int
    """The first step that is not being read yet."""
    end: int
    prepared: deque[Future[EncodedBatch]] = field(default_factory=deque)
    next_batch: Future[tuple[EncodedBatch, Tensor]] | None = None
    cancelled: bool = False

    @property
    def is_used_up(self) -> bool:
        return not self.prepared and self.next_step == self.end

    def cancel(self) -> None:
        """Nobody waits for its batches any more."""
        self.cancelled = True
        for future in (*list(self.prepared), self.next_batch):
            if future is not None:
                future.cancel()
        self.next_batch = None


_OPEN: WeakSet[DaliLoader] = WeakSet()


def _close_all() -> None:
    for loader in list(_OPEN):
        loader.close()


def _import_dali() -> tuple[Any, Any, Any, Any]:
    """DALI's Pipeline, functions, arithmetic and types. Raises ImportError, with what to do, where it is missing."""
    try:
        from nvidia.dali import Pipeline, fn, math, types
    except ImportError as error:
        raise ImportError(
            f"the loader dali needs NVIDIA DALI, which cannot be imported ({error}). Install it by "
            "`pip install 'leoclr-fast[dali]'` (CUDA 13) or 'leoclr-fast[dali-cu12]'; without it --loader auto, "
            "resident and torchvision work"
        ) from error
    return Pipeline, fn, math, types


def _decoder_hints(split: Split, batch_size: int, num_threads: int) -> dict[str, int]:
    """What DALI's GPU decoder should allocate at its start, where the data set knows how large its images are."""
    while isinstance(split, SubsetSplit):
        split = split.parent
    if not isinstance(split, ConvertedSplit):
        return {}
    heights, widths = (np.asarray(split.records[side], dtype=np.int64) for side in ("height", "width"))
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


def _small_jpeg() -> npt.NDArray[np.uint8]:
    encoded = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(encoded, "JPEG")
    return np.frombuffer(encoded.getvalue(), dtype=np.uint8)


_SMALL_JPEG = _small_jpeg()
