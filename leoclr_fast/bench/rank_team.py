"""Ranks on this machine that train in turns: each turn has so many of them, and a step of its own."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist

from leoclr_fast.bench.feeds import training_images
from leoclr_fast.bench.own_process import OwnProcess
from leoclr_fast.bench.stopwatch import synchronize
from leoclr_fast.config import ResultConfig, RunConfig, SpeedConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.communication_meter import CommunicationMeter
from leoclr_fast.distributed.process_group import resolve_device
from leoclr_fast.method.methods import METHODS
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from pipelines.config import LoaderConfig
from pipelines.factory import make_loader
from pipelines.order import TrainOrder

_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeamTurn:
    """A turn of the ranks 0 to num_ranks - 1."""

    num_ranks: int
    result: ResultConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTurn:
    """What one rank saw in a turn: some steps, one after the other; it was idle before and after."""

    seconds: float
    communication_s: float
    """Of them, in collectives, waiting for the other ranks included."""
    calls: dict[str, float]
    """Collectives of each kind in a step."""
    bytes: dict[str, float]
    """Their bytes in a step, as `CommunicationMeter.bytes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeamConfig:
    """How every turn is run."""

    speed: SpeedConfig
    steps: int
    warmup_steps: int
    threads: int
    """Of each rank."""
    limit_s: float
    """For one turn; a collective that takes longer is an error too."""


class RankTeam:
    """The processes, one for each rank, and the store where they meet. They end with the block, whatever happens."""

    def __init__(self, turns: Sequence[TeamTurn], config: TeamConfig) -> None:
        self._config = config
        self._turns = iter(turns)
        limit = timedelta(seconds=config.limit_s)
        self._store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=limit)
        num_ranks = max(turn.num_ranks for turn in turns)
        arguments = (self._store.port, list(turns), config)
        self._ranks = [OwnProcess(f"rank {rank}", train_rank, (rank, *arguments)) for rank in range(num_ranks)]

    def __enter__(self) -> RankTeam:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        for rank in self._ranks:
            rank.close()

    def turn(self) -> list[RankTurn]:
        """The next turn, as each of its ranks saw it. Raises RuntimeError, naming the rank, if one fails or the turn
        does not end in time; the others are ended then."""
        ranks = self._ranks[: next(self._turns).num_ranks]
        with ThreadPoolExecutor(len(ranks)) as threads:
            answers = [threads.submit(rank.turn) for rank in ranks]
            try:
                done, late = wait(answers, self._config.limit_s, FIRST_EXCEPTION)
            except BaseException:
                self._end()  # else leaving this block would wait for the ranks
                raise
            failures = [error for answer in done if (error := answer.exception()) is not None]
            if late:
                self._end()
        if failures:
            raise failures[0]
        if late:
            names = [rank.name for rank, answer in zip(ranks, answers, strict=True) if answer in late]
            raise RuntimeError(f"{', '.join(names)} did not finish a turn in {self._config.limit_s:g} s")
        return [answer.result() for answer in answers]

    def _end(self) -> None:
        for rank in self._ranks:
            with suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)


def train_rank(rank: int, port: int, turns: Sequence[TeamTurn], config: TeamConfig) -> Iterator[RankTurn]:
    """The turns of one rank that it takes part in. For the rank's own process."""
    torch.set_num_threads(config.threads)
    device = resolve_device(config.speed.device, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=config.limit_s)
    store = dist.TCPStore(_HOST, port, is_master=False, timeout=limit)
    for number, turn in enumerate(turns):
        if rank >= turn.num_ranks:
            continue
        if turn.num_ranks > 1:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore(f"turn {number}", store),
                rank=rank,
                world_size=turn.num_ranks,
                timeout=limit,
            )
        yield _train(turn, rank, config, device)
        if turn.num_ranks > 1:
            dist.destroy_process_group()
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _train(turn: TeamTurn, rank: int, config: TeamConfig, device: torch.device) -> RankTurn:
    meter, result = CommunicationMeter(), turn.result
    ranks = Ranks(rank, turn.num_ranks, meter)
    run = RunConfig(recipe="scaling", result=result, speed=config.speed)
    step = TrainingStep(TrainingState.fresh(run, ranks, device), run, device)
    images = training_images(None, result)
    order = TrainOrder(
        num_images=len(images),
        batch_size=result.batch_size,
        micro_batches=result.micro_batches,
        seed=result.seed,
        rank=rank,
        world_size=turn.num_ranks,
    )
    views, loader_config = METHODS[result.method.name].views, LoaderConfig(name="synthetic")
    with make_loader(images, views, result.views, loader_config, order, seed=result.seed, device=device) as loader:
        batches = (batch for epoch in count() for batch in loader.batches(epoch))
        for _ in range(config.warmup_steps):
            step(next(batches), result.lr)
        synchronize(device)
        ranks.barrier()
        meter.reset()
        start = time.perf_counter()
        for _ in range(config.steps):
            step(next(batches), result.lr)
        synchronize(device)
        seconds = time.perf_counter() - start
    return RankTurn(
        seconds=seconds,
        communication_s=meter.seconds(),
        calls={kind: count / config.steps for kind, count in meter.calls.items()},
        bytes={kind: count / config.steps for kind, count in meter.bytes.items()},
    )
