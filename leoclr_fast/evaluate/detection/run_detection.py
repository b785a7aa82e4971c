"""Detection with the weights of a run or a file: `leoclr-fast detect`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from leoclr_fast.config_file import as_plain
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.evaluate.detection.annotations import AnnotatedImages, ImageDetections
from leoclr_fast.evaluate.detection.coco import coco_average_precisions, read_coco, require_pycocotools
from leoclr_fast.evaluate.detection.config import DetectionConfig, DetectionOptions, DetectionProtocol
from leoclr_fast.evaluate.detection.faster_rcnn import FasterRCNNC4
from leoclr_fast.evaluate.detection.image_batches import BatchReader, ImageRequest, resized_boxes
from leoclr_fast.evaluate.detection.train_detector import DetectorTraining, build_detector
from leoclr_fast.evaluate.detection.voc import COCO_THRESHOLDS, published_rounding, read_voc, voc_average_precisions
from leoclr_fast.evaluate.evaluation import Evaluation, Result, evaluation_ranks, open_evaluation
from leoclr_fast.evaluate.protocols import TrainingOptions
from leoclr_fast.machine.precision import encoder_dtype, encoder_precision
from leoclr_fast.weights.pretrained import load_pretrained


def run(
    weights: Path, data: Path, protocol: DetectionProtocol, options: DetectionOptions, *, console: Console | None = None
) -> Result:
    """Fine-tune a detector from RUN|WEIGHTS, evaluate it, and keep the result beside the run's other evaluations.

    The same call continues where a killed or a paused one was. The detector stays in its last checkpoint.
    Returns AP, AP50, AP75, AP_small, AP_medium, AP_large (percent, COCO's definition; None where nothing is to be
    found), for VOC also AP_11point, AP50_11point, AP75_11point and AP50_11point_per_class, besides counts, config,
    checksums and out; iteration and complete (False) where options.max_iterations ended it.
    Raises ValueError, FileNotFoundError, NonFiniteLossError, OSError (a full disk).
    """
    config, name = protocol.config(), f"detect-{protocol.dataset}"
    with evaluation_ranks(options) as (options, ranks, device):
        require_pycocotools()  # not only when the training is over
        pretrained = load_pretrained(weights)
        train, test = _read(data, config.train_sets, config), _read(data, (config.test_set,), config)
        if train.classes != test.classes:
            raise ValueError(f"train and test of {data} have other classes: {train.classes} and {test.classes}")
        fingerprints = {"train_fingerprint": train.fingerprint, "test_fingerprint": test.fingerprint}
        settings = {**as_plain(config), "precision": options.precision, **fingerprints}
        place = TrainingOptions(
            out=options.out or (pretrained.run.path if pretrained.run else pretrained.evaluations) / name,
            max_steps=options.max_iterations,
            checkpoint_every_s=0.0,
        )
        shown = replace(test, images=test.images[: options.max_test_images])
        of_a_part = len(shown.images) < len(test.images)
        with open_evaluation(name, settings, pretrained, ranks, device, place) as evaluation:

            def compute() -> dict[str, Any]:
                found, num_train_images = _train_and_detect(evaluation, config, options, train, shown, console)
                return {
                    **(_precisions(shown, found, config) if ranks.is_main else {}),
                    "complete": True,
                    "train_images": num_train_images,
                    "test_images": len(shown.images),
                    "whole_test_set": not of_a_part,
                    "iteration": config.iterations,
                    **pretrained.describe(),
                    **fingerprints,
                    "precision": options.precision,
                    "config": as_plain(config),
                    "data": str(data),
                    "out": str(evaluation.path),
                    "world_size": ranks.world_size,
                }

            _, values = evaluation.result(compute, of_a_part=of_a_part)
            return Result(name, values if values.get("complete", True) else values | {"iteration": values["step"]})


def _train_and_detect(
    evaluation: Evaluation,
    config: DetectionConfig,
    options: DetectionOptions,
    train: AnnotatedImages,
    test: AnnotatedImages,
    console: Console | None,
) -> tuple[list[ImageDetections], int]:
    """What the trained detector finds, and the number of images that it learned from."""
    pretrained, ranks, device = evaluation.pretrained, evaluation.ranks, evaluation.device
    views = pretrained.description.views
    reader = BatchReader(
        mean=views.mean,
        std=views.std,
        max_side=config.max_side,
        with_ignored=config.dataset == "voc",
        workers=options.workers,
        device=device,
        dtype=encoder_dtype(options.precision),
    )
    detector = build_detector(pretrained.backbone, len(train.classes), config, options.precision, ranks, device)
    used = _trainable(train, config)
    training = DetectorTraining(
        config=config,
        detector=detector,
        images=used.images,
        reader=reader,
        ranks=ranks,
        precision=options.precision,
        metrics_file=evaluation.path / "metrics.jsonl",
        log_every=options.log_every,
    )
    with evaluation.display(console, config.iterations, line_every_s=0.0) as display:
        parameters = sum(parameter.numel() for parameter in detector.parameters())
        left_out = len(train.images) - len(used.images)
        display.say(
            f"Faster R-CNN C4, {parameters:,} parameters, {len(train.classes)} classes; {len(used.images):,} train "
            f"images ({train.num_boxes:,} boxes"
            + (f", {left_out:,} images without boxes left out" if left_out else "")
            + f"), {len(test.images):,} test images; {config.iterations:,} iterations of {config.batch_size} images, "
            f"lr {config.lr:g}, a tenth of it from "
            f"{' and '.join(f'{step:,}' for step in config.lr_steps) or 'nowhere'} on; {device}"
            + (f" x {ranks.world_size} ranks" if ranks.world_size > 1 else "")
            + f", {options.precision}"
        )
        training.run(evaluation.stepper("", config.iterations, options.checkpoint_every), display)
    return detect(detector, test, reader, config.test_side, ranks, options.precision), len(used.images)


@torch.no_grad()
def detect(
    detector: FasterRCNNC4, test: AnnotatedImages, reader: BatchReader, side: int, ranks: Ranks, precision: str
) -> list[ImageDetections]:
    """What the detector finds in the images, one after the other, the same on every rank."""
    detector.eval()
    own = range(ranks.rank, len(test.images), ranks.world_size)
    requests: Iterator[list[ImageRequest]] = ([ImageRequest(image=test.images[number], side=side)] for number in own)
    found = {}
    for number, batch in zip(own, reader.read(requests), strict=True):
        with encoder_precision(precision, reader.device):
            _, (detected,) = detector(batch.images, batch.sizes)
        image, (height, width) = batch.annotated[0], batch.sizes[0]
        boxes = resized_boxes(detected["boxes"].float().cpu().numpy(), (width, height), (image.width, image.height))
        labels, scores = (detected["labels"] - 1).tolist(), detected["scores"].tolist()
        found[str(number)] = json.dumps({"boxes": boxes.tolist(), "scores": scores, "labels": labels})
    found = ranks.merged(found)
    return [_detections(json.loads(found[str(number)])) for number in range(len(test.images))]


def _detections(document: dict[str, Any]) -> ImageDetections:
    return ImageDetections(
        boxes=np.asarray(document["boxes"], dtype=np.float64).reshape(-1, 4),
        scores=np.asarray(document["scores"], dtype=np.float64),
        labels=np.asarray(document["labels"], dtype=np.int64),
    )


def _precisions(test: AnnotatedImages, detections: list[ImageDetections], config: DetectionConfig) -> dict[str, Any]:
    """In percent; None where there is nothing to find."""
    voc = config.dataset == "voc"
    precisions: dict[str, Any] = coco_average_precisions(
        test.images, detections, test.classes, ignored_are_crowds=not voc
    )
    if voc:
        rounded = published_rounding(detections) if config.published_rounding else detections
        eleven = voc_average_precisions(test.images, rounded, len(test.classes))
        present = ~np.isnan(eleven[0])
        means = eleven[:, present].mean(axis=1) if present.any() else np.full(len(eleven), np.nan)
        precisions |= {
            "AP_11point": float(means.mean()),
            "AP50_11point": float(means[COCO_THRESHOLDS.index(0.5)]),
            "AP75_11point": float(means[COCO_THRESHOLDS.index(0.75)]),
        }
    percent: dict[str, Any] = {name: _percent(value) for name, value in precisions.items()}
    if voc:
        by_class = zip(test.classes, eleven[0].tolist(), strict=True)
        percent["AP50_11point_per_class"] = {name: _percent(value) for name, value in by_class}
    return percent


def _percent(value: float) -> float | None:
    return None if np.isnan(value) else 100 * value


def _read(data: Path, sets: tuple[str, ...], config: DetectionConfig) -> AnnotatedImages:
    if not data.is_dir():
        raise FileNotFoundError(f"there is no folder {data}; give --data the VOCdevkit or the COCO folder")
    if config.dataset == "voc":
        return read_voc(data, sets)
    if len(sets) != 1:
        raise ValueError(f"COCO has one train set, given are {len(sets)}: {', '.join(sets)}")
    return read_coco(data, sets[0])


def _trainable(train: AnnotatedImages, config: DetectionConfig) -> AnnotatedImages:
    """Without the images that have nothing to learn from, unless they are wanted."""
    useful = [
        image for image in train.images if len(image.labels) > (0 if config.dataset == "voc" else image.ignored.sum())
    ]
    if not useful:
        raise ValueError("none of the training images has a box to learn from; look at the annotations")
    return train if config.train_on_images_without_boxes else replace(train, images=tuple(useful))
