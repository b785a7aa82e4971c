"""COCO: its layout on disk (`annotations/instances_NAME.json`, the images in `NAME/`), and average precision as it
defines it, by pycocotools.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from dataset_tools.schema import read_json
from leoclr_fast.evaluate.detection.annotations import AnnotatedImage, AnnotatedImages, ImageDetections

_Side = Annotated[int, Meta(ge=1, le=2**20)]


class _Image(Struct):
    id: int
    file_name: str
    width: _Side
    height: _Side


class _Category(Struct):
    id: int
    name: str


class _Annotation(Struct):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int = 0


class _Instances(Struct):
    """What is read of the file; an annotation without an area has that of its box."""

    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


def read_coco(root: Path, split: str) -> AnnotatedImages:
    """The images of a split, as `train2017`, sorted by their ids; classes in the order of their ids.

    A box of no width or height is left out. Raises FileNotFoundError, or ValueError if the file cannot be understood.
    """
    file = root / "annotations" / f"instances_{split}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there are no annotations {file}; --data must be the COCO folder, which holds annotations/ and {split}/"
        )
    document = read_json(file, _Instances, max_bytes=1 << 33)
    categories = sorted(document.categories, key=lambda category: category.id)
    label_of = {category.id: label for label, category in enumerate(categories)}
    of_image: dict[int, list[_Annotation]] = defaultdict(list)
    for item in document.annotations:
        if item.category_id not in label_of:
            raise ValueError(f"{file} has a box of category {item.category_id}, which it does not list")
        if item.bbox[2] > 0 and item.bbox[3] > 0:
            of_image[item.image_id].append(item)
    images = []
    for image in sorted(document.images, key=lambda image: image.id):
        items = of_image.pop(image.id, [])
        images.append(
            AnnotatedImage(
                image.file_name,
                root / split / image.file_name,
                (image.width, image.height),
                [(x, y, x + width, y + height) for x, y, width, height in (item.bbox for item in items)],
                [label_of[item.category_id] for item in items],
                [bool(item.iscrowd) for item in items],
                [item.bbox[2] * item.bbox[3] if item.area is None else item.area for item in items],
            )
        )
    if of_image:
        raise ValueError(f"{file} has boxes of {len(of_image)} images that it does not list, as {next(iter(of_image))}")
    if not images:
        raise ValueError(f"{file} lists no images")
    absent = next((image.path for image in images if not image.path.is_file()), None)
    if absent is not None:
        raise FileNotFoundError(f"{file.name} lists an image that is not there: {absent}")
    return AnnotatedImages(classes=tuple(category.name for category in categories), images=tuple(images))


def require_pycocotools() -> None:
    """Raises ValueError if it is not installed."""
    if importlib.util.find_spec("pycocotools") is None:
        raise ValueError("detection needs pycocotools; install it with: pip install 'leoclr-fast[detect]'")


def coco_average_precisions(
    images: Sequence[AnnotatedImage], detections: Sequence[ImageDetections], classes: Sequence[str]
) -> dict[str, float]:
    """AP (mean over IoU 0.5 to 0.95), AP50, AP75, AP_small, AP_medium and AP_large, from 0 to 1, means over the classes
    that have something to find; NaN where nothing has.

    An ignored object is a crowd, which every detection inside it belongs to.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    base = {
        "info": {},
        "images": [{"id": number, "width": i.width, "height": i.height} for number, i in enumerate(images)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes)],
    }
    truths = [
        {"iscrowd": int(ignored), "area": float(area), **_box(number, box, label)}
        for number, image in enumerate(images)
        for box, label, ignored, area in zip(image.boxes, image.labels, image.ignored, image.areas, strict=True)
    ]
    found = [
        {"iscrowd": 0, "area": float((box[2:] - box[:2]).prod()), "score": float(score), **_box(number, box, label)}
        for number, detected in enumerate(detections)
        for box, label, score in zip(detected.boxes, detected.labels, detected.scores, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for boxes in (truths, found):
            side = COCO()
            side.dataset = {**base, "annotations": [{"id": i, **box} for i, box in enumerate(boxes, start=1)]}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    # pycocotools says -1 where there is nothing to find.
    return {
        name: float(value) if value >= 0 else float("nan")
        for name, value in zip(names, evaluation.stats[: len(names)], strict=True)
    }


def _box(image: int, box: Any, label: Any) -> dict[str, Any]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return {"image_id": image, "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}
