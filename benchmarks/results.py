"""The result files of a benchmark: NAME.json, NAME.md and NAME.log, without paths of the machine; and what many of them
do: call commands as a user types them, or let functions do the same task in turn.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import OwnProcess
from dataset_tools.command_line import as_json
from dataset_tools.files import write_file
from dataset_tools.sources import Split, open_source
from dataset_tools.versions import installed_version
from leoclr_fast.bench.page import bench_page, markdown_table, spread
from leoclr_fast.bench.statistics import quantiles
from leoclr_fast.bench.timing import interleaved
from leoclr_fast.run.environment import environment

RESULTS = Path("benchmarks/results")
TimedTask = Callable[..., Iterator[float]]
"""A generator function at the top of a module: each `next` does the whole task once and yields the seconds it took."""


@dataclass(kw_only=True)
class Results:
    """The three files, which are written anew after every part: hours are not lost to a late failure."""

    name: str
    out: Path
    hidden: dict[str, str] = field(default_factory=dict)
    """Text, such as a path -> what the files show instead."""

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if self.out.is_absolute():
            self.hidden[str(self.out)] = self.out.name
        self.hidden[str(Path.home())] = "~"
        self.command = self.shown(_typed_command())
        self.log = [f"$ {self.command}"]

    def shown(self, text: str) -> str:
        """Text without what is hidden."""
        for word, instead in self.hidden.items():
            if word not in ("", "/"):  # a home of / would take every slash
                text = text.replace(word, instead)
        return text

    def say(self, line: str) -> None:
        """Print a line, and keep it for the log."""
        self.log.append(line)
        print(line, flush=True)

    def write(self, document: Mapping[str, Any], page: str) -> None:
        """Each file at once: a reader, or a machine that is taken away, never sees half of it."""
        text = json.dumps({"command": self.command, **document}, indent=1)
        for suffix, content in (("json", text + "\n"), ("md", page), ("log", "\n".join(self.log) + "\n")):
            write_file(self.out / f"{self.name}.{suffix}", self.shown(content))

    def type_command(self, *arguments: str) -> dict[str, Any]:
        """One `leoclr-fast` command and what it returned as JSON; its output goes to the log.

        Raises RuntimeError if it fails.
        """
        shown = self.shown(shlex.join(["leoclr-fast", *arguments, "--json"]))
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "leoclr_fast", *arguments, "--json"], capture_output=True, text=True, check=False
        )
        print(f"{shown}: {time.perf_counter() - start:.0f} s", flush=True)
        self.log += [f"$ {shown}", self.shown(done.stdout + done.stderr)]
        if done.returncode:
            raise RuntimeError(f"{shown} failed:\n{self.log[-1]}")
        document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return document


@dataclass(frozen=True, kw_only=True)
class WritesResults:
    """The flags of a benchmark with result files."""

    name: str
    """Of the result files."""
    out: Path = RESULTS

    def results(self, hidden: Mapping[str, str] | None = None) -> Results:
        """hidden: text, such as a path -> what the files show instead."""
        return Results(name=self.name, out=self.out, hidden=dict(hidden or {}))


@dataclass(frozen=True, kw_only=True)
class OnImages(WritesResults):
    """The flags of a benchmark on images that are copied, and its result files."""

    data: Path
    """A tar of JPEGs in class folders, or such a folder."""
    data_label: str = ""
    """What the result files call the data, where its path should not stand in them."""
    copies: int = 1
    """Every image this many times."""
    rounds: int = 9

    def results(self, hidden: Mapping[str, str] | None = None) -> Results:
        return super().results({str(self.data): self.data_label or str(self.data), **(hidden or {})})

    def write_copies(self, folder: Path) -> tuple[int, int]:
        """An image folder of the copies; returns how many images and bytes they are."""
        split = next(iter(open_source(self.data).splits.values()))
        return self.copies * len(split), write_copies(split, folder, self.copies)


def write_copies(split: Split, source: Path, copies: int) -> int:
    """An image folder with every image `copies` times, as hard links, in the folder of its class if it has one; returns
    how many bytes they are.
    """
    num_bytes = 0
    for index, label in enumerate(split.labels):
        content = split.read(index)
        folder = source / split.classes[label] if label >= 0 else source
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{index}{Path(split.names[index]).suffix}"
        first = folder / f"0_{name}"
        first.write_bytes(content)
        for copy in range(1, copies):
            os.link(first, folder / f"{copy}_{name}")
        num_bytes += copies * len(content)
    return num_bytes


def print_document(document: dict[str, Any], page: Callable[..., str]) -> None:
    """What a benchmark without result files has found: its page, with the command, and as JSON in the last line."""
    print(page(document, _typed_command()))
    print(as_json(document))


def _typed_command() -> str:
    program = Path(sys.argv[0])
    name = program.parent.name if program.stem == "__main__" else program.stem
    return shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])


def made_with(surroundings: Mapping[str, Any], *packages: str) -> str:
    """Processor, threads, device, versions and commit of an `environment()`, in one sentence."""
    versions = dict(surroundings["versions"]) | {name: installed_version(name) or "none" for name in packages}
    return (
        f"{surroundings['gpu'] or surroundings['cpu']}, {surroundings['torch_threads']} threads, device "
        f"{surroundings['device']}; Python {surroundings['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; commit {surroundings['git_commit']}."
    )


def compare(
    results: Results,
    tasks: Mapping[str, TimedTask],
    arguments: Sequence[Any],
    rounds: int,
    *,
    title: str,
    task: str,
    notes: str,
    num_images: int,
    peers: Mapping[str, Sequence[str]],
    packages: Sequence[str] = (),
) -> None:
    """All tasks once in every round, each in a process of its own, after a round that is not counted.

    task: what one measurement does, with `num_images` images. peers: a task -> those that it is compared with.
    packages: whose versions are noted, with the usual ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    processes = {name: OwnProcess(name, function, *arguments) for name, function in tasks.items()}
    surroundings = environment(torch.device("cpu"), 1)
    try:
        for number, name in interleaved(list(tasks), rounds, warmup=1):
            taken = processes[name].next()
            results.say(f"round {number + 1}: {name}: {taken:.3f} s" + " (warm-up, not counted)" * (number < 0))
            if number >= 0:
                seconds[name].append(taken)
            if number < 0 or min(map(len, seconds.values())) <= number:
                continue
            rates = {
                name: quantiles("images_per_s", [num_images / one for one in own]) for name, own in seconds.items()
            }
            ratios = {
                name: {peer: _ratio(seconds[peer], seconds[name]) for peer in compared}
                for name, compared in peers.items()
            }
            document = {
                "title": title, "task": task, "images": num_images, "rounds": number + 1, "seconds": seconds,
                "images_per_s": rates, "ratios": ratios, "environment": surroundings,
            }  # fmt: skip
            rows = [
                (
                    name,
                    spread(rate, "images_per_s", 0),
                    "; ".join(f"{spread(ratio, 'ratio', 2)} × {peer}" for peer, ratio in ratios.get(name, {}).items()),
                )
                for name, rate in rates.items()
            ]
            table = markdown_table(("", "images/s", "times as fast as"), rows)
            page = bench_page(
                title,
                f"{task} {made_with(surroundings, *packages)}".removesuffix("."),
                table,
                rounds=f"{number + 1} interleaved rounds. {notes}",
                command=results.command,
            )
            results.write(document, page)
    finally:
        for process in processes.values():
            process.close()
    print(page)


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    return quantiles("ratio", [their / our for their, our in zip(theirs, ours, strict=True)])
