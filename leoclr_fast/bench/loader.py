"""How fast images come: our loaders beside what people use instead, in turns, each in a process of its own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dataset_tools.sources import open_source
from dataset_tools.splits import choose_splits
from dataset_tools.subsets import limited
from leoclr_fast.bench.loader_contestants import CEILINGS, STOCK, LoaderTask, LoaderTurn, ours
from leoclr_fast.bench.own_process import OwnProcess
from leoclr_fast.bench.process_use import process_use
from leoclr_fast.bench.setting import require_one_process
from leoclr_fast.bench.statistics import quantiles
from leoclr_fast.bench.tables import markdown_table, number, percent, spread
from leoclr_fast.config_file import as_plain
from leoclr_fast.distributed.process_group import resolve_device
from leoclr_fast.machine.gpu_state import gpu_state
from leoclr_fast.method.methods import method_class
from leoclr_fast.run.environment import environment
from leoclr_fast.run.folder import RunFolder
from pipelines.config import LoaderConfig
from pipelines.factory import LOADERS, settle_loader, shows_images
from pipelines.threads import available_cores

Say = Callable[[str], None]

CONTESTANTS = (*LOADERS, *STOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderBenchConfig:
    """What is compared, and how long."""

    loaders: tuple[str, ...] = ()
    """Names of --loader, stock-torchvision, stock-ffcv and stock-dali; by default all that can run here."""
    views: int = 3
    """Of each image: 3 are LeOCLR's, 2 MoCo-v2's."""
    image_size: int = 224
    """Side of a view, pixels."""
    batch_size: int = 64
    rounds: int = 7
    """Turns of each contestant, after one that is not counted. A turn is one epoch."""
    max_images: int | None = None
    """At most so many images an epoch, a class-balanced choice."""
    workers: int | None = None
    """Threads or worker processes of each contestant; by default one for each core."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.views not in (2, 3):
            raise ValueError(f"{self.views} views are not allowed: give 3 (LeOCLR) or 2 (MoCo-v2)")
        for name in ("image_size", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not allowed: give at least 1")
        for name in self.loaders:
            if name not in CONTESTANTS:
                nearest = difflib.get_close_matches(name, CONTESTANTS, n=2)
                hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
                raise ValueError(f"there is no loader {name!r}.{hint} Allowed: {', '.join(CONTESTANTS)}.")


@dataclass(slots=True)
class _Seat:
    """A contestant and what it has done so far."""

    process: OwnProcess
    turns: list[LoaderTurn] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    bytes_read: list[int] = field(default_factory=list)
    memory_bytes: int = 0
    device_bytes: int | None = None


def bench_loader(config: LoaderBenchConfig, data: Sequence[Path], say: Say = lambda _: None) -> dict[str, Any]:
    """Time loaders on the images of ``data``: the same images in one or several formats.

    Returns a JSON document: task, environment, gpu, notes, `ceilings` and `rows`, each with loader, images_per_s
    (median of the turns, with q20 and q80), decodes_per_image, cpu_cores (CPU time over wall time, worker processes
    included), peak_rss_gib, device_memory_gib (None on a CPU), bytes_read_per_image (by system calls) and the rates of
    all turns. Raises ValueError for data or settings that cannot be, RuntimeError if no contestant can run, or one of
    ``config.loaders`` cannot.
    """
    require_one_process()
    for path in data:
        num_images = len(limited(choose_splits(open_source(path)).pretrain, config.max_images))
        if num_images < config.batch_size:
            raise ValueError(
                f"{path} has {num_images} images, fewer than one batch of {config.batch_size}; lower --batch-size"
            )
    device = resolve_device(config.device)
    task = LoaderTask(
        data=tuple(data),
        views=config.views,
        image_size=config.image_size,
        batch_size=config.batch_size,
        workers=available_cores() if config.workers is None else config.workers,
        device=str(device),
        max_images=config.max_images,
    )
    state = gpu_state(device)
    notes = list(state["warnings"]) if state else ["measured on a CPU, which says nothing of a GPU"]
    notes.append("images lie in the page cache after the first turn; nothing is augmented")
    with ExitStack() as stack:
        ceilings = _seated({name: partial(turns, task) for name, turns in CEILINGS.items()}, stack, notes, say)
        seats = _seated(_makers(config, task), stack, notes, say, required=bool(config.loaders))
        if not seats:
            raise RuntimeError(f"no loader can run here: {'; '.join(notes)}")
        everyone = ceilings | seats
        names = list(everyone)
        for number_ in range(config.rounds):
            for name in names[number_ % len(names) :] + names[: number_ % len(names)]:
                _take_turn(everyone[name], device)
            say(f"round {number_ + 1} of {config.rounds}")
        rows = [_row(name, seat) for name, seat in seats.items()]
        return {
            "task": f"{config.views} views of {config.image_size} px, batches of {config.batch_size}, {task.workers} "
            f"workers, {device}; one turn: {rows[0]['images']:,} images",
            "config": as_plain(config),
            "environment": environment(device, 1),
            "gpu": state,
            "notes": notes,
            "ceilings": [_row(name, seat) for name, seat in ceilings.items()],
            "rows": sorted(rows, key=lambda row: -row["images_per_s"]),
        }


def as_run_loads(folder: RunFolder, config: LoaderBenchConfig) -> tuple[LoaderBenchConfig, Path]:
    """``config`` with the views, the image size, the loader and each rank's share of the batch of a run; its images.

    Raises FileNotFoundError if there is no run, or if it does not say what it was trained on.
    """
    run = folder.read_config()
    try:
        data = Path(json.loads(folder.data_file.read_text())["path"])
        world_size = int(json.loads(folder.environment_file.read_text())["world_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileNotFoundError(
            f"{folder.path} does not say on which images it was trained ({error}); give --data PATH instead"
        ) from error
    max_images = run.result.max_images if config.max_images is None else config.max_images
    split = limited(choose_splits(open_source(data)).pretrain, max_images)
    loader = settle_loader(split, run.speed.loader, resolve_device(config.device))
    as_there = replace(
        config,
        loaders=(loader.name,),
        views=len(method_class(run.result.method.name).views),
        image_size=run.result.views.image_size,
        batch_size=-(-run.result.batch_size // world_size),
        max_images=max_images,
        workers=loader.workers if config.workers is None else config.workers,
    )
    return as_there, data


def loader_markdown(document: dict[str, Any], command: str | None = None) -> str:
    """The document of `bench_loader` as a page."""
    decode = next((row["images_per_s"] for row in document["ceilings"] if row["loader"] == "decode-only"), None)
    table = markdown_table(
        ("loader", "images/s", "of the decoding alone", "decodes per image", "CPU cores", "peak RSS, GiB",
         "device memory, GiB", "kB read per image"),
        [
            (
                row["loader"] + (" (ceiling)" if row in document["ceilings"] else ""),
                spread(row["images_per_s"], row["q20"], row["q80"], 0),
                percent(row["images_per_s"] / decode if decode else None, 0),
                number(row["decodes_per_image"], 2),
                number(row["cpu_cores"], 2),
                number(row["peak_rss_gib"], 2),
                number(row["device_memory_gib"], 2),
                number(row["bytes_read_per_image"] / 1000, 1),
            )
            for row in (*document["ceilings"], *document["rows"])
        ],
    )  # fmt: skip
    lines = ["# Loaders", "", f"{document['task']}.", ""]
    if command:
        lines += [f"`{command}`", ""]
    lines += [f"- {note}" for note in document["notes"]]
    lines += ["", f"Median [20 %, 80 %] of {document['config']['rounds']} interleaved turns.", ""]
    return "\n".join(lines) + "\n" + table


def _makers(config: LoaderBenchConfig, task: LoaderTask) -> dict[str, Callable[[], Iterator[LoaderTurn]]]:
    names = config.loaders or tuple(
        name for name in CONTESTANTS if name in STOCK or shows_images(LoaderConfig(name=name))
    )
    return {name: partial(STOCK[name], task) if name in STOCK else partial(ours, name, task) for name in names}


def _seated(
    makers: dict[str, Callable[[], Iterator[LoaderTurn]]],
    stack: ExitStack,
    notes: list[str],
    say: Say,
    *,
    required: bool = False,
) -> dict[str, _Seat]:
    """Those of the contestants that can run, warm: each has had a turn. The others get a note.

    Raises RuntimeError for one that cannot run and is ``required``.
    """
    seats: dict[str, _Seat] = {}
    for name, make in makers.items():
        process = OwnProcess(name, make, ())
        stack.callback(process.close)
        try:
            turn = process.turn()
        except RuntimeError as error:
            process.close()
            reason = str(error).strip().splitlines()[-1]
            if required:
                raise RuntimeError(f"the loader {name} cannot run: {reason}") from error
            notes.append(f"{name} did not run: {reason}")
            say(notes[-1])
            continue
        seats[name] = _Seat(process)
        say(f"{name} is warm: {turn.images / turn.seconds:,.0f} images/s")
    return seats


def _take_turn(seat: _Seat, device: torch.device) -> None:
    before = process_use(seat.process.pid)
    turn: LoaderTurn = seat.process.turn()
    after = process_use(seat.process.pid)
    seat.turns.append(turn)
    seat.cores.append((after.cpu_s - before.cpu_s) / turn.seconds)
    seat.bytes_read.append(after.read_bytes - before.read_bytes)
    seat.memory_bytes = max(seat.memory_bytes, after.memory_bytes)
    if device.type == "cuda":
        seat.device_bytes = max(seat.device_bytes or 0, _device_bytes(seat.process.pid) or 0) or None


def _row(name: str, seat: _Seat) -> dict[str, Any]:
    rates = [turn.images / turn.seconds for turn in seat.turns]
    images = sum(turn.images for turn in seat.turns)
    rate = quantiles(rates)
    return {
        "loader": name,
        "images": seat.turns[0].images,
        "images_per_s": rate["median"],
        "q20": rate["q20"],
        "q80": rate["q80"],
        "decodes_per_image": sum(turn.decodes for turn in seat.turns) / images,
        "cpu_cores": quantiles(seat.cores)["median"],
        "peak_rss_gib": seat.memory_bytes / 2**30,
        "device_memory_gib": None if seat.device_bytes is None else seat.device_bytes / 2**30,
        "bytes_read_per_image": sum(seat.bytes_read) / images,
        "turns_images_per_s": rates,
    }


def _device_bytes(pid: int) -> int | None:
    """What a process holds of the GPUs' memory, by NVML; None where that cannot be asked."""
    if find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        uses = [use for handle in handles for use in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except pynvml.NVMLError:
        return None
    return sum(use.usedGpuMemory or 0 for use in uses if use.pid == pid)
