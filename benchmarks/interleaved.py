"""Contestants that take turns in one run, each in a process of its own, and the ratios between them."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from leoclr_fast.bench.own_process import OwnProcess
from leoclr_fast.bench.statistics import quantiles

Contestant = Callable[..., Iterator[float]]
"""A generator function at the top of a module: each `next` does the whole task once and yields the seconds it took."""


@dataclass(kw_only=True)
class Comparison:
    """What is compared, and the files it is written to: NAME.json (all times, command, environment), NAME.md and
    NAME.log.
    """

    name: str
    out: Path
    title: str
    task: str
    """What one measurement does, for the heading of the table."""
    notes: str
    amount: int
    """Images that one measurement handles."""
    peers: Mapping[str, tuple[str, ...]]
    """Contestant -> those it is compared with."""
    packages: tuple[str, ...]
    """Whose versions are noted."""
    hidden: dict[str, str] = field(default_factory=dict)
    """Words of the command line -> what the files show instead (paths)."""

    def run(self, contestants: dict[str, Contestant], arguments: Sequence[Any], rounds: int) -> None:
        """All contestants once in every round, in an order that rotates; a first round is not counted."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._seconds: dict[str, list[float]] = {name: [] for name in contestants}
        self._log = [self.title, f"command: {self._command()}"]
        processes = {name: OwnProcess(name, function, arguments) for name, function in contestants.items()}
        try:
            names = list(contestants)
            for number in range(rounds + 1):
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    taken = processes[name].turn()
                    remark = "" if number else " (warm-up, not counted)"
                    self._log.append(f"round {number}{remark}: {name}: {taken:.3f} s")
                    print(self._log[-1], flush=True)
                    if number:
                        self._seconds[name].append(taken)
                if number:
                    self._write()
        finally:
            for process in processes.values():
                process.close()
        print((self.out / f"{self.name}.md").read_text())

    def _command(self) -> str:
        main = getattr(sys.modules["__main__"], "__spec__", None)
        words = ["python", "-m", main.name if main else sys.argv[0], *sys.argv[1:]]
        line = shlex.join(words)
        for word, shown in self.hidden.items():
            line = line.replace(word, shown)
        return line

    def _write(self) -> None:
        ratios = {
            f"{ours} / {peer}": [
                their / mine for mine, their in zip(self._seconds[ours], self._seconds[peer], strict=True)
            ]
            for ours, peers in self.peers.items()
            for peer in peers
        }
        rates = {name: [self.amount / taken for taken in values] for name, values in self._seconds.items()}
        document = {
            "title": self.title,
            "task": self.task,
            "command": self._command(),
            "images": self.amount,
            "rounds": len(next(iter(self._seconds.values()))),
            "machine": {
                "cpu": _cpu_name(),
                "cores": len(os.sched_getaffinity(0)),
                "gpu": _gpu_name(),
                "kernel": platform.release(),
            },
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in self.packages},
            "seconds": self._seconds,
            "images_per_s": {name: quantiles(values) for name, values in rates.items()},
            "ratios": {name: quantiles(values) for name, values in ratios.items()},
        }
        (self.out / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n")
        (self.out / f"{self.name}.md").write_text(self._table(document))
        (self.out / f"{self.name}.log").write_text("\n".join(self._log) + "\n")

    def _table(self, document: dict[str, Any]) -> str:
        machine = document["machine"]
        where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu']}"
        versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
        lines = [
            f"# {self.title}",
            "",
            f"{self.task} `{document['command']}`; {where}; {versions}.",
            "",
            f"Median [20 %, 80 %] of {document['rounds']} interleaved rounds. {self.notes}",
            "",
            "| contestant | images/s | times as fast as |",
            "|---|---|---|",
        ]
        for name, rate in document["images_per_s"].items():
            cells = []
            for peer in self.peers.get(name, ()):
                ratio = document["ratios"][f"{name} / {peer}"]
                cells.append(f"{ratio['median']:.2f} [{ratio['q20']:.2f}, {ratio['q80']:.2f}] × {peer}")
            cell = "; ".join(cells)
            lines.append(f"| {name} | {rate['median']:,.0f} [{rate['q20']:,.0f}, {rate['q80']:,.0f}] | {cell} |")
        return "\n".join(lines) + "\n"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _gpu_name() -> str:
    try:
        import torch
    except ImportError:
        return "no GPU used"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
