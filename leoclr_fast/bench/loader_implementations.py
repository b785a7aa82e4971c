"""What `bench loader` times: our loaders, what people use instead, and the ceilings over both.

Each is a generator function; each `next` handles all images once and yields a `TimedEpoch`. All but the ceilings make
the same views of each image, as uint8 on the device: LeOCLR's original and two random crops, or MoCo-v2's two crops.
Ours draw our boxes, the others their own of the same distribution. (FFCV's own decoders cannot scale a whole image, so
that it makes random crops alone.)
Legend: B images, V views, S side of a view.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset_tools.conversion.jpeg import START
from dataset_tools.formats.beton import Beton
from dataset_tools.formats.tar_shards import TarShards
from dataset_tools.sources import Split, open_source
from dataset_tools.sources.converted import ConvertedSplit
from dataset_tools.sources.image_folder import FolderSplit
from dataset_tools.splits import choose_splits
from dataset_tools.subsets import limited
from pipelines.byte_readers import base_of, open_bytes
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.decode import decode_rgb
from pipelines.factory import LOADERS, make_loader, shows_images
from pipelines.order import TrainOrder
from pipelines.views import LEOCLR_VIEWS, MOCOV2_VIEWS


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderTask:
    """The same for every loader."""

    data: tuple[Path, ...]
    """The same images in one or several formats; a loader takes the first that it can read."""
    views: int
    image_size: int
    batch_size: int
    workers: int
    device: str
    max_images: int | None

    @property
    def view_config(self) -> ViewConfig:
        return ViewConfig(image_size=self.image_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedEpoch:
    """All images once."""

    images: int
    seconds: float
    decodes: int
    """How many times an image was decoded in that time."""


Epochs = Iterator[TimedEpoch]
VIEWS = {2: MOCOV2_VIEWS, 3: LEOCLR_VIEWS}
"""Number of views -> the recipe that has so many."""


def _timed(epoch: Callable[[int], tuple[int, int]]) -> Epochs:
    """epoch: goes through all images once, given the number of the epoch, and returns how many there were and how often
    one was decoded.
    """
    for number in count():
        began = time.perf_counter()
        images, decodes = epoch(number)
        yield TimedEpoch(images=images, seconds=time.perf_counter() - began, decodes=decodes)


def ours(name: str, task: LoaderTask) -> Epochs:
    """One of `pipelines.factory.LOADERS`."""
    device = torch.device(task.device)
    views = VIEWS[task.views]
    loader = None
    for split in _splits(task):
        order = TrainOrder(num_images=len(split), batch_size=task.batch_size, seed=0)
        config = LoaderConfig(name=name, workers=task.workers)
        try:
            loader = make_loader(split, views, task.view_config, config, order, seed=0, device=device)
        except ValueError as error:
            refusal = error
            continue
        break
    if loader is None:
        raise refusal

    def epoch(number: int) -> tuple[int, int]:
        before, images = loader.num_decodes, 0
        for batch in loader.batches(number):
            images += len(batch.crops)
            _finish(batch.crops)
        return images, loader.num_decodes - before

    with loader:
        yield from _timed(epoch)


def stock_torchvision(task: LoaderTask) -> Epochs:
    """A DataLoader over a data set of Pillow images, with torchvision's Resize and RandomResizedCrop."""
    from torch.utils.data import DataLoader

    split = next(_splits(task))
    dataset = _StockDataset(split, task)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=task.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=task.workers,
        persistent_workers=task.workers > 0,
        pin_memory=task.device != "cpu",
    )

    def epoch(_: int) -> tuple[int, int]:
        images, decodes = 0, 0
        for crops, num_decodes in loader:
            images += len(crops)
            decodes += int(num_decodes.sum())
            _finish(crops.to(task.device, non_blocking=True))
        return images, decodes

    yield from _timed(epoch)


class _StockDataset(torch.utils.data.Dataset[Any]):
    def __init__(self, split: Split, task: LoaderTask) -> None:
        from torchvision.transforms import RandomResizedCrop, Resize

        config = task.view_config
        crop = RandomResizedCrop(task.image_size, scale=config.crop_scale, ratio=config.crop_ratio)
        whole = Resize((task.image_size, task.image_size))
        self._split = split
        self._views = [whole if view.geometry == "original" else crop for view in VIEWS[task.views]]

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = decode_rgb(self._split, index)
        crops = np.stack([np.asarray(view(image)) for view in self._views])
        return torch.from_numpy(crops), 1


