"""What more ranks bring: images per second with a batch that grows with them (weak), and with a fixed one (strong)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from leoclr_fast.bench.communication_volume import communication_volume
from leoclr_fast.bench.rank_team import RankTeam, RankTurn, TeamConfig, TeamTurn
from leoclr_fast.bench.scaling_model import FORMULA, ScalingPoint, fit_scaling_model, projected_row
from leoclr_fast.bench.setting import BenchSetting, bench_device, setting_header
from leoclr_fast.bench.statistics import quantiles
from leoclr_fast.config import MethodName, ResultConfig, SpeedConfig
from leoclr_fast.config_file import as_plain
from leoclr_fast.distributed.batch_layout import BatchLayout
from leoclr_fast.machine.gpu_state import gpu_state
from leoclr_fast.recipes import get_recipe
from leoclr_fast.run.environment import environment
from pipelines.order import TrainOrder

Say = Callable[[str], None]
Mode = Literal["weak", "strong"]

_LEAST_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """What is measured, and to how many ranks it is projected."""

    setting: BenchSetting = field(default_factory=BenchSetting)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    method: MethodName = "leoclr"
    ranks: tuple[int, ...] = (1, 2)
    mode: Literal["weak", "strong", "both"] = "both"
    query_batchnorm: Literal["plain", "sync"] = "plain"
    rounds: int = 5
    steps: int = 20
    warmup_steps: int = 5
    project_to: tuple[int, ...] = (8, 16, 32, 64)
    max_s: float = 1800.0
    limit_s: float = 300.0

    def __post_init__(self) -> None:
        for name, least in (("rounds", _LEAST_ROUNDS), ("steps", 1), ("warmup_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is not allowed: give at least {least}")
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"--ranks {' '.join(map(str, self.ranks))} is not allowed: give different numbers from 1")
        if self.project_to and min(self.project_to) < 1:
            raise ValueError(f"--project-to {min(self.project_to)} is not allowed: give numbers of ranks from 1")
        for name in ("max_s", "limit_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} is not allowed: give a positive number of seconds")

    @property
    def modes(self) -> tuple[Mode, ...]:
        return ("weak", "strong") if self.mode == "both" else (self.mode,)

    def result(self, mode: Mode, num_ranks: int) -> ResultConfig:
        """The configuration of a point; weak: the setting's batch on every rank. Raises ValueError for one that cannot
        be."""
        given = self.setting.key_batchnorm or get_recipe(self.setting.recipe).result.method.key_batchnorm
        alone = self.setting.result(self.method)
        batch_size = alone.batch_size * (num_ranks if mode == "weak" else 1)
        key_batchnorm = "split" if given == "shuffle" and num_ranks == 1 else given
        method = replace(alone.method, key_batchnorm=key_batchnorm, query_batchnorm=self.query_batchnorm)
        return replace(alone, batch_size=batch_size, method=method)


@dataclass(frozen=True, slots=True)
class _Point:
    mode: Mode
    num_ranks: int


def bench_scaling(config: ScalingConfig, say: Say = lambda _: None) -> dict[str, Any]:
    """Time training steps on synthetic images on each number of ranks of this machine, in turns.

    Every rank is a process of its own; in each turn it makes its step anew, warms up and is timed between two moments
    at which all ranks stand still. The time of a turn is that of its slowest rank.
    Returns a JSON document with `rows`: mode, ranks, batch_size (global), images_per_s and step_ms (medians) with q20
    and q80, efficiency (rate of a rank over that of a rank in the smallest team, median of the rounds),
    communication_share (of the step, mean over the ranks), collectives and bytes of a step, counted and computed; and
    `projection`: the fitted model and the ranks of `project_to`, or `refused`, why there is none.
    Raises ValueError for a setting that cannot be, RuntimeError if a rank fails or takes too long.
    """
    start = time.perf_counter()
    device = bench_device(config.speed)
    if device.type == "cuda" and max(config.ranks) > torch.cuda.device_count():
        raise ValueError(
            f"--ranks {max(config.ranks)} needs as many GPUs, and this machine has {torch.cuda.device_count()}; give "
            "fewer, or --device cpu"
        )
    points = _points(config)
    results = {point: config.result(point.mode, point.num_ranks) for point in points}
    for point, result in results.items():
        _require_shareable(result, point.num_ranks)
    threads = max(1, (os.cpu_count() or 1) // max(config.ranks))
    team = TeamConfig(
        speed=config.speed,
        steps=config.steps,
        warmup_steps=config.warmup_steps,
        threads=threads,
        limit_s=config.limit_s,
    )
    state = gpu_state(device)
    header = setting_header(results[points[0]], config.speed, device)
    say(header)
    notes = _notes(config, device, threads, state)
    for note in notes:
        say(note)
    rounds = [points if number % 2 == 0 else points[::-1] for number in range(config.rounds)]
    turns = [TeamTurn(num_ranks=p.num_ranks, result=results[p]) for round_ in rounds for p in round_]
    seen: dict[_Point, list[list[RankTurn]]] = {point: [] for point in points}
    with RankTeam(turns, team) as ranks:
        for number, round_ in enumerate(rounds):
            if number >= _LEAST_ROUNDS and time.perf_counter() - start > config.max_s:
                say(f"stopped after {number} of {config.rounds} rounds: {config.max_s:g} s have gone")
                break
            for point in round_:
                seen[point].append(ranks.turn())
                name = f"{point.num_ranks} ranks, {point.mode}"
                step_ms = 1000 * max(rank.seconds for rank in seen[point][-1]) / config.steps
                say(f"round {number + 1}/{config.rounds}: {name}: {step_ms:,.1f} ms a step")
    rows = _rows(config, results, seen)
    return {
        "header": header,
        "method": config.method,
        "setting": as_plain(config.setting),
        "speed": as_plain(config.speed),
        "query_batchnorm": config.query_batchnorm,
        "rounds": len(seen[points[0]]),
        "steps": config.steps,
        "threads_per_rank": threads,
        "environment": environment(device, max(config.ranks)),
        "gpu": state,
        "gpu_after": gpu_state(device),
        "notes": notes,
        "rows": rows,
        "projection": _projection(config, rows),
    }


def _points(config: ScalingConfig) -> list[_Point]:
    """One rank is the same in both modes, and measured once."""
    points = []
    for num_ranks in sorted(config.ranks):
        points += [_Point(mode, num_ranks) for mode in (config.modes if num_ranks > 1 else config.modes[:1])]
    return points


def _require_shareable(result: ResultConfig, num_ranks: int) -> None:
    TrainOrder(
        num_images=result.batch_size,
        batch_size=result.batch_size,
        micro_batches=result.micro_batches,
        seed=0,
        world_size=num_ranks,
    )


def _rows(
    config: ScalingConfig, results: dict[_Point, ResultConfig], seen: dict[_Point, list[list[RankTurn]]]
) -> list[dict[str, Any]]:
    """One for each mode and number of ranks; that of a single rank stands in each mode."""
    rows = []
    for mode in config.modes:
        own = {p.num_ranks: p for p in seen if p.mode == mode or p.num_ranks == 1}
        rates = {
            num_ranks: [
                results[point].batch_size * config.steps / max(rank.seconds for rank in turn) for turn in seen[point]
            ]
            for num_ranks, point in sorted(own.items())
        }
        base = min(rates)
        for num_ranks, rate in rates.items():
            point, result = own[num_ranks], results[own[num_ranks]]
            step_ms = quantiles([1000 * result.batch_size / value for value in rate])
            shares = [rank.communication_s / rank.seconds for turn in seen[point] for rank in turn]
            efficiencies = [
                (value / num_ranks) / (alone / base) for value, alone in zip(rate, rates[base], strict=True)
            ]
            volume = communication_volume(result, config.speed, num_ranks)
            first = seen[point][-1][0]
            rows.append(
                {
                    "mode": mode,
                    "ranks": num_ranks,
                    "batch_size": result.batch_size,
                    "images_per_s": quantiles(rate)["median"],
                    "images_per_s_q20": quantiles(rate)["q20"],
                    "images_per_s_q80": quantiles(rate)["q80"],
                    "step_ms": step_ms["median"],
                    "step_ms_q20": step_ms["q20"],
                    "step_ms_q80": step_ms["q80"],
                    "efficiency": quantiles(efficiencies)["median"],
                    "communication_share": sum(shares) / len(shares),
                    "calls_counted": first.calls,
                    "calls_computed": volume.calls,
                    "bytes_counted": first.bytes,
                    "bytes_computed": volume.bytes,
                    "turns_step_ms": [1000 * result.batch_size / value for value in rate],
                }
            )
    return rows


def _scaling_point(
    config: ScalingConfig, mode: Mode, num_ranks: int, step_ms: float | None = None
) -> tuple[ScalingPoint, ResultConfig]:
    result = config.result(mode, num_ranks)
    volume = communication_volume(result, config.speed, num_ranks)
    layout = BatchLayout(batch_size=result.batch_size, micro_batches=result.micro_batches, world_size=num_ranks)
    point = ScalingPoint(
        num_ranks=num_ranks,
        local_batch_size=layout.local_size,
        num_collectives=sum(volume.calls.values()),
        wire_bytes=volume.wire_bytes,
        step_ms=step_ms,
    )
    return point, result


def _projection(config: ScalingConfig, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    what = {"what": "a projection, not a measurement", "formula": FORMULA}
    measured = {}
    for row in rows:
        key = (row["mode"] if row["ranks"] > 1 else None, row["ranks"])  # one rank is one point
        measured[key] = _scaling_point(config, row["mode"], row["ranks"], row["step_ms"])[0]
    try:
        model = fit_scaling_model(list(measured.values()))
    except ValueError as error:
        return {**what, "refused": str(error)}
    projected, left_out = [], []
    for mode in config.modes:
        for num_ranks in sorted(config.project_to):
            try:
                point, result = _scaling_point(config, mode, num_ranks)
                _require_shareable(result, num_ranks)
            except ValueError as error:
                left_out.append(f"{mode}, {num_ranks} ranks: {error}")
                continue
            projected.append(projected_row(model, mode, result.batch_size, point))
    return {
        **what,
        "points": len(measured),
        "coefficients": {**as_plain(model), "bandwidth_gb_per_s": model.bandwidth_gb_per_s},
        "rows": projected,
        "left_out": left_out,
    }


def _notes(config: ScalingConfig, device: torch.device, threads: int, state: dict[str, Any] | None) -> list[str]:
    notes = list(state["warnings"]) if state else []
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
    notes.append("the share of communication includes the waiting for slower ranks")
    return notes
