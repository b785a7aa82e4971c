"""Parts of a conversion, joined: bytes are copied and pointers rewritten; no image is decoded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from dataset_tools.conversion.convert import QUARANTINE_NAME, NoRoomError, disk_errors, in_words, summarize
from dataset_tools.conversion.hashing import hash_files
from dataset_tools.conversion.staging import Staging, settled_destination, staged
from dataset_tools.conversion.workers import settled_workers
from dataset_tools.file_io import read_at
from dataset_tools.formats.beton import BetonWriter, read_beton_head
from dataset_tools.formats.manifest import MANIFEST_NAME, FileEntry, Manifest, SplitManifest, is_converted
from dataset_tools.formats.records import BLOCK_ROWS, SampleRecords
from dataset_tools.formats.row_file import RowFile
from dataset_tools.formats.tar_shards import shard_name
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.split import split_rank
from dataset_tools.stop_signals import StoppedBySignalError, StopSignals, stop_signals

AGAIN = "give the same command again"


@dataclass(frozen=True, slots=True)
class _Part:
    folder: Path
    manifest: Manifest


def merge(
    parts: Sequence[str | os.PathLike[str]], destination: str | os.PathLike[str], *, workers: int | None = None
) -> dict[str, Any]:
    """Join converted data sets into the folder `destination`: parts I/N of a conversion, or different splits, or both.

    Samples and their order are those of an unpartitioned conversion; a .beton is the same to the byte. The parts'
    files are compared with their manifests first. Returns the summary that `--json` prints.

    Raises ValueError if the parts do not fit together, are incomplete or damaged, FileExistsError if there is something
    at the destination, OSError for a full disk.
    """
    began = time.monotonic()
    num_workers = settled_workers(workers)
    opened = [_Part(Path(part).expanduser(), Manifest.load(Path(part).expanduser())) for part in parts]
    splits = _splits(opened)
    target = settled_destination(destination)
    if is_converted(target):
        raise FileExistsError(f"{target} is a converted data set already; the last folder of merge is the one to make")
    manifests = [part.manifest for part in opened]
    plan = {"merge": sorted(hashlib.sha256(repr(manifest).encode()).hexdigest() for manifest in manifests)}
    with staged(target, plan) as staging, stop_signals(enabled=True) as stop, disk_errors(staging, AGAIN):
        _check_space(opened, staging)
        _check_files(opened, num_workers, stop)
        merged, names = {}, list[str]()
        for name, chosen in splits.items():
            merged[name], working_files = _merge_split(name, chosen, staging, num_workers, stop)
            names += working_files
        _merge_quarantine(splits, staging.folder / QUARANTINE_NAME)
        first = opened[0].manifest
        manifest = Manifest(
            format=first.format,
            classes=first.classes,
            splits=merged,
            source=_common([each.source for each in manifests]),
            options=_common([each.options | {"part": None} for each in manifests]),
            versions=_common([each.versions for each in manifests]),
            quarantine=hash_files([staging.folder / QUARANTINE_NAME], 1, stop)[0],
        )
        manifest.save(staging.folder)
        staging.publish([*names, QUARANTINE_NAME, MANIFEST_NAME])
    images = sum(split.samples for split in merged.values())
    return summarize(target, manifest, images=images, seconds=time.monotonic() - began)


def _splits(parts: list[_Part]) -> dict[str, list[_Part]]:
    """Split → its parts in order. Raises ValueError if they do not fit together."""
    if not parts:
        raise ValueError("there is nothing to merge: give the folders of the parts, then the destination")
    first = parts[0]
    for part in parts[1:]:
        if part.manifest.format != first.manifest.format:
            raise ValueError(f"{first.folder} is {first.manifest.format} and {part.folder} {part.manifest.format}")
        if part.manifest.classes != first.manifest.classes:
            raise ValueError(f"{first.folder} and {part.folder} have different class lists")
    splits: dict[str, list[_Part]] = {}
    for name in sorted({name for part in parts for name in part.manifest.splits}, key=split_rank):
        chosen = [part for part in parts if name in part.manifest.splits]
        chosen.sort(key=lambda part: part.manifest.part or (1, 1))
        count = (chosen[0].manifest.part or (1, 1))[1]
        given = [part.manifest.part or (1, 1) for part in chosen]
        if given != [(number, count) for number in range(1, count + 1)]:
            raise ValueError(
                f"of {name}, which was converted in {count} part(s), these are given: "
                f"{', '.join(f'{number}/{of}' for number, of in given)}; give each part once"
            )
        for part in chosen[1:]:
            for what in ("source", "options"):
                ours, theirs = (
                    {key: value for key, value in getattr(each.manifest, what).items() if key != "part"}
                    for each in (chosen[0], part)
                )
                if ours != theirs:
                    raise ValueError(f"{chosen[0].folder} and {part.folder} differ in {what}: {ours} and {theirs}")
        splits[name] = chosen
    return splits


def _merge_split(
    name: str, parts: list[_Part], staging: Staging, num_workers: int, stop: StopSignals
) -> tuple[SplitManifest, list[str]]:
    """The manifest of a joined split, and the names of its files in the staging folder."""
    entries = [part.manifest.splits[name] for part in parts]
    records = [SampleRecords.open(part.folder / entry.records.name) for part, entry in zip(parts, entries, strict=True)]
    with closing(RowFile(staging.folder / f"{name}.rows")) as rows:
        return _merge_rows(name, parts, entries, records, rows, staging, num_workers, stop)


def _merge_rows(
    name: str,
    parts: list[_Part],
    entries: list[SplitManifest],
    records: list[SampleRecords],
    rows: RowFile,
    staging: Staging,
    num_workers: int,
    stop: StopSignals,
) -> tuple[SplitManifest, list[str]]:
    positions = sum(entry.positions for entry in entries)
    page_bytes = None
    if parts[0].manifest.format == "ffcv":
        beton = _merge_betons(name, parts, entries, records, rows, positions, staging, stop)
        files, page_bytes = hash_files([beton], num_workers, stop), int(read_beton_head(beton)["page_size"])
        working_files = [beton.name]
    else:
        files = _copy_shards(name, parts, entries, records, rows, staging, stop)
        working_files = [file.name for file in files]
    names = PackedNames(each for part in records for each in part.names())
    path = staging.folder / f"{name}.records.safetensors"
    rows.write_records(path, lambda block, start: names[start : start + len(block)])
    reasons: dict[str, int] = {}
    for entry in entries:
        for reason, count in entry.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    manifest = SplitManifest.of(
        rows,
        positions=positions,
        reasons=dict(sorted(reasons.items())),
        quarantined=sum(entry.quarantined for entry in entries),
        page_bytes=page_bytes,
        records=hash_files([path], 1, stop)[0],
        files=tuple(files),
    )
    return manifest, [path.name, *working_files]


def _merge_betons(
    name: str,
    parts: list[_Part],
    entries: list[SplitManifest],
    records: list[SampleRecords],
    rows: RowFile,
    positions: int,
    staging: Staging,
    stop: StopSignals,
) -> Path:
    page_bytes = max(entry.page_bytes or 0 for entry in entries)
    writer = BetonWriter(staging.folder / f"{name}.beton", num_reserved=positions, page_bytes=page_bytes)
    try:
        for part, entry, samples in zip(parts, entries, records, strict=True):
            with open(part.folder / entry.image_files[0], "rb", buffering=0) as file:
                for start in range(0, len(samples), BLOCK_ROWS):
                    block = samples.rows(start, start + BLOCK_ROWS)
                    writer.write(block, lambda offset, size, file=file: _read(file, size, offset, stop))  # type: ignore[misc]
                    rows.append(block)
        return writer.finish(rows)[0]
    finally:
        writer.close()


def _read(file: FileIO, size: int, offset: int, stop: StopSignals) -> bytes:
    _stop_if_asked(stop)
    return read_at(file.fileno(), size, offset)


def _stop_if_asked(stop: StopSignals) -> None:
    if stop.requested:
        raise StoppedBySignalError(f"stopped by {stop.name}; {AGAIN}")


def _copy_shards(
    name: str,
    parts: list[_Part],
    entries: list[SplitManifest],
    records: list[SampleRecords],
    rows: RowFile,
    staging: Staging,
    stop: StopSignals,
) -> list[FileEntry]:
    """The tars as they are, numbered through."""
    files: list[FileEntry] = []
    shard = 0
    for part, entry, samples in zip(parts, entries, records, strict=True):
        for start in range(0, len(samples), BLOCK_ROWS):
            block = samples.rows(start, start + BLOCK_ROWS)
            block["shard"] += shard
            rows.append(block)
        known = {file.name: file for file in entry.files}
        for old in entry.image_files:
            for suffix in (".tar", ".idx"):
                _stop_if_asked(stop)
                source = known[Path(old).with_suffix(suffix).name]
                target = Path(shard_name(name, shard)).with_suffix(suffix).name
                shutil.copyfile(part.folder / source.name, staging.folder / target)
                files.append(replace(source, name=target))
            shard += 1
    return files


def _merge_quarantine(splits: dict[str, list[_Part]], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for name, parts in splits.items():
            for part in parts:
                for line in (part.folder / QUARANTINE_NAME).read_text(encoding="utf-8").splitlines(keepends=True):
                    if json.loads(line)["split"] == name:
                        file.write(line)


def _check_files(parts: list[_Part], num_workers: int, stop: StopSignals) -> None:
    """Raises ValueError if a part is not what its manifest says: a damaged part must not become a sound whole."""
    expected = [(part.folder / file.name, file) for part in parts for file in part.manifest.all_files]
    if missing := [str(path) for path, _ in expected if not path.is_file()]:
        raise ValueError(f"files of the parts are missing: {', '.join(missing[:5])}")
    found = hash_files([path for path, _ in expected], num_workers, stop)
    for (path, entry), now in zip(expected, found, strict=True):
        if (now.bytes, now.sha256) != (entry.bytes, entry.sha256):
            raise ValueError(f"{path} is damaged: it is not what its manifest says. Convert that part again")


def _check_space(parts: list[_Part], staging: Staging) -> None:
    needed = sum(file.bytes for part in parts for file in part.manifest.all_files)
    free = shutil.disk_usage(staging.folder).free
    if needed > free:
        raise NoRoomError(
            errno.ENOSPC,
            f"the parts have {in_words(needed)}, but {staging.folder.parent} has {in_words(free)} free. Free some, or "
            "choose another destination",
        )


def _common(values: list[dict[str, Any]]) -> dict[str, Any]:
    """What all say, where they agree; else a list for each."""
    if all(value == values[0] for value in values):
        return values[0]
    return {"merged": values}
