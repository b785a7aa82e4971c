"""The result of `bench train-time` for people: a Markdown page and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leoclr_fast.bench.tables import markdown_table, number, percent, spread
from leoclr_fast.run.bottleneck import find_bottleneck

_PLOT_FORMATS = (".svg", ".png", ".pdf")
_NAMES = {"leoclr": "LeOCLR", "mocov2": "MoCo-v2, ours"}


def train_time_markdown(document: dict[str, Any], command: str | None = None) -> str:
    """The document of `bench_train_time` as a page: setting, notes, measurements, ratios, projection."""
    lines = ["# LeOCLR next to MoCo-v2: training time", "", f"Setting: {document['header']}.", ""]
    if command:
        lines += [f"`{command}`", ""]
    lines += [f"- {note}" for note in document["notes"]]
    if document["gpu_after"] is not None:
        gpu = document["gpu_after"]
        lines.append(
            f"- {gpu['name']}, driver {gpu['driver']}, SM clock {gpu['sm_clock_mhz']} of {gpu['max_sm_clock_mhz']} MHz "
            f"and {gpu['temperature_c']} °C right after the last step, power limit {gpu['power_limit_w']} W"
        )
    rows = document["rows"]
    turns, steps = len(rows[0]["turns_step_ms"]), document["turns"]["steps"]
    lines += ["", f"Median [20 %, 80 %] of {turns} interleaved turns of {steps} steps each.", ""]
    table = markdown_table(
        (
            "method", "data", "images/s", "step, ms", "MFU", "data wait", "peak memory, GiB",
            "kWh per million images",
        ),
        [
            (
                shown(row["method"]),
                row["data"],
                spread(row["images_per_s"], row["images_per_s_q20"], row["images_per_s_q80"]),
                spread(row["step_ms"], row["step_ms_q20"], row["step_ms_q80"]),
                percent(row["mfu"]),
                percent(row["data_wait_fraction"]),
                number(row["peak_memory_gib"]),
                number(row["energy_per_million_images_kwh"], 2),
            )
            for row in rows
        ],
    )  # fmt: skip
    lines += [table]
    lines += [f"- {line}" for line in (*ratio_lines(document), *bottleneck_lines(document))]
    lines += ["", _projection(document["projection"])]
    return "\n".join(lines)


def ratio_lines(document: dict[str, Any]) -> list[str]:
    """The ratios as sentences, with their intervals."""
    lines = []
    for data in ("synthetic", "real"):
        ratio = document[f"ratio_{data}"]
        if ratio is not None:
            lines.append(f"step time LeOCLR / MoCo-v2, {data} images: {_interval(ratio)}")
        for peer, speedup in document["speedups"].get(data, {}).items():
            if speedup is not None:
                lines.append(f"our MoCo-v2 over {peer}, {data} images: {_interval(speedup)} times as fast")
    return lines


def bottleneck_lines(document: dict[str, Any]) -> list[str]:
    """What our methods waited for with real images, as sentences."""
    rates = {(row["method"], row["data"]): row["images_per_s"] for row in document["rows"]}
    lines = []
    for row in document["rows"]:
        if row["data"] != "real" or row["method"] not in _NAMES:
            continue
        found = find_bottleneck(
            row["data_wait_fraction"],
            loader=row["loader"],
            on_cpu=document["environment"]["device"] == "cpu",
            real_images_per_s=row["images_per_s"],
            synthetic_images_per_s=rates.get((row["method"], "synthetic")),
        )
        if found is not None:
            lines.append(f"{shown(row['method'])}, real images: {found}")
    return lines


def shown(method: str) -> str:
    """A contestant's name, for people."""
    return _NAMES.get(method, method)


def plot_train_time(document: dict[str, Any], path: Path) -> None:
    """Bars of images/s with their 20 % and 80 % quantiles, as SVG, PNG or PDF by the suffix of `path`.

    Raises ValueError for another suffix, or where the file cannot be written.
    """
    require_plot_format(path)
    from matplotlib.figure import Figure

    rows = document["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(1.5 + 1.6 * len(methods), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for place, kind in enumerate(kinds):
        for row in (row for row in rows if row["data"] == kind):
            x = methods.index(row["method"]) + (place - (len(kinds) - 1) / 2) * width
            errors = [
                [row["images_per_s"] - row["images_per_s_q20"]],
                [row["images_per_s_q80"] - row["images_per_s"]],
            ]
            label = f"{kind} images" if row["method"] == methods[0] else None
            axes.bar(x, row["images_per_s"], 0.92 * width, yerr=errors, capsize=3, color=f"C{place}", label=label)
    axes.set_xticks(range(len(methods)), [shown(method) for method in methods])
    axes.set_ylabel("images/s")
    axes.set_title(document["header"], fontsize=7, wrap=True)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def require_plot_format(path: Path) -> None:
    """Raises ValueError for a file name that says no format we draw in."""
    if path.suffix.lower() not in _PLOT_FORMATS:
        raise ValueError(
            f"a plot cannot be written as {path.name}: give a name that ends in {', '.join(_PLOT_FORMATS)}"
        )


def _projection(projection: dict[str, Any]) -> str:
    table = markdown_table(
        ("method", "data", "hours", "GPU hours", "kWh", "cost"),
        [
            (
                shown(row["method"]),
                row["data"],
                number(row["hours"]),
                number(row["gpu_hours"]),
                number(row["energy_kwh"]),
                number(row["cost"], 2),
            )
            for row in projection["rows"]
        ],
    )
    return (
        f"Projection, not a measurement: {projection['epochs']} epochs of {projection['images']:,} images on "
        f"{projection['gpus']} such devices. Formula: {projection['formula']}.\n\n{table}"
    )


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} (95 % interval {ratio['low']:.3f} to {ratio['high']:.3f})"
