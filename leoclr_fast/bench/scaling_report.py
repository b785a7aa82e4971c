"""The result of `bench scaling` as a Markdown page."""

from __future__ import annotations

from typing import Any

from leoclr_fast.bench.tables import markdown_table, number, percent, spread


def scaling_markdown(document: dict[str, Any], command: str | None = None) -> str:
    """The document of `bench_scaling` as a page: setting, notes, measurements, projection."""
    lines = ["# More ranks", "", f"Setting: {document['method']}, {document['header']}.", ""]
    if command:
        lines += [f"`{command}`", ""]
    lines += [f"- {note}" for note in document["notes"]]
    lines += [
        "",
        f"Median [20 %, 80 %] of {document['rounds']} interleaved turns of {document['steps']} steps each. weak: the "
        "batch grows with the ranks; strong: it does not.",
        "",
        markdown_table(
            ("mode", "ranks", "batch", "images/s", "step, ms", "efficiency", "communication", "MB a step"),
            [
                (
                    row["mode"],
                    str(row["ranks"]),
                    str(row["batch_size"]),
                    spread(row["images_per_s"], row["images_per_s_q20"], row["images_per_s_q80"]),
                    spread(row["step_ms"], row["step_ms_q20"], row["step_ms_q80"]),
                    percent(row["efficiency"]),
                    percent(row["communication_share"]),
                    number(sum(row["bytes_counted"].values()) / 1e6, 2),
                )
                for row in document["rows"]
            ],
        ),
        _projection(document["projection"]),
    ]
    return "\n".join(lines)


def _projection(projection: dict[str, Any]) -> str:
    if "refused" in projection:
        return f"No projection: {projection['refused']}.\n"
    values = projection["coefficients"]
    bandwidth = number(values["bandwidth_gb_per_s"], 2, missing="without a bound that was seen")
    lines = [
        f"Projection, not measured, from {projection['points']} points: {projection['formula']}.",
        "",
        f"fixed {number(values['fixed_ms'], 2)} ms, per image {number(values['per_image_ms'], 3)} ms, latency "
        f"{number(values['latency_ms'], 3)} ms, bandwidth {bandwidth} GB/s; the model misses the measured points by up "
        f"to {percent(values['worst_error'])}.",
        "",
        markdown_table(
            ("mode", "ranks", "batch", "images/s, projected", "step, ms, projected"),
            [
                (
                    row["mode"],
                    str(row["ranks"]),
                    str(row["batch_size"]),
                    number(row["images_per_s"]),
                    number(row["step_ms"]),
                )
                for row in projection["rows"]
            ],
        ),
    ]
    lines += [f"- left out: {line}" for line in projection["left_out"]]
    return "\n".join(lines)
