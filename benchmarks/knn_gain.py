"""kNN before and after pretraining, over recipes and seeds: `python -m benchmarks.knn_gain --help`.

Each run is one `leoclr-fast pretrain`, typed as a user would. Written to `--out`: NAME.json (every run's summary and
kNN curve, the command, the environment), NAME.md (the table) and NAME.log (what the runs printed).
"""

from __future__ import annotations

import json
import shlex
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.results import RESULTS, Results, made_with
from leoclr_fast.bench.page import markdown_table
from leoclr_fast.run.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class KnnGain:
    """kNN before and after pretraining, over recipes and seeds."""

    name: str
    """Of the result files."""
    recipes: tuple[str, ...]
    data: str
    """As in pretrain; `demo` draws the demo data."""
    data_label: str = ""
    """What the result files call the data, where its path should not stand in them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = RESULTS
    flags: Annotated[str, tyro.conf.arg(metavar="'FLAGS'")] = ""
    """Further flags of pretrain, in one string."""

    def run(self) -> None:
        """Run everything and write the three files."""
        with tempfile.TemporaryDirectory() as folder:
            data, label = self.data, self.data_label or self.data
            if data == "demo":
                from dataset_tools.demo_data import write_demo_data

                data = str(write_demo_data(Path(folder) / "data"))
            hidden = {data: label, f"{folder}/": ""}
            results = Results(module="benchmarks.knn_gain", name=self.name, out=self.out, hidden=hidden)
            runs: list[dict[str, Any]] = []
            for seed in self.seeds:
                for recipe in self.recipes:
                    runs.append(self._one_run(recipe, seed, data, Path(folder) / f"{recipe}-{seed}", results))
                    document = {"data": label, "flags": self.flags, "runs": runs, "summary": _summary(runs)}
                    results.write(document, page(document))
        print(page(document))

    def _one_run(self, recipe: str, seed: int, data: str, run: Path, results: Results) -> dict[str, Any]:
        start = time.perf_counter()
        flags = [*shlex.split(self.flags), "--seed", str(seed), "--data", data, "--out", str(run)]
        summary = results.type_command("pretrain", recipe, *flags)
        folder = RunFolder(run)
        return {
            "command": results.log[-2].removeprefix("$ "),
            "recipe": recipe,
            "seed": seed,
            "seconds": time.perf_counter() - start,
            "summary": summary,
            "knn": [[record["epoch"], record["top1"]] for record in folder.read_metrics("knn")],
            "loss": [[record["step"], record["loss"]] for record in folder.read_metrics("step")][::10],
            "environment": json.loads(folder.environment_file.read_text()),
        }


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rows = {}
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        own = [run["summary"] for run in runs if run["recipe"] == recipe]
        rows[recipe] = {
            "n": len(own),
            "untrained": _mean_std([one["knn_top1_untrained"] for one in own]),
            "trained": _mean_std([one["knn_top1"] for one in own]),
            "gain": _mean_std([one["knn_top1"] - one["knn_top1_untrained"] for one in own]),
            "images_per_s": statistics.median(one["images_per_s"] for one in own),
            "seconds": statistics.median(run["seconds"] for run in runs if run["recipe"] == recipe),
        }
    return rows


def _mean_std(values: Sequence[float]) -> list[float | None]:
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]


def page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    header = ("recipe", "n", "untrained, %", "trained, %", "gain, points", "images/s, median", "seconds, median")
    rows = [
        (
            recipe,
            str(row["n"]),
            *(_cell(row[name]) for name in ("untrained", "trained", "gain")),
            f"{row['images_per_s']:,.0f}",
            f"{row['seconds']:,.0f}",
        )
        for recipe, row in document["summary"].items()
    ]
    curves = [
        f"- {run['recipe']}, seed {run['seed']}: "
        + ", ".join(f"{top1:.1f} (epoch {epoch:g})" for epoch, top1 in run["knn"])
        for run in document["runs"]
    ]
    return "\n".join(
        [
            f"# kNN top-1 before and after pretraining: {document['data']}\n",
            markdown_table(header, rows),
            f"Mean ± standard deviation over n seeds. Flags: `{document['flags'] or 'none'}`. kNN curves:\n",
            *curves,
            f"\n{made_with(document['runs'][0]['environment'])}",
            "Commands in the JSON file, output in the log beside this file.\n",
        ]
    )


def _cell(mean_std: Sequence[float | None]) -> str:
    mean, std = mean_std
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


if __name__ == "__main__":
    tyro.cli(KnnGain).run()
