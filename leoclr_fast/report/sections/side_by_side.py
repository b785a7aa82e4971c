"""Several runs in a table, and LeOCLR against MoCo-v2 in pairs."""

from __future__ import annotations

import math
import statistics

from leoclr_fast.report.comparison import (
    Pair,
    Ratio,
    find_pairs,
    speed_range,
)
from leoclr_fast.report.elements import Content, element, table
from leoclr_fast.report.run_record import RunRecord, duration
from leoclr_fast.report.values import figure_of

_UNEVEN = 1.5


def side_by_side(runs: list[RunRecord], labels: list[str]) -> Content:
    """The section, of two runs or more."""
    energy = any(math.isfinite(run.energy_kwh) for run in runs)
    head: list[Content] = [
        "run",
        "method",
        "recipe",
        "seed",
        "epochs",
        "kNN top-1",
        "time",
        "training images/s",
        "data wait",
    ]
    rows: list[list[Content]] = []
    for run, label in zip(runs, labels, strict=True):
        seed = run.setting("result.seed", "?")
        cells: list[Content] = [label, run.method_title, run.recipe, str(seed), figure_of(run.epochs_done, ".4g")]
        cells += [
            figure_of(run.knn_top1, ".2f", " %"),
            duration(run.wall_s if math.isfinite(run.wall_s) else run.training_s),
            figure_of(run.images_per_s, ",.1f"),
            figure_of(100 * run.data_wait_fraction, ".1f", " %"),
        ]
        rows.append([*cells, figure_of(run.energy_kwh, ".3g")] if energy else cells)
    parts: list[Content] = [table([*head, "kWh"] if energy else head, rows, "Each run")]
    pairs = find_pairs(runs)
    names = {id(run): label for run, label in zip(runs, labels, strict=True)}
    if pairs:
        parts.append(_pairs(pairs, names))
    elif len({run.recipe for run in runs}) > 1:
        parts.append(element("p", "These runs are of different recipes, and not one of each method: read with care."))
    return parts


def _pairs(pairs: list[Pair], names: dict[int, str]) -> Content:
    rows = []
    for pair in pairs:
        others = ", ".join(pair.differences) if pair.differences else "nothing"
        rows.append(
            [
                names[id(pair.leoclr)],
                names[id(pair.mocov2)],
                figure_of(pair.gain, "+.2f", " points"),
                _ratio(pair.time_ratio),
                others,
            ]
        )
    head = ["LeOCLR", "MoCo-v2", "kNN top-1, difference", "time per image, ratio", "what else differs"]
    gains = [pair.gain for pair in pairs if math.isfinite(pair.gain)]
    over = (
        f"Over {len(gains)} pairs the difference is {statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f} "
        "points (mean ± standard deviation)."
        if len(gains) > 1
        else "One pair says nothing about chance: give several seeds of each."
    )
    return [
        table(head, rows, "LeOCLR against MoCo-v2"),
        element("p", over),
        [
            element("p", warning)
            for run in dict.fromkeys(run for pair in pairs for run in (pair.leoclr, pair.mocov2))
            if (warning := _uneven(run, names[id(run)]))
        ],
        element(
            "p",
            "Ratio: how many times as long LeOCLR trains on an image. In brackets a 95 % bootstrap interval over the "
            "stretches between two log records: how unevenly the two runs went, and whatever else their machine did.",
            class_="soft",
        ),
    ]


def _uneven(run: RunRecord, label: str) -> str | None:
    """A warning where the speed of a run changed so much that its mean says little."""
    slow, fast = speed_range(run)
    if not fast > _UNEVEN * slow:
        return None
    return (
        f"The speed of {label} varied: a fifth of its stretches ran below {slow:,.0f} images/s, a fifth above "
        f"{fast:,.0f}. Something else used the machine, or the data came unevenly: do not take the ratio for one of "
        "the methods."
    )


def _ratio(ratio: Ratio) -> str:
    if not math.isfinite(ratio.value):
        return "unknown"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f} (no interval: {min(ratio.windows)} stretches are too few)"
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
