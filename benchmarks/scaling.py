"""What more ranks bring: images per second with a batch that grows with them (weak), and with a fixed one (strong).

Every rank is a process of this machine, started anew in each round.
`python -m benchmarks.scaling --help`
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro

from benchmarks.communication_meter import CommunicationMeter
from benchmarks.processes import OwnProcess
from benchmarks.results import print_document
from dataset_tools.limits import Count, Seconds, require_allowed
from leoclr_fast.bench.config import BenchSetting, Rounds
from leoclr_fast.bench.page import bench_page, number, percent, spread, table_of
from leoclr_fast.bench.rounds import SYNTHETIC, endless, training_images
from leoclr_fast.bench.setting import bench_device, setting_header
from leoclr_fast.bench.statistics import quantiles
from leoclr_fast.bench.timing import Say, interleaved, synchronize
from leoclr_fast.config import MethodName, ResultConfig, RunConfig, SpeedConfig
from leoclr_fast.config_file import as_plain
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.process_group import resolve_device
from leoclr_fast.machine.gpu_state import gpu_state
from leoclr_fast.machine.precision import settled
from leoclr_fast.method.methods import method_class
from leoclr_fast.run.environment import environment
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.factory import make_loader
from pipelines.order import TrainOrder

Mode = Literal["weak", "strong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """The numbers of ranks that are timed, and how long."""

    ranks: tuple[int, ...] = (1, 2)
    """Numbers of ranks to time. The command starts them itself, one for each GPU, or on the CPU."""
    mode: Literal["weak", "strong", "both"] = "both"
    """weak: --batch-size is that of each rank. strong: it is the global one, shared by all ranks."""
    method: MethodName = "leoclr"
    rounds: Rounds = 5
    """Every number of ranks trains once in each; the order rotates from round to round."""
    steps: Count = 20
    """Timed steps in a round."""
    warmup_steps: Count = 5
    """Steps before them, not timed: the ranks start anew in every round."""
    max_s: Seconds = 1800.0
    """No new round begins after so many seconds; two are always run."""
    limit_s: Seconds = 300.0
    """Ranks that take longer for their share of a round are an error."""

    def __post_init__(self) -> None:
        require_allowed(self)
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"--ranks {' '.join(map(str, self.ranks))} is not allowed: give different numbers from 1")

    @property
    def modes(self) -> tuple[Mode, ...]:
        return ("weak", "strong") if self.mode == "both" else (self.mode,)

    def result(self, setting: BenchSetting, mode: Mode, num_ranks: int) -> ResultConfig:
        """The configuration on so many ranks; weak: the setting's batch on every rank. Raises ValueError for one that
        cannot be.
        """
        alone = setting.result(self.method)
        return replace(alone, batch_size=alone.batch_size * (num_ranks if mode == "weak" else 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is timed: the ranks 0 to num_ranks - 1 on a global batch."""

    mode: Mode
    num_ranks: int
    result: ResultConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTiming:
    """What one rank saw in a round: some steps, one after the other; it was idle before and after."""

    seconds: float
    communication_s: float
    """Of them, in collectives, waiting for the other ranks included."""
    calls: dict[str, float]
    """Collectives of each kind in a step."""
    bytes: dict[str, float]
    """Their bytes in a step, as `CommunicationMeter.bytes`."""


