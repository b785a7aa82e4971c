"""The expected curves that reports draw, out of our committed logs: `python -m benchmarks.reference_curves`.

Reads `benchmarks/results/*.json` as `benchmarks.knn_gain` wrote them and writes
`leoclr_fast/report/reference_curves.json`, which the package ships. A test holds that file to the results.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from leoclr_fast.cli import parse_command
from leoclr_fast.commands.pretrain import Pretrain
from leoclr_fast.config_file import as_plain
from leoclr_fast.report.reference import REFERENCE_FILE, comparable_settings

ROOT = Path(__file__).parents[1]
RESULTS = ("benchmarks/results/demo_cpu.json", "benchmarks/results/cifar10_cpu.json")


def reference_curves() -> list[dict[str, Any]]:
    """One entry for each recipe of each result file: settings, source, and the curves' mean, lowest and highest."""
    return [
        _curve(result, document, recipe)
        for result in RESULTS
        for document in [json.loads((ROOT / result).read_text())]
        for recipe in dict.fromkeys(run["recipe"] for run in document["runs"])
    ]


def write() -> None:
    lines = ",\n".join(json.dumps(entry) for entry in reference_curves())
    REFERENCE_FILE.write_text(f"[\n{lines}\n]\n")


def _curve(result: str, document: dict[str, Any], recipe: str) -> dict[str, Any]:
    runs = [run for run in document["runs"] if run["recipe"] == recipe]
    command = parse_command(shlex.split(runs[0]["command"])[1:])
    assert isinstance(command, Pretrain)
    log = (ROOT / result).with_suffix(".log").read_text()
    (headline,) = {line for line in log.splitlines() if line.startswith(f"{recipe}: ") and " images of " in line}
    return {
        "recipe": recipe,
        "source": result,
        "commits": sorted({run["environment"]["git_commit"] for run in runs}),
        "commands": [run["command"] for run in runs],
        "data": document["data"],
        "images": int(re.search(r"([\d,]+) images", headline)[1].replace(",", "")),  # type: ignore[index]
        "world_size": runs[0]["environment"]["world_size"],
        "seeds": [run["seed"] for run in runs],
        "settings": comparable_settings(as_plain(command.result)),
        "knn_top1": _spread([run["knn"] for run in runs]),
        "loss": _spread([_logged_losses(log, run["command"]) for run in runs]),
    }


def _logged_losses(log: str, command: str) -> list[list[float]]:
    """[step, loss] of every step line that the log holds of a run; three decimals, as it was printed."""
    printed = log.split(f"$ {command}\n", 1)[1].split("\n$ ", 1)[0]
    return [[int(step), float(loss)] for step, loss in re.findall(r"^step (\d+)/.*  loss ([\d.]+)  ", printed, re.M)]


def _spread(curves: list[list[list[float]]]) -> list[list[float]]:
    """[x, mean, lowest, highest] of curves that share their x."""
    rows = []
    for points in zip(*curves, strict=True):
        (x,) = {point[0] for point in points}
        values = [point[1] for point in points]
        rows.append([x, sum(values) / len(values), min(values), max(values)])
    return rows


if __name__ == "__main__":
    write()
