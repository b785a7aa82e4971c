"""Semi-supervised fine-tuning on a part of the labels: `leoclr-fast finetune`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from dataset_tools.sources import Split
from dataset_tools.subset_lists import percent_of, read_subset_list, subset_text, write_subset_list
from leoclr_fast.config import LR_REFERENCE_BATCH_SIZE, SpeedConfig
from leoclr_fast.config_file import as_plain
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.process_group import process_group
from leoclr_fast.evaluate.evaluation_folder import PausedError, evaluation_folder
from leoclr_fast.evaluate.grid import GridSearch, Trial
from leoclr_fast.evaluate.labelled_data import LabelledData, open_labelled_data, require_every_class
from leoclr_fast.evaluate.options import EvaluationOptions
from leoclr_fast.evaluate.protocols import FineTuneProtocol
from leoclr_fast.evaluate.subject import Subject, load_subject, require_real_images, view_settings
from pipelines.config import ViewConfig

log = logging.getLogger(__name__)

_HOLDOUT_FRACTION = 0.1


def run_finetune(
    weights: Path,
    data: Path,
    protocol: FineTuneProtocol,
    options: EvaluationOptions,
    *,
    percents: Sequence[float] = (),
    list_file: Path | None = None,
    subset_seed: int = 0,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Fine-tune a run's network, or that of a file of weights, once for each share of the labels.

    percents: shares of train, nested for one subset_seed and class-balanced, as `subset` draws them; or list_file: the
    images to learn from, by name. Exactly one of the two.
    Returns, for each, top1, top5 and mean_per_class (percent, on val, of the last epoch), what was learned from with
    its checksum, and what it was made of; an empty list on ranks other than the first. Where options.max_steps ended
    the fine-tuning of a share, the last entry is the document of `PausedError`, and no further share is begun.
    Raises ValueError for what the user can mend.
    """
    if bool(percents) == (list_file is not None):
        raise ValueError("give either --percent P … or --list FILE")
    if options.out is not None and len(percents) > 1:
        raise ValueError(f"--out is for one share of the labels, but {len(percents)} are asked for")
    speed, max_images = options.speed, options.max_images
    require_real_images(speed.loader)
    with process_group(speed.device) as (ranks, device):
        subject = load_subject(weights, untrained=options.untrained)
        labelled = open_labelled_data(data, holdout_seed=subject.holdout_seed, max_images=max_images)
        subsets: list[tuple[npt.NDArray[np.int64], dict[str, Any]]]
        if list_file is not None:
            indices = read_subset_list(list_file, labelled.train)
            subsets = [(indices, {"percent": 100 * len(indices) / len(labelled.train), "list": list_file.name})]
        else:
            subsets = [
                (percent_of(labelled.train, percent, subset_seed), {"percent": percent, "subset_seed": subset_seed})
                for percent in percents
            ]
        views = subject.view_config(protocol.crop_scale, options.image_size)
        results = []
        for indices, subset in subsets:
            part = labelled.train.subset(indices)
            where = f"--list {list_file}" if list_file is not None else f"{subset['percent']:g} % of {data}"
            require_every_class(part, where, "Learn from more images: a larger --percent, or a longer --list.")
            settings = {
                **as_plain(protocol),
                "epochs": protocol.num_epochs(subset["percent"]),
                **subset,
                "labels_sha256": hashlib.sha256(subset_text(labelled.train, indices)).hexdigest(),
                **view_settings(views),
                "precision": speed.precision,
                "data_fingerprint": labelled.fingerprint,
                "max_images": max_images,
            }
            with evaluation_folder("finetune", settings, subject, options, ranks) as folder:
                result = folder.finished
                if result is None:
                    if ranks.is_main:
                        write_subset_list(folder.path / "labels.txt", labelled.train, indices)
                    epochs = settings["epochs"]
                    search = _search(subject, labelled, part, protocol, epochs, views, speed, ranks, device)
                    try:
                        found = search.run(folder, console)
                    except PausedError as paused:
                        results.append({"percent": subset["percent"], **paused.document})
                        break
                    result = {
                        **found,
                        "epochs": epochs,
                        "percent": subset["percent"],
                        "labels": len(part),
                        "labels_sha256": settings["labels_sha256"],
                        **subject.describe(),
                        **labelled.describe(),
                        "world_size": ranks.world_size,
                        "note": labelled.note,
                    }
                    result = folder.finish(result, device)
                    folder.checkpoints("final").delete()
                results.append(result)
        return results if ranks.is_main else []


def _search(
    subject: Subject,
    labelled: LabelledData,
    part: Split,
    protocol: FineTuneProtocol,
    epochs: int,
    views: ViewConfig,
    speed: SpeedConfig,
    ranks: Ranks,
    device: torch.device,
) -> GridSearch:
    """The learning rates to choose from, which scale with the batch, on the labels that there are."""
    base_lrs = protocol.base_lr_grid or (protocol.base_lr,)
    scale = protocol.batch_size / LR_REFERENCE_BATCH_SIZE
    return GridSearch(
        backbone=subject.backbone,
        train=part,
        val=labelled.val,
        trials=tuple(Trial(lr=lr * scale, weight_decay=protocol.weight_decay) for lr in base_lrs),
        metric="top1",
        epochs=epochs,
        steps=None,
        batch_size=protocol.batch_size,
        momentum=protocol.momentum,
        holdout_fraction=_HOLDOUT_FRACTION,
        seed=protocol.seed,
        adapted_batchnorm=False,
        views=views,
        speed=speed,
        ranks=ranks,
        device=device,
    )
