"""FFCV's .betons: one libjpeg-turbo decode per image, all views cut from it in the same compiled threads.

Samples are read by position and not through a memory map, as FFCV's own loader does it: a mapped file that is cut short
while training kills the process (SIGBUS).
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, ClassVar, TypeGuard

import numpy as np
import torch
from torch import Tensor

from dataset_tools.formats.beton import METADATA, METADATA_START, Beton, read_beton_head
from dataset_tools.sources import Split
from dataset_tools.sources.converted import ConvertedSplit
from pipelines.byte_readers import base_of
from pipelines.encoded_batches import EncodedBatch
from pipelines.encoded_loader import EncodedLoader, Pass
from pipelines.loader import DecodedBatch

_Started = tuple[EncodedBatch, Tensor, list[Future[list[int]]]]
"""A batch, the crops that are being filled, and the threads' answers: see `ffcv_decoder.BatchDecoder.start`."""


class FfcvLoader(EncodedLoader):
    """Reads a split of a data set that was converted with ``--format ffcv``, or a subset of one.

    ``config.workers`` threads decode, ``config.prefetch_batches`` batches at a time. Raises ImportError where FFCV is
    missing, ValueError for another kind of split or a damaged .beton.
    """

    name = "ffcv"
    package = "ffcv"
    installing = "make ffcv"
    decoder = "FFCV"
    auto_places: ClassVar = {"cuda": 3, "cpu": 1}
    drawbacks: ClassVar = {"cuda": "it decodes on the CPU"}
    queues_batches = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _require_sound_beton(self.split)
        self._new_decoder = _import_decoder().BatchDecoder
        self._turbojpeg: Any = None  # of the decoding thread

    @classmethod
    def obstacle(cls, split: Split, device: torch.device) -> str | None:
        return super().obstacle(split, device) if _is_beton(base_of(split)[0]) else "it reads .betons alone"

    def decode_next(self, current: Pass) -> DecodedBatch:
        while len(current.in_flight) < self.config.prefetch_batches and not current.is_read:
            current.in_flight.append(self._started(self.next_read(current)))
        batch, crops, shares = current.in_flight.popleft()
        self._doing = f"decoding step {batch.step} of epoch {batch.epoch}"
        while failed := sorted(row for share in shares for row in share.result()):
            # What TurboJPEG refuses or only warns of is up to Pillow, as in the other loaders.
            self.for_pillow.update(self.readable_by_pillow(batch, failed))
            batch, crops, shares = self._started(self.prepare(batch.epoch, batch.step))
        return self.on_device(DecodedBatch(crops, batch.indices, batch.boxes, batch.unreadable))

    def _started(self, batch: EncodedBatch) -> _Started:
        if self._turbojpeg is None:
            fill = self.view_config.fill
            self._turbojpeg = self._new_decoder(self.num_threads, self.view_config.image_size, fill, self.use_device)
        shape = len(batch), len(self.views), self.view_config.image_size, self.view_config.image_size, 3
        crops = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self._num_decodes += sum(image.ndim == 1 for image in batch.images)
        return batch, crops, self._turbojpeg.start(batch, crops)

    def give_back(self) -> None:
        if self._turbojpeg is not None:
            self._turbojpeg.close()
            self._turbojpeg = None


def _is_beton(split: Split) -> TypeGuard[ConvertedSplit]:
    return isinstance(split, ConvertedSplit) and isinstance(split.output, Beton)


def _require_sound_beton(split: Split) -> None:
    """Raises ValueError for another kind of split, and if a .beton does not hold what its records say."""
    base, _ = base_of(split)
    if not _is_beton(base):
        what = f"tars ({base.files[0].path.name}, …)" if isinstance(base, ConvertedSplit) else type(base).__name__
        raise ValueError(
            f"the ffcv loader reads .beton files alone, but {split.name!r} is made of {what}; convert the data first "
            "(python -m dataset_tools convert SOURCE DEST --format ffcv) and give DEST, or take --loader torchvision"
        )
    path = base.files[0].path
    read_beton_head(path)
    images = np.fromfile(path, METADATA, len(base), offset=METADATA_START)["f0"]
    columns = {"mode": "encoding", "width": "width", "height": "height", "data_ptr": "offset"}
    for field, column in columns.items():
        if not np.array_equal(images[field], base.records[column]):
            raise ValueError(
                f"{path} does not fit {base.records.path}: {column} differs. Copy or convert the data set again."
            )


def _import_decoder() -> Any:
    """`ffcv_decoder`, ready to decode. Raises ImportError that says what is missing and what to do."""
    from pipelines import ffcv_decoder

    try:
        ffcv_decoder.load_turbojpeg()
    except ImportError as error:
        raise ImportError(
            f"the ffcv loader needs FFCV, which cannot be imported ({error}). It is built from source: apt-get install "
            "libopencv-dev libturbojpeg0-dev pkg-config g++, then make ffcv (or pip install 'leoclr-fast[ffcv]'). "
            "The torchvision loader reads the same data without it."
        ) from error
    return ffcv_decoder
