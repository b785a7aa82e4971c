"""Our converter against FFCV's DatasetWriter and webdataset's ShardWriter: `python -m benchmarks.convert --help`.

All convert the same images, on the same disk, one after the other in every round, in a process of their own; the order
within a round rotates. Ratios are of neighbours in a round. Written to `--out`: NAME.json (all times, command,
environment), NAME.md (the table) and NAME.log (what was printed on the way).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

WRITERS: dict[str, Callable[[str, Path, int], None]] = {}
PEERS = {
    "ffcv --check header": "FFCV DatasetWriter, jpg",
    "ffcv --check decode": "FFCV DatasetWriter, jpg",
    "ffcv --mode reencode": "FFCV DatasetWriter, jpg",
    "webdataset --check header": "webdataset ShardWriter",
}
"""Ours → what it is compared with."""


def writer(name: str) -> Callable[[Callable[[str, Path, int], None]], Callable[[str, Path, int], None]]:
    """Registers a function (folder of images, folder to write into, workers) that converts them."""

    def register(function: Callable[[str, Path, int], None]) -> Callable[[str, Path, int], None]:
        WRITERS[name] = function
        return function

    return register


def _ours(source: str, out: Path, workers: int, **options: Any) -> None:
    from dataset_tools.conversion.convert import convert
    from dataset_tools.conversion.options import ConvertOptions

    convert(source, out / "converted", ConvertOptions(**options), workers=workers)


@writer("ffcv --check header")
def _ffcv_header(source: str, out: Path, workers: int) -> None:
    _ours(source, out, workers, format="ffcv", max_side=0)


@writer("ffcv --check decode")
def _ffcv_decode(source: str, out: Path, workers: int) -> None:
    _ours(source, out, workers, format="ffcv", max_side=0, check="decode")


@writer("ffcv --mode reencode")
def _ffcv_reencode(source: str, out: Path, workers: int) -> None:
    _ours(source, out, workers, format="ffcv", max_side=0, mode="reencode")


@writer("webdataset --check header")
def _webdataset_header(source: str, out: Path, workers: int) -> None:
    _ours(source, out, workers, format="webdataset")


@writer("FFCV DatasetWriter, jpg")
def _ffcv_own(source: str, out: Path, workers: int) -> None:
    """As FFCV's ImageNet example: torchvision's ImageFolder, write_mode jpg, quality 90, no resizing."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(str(out / "train.beton"), fields, num_workers=workers).from_indexed_dataset(ImageFolder(source))


@writer("webdataset ShardWriter")
def _webdataset_own(source: str, out: Path, workers: int) -> None:
    """Its one process copies the files as they are, in a shuffled order, as ours does."""
    import numpy as np
    from torchvision.datasets import ImageFolder
    from webdataset import ShardWriter

    samples = ImageFolder(source).samples
    with ShardWriter(str(out / "train-%06d.tar"), maxsize=256 << 20, maxcount=1 << 30, verbose=0) as shards:
        for key, index in enumerate(np.random.default_rng(0).permutation(len(samples))):
            path, label = samples[index]
            shards.write({"__key__": f"{key:09}", "jpg": Path(path).read_bytes(), "cls": label})


