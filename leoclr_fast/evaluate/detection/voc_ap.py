"""Average precision as the Pascal VOC devkit computes it. Legend: n detections of a class, T IoU thresholds, C classes.

MoCo's VOC results are detectron2's: VOC2007's 11-point precision at IoU 0.5, 0.55, … 0.95, averaged. Difficult objects
count neither as found nor as missed, and whatever finds one is left out, however often.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leoclr_fast.evaluate.detection.annotations import AnnotatedImage

Floats = npt.NDArray[np.float64]
COCO_THRESHOLDS = tuple(float(value) for value in np.arange(50, 100, 5) / 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDetections:
    """What was found in an image, in its own pixels."""

    boxes: npt.NDArray[np.float64]
    """[n, 4]."""
    scores: npt.NDArray[np.float64]
    """[n]."""
    labels: npt.NDArray[np.int64]
    """[n], from 0."""


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
        best_overlap, best_truth = _best_matches(truths, detections, label)
        for row, threshold in enumerate(thresholds):
            right, counted = _right_detections(best_overlap, best_truth, difficult, threshold)
            true_positives = np.cumsum(right[counted])
            recall = true_positives / num_truths
            precision = true_positives / np.arange(1, len(true_positives) + 1)
            precisions[row, label] = eleven_point_average(recall, precision)
    return precisions


def eleven_point_average(recall: Floats, precision: Floats) -> float:
    """Mean over recall 0, 0.1, … 1 of the best precision at that recall or above. recall, precision: [n]."""
    points = np.arange(11) / 10
    return float(np.mean([precision[recall >= point - 1e-12].max(initial=0.0) for point in points]))


def _best_matches(
    truths: Sequence[Floats], detections: Sequence[ImageDetections], label: int
) -> tuple[Floats, list[tuple[int, int]]]:
    """Of each detection of the class, the highest score first: the best IoU, and with which truth (image, box)."""
    found: list[tuple[float, float, tuple[int, int]]] = []
    for number, (boxes, detected) in enumerate(zip(truths, detections, strict=True)):
        mine = detected.labels == label
        overlaps = intersection_over_union(detected.boxes[mine], boxes)
        for score, row in zip(detected.scores[mine], overlaps, strict=True):
            best = int(row.argmax()) if len(row) else -1
            found.append((float(score), float(row[best]) if len(row) else 0.0, (number, best)))
    found.sort(key=lambda item: -item[0])
    return np.array([overlap for _, overlap, _ in found]), [truth for _, _, truth in found]


def _right_detections(
    best_overlap: Floats,
    best_truth: list[tuple[int, int]],
    difficult: Sequence[npt.NDArray[np.bool_]],
    threshold: float,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which detections are right, the first of each truth alone, and which count at all: both [n]."""
    right = np.zeros(len(best_overlap), dtype=np.bool_)
    counted = np.ones(len(best_overlap), dtype=np.bool_)
    taken: dict[tuple[int, int], bool] = defaultdict(bool)
    for number, (overlap, (image, box)) in enumerate(zip(best_overlap, best_truth, strict=True)):
        if not overlap > threshold:
            continue
        if difficult[image][box]:
            counted[number] = False
        elif not taken[image, box]:
            right[number] = taken[image, box] = True
    return right, counted


def intersection_over_union(first: Floats, second: Floats) -> Floats:
    """Boxes [n, 4] and [m, 4] -> [n, m]."""
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    opposite = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.prod(np.clip(opposite - corner, 0, None), axis=-1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - common
    result: Floats = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return result
