"""What starts before a run's first batch of an ImageNet of full size: `python -m benchmarks.full_size --help`.

1,281,167 small JPEGs of 1,000 classes, made up, as a tar of tars, as a .beton that `convert` made of it, and as a
folder. The command is `pretrain`, up to the first batch that its loop is given; the network is narrow, the queue short,
and nothing is compiled.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import tyro
from PIL import Image

from benchmarks.results import Results, WritesResults, made_with
from leoclr_fast.bench.page import bench_page, markdown_table, spread
from leoclr_fast.bench.statistics import quantiles
from leoclr_fast.bench.timing import interleaved
from leoclr_fast.run.environment import environment

NUM_CLASSES, NUM_JPEGS = 1000, 400
LOADERS = {"tar": "dali", "beton": "ffcv", "folder": "torchvision"}
"""Of each kind of source, the loader that reads it here."""
OPTIONS = (
    *("--max-steps", "1", "--device", "cpu", "--compile", "off", "--monitor.knn", "off"),
    *("--backbone.arch", "resnet18", "--backbone.width-multiplier", "0.125", "--views.image-size", "32"),
    *("--method.queue-size", "1024", "--resume", "never"),
)
IMPORTS, FIRST_BATCH, REST, BEYOND = "imports", "first batch", "the rest", "beyond imports"
PARTS = {
    IMPORTS: "imports",
    "open_source": "opening the source",
    "choose_splits": "holding out 10 %",
    "require_same_everywhere": "comparing ranks (fingerprint)",
    "describe_data": "preview for the report",
    "make_loader": "opening the loader",
    FIRST_BATCH: "first batch, with what the loader compiles",
    REST: "the rest (network, run folder)",
    BEYOND: "**beyond imports**",
}


def start(arguments: Sequence[str]) -> NoReturn:
    """`pretrain` with these arguments, until the first batch has come; prints the parts as JSON, and ends there."""
    began, cpu = time.perf_counter(), time.process_time()
    seconds: dict[str, tuple[float, float]] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        part_began, part_cpu = time.perf_counter(), time.process_time()
        yield
        seconds[part] = time.perf_counter() - part_began, time.process_time() - part_cpu

    def wrapped(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with timed(name):
                return function(*args, **kwargs)

        setattr(owner, name, call)

    with timed(IMPORTS):
        from leoclr_fast.cli import run_command
        from leoclr_fast.training import setup
    make_loader = setup.make_loader
    for name in ("open_source", "choose_splits", "require_same_everywhere"):
        wrapped(setup, name)
    wrapped(setup.RunLog, "describe_data")

    def stopping(*args: Any, **kwargs: Any) -> Any:
        with timed("make_loader"):
            loader = make_loader(*args, **kwargs)
        batches = loader.batches

        def first_batch(*position: int) -> NoReturn:
            with timed(FIRST_BATCH):
                next(iter(batches(*position)))
            total = np.array([time.perf_counter() - began, time.process_time() - cpu])
            known = {part: np.array(taken) for part, taken in seconds.items()}
            known |= {REST: total - sum(known.values()), BEYOND: total - known[IMPORTS]}
            parts = {part: taken.tolist() for part, taken in known.items()}
            print(json.dumps({"seconds": parts, "memory": _memory_mib()}))
            sys.stdout.flush()
            loader.close()
            os._exit(0)

        loader.batches = first_batch  # type: ignore[method-assign,assignment]
        return loader

    setup.make_loader = stopping
    sys.exit(run_command(["pretrain", *arguments]))


def _memory_mib() -> dict[str, float]:
    """Of this process: `peak`, with the libraries' pages that other processes share, and what is `own`, now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) / 1024 for name, key in (("peak", "VmHWM"), ("own", "RssAnon"))}


def write_tar(path: Path, num_images: int) -> None:
    """A tar of one tar for each class, as ILSVRC2012_img_train.tar: the same few small JPEGs again and again."""
    jpegs = made_up_jpegs()
    with path.open("wb") as out:
        for number in range(NUM_CLASSES):
            wnid, inner = f"n{10_000_000 + number}", io.BytesIO()
            for image in range(number, num_images, NUM_CLASSES):
                jpeg = jpegs[image % len(jpegs)]
                inner.write(_header(f"{wnid}_{image}.JPEG", len(jpeg)) + jpeg + bytes(-len(jpeg) % tarfile.BLOCKSIZE))
            inner.write(bytes(2 * tarfile.BLOCKSIZE))
            out.write(_header(f"{wnid}.tar", inner.tell()) + inner.getbuffer())
        out.write(bytes(2 * tarfile.BLOCKSIZE))


