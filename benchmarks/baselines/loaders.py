"""What people load images with instead of our loaders, for `benchmarks.loader_timing`.

They make the views that ours make, of boxes that they draw themselves of the same distribution. FFCV's own decoders
cannot scale a whole image, so that it makes random crops alone. Legend: B images, V views, S side of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.loader_implementations import VIEWS, Epochs, LoaderTask, finish, splits, timed
from dataset_tools.formats.beton import Beton
from dataset_tools.formats.tar_shards import TarShards
from dataset_tools.sources import Split
from dataset_tools.sources.converted import ConvertedSplit
from dataset_tools.sources.image_folder import FolderSplit
from pipelines.byte_readers import base_of
from pipelines.decode import decode_rgb


def stock_torchvision(task: LoaderTask) -> Epochs:
    """A DataLoader over a data set of Pillow images, with torchvision's Resize and RandomResizedCrop."""
    from torch.utils.data import DataLoader

    split = next(splits(task))
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
            finish(crops.to(task.device, non_blocking=True))
        return images, decodes

    yield from timed(epoch)


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
            finish(crops)
        return images, decoders * images

    yield from timed(epoch)


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
            finish(batch)
            del crops
            running.release_outputs()
        return images, decoders * images

    yield from timed(epoch)


def _beton(task: LoaderTask) -> tuple[ConvertedSplit, Sequence[int] | None]:
    for split in splits(task):
        base, chosen = base_of(split)
        if isinstance(base, ConvertedSplit) and isinstance(base.output, Beton):
            return base, None if chosen is None else chosen.tolist()
    raise ValueError("it reads .betons alone; give a data set converted with --format ffcv as a further --data")


def _dali_reader(task: LoaderTask, fn: Any) -> Any:
    """The encoded images, by DALI's reader named "reader"."""
    for split in splits(task):
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


LOADERS: dict[str, Callable[[LoaderTask], Epochs]] = {
    "stock-torchvision": stock_torchvision,
    "stock-ffcv": stock_ffcv,
    "stock-dali": stock_dali,
}
"""Name of --loaders -> its epochs."""
