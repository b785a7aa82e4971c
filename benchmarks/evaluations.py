"""Pretrain, then kNN, linear with a grid, fine-tuning on a tenth of the labels, and compare.

Each evaluation is of the trained network and of the one that it began as. `python -m benchmarks.evaluations --help`

Every step is one command, typed as a user would. Written to `--out`: NAME.json (every result, the table of `compare`,
the call of this program, its commands, the environment), NAME.md (margins and table) and NAME.log (what the commands
printed). The program fails if training does not gain at least `--least-margin` points in each evaluation.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

_Flags = Annotated[str, tyro.conf.arg(metavar="'FLAGS'")]


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """Every evaluator on pretrained and on untrained networks, over recipes and seeds."""

    name: str
    """Of the result files."""
    data: str
    """As in pretrain."""
    data_label: str = ""
    """What the result files call the data, where its path should not stand in them."""
    recipes: tuple[str, ...] = ("leoclr_cifar10", "mocov2_cifar10")
    seeds: tuple[int, ...] = (0,)
    out: Path = Path("benchmarks/results")
    pretrain_flags: _Flags = (
        "--backbone.width-multiplier 0.125 --max-images 5000 --epochs 12 --batch-size 128 --optimizer.base-lr 0.12 "
        "--method.loss-reduction mean --monitor.knn-every-epochs 0"
    )
    """Further flags of pretrain, in one string; so for the others."""
    knn_flags: _Flags = "--max-images 5000"
    linear_flags: _Flags = "--lr-grid 0.01 0.03 0.1 0.3 1 3 --epochs 15 --batch-size 64 --max-images 5000"
    finetune_flags: _Flags = "--percent 10 --batch-size 32 --base-lr-grid 0.2 0.8 --max-images 5000"
    """The learning rates of these defaults were tried before, on seed 0."""
    device: str = "cpu"
    least_margin: float = 2.0
    """Points that training must gain in each evaluation, in the mean over the seeds."""
    log: tyro.conf.Suppress[list[str]] = field(default_factory=list)
    results: tyro.conf.Suppress[list[dict[str, Any]]] = field(default_factory=list)

    def run(self) -> int:
        """Run everything, write the three files; returns the exit code."""
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.log.append(f"$ {self._call(Path(folder))}")
            runs: list[Path] = []
            environment: dict[str, Any] = {}
            for seed in self.seeds:
                for recipe in self.recipes:
                    run = Path(folder) / f"{recipe}-{seed}"
                    self._evaluate(recipe, seed, run)
                    runs.append(run)
                    table = self._command(["compare", *map(str, runs)], run.parent)
                    # Of the first run: later ones see that files have changed since the commit, these results.
                    environment = environment or json.loads((run / "environment.json").read_text())
                    margins = self._write(table, environment)
        print((self.out / f"{self.name}.md").read_text())
        return 0 if all(margin["mean"] >= self.least_margin for margin in margins) else 1

    def _evaluate(self, recipe: str, seed: int, run: Path) -> None:
        """A run, its evaluations and those of the network it began as."""
        common = ["--data", self.data, "--device", self.device]
        pretrain = ["pretrain", recipe, *shlex.split(self.pretrain_flags), "--seed", str(seed), "--out", str(run)]
        self._command([*pretrain, *common], run.parent)
        for name in ("knn", "linear", "finetune"):
            for untrained in (False, True):
                flags = shlex.split(getattr(self, f"{name}_flags"))
                document = self._command([name, str(run), *flags, *common, *["--untrained"] * untrained], run.parent)
                found = document["evaluations"][0] if name == "finetune" else document
                self.results.append(
                    {"recipe": recipe, "seed": seed, "evaluator": name, "untrained": untrained, **found}
                )

    def _command(self, arguments: list[str], folder: Path) -> dict[str, Any]:
        """One command and what it returned as JSON; its output goes to the log."""
        shown = self._shown(shlex.join(["leoclr-fast", *arguments, "--json"]), folder)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "leoclr_fast", *arguments, "--json"], capture_output=True, text=True, check=False
        )
        print(f"{shown}: {time.perf_counter() - start:.0f} s", flush=True)
        self.log.extend([f"$ {shown}", self._shown(done.stdout + done.stderr, folder)])
        (self.out / f"{self.name}.log").write_text("\n".join(self.log) + "\n")
        if done.returncode:
            raise RuntimeError(f"{shown} failed:\n{done.stdout}{done.stderr}")
        document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return document

    def _call(self, folder: Path) -> str:
        """How this program was called."""
        return self._shown(shlex.join(["python", "-m", "benchmarks.evaluations", *sys.argv[1:]]), folder)

    def _shown(self, text: str, folder: Path) -> str:
        """Without the paths of this machine."""
        if self.data_label:
            text = text.replace(self.data, self.data_label)
        return text.replace(f"{folder}/", "").replace(str(Path.home()), "~")

    def _write(self, table: dict[str, Any], environment: dict[str, Any]) -> list[dict[str, Any]]:
        """All that is finished, after every run: hours are not lost to a late failure."""
        margins = self._margins()
        folder = Path(table["columns"][0]["runs"][0]).parent
        document = {
            "command": self._call(folder),
            "data": self.data_label or self.data,
            "margins": margins,
            "table": table,
            "results": self.results,
            "commands": [line.removeprefix("$ ") for line in self.log[1:] if line.startswith("$ ")],
            "environment": environment,
        }
        text = json.dumps(document, indent=1)
        (self.out / f"{self.name}.json").write_text(self._shown(text, folder) + "\n")
        (self.out / f"{self.name}.md").write_text(self._shown(self._markdown(document), folder))
        return margins

    def _margins(self) -> list[dict[str, Any]]:
        """Top-1 of the trained network less that of the untrained one, over the seeds."""
        margins = []
        for recipe in self.recipes:
            for name in ("knn", "linear", "finetune"):
                own = [one for one in self.results if (one["recipe"], one["evaluator"]) == (recipe, name)]
                top1 = {(one["seed"], one["untrained"]): one["top1"] for one in own}
                gains = [top1[seed, False] - top1[seed, True] for seed, untrained in top1 if untrained]
                if gains:
                    margins.append(
                        {
                            "recipe": recipe,
                            "evaluator": name,
                            "n": len(gains),
                            "mean": sum(gains) / len(gains),
                            "least": min(gains),
                            "trained": [top1[seed, False] for seed, untrained in top1 if untrained],
                            "untrained": [top1[seed, True] for seed, untrained in top1 if untrained],
                        }
                    )
        return margins

    def _markdown(self, document: dict[str, Any]) -> str:
        environment = document["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        rows = "\n".join(
            f"| {margin['recipe']} | {margin['evaluator']} | {margin['n']} | {_values(margin['untrained'])} "
            f"| {_values(margin['trained'])} | {margin['mean']:+.1f} | {margin['least']:+.1f} |"
            for margin in document["margins"]
        )
        short = [margin for margin in document["margins"] if margin["mean"] < self.least_margin]
        verdict = (
            f"Less than {self.least_margin:g} points gained: "
            + ", ".join(f"{margin['recipe']} {margin['evaluator']}" for margin in short)
            if short
            else f"Training gained {self.least_margin:g} points or more in every evaluation."
        )
        printed = self.log[-1].rsplit("\n{", 1)[0].strip()
        return f"""# Evaluations of trained and untrained networks: {document["data"]}

Top-1, percent, on the test split; each column of values has one for each seed.

| recipe | evaluator | n | untrained | trained | mean gain, points | least gain |
|---|---|---|---|---|---|---|
{rows}

{verdict}

`leoclr-fast compare` over the same runs:

{printed}

`{document["command"]}`

{environment["cpu"]}, {environment["torch_threads"]} threads, device {environment["device"]}; Python
{environment["python"]}, {versions}; commit {environment["git_commit"]}.
A + behind the commit: files had changes before the first run.
The single commands are in the JSON file, their output is in the log.
"""


def _values(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


if __name__ == "__main__":
    sys.exit(tyro.cli(Evaluations).run())
