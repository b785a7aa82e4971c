"""Detection with the weights of a run or a file, from its command line to its result."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leoclr_fast.config_file import as_plain
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.process_group import process_group
from leoclr_fast.evaluate.detection.annotations import AnnotatedImages
from leoclr_fast.evaluate.detection.coco_annotations import read_coco
from leoclr_fast.evaluate.detection.coco_ap import coco_average_precisions, require_pycocotools
from leoclr_fast.evaluate.detection.config import DetectionConfig
from leoclr_fast.evaluate.detection.detector_state import DetectorState
from leoclr_fast.evaluate.detection.image_batches import BatchReader, Wish, resized_boxes
from leoclr_fast.evaluate.detection.train_detector import DetectorTraining
from leoclr_fast.evaluate.detection.voc_annotations import read_voc
from leoclr_fast.evaluate.detection.voc_ap import COCO_THRESHOLDS, ImageDetections, voc_average_precisions
from leoclr_fast.evaluate.evaluation_folder import newest_checkpoint
from leoclr_fast.evaluate.subject import evaluations_beside
from leoclr_fast.machine.precision import encoder_dtype, encoder_precision
from leoclr_fast.run.environment import environment
from leoclr_fast.run.folder import RunFolder, write_json
from leoclr_fast.weights.pretrained import Pretrained, load_pretrained

log = logging.getLogger(__name__)


def run_detection(
    weights: Path,
    data: Path,
    config: DetectionConfig,
    *,
    out: Path | None = None,
    device: str = "auto",
    precision: str = "fp32",
    workers: int = 8,
    checkpoint_every: int = 1000,
    log_every: int = 20,
    max_iterations: int | None = None,
    max_test_images: int | None = None,
) -> dict[str, Any]:
    """Fine-tune a detector from RUN|WEIGHTS, evaluate it, and keep the result beside the run's other evaluations.

    out: where checkpoints, metrics.jsonl and result.json go; if not given `detect-DATASET` in the run, or in
    `WEIGHTS.evaluations` beside a file of weights. The same call continues where a killed one was. max_iterations: stop
    there; the same call without it continues. max_test_images: evaluate on the first so many, to try things out.
    Returns AP, AP50, AP75, AP_small, AP_medium, AP_large (percent, COCO's definition; None where nothing is to be
    found), for VOC also AP_11point, AP50_11point, AP75_11point and AP50_11point_per_class, besides counts, config,
    checksums and out; an empty dict on ranks other than the first; iteration and complete (False) where max_iterations
    ended it.
    Raises ValueError, FileNotFoundError, NonFiniteLossError, OSError (a full disk).
    """
    with process_group(device) as (ranks, chosen), ExitStack() as stack:
        require_pycocotools()  # not only when the training is over
        pretrained = load_pretrained(weights)
        folder = _folder(pretrained, config, out)
        train, test = _read(data, config.train_sets, config), _read(data, (config.test_set,), config)
        if train.classes != test.classes:
            raise ValueError(f"train and test of {data} have other classes: {train.classes} and {test.classes}")
        if ranks.is_main:
            _make(folder)
            stack.enter_context(RunFolder(folder).locked())
        ranks.barrier()
        state = DetectorState.fresh(
            *(config, pretrained, len(train.classes), train.fingerprint, precision, ranks, chosen)
        )
        finished = ranks.from_main(_finished_result(folder, state, test) if ranks.is_main else None)
        if finished is not None and max_test_images is None:
            log.info("%s is finished; its result stands", folder)
            return finished if ranks.is_main else {}
        _resume(state, folder)
        ranks.require_equal(state.iteration, "the iteration to continue from", chosen)
        views = pretrained.description.views
        reader = BatchReader(
            mean=views.mean,
            std=views.std,
            max_side=config.max_side,
            with_ignored=config.dataset == "voc",
            workers=workers,
            device=chosen,
            dtype=encoder_dtype(precision),
        )
        used = _trainable(train, config)
        if ranks.is_main:
            _announce(config, state, train, len(used.images), test, chosen, ranks, precision)
        training = DetectorTraining(
            config=config,
            state=state,
            images=used.images,
            reader=reader,
            ranks=ranks,
            precision=precision,
            folder=folder,
            checkpoint_every=checkpoint_every,
            log_every=log_every,
        )
        training.run(config.iterations if max_iterations is None else min(max_iterations, config.iterations))
        if state.iteration < config.iterations:
            return {"complete": False, "iteration": state.iteration, "out": str(folder)} if ranks.is_main else {}

        shown = replace(test, images=test.images[:max_test_images])
        detections = detect(state, shown, reader, config.test_side, ranks, precision)
        if not ranks.is_main:
            return {}
        result: dict[str, Any] = {
            **_precisions(shown, detections, config),
            "complete": True,
            "train_images": len(used.images),
            "test_images": len(shown.images),
            "whole_test_set": len(shown.images) == len(test.images),
            "iteration": state.iteration,
            "weights": str(pretrained.path),
            "weights_sha256": pretrained.sha256,
            "train_fingerprint": train.fingerprint,
            "test_fingerprint": test.fingerprint,
            "precision": precision,
            "config": as_plain(config),
            "settings": {
                "weights_sha256": pretrained.sha256,
                **as_plain(config),
                "precision": precision,
                "train_fingerprint": train.fingerprint,
                "test_fingerprint": test.fingerprint,
            },
            "environment": environment(chosen, ranks.world_size),
            "out": str(folder),
        }
        if pretrained.run is not None:
            pretrained.run.add_evaluation(f"detect-{config.dataset}", result | {"data": str(data)})
        if result["whole_test_set"]:
            write_json(folder / _RESULT, result)
        return result


_RESULT = "result.json"


@torch.no_grad()
def detect(
    state: DetectorState,
    test: AnnotatedImages,
    reader: BatchReader,
    side: int,
    ranks: Ranks,
    precision: str,
) -> list[ImageDetections]:
    """What the detector finds in the images, one after the other; on the first rank of all, on the others of some."""
    state.detector.eval()
    own = range(ranks.rank, len(test.images), ranks.world_size)
    wishes: Iterator[list[Wish]] = ([Wish(image=test.images[number], side=side)] for number in own)
    found = {}
    for number, batch in zip(own, reader.read(wishes), strict=True):
        with encoder_precision(precision, reader.device):
            _, (detected,) = state.detector(batch.images, batch.sizes)
        image, (height, width) = batch.annotated[0], batch.sizes[0]
        boxes = resized_boxes(detected["boxes"].float().cpu().numpy(), (width, height), (image.width, image.height))
        labels, scores = (detected["labels"] - 1).tolist(), detected["scores"].tolist()
        found[str(number)] = json.dumps({"boxes": boxes.tolist(), "scores": scores, "labels": labels})
    found = ranks.merged(found)
    return [_detections(json.loads(found[str(number)])) for number in range(len(test.images)) if str(number) in found]


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
        eleven = voc_average_precisions(test.images, detections, len(test.classes))
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


def _folder(pretrained: Pretrained, config: DetectionConfig, out: Path | None) -> Path:
    if out is not None:
        return out
    beside = evaluations_beside(pretrained.path) if pretrained.run is None else pretrained.run.path
    return beside / f"detect-{config.dataset}"


def _make(folder: Path) -> None:
    """Raises ValueError if it cannot be made, or holds other files than a detector's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot make the folder {folder}: {error.strerror}; give --out a folder that it can work in"
        ) from error
    own = {_RESULT, "metrics.jsonl"}
    foreign = [f.name for f in folder.iterdir() if f.name not in own and not f.name.startswith((".", "step-"))]
    if foreign:
        raise ValueError(f"{folder} holds other files ({', '.join(foreign[:3])}…); give --out a new or empty folder")


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
    images = tuple(useful) if config.skip_images_without_boxes else train.images
    return replace(train, images=images)


