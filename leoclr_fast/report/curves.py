"""Which curves a report draws, out of one run or several."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from leoclr_fast.report.metrics_file import Floats, number
from leoclr_fast.report.plots import Curve, Plot
from leoclr_fast.report.reference import Reference
from leoclr_fast.report.run_record import RunRecord

_LABELS = {"positive_similarity": "query and its positives", "negative_similarity": "query and negatives"}

Values = Callable[[RunRecord], Floats]


def plots_of(runs: list[RunRecord], reference: Reference | None) -> list[Plot]:
    """Loss, kNN, what the method measures, gradient norm, learning rate, images/s and data wait; the reference only
    with one run.

    x is the epoch, or the step where a run does not say how long its epochs are. Plots without a value are left out.
    """
    by_epoch = all(math.isfinite(run.steps_per_epoch) for run in runs)
    single = len(runs) == 1

    def curves(values: Values, label: str = "", style: int = 0, *, of_knn: bool = False) -> list[Curve]:
        steps = _knn("step") if of_knn else _column("step")
        return [
            Curve(
                label=label or run.label,
                x=steps(run) / run.steps_per_epoch if by_epoch else steps(run),
                y=values(run),
                style=place + style,
                markers=of_knn,
            )
            for place, run in enumerate(runs)
        ]

    plots: list[Plot] = []

    def plot(title: str, shown: list[Curve], *, name: str = "", **options: Any) -> None:
        name, x_label = name or re.sub(r"[^\w/]+", "-", title.lower()), "epoch" if by_epoch else "step"
        plots.append(Plot(name=name, title=title, x_label=x_label, curves=shown, **options))

    loss = curves(_column("loss"))
    knn = curves(_knn("top1"), "top-1" if single else "", of_knn=True)
    if single:
        knn += curves(_knn("top5"), "top-5", 1, of_knn=True)
    filling, note = _filling(runs[0], by_epoch) if single else (None, _note_on_sums(runs))
    if reference is not None and by_epoch:
        loss.append(_reference_curve("expected", reference, reference.loss, runs[0].steps_per_epoch))
        knn.append(_reference_curve("expected top-1", reference, reference.knn_top1, 1.0))
    plot("Loss", loss, note=note, filling_until=filling)
    plot("kNN accuracy", knn, name="knn", unit=" %")
    similarities = [name for name in _LABELS if single and name in runs[0].metrics.metric_names]
    if similarities:
        plot(
            "Positive and negative similarity",
            [curve for style, name in enumerate(similarities) for curve in curves(_column(name), _LABELS[name], style)],
            name="similarity",
            note="Mean cosine similarity of the queries with their positive keys, and with the keys in the queue.",
        )
    names = dict.fromkeys(name for run in runs for name in run.metrics.metric_names if name not in similarities)
    for name in names:
        plot(name.replace("_", " ").capitalize(), curves(_column(name)))
    plot("Gradient norm", curves(_column("gradient_norm")), from_zero=True)
    plot("Learning rate", curves(_column("lr")), from_zero=True)
    plot(
        "Images per second",
        curves(lambda run: run.windows.images_per_s),
        name="throughput",
        from_zero=True,
        note="In each stretch between two log records.",
    )
    plot(
        "Data wait",
        curves(lambda run: 100 * run.windows.wait_fraction),
        unit=" %",
        from_zero=True,
        note="Share of the training time in which the step waited for its batch, in each stretch.",
    )
    return [each for each in plots if not each.is_empty]


def _column(name: str) -> Values:
    return lambda run: run.metrics.column(name)


def _knn(name: str) -> Values:
    return lambda run: np.array([number(getattr(record, name)) for record in run.metrics.knn])


def _reference_curve(label: str, reference: Reference, points: Floats, per_epoch: float) -> Curve:
    x, mean, low, high = points.T
    label = f"{label} ({reference.spread})"
    return Curve(label=label, x=x / per_epoch, y=mean, low=low, high=high, style=0, reference=True)


def _note_on_sums(runs: list[RunRecord]) -> str:
    """That a loss which is a sum cannot be compared with one that has a single term."""
    alone = [run.method_facts.title for run in runs if run.method_facts.num_keys == 1]
    summed = [run for run in runs if run.setting("result.method.loss_reduction") == "sum"]
    sums = [run.method_facts.title for run in summed if run.method_facts.num_keys == 2]
    if not alone or not sums:
        return ""
    return f"{sums[0]}'s loss is the sum over two positives, {alone[0]}'s has one: about twice as high is the same."


def _filling(run: RunRecord, by_epoch: bool) -> tuple[float | None, str]:
    """Until which x the queue fills, and what to say about it."""
    full_at = run.queue_full_at_step
    if full_at is None:
        return None, ""
    where = f" (epoch {full_at / run.steps_per_epoch:.3g})" if by_epoch else ""
    size, batch, keys = run.setting("result.method.queue_size"), f"{run.batch_size:,.0f}", run.keys_per_image
    formula = f"K/B = {size:,}/{batch}" if keys == 1 else f"K/({keys}B) = {size:,}/({keys} × {batch})"
    text = (
        f"While the queue fills, a rising loss is normal: until step {formula} = {full_at:,}{where}, "
        "shaded, random vectors are among its negatives, which are easy to tell from the positives."
    )
    if run.metrics.last_step < full_at:
        text += " This run is not there yet."
    return full_at / run.steps_per_epoch if by_epoch else full_at, text
