"""Reading from a slow store, against the number of workers: `python -m benchmarks.slow_store --help`.

Every read waits, as it would for a network file system; the images themselves lie in the page cache. Nothing is decoded
or cut: what is timed is the host's side of the loaders, which hand out empty crops.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro

from benchmarks.results import OnImages, made_with
from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.files import ByteFile, read_file
from dataset_tools.sources import Split, open_source
from leoclr_fast.bench.page import bench_page, markdown_table, spread
from leoclr_fast.bench.statistics import quantiles
from leoclr_fast.bench.timing import interleaved
from leoclr_fast.run.environment import environment
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.encoded_loader import EncodedLoader, Pass
from pipelines.factory import loader_class
from pipelines.loader import DecodedBatch
from pipelines.nvjpeg_loader import NvjpegLoader
from pipelines.order import TrainOrder
from pipelines.views import LEOCLR_VIEWS

SOURCES = {"dali": "webdataset", "nvjpeg": "folder", "ffcv": "ffcv"}
"""Each loader -> what it reads here."""
BATCH, VIEW = 64, 16
AT_LEAST_S, AT_LEAST_BATCHES = 1.5, 4


def images_per_s(name: str, split: Split, workers: int, delay_s: float) -> float:
    """Of a loader whose decoding does nothing, once its read-ahead is full."""

    def read_into(file: ByteFile, *place: Any) -> None:
        time.sleep(delay_s)
        original(file, *place)

    def read_slowly(path: str) -> bytes:
        time.sleep(delay_s)
        return read_file(path)

    def decode_nothing(loader: EncodedLoader, current: Pass) -> DecodedBatch:
        batch = loader.next_read(current)
        crops = torch.empty(len(batch), len(loader.views), VIEW, VIEW, 3, dtype=torch.uint8)
        return DecodedBatch(crops, batch.indices, batch.boxes, batch.unreadable)

    original, kind = ByteFile.read_into, loader_class(name)
    order = TrainOrder(num_images=len(split), batch_size=BATCH, seed=0)
    config = LoaderConfig(name=name, workers=workers)
    with (
        mock.patch.object(ByteFile, "read_into", read_into),
        mock.patch("dataset_tools.sources.image_folder.read_file", read_slowly),
        mock.patch.object(kind, "decode_next", decode_nothing),
        mock.patch.object(NvjpegLoader, "devices", ("cpu",)),
        kind(
            split, LEOCLR_VIEWS, ViewConfig(image_size=VIEW), config, order, seed=0, device=torch.device("cpu")
        ) as loader,
    ):
        read, began = 0, 0.0
        for batch in (batch for epoch in range(1 << 30) for batch in loader.batches(epoch)):
            if not began and batch.step > config.prefetch_batches:
                read, began = -len(batch.indices), time.perf_counter()
            read += len(batch.indices)
            taken = time.perf_counter() - began
            if began and taken >= AT_LEAST_S and read >= AT_LEAST_BATCHES * BATCH:
                return read / taken
    raise AssertionError("epochs do not end")


@dataclass(frozen=True, kw_only=True)
class SlowStoreBenchmark(OnImages):
    """Images/s that loaders read from a slow store, against the number of workers."""

    copies: int = 4
    delays_ms: tuple[float, ...] = (1.0, 10.0)
    """How long each read waits."""
    workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    rounds: int = 3
    name: str = "slow_store_cpu"

    def run(self) -> None:
        """Measure, and write the result files after every round."""
        results = self.results()
        rates: dict[tuple[str, float, int], list[float]] = {
            (name, delay, count): [] for delay in self.delays_ms for name in SOURCES for count in self.workers
        }
        surroundings = environment(torch.device("cpu"), 1)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.write_copies(folder / "folder")
            for kind in ("ffcv", "webdataset"):
                convert(folder / "folder", folder / kind, ConvertOptions(format=kind, max_side=0))
            splits = {name: open_source(folder / kind, quietly=True).splits["train"] for name, kind in SOURCES.items()}
            for number, cell in interleaved(list(rates), self.rounds):
                name, delay_ms, count = cell
                rates[cell].append(images_per_s(name, splits[name], count, delay_ms / 1000))
                results.say(f"round {number + 1}: {name}, {delay_ms:g} ms, {count} workers: {rates[cell][-1]:,.0f}/s")
                if min(map(len, rates.values())) > number:
                    document = {
                        "images_per_s": [
                            {"loader": n, "delay_ms": d, "workers": w, "rounds": r} for (n, d, w), r in rates.items()
                        ],
                        "environment": surroundings,
                    }
                    results.write(document, self._page(rates, number + 1, made_with(surroundings), results.command))

    def _page(self, rates: dict[tuple[str, float, int], list[float]], rounds: int, setting: str, command: str) -> str:
        cells = {key: spread(quantiles("rate", own), "rate", 0) for key, own in rates.items()}
        rows = [
            (f"{name} from {SOURCES[name]}, {delay:g} ms", *(cells[name, delay, count] for count in self.workers))
            for delay in self.delays_ms
            for name in SOURCES
        ]
        return bench_page(
            "Reading from a slow store, images/s",
            setting.removesuffix("."),
            markdown_table(("each read waits", *(f"{count} workers" for count in self.workers)), rows),
            rounds=f"{rounds} interleaved rounds of {AT_LEAST_S:g} s and {AT_LEAST_BATCHES * BATCH} images at least.",
            command=command,
            remarks=[
                "Nothing is decoded: reading and what comes with it (headers, boxes, joining the pieces) alone. A "
                "worker reads one image at a time, so that w workers can reach w / wait: 1,600 at 10 ms and 16.",
                f"{len(os.sched_getaffinity(0))} cores.",
            ],
        )


if __name__ == "__main__":
    tyro.cli(SlowStoreBenchmark).run()
