"""What a pretraining came to, in one sentence."""

from __future__ import annotations

from typing import Any


def outcome(summary: dict[str, Any]) -> str:
    """The summary of `leoclr_fast.training.loop.pretrain`, for people."""
    parts = [f"{summary['recipe']}: {'finished' if summary['complete'] else 'stopped early'}"]
    if summary["images_per_s"] is not None:
        parts.append(f"{summary['images_per_s']:,.0f} images/s")
    if summary["knn_top1"] is not None:
        before = summary.get("knn_top1_untrained")
        parts.append(
            f"kNN top-1 {summary['knn_top1']:.2f} %" + (f" (untrained {before:.2f} %)" if before is not None else "")
        )
    return ", ".join(parts)
