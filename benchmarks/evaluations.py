"""Pretrain, then kNN, linear with a grid, fine-tuning on a tenth of the labels, and compare.

Each evaluation is of the trained network and of the one that it began as. `python -m benchmarks.evaluations --help`

Every step is one command, typed as a user would. Written to `--out`: NAME.json (every result, the table of `compare`,
the call of this program, its commands, the environment), NAME.md (margins and table) and NAME.log (what the commands
printed). The program fails if training does not gain at least `--least-margin` points in each evaluation.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.results import RESULTS, Results, made_with
from leoclr_fast.bench.page import markdown_table

EVALUATORS = ("knn", "linear", "finetune")
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
    out: Path = RESULTS
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

    def run(self) -> int:
        """Run everything, write the three files after each run; returns the exit code."""
        with tempfile.TemporaryDirectory() as folder:
            hidden = {self.data: self.data_label or self.data, f"{folder}/": ""}
            results = Results(module="benchmarks.evaluations", name=self.name, out=self.out, hidden=hidden)
            found: list[dict[str, Any]] = []
            runs: list[str] = []
            environment: dict[str, Any] = {}
            for seed in self.seeds:
                for recipe in self.recipes:
                    runs.append(f"{folder}/{recipe}-{seed}")
                    found += self._evaluations(recipe, seed, runs[-1], results)
                    table = results.type_command("compare", *runs)
                    # Of the first run: later ones see that files have changed since the commit, these results.
                    environment = environment or json.loads((Path(runs[0]) / "environment.json").read_text())
                    margins = _margins(found)
                    document = {
                        "data": self.data_label or self.data,
                        "margins": margins,
                        "table": table,
                        "results": found,
                        "commands": [line.removeprefix("$ ") for line in results.log[1:] if line.startswith("$ ")],
                        "environment": environment,
                    }
                    page = self._page(document, results)
                    results.write(document, page)
        print(page)
        return int(any(margin["mean"] < self.least_margin for margin in margins))

    def _evaluations(self, recipe: str, seed: int, run: str, results: Results) -> list[dict[str, Any]]:
        """A run, its evaluations and those of the network it began as."""
        common = ["--data", self.data, "--device", self.device]
        flags = shlex.split(self.pretrain_flags)
        results.type_command("pretrain", recipe, *flags, "--seed", str(seed), "--out", run, *common)
        found = []
        for name in EVALUATORS:
            for untrained in (False, True):
                flags = shlex.split(getattr(self, f"{name}_flags"))
                document = results.type_command(name, run, *flags, *common, *["--untrained"] * untrained)
                one = document["evaluations"][0] if name == "finetune" else document
                found.append({"recipe": recipe, "seed": seed, "evaluator": name, "untrained": untrained, **one})
        return found

    def _page(self, document: dict[str, Any], results: Results) -> str:
        header = ("recipe", "evaluator", "n", "untrained", "trained", "mean gain, points", "least gain")
        rows = [
            (
                margin["recipe"],
                margin["evaluator"],
                str(margin["n"]),
                _values(margin["untrained"]),
                _values(margin["trained"]),
                f"{margin['mean']:+.1f}",
                f"{margin['least']:+.1f}",
            )
            for margin in document["margins"]
        ]
        short = [
            f"{margin['recipe']} {margin['evaluator']}"
            for margin in document["margins"]
            if margin["mean"] < self.least_margin
        ]
        outcome = (
            f"Less than {self.least_margin:g} points gained: {', '.join(short)}"
            if short
            else f"Training gained {self.least_margin:g} points or more in every evaluation."
        )
        compared = results.log[-1].rsplit("\n{", 1)[0].strip()
        return f"""# Evaluations of trained and untrained networks: {document["data"]}

Top-1, percent, on the test split; each column of values has one for each seed.

{markdown_table(header, rows)}
{outcome}

`leoclr-fast compare` over the same runs:

{compared}

`{results.command}`

{made_with(document["environment"])}
A + behind the commit: files had changes before the first run.
The single commands are in the JSON file, their output is in the log.
"""


def _margins(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Top-1 of the trained network less that of the untrained one, over the seeds, for each recipe and evaluator."""
    top1 = {(one["recipe"], one["evaluator"], one["untrained"], one["seed"]): one["top1"] for one in found}
    margins = []
    for recipe, evaluator in dict.fromkeys(key[:2] for key in top1):
        trained, untrained = (
            [value for key, value in top1.items() if key[:3] == (recipe, evaluator, is_untrained)]
            for is_untrained in (False, True)
        )
        gains = [after - before for after, before in zip(trained, untrained, strict=True)]
        margins.append(
            {
                "recipe": recipe,
                "evaluator": evaluator,
                "n": len(gains),
                "mean": sum(gains) / len(gains),
                "least": min(gains),
                "trained": trained,
                "untrained": untrained,
            }
        )
    return margins


def _values(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


if __name__ == "__main__":
    sys.exit(tyro.cli(Evaluations).run())
