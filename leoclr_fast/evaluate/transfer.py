"""Fine-tuning on other data sets: `leoclr-fast transfer`."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dataset_tools.subsets import limited
from leoclr_fast.config_file import as_plain
from leoclr_fast.evaluate.evaluation import evaluation_of
from leoclr_fast.evaluate.fine_tuning import Hyperparameters, grid_search
from leoclr_fast.evaluate.protocols import TrainingOptions, TransferProtocol
from leoclr_fast.evaluate.transfer_data import TRANSFER_SETS, open_transfer_data

log = logging.getLogger(__name__)


def run(
    weights: Path,
    dataset: str,
    data: Path,
    protocol: TransferProtocol,
    options: TrainingOptions,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Fine-tune a run's network, or that of a file of weights, on `dataset`, one of `TRANSFER_SETS`.

    Returns top1, top5 and mean_per_class (percent, on test), metric (the one of them that the literature reports), lr
    and weight_decay (the chosen ones), grid, what it was made of, and as `Evaluation.result`.
    Raises ValueError for what the user can mend.
    """
    with evaluation_of(weights, options, console) as evaluation:
        whole = open_transfer_data(dataset, data)
        if whole.note:
            log.warning("%s: %s", whole.kind, whole.note)
        train, test = limited(whole.train, options.max_images), limited(whole.val, options.max_images)
        trials = tuple(
            Hyperparameters(
                lr=lr,
                weight_decay=weight_decay / lr,
                batch_size=protocol.batch_size,
                batchnorm_momentum=None,
                seed=protocol.seed,
            )
            for lr in protocol.lr_grid
            for weight_decay in protocol.weight_decay_grid
        )

        def compute(folder: Path) -> dict[str, Any]:
            data, metric = replace(whole, train=train, val=test), TRANSFER_SETS[dataset].metric
            found = grid_search(evaluation, folder, data, trials, metric=metric, steps=protocol.steps)
            return found | {"dataset": dataset}

        settings = {"dataset": dataset, **as_plain(protocol), **evaluation.view_settings(whole.fingerprint)}
        return evaluation.result("transfer", settings, compute)
