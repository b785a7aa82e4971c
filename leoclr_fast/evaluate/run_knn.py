"""kNN accuracy of a run, or of a file of weights, on a data set: `leoclr-fast knn`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dataset_tools.sources import open_source
from dataset_tools.splits import choose_splits
from leoclr_fast.config import MonitorConfig, SpeedConfig
from leoclr_fast.distributed.process_group import process_group
from leoclr_fast.evaluate.knn_evaluation import knn_evaluation
from leoclr_fast.evaluate.subject import load_subject, require_real_images
from leoclr_fast.machine.precision import encoder_dtype


def run_knn(
    weights: Path,
    data: Path,
    speed: SpeedConfig,
    *,
    k: int | None = None,
    temperature: float | None = None,
    batch_size: int = 256,
    max_images: int | None = None,
    untrained: bool = False,
    image_size: int | None = None,
) -> dict[str, Any]:
    """kNN of a run's final weights, else of its newest checkpoint, or of a file of weights.

    Returns top1 and top5 (percent; None without labels), k, temperature, weights and their checksum, bank_images,
    query_images, note; an empty dict on ranks other than the first. k and temperature default to the run's own, for a
    file to those of MoCo's CIFAR demo.
    """
    require_real_images(speed.loader)
    with process_group(speed.device) as (ranks, device):
        subject = load_subject(weights, untrained=untrained)
        monitor = subject.run.read_config().monitor if subject.run else MonitorConfig()
        backbone = subject.backbone.to(device, encoder_dtype(speed.precision)).to(memory_format=torch.channels_last)
        source = open_source(data)
        splits = choose_splits(source, holdout_seed=subject.holdout_seed)
        k = monitor.knn_k if k is None else k
        temperature = monitor.knn_temperature if temperature is None else temperature
        views = subject.view_config((0.08, 1.0), image_size)
        with knn_evaluation(
            splits,
            views=views,
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
                **subject.describe(),
                "bank_images": len(evaluation.bank.split),
                "query_images": len(evaluation.queries.split),
                "note": splits.note,
            }
            settings = {
                "k": k,
                "temperature": temperature,
                "image_size": views.image_size,
                "center_crop_fraction": views.center_crop_fraction,
                "precision": speed.precision,
                "data_fingerprint": source.fingerprint,
                "max_images": max_images,
            }
            kept = {"data": str(data), "data_kind": source.kind, "settings": settings}
            if subject.run is not None:
                subject.run.add_evaluation("knn", result | kept)
            return result | kept
