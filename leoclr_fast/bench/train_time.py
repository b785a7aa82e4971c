"""What a method costs next to another: all train interleaved, in one process, on one loader. Table 7 of the paper."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from leoclr_fast.bench.config import BenchSetting, RoundsConfig, TrainTimeConfig
from leoclr_fast.bench.page import bench_page, interval, number, percent, spread, table_of
from leoclr_fast.bench.rounds import (
    SYNTHETIC,
    OurMethod,
    TimedMethod,
    TimedSteps,
    open_batches,
    prepare,
    train_interleaved,
    training_images,
)
from leoclr_fast.bench.setting import baselines, bench_device, is_paper_setting, setting_header
from leoclr_fast.bench.statistics import quantiles, ratio_interval
from leoclr_fast.bench.timing import Say
from leoclr_fast.config import SpeedConfig
from leoclr_fast.config_file import as_plain
from leoclr_fast.machine.energy import EnergyMeter
from leoclr_fast.machine.gpu_state import gpu_state
from leoclr_fast.machine.precision import settled
from leoclr_fast.method.flops import mfu, peak_flops_per_s
from leoclr_fast.method.methods import METHODS, method_class
from leoclr_fast.run.bottleneck import find_bottleneck
from leoclr_fast.run.environment import environment
from pipelines.factory import shows_images

_KWH_PER_J = 1 / 3.6e6


def bench_train_time(
    config: TrainTimeConfig,
    rounds: RoundsConfig,
    setting: BenchSetting,
    speed: SpeedConfig,
    data: Path | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Time the methods, and the peers if wanted, on synthetic images and on those of `data`, if given.

    Returns a JSON document: header, setting, environment, `gpu` and `gpu_after` (its state before the first and after
    the last step), notes, `titles` (method -> its name for people), and
    `rows`, one for each method and data: method, data, images_per_s and step_ms with their quantiles, mfu,
    data_wait_fraction, peak_memory_gib, energy_per_million_images_kwh, the step times of all rounds;
    `ratio_synthetic` and `ratio_real`: the first method's step time over the second's in the pairs of a round, as
    median, low and high of its 95 % bootstrap interval; None without such data, or without a second method;
    `speedups` over each peer of our method that it is a peer of.
    Raises ValueError for a setting that cannot be, for data that cannot be read, or without the folder of the peers.
    """
    start = time.perf_counter()
    device = bench_device(speed.device)
    speed = settled(speed, device)
    methods = {name: method_class(name) for name in config.methods or METHODS}
    results = {name: setting.result(name) for name in methods}
    result = next(iter(results.values()))
    state = gpu_state(device)
    header = setting_header(result, speed, device)
    say(header)
    peers = baselines("peers").PEERS if config.peers else {}
    notes = _notes(speed, data, device, state, bool(peers))
    for note in notes:
        say(note)
    splits = {"synthetic": training_images(None, result)}
    if data is not None:
        if not shows_images(speed.loader):
            raise ValueError(
                f"--data with the loader {speed.loader.name} would never read the images; choose another --loader, or "
                "leave --data out: synthetic images are always timed"
            )
        splits["real"] = training_images(data, result, config.max_images)

    makers: dict[str, Callable[[], TimedMethod]] = {
        name: partial(OurMethod, name, setting, speed, device) for name in methods
    }
    makers |= {name: partial(peer, setting, speed, device) for name, peer in peers.items()}
    recipes = [method.views for method in (*methods.values(), *peers.values())]
    prepared: list[TimedMethod] = []
    rows: list[dict[str, Any]] = []
    for left, (kind, split) in zip(range(len(splits), 0, -1), splits.items(), strict=True):
        loader = SYNTHETIC if kind == "synthetic" else speed.loader
        with open_batches(split, recipes, result, loader, device) as (batches, loader_name):
            for name, make in makers.items() if not prepared else ():
                say(f"preparing {name}")
                try:
                    prepared.append(prepare(make, batches, device, rounds.warmup_steps))
                except (ImportError, ValueError, torch.OutOfMemoryError) as error:
                    if name not in peers:
                        raise
                    torch.cuda.empty_cache()
                    notes.append(f"{name} did not run: {str(error).splitlines()[0]}")
                    say(notes[-1])
            say(f"{kind} images, loader {loader_name}")
            left_s = rounds.max_s - (time.perf_counter() - start)
            share = replace(rounds, max_s=max(1.0, left_s / left))
            timed = train_interleaved(prepared, batches, device, share, say)
        for one, own in zip(prepared, timed, strict=True):
            row = _row(one, kind, own, result.batch_size, device, speed.precision)
            rows.append(row | {"loader": loader_name})
    pair = list(methods)[:2]
    return {
        "header": header,
        "paper_setting": is_paper_setting(result),
        "setting": {name: as_plain(own) for name, own in results.items()},
        "speed": as_plain(speed),
        "rounds": as_plain(rounds),
        "environment": environment(device, 1),
        "gpu": state,
        "gpu_after": gpu_state(device),
        "notes": notes,
        "titles": {name: method.title for name, method in methods.items()},
        "compared": pair,
        "flops_per_image": {one.name: one.flops_per_image for one in prepared},
        "rows": rows,
        **{f"ratio_{kind}": step_time_ratio(rows, kind, *pair) for kind in ("synthetic", "real")},
        "peer_of": {name: peer.peer_of for name, peer in peers.items()},
        "speedups": {
            kind: {name: step_time_ratio(rows, kind, name, peer.peer_of) for name, peer in peers.items()}
            for kind in splits
        },
    }


