"""What torchvision does: PIL decode and resize in worker processes. Slow, plain, and the oracle of other loaders."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset_tools.sources import Split
from pipelines.batch import CropBatch
from pipelines.config import ViewConfig
from pipelines.cores import available_cores
from pipelines.crops import Boxes
from pipelines.decode import UnreadableImageError, decode_rgb, next_index
from pipelines.device_copies import DeviceCopies, PendingCopy
from pipelines.loader import Loader, max_unreadable
from pipelines.order import Order, TrainOrder
from pipelines.views import ViewRecipe, draw_boxes


class TorchvisionLoader(Loader):
    """``torch.utils.data.DataLoader`` with our order and boxes; one PIL decode per image, one PIL resize per view."""

    name = "torchvision"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        workers = available_cores() if self.config.workers is None else self.config.workers
        self._copies = DeviceCopies(self.device)
        self._sampler = _StepSampler(self.order)
        self._loader: DataLoader[_HostBatch] = DataLoader(
            _CropDataset(self.split, self.views, self.view_config, self.seed),
            batch_sampler=self._sampler,
            num_workers=workers,
            collate_fn=_already_a_batch,
            worker_init_fn=_stay_out_of_signals,
            prefetch_factor=self.config.prefetch_batches if workers else None,
            persistent_workers=workers > 0 and isinstance(self.order, TrainOrder),  # evaluations are rare
            pin_memory=self.device.type == "cuda",
            timeout=self.config.stall_timeout_s if workers else 0,
            generator=torch.Generator(),  # else every pass would draw from torch's global one
        )

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
        position = self._sampler.position = (epoch, start_step)
        for batch, copy in self._copied_ahead(epoch, start_step):
            copy.wait()
            yield batch
            # The workers serve one pass at a time; another one would take this one's batches.
            assert self._sampler.position is position, "another pass over this loader has begun"

    def _copied_ahead(self, epoch: int, start_step: int) -> Iterator[tuple[CropBatch, PendingCopy]]:
        """On a GPU the copy of a batch begins before the one before it is handed out."""
        upcoming = deque[tuple[CropBatch, PendingCopy]]()
        for step, batch in enumerate(self._host_batches(), start=start_step):
            self._num_decodes += batch.num_decodes
            for index, reason in batch.unreadable.items():
                self.report_unreadable(index, reason)  # raises where a worker gave up
            copy = self._copies.start(batch.crops)
            crop_batch = CropBatch(
                crops=copy.tensor,
                labels=torch.from_numpy(self.split.labels[batch.indices]),
                indices=batch.indices,
                boxes=batch.boxes,
                epoch=epoch,
                step=step,
            )
            upcoming.append((crop_batch, copy))
            if len(upcoming) > self._copies.run_beside:
                yield upcoming.popleft()
        yield from upcoming

    def _host_batches(self) -> Iterator[_HostBatch]:
        """Raises RuntimeError soon after a worker has died, and when none has answered for ``stall_timeout_s``."""
        try:
            yield from self._loader
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # it had a batch in hand
            raise RuntimeError(f"a worker process of the torchvision loader has died ({error!r})") from error

    def close(self) -> None:
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None


@dataclass(slots=True)
class _HostBatch:
    crops: Tensor  # uint8 [B, V, S, S, 3]
    indices: npt.NDArray[np.int64]  # [B]
    boxes: Boxes  # [B, V, 4]
    unreadable: dict[int, str]  # index -> reason
    num_decodes: int

    def pin_memory(self) -> _HostBatch:
        self.crops = self.crops.pin_memory()
        return self


class _StepSampler(Sampler[list[tuple[int, int]]]):
    """Runs in the main process; a worker receives its whole batch as (epoch, index) pairs."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.position = (0, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start_step = self.position
        for step in range(start_step, self.order.steps_per_epoch):
            yield [(epoch, int(index)) for index in self.order.indices(epoch, step)]


class _CropDataset(Dataset[_HostBatch]):
    def __init__(self, split: Split, views: ViewRecipe, view_config: ViewConfig, seed: int) -> None:
        self.split = split
        self.views = views
        self.view_config = view_config
        self.seed = seed
        self.num_decodes = 0

    def __getitems__(self, samples: list[tuple[int, int]]) -> _HostBatch:
        epoch = samples[0][0] if samples else 0
        unreadable: dict[int, str] = {}
        num_before = self.num_decodes
        images, indices = [], []
        for _, wanted in samples:
            found = self._decode(wanted, unreadable)
            if found is None:  # an error raised here would reach the user wrapped in a worker's traceback
                break
            images.append(found[0])
            indices.append(found[1])
        index_array = np.array(indices, dtype=np.int64)
        heights = np.array([image.height for image in images], dtype=np.int64)
        widths = np.array([image.width for image in images], dtype=np.int64)
        boxes = draw_boxes(self.views, self.view_config, heights, widths, self.seed, epoch, index_array)
        size = self.view_config.image_size
        crops = np.empty((len(images), len(self.views), size, size, 3), dtype=np.uint8)
        for row, image in enumerate(images):
            for view in range(len(self.views)):
                top, left, height, width = boxes[row, view].tolist()
                crop = image.crop((left, top, left + width, top + height))
                # One side at a time, else the order of the two passes would depend on Pillow's version.
                narrow = crop.resize((size, height), Image.Resampling.BILINEAR)
                crops[row, view] = np.asarray(narrow.resize((size, size), Image.Resampling.BILINEAR))
        num_decodes = self.num_decodes - num_before
        return _HostBatch(torch.from_numpy(crops), index_array, boxes, unreadable, num_decodes)

    def _decode(self, index: int, unreadable: dict[int, str]) -> tuple[Image.Image, int] | None:
        """The image or the next readable one, and its index; None if too many are unreadable to go on."""
        for _ in range(len(self.split)):
            self.num_decodes += 1
            try:
                return decode_rgb(self.split, index), index
            except UnreadableImageError as error:
                unreadable[index] = str(error)
                index = next_index(index, len(self.split))
            if len(unreadable) > max_unreadable(len(self.split)):
                break
        return None


def _already_a_batch(batch: Any) -> Any:
    return batch


def _stay_out_of_signals(_worker: int) -> None:
    """Ctrl-C, torchrun and SLURM signal whole groups of processes. The main process then ends the run, and may have to
    save first; a worker that dies would break that. SIGTERM to a worker alone still ends it.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
