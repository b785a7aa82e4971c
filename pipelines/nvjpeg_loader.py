"""JPEGs decoded on the GPU by torchvision's batched nvJPEG decoder, all views cut there by `crop_resize`.

For .betons, tars and folders on a machine without DALI. The order, the boxes and the bytes are those of every other
loader. What nvJPEG does not decode as Pillow does (PNGs, gray, CMYK and RGB JPEGs, 12 bits, …) is decoded by Pillow in
the threads that read. Written without a GPU at hand: what has run is everything around nvJPEG, on the CPU.
Legend: B images, V views, S side of a view.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from dataset_tools.conversion.jpeg import DamagedJpegError, read_jpeg_header
from pipelines.batch import CropBatch
from pipelines.cores import available_cores
from pipelines.crop_resize import crop_resize
from pipelines.decode import UnreadableImageError, decode_rgb
from pipelines.encoded_batches import EncodedBatch, EncodedBatches
from pipelines.loader import Loader
from pipelines.packed_images import PackedImages
from pipelines.worker_threads import WorkerThreads

T = TypeVar("T")


class NvjpegLoader(Loader):
    """Bytes in, crops out: one decode of each image, on the device, and one resize for each view.

    ``config.workers`` threads read, ``config.prefetch_batches`` batches ahead; one more thread decodes and cuts them on
    a stream of its own. Raises ValueError for a device that is not a GPU, RuntimeError if nvJPEG does not work there.
    """

    name = "nvjpeg"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.device.type not in self.devices:
            raise ValueError(f"nvJPEG decodes on a GPU, not on {self.device}; choose --loader auto, or give --device")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"nvJPEG is to decode on {self.device}, but this machine has no CUDA device; choose --loader auto"
            )
        if obstacle := nvjpeg_obstacle(self.device):
            raise RuntimeError(f"the nvjpeg loader cannot be used: {obstacle}; choose --loader torchvision")
        self._batches = EncodedBatches(self.split, self.views, self.view_config, self.order, seed=self.seed)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._readers: WorkerThreads | None = None
        self._decoder: WorkerThreads | None = None
        self._pass: _Pass | None = None
        self._doing = "starting"

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
        if self._pass is not None:
            self._pass.cancel()
        current = self._pass = _Pass(epoch, start_step, self.steps_per_epoch)
        try:
            for step in range(start_step, self.steps_per_epoch):
                self._work_ahead(current)
                decoded = self._wait_for(self._open()[1], current.upcoming.popleft())
                self._work_ahead(current)
                for index, reason in decoded.batch.unreadable.items():
                    self.report_unreadable(index, reason)
                if decoded.is_done is not None:
                    stream = torch.cuda.current_stream(self.device)
                    stream.wait_event(decoded.is_done)
                    decoded.crops.record_stream(stream)
                yield CropBatch(
                    crops=decoded.crops,
                    labels=torch.from_numpy(self.split.labels[decoded.batch.indices]),
                    indices=decoded.batch.indices,
                    boxes=decoded.batch.boxes,
                    epoch=epoch,
                    step=step,
                )
                del decoded
                # The decoder serves one pass at a time.
                assert self._pass is current, "another pass over this loader has begun"
        finally:
            current.cancel()

    @property
    def num_for_pillow(self) -> int:
        """How many JPEGs nvJPEG turned out to be unable to decode, so that Pillow does it."""
        return self._batches.num_for_pillow

    def close(self) -> None:
        if self._pass is not None:
            self._pass.cancel()
            self._pass = None
        decoder, readers = self._decoder, self._readers
        self._decoder = self._readers = None
        for threads in (decoder, readers):
            if threads is not None:
                threads.close()

    def __del__(self) -> None:
        if getattr(self, "_decoder", None) is not None:
            self.close()

    def _open(self) -> tuple[WorkerThreads, WorkerThreads]:
        """The readers, and the decoder."""
        if self._readers is None or self._decoder is None:
            num_readers = available_cores() if self.config.workers is None else self.config.workers
            self._readers = WorkerThreads("image reader", max(1, num_readers))
            self._decoder = WorkerThreads("nvJPEG decoder", 1)
        return self._readers, self._decoder

    def _work_ahead(self, current: _Pass) -> None:
        readers, decoder = self._open()
        while len(current.upcoming) < self.config.prefetch_batches and current.next_step < current.end:
            read = readers.submit(self._read, current, current.next_step)
            current.upcoming.append(decoder.submit(self._decode, current, readers, read))
            current.next_step += 1

    def _wait_for(self, worker: WorkerThreads, future: Future[T]) -> T:
        return worker.result(future, limit_s=self.config.stall_timeout_s, doing=lambda: self._doing)

    # ---- what the readers do --------------------------------------------------------------------------------------

    def _read(self, current: _Pass, step: int) -> _ReadBatch:
        if not current.cancelled and step + self.config.prefetch_batches < current.end:
            self._batches.will_need(current.epoch, step + self.config.prefetch_batches)
        return self._prepared(current.epoch, step)

    def _prepared(self, epoch: int, step: int) -> _ReadBatch:
        """A batch whose images are all JPEGs for nvJPEG, or decoded."""
        while True:
            batch = self._batches.prepare(epoch, step)
            decoded: dict[int, npt.NDArray[np.uint8]] = {}
            unreadable = False
            for row, image in enumerate(batch.images):
                if not _is_for_nvjpeg(image):
                    try:
                        decoded[row] = _decoded_by_pillow(image)
                    except Exception as error:  # damaged bytes make Pillow raise nearly anything
                        self._batches.mark_unreadable(int(batch.indices[row]), str(error) or type(error).__name__)
                        unreadable = True
            if not unreadable:
                return _ReadBatch(batch, decoded)

    # ---- what the decoder does ------------------------------------------------------------------------------------

    def _decode(self, current: _Pass, readers: WorkerThreads, read: Future[_ReadBatch]) -> _DecodedBatch:
        self._doing = f"reading the images of epoch {current.epoch}"
        prepared = self._wait_for(readers, read)
        while not current.cancelled:
            batch = prepared.batch
            self._doing = f"decoding step {batch.step} of epoch {batch.epoch}"
            with torch.cuda.stream(self._stream):  # does nothing for None
                if (images := self._images(prepared)) is not None:
                    crops = self._crops(batch, images)
                    is_done = None if self._stream is None else self._stream.record_event()
                    return _DecodedBatch(batch, crops, is_done)
            prepared = self._prepared(batch.epoch, batch.step)
        return _DecodedBatch(prepared.batch, torch.empty(0), None)  # nobody waits for it

    def _images(self, prepared: _ReadBatch) -> list[Tensor] | None:
        """B images on the device, uint8 [3, H, W]; None if the batch has to be prepared again."""
        batch = prepared.batch
        rows = [row for row in range(len(batch)) if row not in prepared.decoded]
        try:
            decoded = self._decode_jpegs([batch.images[row] for row in rows])
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._find_fault(batch, rows, error)
            return None
        self._num_decodes += len(batch)
        found = dict(zip(rows, decoded, strict=True))
        for row, pixels in prepared.decoded.items():
            found[row] = torch.from_numpy(pixels).to(self.device, non_blocking=True)
        images = [found[row] for row in range(len(batch))]
        as_expected = True
        for image, index, height, width in zip(images, batch.indices, batch.heights, batch.widths, strict=True):
            if image.shape[1:] != (height, width):
                self._batches.correct_size(int(index), *image.shape[1:])
                as_expected = False
        return images if as_expected else None

    def _decode_jpegs(self, images: list[npt.NDArray[np.uint8]]) -> list[Tensor]:
        """uint8 [3, H, W] each, on the device. Raises RuntimeError if one of them cannot be decoded."""
        if not images:
            return []
        encoded = [torch.from_numpy(image) for image in images]
        if self._stream is not None:
            # torchvision decodes on a stream of its own, which does not wait for this one: what the kernels of the
            # batch before still read must not be given to the decoder as memory for this batch.
            self._stream.synchronize()
        decoded: list[Tensor] = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self.device)
        return decoded

    def _find_fault(self, batch: EncodedBatch, rows: list[int], error: RuntimeError) -> None:
        """Find the images that made nvJPEG fail. What Pillow cannot read either is replaced from now on; what it can
        is decoded by Pillow from now on. Raises RuntimeError if there is no such image, or if it is all of them.
        """
        found = False
        refused = []
        for row in rows:
            try:
                self._decode_jpegs([batch.images[row]])
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:
                found = True
                index = int(batch.indices[row])
                try:
                    decode_rgb(self.split, index)
                    refused.append(index)
                except UnreadableImageError as reason:
                    self._batches.mark_unreadable(index, str(reason))
        self._batches.mark_for_pillow(refused, len(rows), "nvJPEG", error)
        if not found:
            raise RuntimeError(
                f"nvJPEG failed at step {batch.step} of epoch {batch.epoch}, though it can decode each of the images: "
                f"{error}"
            ) from error

    def _crops(self, batch: EncodedBatch, images: list[Tensor]) -> Tensor:
        """uint8 [B, V, S, S, 3]."""
        num_views, size = len(self.views), self.view_config.image_size
        if not images:
            return torch.empty(0, num_views, size, size, 3, dtype=torch.uint8, device=self.device)
        num_bytes = np.array([image.numel() for image in images], dtype=np.int64)
        packed = PackedImages(
            pixels=torch.cat([image.flatten() for image in images]),
            offsets=np.concatenate(([0], np.cumsum(num_bytes)[:-1])),
            heights=batch.heights,
            widths=batch.widths,
            planar=True,
        )
        rows = np.repeat(np.arange(len(images), dtype=np.int64), num_views)
        crops = crop_resize(packed, rows, batch.boxes.reshape(-1, 4), size)
        return crops.unflatten(0, (len(images), num_views))


@dataclass(slots=True)
class _ReadBatch:
    batch: EncodedBatch
    decoded: dict[int, npt.NDArray[np.uint8]]
    """Row -> pixels, uint8 [3, H, W], where nvJPEG is not asked."""


@dataclass(slots=True)
class _DecodedBatch:
    batch: EncodedBatch
    crops: Tensor
    is_done: torch.cuda.Event | None


class _Pass:
    """One pass over an epoch."""

    def __init__(self, epoch: int, start_step: int, end: int) -> None:
        self.epoch, self.next_step, self.end = epoch, start_step, end
        self.upcoming: deque[Future[_DecodedBatch]] = deque()
        self.cancelled = False

    def cancel(self) -> None:
        """Nobody waits for its batches any more."""
        self.cancelled = True
        for future in self.upcoming:
            future.cancel()
        self.upcoming.clear()


@lru_cache
def nvjpeg_obstacle(device: torch.device) -> str | None:
    """Why torchvision cannot decode JPEGs on this device, found out by decoding one; None if it can."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(file, "JPEG")
    try:
        decode_jpeg([torch.frombuffer(file.getbuffer(), dtype=torch.uint8)], mode=ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        return f"torchvision cannot decode a JPEG on {device}: {str(error).strip().splitlines()[0]}"
    return None


def _is_for_nvjpeg(image: npt.NDArray[np.uint8]) -> bool:
    """Whether these bytes are a JPEG in which nvJPEG sees what Pillow sees: baseline or progressive YCbCr."""
    try:
        header = read_jpeg_header(image.tobytes())
    except DamagedJpegError:
        return False
    return len(header.component_ids) == 3 and not header.obstacle


def _decoded_by_pillow(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 [3, H, W]."""
    pixels = np.asarray(Image.open(io.BytesIO(image.tobytes())).convert("RGB"))
    return pixels.transpose(2, 0, 1).copy()
