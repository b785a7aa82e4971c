"""Which curves a report draws, out of one run or several."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from leoclr_fast.report.metrics_file import Floats
from leoclr_fast.report.plots import Curve, Plot
from leoclr_fast.report.reference import Reference
from leoclr_fast.report.run_record import RunRecord
from leoclr_fast.report.values import number

_FROM_ZERO = ("gradient-norm", "learning-rate", "throughput", "data-wait")

Column = Callable[[RunRecord], Floats]


def plots_of(runs: list[RunRecord], labels: list[str], reference: Reference | None) -> list[Plot]:
    """Loss, kNN, similarities, gradient norm, learning rate, images/s and data wait; the reference only with one run.

    x is the epoch, or the step where a run does not tell how long its epochs are. Plots without a value are left out.
    """
    by_epoch = all(math.isfinite(run.steps_per_epoch) for run in runs)
    single = len(runs) == 1
    x_label = "epoch" if by_epoch else "step"

    def x_of(run: RunRecord, steps: Floats) -> Floats:
        return steps / run.steps_per_epoch if by_epoch else steps

    def curves(value: Column) -> list[Curve]:
        return [
            Curve(label=label, x=x_of(run, run.metrics.column("step")), y=value(run), style=style)
            for style, (run, label) in enumerate(zip(runs, labels, strict=True))
        ]

    def plot(
        name: str, title: str, shown: list[Curve], unit: str = "", note: str = "", filling: float | None = None
    ) -> Plot:
        return Plot(
            name=name,
            title=title,
            x_label=x_label,
            curves=shown,
            unit=unit,
            note=note,
            filling_until=filling,
            from_zero=name in _FROM_ZERO,
        )

    def named(name: str, text: str, style: int) -> list[Curve]:
        (curve,) = curves(lambda run: run.metrics.column(name))
        return [Curve(label=text, x=curve.x, y=curve.y, style=style)]

    loss = curves(lambda run: run.metrics.column("loss"))
    knn = _knn_curves(runs, labels, by_epoch, single)
    filling, note = None, ""
    if single:
        filling, note = _filling(runs[0], by_epoch)
        if reference is not None and by_epoch:
            loss.append(_reference_curve("expected", reference, reference.loss, runs[0].steps_per_epoch))
            knn.append(_reference_curve("expected top-1", reference, reference.knn_top1, 1.0))
    if not single and {run.method for run in runs} >= {"leoclr", "mocov2"}:
        sums = [run for run in runs if run.method == "leoclr" and run.setting("result.method.loss_reduction") == "sum"]
        if sums:
            note = "LeOCLR's loss is the sum over two positives, MoCo-v2's has one: about twice as high is the same."
    if single:
        similarities = [
            plot(
                "similarity",
                "Positive and negative similarity",
                named("positive_similarity", "query and its positives", 0)
                + named("negative_similarity", "query and negatives", 1),
                note="Mean cosine similarity of the queries with their positive keys, and with the keys in the queue.",
            )
        ]
    else:
        similarities = [
            plot(f"{kind}-similarity", f"{kind.capitalize()} similarity", curves(_column(f"{kind}_similarity")))
            for kind in ("positive", "negative")
        ]
    candidates = [
        plot("loss", "Loss", loss, note=note, filling=filling),
        plot("knn", "kNN accuracy", knn, " %"),
        *similarities,
        plot("gradient-norm", "Gradient norm", curves(_column("gradient_norm"))),
        plot("learning-rate", "Learning rate", curves(_column("lr"))),
        plot("throughput", "Images per second", curves(_window_rate), note="In each stretch between two log records."),
        plot(
            "data-wait",
            "Data wait",
            curves(lambda run: 100 * run.window_wait_fraction),
            " %",
            note="Share of the training time in which the step waited for its batch, in each stretch.",
        ),
    ]
    return [each for each in candidates if not each.is_empty]


def _column(name: str) -> Column:
    return lambda run: run.metrics.column(name)


def _window_rate(run: RunRecord) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return run.window_images / run.window_seconds


def _knn_curves(runs: list[RunRecord], labels: list[str], by_epoch: bool, single: bool) -> list[Curve]:
    curves = []
    for style, (run, label) in enumerate(zip(runs, labels, strict=True)):
        x = np.array([number(record.get("step")) for record in run.metrics.knn])
        x = x / run.steps_per_epoch if by_epoch else x
        for key, name in (("top1", "top-1"), ("top5", "top-5")) if single else (("top1", "top-1"),):
            curves.append(
                Curve(
                    label=name if single else label,
                    x=x,
                    y=np.array([number(record.get(key)) for record in run.metrics.knn]),
                    style=style + (key == "top5"),
                    markers=True,
                )
            )
    return curves


def _reference_curve(label: str, reference: Reference, points: Floats, per_epoch: float) -> Curve:
    return Curve(
        label=f"{label} ({reference.spread})",
        x=points[:, 0] / per_epoch,
        y=points[:, 1],
        low=points[:, 2],
        high=points[:, 3],
        style=0,
        reference=True,
    )


def _filling(run: RunRecord, by_epoch: bool) -> tuple[float | None, str]:
    """Until which x the queue fills, and what to say about it."""
    full_at = run.queue_full_at_step
    if full_at is None:
        return None, ""
    where = f" (epoch {full_at / run.steps_per_epoch:.3g})" if by_epoch else ""
    size, batch = run.setting("result.method.queue_size"), run.setting("result.batch_size")
    text = (
        f"While the queue fills, a rising loss is normal: until step K/B = {size:,}/{batch:,} = {full_at:,}{where}, "
        "shaded, random vectors are among its negatives, which are easy to tell from the positives."
    )
    if run.setting("result.method.enqueue") == "all" and run.method == "leoclr":
        text = text.replace(f"K/B = {size:,}/{batch:,}", f"K/(2B) = {size:,}/(2 × {batch:,})")
    if run.metrics.last_step < full_at:
        text += " This run is not there yet."
    return full_at / run.steps_per_epoch if by_epoch else full_at, text
