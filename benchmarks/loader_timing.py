"""How fast images come: our loaders beside those of others, interleaved, each in a process of its own.
`python -m benchmarks.loader_timing --help`
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from msgspec import Meta

from benchmarks.baselines.loaders import LOADERS
from benchmarks.loader_implementations import (
    CEILINGS,
    OURS,
    SHOWING_NO_IMAGES,
    Epochs,
    LoaderTask,
    TimedEpoch,
)
from benchmarks.processes import OwnProcess, ProcessUse, process_use
from benchmarks.results import print_document
from dataset_tools.limits import Count, CountOrZero, Limited, unknown
from dataset_tools.sources import open_source
from dataset_tools.splits import choose_splits
from dataset_tools.subsets import limited
from leoclr_fast.bench.page import bench_page, number, percent, spread, table_of
from leoclr_fast.bench.setting import bench_device
from leoclr_fast.bench.statistics import quantiles
from leoclr_fast.bench.timing import Say, interleaved
from leoclr_fast.config_file import as_plain
from leoclr_fast.machine.gpu_state import gpu_state
from leoclr_fast.run.environment import environment
from pipelines.threads import available_cores


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderBenchConfig(Limited):
    """Which loaders are compared, at which task, and how long."""

    loaders: tuple[str, ...] = ()
    """Of --loader, or stock-torchvision, stock-ffcv, stock-dali. By default those that can run here."""
    views: Annotated[int, Meta(ge=2, le=3)] = 3
    """Of each image: 3 are LeOCLR's, 2 MoCo-v2's."""
    image_size: Count = 224
    """Side of a view, pixels."""
    batch_size: Count = 64
    rounds: Count = 7
    """Timed epochs of each loader, after one that is not counted."""
    max_images: Count | None = None
    """At most so many images an epoch, a class-balanced choice."""
    workers: CountOrZero | None = None
    """Threads or worker processes of each loader; by default one for each core."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""


@dataclass(slots=True)
class _Measured:
    """A loader in its process, and what it has done so far."""

    process: OwnProcess
    epochs: list[TimedEpoch] = field(default_factory=list)
    uses: list[tuple[ProcessUse, ProcessUse]] = field(default_factory=list)
    """Before and after each epoch."""
    device_bytes: int | None = None


def bench_loader(config: LoaderBenchConfig, data: Sequence[Path], say: Say = lambda _: None) -> dict[str, Any]:
    """Time loaders on the images of ``data``: the same images in one or several formats.

    Returns a JSON document: task, environment, gpu, notes, `ceilings` and `rows`, each with loader, images_per_s (with
    its quantiles over the epochs), decodes_per_image, cpu_cores (CPU time over wall time, worker processes included),
    peak_rss_gib, device_memory_gib (None on a CPU), bytes_read_per_image (by system calls) and the rates of all epochs.
    Raises ValueError for data or settings that cannot be, RuntimeError if no loader can run, or one of
    ``config.loaders`` cannot.
    """
    if not data:
        raise ValueError("timing loaders needs images: give --data PATH [PATH …]")
    makers = OURS | LOADERS
    for name in config.loaders:
        if name not in makers:
            raise ValueError(unknown("loader", name, makers))
    device = bench_device(config.device)
    for path in data:
        num_images = len(limited(choose_splits(open_source(path)).pretrain, config.max_images))
        if num_images < config.batch_size:
            raise ValueError(
                f"{path} has {num_images} images, fewer than one batch of {config.batch_size}; lower --batch-size"
            )
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
    notes.append("images lie in the page cache after the first epoch; nothing is augmented")
    names = config.loaders or [name for name in makers if name not in SHOWING_NO_IMAGES]
    with ExitStack() as stack:
        ceilings = _started(CEILINGS, task, stack, notes, say)
        loaders = _started(
            {name: makers[name] for name in names}, task, stack, notes, say, required=bool(config.loaders)
        )
        if not loaders:
            raise RuntimeError(f"no loader can run here: {'; '.join(notes)}")
        measured = ceilings | loaders
        for round_number, name in interleaved(list(measured), config.rounds):
            _measure_epoch(measured[name], device)
            say(f"round {round_number + 1} of {config.rounds}: {name}")
        rows = [_row(name, own) for name, own in loaders.items()]
        return {
            "task": f"{config.views} views of {config.image_size} px, batches of {config.batch_size}, {task.workers} "
            f"workers, {device}; one epoch: {rows[0]['images']:,} images",
            "config": as_plain(config),
            "environment": environment(device, 1),
            "gpu": state,
            "notes": notes,
            "ceilings": [_row(name, own) for name, own in ceilings.items()],
            "rows": sorted(rows, key=lambda row: -row["images_per_s"]),
        }


