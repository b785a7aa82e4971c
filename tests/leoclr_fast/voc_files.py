"""A small VOCdevkit, drawn on the spot: bright shapes of three classes on dark noise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from leoclr_fast.evaluate.detection.voc import VOC_CLASSES, read_voc

SHAPES = ("bicycle", "car", "person")
COLOURS = ((230, 60, 50), (60, 220, 70), (70, 90, 240))


def write_voc(root: Path, *, num_train: int = 24, num_test: int = 12, side: int = 64, empty: int = 0) -> Path:
    """VOC2007 with the sets trainval and test; `empty` more images of trainval have no objects."""
    rng = np.random.default_rng(5)
    year = root / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (year / folder).mkdir(parents=True)
    names: dict[str, list[str]] = {"trainval": [], "test": []}
    for number in range(num_train + empty + num_test):
        name = f"{number:06}"
        image_set = "trainval" if number < num_train + empty else "test"
        names[image_set].append(name)
        height, width = (side, side * 5 // 4) if number % 2 else (side * 5 // 4, side)
        objects = [] if num_train <= number < num_train + empty else _objects(rng, width, height)
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for label, (x1, y1, x2, y2) in objects:
            pixels[y1 - 1 : y2, x1 - 1 : x2] = COLOURS[label]
        Image.fromarray(pixels).save(year / "JPEGImages" / f"{name}.jpg", quality=95)
        described = [(SHAPES[label], box, False) for label, box in objects]
        (year / "Annotations" / f"{name}.xml").write_text(annotation(width, height, described))
    for image_set, listed in names.items():
        (year / "ImageSets" / "Main" / f"{image_set}.txt").write_text("\n".join(listed) + "\n")
    return root


def annotation(width: int, height: int, objects: list[tuple[str, tuple[int, int, int, int], bool]]) -> str:
    """VOC's XML: class, box that counts pixels from 1 and includes both ends, and whether it is difficult."""
    items = "".join(
        f"<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>{difficult:d}</difficult>"
        f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2), difficult in objects
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{items}</annotation>"


def write_coco(root: Path, voc: Path) -> Path:
    """The images of a drawn VOCdevkit in COCO's layout: trainval as `train2017`, test as `val2017`."""
    (root / "annotations").mkdir(parents=True)
    for image_set, split in (("trainval", "train2017"), ("test", "val2017")):
        (root / split).mkdir()
        images, boxes = [], []
        for number, image in enumerate(read_voc(voc, [f"VOC2007/{image_set}"]).images, start=1):
            shutil.copy(image.path, root / split)
            sizes = {"width": image.width, "height": image.height}
            images.append({"id": number, "file_name": image.path.name, **sizes})
            for (x1, y1, x2, y2), label in zip(image.boxes.tolist(), image.labels.tolist(), strict=True):
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                category = SHAPES.index(VOC_CLASSES[label]) * 10 + 7  # ids with gaps, as COCO's
                boxes.append({"id": len(boxes) + 1, "image_id": number, "category_id": category, **box})
        categories = [{"id": label * 10 + 7, "name": name} for label, name in enumerate(SHAPES)]
        document = {"images": images, "annotations": boxes, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return root


def _objects(rng: np.random.Generator, width: int, height: int) -> list[tuple[int, tuple[int, int, int, int]]]:
    """One or two boxes that do not touch: one in the left half, one in the right."""
    objects = []
    halves = [(1, width // 2 - 2), (width // 2 + 2, width)]
    for left, right in halves[: int(rng.integers(1, 3))]:
        box_width = int(rng.integers(height // 5, min(height // 2, right - left)))
        box_height = int(rng.integers(height // 5, height // 2))
        x1, y1 = int(rng.integers(left, right - box_width)), int(rng.integers(1, height - box_height))
        objects.append((int(rng.integers(3)), (x1, y1, x1 + box_width, y1 + box_height)))
    return objects
