"""Our loaders against what people use: `python -m benchmarks.loaders --help`.

Every contestant makes three views of each image of one epoch, as uint8 on the CPU, from JPEGs that lie in the page
cache: the uncropped original and two random crops (three random crops, where FFCV decodes by itself). Ours draw our
boxes, the stock pipelines their own of the same distribution.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from benchmarks.convert import write_copies
from benchmarks.interleaved import Comparison, Contestant
from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import open_source
from dataset_tools.splits import choose_splits
from leoclr_fast.bench.loader_contestants import (
    LoaderTask,
    LoaderTurn,
    ours,
    stock_dali,
    stock_ffcv,
    stock_torchvision,
)

SIDE = 224
BATCH = 50
PEERS = {
    "ours, ffcv": (
        "torchvision DataLoader, our boxes",
        "torchvision DataLoader, RandomResizedCrop",
        "FFCV, three pipelines",
    ),
    "ours, dali": ("DALI, its own reader", "torchvision DataLoader, our boxes"),
}


def seconds(turns: Callable[[LoaderTask], Iterator[LoaderTurn]], task: LoaderTask) -> Iterator[float]:
    """Of each turn of a contestant of `leoclr_fast.bench`, which must hand out the images of a whole epoch."""
    images = BATCH * (len(choose_splits(open_source(task.data[0])).pretrain) // BATCH)
    for turn in turns(task):
        if turn.images != images:
            raise RuntimeError(f"{turn.images} of {images} images came")
        yield turn.seconds


CONTESTANTS: dict[str, Contestant] = {
    "torchvision DataLoader, our boxes": partial(seconds, partial(ours, "torchvision")),
    "torchvision DataLoader, RandomResizedCrop": partial(seconds, stock_torchvision),
    "ours, ffcv": partial(seconds, partial(ours, "ffcv")),
    "FFCV, three pipelines": partial(seconds, stock_ffcv),
    "ours, dali": partial(seconds, partial(ours, "dali")),
    "DALI, its own reader": partial(seconds, stock_dali),
}


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
            task = LoaderTask(
                data=(Path(folder) / "images", Path(folder) / "ffcv"),
                views=3,
                image_size=SIDE,
                batch_size=BATCH,
                workers=self.workers,
                device="cpu",
                max_images=None,
            )
            comparison.run(CONTESTANTS, (task,), self.rounds)


if __name__ == "__main__":
    tyro.cli(LoaderBenchmark).run()
