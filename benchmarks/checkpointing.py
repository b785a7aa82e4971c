"""What a checkpoint every 50 steps costs: `python -m benchmarks.checkpointing --help`.

One process trains on synthetic batches, in rounds of 50 steps: with a checkpoint at their start, whose writing beside
the steps is waited for at their end, and without. Exit code 1 if the median cost is 2 % or more.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.results import WritesResults, made_with
from leoclr_fast.bench.config import BenchSetting
from leoclr_fast.bench.page import bench_page, markdown_table, percent, spread
from leoclr_fast.bench.rounds import SYNTHETIC, OurMethod, open_batches, training_images
from leoclr_fast.bench.setting import setting_header
from leoclr_fast.bench.statistics import median_interval, quantiles, ratio_interval
from leoclr_fast.bench.timing import Say, interleaved, synchronize
from leoclr_fast.config import SpeedConfig
from leoclr_fast.distributed.process_group import resolve_device
from leoclr_fast.machine.precision import settled
from leoclr_fast.recipes import get_recipe
from leoclr_fast.run.checkpoint_writer import CheckpointWriter
from leoclr_fast.run.environment import environment
from leoclr_fast.run.folder import RunFolder

LIMIT = 0.02
WITH, WITHOUT = "with a checkpoint", "without"
_Flattened = tyro.conf.arg(name="")


def measure(
    setting: BenchSetting, speed: SpeedConfig, device: torch.device, folder: Path, rounds: int, steps: int, say: Say
) -> dict[str, Any]:
    """Seconds of all rounds and of their steps, those in which a step had to wait for the copy, how many steps saw the
    writing, and the cost as a share of the step time: median, low, high.

    What a checkpoint costs falls on the steps beside which it is written. So the cost in a round is what these took,
    with the wait for the copy, more than as many of its other steps, over the time of all: a machine that is slower in
    one round than in another changes nothing.
    """
    name = get_recipe(setting.recipe).result.method.name
    result = setting.result(name)
    method = OurMethod(name, setting, speed, device)
    seconds: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    stalls_s: list[float] = []
    steps_s: list[list[float]] = []
    steps_beside: list[int] = []
    run_folder = RunFolder(folder / "run")
    run_folder.create()
    writer = CheckpointWriter(run_folder, keep=2)
    with open_batches(training_images(None, result), [method.views], result, SYNTHETIC, device) as (batches, _):
        for number, kind in interleaved((WITH, WITHOUT), rounds, warmup=1):
            synchronize(device)
            start = time.perf_counter()
            if kind == WITH:
                writer.save(method.training.step, method.training.state_dict(result))
            stall_s, times, beside = time.perf_counter() - start, [], 0
            for _ in range(steps):
                beside += writer.is_writing
                began = time.perf_counter()
                method.step(next(batches[method.views]))
                synchronize(device)
                times.append(time.perf_counter() - began)
            writer.flush()
            taken_s = time.perf_counter() - start
            say(f"round {number + 1}/{rounds}: {kind} {1000 * taken_s / steps:,.1f} ms a step")
            if number >= 0:
                seconds[kind].append(taken_s)
                if kind == WITH:
                    stalls_s.append(stall_s)
                    steps_s.append(times)
                    steps_beside.append(beside)
    size = sum(path.stat().st_size for path in run_folder.checkpoints.rglob("state.pt"))
    return {
        "header": setting_header(result, speed, device),
        "steps_per_round": steps,
        "checkpoint_mb": size / len(list(run_folder.checkpoints.iterdir())) / 1e6,
        "seconds": seconds,
        "stalls_s": stalls_s,
        "steps_s": steps_s,
        "steps_beside": steps_beside,
        "cost": median_interval(costs(stalls_s, steps_s, max(steps_beside))),
        "cost_by_rounds": {name: ratio - 1 for name, ratio in ratio_interval(seconds[WITH], seconds[WITHOUT]).items()},
    }


def costs(stalls_s: Sequence[float], steps_s: Sequence[list[float]], beside: int) -> list[float]:
    """Of the checkpoint in each round, as a share of the round without it. beside: how many steps, from the first one
    on, saw the writing in some round."""
    shares = []
    for stall_s, times in zip(stalls_s, steps_s, strict=True):
        usual_s = statistics.median(times[beside:])
        shares.append((stall_s + sum(times[:beside]) - beside * usual_s) / (len(times) * usual_s))
    return shares


def page(document: dict[str, Any], command: str) -> str:
    measured = document["measured"]
    steps, cost, by_rounds = measured["steps_per_round"], measured["cost"], measured["cost_by_rounds"]
    rows = [
        (name, spread(quantiles("ms", [1000 * value / steps for value in seconds]), "ms"))
        for name, seconds in measured["seconds"].items()
    ]
    stall = spread(quantiles("ms", [1000 * value for value in measured["stalls_s"]]), "ms")
    return bench_page(
        f"A checkpoint every {steps} steps",
        f"{made_with(document['environment'])} {measured['header']}",
        markdown_table(("", "ms a step"), rows),
        rounds=f"{len(measured['stalls_s'])} interleaved rounds of {steps} steps each way. A round ends when the "
        f"checkpoint ({measured['checkpoint_mb']:,.0f} MB, with its checksum) is on the disk.",
        command=command,
        remarks=[
            f"The cost: {percent(cost['median'], 2)} of the step time, 95 % interval {percent(cost['low'], 2)} to "
            f"{percent(cost['high'], 2)}: what a round's steps beside which the checkpoint is written (the "
            f"first {max(measured['steps_beside'])}) took more than its other steps, with the wait of {stall} ms for "
            "the copy.",
            "Whole rounds with against rounds without, which this machine's noise moves: "
            f"{percent(by_rounds['median'], 2)} [{percent(by_rounds['low'], 2)}, {percent(by_rounds['high'], 2)}].",
        ],
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchmark(WritesResults):
    """What a checkpoint every 50 steps costs."""

    rounds: int = 7
    steps: int = 50
    """Of a round: a checkpoint in each."""
    threads: int | None = None
    """torch's default if not given."""
    setting: Annotated[BenchSetting, _Flattened] = field(
        default_factory=lambda: BenchSetting(arch="resnet18", image_size=96, batch_size=64)
    )
    speed: Annotated[SpeedConfig, _Flattened] = field(default_factory=SpeedConfig)
    scratch: Path | None = None
    """Folder for the checkpoints; the system's if not given."""
    name: str = "checkpointing_cpu"

    def run(self) -> int:
        """Measure, and write the result files; returns the exit code."""
        if self.threads:
            torch.set_num_threads(self.threads)
        results = self.results({str(self.scratch or ""): "(scratch)"})
        device = resolve_device(self.speed.device)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            speed = settled(self.speed, device)
            measured = measure(self.setting, speed, device, Path(folder), self.rounds, self.steps, results.say)
        document = {"environment": environment(device, 1), "measured": measured}
        results.write(document, page(document, results.command))
        print(page(document, results.command))
        if measured["cost"]["median"] < LIMIT:
            return 0
        print(f"checkpoints cost {percent(measured['cost']['median'], 2)}, not below {percent(LIMIT, 0)}")
        return 1


if __name__ == "__main__":
    sys.exit(tyro.cli(CheckpointBenchmark).run())
