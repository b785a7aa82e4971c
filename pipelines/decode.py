"""An encoded image as RGB pixels, as torchvision's ImageFolder would load it: PIL, no EXIF rotation."""

from __future__ import annotations

import io

from PIL import Image

from dataset_tools.sources import Split


class UnreadableImageError(Exception):
    """An image that cannot be read or decoded; its message is the reason."""


def decode_rgb(split: Split, index: int) -> Image.Image:
    """Image ``index`` of a split in RGB. Raises `UnreadableImageError` with the reason."""
    try:
        return Image.open(io.BytesIO(split.read(index))).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def image_size(split: Split, index: int) -> tuple[int, int]:
    """(height, width) of an image, pixels, from its header alone. Raises `UnreadableImageError`."""
    try:
        with Image.open(io.BytesIO(split.read(index))) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def next_index(index: int, num_images: int) -> int:
    """The image that takes the place of an unreadable one."""
    return (index + 1) % num_images
