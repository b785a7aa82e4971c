"""Images made by arithmetic for the tests of the data layer, and their files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataset_tools.sources import Split, open_source


def picture(height: int, width: int, kind: str = "noise", seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3]: `noise`, `black and white` (every channel 0 or 255), `gray` noise, or `waves`."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "black and white":
        return (255 * rng.integers(0, 2, (height, width, 3))).astype(np.uint8)
    if kind == "gray":
        return np.repeat(rng.integers(0, 256, (height, width, 1), dtype=np.uint8), 3, axis=2)
    assert kind == "waves"
    y, x = np.mgrid[:height, :width]
    waves = np.sin(x / 9 + y / 17 + seed), np.cos(x / 15 - y / 31 + 2 * seed), np.sin((x + y) / 23 + 3 * seed)
    return np.rint(127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file; kind and options as Pillow's `save` has them."""
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def write_images(folder: Path, images: dict[str, bytes]) -> Split:
    """A new image folder of one class, opened."""
    folder.mkdir()
    for name, data in images.items():
        (folder / name).write_bytes(data)
    return open_source(folder).splits["train"]
