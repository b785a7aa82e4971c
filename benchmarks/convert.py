"""Our converter against FFCV's DatasetWriter and webdataset's ShardWriter: `python -m benchmarks.convert --help`.

All convert the same images, on the same disk, with as many workers; but webdataset's ShardWriter is one process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from torchvision.datasets import ImageFolder

from benchmarks.results import OnImages, TimedTask, compare
from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions

PEERS = {
    "ours, ffcv --check header": ("FFCV DatasetWriter, jpg",),
    "ours, ffcv --check decode": ("FFCV DatasetWriter, jpg",),
    "ours, ffcv --mode reencode": ("FFCV DatasetWriter, jpg",),
    "ours, webdataset --check header": ("webdataset ShardWriter",),
}


def ours(options: dict[str, Any], source: str, scratch: str, workers: int) -> Iterator[float]:
    chosen = ConvertOptions(**options)
    yield from _timed(lambda out: convert(source, out / "converted", chosen, workers=workers), source, scratch)


def ffcv_writer(source: str, scratch: str, workers: int) -> Iterator[float]:
    """As FFCV's ImageNet example: torchvision's ImageFolder, write_mode jpg, quality 90, no resizing."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    def convert(out: Path) -> None:
        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
        DatasetWriter(str(out / "train.beton"), fields, num_workers=workers).from_indexed_dataset(ImageFolder(source))

    yield from _timed(convert, source, scratch)


def shard_writer(source: str, scratch: str, workers: int) -> Iterator[float]:
    """One process that copies the files as they are, in a shuffled order, as ours does."""
    from webdataset import ShardWriter

    def convert(out: Path) -> None:
        samples = ImageFolder(source).samples
        with ShardWriter(str(out / "train-%06d.tar"), maxsize=256 << 20, maxcount=1 << 30, verbose=0) as shards:
            for key, index in enumerate(np.random.default_rng(0).permutation(len(samples))):
                path, label = samples[index]
                shards.write({"__key__": f"{key:09}", "jpg": Path(path).read_bytes(), "cls": label})

    yield from _timed(convert, source, scratch)


_FFCV = {"format": "ffcv", "max_side": 0}
TASKS: dict[str, TimedTask] = {
    "ours, ffcv --check header": partial(ours, _FFCV),
    "ours, ffcv --check decode": partial(ours, _FFCV | {"check": "decode"}),
    "ours, ffcv --mode reencode": partial(ours, _FFCV | {"mode": "reencode"}),
    "ours, webdataset --check header": partial(ours, {"format": "webdataset"}),
    "FFCV DatasetWriter, jpg": ffcv_writer,
    "webdataset ShardWriter": shard_writer,
}


def _timed(convert: Callable[[Path], object], source: str, scratch: str) -> Iterator[float]:
    """Seconds of each conversion into an empty folder, the images being in the page cache."""
    while True:
        out = Path(scratch) / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()  # what others left to write is not this one's
        for path in Path(source).glob("*/*"):
            path.read_bytes()
        began = time.perf_counter()
        convert(out)
        taken = time.perf_counter() - began
        shutil.rmtree(out)
        yield taken


@dataclass(frozen=True, kw_only=True)
class ConvertBenchmark(OnImages):
    """Our converter against FFCV's and webdataset's."""

    copies: int = 10
    workers: int = len(os.sched_getaffinity(0))
    name: str = "convert_cpu"
    scratch: Path | None = None
    """A folder on the disk to use; the one for temporary files if not given."""

    def run(self) -> None:
        """Measure, and write the result files after every round."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            os.environ["LEOCLR_CACHE"] = str(Path(folder) / "cache")
            source = Path(folder) / "images"
            images, num_bytes = self.write_copies(source)
            compare(
                self.results(),
                TASKS,
                (str(source), folder, self.workers),
                self.rounds,
                title=f"Conversion of {images:,} JPEGs ({num_bytes / 1e6:,.0f} MB) with {self.workers} workers",
                task=f"{images:,} JPEGs are converted.",
                notes="Images in the page cache; ours with --max-side 0, so that none is resized, as in FFCV's "
                "example. Ours are synced to the disk, hashed and journaled when the clock stops; the peers' bytes are "
                "then with the system. ShardWriter is one process.",
                num_images=images,
                peers=PEERS,
                packages=("webdataset", "opencv-python"),
            )


if __name__ == "__main__":
    tyro.cli(ConvertBenchmark).run()