def loader_markdown(document: dict[str, Any], command: str | None = None) -> str:
    decode = next((row["images_per_s"] for row in document["ceilings"] if row["loader"] == "decode-only"), None)
    rows: list[dict[str, Any]] = [*document["ceilings"], *document["rows"]]
    table = table_of(
        rows,
        {
            "loader": lambda row: row["loader"] + (" (ceiling)" if row in document["ceilings"] else ""),
            "images/s": lambda row: spread(row, "images_per_s", 0),
            "of the decoding alone": lambda row: percent(row["images_per_s"] / decode if decode else None, 0),
            "decodes per image": lambda row: number(row["decodes_per_image"], 2),
            "CPU cores": lambda row: number(row["cpu_cores"], 2),
            "peak RSS, GiB": lambda row: number(row["peak_rss_gib"], 2),
            "device memory, GiB": lambda row: number(row["device_memory_gib"], 2),
            "kB read per image": lambda row: number(row["bytes_read_per_image"] / 1000, 1),
        },
    )
    return bench_page(
        "Loaders",
        document["task"],
        table,
        rounds=f"{document['config']['rounds']} interleaved epochs.",
        command=command,
        notes=document["notes"],
    )


def _started(
    makers: Mapping[str, Callable[[LoaderTask], Epochs]],
    task: LoaderTask,
    stack: ExitStack,
    notes: list[str],
    say: Say,
    *,
    required: bool = False,
) -> dict[str, _Measured]:
    """Those of the loaders that can run, warm: each has gone through an epoch. The others get a note.

    Raises RuntimeError for one that cannot run and is ``required``.
    """
    started: dict[str, _Measured] = {}
    for name, make in makers.items():
        process = OwnProcess(name, partial(make, task))
        stack.callback(process.close)
        try:
            epoch: TimedEpoch = process.next()
        except RuntimeError as error:
            process.close()
            reason = str(error).strip().splitlines()[-1]
            if required:
                raise RuntimeError(f"the loader {name} cannot run: {reason}") from error
            notes.append(f"{name} did not run: {reason}")
            say(notes[-1])
            continue
        started[name] = _Measured(process)
        say(f"{name} is warm: {epoch.images / epoch.seconds:,.0f} images/s")
    return started


def _measure_epoch(own: _Measured, device: torch.device) -> None:
    before = process_use(own.process.pid)
    own.epochs.append(own.process.next())
    own.uses.append((before, process_use(own.process.pid)))
    if device.type == "cuda":
        own.device_bytes = max(own.device_bytes or 0, _device_bytes(own.process.pid) or 0) or None


def _row(name: str, own: _Measured) -> dict[str, Any]:
    rates = [epoch.images / epoch.seconds for epoch in own.epochs]
    images = sum(epoch.images for epoch in own.epochs)
    cpu_s = [after.cpu_s - before.cpu_s for before, after in own.uses]
    cores = [taken / epoch.seconds for taken, epoch in zip(cpu_s, own.epochs, strict=True)]
    return {
        "loader": name,
        "images": own.epochs[0].images,
        **quantiles("images_per_s", rates),
        "decodes_per_image": sum(epoch.decodes for epoch in own.epochs) / images,
        "cpu_cores": statistics.median(cores),
        "peak_rss_gib": max(after.memory_bytes for _, after in own.uses) / 2**30,
        "device_memory_gib": None if own.device_bytes is None else own.device_bytes / 2**30,
        "bytes_read_per_image": sum(after.read_bytes - before.read_bytes for before, after in own.uses) / images,
        "rounds_images_per_s": rates,
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


@dataclass(frozen=True, kw_only=True)
class LoaderTiming:
    """Time our loaders beside torchvision's, FFCV's and DALI's own, interleaved, each in a process of its own."""

    data: tuple[Path, ...]
    """The same images in one or several formats, such as an image folder and a .beton made of it: FFCV reads the one,
    DALI's own reader the other."""
    config: Annotated[LoaderBenchConfig, tyro.conf.arg(name="")] = field(default_factory=LoaderBenchConfig)

    def run(self) -> None:
        print_document(bench_loader(self.config, self.data, print), loader_markdown)


if __name__ == "__main__":
    tyro.cli(LoaderTiming).run()
