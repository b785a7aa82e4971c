"""Fine-tuning on other data sets: `leoclr-fast transfer`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.console import Console

from dataset_tools.subsets import limited
from leoclr_fast.config_file import as_plain
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
from leoclr_fast.evaluate.protocols import TrainingOptions, TransferProtocol
from leoclr_fast.evaluate.transfer_data import TRANSFER_SETS, open_transfer_data
from leoclr_fast.weights.pretrained import load_pretrained

log = logging.getLogger(__name__)


def run(
    weights: Path,
    dataset: str,
    data: Path,
    protocol: TransferProtocol,
    options: TrainingOptions,
    *,
    console: Console | None = None,
) -> Result:
    """Fine-tune a run's network, or that of a file of weights, on `dataset`, one of `TRANSFER_SETS`.

    Returns top1, top5 and mean_per_class (percent, on test), metric (the one of them that the literature reports), lr
    and weight_decay (the chosen ones), grid, missing_images, notes, and what it was made of.
    Raises ValueError for what the user can mend.
    """
    require_real_images(options.loader)
    with evaluation_ranks(options) as (options, ranks, device):
        transfer = open_transfer_data(dataset, data)
        published = TRANSFER_SETS[dataset]
        pretrained = load_pretrained(weights, untrained=options.untrained)
        views = evaluation_views(pretrained, protocol.crop_scale, options.image_size)
        settings = {"dataset": dataset, **as_plain(protocol), **data_settings(options, views, transfer.fingerprint)}
        with open_evaluation("transfer", settings, pretrained, ranks, device, options) as evaluation:
            search = GridSearch(
                evaluation=evaluation,
                train=limited(transfer.train, options.max_images),
                val=limited(transfer.test, options.max_images),
                views=views,
                trials=tuple(
                    Hyperparameters(
                        lr=lr,
                        weight_decay=weight_decay / lr,
                        momentum=protocol.momentum,
                        batch_size=protocol.batch_size,
                        seed=protocol.seed,
                    )
                    for lr in protocol.lr_grid
                    for weight_decay in protocol.weight_decay_grid
                ),
                metric=published.metric,
                holdout_fraction=protocol.holdout_fraction,
                steps=protocol.steps,
                adapted_batchnorm=True,
                console=console,
            )

            def compute() -> dict[str, Any]:
                missing = evaluation.path / "missing.txt"
                if ranks.is_main and transfer.missing:
                    missing.write_text("".join(f"{name}\n" for name in transfer.missing), errors="surrogateescape")
                    log.info("%d images are missing: %s", len(transfer.missing), missing)
                for note in transfer.notes:
                    log.warning("%s: %s", published.title, note)
                return search.run() | {"dataset": dataset} | pretrained.describe() | transfer.describe()

            return evaluation.result(compute)
