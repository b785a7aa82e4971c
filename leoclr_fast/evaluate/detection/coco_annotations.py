"""COCO's layout on disk: `annotations/instances_NAME.json` and the images in `NAME/`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from leoclr_fast.evaluate.detection.annotations import AnnotatedImages, annotated_image


def read_coco(root: Path, split: str) -> AnnotatedImages:
    """The images of a split, as `train2017`, sorted by their ids; classes in the order of their ids.

    A box of no width or height is left out. Raises FileNotFoundError, or ValueError if the file cannot be understood.
    """
    file = root / "annotations" / f"instances_{split}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there are no annotations {file}; --data must be the COCO folder, which holds annotations/ and {split}/"
        )
    try:
        document: dict[str, Any] = json.loads(file.read_text())
        categories = sorted(document["categories"], key=lambda category: category["id"])
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for item in document["annotations"]:
            if item["bbox"][2] > 0 and item["bbox"][3] > 0:
                of_image[item["image_id"]].append(item)
        images = []
        for image in sorted(document["images"], key=lambda image: image["id"]):
            items = of_image.pop(image["id"], [])
            images.append(
                annotated_image(
                    image["file_name"],
                    root / split / image["file_name"],
                    (image["width"], image["height"]),
                    [(x, y, x + width, y + height) for x, y, width, height in (item["bbox"] for item in items)],
                    [label_of[item["category_id"]] for item in items],
                    [bool(item.get("iscrowd", 0)) for item in items],
                    [item["area"] for item in items],
                )
            )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{file} cannot be understood as COCO's instances: {type(error).__name__} {error}") from error
    if of_image:
        raise ValueError(f"{file} has boxes of {len(of_image)} images that it does not list, as {next(iter(of_image))}")
    if not images:
        raise ValueError(f"{file} lists no images")
    absent = next((image.path for image in images if not image.path.is_file()), None)
    if absent is not None:
        raise FileNotFoundError(f"{file.name} lists an image that is not there: {absent}")
    return AnnotatedImages(classes=tuple(category["name"] for category in categories), images=tuple(images))
