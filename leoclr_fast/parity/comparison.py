"""Do all loaders hand out the same crops? Each against torchvision's, with the same order and the same boxes.

Legend: B images, V views, S side of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Meta

from dataset_tools.limits import Count, CountOrZero, Seed, require_allowed, unknown
from dataset_tools.sources import Split, open_source
from dataset_tools.splits import choose_splits
from dataset_tools.subsets import limited
from leoclr_fast.distributed.process_group import resolve_device
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.factory import LOADERS, make_loader, shows_images
from pipelines.loader import Loader
from pipelines.order import SequentialOrder
from pipelines.torchvision_loader import TorchvisionLoader
from pipelines.views import LEOCLR_VIEWS

Say = Callable[[str], None]

BACKENDS = tuple(name for name in LOADERS if name != TorchvisionLoader.name and shows_images(LoaderConfig(name=name)))


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest differences from the oracle that are allowed, in levels of 255."""

    mean: float
    max: float


CPU_LIMITS = Limits(mean=0.5, max=2)
"""Of every decoder and filter on a CPU; the resident and ffcv loaders are equal to the oracle."""
GPU_LIMITS = Limits(mean=0.5, max=24)
"""With JPEGs decoded on a GPU, whose inverse transform differs from libjpeg-turbo's. Not measured yet."""
REPEATED_CHROMA_LIMITS = Limits(mean=0.5, max=64)
"""Of a decoder that repeats chroma where libjpeg-turbo interpolates it. libjpeg-turbo's own two ways differ by 0.08 on
average over 400 photographs of ImageNet (2.0 in the worst crop), and by 43 at most: see the tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityConfig:
    """What is compared."""

    loaders: tuple[str, ...] = ()
    """Names of --loader; by default all that can run here."""
    max_images: Count | None = 256
    """At most so many images, a class-balanced choice; all if None."""
    image_size: Annotated[int, Meta(ge=1, le=4096)] = 224
    """Side of a view, pixels."""
    batch_size: Count = 32
    worst: Count = 4
    """Crops that are kept of each loader: those that differ most."""
    seed: Seed = 0
    """Draws the boxes."""
    workers: CountOrZero | None = None
    """Threads or worker processes of each loader; by default one for each core."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_allowed(self)
        for name in self.loaders:
            if name not in BACKENDS:
                raise ValueError(unknown("loader to compare with torchvision", name, BACKENDS))


@dataclass(slots=True, kw_only=True)
class WorstCrop:
    """A crop by the oracle and by another loader: uint8 [S, S, 3] each."""

    mean_difference: float
    name: str
    view: str
    oracle: npt.NDArray[np.uint8]
    ours: npt.NDArray[np.uint8]


@dataclass(slots=True, kw_only=True)
class BackendParity:
    """One loader on one data set. Differences are absolute, in levels of 255."""

    loader: str
    data: str
    limits: Limits
    images: int = 0
    unequal: set[str] = field(default_factory=set)
    """Of indices, boxes and labels, which must be equal, those that are not."""
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    """int64 [256]: how many values differ by so much."""
    worst: list[WorstCrop] = field(default_factory=list)
    """Those that differ most on average, the worst first."""

    @property
    def mean(self) -> float:
        return float(self.counts @ np.arange(256)) / max(1, int(self.counts.sum()))

    @property
    def max(self) -> int:
        return int(np.flatnonzero(self.counts).max(initial=0))

    @property
    def ok(self) -> bool:
        """Everything is equal that has to be, and the pixels are within the limits."""
        return not self.unequal and self.mean <= self.limits.mean and self.max <= self.limits.max

    def row(self) -> dict[str, Any]:
        """As plain JSON, without the counts and the crops."""
        names = ("loader", "data", "ok", "images", "mean", "max")
        return {name: getattr(self, name) for name in names} | {"unequal": sorted(self.unequal)}


def measure_parity(
    config: ParityConfig, data: Sequence[Path], say: Say = lambda _: None
) -> tuple[list[BackendParity], list[str]]:
    """Every loader that can run here on every one of ``data``; and why others could not.

    Raises ValueError for data or settings that cannot be.
    """
    device = resolve_device(config.device)
    results: list[BackendParity] = []
    obstacles: list[str] = []
    for path in data:
        split = limited(choose_splits(open_source(path)).pretrain, config.max_images)
        for name in config.loaders or BACKENDS:
            try:
                loader = _open(name, split, config, device)
            except (ImportError, ValueError, RuntimeError) as error:
                obstacles.append(f"{name} on {path.name}: {error}")
                say(obstacles[-1])
                continue
            with loader:
                results.append(_compared(loader, path.name, config))
            say(f"{name} on {path.name}: mean {results[-1].mean:.3f}, max {results[-1].max} levels")
    return results, obstacles


def _open(name: str, split: Split, config: ParityConfig, device: torch.device) -> Loader:
    order = SequentialOrder(num_images=len(split), batch_size=config.batch_size)
    settings = LoaderConfig(name=name, workers=config.workers)
    views = ViewConfig(image_size=config.image_size)
    return make_loader(split, LEOCLR_VIEWS, views, settings, order, seed=config.seed, device=device)


def _compared(loader: Loader, data: str, config: ParityConfig) -> BackendParity:
    limits = CPU_LIMITS
    if loader.device.type == "cuda" and loader.decodes_on_gpu:
        limits = REPEATED_CHROMA_LIMITS if loader.repeats_chroma else GPU_LIMITS
    result = BackendParity(loader=loader.name, data=data, limits=limits)
    oracle = TorchvisionLoader(
        loader.split,
        loader.views,
        loader.view_config,
        LoaderConfig(workers=config.workers),
        loader.order,
        seed=config.seed,
        device=torch.device("cpu"),
    )
    with oracle:
        for ours, theirs in zip(loader.batches(0), oracle.batches(0), strict=True):
            result.images += len(ours.indices)
            for name in ("indices", "boxes", "labels"):
                if not np.array_equal(getattr(ours, name), getattr(theirs, name)):
                    result.unequal.add(name)
            _add(result, ours, theirs, loader, config.worst)
    return result


def _add(result: BackendParity, ours: CropBatch, theirs: CropBatch, loader: Loader, keep: int) -> None:
    """Take a batch into account."""
    crops, expected = ours.crops.cpu().numpy(), theirs.crops.numpy()  # [B, V, S, S, 3]
    difference = np.where(crops > expected, crops - expected, expected - crops)
    result.counts += np.bincount(difference.ravel(), minlength=256)
    means = difference.mean(axis=(2, 3, 4))  # [B, V]
    for flat in np.argsort(-means, axis=None, kind="stable")[:keep].tolist():
        row, view = divmod(flat, means.shape[1])
        result.worst.append(
            WorstCrop(
                mean_difference=float(means[row, view]),
                name=loader.split.names[int(theirs.indices[row])],
                view=loader.views[view].name,
                oracle=expected[row, view].copy(),
                ours=crops[row, view].copy(),
            )
        )
    result.worst = sorted(result.worst, key=lambda crop: -crop.mean_difference)[:keep]