def stock_ffcv(task: LoaderTask) -> Epochs:
    """FFCV's Loader with its own decoder, one pipeline for each view: each of them decodes."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec

    config = task.view_config
    side = (task.image_size, task.image_size)
    pipelines = {
        f"view{number}": PipelineSpec(
            "image",
            decoder=RandomResizedCropRGBImageDecoder(side, scale=config.crop_scale, ratio=config.crop_ratio),
            transforms=[],
        )
        for number in range(task.views)
    }
    base, chosen = _beton(task)
    loader = Loader(
        str(base.files[0].path),
        batch_size=task.batch_size,
        num_workers=max(1, task.workers),
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        indices=chosen,
        pipelines={"image": None, "label": None, **pipelines},
    )
    decoders = sum(spec is not None and spec.source == "image" for spec in loader.pipeline_specs.values())

    def epoch(_: int) -> tuple[int, int]:
        images = 0
        for batch in loader:
            views = [torch.from_numpy(view) for view in batch[: task.views]]  # no ToTensor: numpy arrays
            crops = torch.stack([view.to(task.device, non_blocking=True) for view in views], dim=1)
            images += len(crops)
            _finish(crops)
        return images, decoders * images

    yield from _timed(epoch)


def stock_dali(task: LoaderTask) -> Epochs:
    """DALI's own reader of a folder or of tars, one decode, its resize and its random_resized_crop."""
    from nvidia.dali import fn, pipeline_def, types

    config, on_gpu = task.view_config, task.device != "cpu"

    @pipeline_def(
        batch_size=task.batch_size,
        num_threads=max(1, task.workers),
        device_id=0 if on_gpu else None,
        prefetch_queue_depth=2,
    )
    def pipeline() -> Any:
        encoded = _dali_reader(task, fn)
        images = fn.decoders.image(
            encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
        )
        side = (task.image_size, task.image_size)
        crops = [
            fn.resize(images, size=side, antialias=True)
            if view.geometry == "original"
            else fn.random_resized_crop(
                images,
                size=side,
                random_area=config.crop_scale,
                random_aspect_ratio=config.crop_ratio,
                antialias=True,
            )
            for view in VIEWS[task.views]
        ]
        return fn.stack(*crops)

    running = pipeline()
    running.build()
    steps = running.reader_meta("reader")["epoch_size"] // task.batch_size
    if not steps:
        raise ValueError(f"there are fewer images than one batch of {task.batch_size}; lower --batch-size")
    decoders = running.serialize().count(b"decoders__Image")

    def epoch(_: int) -> tuple[int, int]:
        images = 0
        running.schedule_run()
        for step in range(steps):
            if step + 1 < steps:
                running.schedule_run()  # one ahead, and none at the end: it would decode in another's time
            (crops,) = running.share_outputs()
            batch = torch.from_dlpack(crops.as_tensor()).clone()  # [B, V, S, S, 3], nobody else's memory, as ours
            images += len(batch)
            _finish(batch)
            del crops
            running.release_outputs()
        return images, decoders * images

    yield from _timed(epoch)


def read_only(task: LoaderTask) -> Epochs:
    """A ceiling: the encoded bytes of every batch, in the order of an epoch, and nothing made of them."""
    split = next(_splits(task))
    reader = open_bytes(split)
    order = TrainOrder(num_images=len(split), batch_size=task.batch_size, seed=0)
    with ThreadPoolExecutor(max(1, task.workers)) as pool:

        def epoch(number: int) -> tuple[int, int]:
            batches = [order.indices(number, step) for step in range(order.steps_per_epoch)]
            return sum(len(encoded) for encoded in pool.map(reader.read, batches)), 0

        yield from _timed(epoch)


def decode_only(task: LoaderTask) -> Epochs:
    """A ceiling: every JPEG decoded once by libjpeg-turbo on all threads, out of memory; no view is cut.

    Raises ValueError if there is none.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    split = next(_splits(task))
    encoded = open_bytes(split).read(np.arange(len(split), dtype=np.int64))
    rows = [row for row in range(len(encoded)) if encoded[row][:2].tobytes() == START]
    images = [torch.from_numpy(encoded[row]) for row in rows]
    if not images:
        raise ValueError("it decodes JPEGs alone, and none of the images is one")

    def decode(image: torch.Tensor) -> int:
        return len(decode_jpeg(image, mode=ImageReadMode.RGB)) // 3

    with ThreadPoolExecutor(max(1, task.workers)) as pool:
        yield from _timed(lambda _: (len(images), sum(pool.map(decode, images))))


LOADERS_UNDER_TEST: dict[str, Callable[[LoaderTask], Epochs]] = {
    **{name: partial(ours, name) for name in LOADERS},
    "stock-torchvision": stock_torchvision,
    "stock-ffcv": stock_ffcv,
    "stock-dali": stock_dali,
}
"""Ours by their names of --loader, and what people use instead."""
SHOWING_NO_IMAGES = [name for name in LOADERS if not shows_images(LoaderConfig(name=name))]
CEILINGS: dict[str, Callable[[LoaderTask], Epochs]] = {"read-only": read_only, "decode-only": decode_only}
"""What no loader can be faster than on this machine, by name."""


def _finish(crops: torch.Tensor) -> None:
    """Wait until the crops are there: the next batch must not be started on the cheap."""
    if crops.is_cuda:
        torch.cuda.current_stream(crops.device).synchronize()


def _splits(task: LoaderTask) -> Iterator[Split]:
    for path in task.data:
        yield limited(choose_splits(open_source(path)).pretrain, task.max_images)


def _beton(task: LoaderTask) -> tuple[ConvertedSplit, Sequence[int] | None]:
    for split in _splits(task):
        base, chosen = base_of(split)
        if isinstance(base, ConvertedSplit) and isinstance(base.output, Beton):
            return base, None if chosen is None else chosen.tolist()
    raise ValueError("it reads .betons alone; give a data set converted with --format ffcv as a further --data")


def _dali_reader(task: LoaderTask, fn: Any) -> Any:
    """The encoded images, by DALI's reader named "reader"."""
    for split in _splits(task):
        base, chosen = base_of(split)
        if isinstance(base, FolderSplit):
            indices = range(len(base)) if chosen is None else chosen.tolist()
            files = [base.names[index] for index in indices]
            return fn.readers.file(file_root=str(base.root), files=files, random_shuffle=True, name="reader")[0]
        if isinstance(base, ConvertedSplit) and isinstance(base.output, TarShards) and chosen is None:
            paths = [str(file.path) for file in base.files]
            images, *_ = fn.readers.webdataset(paths=paths, ext=["jpg;jpeg;png"], random_shuffle=True, name="reader")
            return images
    raise ValueError("it reads image folders and whole WebDataset folders; give one as a further --data")
