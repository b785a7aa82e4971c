"""Our augmentation against torchvision's transforms, on CPU cores: `python -m benchmarks.augmentation --help`.

Each side augments and normalises three views of each image, uint8 crops of 224 pixels that it holds in memory:
colour jitter in a random order, grayscale, blur, flip, float32, normalisation, with MoCo-v2's settings. Nothing is
read, decoded or cropped. torchvision works sample by sample in DataLoader workers, as people use it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from benchmarks.results import TimedTask, WritesResults, compare
from pipelines.augment import augment, draw_augmentation
from pipelines.config import IMAGENET_MEAN, IMAGENET_STD, ViewConfig
from pipelines.views import LEOCLR_VIEWS

SIDE = 224
VIEWS = 3
PEERS = {
    "ours": (
        "torchvision v2, uint8 tensors, DataLoader",
        "torchvision v1, PIL images, DataLoader",
        "ours, impl torch",
    ),
}


def photographs(num_images: int) -> npt.NDArray[np.uint8]:
    """uint8 [B, V, S, S, 3]: smooth waves with some noise, the same for all."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    crops = np.empty((num_images, VIEWS, SIDE, SIDE, 3), dtype=np.uint8)
    for crop in crops.reshape(-1, SIDE, SIDE, 3):
        for channel in range(3):
            down, right, phase = rng.uniform(-20, 20, 3)
            wave = 127.5 + 100 * np.sin(down * y + right * x + phase) + rng.normal(0, 8, (SIDE, SIDE))
            crop[..., channel] = wave.clip(0, 255)
    return crops


def ours(impl: Literal["auto", "torch"], num_images: int, batch_size: int, workers: int) -> Iterator[float]:
    """One call for each batch, as a training step makes it, drawing of the parameters included."""
    torch.set_num_threads(workers)
    crops, config = torch.from_numpy(photographs(num_images)), ViewConfig(image_size=SIDE)
    epochs = count()

    def epoch() -> Iterator[int]:
        number = next(epochs)
        for first in range(0, num_images, batch_size):
            batch = crops[first : first + batch_size]
            drawn = draw_augmentation(LEOCLR_VIEWS, config, 0, number, np.arange(first, first + len(batch)))
            yield len(augment(batch.transpose(0, 1), drawn, config, impl=impl)) // VIEWS

    yield from _timed(epoch, num_images)


def torchvision_v2(num_images: int, batch_size: int, workers: int) -> Iterator[float]:
    transform = _moco_v2(v2, v2.ToDtype(torch.float32, scale=True))
    dataset = _Crops(torch.from_numpy(photographs(num_images)).movedim(-1, 2).contiguous(), transform)
    yield from _data_loader(dataset, batch_size, workers)


def torchvision_v1(num_images: int, batch_size: int, workers: int) -> Iterator[float]:
    images = [[Image.fromarray(crop) for crop in views] for views in photographs(num_images)]
    yield from _data_loader(_Crops(images, _moco_v2(v1, v1.ToTensor())), batch_size, workers)


def _moco_v2(transforms: Any, to_float: Any) -> Any:
    """MoCo-v2's augmentation out of either version of torchvision's transforms."""
    return transforms.Compose(
        [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            transforms.RandomHorizontalFlip(),
            to_float,
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class _Crops(Dataset[list[torch.Tensor]]):
    def __init__(self, crops: Any, transform: Callable[[Any], torch.Tensor]) -> None:
        self._crops, self._transform = crops, transform

    def __len__(self) -> int:
        return len(self._crops)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return [self._transform(crop) for crop in self._crops[index]]


TASKS: dict[str, TimedTask] = {
    "ours": partial(ours, "auto"),
    "torchvision v2, uint8 tensors, DataLoader": torchvision_v2,
    "torchvision v1, PIL images, DataLoader": torchvision_v1,
    "ours, impl torch": partial(ours, "torch"),
}


def _data_loader(dataset: _Crops, batch_size: int, workers: int) -> Iterator[float]:
    """The workers live as long as the process, and stand still between its rounds."""
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, persistent_workers=True)
    yield from _timed(lambda: (len(views[0]) for views in loader), len(dataset))


def _timed(epoch: Callable[[], Iterator[int]], images: int) -> Iterator[float]:
    """Seconds from the first batch of each epoch to the last; an epoch must hand out all images.

    After the pause between two rounds, the first batch finds its memory gone back to the system, unlike in training.
    What other workers have done by then counts for them: at most a batch each.
    """
    while True:
        batches = epoch()
        first = next(batches)
        began = time.perf_counter()
        handled = first + sum(batches)
        taken = time.perf_counter() - began
        if handled != images:
            raise RuntimeError(f"{handled} of {images} images came")
        yield taken


@dataclass(frozen=True, kw_only=True)
class AugmentationBenchmark(WritesResults):
    """Our augmentation against torchvision's, on CPU cores."""

    images: int = 512
    """Of one epoch, three views each (0.45 MB)."""
    batch_size: int = 32
    rounds: int = 9
    workers: int = len(os.sched_getaffinity(0))
    """Threads of ours, worker processes of torchvision's."""
    name: str = "augmentation_cpu"

    def run(self) -> None:
        """Measure, and write the result files after every round."""
        least = 8 * self.workers * self.batch_size
        if self.images < least:
            raise ValueError(
                f"{self.images} images are not allowed, since then what the workers have done when the clock "
                f"starts would decide: give at least {least}"
            )
        compare(
            self.results(),
            TASKS,
            (self.images, self.batch_size, self.workers),
            self.rounds,
            title=f"MoCo-v2's photometric augmentation of three {SIDE}-pixel views on {self.workers} cores",
            task=f"One epoch of {self.images:,} images in batches of {self.batch_size}, three views each: uint8 crops "
            "in memory become normalised float32 views. The clock starts when the first batch has come.",
            notes="The crops are drawn, the same for all. Each side draws its own parameters, of the same "
            "distributions. DataLoader: sample by sample in as many worker processes, batched there and handed over in "
            "shared memory; what the other workers have done when the first batch comes is given to them.",
            num_images=self.images - self.batch_size,
            peers=PEERS,
        )


if __name__ == "__main__":
    tyro.cli(AugmentationBenchmark).run()