def _finished_result(folder: Path, state: DetectorState, test: AnnotatedImages) -> dict[str, Any] | None:
    """The result of the same detector on the same images, if it is there."""
    file = folder / _RESULT
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    origin = {
        "config": result["config"],
        "weights_sha256": result["weights_sha256"],
        "data_fingerprint": result["train_fingerprint"],
        "precision": result["precision"],
    }
    same = origin == json.loads(json.dumps(state.origin)) and result["test_fingerprint"] == test.fingerprint
    return result if same else None


def _resume(state: DetectorState, folder: Path) -> None:
    newest = newest_checkpoint(folder)
    if newest is not None:
        path, saved = newest
        state.load_state_dict(saved, path)
        log.info("resuming from %s", path)


def _announce(
    config: DetectionConfig,
    state: DetectorState,
    train: AnnotatedImages,
    num_used: int,
    test: AnnotatedImages,
    device: torch.device,
    ranks: Ranks,
    precision: str,
) -> None:
    parameters = sum(parameter.numel() for parameter in state.detector.parameters())
    left_out = len(train.images) - num_used
    log.info(
        "Faster R-CNN C4, %s parameters, %d classes; %s train images (%s boxes%s), %s test images; %d iterations of %d "
        "images, lr %g, a tenth of it from %s on; %s%s, %s",
        f"{parameters:,}",
        len(train.classes),
        f"{num_used:,}",
        f"{train.num_boxes:,}",
        f", {left_out:,} images without boxes left out" if left_out else "",
        f"{len(test.images):,}",
        config.iterations,
        config.batch_size,
        config.lr,
        " and ".join(f"{step:,}" for step in config.lr_steps) or "nowhere",
        device,
        f" x {ranks.world_size} ranks" if ranks.world_size > 1 else "",
        precision,
    )
