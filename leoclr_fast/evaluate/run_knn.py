"""kNN accuracy of a run on a data set, from its folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dataset_tools.sources import open_source
from dataset_tools.splits import choose_splits
from leoclr_fast.config import SpeedConfig
from leoclr_fast.distributed import process_group
from leoclr_fast.evaluate.knn_evaluation import knn_evaluation
from leoclr_fast.export import load_backbone
from leoclr_fast.precision import encoder_dtype
from leoclr_fast.run_folder import RunFolder


def run_knn(
    run: Path,
    data: Path,
    speed: SpeedConfig,
    *,
    k: int | None = None,
    temperature: float | None = None,
    batch_size: int = 256,
    max_images: int | None = None,
) -> dict[str, Any]:
    """kNN of the run's final weights, else of its newest checkpoint.

    Returns top1 and top5 (percent; None without labels), k, temperature, weights, bank_images, query_images, note;
    an empty dict on ranks other than the first. k and temperature default to the run's own.
    """
    with process_group(speed.device) as (ranks, device):
        folder = RunFolder(run)
        config = folder.read_config()
        backbone, weights = load_backbone(folder, config)
        backbone.to(device, encoder_dtype(speed.precision)).to(memory_format=torch.channels_last)
        splits = choose_splits(open_source(data), holdout_seed=config.result.holdout_seed)
        k = config.monitor.knn_k if k is None else k
        temperature = config.monitor.knn_temperature if temperature is None else temperature
        with knn_evaluation(
            splits,
            views=config.result.views,
            loader=speed.loader,
            batch_size=batch_size,
            k=k,
            temperature=temperature,
            precision=speed.precision,
            device=device,
            ranks=ranks,
            max_images=max_images,
        ) as evaluation:
            if not ranks.is_main and evaluation is None:
                return {}
            if evaluation is None:
                return {"top1": None, "top5": None, "k": k, "temperature": temperature, "note": splits.note}
            accuracy = evaluation.run(backbone)
            if not ranks.is_main:
                return {}
            result = {
                **asdict(accuracy),
                "weights": weights,
                "bank_images": len(evaluation.bank.split),
                "query_images": len(evaluation.queries.split),
                "note": splits.note,
            }
            folder.add_evaluation("knn", result | {"data": str(data)})
            return result
