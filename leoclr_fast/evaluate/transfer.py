"""Fine-tuning on other data sets: `leoclr-fast transfer`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.console import Console

from dataset_tools.subsets import limited
from leoclr_fast.config_file import as_plain
from leoclr_fast.distributed.process_group import process_group
from leoclr_fast.evaluate.evaluation_folder import PausedError, evaluation_folder
from leoclr_fast.evaluate.grid import GridSearch, Trial
from leoclr_fast.evaluate.options import EvaluationOptions
from leoclr_fast.evaluate.protocols import TransferProtocol
from leoclr_fast.evaluate.subject import load_subject, require_real_images, view_settings
from leoclr_fast.evaluate.transfer_data import TRANSFER_SETS, open_transfer_data

log = logging.getLogger(__name__)


def run_transfer(
    weights: Path,
    dataset: str,
    data: Path,
    protocol: TransferProtocol,
    options: EvaluationOptions,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Fine-tune a run's network, or that of a file of weights, on one of `TRANSFER_SETS`.

    Returns top1, top5 and mean_per_class (percent, on test), metric (the one of them that the literature reports), lr
    and weight_decay (the chosen ones), grid, missing_images, notes, and what it was made of; an empty dict on ranks
    other than the first. Where options.max_steps ended it: the document of `PausedError`.
    Raises ValueError for what the user can mend.
    """
    speed, max_images = options.speed, options.max_images
    require_real_images(speed.loader)
    with process_group(speed.device) as (ranks, device):
        transfer = open_transfer_data(dataset, data)
        published = TRANSFER_SETS[dataset]
        subject = load_subject(weights, untrained=options.untrained)
        views = subject.view_config(protocol.crop_scale, options.image_size)
        settings = {
            "dataset": dataset,
            **as_plain(protocol),
            **view_settings(views),
            "precision": speed.precision,
            "data_fingerprint": transfer.fingerprint,
            "max_images": max_images,
        }
        with evaluation_folder("transfer", settings, subject, options, ranks) as folder:
            if folder.finished is not None:
                return folder.finished if ranks.is_main else {}
            if ranks.is_main and transfer.missing:
                (folder.path / "missing.txt").write_text(
                    "".join(f"{name}\n" for name in transfer.missing), errors="surrogateescape"
                )
                log.info("%d images are missing: %s", len(transfer.missing), folder.path / "missing.txt")
            for note in transfer.notes:
                log.warning("%s: %s", published.title, note)
            search = GridSearch(
                backbone=subject.backbone,
                train=limited(transfer.train, max_images),
                val=limited(transfer.test, max_images),
                trials=tuple(
                    Trial(lr=lr, weight_decay=weight_decay / lr)
                    for lr in protocol.lr_grid
                    for weight_decay in protocol.weight_decay_grid
                ),
                metric=published.metric,
                epochs=None,
                steps=protocol.steps,
                batch_size=protocol.batch_size,
                momentum=protocol.momentum,
                holdout_fraction=protocol.holdout_fraction,
                seed=protocol.seed,
                adapted_batchnorm=True,
                views=views,
                speed=speed,
                ranks=ranks,
                device=device,
            )
            try:
                found = search.run(folder, console)
            except PausedError as paused:
                return paused.document if ranks.is_main else {}
            result = {
                "dataset": dataset,
                **found,
                **subject.describe(),
                **transfer.describe(),
                "world_size": ranks.world_size,
            }
            document = folder.finish(result, device)
            folder.checkpoints("final").delete()
            return document
