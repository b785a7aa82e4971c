"""kNN before and after pretraining, over recipes and seeds: `python -m benchmarks.knn_gain --help`.

Each run is one `leoclr-fast pretrain`, typed as a user would. Written to `--out`: NAME.json (every run's summary and
kNN curve, the command, the environment), NAME.md (the table) and NAME.log (what the runs printed).
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

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
    out: Path = Path("benchmarks/results")
    flags: Annotated[str, tyro.conf.arg(metavar="'FLAGS'")] = ""
    """Further flags of pretrain, in one string."""

    def run(self) -> None:
        """Run everything and write the three files."""
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            data = self.data
            if data == "demo":
                from dataset_tools.demo_data import write_demo_data

                data = str(write_demo_data(Path(folder) / "data"))
            label = self.data_label or self.data
            log: list[str] = []
            runs: list[dict[str, Any]] = []
            for seed in self.seeds:
                for recipe in self.recipes:
                    runs.append(self._one_run(recipe, seed, data, label, Path(folder) / f"{recipe}-{seed}", log))
                    self._write(label, runs, log)
        print((self.out / f"{self.name}.md").read_text())

    def _write(self, label: str, runs: list[dict[str, Any]], log: list[str]) -> None:
        """All that is finished, after every run: hours are not lost to a late failure."""
        document = {"data": label, "flags": self.flags, "runs": runs, "summary": self._summary(runs)}
        (self.out / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n")
        (self.out / f"{self.name}.md").write_text(_markdown(document))
        (self.out / f"{self.name}.log").write_text("\n".join(log) + "\n")

    def _one_run(self, recipe: str, seed: int, data: str, label: str, run: Path, log: list[str]) -> dict[str, Any]:
        program = [sys.executable, "-m", "leoclr_fast"]
        arguments = ["pretrain", recipe, *shlex.split(self.flags), "--seed", str(seed), "--data"]
        shown = shlex.join(["leoclr-fast", *arguments, label, "--out", run.name, "--json"])
        start = time.perf_counter()
        done = subprocess.run(
            [*program, *arguments, data, "--out", str(run), "--json"], capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start
        output = (done.stdout + done.stderr).replace(data, label).replace(f"{run.parent}/", "")
        output = output.replace(str(Path.home()), "~")
        log += [f"$ {shown}", output]
        print(f"{shown}: {seconds:.0f} s", flush=True)
        if done.returncode:
            raise RuntimeError(f"{shown} failed:\n{output}")
        summary = json.loads(done.stdout.splitlines()[-1])
        folder = RunFolder(run)
        return {
            "command": shown,
            "recipe": recipe,
            "seed": seed,
            "seconds": seconds,
            "summary": summary | {"run": run.name},
            "knn": [[record["epoch"], record["top1"]] for record in folder.read_metrics("knn")],
            "loss": [[record["step"], record["loss"]] for record in folder.read_metrics("step")][::10],
            "environment": json.loads((run / "environment.json").read_text()),
        }

    def _summary(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = {}
        for recipe in dict.fromkeys(run["recipe"] for run in runs):
            own = [run["summary"] for run in runs if run["recipe"] == recipe]
            gains = [one["knn_top1"] - one["knn_top1_untrained"] for one in own]
            rows[recipe] = {
                "n": len(own),
                "untrained": _mean_std([one["knn_top1_untrained"] for one in own]),
                "trained": _mean_std([one["knn_top1"] for one in own]),
                "gain": _mean_std(gains),
                "images_per_s": statistics.median(one["images_per_s"] for one in own),
                "seconds": statistics.median(run["seconds"] for run in runs if run["recipe"] == recipe),
            }
        return rows


def _mean_std(values: list[float]) -> list[float | None]:
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]


def _markdown(document: dict[str, Any]) -> str:
    environment = document["runs"][0]["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    curves = "\n".join(
        f"- {run['recipe']}, seed {run['seed']}: "
        + ", ".join(f"{top1:.1f} (epoch {epoch:g})" for epoch, top1 in run["knn"])
        for run in document["runs"]
    )
    rows = "\n".join(
        f"| {recipe} | {row['n']} | {_cell(row['untrained'])} | {_cell(row['trained'])} | {_cell(row['gain'])} "
        f"| {row['images_per_s']:,.0f} | {row['seconds']:,.0f} |"
        for recipe, row in document["summary"].items()
    )
    return f"""# kNN top-1 before and after pretraining: {document["data"]}

| recipe | n | untrained, % | trained, % | gain, points | images/s, median | seconds, median |
|---|---|---|---|---|---|---|
{rows}

Mean ± standard deviation over n seeds. Flags: `{document["flags"] or "none"}`. kNN curves:

{curves}

{environment["cpu"]}, {environment["torch_threads"]} threads, device {environment["device"]}; Python
{environment["python"]}, {versions}; commit {environment["git_commit"]}.
Commands in the JSON file, output in the log beside this file.
"""


def _cell(mean_std: list[float | None]) -> str:
    mean, std = mean_std
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


if __name__ == "__main__":
    tyro.cli(KnnGain).run()