def write_folder(path: Path, num_images: int) -> None:
    """train/WNID/name.JPEG of the same images: hard links, as many as a file may have."""
    jpegs, first = made_up_jpegs(), dict[tuple[int, int], Path]()
    for number in range(NUM_CLASSES):
        folder = path / "train" / f"n{10_000_000 + number}"
        folder.mkdir(parents=True)
        for image in range(number, num_images, NUM_CLASSES):
            file, content = folder / f"{folder.name}_{image}.JPEG", (image % len(jpegs), image // 10_000_000)
            if content in first:
                os.link(first[content], file)
            else:
                file.write_bytes(jpegs[content[0]])
                first[content] = file


def made_up_jpegs() -> list[bytes]:
    """Blots of 28 to 47 pixels a side, less than a kilobyte each."""
    rng, jpegs = np.random.default_rng(0), []
    for _ in range(NUM_JPEGS):
        blots = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        width, height = rng.integers(28, 48, 2).tolist()
        file = io.BytesIO()
        blots.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=60)
        jpegs.append(file.getvalue())
    return jpegs


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


@dataclass(frozen=True, kw_only=True)
class FullSizeBenchmark(WritesResults):
    """From `pretrain` to its first batch at 1,281,167 images, by part."""

    images: int = 1_281_167
    rounds: int = 3
    kinds: tuple[str, ...] = tuple(LOADERS)
    """tar, beton, folder."""
    scratch: Path | None = None
    """Folder for the made-up data, some 5 GB; the system's if not given. What lies there from before is used again."""
    name: str = "full_size_cpu"

    def run(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.scratch) as temporary:
            scratch = self.scratch or Path(temporary)
            results = self.results({str(scratch): "(scratch)"})
            os.environ["LEOCLR_CACHE"] = str(scratch / "cache")
            prepared = self._prepare(scratch, results)
            measured: dict[str, list[dict[str, Any]]] = {kind: [] for kind in self.kinds}
            for number, kind in interleaved(list(self.kinds), self.rounds, warmup=1):
                found = self._start(scratch / kind, LOADERS[kind], Path(temporary) / f"{number} {kind}")
                taken = found["seconds"][IMPORTS][0] + found["seconds"][BEYOND][0]
                results.say(f"round {number + 1}: {kind}: {taken:.1f} s; {json.dumps(found)}")
                if number >= 0:
                    measured[kind].append(found)
                else:
                    prepared[f"{kind}: the first start, whatever it has to index and compile"] = taken
        surroundings = environment(torch.device("cpu"), 1)
        document = {"images": self.images, "prepared_s": prepared, "starts": measured, "environment": surroundings}
        results.write(document, self._page(document, results.command))
        print(self._page(document, results.command))

    def _prepare(self, scratch: Path, results: Results) -> dict[str, float]:
        """Makes what is not there yet: what was done -> seconds."""
        prepared: dict[str, float] = {}
        for kind in ("tar", *self.kinds):
            began = time.perf_counter()
            if (scratch / kind).exists():
                continue
            if kind == "beton":
                command = [sys.executable, "-m", "dataset_tools", "convert", scratch / "tar", scratch / kind]
                subprocess.run([*map(str, command), "--format", "ffcv"], check=True, stdout=subprocess.DEVNULL)
                prepared["tar: conversion to a .beton, with the index of the tar"] = time.perf_counter() - began
            else:
                (write_tar if kind == "tar" else write_folder)(scratch / kind, self.images)
            results.say(f"made {kind}: {time.perf_counter() - began:.1f} s")
        return prepared

    def _start(self, data: Path, loader: str, out: Path) -> dict[str, Any]:
        arguments = ["leoclr_imagenet_200ep", "--data", str(data), "--out", str(out), "--loader", loader, *OPTIONS]
        program = "import sys; from benchmarks.full_size import start; start(sys.argv[1:])"
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pretrain from {data} failed:\n{done.stdout}{done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def _page(self, document: dict[str, Any], command: str) -> str:
        starts: dict[str, list[dict[str, Any]]] = document["starts"]

        def cell(own: list[dict[str, Any]], part: str) -> str:
            wall, cpu = (quantiles("s", [one["seconds"][part][which] for one in own]) for which in (0, 1))
            return f"{spread(wall, 's', 1)}; {cpu['s']:.1f}"

        rows = [(what, *(cell(own, part) for own in starts.values())) for part, what in PARTS.items()]
        for what, part in (("peak, MiB", "peak"), ("of it own, MiB", "own")):
            memory = {kind: quantiles("mib", [one["memory"][part] for one in own]) for kind, own in starts.items()}
            rows.append((f"memory at the first batch: {what}", *(f"{own['mib']:,.0f}" for own in memory.values())))
        head = ("seconds; of all CPU cores", *(f"{kind}, loader {LOADERS[kind]}" for kind in starts))
        return bench_page(
            f"From `pretrain` to the first batch: {document['images']:,} images",
            made_with(document["environment"]).removesuffix("."),
            markdown_table(head, rows),
            rounds=f"{self.rounds} starts, of one rank, after one that is not counted.",
            command=command,
            remarks=[
                *(f"{what}: {taken:,.0f} s" for what, taken in document["prepared_s"].items()),
                "A batch of 256; nothing is compiled by torch, and no kNN is prepared. The options: "
                f"`{' '.join(OPTIONS)}`.",
                "Own memory is what no other process shares; the rest are pages of torch's and CUDA's libraries and of "
                "the records of a .beton.",
            ],
        )


if __name__ == "__main__":
    tyro.cli(FullSizeBenchmark).run()
