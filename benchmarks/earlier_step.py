"""On CPU cores: our step as it is, as it was in another checkout, and the peers', each in a process of its own, in
interleaved rounds. `python -m benchmarks.earlier_step --help`

What is timed is the processor time of all threads, which other programs on the machine hardly change. The same network,
sizes and batch-norm on all sides, our augmentation timed with the step, in float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from benchmarks.results import WritesResults, made_with
from leoclr_fast.bench.page import interval, markdown_table, spread
from leoclr_fast.bench.statistics import quantiles, ratio_interval
from leoclr_fast.bench.timing import interleaved
from leoclr_fast.run.environment import environment

# Also for checkouts of before leoclr_fast/bench/rounds.py.
_PROGRAM = """
import sys, time, torch
name, method, arch, side, batch_size, threads, steps = sys.argv[1:]
torch.set_num_threads(int(threads))
try:
    from leoclr_fast.bench.config import BenchSetting
    from leoclr_fast.bench.rounds import OurMethod, SYNTHETIC, open_batches, training_images
    speed_options = {"precision": "fp32"}
except ImportError:
    from leoclr_fast.bench.setting import BenchSetting
    from leoclr_fast.bench.contestant import OurMethod
    from leoclr_fast.bench.feeds import open_feeds as open_batches, training_images
    from pipelines.config import LoaderConfig
    SYNTHETIC, speed_options = LoaderConfig(name="synthetic"), {}
from leoclr_fast.config import SpeedConfig
setting = dict(recipe="mocov2_imagenet_200ep", arch=arch, image_size=int(side), batch_size=int(batch_size),
               key_batchnorm="plain")
if "query_batchnorm" in BenchSetting.__dataclass_fields__:
    setting["query_batchnorm"] = "plain"
setting, speed, device = BenchSetting(**setting), SpeedConfig(device="cpu", **speed_options), torch.device("cpu")
if name in ("now", "earlier"):
    timed = OurMethod(method, setting, speed, device)
else:
    from benchmarks.baselines.peers import PEERS
    timed = PEERS[name](setting, speed, device)
result = setting.result(method)
with open_batches(training_images(None, result), [timed.views], result, SYNTHETIC, device) as (batches, _):
    for _ in sys.stdin:
        timed.step(next(batches[timed.views]))
        start = time.process_time()
        for _ in range(int(steps)):
            timed.step(next(batches[timed.views]))
        print(1000 * (time.process_time() - start) / int(steps), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class EarlierStep(WritesResults):
    """A training step now and before, beside its peers."""

    earlier: Annotated[Path, tyro.conf.Positional]
    """The other checkout."""
    method: str = "mocov2"
    peers: tuple[str, ...] = ("published MoCo-v2 loop", "lightly MoCo-v2")
    arch: str = "resnet18"
    image_size: int = 96
    batch_size: int = 64
    threads: int = 1
    rounds: int = 11
    steps: int = 2
    """Timed ones of a round, after one that is not."""
    name: str = "earlier_step_cpu"

    def run(self) -> None:
        commit = subprocess.run(["git", "-C", self.earlier, "rev-parse", "--short", "HEAD"], capture_output=True,
                                text=True, check=True).stdout.strip()  # fmt: skip
        torch.set_num_threads(self.threads)
        results = self.results({str(self.earlier): f"CHECKOUT-OF-{commit}"})
        places = {"now": Path.cwd(), "earlier": self.earlier} | {peer: Path.cwd() for peer in self.peers}
        programs = {name: self._started(name, place) for name, place in places.items()}
        times: Mapping[str, list[float]] = {name: [] for name in places}
        try:
            for number, name in interleaved(list(places), self.rounds, warmup=1):
                step_ms = self._step_ms(programs[name])
                results.say(f"round {number + 1}/{self.rounds}: {name} {step_ms:,.1f} ms of processor time a step")
                if number >= 0:
                    times[name].append(step_ms)
        finally:
            for program in programs.values():
                program.communicate()
        ratios = {name: ratio_interval(own, times["now"]) for name, own in times.items() if name != "now"}
        surroundings = environment(torch.device("cpu"), 1)
        document = {"environment": surroundings, "earlier_commit": commit, "step_ms": times, "ratios": ratios}
        rows = [
            (f"{name} ({commit})" if name == "earlier" else name, spread(quantiles("step_ms", own), "step_ms"),
             interval(ratios[name]) if name in ratios else "1")
            for name, own in times.items()
        ]  # fmt: skip
        page = (
            f"# A training step of {self.method}, now and earlier\n\n`{results.command}`; "
            f"{made_with(surroundings, 'lightly')} {self.rounds} interleaved "
            f"rounds of {self.steps} steps; {self.arch}, {self.image_size} px, batch {self.batch_size}, plain "
            "batch-norm, augmentation included, float32.\n\n"
            + markdown_table(("step", "processor time, ms", "of the pairs: its time over now's"), rows)
        )
        results.write(document, page)
        print(page)

    def _started(self, name: str, place: Path) -> subprocess.Popen[str]:
        sizes = map(str, (self.image_size, self.batch_size, self.threads, self.steps))
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, name, self.method, self.arch, *sizes],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=place,
            env={**os.environ, "PYTHONPATH": str(place)},
        )  # fmt: skip

    @staticmethod
    def _step_ms(program: subprocess.Popen[str]) -> float:
        assert program.stdin is not None
        assert program.stdout is not None
        print("go", file=program.stdin, flush=True)
        return float(program.stdout.readline())


if __name__ == "__main__":
    tyro.cli(EarlierStep).run()
