"""JPEGs decoded on the GPU by torchvision's batched nvJPEG decoder, all views cut there by `crop_resize`.

For .betons, tars and folders on a machine without DALI. The order, the boxes and the bytes are those of every other
loader. What nvJPEG does not decode as Pillow does (PNGs, gray, CMYK and RGB JPEGs, 12 bits, …) is decoded by Pillow in
the threads that read. Written without a GPU at hand: what has run is everything around nvJPEG, on the CPU.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset_tools.conversion.jpeg import JpegHeader
from dataset_tools.sources import Split
from pipelines.encoded_batches import Bytes, EncodedBatch
from pipelines.encoded_loader import EncodedLoader, Pass
from pipelines.loader import DecodedBatch


class NvjpegLoader(EncodedLoader):
    """Bytes in, crops out: one decode of each image, on the device, and one resize for each view.

    One thread decodes and cuts, on a stream of its own. Raises ValueError for a device that is not a GPU, RuntimeError
    if nvJPEG does not work there.
    """

    name = "nvjpeg"
    decoder = "nvJPEG"
    auto_places: ClassVar = {"cuda": 2, "cpu": 3}
    drawbacks: ClassVar = {"cuda": "for machines without DALI", "cpu": "it needs a GPU"}
    decodes_on_gpu = True
    repeats_chroma = True
    remedy = (
        "install DALI and take --loader dali, or convert the data with --short-side 400, so that there is less to "
        "decode"
    )
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.device.type not in self.devices:
            raise ValueError(f"nvJPEG decodes on a GPU, not on {self.device}; choose --loader auto, or give --device")
        if obstacle := nvjpeg_obstacle(self.device):
            raise RuntimeError(f"the nvjpeg loader cannot be used: {obstacle}; choose --loader torchvision")

    @classmethod
    def obstacle(cls, split: Split, device: torch.device) -> str | None:
        return nvjpeg_obstacle(device) if device.type in cls.devices else "it needs a GPU"

    @staticmethod
    def is_plain(header: JpegHeader) -> bool:
        """Whether it is YCbCr."""
        return len(header.component_ids) == 3

    def decode_next(self, current: Pass) -> DecodedBatch:
        batch = self.next_read(current)
        while True:
            self._doing = f"decoding step {batch.step} of epoch {batch.epoch}"
            if (images := self._images(batch)) is not None:
                return self.cut(batch, images, planar=True)
            batch = self.prepare(batch.epoch, batch.step)

    def try_to_decode(self, batch: EncodedBatch, rows: list[int]) -> None:
        self._decode_jpegs([batch.images[row] for row in rows])

    def _images(self, batch: EncodedBatch) -> list[Tensor] | None:
        """B images on the device, uint8 [3, H, W]; None if the batch has to be prepared again."""
        with torch.cuda.stream(self.side_stream):  # does nothing for None
            try:
                decoded = iter(self._decode_jpegs([image for image in batch.images if image.ndim == 1]))
            except RuntimeError as error:
                self.find_fault(batch, error)
                return None
            self._num_decodes += len(batch)
            images = [
                next(decoded) if image.ndim == 1 else torch.tensor(image).permute(2, 0, 1).to(self.device)
                for image in batch.images
            ]
        sizes = np.array([image.shape[1:] for image in images], dtype=np.int64).reshape(-1, 2)
        return images if self.has_true_sizes(batch, sizes) else None

    def _decode_jpegs(self, images: list[Bytes]) -> list[Tensor]:
        """uint8 [3, H, W] each, on the device. Raises RuntimeError if one of them cannot be decoded."""
        return decode_jpeg([torch.from_numpy(image) for image in images], self.device) if images else []


def decode_jpeg(images: list[Tensor], device: torch.device) -> list[Tensor]:
    """JPEGs, uint8 [num_bytes] on the host, as uint8 [3, H, W] on a device; the current stream waits for them.

    Raises RuntimeError if one of them cannot be decoded, ImportError where torchvision has left its decoder out.
    """
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_jpeg as decode

    decoded: list[Tensor] = decode(images, mode=ImageReadMode.RGB, device=device)
    return decoded


@lru_cache
def nvjpeg_obstacle(device: torch.device) -> str | None:
    """Why torchvision cannot decode JPEGs on this device, found out by decoding one; None if it can."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(file, "JPEG")
    try:
        decode_jpeg([torch.frombuffer(file.getbuffer(), dtype=torch.uint8)], device)
    except (RuntimeError, ImportError) as error:
        return f"torchvision cannot decode a JPEG on {device}: {str(error).strip().splitlines()[0]}"
    return None
