"""`python -m dataset_tools <command>`: conversion, on machines without torch; also part of `leoclr-fast`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from dataset_tools.command_line import (
    CommonFlags,
    first_line,
    parse_flags,
    print_commands,
    run_command_line,
    say,
)
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.formats.beton import DECODE_LIMIT_BYTES, decode_bytes
from dataset_tools.formats.formats import FORMATS
from dataset_tools.limits import unknown
from dataset_tools.terminal import printable

_Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Convert(CommonFlags):
    """Convert a source of images, once and safely: convert SOURCE DEST --format ffcv|webdataset."""

    source: Annotated[Path, _Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder or tar of images, ImageNet's own archives, Kaggle's tree, CIFAR, STL-10, Parquet, or a converted data
    set."""
    destination: Annotated[Path, _Positional, tyro.conf.arg(metavar="DEST")]
    """The folder to make; what other commands take as --data."""
    options: Annotated[ConvertOptions, tyro.conf.arg(name="")]
    workers: int | None = None
    """Processes; the cores of this machine if not given. Changes nothing but the speed."""
    strict: bool = False
    """Stop at the first image that cannot be used, instead of listing it in quarantine.jsonl."""

    def run(self, console: Console) -> dict[str, Any]:
        from dataset_tools.conversion.convert import convert

        summary = convert(self.source, self.destination, self.options, workers=self.workers, strict=self.strict)
        _print_summary(console, summary)
        return summary


@dataclass(frozen=True, kw_only=True)
class Verify(CommonFlags):
    """Check a converted data set: verify DEST [--deep] [--source SOURCE]. Exit code 1 if anything is wrong."""

    data: Annotated[Path, _Positional, tyro.conf.arg(metavar="DEST")]
    """The folder that convert made."""
    source: Path | None = None
    """Compare with what it was made of."""
    deep: bool = False
    """Decode every image."""
    workers: int | None = None
    """Processes; the cores of this machine if not given."""

    def run(self, console: Console) -> dict[str, Any]:
        from dataset_tools.conversion.verify import verify

        result = verify(self.data, source=self.source, deep=self.deep, workers=self.workers)
        for problem in result["problems"]:
            say(console, printable(problem.replace("\n", "\\n")))
        more = result["num_problems"] - len(result["problems"])
        if more:
            say(console, f"… and {more:,} more")
        state = "whole" if result["ok"] else f"NOT whole: {result['num_problems']:,} problem(s)"
        say(console, f"{self.data}: {state}; {result['samples']:,} samples")
        return result


@dataclass(frozen=True, kw_only=True)
class Inspect(CommonFlags):
    """What a converted data set holds, from its manifest alone: inspect DEST."""

    data: Annotated[Path, _Positional, tyro.conf.arg(metavar="DEST")]
    """The folder that convert made."""

    def run(self, console: Console) -> dict[str, Any]:
        from dataclasses import asdict

        from dataset_tools.conversion.convert import summarize
        from dataset_tools.formats.manifest import Manifest

        manifest = Manifest.load(self.data)
        summary = summarize(self.data, manifest, images=0, seconds=0.0)
        _print_summary(console, summary)
        say(console, f"made of: {manifest.source.get('kind')}, fingerprint {manifest.source.get('fingerprint')}")
        say(console, "options: " + ", ".join(f"{name} {value}" for name, value in manifest.options.items()))
        say(console, "versions: " + ", ".join(f"{name} {value}" for name, value in manifest.versions.items()))
        document = asdict(manifest)
        for name, split in manifest.splits.items():
            document["splits"][name]["ffcv_decode_bytes"] = decode_bytes(split.max_width, split.max_height)
        return document