def bench_scaling(
    config: ScalingConfig, setting: BenchSetting, speed: SpeedConfig, say: Say = lambda _: None
) -> dict[str, Any]:
    """Time training steps on synthetic images on each number of ranks of this machine, in interleaved rounds.

    In each round a rank starts, warms up and is timed between two moments at which all ranks stand still.
    The time of a round is that of its slowest rank.
    Returns a JSON document with `rows`: mode, ranks, batch_size (global), images_per_s and step_ms with their
    quantiles, efficiency (rate of a rank over that of a rank where fewest are timed, median of the rounds),
    communication_share (of the step, mean over the ranks), calls_counted and bytes_counted (collectives of a step, of
    the first rank).
    Raises ValueError for a setting that cannot be, RuntimeError if a rank fails or takes too long.
    """
    start = time.perf_counter()
    device = bench_device(speed.device)
    speed = settled(speed, device)
    if device.type == "cuda" and max(config.ranks) > torch.cuda.device_count():
        raise ValueError(
            f"--ranks {max(config.ranks)} needs as many GPUs, and this machine has {torch.cuda.device_count()}; give "
            "fewer, or --device cpu"
        )
    points = _points(config, setting)
    threads = max(1, (os.cpu_count() or 1) // max(config.ranks))
    state = gpu_state(device)
    header = setting_header(points[0].result, speed, device)
    notes = _notes(config, device, threads, list(state["warnings"]) if state else [])
    for line in (header, *notes):
        say(line)
    seen: list[list[list[RankTiming]]] = [[] for _ in points]
    left_s = config.max_s - (time.perf_counter() - start)
    for round_number, place in interleaved(range(len(points)), config.rounds, max_s=left_s, say=say):
        point = points[place]
        seen[place].append(time_ranks(point, config, speed, threads))
        step_ms = 1000 * max(rank.seconds for rank in seen[place][-1]) / config.steps
        ranks_and_mode = f"{point.num_ranks} ranks, {point.mode}"
        say(f"round {round_number + 1}/{config.rounds}: {ranks_and_mode}: {step_ms:,.1f} ms a step")
    return {
        "header": header,
        "method": config.method,
        "setting": as_plain(setting),
        "speed": as_plain(speed),
        "query_batchnorm": setting.result(config.method).method.query_batchnorm,
        "rounds": len(seen[0]),
        "steps": config.steps,
        "threads_per_rank": threads,
        "environment": environment(device, max(config.ranks)),
        "gpu": state,
        "gpu_after": gpu_state(device),
        "notes": notes,
        "rows": [row for mode in config.modes for row in _rows(mode, points, seen, config.steps)],
    }


def scaling_markdown(document: dict[str, Any], command: str | None = None) -> str:
    rows: list[dict[str, Any]] = document["rows"]
    table = table_of(
        rows,
        {
            "mode": lambda row: row["mode"],
            "ranks": lambda row: str(row["ranks"]),
            "batch": lambda row: str(row["batch_size"]),
            "images/s": lambda row: spread(row, "images_per_s"),
            "step, ms": lambda row: spread(row, "step_ms"),
            "efficiency": lambda row: percent(row["efficiency"]),
            "communication": lambda row: percent(row["communication_share"]),
            "MB a step": lambda row: number(sum(row["bytes_counted"].values()) / 1e6, 2),
        },
    )
    return bench_page(
        "More ranks",
        f"Setting: {document['method']}, {document['header']}",
        table,
        rounds=f"{document['rounds']} interleaved rounds of {document['steps']} steps each. weak: the batch grows with "
        "the ranks; strong: it does not.",
        command=command,
        notes=document["notes"],
    )


def time_ranks(point: Point, config: ScalingConfig, speed: SpeedConfig, threads: int) -> list[RankTiming]:
    """The point, as each of its ranks saw it, in a process of its own. They end here, whatever happens.

    threads: of each rank. Raises RuntimeError, naming the rank, if one fails or they do not end in time.
    """
    answers, errors = [], []
    with tempfile.TemporaryDirectory() as folder:
        arguments = (point, config, speed, threads, f"{folder}/store")
        ranks = [OwnProcess(f"rank {rank}", train_rank, rank, *arguments) for rank in range(point.num_ranks)]
        try:
            for rank in ranks:
                rank.ask()
            for rank in ranks:
                try:
                    answers.append(rank.answer(config.limit_s))
                except RuntimeError as error:
                    errors.append(str(error))
        finally:
            for rank in ranks:
                rank.kill()
                rank.close()
    if errors:
        raise RuntimeError("; ".join(errors))
    return answers


def train_rank(
    rank: int, point: Point, config: ScalingConfig, speed: SpeedConfig, threads: int, store: str
) -> Iterator[RankTiming]:
    """What one rank does. For the rank's own process. store: a file where the ranks meet."""
    torch.set_num_threads(threads)
    device = resolve_device(speed.device, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if point.num_ranks > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(store, point.num_ranks),
            rank=rank,
            world_size=point.num_ranks,
            timeout=timedelta(seconds=config.limit_s),
        )
    yield _train(point, rank, config, speed, device)


def _train(point: Point, rank: int, config: ScalingConfig, speed: SpeedConfig, device: torch.device) -> RankTiming:
    meter, result = CommunicationMeter(), point.result
    ranks = Ranks(rank, point.num_ranks, meter.collective)
    run = RunConfig(recipe="scaling", result=result, speed=speed)
    step = TrainingStep(TrainingState.fresh(run, ranks, device), run, device)
    images = training_images(None, result)
    order = _order(result, point.num_ranks, num_images=len(images), rank=rank)
    views = method_class(result.method.name).views
    with make_loader(images, views, result.views, SYNTHETIC, order, seed=result.seed, device=device) as loader:
        batches = endless(loader)
        for _ in range(config.warmup_steps):
            step(next(batches), result.lr)
        synchronize(device)
        if point.num_ranks > 1:
            dist.barrier()
        meter.reset()
        start = time.perf_counter()
        for _ in range(config.steps):
            step(next(batches), result.lr)
        synchronize(device)
        seconds = time.perf_counter() - start
    return RankTiming(
        seconds=seconds,
        communication_s=meter.seconds(),
        calls={kind: count / config.steps for kind, count in meter.calls.items()},
        bytes={kind: count / config.steps for kind, count in meter.bytes.items()},
    )


def _points(config: ScalingConfig, setting: BenchSetting) -> list[Point]:
    """One rank is the same in both modes, and timed once. Raises ValueError for a batch that cannot be shared."""
    points = []
    for num_ranks in sorted(config.ranks):
        for mode in config.modes if num_ranks > 1 else config.modes[:1]:
            result = config.result(setting, mode, num_ranks)
            _order(result, num_ranks, num_images=result.batch_size)
            points.append(Point(mode=mode, num_ranks=num_ranks, result=result))
    return points


def _order(result: ResultConfig, num_ranks: int, *, num_images: int, rank: int = 0) -> TrainOrder:
    return TrainOrder(
        num_images=num_images,
        batch_size=result.batch_size,
        micro_batches=result.micro_batches,
        seed=result.seed,
        rank=rank,
        world_size=num_ranks,
    )


def _rows(
    mode: Mode, points: Sequence[Point], seen: Sequence[list[list[RankTiming]]], steps: int
) -> Iterator[dict[str, Any]]:
    """One for each number of ranks in a mode; that of a single rank stands in each mode."""
    fewest: tuple[int, list[float]] | None = None
    for point, rounds in zip(points, seen, strict=True):
        if point.mode != mode and point.num_ranks > 1:
            continue
        step_ms = [1000 * max(rank.seconds for rank in ranks) / steps for ranks in rounds]
        rates = [1000 * point.result.batch_size / one for one in step_ms]
        fewest = fewest or (point.num_ranks, rates)
        efficiencies = [
            (rate / point.num_ranks) / (alone / fewest[0]) for rate, alone in zip(rates, fewest[1], strict=True)
        ]
        shares = [rank.communication_s / rank.seconds for ranks in rounds for rank in ranks]
        yield {
            "mode": mode,
            "ranks": point.num_ranks,
            "batch_size": point.result.batch_size,
            **quantiles("images_per_s", rates),
            **quantiles("step_ms", step_ms),
            "efficiency": quantiles("efficiency", efficiencies)["efficiency"],
            "communication_share": sum(shares) / len(shares),
            "calls_counted": rounds[-1][0].calls,
            "bytes_counted": rounds[-1][0].bytes,
            "rounds_step_ms": step_ms,
        }


def _notes(config: ScalingConfig, device: torch.device, threads: int, notes: list[str]) -> list[str]:
    if device.type == "cpu":
        notes.append(
            f"measured on a CPU of {os.cpu_count()} cores, with {threads} thread{'s' * (threads > 1)} for each rank "
            "and gloo: it says nothing of GPUs and NCCL"
        )
        if max(config.ranks) * threads > (os.cpu_count() or 1):
            notes.append("there are more ranks than cores: they slow each other down")
    else:
        notes.append(
            "one rank may run as a captured CUDA graph, several here do not; --cuda-graph off compares like with like"
        )
    return [*notes, "the share of communication includes the waiting for slower ranks"]


@dataclass(frozen=True, kw_only=True)
class ScalingBenchmark:
    """Time training on 1 to N ranks of this machine, in interleaved rounds, with its share of communication."""

    config: Annotated[ScalingConfig, tyro.conf.arg(name="")] = field(default_factory=ScalingConfig)
    setting: Annotated[BenchSetting, tyro.conf.arg(name="")] = field(default_factory=BenchSetting)
    speed: Annotated[SpeedConfig, tyro.conf.arg(name="")] = field(default_factory=SpeedConfig)

    def run(self) -> None:
        print_document(bench_scaling(self.config, self.setting, self.speed, print), scaling_markdown)


if __name__ == "__main__":
    tyro.cli(ScalingBenchmark).run()
