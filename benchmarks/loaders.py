"""Our loaders against what people use, as `loader_timing` times them: `python -m benchmarks.loaders --help`.

Each makes three views of each image of one epoch, as uint8 on the CPU, from JPEGs that lie in the page cache.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.loader_timing import LoaderBenchConfig, bench_loader, loader_markdown
from benchmarks.results import OnImages
from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from leoclr_fast.bench.page import interval
from leoclr_fast.bench.statistics import ratio_interval

BATCH = 50
PEERS = {"ffcv": ("torchvision", "stock-torchvision", "stock-ffcv"), "dali": ("stock-dali", "torchvision")}
"""One of ours -> the loaders that it is compared with."""


@dataclass(frozen=True, kw_only=True)
class LoaderBenchmark(OnImages):
    """Our loaders against torchvision's, FFCV's and DALI's, on CPU cores."""

    copies: int = 2
    workers: int = len(os.sched_getaffinity(0))
    name: str = "loaders_cpu"

    def run(self) -> None:
        results = self.results()
        names = tuple(dict.fromkeys([*PEERS, *(peer for peers in PEERS.values() for peer in peers)]))
        config = LoaderBenchConfig(
            loaders=names, rounds=self.rounds, workers=self.workers, batch_size=BATCH, device="cpu"
        )
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LEOCLR_CACHE"] = str(Path(folder) / "cache")
            images, converted = Path(folder) / "images", Path(folder) / "ffcv"
            self.write_copies(images)
            convert(images, converted, ConvertOptions(format="ffcv", max_side=0))
            document = bench_loader(config, [images, converted], results.say)
        rates = {row["loader"]: row["rounds_images_per_s"] for row in document["rows"]}
        document["ratios"] = {
            name: {peer: ratio_interval(rates[name], rates[peer]) for peer in peers} for name, peers in PEERS.items()
        }
        ratios = [
            f"- {name} is {interval(ratio, 2)} times as fast as {peer}\n"
            for name, peers in document["ratios"].items()
            for peer, ratio in peers.items()
        ]
        page = loader_markdown(document, results.command) + "\n" + "".join(ratios)
        results.write(document, page)
        print(page)


if __name__ == "__main__":
    tyro.cli(LoaderBenchmark).run()
