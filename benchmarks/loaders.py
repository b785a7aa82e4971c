"""Our loaders against what people use: `python -m benchmarks.loaders --help`.

Every contestant makes three views of each image of one epoch, as uint8 on the CPU, from JPEGs that lie in the page
cache. Ours draw our boxes; the stock pipelines draw their own, three random crops of the same distribution.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import tyro

from benchmarks.convert import write_copies
from benchmarks.interleaved import Comparison, Contestant

SIDE = 224
BATCH = 50
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
PEERS = {
    "ours, ffcv": ("torchvision DataLoader, our boxes", "FFCV, three pipelines"),
    "ours, dali": ("DALI, its own reader", "torchvision DataLoader, our boxes"),
}


def ours_torchvision(folder: str, workers: int) -> Iterator[float]:
    yield from _ours("torchvision", f"{folder}/images", workers)


def ours_ffcv(folder: str, workers: int) -> Iterator[float]:
    yield from _ours("ffcv", f"{folder}/ffcv", workers)


def ours_dali(folder: str, workers: int) -> Iterator[float]:
    yield from _ours("dali", f"{folder}/images", workers)


def _ours(name: str, data: str, workers: int) -> Iterator[float]:
    import torch

    from dataset_tools.sources import open_source
    from pipelines.config import LoaderConfig, ViewConfig
    from pipelines.factory import make_loader
    from pipelines.order import TrainOrder
    from pipelines.views import LEOCLR_VIEWS

    split = open_source(data).splits["train"]
    order = TrainOrder(num_images=len(split), batch_size=BATCH, seed=0)
    config = LoaderConfig(name=name, workers=workers)
    view_config = ViewConfig(image_size=SIDE, crop_scale=SCALE, crop_ratio=RATIO)
    device = torch.device("cpu")
    with make_loader(split, LEOCLR_VIEWS, view_config, config, order, seed=0, device=device) as loader:
        numbers = count()
        yield from _timed(lambda: sum(len(batch.crops) for batch in loader.batches(next(numbers))), len(split))


def ffcv_three_pipelines(folder: str, workers: int) -> Iterator[float]:
    """The stock Loader with three stock decoders of the same field: three decodes."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec

    views = {
        f"view{number}": PipelineSpec(
            "image", decoder=RandomResizedCropRGBImageDecoder((SIDE, SIDE), scale=SCALE, ratio=RATIO), transforms=[]
        )
        for number in range(3)
    }
    loader = Loader(
        f"{folder}/ffcv/train.beton",
        batch_size=BATCH,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        pipelines={"image": None, "label": None, **views},
    )
    yield from _timed(lambda: sum(len(batch[0]) for batch in loader), len(loader) * BATCH)


def dali_stock(folder: str, workers: int) -> Iterator[float]:
    """DALI's own file reader, one decode and three random crops."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(file_root=f"{folder}/images", random_shuffle=True, name="reader")
        images = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
        views = [
            fn.random_resized_crop(
                images, size=(SIDE, SIDE), random_area=SCALE, random_aspect_ratio=RATIO, antialias=True
            )
            for _ in range(3)
        ]
        return (*views, labels)

    import numpy as np

    running = pipeline()
    running.build()
    images = running.reader_meta("reader")["epoch_size"]

    def epoch() -> int:
        handled = 0
        for number in range(images // BATCH):
            if number == 0:
                running.schedule_run()
            if number + 1 < images // BATCH:
                running.schedule_run()  # one ahead, and none at the end: it would decode in another's time
            views = running.share_outputs()[:3]
            batch = np.stack([np.asarray(view.as_tensor()) for view in views], axis=1)  # [B, V, S, S, 3], as ours
            handled += len(batch)
            running.release_outputs()
        return handled

    yield from _timed(epoch, images)


CONTESTANTS: dict[str, Contestant] = {
    "torchvision DataLoader, our boxes": ours_torchvision,
    "ours, ffcv": ours_ffcv,
    "FFCV, three pipelines": ffcv_three_pipelines,
    "ours, dali": ours_dali,
    "DALI, its own reader": dali_stock,
}


def _timed(epoch: Callable[[], int], images: int) -> Iterator[float]:
    """Seconds of each epoch, which must hand out all images."""
    while True:
        began = time.perf_counter()
        handled = epoch()
        taken = time.perf_counter() - began
        if handled != images:
            raise RuntimeError(f"{handled} of {images} images came")
        yield taken


@dataclass(frozen=True, kw_only=True)
class LoaderBenchmark:
    """Our loaders against torchvision's, FFCV's and DALI's, on CPU cores."""

    data: Path
    """A tar of JPEGs in class folders, or such a folder."""
    copies: int = 2
    """Every image this many times an epoch."""
    rounds: int = 9
    workers: int = len(os.sched_getaffinity(0))
    name: str = "loaders_cpu"
    """Of the result files."""
    data_label: str = ""
    """What the result files call the data, where its path should not stand in them."""
    out: Path = Path("benchmarks/results")

    def run(self) -> None:
        """Measure, and write the result files after every round."""
        from dataset_tools.conversion.convert import convert
        from dataset_tools.conversion.options import ConvertOptions

        with tempfile.TemporaryDirectory() as folder:
            os.environ["LEOCLR_CACHE"] = str(Path(folder) / "cache")
            images, num_bytes = write_copies(self.data, Path(folder) / "images", self.copies)
            convert(Path(folder) / "images", Path(folder) / "ffcv", ConvertOptions(format="ffcv", max_side=0))
            comparison = Comparison(
                name=self.name,
                out=self.out,
                title=f"Three views of {images:,} JPEGs ({num_bytes / 1e6:,.0f} MB) on {self.workers} cores",
                task=f"One epoch of {images:,} images, batches of {BATCH}, three uint8 views each.",
                notes="Images in the page cache; nothing is augmented. All but FFCV with three pipelines decode once.",
                amount=images,
                peers=PEERS,
                packages=("ffcv", "nvidia-dali-cuda130", "torch", "torchvision", "pillow", "numba", "numpy"),
                hidden={str(self.data): self.data_label or str(self.data)},
            )
            comparison.run(CONTESTANTS, (folder, self.workers), self.rounds)


if __name__ == "__main__":
    tyro.cli(LoaderBenchmark).run()
