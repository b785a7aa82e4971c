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

from benchmarks.results import Results, WritesResults, made_with
from leoclr_fast.bench.page import markdown_table
from leoclr_fast.run.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class KnnGain(WritesResults):
    """kNN before and after pretraining, over recipes and seeds."""

    recipes: tuple[str, ...]
    data: str
    """As in pretrain; `demo` draws the demo data."""
    data_label: str = ""
    """What the result files call the data, where its path should not stand in them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    flags: Annotated[str, tyro.conf.arg(metavar="'FLAGS'")] = ""
    """Further flags of pretrain, in one string."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            data, label = self.data, self.data_label or self.data
            if data == "demo":
                from dataset_tools.demo_data import write_demo_data

                data = str(write_demo_data(Path(folder) / "data"))
            results = self.results({data: label, f"{folder}/": ""})
            runs: list[dict[str, Any]] = []
            for seed in self.seeds:
                for recipe in self.recipes:
                    runs.append(self._one_run(recipe, seed, data, Path(folder) / f"{recipe}-{seed}", results))
                    document = {"data": label, "flags": self.flags, "runs": runs}
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


def page(document: dict[str, Any]) -> str:
    header = ("recipe", "n", "untrained, %", "trained, %", "gain, points", "images/s, median", "seconds, median")
    rows = []
    for recipe in dict.fromkeys(run["recipe"] for run in document["runs"]):
        own = [run for run in document["runs"] if run["recipe"] == recipe]
        untrained, trained = ([run["summary"][name] for run in own] for name in ("knn_top1_untrained", "knn_top1"))
        gains = [after - before for before, after in zip(untrained, trained, strict=True)]
        images_per_s = statistics.median(run["summary"]["images_per_s"] for run in own)
        seconds = statistics.median(run["seconds"] for run in own)
        accuracies = map(_mean_std, (untrained, trained, gains))
        rows.append((recipe, str(len(own)), *accuracies, f"{images_per_s:,.0f}", f"{seconds:,.0f}"))
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


def _mean_std(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    tyro.cli(KnnGain).run()
