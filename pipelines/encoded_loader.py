"""Loaders that are given encoded images: threads read batches in pieces, and one more thread decodes and cuts them.

An image that cannot be read is replaced by the next one that can. Plain JPEGs go to the decoder as they are; what it
might see differently from Pillow (cut JPEGs, other formats) is decoded by Pillow.
"""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dataset_tools.conversion.jpeg import JpegHeader
from pipelines.byte_readers import Indices, open_bytes
from pipelines.crop_resize import cut_views
from pipelines.decode import Substitutes, UnreadableImageError, decode_bytes, require_decodable
from pipelines.encoded_batches import Bytes, EncodedBatch, plain_header
from pipelines.loader import DecodedBatch, Loader
from pipelines.packed_images import PackedImages
from pipelines.threads import WorkerThreads, available_cores
from pipelines.views import draw_boxes

log = logging.getLogger(__name__)

T = TypeVar("T")

_OF_DEVICE = re.compile(
    r"CUDA (runtime |driver )?(API )?error|cudaError|CUDA_ERROR_|out of memory|bad_alloc|annot allocate"
)
_LEAST_PIECE = 4
"""Images that one thread reads: fewer would cost more than they take from the disk."""
_MAX_LOGGED = 10
_MANY_REFUSED = 4


class EncodedLoader(Loader):
    """A subclass decodes whole batches: see `decode_next`, which the one decoding thread calls for each step.

    ``config.workers`` threads read ``config.prefetch_batches`` batches ahead, each batch in as many pieces, so that a
    slow store has as many requests at a time; and as many batches are decoded ahead. What goes wrong in a thread, and
    its silence for ``config.stall_timeout_s``, is raised where a batch is waited for.
    """

    decoder: ClassVar[str]
    """What messages call the decoder."""
    queues_batches: ClassVar[bool] = False
    """Whether the decoder itself works on several batches at a time, so that one call at a time is enough."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._byte_reader = open_bytes(self.split)
        self._substitutes = Substitutes(self.split)
        self.for_pillow: set[int] = set()
        """Images that Pillow decodes, whatever they are: what the decoder turned out to be unable to decode."""
        self._readers: WorkerThreads | None = None
        self._decoder: WorkerThreads | None = None
        self._doing = "starting"

    @abstractmethod
    def decode_next(self, current: Pass) -> DecodedBatch:
        """The next batch of a pass, of those that `next_read` hands out. By the decoding thread."""

    def try_to_decode(self, batch: EncodedBatch, rows: list[int]) -> None:
        """Raises RuntimeError if the decoder cannot decode some of these images: for `find_fault`."""
        raise NotImplementedError

    @staticmethod
    def is_plain(header: JpegHeader) -> bool:
        """Whether the decoder sees what Pillow sees in a JPEG that passed `plain_header`. Else Pillow decodes it."""
        return True

    def decode_batches(self, epoch: int, start_step: int) -> Generator[DecodedBatch, None, None]:
        current = Pass(epoch, start_step, self.steps_per_epoch, *self._threads())
        try:
            for _ in range(start_step, self.steps_per_epoch):
                self._decode_ahead(current)
                decoded = self._wait_for(current.decoder, current.decoding.popleft())
                self._decode_ahead(current)
                yield decoded
                del decoded
        finally:
            current.cancel()

    def give_back(self) -> None:
        """Let go of what belongs to the decoding thread, by which it is called."""

    def close(self) -> None:
        super().close()
        decoder, readers = self._decoder, self._readers
        self._decoder = self._readers = None
        if decoder is not None:
            decoder.submit(self.give_back)
        for threads in (decoder, readers):
            if threads is not None:
                threads.close()

    @property
    def num_threads(self) -> int:
        """``config.workers``, at least one."""
        return max(1, available_cores() if self.config.workers is None else self.config.workers)

    def _threads(self) -> tuple[WorkerThreads, WorkerThreads]:
        """The readers, and the decoder."""
        if self._readers is None or self._decoder is None:
            self._readers = WorkerThreads("image reader", self.num_threads, self.use_device)
            self._decoder = WorkerThreads(f"{self.decoder} decoder", 1, self.use_device)
        return self._readers, self._decoder

    def _decode_ahead(self, current: Pass) -> None:
        ahead = 1 if self.queues_batches else self.config.prefetch_batches
        while len(current.decoding) < ahead and current.num_left > 0:
            current.num_left -= 1
            current.decoding.append(current.decoder.submit(self.decode_next, current))

    def _wait_for(self, worker: WorkerThreads, future: Future[T]) -> T:
        return worker.result(future, limit_s=self.config.stall_timeout_s, doing=lambda: self._doing)

    # ---- what the readers do --------------------------------------------------------------------------------------

    def _read(self, current: Pass, step: int, indices: Indices, later: Indices) -> EncodedBatch:
        """A piece of a batch. later: images that are read a while after these."""
        if current.cancelled:
            raise CancelledError
        self._byte_reader.will_need(later)
        return self.prepare(current.epoch, step, indices)

    def prepare(self, epoch: int, step: int, indices: Indices | None = None) -> EncodedBatch:
        """The batch of this rank, or the piece of it with these ``indices``; see `EncodedBatch.joined`.

        Raises nothing for an image that cannot be read.
        """
        indices = (self.order.indices(epoch, step) if indices is None else indices).copy()
        images: list[Bytes] = [np.empty(0, dtype=np.uint8)] * len(indices)
        heights, widths = np.ones_like(indices), np.ones_like(indices)
        unreadable: dict[int, str] = {}
        missing = np.arange(len(indices))
        while len(missing):
            if self._substitutes.unreadable:
                found = [self._substitutes.find(index, unreadable) for index in indices[missing].tolist()]
                if None in found:  # so many are unreadable that the run ends
                    indices, heights, widths, images = indices[:0], heights[:0], widths[:0], []
                    break
                indices[missing] = np.array(found, dtype=np.int64)
            encoded = self._byte_reader.read(indices[missing])
            failed = []
            for place, row in enumerate(missing.tolist()):
                index, image, raw_size = int(indices[row]), encoded.images[place], encoded.raw_sizes[place].tolist()
                try:
                    if place in encoded.unreadable:
                        raise UnreadableImageError(encoded.unreadable[place])
                    images[row], (heights[row], widths[row]) = self._opened(index, image, raw_size)
                except UnreadableImageError as error:
                    self._substitutes.unreadable[index] = str(error)
                    failed.append(row)
            missing = np.array(failed, dtype=np.int64)
        boxes = draw_boxes(self.views, self.view_config, heights, widths, self.seed, epoch, indices)
        return EncodedBatch(epoch, step, indices, heights, widths, boxes, images, unreadable)

    def _opened(self, index: int, image: Bytes, raw_size: Sequence[int]) -> tuple[Bytes, tuple[int, int]]:
        """What is handed out of an image, and its height and width. Raises `UnreadableImageError`."""
        height, width = raw_size
        if height:
            if len(image) != 3 * height * width:
                raise UnreadableImageError(f"its {len(image)} bytes are not {height} x {width} pixels")
            return image.reshape(height, width, 3), (height, width)
        header = None if index in self.for_pillow else plain_header(image)
        if header is not None and self.is_plain(header):
            return image, (header.height, header.width)
        pixels = np.array(decode_bytes(image.tobytes()))  # a copy, which may be written to: some ask for that
        return pixels, (pixels.shape[0], pixels.shape[1])

    # ---- what the decoder does ------------------------------------------------------------------------------------

    def next_read(self, current: Pass) -> EncodedBatch:
        """The next batch of a pass, read; and others after it are being read."""
        if current.cancelled:
            raise CancelledError
        while len(current.reads) <= self.config.prefetch_batches and current.next_step < current.end:
            step, later = current.next_step, current.next_step + self.config.prefetch_batches
            indices = self.order.indices(current.epoch, step)
            afterwards = self.order.indices(current.epoch, later) if later < current.end else indices[:0]
            count = max(1, min(self.num_threads, len(indices) // _LEAST_PIECE))
            pieces = zip(np.array_split(indices, count), np.array_split(afterwards, count), strict=True)
            current.reads.append([current.readers.submit(self._read, current, step, *piece) for piece in pieces])
            current.next_step += 1
        self._doing = f"reading the images of step {current.next_step - len(current.reads)}"
        return EncodedBatch.joined([self._wait_for(current.readers, piece) for piece in current.reads.popleft()])

    def has_true_sizes(self, batch: EncodedBatch, sizes: npt.NDArray[np.int64]) -> bool:
        """Whether the images are as large as their headers say; if not, the batch has to be prepared again.

        sizes: int64 [B, 2], height and width of the decoded images.
        """
        wrong = np.flatnonzero((sizes[:, 0] != batch.heights) | (sizes[:, 1] != batch.widths))
        self.for_pillow.update(batch.indices[wrong].tolist())
        return not len(wrong)

    def cut(self, batch: EncodedBatch, images: Iterable[Tensor], *, planar: bool = False) -> DecodedBatch:
        """The views of a batch's images, which are uint8 [H, W, 3], or [3, H, W] where planar, on the device.

        **A decoder's memory is used again only when the kernels that read it have ended, on the host's clock.** So this
        returns when they have. Order on a stream would not do: decoders have streams of their own, and the hardware's
        (H100 and later) writes at once, whatever the stream.
        """
        with torch.cuda.stream(self.side_stream):  # does nothing for None
            pixels = _end_to_end([image.flatten() for image in images], self.device)
            packed = PackedImages.side_by_side(pixels, batch.heights, batch.widths, planar=planar)
            rows = np.arange(len(batch))
            crops = cut_views(packed, rows, batch.boxes, self.view_config, num_threads=self.num_threads)
            is_done = None
            if self.side_stream is not None:
                is_done = self.side_stream.record_event()
                is_done.synchronize()
        return DecodedBatch(crops, batch.indices, batch.boxes, batch.unreadable, is_done)

    def readable_by_pillow(self, batch: EncodedBatch, rows: list[int]) -> list[int]:
        """Indices of those of some images that Pillow reads; the others are replaced from now on."""

        def reads(row: int) -> bool:
            try:
                require_decodable(batch.images[row].tobytes())
            except UnreadableImageError as reason:
                self._substitutes.unreadable[int(batch.indices[row])] = str(reason)
                return False
            return True

        with ThreadPoolExecutor(self.num_threads, initializer=self.use_device) as pool:
            return batch.indices[rows][list(pool.map(reads, rows))].tolist()

    def find_fault(self, batch: EncodedBatch, error: RuntimeError) -> None:
        """Find the images that made the decoder fail, so that the batch can be prepared again without them.

        What Pillow cannot read either is replaced from now on; what it can, and the decoder not, is decoded by Pillow
        from now on, and the first such are logged. Raises RuntimeError if there is no such image, or if it is all of
        several: then it is the decoder; and the error itself where it is of the device or its memory, which is the
        fault of no image.
        """
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise error
        if _OF_DEVICE.search(str(error)):
            raise RuntimeError(f"{self.decoder} failed at step {batch.step} of epoch {batch.epoch}: {error}") from error
        self._doing = f"finding out which image of step {batch.step} {self.decoder} cannot decode"
        rows = [row for row, image in enumerate(batch.images) if image.ndim == 1]
        if len(self.readable_by_pillow(batch, rows)) < len(rows):
            return
        refused = [int(batch.indices[row]) for row in self._refused(batch, rows)]
        if len(refused) == len(rows) >= _MANY_REFUSED:
            raise RuntimeError(
                f"{self.decoder} decodes none of the {len(rows)} images of a batch, and Pillow decodes all of them: "
                f"{error}"
            ) from error
        for index in refused:
            self.for_pillow.add(index)
            if len(self.for_pillow) <= _MAX_LOGGED:
                last = "; others will not be named" if len(self.for_pillow) == _MAX_LOGGED else ""
                log.warning("%s cannot decode %s, Pillow does%s", self.decoder, self.split.names[index], last)
        if not refused:
            raise RuntimeError(
                f"{self.decoder} failed at step {batch.step} of epoch {batch.epoch}, though it can decode each of the "
                f"images: {error}"
            ) from error

    def _refused(self, batch: EncodedBatch, rows: list[int]) -> list[int]:
        """Those of some images that the decoder cannot decode, found by halves."""
        try:
            self.try_to_decode(batch, rows)
        except RuntimeError as error:
            if _OF_DEVICE.search(str(error)):
                raise
            middle = len(rows) // 2
            halves = (rows[:middle], rows[middle:])
            return rows if len(rows) == 1 else [row for half in halves for row in self._refused(batch, half)]
        return []


class Pass:
    """One pass over an epoch. `next_step`, `reads` and `in_flight` belong to the decoding thread."""

    def __init__(self, epoch: int, start_step: int, end: int, readers: WorkerThreads, decoder: WorkerThreads) -> None:
        self.epoch, self.end, self.readers, self.decoder = epoch, end, readers, decoder
        self.num_left = end - start_step
        """Batches that the decoder has not been asked for yet."""
        self.decoding = deque[Future[DecodedBatch]]()
        self.next_step = start_step
        """The first step that is not being read yet."""
        self.reads = deque[list[Future[EncodedBatch]]]()
        """The pieces of each batch."""
        self.in_flight = deque[Any]()
        """What a decoder that works on several batches at a time has begun."""
        self.cancelled = False

    @property
    def is_read(self) -> bool:
        """Whether `EncodedLoader.next_read` has handed out all batches."""
        return not self.reads and self.next_step == self.end

    def cancel(self) -> None:
        """Nobody waits for its batches any more."""
        self.cancelled = True
        for future in [*list[Future[Any]](self.decoding), *chain.from_iterable(self.reads)]:
            future.cancel()


def _end_to_end(flat: list[Tensor], device: torch.device) -> Tensor:
    if flat and device.type == "cpu":
        # torch.cat's threads would stay awake for a while, and take the cores from those that decode and cut.
        return torch.from_numpy(np.concatenate([image.numpy() for image in flat]))
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)
