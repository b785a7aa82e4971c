"""Images with boxes, read from disk. Legend: n boxes of an image; boxes are (x1, y1, x2, y2) in pixels.

The left edge of the leftmost pixel is at x = 0, the right edge of the rightmost at x = width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


class AnnotatedImage:
    """An image file and what is in it."""

    def __init__(
        self,
        name: str,
        path: Path,
        size: tuple[int, int],
        boxes: Sequence[Sequence[float]],
        labels: Sequence[int],
        ignored: Sequence[bool],
        areas: Sequence[float] | None = None,
    ) -> None:
        """size: width and height. boxes: [n, 4]. labels: [n], from 0. ignored: [n], VOC's difficult objects, COCO's
        crowds; to find them is neither right nor wrong. areas: [n], pixels: COCO's of the segmentation; those of the
        boxes if not given. Raises ValueError for infinite ones.
        """
        self.name, self.path = name, path
        self.width, self.height = size
        with np.errstate(over="ignore"):
            self.boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.ignored = np.asarray(ignored, dtype=np.bool_)
        box_areas = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1)
        self.areas = np.asarray(box_areas if areas is None else areas, dtype=np.float64)
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.areas).all()):
            raise ValueError(f"{path}: the box of an object, or its area, is infinite")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatedImages:
    """A set of images; equal files give equal contents in equal order."""

    classes: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, boxes and labels, as hex."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for image in self.images:
            digest.update(f"\n{image.name} {image.width} {image.height}\n".encode())
            digest.update(image.boxes.tobytes() + image.labels.tobytes() + image.ignored.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDetections:
    """What was found in an image, in its own pixels."""

    boxes: npt.NDArray[np.float64]
    """[n, 4]."""
    scores: npt.NDArray[np.float64]
    """[n]."""
    labels: npt.NDArray[np.int64]
    """[n], from 0."""
