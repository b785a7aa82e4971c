"""Semi-supervised fine-tuning on a part of the labels: `leoclr-fast finetune`."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from dataset_tools.sources import Split
from dataset_tools.subset_lists import percent_of, read_subset_list, subset_text, write_subset_list
from leoclr_fast.config import LR_REFERENCE_BATCH_SIZE
from leoclr_fast.config_file import as_plain
from leoclr_fast.evaluate.data import open_labelled_data, require_every_class
from leoclr_fast.evaluate.evaluation import (
    Result,
    data_settings,
    evaluation_ranks,
    evaluation_views,
    open_evaluation,
    require_real_images,
)
from leoclr_fast.evaluate.fine_tuning import Hyperparameters
from leoclr_fast.evaluate.grid import GridSearch
from leoclr_fast.evaluate.protocols import FineTuneProtocol, TrainingOptions
from leoclr_fast.weights.pretrained import load_pretrained

_HOLDOUT_FRACTION = 0.1


def run(
    weights: Path, data: Path, protocol: FineTuneProtocol, options: TrainingOptions, *, console: Console | None = None
) -> Result:
    """Fine-tune a run's network, or that of a file of weights, once for each share of the labels.

    Returns evaluations: for each share top1, top5 and mean_per_class (percent, on val, of the last epoch), what was
    learned from with its checksum, and what it was made of. Where options.max_steps pauses the fine-tuning of a share,
    `complete` is False in the last one, and no further share is begun.
    Raises ValueError for what the user can mend.
    """
    if options.out is not None and len(protocol.percent) > 1:
        raise ValueError(f"--out is for one share of the labels, but {len(protocol.percent)} are asked for")
    require_real_images(options.loader)
    with evaluation_ranks(options) as (options, ranks, device):
        pretrained = load_pretrained(weights, untrained=options.untrained)
        labelled = open_labelled_data(data, holdout_seed=pretrained.holdout_seed, max_images=options.max_images)
        views = evaluation_views(pretrained, protocol.crop_scale, options.image_size)
        plain = as_plain(protocol)
        for name in ("percent", "list", "subset_seed"):
            del plain[name]
        results = []
        for indices, subset in _subsets(labelled.train, protocol):
            part, percent = labelled.train.subset(indices), subset["percent"]
            where = f"{percent:g} % of {data}" if protocol.list is None else f"--list {protocol.list}"
            require_every_class(part, where, "Learn from more images: a larger --percent, or a longer --list.")
            epochs = protocol.num_epochs(percent)
            labels_sha256 = hashlib.sha256(subset_text(labelled.train, indices)).hexdigest()
            settings = {
                **plain,
                "epochs": epochs,
                **subset,
                "labels_sha256": labels_sha256,
                **data_settings(options, views, labelled.fingerprint),
            }
            with open_evaluation("finetune", settings, pretrained, ranks, device, options) as evaluation:
                search = GridSearch(
                    evaluation=evaluation,
                    train=part,
                    val=labelled.val,
                    views=views,
                    trials=_trials(protocol),
                    metric="top1",
                    holdout_fraction=_HOLDOUT_FRACTION,
                    epochs=epochs,
                    console=console,
                )
                if ranks.is_main:
                    write_subset_list(evaluation.path / "labels.txt", labelled.train, indices)
                about = {"epochs": epochs, "percent": percent, "labels": len(part), "labels_sha256": labels_sha256}
                about |= {**pretrained.describe(), **labelled.describe()}
                _, values = evaluation.result(partial(_found, search, about))
            paused = ranks.from_main(values.get("complete") is False)
            results.append(values | {"percent": percent} if paused else values)
            if paused:
                break
        return Result("finetune", {"evaluations": results} if ranks.is_main else {})


def _found(search: GridSearch, about: dict[str, Any]) -> dict[str, Any]:
    return search.run() | about


def _subsets(train: Split, protocol: FineTuneProtocol) -> list[tuple[npt.NDArray[np.int64], dict[str, Any]]]:
    """The images of each share, and the settings that choose them."""
    if protocol.list is not None:
        indices = read_subset_list(protocol.list, train)
        return [(indices, {"percent": 100 * len(indices) / len(train), "list": protocol.list.name})]
    seed = protocol.subset_seed
    return [
        (percent_of(train, percent, seed), {"percent": percent, "subset_seed": seed}) for percent in protocol.percent
    ]


def _trials(protocol: FineTuneProtocol) -> tuple[Hyperparameters, ...]:
    """The learning rates to choose from, which scale with the batch."""
    return tuple(
        Hyperparameters(
            lr=base_lr * protocol.batch_size / LR_REFERENCE_BATCH_SIZE,
            weight_decay=protocol.weight_decay,
            momentum=protocol.momentum,
            batch_size=protocol.batch_size,
            seed=protocol.seed,
        )
        for base_lr in protocol.base_lr_grid or (protocol.base_lr,)
    )
