"""Section `loaders`: JPEGs decoded on this device are torchvision's to a few levels, and what they add to a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.gpu_suite.benches import rounds_of, without_title
from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig, UnavailableError
from benchmarks.results import write_copies
from dataset_tools.sources import Split, open_source
from dataset_tools.splits import choose_splits
from leoclr_fast.bench.config import TrainTimeConfig
from leoclr_fast.bench.page import markdown_table
from leoclr_fast.bench.train_time import bench_train_time, train_time_markdown
from leoclr_fast.distributed.process_group import resolve_device
from leoclr_fast.parity.comparison import ParityConfig, measure_parity
from leoclr_fast.parity.page import PARITY_HEADER, parity_cells
from pipelines.config import LoaderConfig
from pipelines.decode import image_size

_JPEG_BEGIN = b"\xff\xd8"
_SAMPLES = 64
_DECODERS = ("dali", "nvjpeg")
"""Those that decode on a GPU."""


def run_parity(config: SuiteConfig, say: Say) -> Answer:
    """Parity of every loader that can run here, on a GPU of those that decode there."""
    data, _, result, note = _data(config)
    settings = ParityConfig(
        loaders=_DECODERS if resolve_device(config.device).type == "cuda" else (),
        max_images=32 if config.tiny else 128,
        image_size=config.result.views.image_size,
        batch_size=8 if config.tiny else 32,
        device=config.device,
    )
    found, obstacles = measure_parity(settings, [data], say)
    result["parity"], result["not_compared"] = [one.row() for one in found], obstacles
    result["too_far_off"] = sum(not one.ok for one in found)
    table = markdown_table(PARITY_HEADER, map(parity_cells, found))
    lines = [note, "Against torchvision's crops, in levels of 255:\n", table, *(f"- {line}" for line in obstacles), ""]
    return Answer(result=result, markdown="\n".join(lines))


def run(config: SuiteConfig, say: Say) -> Answer:
    """LeOCLR and MoCo-v2 on synthetic and on real images, which the loader decodes in every epoch.

    Few images are copied until an epoch is long; they are read from the system's memory, so no disk is measured.
    """
    data, split, result, note = _data(config)
    with at_least(data, split, (4 if config.tiny else 64) * config.result.batch_size) as images:
        speed = replace(config.speed(), loader=LoaderConfig(resident_limit_gib=0.0))
        rounds = rounds_of(config, rounds=6)
        document = bench_train_time(TrainTimeConfig(), rounds, config.setting, speed, images, say)
    result["train_time"] = document
    result["loader"] = next(row["loader"] for row in document["rows"] if row["data"] == "real")
    result["real_over_synthetic"] = {method: _real_over_synthetic(document, method) for method in document["titles"]}
    costs = ", ".join(f"{method} {ratio:.3f}" for method, ratio in result["real_over_synthetic"].items())
    page = without_title(train_time_markdown(document))
    note += (
        f"\nStep time with real images, loader {result['loader']}, over that with synthetic ones: {costs}.\n\n{page}"
    )
    return Answer(result=result, markdown=note)


def _data(config: SuiteConfig) -> tuple[Path, Split, dict[str, Any], str]:
    """The images, those to train on, and what they are: images, and of some of them jpeg_fraction and
    median_shorter_side (pixels)."""
    data = config.photographs or config.data
    if data is None:
        raise UnavailableError("no data: give --photographs, or --data, with JPEGs")
    split = choose_splits(open_source(data)).pretrain
    sample = np.unique(np.linspace(0, len(split) - 1, _SAMPLES).astype(int)).tolist()
    jpegs = sum(split.read(index)[:2] == _JPEG_BEGIN for index in sample) / len(sample)
    side = int(median(min(image_size(split, index)) for index in sample))
    note = (
        f"{data.name}: {len(split):,} images, {jpegs:.0%} of them JPEGs, the shorter side {side} pixels, for views of "
        f"{config.result.views.image_size}.\n"
    )
    found = {"data": data.name, "images": len(split), "jpeg_fraction": jpegs, "median_shorter_side": side}
    return data, split, found, note


@contextmanager
def at_least(data: Path, split: Split, num_images: int) -> Iterator[Path]:
    """`data` itself where `split` has so many images to train on; else a folder of copies of them, as hard links."""
    if len(split) >= num_images:
        yield data
        return
    with TemporaryDirectory() as folder:
        write_copies(split, Path(folder), math.ceil(num_images / len(split)))
        yield Path(folder)


def _real_over_synthetic(document: dict[str, Any], method: str) -> float:
    times = {row["data"]: row["step_ms"] for row in document["rows"] if row["method"] == method}
    return float(times["real"] / times["synthetic"])
