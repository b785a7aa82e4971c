"""What a checkpoint every 50 steps costs: `python -m benchmarks.checkpointing --help`.

One process trains LeOCLR on synthetic batches, in turns of 50 steps: with a checkpoint at their start, whose writing
beside the steps is waited for at their end, and without. Written: NAME.json (all times, command, environment), NAME.md
and NAME.log. Exit code 1 if the median cost is 2 % or more.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from leoclr_fast.bench.contestant import OurMethod
from leoclr_fast.bench.feeds import open_feeds, training_images
from leoclr_fast.bench.setting import BenchSetting, setting_header
from leoclr_fast.bench.statistics import median_interval, quantiles
from leoclr_fast.bench.stopwatch import synchronize
from leoclr_fast.bench.tables import markdown_table, percent, spread
from leoclr_fast.config import SpeedConfig
from leoclr_fast.distributed.process_group import resolve_device
from leoclr_fast.run.checkpoint_writer import CheckpointWriter
from leoclr_fast.run.environment import environment
from leoclr_fast.run.folder import RunFolder
from pipelines.config import LoaderConfig

LIMIT = 0.02
WITH, WITHOUT = "with a checkpoint", "without"
Say = Callable[[str], None]


def measure(
    setting: BenchSetting, speed: SpeedConfig, device: torch.device, folder: Path, rounds: int, steps: int, say: Say
) -> dict[str, Any]:
    """Seconds of all turns and of their steps, those in which a step had to wait for the copy, how many steps saw the
    writing, and the cost as a share of the step time: median, low, high.

    What a checkpoint costs falls on the steps beside which it is written. So the cost in a turn is what these took,
    with the wait for the copy, more than as many of its other steps, over the time of all: a machine that is slower in
    one turn than in another changes nothing.
    """
    result = setting.result("leoclr")
    contestant = OurMethod("leoclr", setting, speed, device)
    training = contestant.training
    seconds: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    stalls_s: list[float] = []
    steps_s: list[list[float]] = []
    steps_beside: list[int] = []
    run_folder = RunFolder(folder / "run")
    run_folder.create()
    writer = CheckpointWriter(run_folder, keep=2)
    split = training_images(None, result)
    with open_feeds(split, [contestant.views], result, LoaderConfig(name="synthetic"), device) as (feeds, _):
        feed = feeds[contestant.views]

        def turn(saves: bool) -> float:
            synchronize(device)
            start = time.perf_counter()
            if saves:
                writer.save(training.step, training.state_dict(result))
                stalls_s.append(time.perf_counter() - start)
            times, beside = [], 0
            for _ in range(steps):
                beside += writer.is_writing
                began = time.perf_counter()
                contestant.step(next(feed))
                synchronize(device)
                times.append(time.perf_counter() - began)
            writer.flush()
            if saves:
                steps_s.append(times)
                steps_beside.append(beside)
            return time.perf_counter() - start

        turn(True), turn(False)  # the warm-up
        for kept in (stalls_s, steps_s, steps_beside):
            kept.clear()
        for number in range(rounds):
            for name in (WITH, WITHOUT) if number % 2 == 0 else (WITHOUT, WITH):
                seconds[name].append(turn(name == WITH))
                say(f"round {number + 1}/{rounds}: {name} {1000 * seconds[name][-1] / steps:,.1f} ms a step")
    size = sum(path.stat().st_size for path in run_folder.checkpoints.rglob("state.pt"))
    number_kept = len(list(run_folder.checkpoints.iterdir()))
    return {
        "header": setting_header(result, speed, device),
        "steps_per_turn": steps,
        "checkpoint_mb": size / number_kept / 1e6,
        "seconds": seconds,
        "stalls_s": stalls_s,
        "steps_s": steps_s,
        "steps_beside": steps_beside,
        "cost": median_interval(costs(stalls_s, steps_s, max(steps_beside))),
        "cost_by_turns": median_interval([w / wo - 1 for w, wo in zip(seconds[WITH], seconds[WITHOUT], strict=True)]),
    }


def costs(stalls_s: list[float], steps_s: list[list[float]], beside: int) -> list[float]:
    """Of the checkpoint in each turn, as a share of the turn without it. beside: how many steps, from the first one on,
    saw the writing in some turn."""
    shares = []
    for stall_s, times in zip(stalls_s, steps_s, strict=True):
        usual_s = statistics.median(times[beside:])
        shares.append((stall_s + sum(times[:beside]) - beside * usual_s) / (len(times) * usual_s))
    return shares


def page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    where, measured = document["environment"], document["measured"]
    steps, cost, by_turns = measured["steps_per_turn"], measured["cost"], measured["cost_by_turns"]
    rows = []
    for name, seconds in measured["seconds"].items():
        step_ms = quantiles([1000 * value / steps for value in seconds])
        rows.append((name, spread(step_ms["median"], step_ms["q20"], step_ms["q80"])))
    stall_ms = quantiles([1000 * value for value in measured["stalls_s"]])
    return "\n".join(
        [
            f"# A checkpoint every {steps} steps",
            "",
            f"`{document['command']}`; {where['gpu'] or where['cpu']}, {where['torch_threads']} threads; torch "
            f"{where['versions']['torch']}. {measured['header']}.",
            "",
            f"{document['rounds']} interleaved rounds of {steps} steps each way; medians [20 %, 80 %]. The turn ends "
            f"when the checkpoint ({measured['checkpoint_mb']:,.0f} MB, with its checksum) is on the disk.",
            "",
            markdown_table(("", "ms a step"), rows).rstrip(),
            "",
            f"The cost: {percent(cost['median'], 2)} of the step time, 95 % interval {percent(cost['low'], 2)} to "
            f"{percent(cost['high'], 2)}: what a turn's steps beside which the checkpoint is "
            f"written (the first {max(measured['steps_beside'])}) took more than its other steps, with the wait of "
            f"{spread(stall_ms['median'], stall_ms['q20'], stall_ms['q80'])} ms for the copy. Whole turns with against "
            f"turns without, which this machine's noise moves: {percent(by_turns['median'], 2)} "
            f"[{percent(by_turns['low'], 2)}, {percent(by_turns['high'], 2)}].",
            "",
        ]
    )


def main() -> None:
    """Measure, and write the result files."""
    flags = _parse()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    log: list[str] = []

    def say(line: str) -> None:
        log.append(line)
        print(line, flush=True)

    device = resolve_device(flags.device)
    setting = BenchSetting(
        arch=flags.arch,
        stem=flags.stem,
        image_size=flags.image_size,
        batch_size=flags.batch_size,
        queue_size=flags.queue_size,
    )
    with tempfile.TemporaryDirectory(dir=flags.scratch) as folder:
        speed = SpeedConfig(device=str(device), precision=flags.precision)
        measured = measure(setting, speed, device, Path(folder), flags.rounds, flags.steps, say)
    document = {
        "command": shlex.join(["python", "-m", "benchmarks.checkpointing", *sys.argv[1:]]),
        "rounds": flags.rounds,
        "environment": environment(device, 1),
        "measured": measured,
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / f"{flags.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (flags.out / f"{flags.name}.md").write_text(page(document))
    (flags.out / f"{flags.name}.log").write_text("\n".join([f"$ {document['command']}", *log]) + "\n")
    print(page(document))
    if measured["cost"]["median"] >= LIMIT:
        sys.exit(f"checkpoints cost {percent(measured['cost']['median'], 2)}, not below {percent(LIMIT, 0)}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpointing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50, help="of a turn: a checkpoint in each")
    parser.add_argument("--threads", type=int, help="torch's default if not given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--arch", choices=("resnet18", "resnet34", "resnet50"), default="resnet18")
    parser.add_argument("--stem", choices=("imagenet", "small"), default="imagenet")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--queue-size", type=int, default=65_536)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints; the system's if not given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="checkpointing_cpu", help="of the result files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
