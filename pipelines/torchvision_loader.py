"""What torchvision does: PIL decode and resize in worker processes. Slow, plain, and the oracle of other loaders."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset_tools.sources import Split
from pipelines.config import ViewConfig
from pipelines.decode import Substitutes
from pipelines.loader import DecodedBatch, Loader
from pipelines.order import Order, TrainOrder
from pipelines.threads import available_cores
from pipelines.views import ViewRecipe, draw_boxes

_MAX_TEMPORARY_FOLDER = 107 - len("/pymp-01234567/listener-01234567")
_CountedBatch = tuple[DecodedBatch, int]
"""A batch, and how many images were decoded for it."""


def require_room_for_workers(num_bytes: int, shared_memory: Path = Path("/dev/shm")) -> None:
    """Raises ValueError where worker processes could not hand over what they prepare, `num_bytes` at a time.

    Batches lie in /dev/shm, and their descriptors come through sockets in the temporary folder.
    """
    folder = tempfile.gettempdir()
    length = len(os.fsencode(folder))
    if length > _MAX_TEMPORARY_FOLDER:
        raise ValueError(
            f"the temporary folder {folder} has a name of {length} bytes, too long for the sockets of "
            f"worker processes: set TMPDIR to one of at most {_MAX_TEMPORARY_FOLDER}, or give --loader.workers 0"
        )
    if shared_memory.is_dir() and (free := shutil.disk_usage(shared_memory).free) < num_bytes:
        raise ValueError(
            f"worker processes hand images over in {shared_memory}, which has {free / 2**20:,.0f} MiB free, and they "
            f"prepare up to {num_bytes / 2**20:,.0f} MiB: make it larger (docker run --shm-size), or give fewer "
            "--loader.workers or --loader.prefetch-batches"
        )


class TorchvisionLoader(Loader):
    """``torch.utils.data.DataLoader`` with our order and boxes; one PIL decode per image, one PIL resize per view."""

    name = "torchvision"
    auto_places: ClassVar = {"cuda": 4, "cpu": 4}
    drawbacks: ClassVar = {"cuda": "it decodes on the CPU", "cpu": "slower"}
    copies_ahead = True
    remedy = "let a GPU decode (--loader dali or nvjpeg), or convert the data and take --loader ffcv"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        workers = available_cores() if self.config.workers is None else self.config.workers
        if workers:
            side, images = self.view_config.image_size, self.order.max_local_batch_size
            batch_bytes = images * len(self.views) * 3 * side * side
            require_room_for_workers(
                batch_bytes * min(workers * self.config.prefetch_batches, self.order.steps_per_epoch)
            )
        self._sampler = _StepSampler(self.order)
        self._loader: DataLoader[_CountedBatch | OSError] = DataLoader(
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

    def decode_batches(self, epoch: int, start_step: int) -> Generator[DecodedBatch, None, None]:
        """Raises RuntimeError soon after a worker has died, and when none has answered for ``stall_timeout_s``."""
        self._sampler.position = (epoch, start_step)
        try:
            for loaded in self._loader:
                if isinstance(loaded, OSError):
                    raise loaded
                batch, num_decodes = loaded
                self._num_decodes += num_decodes
                yield batch
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # it had a batch in hand
            raise RuntimeError(f"a worker process of the torchvision loader has died ({error!r})") from error
        except RuntimeError as error:  # torch's own: a worker was killed, or none has answered
            message = str(error).strip().splitlines()[0]
            if not message.startswith("DataLoader"):
                raise
            free_mib = shutil.disk_usage("/dev/shm").free / 2**20 if os.path.isdir("/dev/shm") else 0.0
            raise RuntimeError(
                f"{message}. Workers hand images over in /dev/shm, which has {free_mib:,.0f} MiB free: if that is too "
                "small (docker run --shm-size), or something empties it, they die or are waited for"
            ) from error

    def close(self) -> None:
        super().close()
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None


class _StepSampler(Sampler[list[tuple[int, int]]]):
    """Runs in the main process; a worker receives its whole batch as (epoch, index) pairs."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.position = (0, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start_step = self.position
        for step in range(start_step, self.order.steps_per_epoch):
            yield [(epoch, int(index)) for index in self.order.indices(epoch, step)]


class _CropDataset(Dataset[_CountedBatch | OSError]):
    def __init__(self, split: Split, views: ViewRecipe, view_config: ViewConfig, seed: int) -> None:
        self.views = views
        self.view_config = view_config
        self.seed = seed
        self.substitutes = Substitutes(split)

    def __getitems__(self, samples: list[tuple[int, int]]) -> _CountedBatch | OSError:
        try:
            return self._batch(samples)
        except OSError as error:  # of the machine; raised here, it would reach the user in a worker's traceback
            return error

    def _batch(self, samples: list[tuple[int, int]]) -> _CountedBatch:
        epoch = samples[0][0] if samples else 0
        unreadable: dict[int, str] = {}
        num_known = len(self.substitutes.unreadable)
        images, indices = [], []
        for _, wanted in samples:
            found = self.substitutes.decode(wanted, unreadable)
            if found is None:  # an error raised here would reach the user wrapped in a worker's traceback
                break
            indices.append(found[0])
            images.append(found[1])
        index_array = np.array(indices, dtype=np.int64)
        heights = np.array([image.height for image in images], dtype=np.int64)
        widths = np.array([image.width for image in images], dtype=np.int64)
        boxes = draw_boxes(self.views, self.view_config, heights, widths, self.seed, epoch, index_array)
        size = self.view_config.image_size
        crops = np.empty((len(images), len(self.views), size, size, 3), dtype=np.uint8)
        for row, image in enumerate(images):
            for view in range(len(self.views)):
                top, left, height, width, new_height, new_width, y, x = boxes[row, view].tolist()
                crop = image.crop((left, top, left + width, top + height))
                # One side at a time, else the order of the two passes would depend on Pillow's version.
                narrow = crop.resize((new_width, height), Image.Resampling.BILINEAR)
                canvas = Image.new("RGB", (size, size), self.view_config.fill)
                canvas.paste(narrow.resize((new_width, new_height), Image.Resampling.BILINEAR), (-x, -y))
                crops[row, view] = np.asarray(canvas)
        num_decodes = len(images) + len(self.substitutes.unreadable) - num_known
        return DecodedBatch(torch.from_numpy(crops), index_array, boxes, unreadable), num_decodes


def _already_a_batch(batch: Any) -> Any:
    return batch


def _stay_out_of_signals(_worker: int) -> None:
    """Ctrl-C, torchrun and SLURM signal whole groups of processes. The main process then ends the run, and may have to
    save first; a worker that dies would break that. SIGTERM to a worker alone still ends it.
    """
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
