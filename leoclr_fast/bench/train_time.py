"""What LeOCLR costs next to MoCo-v2: both train in turns, in one process, on the same loader. Table 7 of the paper."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import leoclr_fast
from leoclr_fast.bench.contestant import Contestant, OurMethod
from leoclr_fast.bench.feeds import open_feeds, training_images
from leoclr_fast.bench.projection import FORMULA, ProjectionConfig, project
from leoclr_fast.bench.setting import BenchSetting, bench_device, departures_from_paper, setting_header
from leoclr_fast.bench.statistics import median_interval, quantiles
from leoclr_fast.bench.turns import Prepared, Turn, prepare, take_turns
from leoclr_fast.bench.turns_config import TurnsConfig
from leoclr_fast.config import SpeedConfig
from leoclr_fast.config_file import as_plain
from leoclr_fast.machine.energy import EnergyMeter
from leoclr_fast.machine.gpu_state import gpu_state
from leoclr_fast.method.flops import mfu, peak_flops_per_s
from leoclr_fast.method.methods import METHODS
from leoclr_fast.run.environment import environment
from pipelines.config import LoaderConfig
from pipelines.factory import shows_images

Say = Callable[[str], None]
Peer = Callable[[BenchSetting, SpeedConfig, torch.device], Contestant]

_KWH_PER_J = 1 / 3.6e6
_PEERS_MODULE = "benchmarks.baselines"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTimeConfig:
    """What is measured, on what, and what is projected from it."""

    setting: BenchSetting = field(default_factory=BenchSetting)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    peers: bool = False
    """Whether the two baselines of `benchmarks.baselines` take part."""
    max_images: int | None = None
    """At most so many real images, a class-balanced choice."""


def bench_train_time(config: TrainTimeConfig, data: Path | None, say: Say = lambda _: None) -> dict[str, Any]:
    """Time LeOCLR and MoCo-v2, and the peers if wanted, on synthetic images and on those of `data`, if given.

    Returns a JSON document: header, setting, environment, `gpu` and `gpu_after` (its state before the first and after
    the last step), notes, and
    `rows`, one for each method and data: method, data, images_per_s, step_ms, both with q20 and q80, mfu,
    data_wait_fraction, peak_memory_gib, energy_per_million_images_kwh, the step times of all turns;
    `ratio_synthetic` and `ratio_real`: LeOCLR's step time over MoCo-v2's in the pairs of a round, as median, low and
    high of its 95 % bootstrap interval; None without such data;
    `speedups` of our MoCo-v2 over each peer, and `projection`.
    Raises ValueError for a setting that cannot be, for data that cannot be read, or without the folder of the peers.
    """
    start = time.perf_counter()
    device = bench_device(config.speed)
    results = {name: config.setting.result(name) for name in ("leoclr", "mocov2")}
    state = gpu_state(device)
    header = setting_header(results["leoclr"], config.speed, device)
    say(header)
    notes = _notes(config, data, device, state)
    for note in notes:
        say(note)

    makers: dict[str, Callable[[], Contestant]] = {
        name: partial(OurMethod, name, config.setting, config.speed, device) for name in results
    }
    if config.peers:
        makers |= {name: partial(peer, config.setting, config.speed, device) for name, peer in load_peers().items()}

    splits = {"synthetic": training_images(None, results["leoclr"])}
    if data is not None:
        if not shows_images(config.speed.loader):
            raise ValueError(
                f"--data with the loader {config.speed.loader.name} would never read the images; choose another "
                "--loader, or leave --data out: synthetic images are always timed"
            )
        splits["real"] = training_images(data, results["leoclr"], config.max_images)
    prepared: list[Prepared] = []
    rows: list[dict[str, Any]] = []
    for number, (kind, split) in enumerate(splits.items()):
        loader = LoaderConfig(name="synthetic") if kind == "synthetic" else config.speed.loader
        with ExitStack() as stack:
            recipes = [method.views for method in METHODS.values()]
            feeds, loader_name = stack.enter_context(open_feeds(split, recipes, results["leoclr"], loader, device))
            if not prepared:
                for name, make in makers.items():
                    entrant = _prepared_or_none(name, make, feeds, device, config, notes, say)
                    prepared += [entrant] if entrant else []
            say(f"{kind} images, loader {loader_name}")
            contestants = [entrant.contestant for entrant in prepared]
            left_s = config.turns.max_s - (time.perf_counter() - start)
            max_s = max(1.0, left_s / (len(splits) - number))
            turns = take_turns(contestants, feeds, device, replace(config.turns, max_s=max_s), say)
        rows += [
            _row(entrant, kind, own, results["leoclr"].batch_size, device, config.speed.precision)
            | {"loader": loader_name}
            for entrant, own in zip(prepared, turns, strict=True)
        ]

    return {
        "header": header,
        "paper_setting": not departures_from_paper(results["leoclr"]),
        "setting": {name: as_plain(result) for name, result in results.items()},
        "speed": as_plain(config.speed),
        "turns": as_plain(config.turns),
        "environment": environment(device, 1),
        "gpu": state,
        "gpu_after": gpu_state(device),
        "notes": notes,
        "flops_per_image": {entrant.contestant.name: entrant.contestant.flops_per_image for entrant in prepared},
        "rows": rows,
        "ratio_synthetic": step_time_ratio(rows, "synthetic", "leoclr", "mocov2"),
        "ratio_real": step_time_ratio(rows, "real", "leoclr", "mocov2"),
        "speedups": {
            kind: {
                entrant.contestant.name: step_time_ratio(rows, kind, entrant.contestant.name, "mocov2")
                for entrant in prepared
                if entrant.contestant.name not in results
            }
            for kind in dict.fromkeys(row["data"] for row in rows)
        },
        "projection": _projection(rows, config.projection),
    }


def load_peers() -> dict[str, Peer]:
    """The baselines to run beside ours, by name, from the folder `benchmarks/baselines` of a checkout.

    It is found at run time, since it lies above this package in the order of imports.
    Raises ValueError where this package was not started from a checkout.
    """
    checkout = Path(leoclr_fast.__file__).parent.parent
    if not (checkout / "benchmarks" / "baselines").is_dir():
        raise ValueError(
            "--peers needs the folder benchmarks/baselines, which is not part of the installed package; clone the "
            "repository and run it from there"
        )
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    peers: dict[str, Peer] = importlib.import_module(_PEERS_MODULE).PEERS
    return peers


def step_time_ratio(rows: Sequence[dict[str, Any]], data: str, above: str, below: str) -> dict[str, float] | None:
    """Step time of `above` over that of `below`, turn by turn: median, low and high of its 95 % bootstrap interval.

    None if one of them was not measured on this data.
    """
    times = {row["method"]: row["turns_step_ms"] for row in rows if row["data"] == data}
    if above not in times or below not in times:
        return None
    return median_interval([high / low for high, low in zip(times[above], times[below], strict=True)])


def _prepared_or_none(
    name: str,
    make: Callable[[], Contestant],
    feeds: Any,
    device: torch.device,
    config: TrainTimeConfig,
    notes: list[str],
    say: Say,
) -> Prepared | None:
    """A contestant, warm; None, and a note, for a peer that cannot run here."""
    say(f"preparing {name}")
    try:
        return prepare(make, feeds, device, config.turns.warmup_steps)
    except (ImportError, ValueError, torch.OutOfMemoryError) as error:
        if name in ("leoclr", "mocov2"):
            raise
        torch.cuda.empty_cache()
        notes.append(f"{name} did not run: {str(error).splitlines()[0]}")
        say(notes[-1])
        return None


def _row(
    entrant: Prepared, data: str, turns: Sequence[Turn], batch_size: int, device: torch.device, precision: str
) -> dict[str, Any]:
    step_ms = quantiles([turn.step_ms for turn in turns])
    rate = quantiles([batch_size * turn.steps / turn.seconds for turn in turns])
    images = batch_size * sum(turn.steps for turn in turns)
    joules = [turn.energy_j for turn in turns if turn.energy_j is not None]
    energy_kwh = sum(joules) / images * 1e6 * _KWH_PER_J if len(joules) == len(turns) else None
    peak, _ = peak_flops_per_s(device, precision)
    return {
        "method": entrant.contestant.name,
        "data": data,
        "images_per_s": rate["median"],
        "images_per_s_q20": rate["q20"],
        "images_per_s_q80": rate["q80"],
        "step_ms": step_ms["median"],
        "step_ms_q20": step_ms["q20"],
        "step_ms_q80": step_ms["q80"],
        "mfu": mfu(entrant.contestant.flops_per_image, rate["median"], peak),
        "data_wait_fraction": sum(turn.data_wait_s for turn in turns) / sum(turn.seconds for turn in turns),
        "peak_memory_gib": entrant.peak_memory_gib,
        "energy_per_million_images_kwh": energy_kwh,
        "turns_step_ms": [turn.step_ms for turn in turns],
    }


def _notes(config: TrainTimeConfig, data: Path | None, device: torch.device, state: dict[str, Any] | None) -> list[str]:
    """What a reader must know to judge the figures."""
    notes = list(state["warnings"]) if state else []
    if device.type == "cpu":
        notes.append("measured on a CPU: the ratio is reported without a bound, and says nothing of a GPU")
    if data is None:
        notes.append("no real images: give --data for them")
    peak, why = peak_flops_per_s(device, config.speed.precision)
    notes.append(f"MFU against {why}" if peak else f"no MFU: {why}")
    missing = EnergyMeter.of(device).missing
    if missing:
        notes.append(f"no energy: {missing}")
    if config.peers:
        notes.append(
            "the peers get the same crops and our augmentation, so only their loop is compared; with their own "
            "augmentation they would be slower"
        )
    return notes


def _projection(rows: Sequence[dict[str, Any]], config: ProjectionConfig) -> dict[str, Any]:
    """Of every row, under the assumptions of `config`."""
    projected = []
    for row in rows:
        energy_kwh = row["energy_per_million_images_kwh"]
        energy_j = None if energy_kwh is None else energy_kwh / _KWH_PER_J / 1e6
        projected.append(
            {"method": row["method"], "data": row["data"], **project(config, row["images_per_s"], energy_j)}
        )
    return {"what": "a projection, not a measurement", "formula": FORMULA, **as_plain(config), "rows": projected}
