"""The conversion of a source: safe against bad images, dying workers, full disks and any kind of death."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import features

from dataset_tools.conversion.hashing import hash_files
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.conversion.progress import Progress
from dataset_tools.conversion.split_conversion import (
    Positions,
    SplitConversion,
    TreatedImages,
    crashed_image,
    treat_images,
)
from dataset_tools.conversion.staging import Staging, remove_leftover, settled_destination, staged, staging_folder
from dataset_tools.conversion.workers import WorkerPool, settled_workers
from dataset_tools.formats.beton import read_beton_head
from dataset_tools.formats.manifest import MANIFEST_NAME, Manifest, SplitManifest
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources import ImageSource, Split, open_source
from dataset_tools.stop_signals import StoppedBySignalError, StopSignals, stop_signals

logger = logging.getLogger(__name__)

QUARANTINE_NAME = "quarantine.jsonl"
JOURNAL_EVERY_S = 5.0
SPACE_SAMPLES = 32
SAMPLE_OVERHEAD_BYTES = {"ffcv": 300, "webdataset": 2400}
"""Upper bounds, beside the image: row, record, name, tables; tar headers and padding, index line."""


def convert(
    source_path: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: ConvertOptions,
    *,
    workers: int | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    journal_every_s: float = JOURNAL_EVERY_S,
) -> dict[str, Any]:
    """Convert `source_path` (anything that open_source takes) into the folder `destination`.

    Which bytes come out depends on the source and the options alone, not on the number of `workers` (default: the
    cores) nor on interruptions: the same call continues what was left. `strict` stops at the first image that cannot be
    used, else it goes to quarantine.jsonl. Returns the summary that `--json` prints.

    Raises ValueError for what cannot be converted, FileExistsError if there is something else at the destination,
    RuntimeError if another process is converting there or a worker dies twice at one task, OSError for a full disk,
    StoppedBySignalError after SIGINT or SIGTERM.
    """
    began = time.monotonic()
    num_workers = settled_workers(workers)
    target = settled_destination(destination)
    source = open_source(source_path)
    for folder in (target, staging_folder(target)):
        if folder.is_relative_to(source.path.resolve()):
            raise ValueError(
                f"{folder} lies inside the source {source.path}, and would be part of it the next time. Give a "
                "destination elsewhere."
            )
    plan = _plan(source, options)
    if (whole := _already_there(target, plan, strict)) is not None:
        quarantined = sum(split.quarantined for split in whole.splits.values())
        again = f" (delete it to try the {quarantined:,} images in quarantine again)" if quarantined else ""
        logger.info("%s is whole already: nothing to do%s", target, again)
        return summarize(target, whole, images=0, seconds=time.monotonic() - began)
    with (
        staged(target, plan) as staging,
        stop_signals(enabled=True) as stop,
        disk_errors(staging),
        progress or Progress() as shown,
    ):
        if staging.continued:
            logger.info("continuing what an earlier call left in %s", staging.folder)
        run = _Conversion(
            options=options,
            staging=staging,
            num_workers=num_workers,
            strict=strict,
            progress=shown,
            stop=stop,
            journal_every_s=journal_every_s,
        )
        splits = _chosen_splits(source, options)
        images = run.convert_splits(splits)
        manifest = run.publish(splits, source)
    return summarize(target, manifest, images=images, seconds=time.monotonic() - began)


def summarize(destination: Path, manifest: Manifest, *, images: int, seconds: float) -> dict[str, Any]:
    """What `convert --json` prints; `images` were treated in `seconds`."""
    splits = manifest.splits.values()
    reasons: dict[str, int] = {}
    for split in splits:
        for reason, count in split.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return {
        "destination": str(destination),
        "format": manifest.format,
        "samples": sum(split.samples for split in splits),
        "passed_through": sum(split.passed_through for split in splits),
        "reencoded": sum(split.reencoded for split in splits),
        "reencoded_because": reasons,
        "quarantined": sum(split.quarantined for split in splits),
        "bytes": sum(file.bytes for split in splits for file in split.files),
        "images_per_s": round(images / seconds, 1) if images else None,
        "seconds": round(seconds, 2),
        "splits": {
            name: {
                "samples": split.samples,
                "quarantined": split.quarantined,
                "max_width": split.max_width,
                "max_height": split.max_height,
                "ffcv_decode_bytes": split.ffcv_decode_bytes,
            }
            for name, split in manifest.splits.items()
        },
    }


def package_versions() -> dict[str, str]:
    """Of what the bytes of re-encoded images depend on."""
    try:
        ours = version("leoclr-fast")
    except PackageNotFoundError:  # a checkout that is not installed
        ours = "unknown"
    turbo = features.version("libjpeg_turbo") or "none"
    return {"leoclr-fast": ours, "pillow": PIL.__version__, "libjpeg-turbo": turbo}


class NoRoomError(OSError):
    """What is to be written does not fit on the disk, as is known before it is begun."""


class _Conversion:
    """One call of `convert`, holding its staging folder."""

    def __init__(
        self,
        *,
        options: ConvertOptions,
        staging: Staging,
        num_workers: int,
        strict: bool,
        progress: Progress,
        stop: StopSignals,
        journal_every_s: float,
    ) -> None:
        self.options, self.staging, self.num_workers, self.strict = options, staging, num_workers, strict
        self.progress, self.stop, self.journal_every_s = progress, stop, journal_every_s
        staging.state.setdefault("splits", {})
        staging.state.setdefault("quarantine_bytes", 0)

    def convert_splits(self, splits: list[Split]) -> int:
        """Converts what is not converted yet. Returns how many images it looked at."""
        states = self.staging.state["splits"]
        unfinished = [
            SplitConversion(split, self.options, self.staging.folder, states.setdefault(split.name, {}))
            for split in splits
            if "finished" not in states.get(split.name, {})
        ]
        if not unfinished:  # quarantine.jsonl may be in its last place already
            return 0
        with self._open_quarantine() as self._quarantine:
            self._check_space(unfinished)
            images = sum(self._convert_split(conversion) for conversion in unfinished)
        return images

    def publish(self, splits: list[Split], source: ImageSource) -> Manifest:
        """The manifest, and DEST."""
        states = {split.name: self.staging.state["splits"][split.name]["finished"] for split in splits}
        finished = {name: entry for name, entry in states.items() if entry["manifest"]}
        if not finished:
            lines = self.staging.find(QUARANTINE_NAME).read_text(encoding="utf-8").splitlines()
            raise ValueError(
                f"none of the {len(lines):,} images can be used; for example {json.loads(lines[0])['name']}: "
                f"{json.loads(lines[0])['reason']}. {self.staging.find(QUARANTINE_NAME)} lists them all"
            )
        manifest = Manifest(
            format=self.options.format,
            classes=source.classes,
            splits={name: SplitManifest.from_json(entry["manifest"]) for name, entry in finished.items()},
            source=self.staging.plan["source"],
            options=self.staging.plan["options"],
            versions=self.staging.plan["versions"],
            quarantine=hash_files([self.staging.find(QUARANTINE_NAME)], 1, self.stop)[0],
            part=self.options.part_numbers,
        )
        manifest.save(self.staging.folder)
        names = [name for entry in finished.values() for name in entry["working_files"]]
        for path, file in zip(map(self.staging.find, [QUARANTINE_NAME, *names]), manifest.all_files, strict=True):
            if path.stat().st_size != file.bytes:
                raise ValueError(
                    f"{path} has {path.stat().st_size:,} bytes and not {file.bytes:,}, as when it was finished. "
                    f"Delete {self.staging.folder} to start anew."
                )
        self.staging.publish([*names, QUARANTINE_NAME, MANIFEST_NAME])
        return manifest

    def _open_quarantine(self) -> BinaryIO:
        """quarantine.jsonl, cut back to what the journal knows."""
        path, known = self.staging.folder / QUARANTINE_NAME, self.staging.state["quarantine_bytes"]
        if known and (not path.exists() or path.stat().st_size < known):
            raise ValueError(
                f"the unfinished conversion cannot be continued: {path} is missing or shorter than the journal says. "
                f"Delete {self.staging.folder} to start anew."
            )
        file = open(path, "r+b" if known else "w+b")  # noqa: SIM115
        file.truncate(known)
        file.seek(known)
        return file

    def _convert_split(self, conversion: SplitConversion) -> int:
        begin = conversion.state["done"]
        try:
            conversion.open()
            self.progress.start(conversion.split.name, conversion.num_positions, begin - conversion.start)
            self._treat_all(conversion)
            self._finish(conversion)
        finally:
            conversion.close()
        return conversion.stop - begin

    def _treat_all(self, conversion: SplitConversion) -> None:
        saved = time.monotonic()
        with self._pool(conversion) as pool:
            for done in pool.map(conversion.tasks()):
                if done is not None:
                    self._quarantine.write(conversion.quarantine_lines(done.result))
                    conversion.add(done.task, done.result, done.payload)
                    self.progress.update(conversion.state["done"] - conversion.start, conversion.state["counts"])
                    if self.strict and done.result.rejected:
                        position, reason = done.result.rejected[0]
                        raise ValueError(
                            f"{conversion.name_at(position)} cannot be used: {reason}. --strict stops here; without "
                            "it such images are listed in quarantine.jsonl and left out"
                        )
                if self.stop.requested:
                    self._save(conversion)
                    left = conversion.stop - conversion.state["done"]
                    raise StoppedBySignalError(
                        f"stopped by {self.stop.name} with {left:,} images of {conversion.split.name} left; the same "
                        "command continues"
                    )
                if time.monotonic() - saved > self.journal_every_s:
                    self._save(conversion)
                    saved = time.monotonic()
        self._save(conversion)

    def _finish(self, conversion: SplitConversion) -> None:
        """Everything of a split but its place in DEST; may be done again after a death in its midst."""
        split = conversion.split
        rows = conversion.rows
        if not len(rows):
            logger.warning("%s is left out: none of its %d images can be used", split.name, conversion.num_positions)
            conversion.state["finished"] = {"manifest": None, "working_files": []}
            self.staging.save()
            return
        self.progress.say(f"{split.name}: completing the files")
        images = conversion.writer.finish(rows)
        names = split.names if isinstance(split.names, PackedNames) else PackedNames(split.names)
        records = self.staging.folder / f"{split.name}.records.safetensors"
        rows.write_records(records, lambda block, _: names.select(block["source_index"]))
        self.progress.say(f"{split.name}: hashing the files")
        files = [records, *images]
        hashed = hash_files(files, self.num_workers, self.stop, lambda: [self.staging.lock, self._quarantine.fileno()])
        entries = dict(zip(files, hashed, strict=True))
        manifest = SplitManifest.of(
            rows,
            positions=conversion.num_positions,
            reasons=dict(sorted(conversion.state["reasons"].items())),
            quarantined=conversion.state["counts"]["quarantined"],
            page_bytes=int(read_beton_head(images[0])["page_size"]) if self.options.format == "ffcv" else None,
            records=entries[records],
            files=tuple(entries[path] for path in images),
        )
        conversion.state["finished"] = {
            "manifest": asdict(manifest),
            "working_files": [path.name for path in files],
        }
        self.staging.save()

    def _save(self, conversion: SplitConversion) -> None:
        conversion.checkpoint()
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        self.staging.state["quarantine_bytes"] = self._quarantine.tell()
        self.staging.save()

    def _pool(self, conversion: SplitConversion) -> WorkerPool[Positions, TreatedImages]:
        def describe(positions: Positions) -> str:
            name = conversion.name_at(positions[0])
            more = positions[1] - positions[0] - 1
            return f"{name} and the {more} images behind it" if more else name

        return WorkerPool(
            treat_images(conversion.split, conversion.order, self.options.policy),
            self.num_workers,
            pieces=lambda positions: [(position, position + 1) for position in range(*positions)],
            crashed=crashed_image,
            describe=describe,
            descriptors=lambda: [self.staging.lock, self._quarantine.fileno(), *conversion.descriptors()],
        )

    def _check_space(self, unfinished: list[SplitConversion]) -> None:
        """Raises OSError if what is left would not fit on the disk, judged by a few images of each split."""
        needed = 0
        for conversion in unfinished:
            left = conversion.stop - conversion.state["done"]
            spread = np.linspace(conversion.start, conversion.stop - 1, min(SPACE_SAMPLES, left)).astype(np.int64)
            tasks = [(int(position), int(position) + 1) for position in np.unique(spread)]
            sizes = list[int]()
            with self._pool(conversion) as pool:
                for done in pool.map(tasks):
                    if self.stop.requested:  # the conversion stops at its first step
                        return
                    if done is not None:
                        sizes.append(len(done.payload))
            if sizes:
                conversion.limit_task_bytes(max(sizes))
                needed += int(left * (np.mean(sizes) + SAMPLE_OVERHEAD_BYTES[self.options.format]))
        free = shutil.disk_usage(self.staging.folder).free
        if needed > free:
            raise NoRoomError(
                errno.ENOSPC,
                f"what is left to write takes about {in_words(needed)}, but {self.staging.folder.parent} has "
                f"{in_words(free)} free. Free some, or choose another destination",
            )


def _plan(source: ImageSource, options: ConvertOptions) -> dict[str, Any]:
    versions = package_versions()
    return {
        "source": {"kind": source.kind, "fingerprint": source.fingerprint},
        "options": options.identity(),
        "versions": versions,
    }


def _already_there(target: Path, plan: dict[str, Any], strict: bool) -> Manifest | None:
    """The manifest, if the destination is the whole result of the same call. Raises ValueError if it is damaged, or if
    `strict` forbids what is in quarantine.
    """
    if not (target / MANIFEST_NAME).is_file():
        return None
    manifest = Manifest.load(target)
    if manifest.source == plan["source"] and manifest.options == plan["options"]:
        for file in manifest.all_files:
            if not (target / file.name).is_file() or (target / file.name).stat().st_size != file.bytes:
                raise ValueError(f"{target} was whole, but its {file.name} is missing or cut. Delete it to start anew.")
        if strict and (left_out := sum(split.quarantined for split in manifest.splits.values())):
            raise ValueError(f"{target} is there, but {left_out:,} images are in quarantine, which --strict forbids")
        remove_leftover(target, plan)
        return manifest
    raise FileExistsError(
        f"{target} is a converted data set already, of another source or with other options. Give another destination."
    )


def _chosen_splits(source: ImageSource, options: ConvertOptions) -> list[Split]:
    if options.split is None:
        chosen = list(source.splits.values())
    elif options.split in source.splits:
        chosen = [source.splits[options.split]]
    else:
        raise ValueError(f"there is no split {options.split!r} in {source.path}; it has {', '.join(source.splits)}")
    _, num_parts = options.part_numbers or (1, 1)
    for split in chosen:
        if len(split) < num_parts:
            raise ValueError(f"{split.name} has {len(split)} images, too few for {num_parts} parts")
    return chosen


def in_words(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


@contextmanager
def disk_errors(staging: Staging, then: str = "the same command continues") -> Iterator[None]:
    """A full disk, in words; `then`: what comes after room was made."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, NoRoomError):
            raise
        raise OSError(
            error.errno,
            f"the disk of {staging.folder} is full ({error.strerror}). Free some space, and {then}",
        ) from error
