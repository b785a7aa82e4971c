"""The conversion of a source: safe against bad images, dying workers, full disks and any kind of death."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from PIL import features

from dataset_tools.conversion.hashing import hash_files
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.conversion.split_conversion import Positions, SplitConversion, TransformedImages, complete_split
from dataset_tools.conversion.staging import (
    Staging,
    remove_leftover,
    settled_destination,
    staged,
    staging_folder,
)
from dataset_tools.conversion.workers import WorkerPool, settled_workers
from dataset_tools.files import open_own
from dataset_tools.formats.beton import decode_bytes
from dataset_tools.formats.manifest import MANIFEST_NAME, QUARANTINE_NAME, Manifest, read_quarantine, require_files
from dataset_tools.formats.records import ROW
from dataset_tools.formats.split_manifest import SplitManifest
from dataset_tools.progress import progress
from dataset_tools.sources import ImageSource, Split, open_source
from dataset_tools.stop_signals import StoppedBySignalError, StopSignals, stop_signals
from dataset_tools.versions import installed_version

logger = logging.getLogger(__name__)

JOURNAL_EVERY_S = 5.0
SPACE_SAMPLES = 32


def convert(
    source_path: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: ConvertOptions,
    *,
    workers: int | None = None,
    strict: bool = False,
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
    plan = {
        "source": {"kind": source.kind, "fingerprint": source.fingerprint},
        "options": options.identity(),
        "versions": package_versions(),
    }
    if (whole := _already_there(target, plan, strict)) is not None:
        quarantined = sum(split.quarantined for split in whole.splits.values())
        again = f" (delete it to try the {quarantined:,} images in quarantine again)" if quarantined else ""
        logger.info("%s is whole already: nothing to do%s", target, again)
        return summarize(target, whole, images=0, seconds=time.monotonic() - began)
    with staged(target, plan) as staging, stop_signals() as stop:
        if staging.continued:
            logger.info("continuing what an earlier call left in %s", staging.folder)
        run = _Conversion(options, staging, num_workers, strict, stop, journal_every_s)
        images, manifests = run.convert_splits(_chosen_splits(source, options))
        manifest = run.publish(manifests, source)
    return summarize(target, manifest, images=images, seconds=time.monotonic() - began)


def summarize(destination: Path, manifest: Manifest, *, images: int, seconds: float) -> dict[str, Any]:
    """What `convert --json` prints; `images` were looked at in `seconds`."""
    splits = manifest.splits.values()
    reasons = Counter[str]()
    for split in splits:
        reasons.update(split.reasons)
    return {
        "destination": str(destination),
        "format": manifest.format,
        "check": manifest.options.get("check"),
        "samples": sum(split.samples for split in splits),
        "passed_through": sum(split.passed_through for split in splits),
        "reencoded": sum(split.reencoded for split in splits),
        "reencoded_because": dict(reasons),
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
                "ffcv_decode_bytes": decode_bytes(split.max_width, split.max_height),
            }
            for name, split in manifest.splits.items()
        },
    }


def package_versions() -> dict[str, str]:
    """The versions of the packages on which the bytes of re-encoded images depend."""
    ours = installed_version("leoclr-fast") or "unknown"
    turbo = features.version("libjpeg_turbo") or "none"
    return {"leoclr-fast": ours, "pillow": PIL.__version__, "libjpeg-turbo": turbo}


@dataclass(slots=True)
class _Conversion:
    """One call of `convert`, holding its staging folder."""

    options: ConvertOptions
    staging: Staging
    num_workers: int
    strict: bool
    stop: StopSignals
    journal_every_s: float
    _quarantine: IO[bytes] = None  # type: ignore[assignment]

    def convert_splits(self, splits: list[Split]) -> tuple[int, dict[str, SplitManifest]]:
        """Converts what is not converted yet. Returns how many images it looked at, and the manifests of the splits.

        Raises ValueError for a split without a usable image, once the others are done.
        """
        states, manifests, useless = self.staging.state.splits, dict[str, SplitManifest](), list[Split]()
        conversions = [SplitConversion(split, self.options, self.staging.folder, states) for split in splits]
        images = sum(conversion.num_left for conversion in conversions)
        with self._open_quarantine(conversions) as self._quarantine:
            self._check_room(conversions)
            for conversion in conversions:
                with conversion.opened():
                    self._transform(conversion)
                    if len(conversion.rows):
                        manifests[conversion.split.name] = self._finish(conversion)
                    else:
                        useless.append(conversion.split)
        for split in useless:
            quarantine = self.staging.folder / QUARANTINE_NAME
            entry = next(entry for entry in read_quarantine(quarantine.read_bytes()) if entry.split == split.name)
            raise ValueError(
                f"none of the {len(split):,} images of {split.name} can be used; for example {entry.name}: "
                f"{entry.reason}. {quarantine} lists them all; other splits can be converted by --split"
            )
        return images, manifests

    def publish(self, manifests: dict[str, SplitManifest], source: ImageSource) -> Manifest:
        """The manifest, and DEST."""
        manifest = Manifest(
            format=self.options.format,
            classes=source.classes,
            splits=manifests,
            quarantine=hash_files([(self.staging.folder / QUARANTINE_NAME, None)], 1, self.stop)[0],
            part=self.options.part_numbers,
            account=source.account,
            **self.staging.plan,
        )
        self.staging.publish(manifest)
        return manifest

    def _open_quarantine(self, conversions: list[SplitConversion]) -> IO[bytes]:
        """quarantine.jsonl, cut back to what the journal knows."""
        path, known = self.staging.folder / QUARANTINE_NAME, self.staging.state.quarantine_bytes
        try:
            file = open_own(path, "r+b" if known else "w+b")
            content = file.read(known)
            if len(content) < known:
                raise ValueError(f"{path} is shorter than the journal says")
            found = Counter(entry.split for entry in read_quarantine(content))
            if found != Counter({each.split.name: each.num_quarantined for each in conversions}):
                raise ValueError(f"{path} lists other images than the journal counts")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the unfinished conversion cannot be continued: {error}. Delete {self.staging.folder} to start anew."
            ) from error
        file.truncate(known)
        file.seek(known)
        return file

    def _check_room(self, unfinished: list[SplitConversion]) -> None:
        """Raises OSError if what is left would not fit on the disk, judged by a few images of each split."""
        needed = 0
        for conversion in unfinished:
            num_samples = min(SPACE_SAMPLES, conversion.num_left)
            spread = np.unique(np.linspace(conversion.start, conversion.stop - 1, num_samples).astype(np.int64))
            sizes = list[int]()
            with self._pool(conversion) as pool:
                for done in pool.map((position, position + 1) for position in spread.tolist()):
                    if self.stop.requested:  # the conversion stops at its first step
                        return
                    if done is not None:
                        sizes.append(len(done.payload))
            if sizes:
                conversion.limit_task_bytes(max(sizes))
                needed += int(conversion.num_left * (np.mean(sizes) + self.options.output.sample_overhead_bytes))
        self.staging.check_room(needed, "what is left to write takes about")

    def _transform(self, conversion: SplitConversion) -> None:
        saved = time.monotonic()
        name, total = conversion.split.name, conversion.num_positions
        before = total - conversion.num_left
        logger.info(f"{name}: {total:,} images" + (f", {before:,} of them done before" if before else ""))
        with self._pool(conversion) as pool, progress(name, total, done=before) as advance:
            for done in pool.map(conversion.tasks()):
                if done is not None:
                    self._quarantine.write(conversion.quarantine_lines(done.result))
                    conversion.add(done.task, done.result, done.payload)
                    advance(done.task[1] - done.task[0], conversion.counts)
                    if self.strict and done.result.rejected:
                        position, reason = done.result.rejected[0]
                        raise ValueError(
                            f"{conversion.name_at(position)} cannot be used: {reason}. --strict stops here; without "
                            "it such images are listed in quarantine.jsonl and left out"
                        )
                if self.stop.requested:
                    self._save(conversion)
                    raise StoppedBySignalError(
                        f"stopped by {self.stop.name} with {conversion.num_left:,} images of {conversion.split.name} "
                        "left; the same command continues"
                    )
                if time.monotonic() - saved > self.journal_every_s:
                    self._save(conversion)
                    saved = time.monotonic()
        self._save(conversion)

    def _finish(self, conversion: SplitConversion) -> SplitManifest:
        """Everything of a split but its place in DEST; is done again after a death before that."""
        split, rows = conversion.split, conversion.rows
        logger.info("%s: completing the files", split.name)
        images = conversion.writer.finish(rows)
        logger.info("%s: hashing the files", split.name)
        return complete_split(
            split.name,
            rows,
            split.names,
            images,
            self.options.output,
            of_source=True,
            num_workers=self.num_workers,
            stop=self.stop,
            positions=conversion.num_positions,
            reasons=dict(sorted(conversion.state.reasons.items())),
            quarantined=conversion.num_quarantined,
        )

    def _save(self, conversion: SplitConversion) -> None:
        conversion.checkpoint()
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        self.staging.state.quarantine_bytes = self._quarantine.tell()
        self.staging.save()

    def _pool(self, conversion: SplitConversion) -> WorkerPool[Positions, TransformedImages]:
        def describe(positions: Positions) -> str:
            name = conversion.name_at(positions[0])
            more = positions[1] - positions[0] - 1
            return f"{name} and the {more} images behind it" if more else name

        return WorkerPool(
            conversion.transform,
            self.num_workers,
            pieces=lambda positions: [(position, position + 1) for position in range(*positions)],
            crashed=lambda positions, reason: TransformedImages(
                np.zeros(0, dtype=ROW), Counter(), [(positions[0], reason)]
            ),
            describe=describe,
            descriptors=(self.staging.lock,),
        )


def _already_there(target: Path, plan: dict[str, Any], strict: bool) -> Manifest | None:
    """The manifest, if the destination is the whole result of the same call. Raises as `require_files`, ValueError
    if `strict` forbids what is in quarantine.
    """
    if not (target / MANIFEST_NAME).is_file():
        return None
    manifest = Manifest.load(target)
    if manifest.source == plan["source"] and manifest.options == plan["options"]:
        require_files(target, manifest.all_files)
        if strict and (left_out := sum(split.quarantined for split in manifest.splits.values())):
            raise ValueError(f"{target} is there, but {left_out:,} images are in quarantine, which --strict forbids")
        remove_leftover(target, plan)
        return manifest
    raise FileExistsError(
        f"{target} is a converted data set already, of another source or with other options. Give another destination."
    )


def _chosen_splits(source: ImageSource, options: ConvertOptions) -> list[Split]:
    chosen = list(source.splits.values()) if options.split is None else [source.split(options.split)]
    _, num_parts = options.part_numbers or (1, 1)
    for split in chosen:
        split.check()
        if len(split) < num_parts:
            raise ValueError(f"{split.name} has {len(split)} images, too few for {num_parts} parts")
    return chosen
