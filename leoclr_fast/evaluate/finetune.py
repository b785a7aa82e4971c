"""Semi-supervised fine-tuning on a part of the labels: `leoclr-fast finetune`."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from dataset_tools.files import write_file
from dataset_tools.sources import Split
from dataset_tools.subset_lists import percent_of, read_subset_list, subset_text
from leoclr_fast.config import LR_REFERENCE_BATCH_SIZE
from leoclr_fast.config_file import as_plain
from leoclr_fast.evaluate.data import LabelledData, open_labelled_data, require_every_class
from leoclr_fast.evaluate.evaluation import Evaluation, evaluation_of
from leoclr_fast.evaluate.fine_tuning import Hyperparameters, grid_search
from leoclr_fast.evaluate.protocols import FineTuneProtocol, TrainingOptions

_CHOICES = ("percent", "list", "subset_seed")  # of the labels: a share of them has its own


def run(
    weights: Path, data: Path, protocol: FineTuneProtocol, options: TrainingOptions, *, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tune a run's network, or that of a file of weights, once for each share of the labels.

    Returns evaluations: for each share top1, top5 and mean_per_class (percent, on val, of the last epoch), what was
    learned from with its checksum, what it was made of, and as `Evaluation.result`. Where options.max_steps pauses the
    fine-tuning of a share, `complete` is False in the last one, and no further share is begun.
    Raises ValueError for what the user can mend.
    """
    if options.out is not None and len(protocol.percent) > 1:
        raise ValueError(f"--out is for one share of the labels, but {len(protocol.percent)} are asked for")
    with evaluation_of(weights, options, console) as evaluation:
        holdout_seed = evaluation.pretrained.holdout_seed
        labelled = open_labelled_data(data, holdout_seed=holdout_seed, max_images=options.max_images)
        results = []
        for indices, subset in _subsets(labelled.train, protocol):
            found = _fine_tuned(evaluation, labelled, indices, subset, protocol)
            paused = evaluation.ranks.from_main(found.get("complete") is False)
            results.append(found | {"percent": subset["percent"]})
            if paused:
                break
        return {"evaluations": results} if evaluation.ranks.is_main else {}


def _fine_tuned(
    evaluation: Evaluation,
    labelled: LabelledData,
    indices: npt.NDArray[np.int64],
    subset: dict[str, Any],
    protocol: FineTuneProtocol,
) -> dict[str, Any]:
    """The result of one share. subset: what chose its `indices` in train."""
    part, percent = labelled.train.subset(indices), subset["percent"]
    where = f"{percent:g} % of {labelled.path}" if protocol.list is None else f"--list {protocol.list}"
    require_every_class(part, where, "Learn from more images: a larger --percent, or a longer --list.")
    names = subset_text(labelled.train, indices)
    epochs = protocol.num_epochs(percent)
    chosen = {"epochs": epochs, "labels_sha256": hashlib.sha256(names).hexdigest()}
    trials = [
        Hyperparameters(
            lr=base_lr * protocol.batch_size / LR_REFERENCE_BATCH_SIZE,
            weight_decay=protocol.weight_decay,
            batch_size=protocol.batch_size,
            seed=protocol.seed,
        )
        for base_lr in protocol.base_lr_grid or (protocol.base_lr,)
    ]

    def compute(folder: Path) -> dict[str, Any]:
        if evaluation.ranks.is_main:
            write_file(folder / "labels.txt", names)
        sizes = {"percent": percent, "labels": len(part), "train_images": len(labelled.train)}
        of_part = replace(labelled, train=part)
        return grid_search(evaluation, folder, of_part, trials, metric="top1", epochs=epochs) | chosen | sizes

    settings = {name: value for name, value in as_plain(protocol).items() if name not in _CHOICES}
    settings |= {**chosen, **subset, **evaluation.view_settings(labelled.fingerprint)}
    return evaluation.result("finetune", settings, compute)


def _subsets(train: Split, protocol: FineTuneProtocol) -> list[tuple[npt.NDArray[np.int64], dict[str, Any]]]:
    """The images of each share, and the settings that choose them."""
    if protocol.list is not None:
        indices = read_subset_list(protocol.list, train)
        return [(indices, {"percent": 100 * len(indices) / len(train), "list": protocol.list.name})]
    seed = protocol.subset_seed
    return [
        (percent_of(train, percent, seed), {"percent": percent, "subset_seed": seed}) for percent in protocol.percent
    ]
