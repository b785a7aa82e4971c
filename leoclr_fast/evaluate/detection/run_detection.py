"""Detection with the weights of a run or a file: `leoclr-fast detect`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from leoclr_fast.config_file import as_plain
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.detection.annotations import AnnotatedImage, AnnotatedImages, ImageDetections
from leoclr_fast.evaluate.detection.coco import coco_average_precisions, read_coco, require_pycocotools
from leoclr_fast.evaluate.detection.config import DetectionConfig, DetectionOptions, DetectionProtocol
from leoclr_fast.evaluate.detection.faster_rcnn import FasterRCNNC4
from leoclr_fast.evaluate.detection.image_batches import BatchReader, ImageRequest, resized_boxes
from leoclr_fast.evaluate.detection.train_detector import build_detector, train_detector
from leoclr_fast.evaluate.detection.voc import COCO_THRESHOLDS, published_rounding, read_voc, voc_average_precisions
from leoclr_fast.evaluate.evaluation import Evaluation, evaluation_of
from leoclr_fast.machine.precision import encoder_dtype, encoder_precision

_MAX_STEPS_BETWEEN_CHECKPOINTS = 1000


def run(
    weights: Path, data: Path, protocol: DetectionProtocol, options: DetectionOptions, *, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tune a detector from RUN|WEIGHTS, and evaluate it.

    Returns, in percent and None where nothing is to be found, for COCO AP, AP50, AP75, AP_small, AP_medium, AP_large;
    for VOC AP_11point, AP50_11point, AP75_11point and AP50_11point_per_class; besides counts, checksums, and as
    `Evaluation.result`. The detector stays in the evaluation's folder.
    Raises ValueError, FileNotFoundError, NonFiniteLossError, OSError (a full disk).
    """
    config = protocol.config()
    with evaluation_of(weights, options, console) as evaluation:
        options = evaluation.options
        train, test = _read(data, config.train_sets, config), _read(data, (config.test_set,), config)
        if train.classes != test.classes:
            raise ValueError(f"train and test of {data} have other classes: {train.classes} and {test.classes}")
        fingerprints = {"train_fingerprint": train.fingerprint, "test_fingerprint": test.fingerprint}
        limits = {"precision": options.precision, "max_images": options.max_images}
        useful = _with_something_to_learn(train, config)[: options.max_images]
        shown = replace(test, images=test.images[: options.max_images])

        def compute(folder: Path) -> dict[str, Any]:
            found = _train_and_detect(evaluation, folder, config, useful, shown)
            return {
                **(_precisions(shown, found, config) if evaluation.ranks.is_main else {}),
                "train_images": len(useful),
                "test_images": len(shown.images),
                **fingerprints,
                "data": str(data),
            }

        return evaluation.result(f"detect-{protocol.dataset}", {**as_plain(config), **limits, **fingerprints}, compute)


def _train_and_detect(
    evaluation: Evaluation,
    folder: Path,
    config: DetectionConfig,
    images: Sequence[AnnotatedImage],
    test: AnnotatedImages,
) -> list[ImageDetections]:
    """What the detector finds in the test images, once it was trained on the others."""
    ranks, device, options = evaluation.ranks, evaluation.device, evaluation.options
    pretrained, precision = evaluation.pretrained, options.precision
    reader = BatchReader(
        mean=pretrained.description.views.mean,
        std=pretrained.description.views.std,
        max_side=config.max_side,
        with_ignored=config.dataset == "voc",
        workers=options.workers,
        device=device,
        dtype=encoder_dtype(precision),
    )
    detector = build_detector(pretrained.backbone, len(test.classes), config, precision, ranks, device)
    save_every = min(_MAX_STEPS_BETWEEN_CHECKPOINTS, max(1, len(images) // config.batch_size))
    with evaluation.display(config.iterations) as display:
        display.say(
            f"Faster R-CNN C4, {len(test.classes)} classes; {len(images):,} train images with boxes, "
            f"{len(test.images):,} test images; {config.iterations:,} iterations of {config.batch_size} images, "
            f"lr {config.lr:g}"
        )
        stepper = evaluation.stepper(folder / "detector", config.iterations, save_every, display)
        train_detector(detector, images, reader, config, stepper, precision)
    evaluation.save(folder / "detector.safetensors", detector.state_dict())
    return detect(detector, test, reader, config.test_side, ranks, precision)


@torch.no_grad()
def detect(
    detector: FasterRCNNC4, test: AnnotatedImages, reader: BatchReader, side: int, ranks: Ranks, precision: str
) -> list[ImageDetections]:
    """What the detector finds in the images, one after the other, the same on every rank."""
    detector.eval()
    own = range(ranks.rank, len(test.images), ranks.world_size)
    requests: Iterator[list[ImageRequest]] = ([ImageRequest(image=test.images[number], side=side)] for number in own)
    found = []
    for number, batch in zip(own, reader.read(requests), strict=True):
        with encoder_precision(precision, reader.device):
            _, (detected,) = detector(batch.images, batch.sizes)
        image, (height, width) = test.images[number], batch.sizes[0]
        boxes = resized_boxes(detected["boxes"].float().cpu().numpy(), (width, height), (image.width, image.height))
        scores, labels = detected["scores"].double(), detected["labels"] - 1
        found.append(
            ImageDetections(boxes=boxes.astype(np.float64), scores=scores.cpu().numpy(), labels=labels.cpu().numpy())
        )
    of_ranks = ranks.gathered(found)
    return [of_ranks[number % ranks.world_size][number // ranks.world_size] for number in range(len(test.images))]


def _precisions(test: AnnotatedImages, detections: list[ImageDetections], config: DetectionConfig) -> dict[str, Any]:
    """In percent; None where there is nothing to find."""
    if config.dataset == "coco":
        of_all = coco_average_precisions(test.images, detections, test.classes)
        return {name: _percent(value) for name, value in of_all.items()}
    rounded = published_rounding(detections) if config.published_rounding else detections
    precisions = voc_average_precisions(test.images, rounded, len(test.classes))
    present = ~np.isnan(precisions[0])
    means = precisions[:, present].mean(axis=1) if present.any() else np.full(len(precisions), np.nan)
    by_class = zip(test.classes, precisions[0].tolist(), strict=True)
    return {
        "AP_11point": _percent(means.mean()),
        "AP50_11point": _percent(means[COCO_THRESHOLDS.index(0.5)]),
        "AP75_11point": _percent(means[COCO_THRESHOLDS.index(0.75)]),
        "AP50_11point_per_class": {name: _percent(value) for name, value in by_class},
    }


def _percent(value: float) -> float | None:
    return None if np.isnan(value) else 100 * float(value)


def _read(data: Path, sets: tuple[str, ...], config: DetectionConfig) -> AnnotatedImages:
    if not data.is_dir():
        raise FileNotFoundError(f"there is no folder {data}; give --data the VOCdevkit or the COCO folder")
    if config.dataset == "voc":
        return read_voc(data, sets)
    require_pycocotools()
    if len(sets) != 1:
        raise ValueError(f"COCO has one train set, given are {len(sets)}: {', '.join(sets)}")
    return read_coco(data, sets[0])


def _with_something_to_learn(train: AnnotatedImages, config: DetectionConfig) -> list[AnnotatedImage]:
    """The images with boxes (detectron2's FILTER_EMPTY_ANNOTATIONS); COCO's crowds are none."""
    images = [
        image for image in train.images if len(image.labels) > (0 if config.dataset == "voc" else image.ignored.sum())
    ]
    if not images:
        raise ValueError("none of the training images has a box to learn from; look at the annotations")
    return images