def step_time_ratio(rows: Sequence[dict[str, Any]], data: str, *pair: str) -> dict[str, float] | None:
    """Step time of the first of a pair of methods over that of the second, round by round: median, low and high of its
    95 % bootstrap interval. None if one of them was not measured on this data.
    """
    times = {row["method"]: row["rounds_step_ms"] for row in rows if row["data"] == data}
    if len(pair) < 2 or not times.keys() >= set(pair):
        return None
    return ratio_interval(times[pair[0]], times[pair[1]])


def _row(
    method: TimedMethod, data: str, timed: Sequence[TimedSteps], batch_size: int, device: torch.device, precision: str
) -> dict[str, Any]:
    rate = quantiles("images_per_s", [batch_size * own.steps / own.seconds for own in timed])
    step_ms = [own.step_ms for own in timed]
    joules = [own.energy_j for own in timed if own.energy_j is not None]
    millions = 1e-6 * batch_size * sum(own.steps for own in timed)
    peak, _ = peak_flops_per_s(device, precision)
    return {
        "method": method.name,
        "data": data,
        **rate,
        **quantiles("step_ms", step_ms),
        "mfu": mfu(method.flops_per_image, rate["images_per_s"], peak),
        "data_wait_fraction": sum(own.data_wait_s for own in timed) / sum(own.seconds for own in timed),
        "peak_memory_gib": method.peak_memory_gib,
        "energy_per_million_images_kwh": sum(joules) / millions * _KWH_PER_J if len(joules) == len(timed) else None,
        "rounds_step_ms": step_ms,
    }


def _notes(
    speed: SpeedConfig, data: Path | None, device: torch.device, state: dict[str, Any] | None, with_peers: bool
) -> list[str]:
    """What a reader must know to weigh the figures."""
    notes = list(state["warnings"]) if state else []
    if device.type == "cpu":
        notes.append("measured on a CPU: the ratio is reported without a bound, and says nothing of a GPU")
    if data is None:
        notes.append("no real images: give --data for them")
    peak, why = peak_flops_per_s(device, speed.precision)
    notes.append(f"MFU against {why}" if peak else f"no MFU: {why}")
    missing = EnergyMeter.of(device).missing
    if missing:
        notes.append(f"no energy: {missing}")
    if with_peers:
        notes.append(
            "the peers get the same crops and our augmentation, so only their loop is compared; with their own "
            "augmentation they would be slower"
        )
    return notes


def train_time_markdown(document: dict[str, Any], command: str | None = None) -> str:
    """The document of `bench_train_time` as a page: setting, notes, measurements, ratios."""
    rows, notes = document["rows"], list(document["notes"])
    if document["gpu_after"] is not None:
        gpu = document["gpu_after"]
        notes.append(
            f"{gpu['name']}, driver {gpu['driver']}, SM clock {gpu['sm_clock_mhz']} of {gpu['max_sm_clock_mhz']} MHz "
            f"and {gpu['temperature_c']} °C right after the last step, power limit {gpu['power_limit_w']} W"
        )
    table = table_of(
        rows,
        {
            "method": lambda row: _title(document, row["method"]),
            "data": lambda row: str(row["data"]),
            "images/s": lambda row: spread(row, "images_per_s"),
            "step, ms": lambda row: spread(row, "step_ms"),
            "MFU": lambda row: percent(row["mfu"]),
            "data wait": lambda row: percent(row["data_wait_fraction"]),
            "peak memory, GiB": lambda row: number(row["peak_memory_gib"]),
            "kWh per million images": lambda row: number(row["energy_per_million_images_kwh"], 2),
        },
    )
    titles = [_title(document, name) for name in document["compared"]]
    return bench_page(
        f"{' next to '.join(titles)}: training time",
        f"Setting: {document['header']}",
        table,
        rounds=f"{len(rows[0]['rounds_step_ms'])} interleaved rounds of {document['rounds']['steps']} steps each.",
        command=command,
        notes=notes,
        remarks=[*_ratio_lines(document, titles), *_bottleneck_lines(document)],
    )


def _ratio_lines(document: dict[str, Any], titles: Sequence[str]) -> list[str]:
    """The ratios as sentences, with their intervals."""
    lines = []
    for data in ("synthetic", "real"):
        ratio = document[f"ratio_{data}"]
        if ratio is not None:
            lines.append(f"step time {' / '.join(titles)}, {data} images: {interval(ratio)}")
        for peer, speedup in document["speedups"].get(data, {}).items():
            ours = _title(document, document["peer_of"][peer])
            if speedup is not None:
                lines.append(f"our {ours} over {peer}, {data} images: {interval(speedup)} times as fast")
    return lines


def _bottleneck_lines(document: dict[str, Any]) -> list[str]:
    """What our methods waited for with real images, as sentences."""
    rates = {(row["method"], row["data"]): row["images_per_s"] for row in document["rows"]}
    lines = []
    for row in document["rows"]:
        if row["data"] != "real" or row["method"] not in document["titles"]:
            continue
        found = find_bottleneck(
            row["data_wait_fraction"],
            loader=row["loader"],
            on_cpu=document["environment"]["device"] == "cpu",
            real_images_per_s=row["images_per_s"],
            synthetic_images_per_s=rates.get((row["method"], "synthetic")),
        )
        if found is not None:
            lines.append(f"{_title(document, row['method'])}, real images: {found}")
    return lines


def _title(document: dict[str, Any], method: str) -> str:
    """The name of a method for people; a peer's own."""
    return document["titles"].get(method, method)
