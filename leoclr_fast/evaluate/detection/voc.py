"""Pascal VOC: its layout on disk (`VOC2007/{Annotations,ImageSets/Main,JPEGImages}` and other years), and its average
precision as the devkit computes it. Legend: n detections of a class, T IoU thresholds, C classes.

MoCo's VOC results are detectron2's: VOC2007's 11-point precision at IoU 0.5, 0.55, … 0.95, averaged. Difficult objects
count neither as found nor as missed, and whatever finds one is left out, however often.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import box_iou

from dataset_tools.images import open_image
from leoclr_fast.evaluate.detection.annotations import AnnotatedImage, AnnotatedImages, ImageDetections

Floats = npt.NDArray[np.float64]
COCO_THRESHOLDS = tuple(float(value) for value in np.arange(50, 100, 5) / 100)
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def read_voc(root: Path, sets: Sequence[str]) -> AnnotatedImages:
    """The images of one or several sets, as `VOC2007/trainval`, in the order of their lists.

    root: the VOCdevkit folder, with a folder for each year. VOC counts pixels from 1 and boxes include both ends, so a
    box from 1 to the width covers the image: 1 is taken from its left and upper edge.
    Raises FileNotFoundError for a missing folder or file; ValueError for an annotation that cannot be understood.
    """
    images: list[AnnotatedImage] = []
    for name in sets:
        folder, _, image_set = name.partition("/")
        year = root / folder
        image_list = year / "ImageSets" / "Main" / f"{image_set}.txt"
        if not image_list.is_file():
            raise FileNotFoundError(
                f"there is no list of images {image_list}; --data must be the VOCdevkit folder, which holds VOC2007 "
                "(and VOC2012) with Annotations, ImageSets and JPEGImages each"
            )
        names = [line.split()[0] for line in image_list.read_text().splitlines() if line.strip()]
        if not names:
            raise ValueError(f"the list of images {image_list} is empty")
        images += [_read_image(year, image_name) for image_name in names]
    return AnnotatedImages(classes=VOC_CLASSES, images=tuple(images))


def _read_image(year: Path, name: str) -> AnnotatedImage:
    annotation, path = year / "Annotations" / f"{name}.xml", year / "JPEGImages" / f"{name}.jpg"
    for file in (annotation, path):
        if not file.is_file():
            raise FileNotFoundError(f"{year.name} lists the image {name}, but there is no {file}")
    try:
        root = ElementTree.parse(annotation).getroot()
        boxes, labels, difficult = [], [], []
        for item in root.findall("object"):
            x1, y1, x2, y2 = (float(_text(item, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
            if not (x1 <= x2 and y1 <= y2):
                raise ValueError(f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} ends before it begins")
            boxes.append((x1 - 1, y1 - 1, x2, y2))
            class_name = _text(item, "name")
            if class_name not in VOC_CLASSES:
                raise ValueError(f"{class_name!r} is none of VOC's classes ({', '.join(VOC_CLASSES)})")
            labels.append(VOC_CLASSES.index(class_name))
            difficult.append(item.findtext("difficult", "0").strip() == "1")
        if root.find("size") is None:
            width, height = open_image(path).size
        else:
            width, height = int(_text(root, "size/width")), int(_text(root, "size/height"))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"the annotation {annotation} cannot be understood: {error}") from error
    return AnnotatedImage(f"{year.name}/{name}", path, (width, height), boxes, labels, difficult)


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"an {element.tag} has no {path}")
    return text.strip()


def voc_average_precisions(
    images: Sequence[AnnotatedImage],
    detections: Sequence[ImageDetections],
    num_classes: int,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
) -> Floats:
    """The 11-point average precision, from 0 to 1: [T, C]; NaN for a class of which there is nothing to find.

    images and detections belong together, one by one.
    """
    precisions = np.full((len(thresholds), num_classes), np.nan)
    for label in range(num_classes):
        truths = [image.boxes[image.labels == label].astype(np.float64) for image in images]
        difficult = [image.ignored[image.labels == label] for image in images]
        num_truths = sum(int((~flags).sum()) for flags in difficult)
        if not num_truths:
            continue
        overlap, truth = _best_matches(truths, detections, label)
        is_difficult = np.concatenate([*difficult, [False]])[truth]
        for row, threshold in enumerate(thresholds):
            found = overlap > threshold
            candidates = np.flatnonzero(found & ~is_difficult)
            right = np.zeros(len(truth), dtype=np.bool_)
            right[candidates[np.unique(truth[candidates], return_index=True)[1]]] = True  # the first of each truth
            true_positives = np.cumsum(right[~(found & is_difficult)])
            recall = true_positives / num_truths
            precision = true_positives / np.arange(1, len(true_positives) + 1)
            precisions[row, label] = eleven_point_average(recall, precision)
    return precisions


def published_rounding(detections: Sequence[ImageDetections]) -> list[ImageDetections]:
    """Detections as detectron2's VOC evaluator writes them into its files: scores with 3 decimals, corners with one,
    counted from pixel 1."""

    def written(values: Floats, decimals: int) -> Floats:
        return np.array([f"{value:.{decimals}f}" for value in values.ravel()], dtype=np.float64).reshape(values.shape)

    from_one = np.array([1, 1, 0, 0])
    return [
        replace(found, boxes=written(found.boxes + from_one, 1) - from_one, scores=written(found.scores, 3))
        for found in detections
    ]


def eleven_point_average(recall: Floats, precision: Floats) -> float:
    """Mean over recall 0, 0.1, … 1 of the best precision at that recall or above. recall, precision: [n]."""
    points = np.arange(11) / 10
    return float(np.mean([precision[recall >= point - 1e-12].max(initial=0.0) for point in points]))


def _best_matches(
    truths: Sequence[Floats], detections: Sequence[ImageDetections], label: int
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Of each detection of the class, the highest score first: the best IoU, and the number of that truth among those
    of all images, or -1.
    """
    overlaps, numbers, scores, first = [], [], [], 0
    for boxes, detected in zip(truths, detections, strict=True):
        mine = detected.labels == label
        overlap = box_iou(torch.from_numpy(detected.boxes[mine]), torch.from_numpy(boxes)).numpy()
        overlaps.append(overlap.max(axis=1, initial=0.0))
        numbers.append(first + overlap.argmax(axis=1) if len(boxes) else np.full(len(overlap), -1))
        scores.append(detected.scores[mine])
        first += len(boxes)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return np.concatenate(overlaps)[order], np.concatenate(numbers)[order]
