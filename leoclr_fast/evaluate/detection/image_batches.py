"""Image files as batches on the device. Legend: N images of a batch, H and W of its largest, n boxes of an image."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dataset_tools.images import UnusableImageError, open_image, rgb, unusable_unless_done
from leoclr_fast.evaluate.detection.annotations import AnnotatedImage
from pipelines.counter_rng import ORDER_STREAM, crop_stream, permutation, uniform

_BATCHES_AHEAD = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """An image to be read, and its size and direction in the batch."""

    image: AnnotatedImage
    side: int
    """Length of the shorter side, pixels."""
    flipped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionBatch:
    """Images in one tensor, zero where a smaller one ends, and their boxes."""

    images: Tensor
    """[N, 3, H, W], normalised, on the device."""
    sizes: list[tuple[int, int]]
    """Height and width of each image within."""
    targets: list[dict[str, Tensor]]
    """Of each image `boxes` float32 [n, 4] and `labels` int64 [n] from 1, as torchvision's detectors take them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReader:
    """Reads, resizes and flips in threads, ahead of the training, and keeps the order."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    max_side: int
    with_ignored: bool
    """Whether objects that the evaluation ignores are trained on: VOC's difficult ones are, COCO's crowds are not."""
    workers: int
    device: torch.device
    dtype: torch.dtype

    def read(self, requests: Iterator[Sequence[ImageRequest]]) -> Iterator[DetectionBatch]:
        """The batches, one after the other. Raises ValueError naming an image that cannot be read or is of another
        size than its annotation says."""
        waiting: deque[tuple[Sequence[ImageRequest], list[Future[npt.NDArray[np.uint8]]]]] = deque()
        with ThreadPoolExecutor(self.workers, "detection image") as pool:
            try:
                for batch in requests:
                    waiting.append((batch, [pool.submit(_pixels, request, self.max_side) for request in batch]))
                    if len(waiting) > max(_BATCHES_AHEAD, 2 * self.workers // max(1, len(batch))):
                        yield self._on_device(*waiting.popleft())
                while waiting:
                    yield self._on_device(*waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _on_device(
        self, requests: Sequence[ImageRequest], futures: list[Future[npt.NDArray[np.uint8]]]
    ) -> DetectionBatch:
        pixels = [torch.from_numpy(future.result()).to(self.device) for future in futures]
        sizes = [(image.shape[0], image.shape[1]) for image in pixels]
        height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
        images = torch.zeros(len(pixels), 3, height, width, device=self.device, dtype=self.dtype)
        mean = torch.tensor(self.mean, device=self.device, dtype=self.dtype) * 255
        std = torch.tensor(self.std, device=self.device, dtype=self.dtype) * 255
        for canvas, image in zip(images, pixels, strict=True):
            normalised = (image.to(self.dtype) - mean) / std
            canvas[:, : image.shape[0], : image.shape[1]] = normalised.permute(2, 0, 1)
        return DetectionBatch(
            images=images.to(memory_format=torch.channels_last),
            sizes=sizes,
            targets=[self._target(request, size) for request, size in zip(requests, sizes, strict=True)],
        )

    def _target(self, request: ImageRequest, size: tuple[int, int]) -> dict[str, Tensor]:
        image, (height, width) = request.image, size
        wanted = slice(None) if self.with_ignored else ~image.ignored
        boxes = resized_boxes(image.boxes[wanted], (image.width, image.height), (width, height))
        if request.flipped:
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        return {
            "boxes": torch.from_numpy(boxes).to(self.device),
            "labels": torch.from_numpy(image.labels[wanted] + 1).to(self.device),
        }


def resized_size(width: int, height: int, side: int, max_side: int) -> tuple[int, int]:
    """(width, height) with the shorter side of `side` pixels, or less where the longer one would exceed `max_side`."""
    scale = side / min(width, height)
    scale = min(scale, max_side / max(width, height))
    return int(width * scale + 0.5), int(height * scale + 0.5)


def resized_boxes(
    boxes: npt.NDArray[np.float32], old: tuple[int, int], new: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Boxes [n, 4] of an image of `old` (width, height) in the image of `new`."""
    x, y = new[0] / old[0], new[1] / old[1]
    return boxes * np.array([x, y, x, y], dtype=np.float32)


def _pixels(request: ImageRequest, max_side: int) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3]."""
    annotated = request.image
    try:
        with unusable_unless_done():
            image = rgb(ImageOps.exif_transpose(open_image(annotated.path)))
    except (OSError, UnusableImageError) as error:
        raise ValueError(f"the image {annotated.path} cannot be read: {error}") from error
    if image.size != (annotated.width, annotated.height):
        raise ValueError(
            f"the image {annotated.path} has {image.size[0]} x {image.size[1]} pixels, but its annotation is for "
            f"{annotated.width} x {annotated.height}: its boxes would be at the wrong place"
        )
    size = resized_size(annotated.width, annotated.height, request.side, max_side)
    image = image.resize(size, Image.Resampling.BILINEAR)
    if request.flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def training_batches(
    images: Sequence[AnnotatedImage], batch_size: int, sides: Sequence[int], seed: int
) -> Iterator[list[ImageRequest]]:
    """Which images form the batches, without an end, and how they are resized and flipped: a pure function of the seed.

    Endless permutations of all images; as in detectron2, a batch has only wide or only tall images, so that little of
    it is padding. There, two images of each GPU go together; here it is the whole global batch, so that the ranks'
    number does not matter.
    """
    waiting: dict[bool, list[ImageRequest]] = {False: [], True: []}
    for epoch in count():
        order = permutation(seed, epoch, len(images), ORDER_STREAM)
        draws = uniform(seed, epoch, order, crop_stream(0), 2)
        for index, (side, flip) in zip(order.tolist(), draws.tolist(), strict=True):
            image = images[index]
            group = waiting[image.width > image.height]
            group.append(ImageRequest(image=image, side=sides[int(side * len(sides))], flipped=flip < 0.5))
            if len(group) == batch_size:
                yield group.copy()
                group.clear()