@dataclass(frozen=True, kw_only=True)
class ConvertBenchmark:
    """Our converter against FFCV's and webdataset's."""

    data: Path
    """A tar of JPEGs in class folders, or such a folder."""
    copies: int = 10
    """Every image this many times (hard links)."""
    rounds: int = 9
    workers: int = len(os.sched_getaffinity(0))
    name: str = "convert_cpu"
    """Of the result files."""
    data_label: str = ""
    """What the result files call the data, where its path should not stand in them."""
    scratch: Path | None = None
    """A folder on the disk to use; the one for temporary files if not given."""
    out: Path = Path("benchmarks/results")

    def run(self) -> None:
        """Measure, and write the three files after every round."""
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            os.environ["LEOCLR_CACHE"] = str(Path(folder) / "cache")
            source = Path(folder) / "images"
            images, num_bytes = _write_copies(self.data, source, self.copies)
            seconds: dict[str, list[float]] = {name: [] for name in WRITERS}
            log: list[str] = [f"{images:,} images, {num_bytes / 1e6:,.1f} MB, {self.workers} workers"]
            names = list(WRITERS)
            for number in range(self.rounds + 1):
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    taken = _measure(name, str(source), Path(folder) / "out", self.workers)
                    log.append(
                        f"round {number}{' (warm-up, not counted)' if number == 0 else ''}: {name}: {taken:.2f} s"
                    )
                    print(log[-1], flush=True)
                    if number:
                        seconds[name].append(taken)
                if number:
                    self._write(images, num_bytes, seconds, log)
        print((self.out / f"{self.name}.md").read_text())

    def _write(self, images: int, num_bytes: int, seconds: dict[str, list[float]], log: list[str]) -> None:
        rates = {name: [images / taken for taken in values] for name, values in seconds.items()}
        ratios = {
            ours: [theirs / mine for mine, theirs in zip(seconds[ours], seconds[peer], strict=True)]
            for ours, peer in PEERS.items()
        }
        arguments = [argument.replace(str(self.data), self.data_label or str(self.data)) for argument in sys.argv[1:]]
        packages = ("ffcv", "webdataset", "torchvision", "pillow", "opencv-python", "numpy")
        document = {
            "command": shlex.join(["python", "-m", "benchmarks.convert", *arguments]),
            "images": images,
            "bytes": num_bytes,
            "workers": self.workers,
            "rounds": len(next(iter(seconds.values()))),
            "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "kernel": platform.release()},
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
            "seconds": seconds,
            "images_per_s": {name: _quantiles(values) for name, values in rates.items()},
            "ratios": {f"{ours} / {PEERS[ours]}": _quantiles(values) for ours, values in ratios.items()},
        }
        (self.out / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n")
        (self.out / f"{self.name}.md").write_text(_table(document))
        (self.out / f"{self.name}.log").write_text("\n".join(log) + "\n")


def _measure(name: str, source: str, out: Path, workers: int) -> float:
    """Seconds that one writer takes, imports not counted, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    ours, theirs = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_timed, args=(name, source, out, workers, theirs))
    process.start()
    theirs.close()
    try:
        taken: float = ours.recv()
    except EOFError as error:
        raise RuntimeError(f"{name} failed") from error
    process.join()
    shutil.rmtree(out)
    os.sync()  # what this one left to write is not the next one's
    return taken


def _timed(name: str, source: str, out: Path, workers: int, connection: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)  # FFCV's workers start as in a program of its user's
    import torchvision.datasets  # noqa: F401 - so that no writer pays for it

    _read_all(source)
    if name == "FFCV DatasetWriter, jpg":
        import ffcv.writer  # noqa: F401
    elif name == "webdataset ShardWriter":
        import webdataset  # noqa: F401
    else:
        import dataset_tools.conversion.convert  # noqa: F401
    began = time.perf_counter()
    WRITERS[name](source, out, workers)
    connection.send(time.perf_counter() - began)


def _read_all(source: str) -> None:
    """Into the page cache: all writers find the images there."""
    for path in Path(source).glob("*/*"):
        path.read_bytes()


def _write_copies(data: Path, source: Path, copies: int) -> tuple[int, int]:
    """An ImageFolder with every image `copies` times; returns how many images and bytes that are."""
    from dataset_tools.sources import open_source

    split = next(iter(open_source(data).splits.values()))
    num_bytes = 0
    for index, name in enumerate(split.names):
        content = split.read(index)
        folder = source / split.classes[split.labels[index]]
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / f"0_{Path(name).name}"
        first.write_bytes(content)
        for copy in range(1, copies):
            os.link(first, folder / f"{copy}_{Path(name).name}")
        num_bytes += copies * len(content)
    return copies * len(split), num_bytes


def _table(document: dict[str, Any]) -> str:
    size = f"{document['images']:,} JPEGs ({document['bytes'] / 1e6:,.0f} MB)"
    lines = [
        f"# Conversion of {size}, {document['workers']} workers",
        "",
        f"`{document['command']}`; {document['machine']['cpu']}, {document['machine']['cores']} cores, no GPU; "
        + ", ".join(f"{name} {value}" for name, value in document["versions"].items())
        + ".",
        "",
        f"Median [20 %, 80 %] of {document['rounds']} interleaved rounds, images in the page cache. Ours are synced to "
        "the disk, hashed and journaled when the clock stops; the peers' bytes are with the system.",
        "",
        "| writer | images/s | times as fast as its peer |",
        "|---|---|---|",
    ]
    for name, rate in document["images_per_s"].items():
        peer = PEERS.get(name)
        ratio = document["ratios"].get(f"{name} / {peer}")
        cell = f"{ratio['median']:.2f} [{ratio['q20']:.2f}, {ratio['q80']:.2f}] × {peer}" if ratio else ""
        ours = f"ours, `{name}`" if peer else name
        lines.append(f"| {ours} | {rate['median']:,.0f} [{rate['q20']:,.0f}, {rate['q80']:,.0f}] | {cell} |")
    return "\n".join(lines) + "\n"


def _quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"median": values[0], "q20": values[0], "q80": values[0]}
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "q20": fifths[0], "q80": fifths[3]}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "none"


if __name__ == "__main__":
    tyro.cli(ConvertBenchmark).run()