@dataclass(frozen=True, kw_only=True)
class Subset(CommonFlags):
    """List a class-balanced part of a split, 1 % in 2 % in 5 % …: subset DATA --percent P --seed S --out LIST."""

    data: Annotated[Path, _Positional, tyro.conf.arg(metavar="DATA")]
    """A converted data set, or any other source of images."""
    out: Path
    """The list to write: one name a line."""
    percent: float | None = None
    """How much of the split, above 0 and at most 100."""
    seed: int = 0
    """Which images; for one seed, smaller parts lie in larger ones."""
    list: Path | None = None
    """Instead of --percent: a published list, whose names are looked up in the data."""
    split: str = "train"
    """Of which split."""

    def run(self, console: Console) -> dict[str, Any]:
        from dataset_tools.sources import open_source
        from dataset_tools.subset_lists import percent_of, read_subset_list, write_subset_list

        if (self.percent is None) == (self.list is None):
            raise ValueError("give either --percent P or --list FILE")
        split = open_source(self.data).split(self.split)
        if self.list is not None:
            indices = read_subset_list(self.list, split)
        else:
            indices = percent_of(split, self.percent or 0.0, self.seed)
        result = write_subset_list(self.out, split, indices) | {"percent": self.percent, "seed": self.seed}
        say(
            console,
            f"{self.out}: {result['samples']:,} of {len(split):,} images, {result['min_per_class']:,} to "
            f"{result['max_per_class']:,} a class; sha256 {result['sha256'][:16]}…",
        )
        return result


@dataclass(frozen=True, kw_only=True)
class Merge(CommonFlags):
    """Join the parts that convert --part made, or different splits: merge PARTS… DEST."""

    folders: Annotated[tuple[Path, ...], _Positional, tyro.conf.arg(metavar="PARTS… DEST")]
    """The parts, in any order, then the folder to make."""
    workers: int | None = None
    """Processes; the cores of this machine if not given."""

    def run(self, console: Console) -> dict[str, Any]:
        from dataset_tools.conversion.merge import merge

        if len(self.folders) < 2:
            raise ValueError("merge needs the folders of the parts, and then the destination")
        summary = merge(self.folders[:-1], self.folders[-1], workers=self.workers)
        _print_summary(console, summary)
        return summary


COMMANDS: dict[str, type[Any]] = {
    "convert": Convert,
    "verify": Verify,
    "inspect": Inspect,
    "subset": Subset,
    "merge": Merge,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line (`sys.argv` by default) and exit: 0 done, 1 failed, 2 misused, 130 stopped by a signal."""
    sys.exit(run_command(arguments))


def run_command(arguments: Sequence[str] | None = None) -> int:
    """As `main`, but returns the exit code."""
    return run_command_line(_parse, arguments)


def _parse(arguments: list[str]) -> CommonFlags | None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("python -m dataset_tools COMMAND: convert images, and check, list and join what was converted\n")
        print_commands({name: first_line(command.__doc__) for name, command in COMMANDS.items()})
        print("\npython -m dataset_tools COMMAND --help lists the flags of a command.")
        return None
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(unknown("command", name, COMMANDS))
    return parse_flags(COMMANDS[name], rest, f"python -m dataset_tools {name}")


def _print_summary(console: Console, summary: dict[str, Any]) -> None:
    has_buffers = FORMATS[summary["format"]].decodes_into_buffers
    for name, split in summary["splits"].items():
        line = f"{name}: {split['samples']:,} samples, {split['quarantined']:,} in quarantine, largest "
        line += f"{split['max_width']} x {split['max_height']}"
        gib = split["ffcv_decode_bytes"] / 2**30
        say(console, f"{line}, FFCV decodes in {gib:.2f} GiB (batch 256)" if has_buffers else line)
        if has_buffers and split["ffcv_decode_bytes"] >= DECODE_LIMIT_BYTES:
            say(console, f"warning: {gib:.3f} GiB are above 4 GiB; --mode auto with --max-side limits it")
    speed = f", {summary['images_per_s']:,.0f} images/s" if summary["images_per_s"] else ""
    say(
        console,
        f"{summary['destination']} ({summary['format']}): {summary['samples']:,} samples, "
        f"{summary['bytes'] / 1e6:,.1f} MB; passed through {summary['passed_through']:,}, re-encoded "
        f"{summary['reencoded']:,}, in quarantine {summary['quarantined']:,}{speed}",
    )
    if summary["passed_through"] and summary["check"] == "header":
        say(console, "  passed through by their headers: --check decode, or verify --deep, finds damage inside images")
    for reason, count in summary["reencoded_because"].items():
        say(console, f"  re-encoded, {reason}: {count:,}")
