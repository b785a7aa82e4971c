"""Parts of a conversion, joined: bytes are copied and pointers rewritten; no image is decoded."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset_tools.conversion.convert import summarize
from dataset_tools.conversion.hashing import file_problems, hash_files
from dataset_tools.conversion.split_conversion import CHUNK_IMAGES, complete_split
from dataset_tools.conversion.staging import remove_leftover, settled_destination, staged, staging_folder
from dataset_tools.conversion.workers import settled_workers
from dataset_tools.files import write_file
from dataset_tools.formats.manifest import QUARANTINE_NAME, Manifest, is_converted, read_quarantine, require_files
from dataset_tools.formats.row_file import RowFile
from dataset_tools.formats.split_manifest import SplitManifest
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.converted import open_split
from dataset_tools.sources.split import split_rank
from dataset_tools.stop_signals import StopSignals, stop_signals

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Part:
    folder: Path
    manifest: Manifest


def merge(
    parts: Sequence[str | os.PathLike[str]], destination: str | os.PathLike[str], *, workers: int | None = None
) -> dict[str, Any]:
    """Join converted data sets into the folder `destination`: parts I/N of a conversion, or different splits, or both.

    Of parts, every file is that of an unpartitioned conversion, to the byte. The parts' files are compared with their
    manifests first. Returns the summary that `--json` prints.

    Raises ValueError if the parts do not fit together, are incomplete or damaged, FileExistsError if there is something
    at the destination, OSError for a full disk.
    """
    began = time.monotonic()
    num_workers = settled_workers(workers)
    opened = [_Part(Path(part).expanduser(), Manifest.load(Path(part).expanduser())) for part in parts]
    splits = _splits(opened)
    target = settled_destination(destination)
    for part in opened:
        own = part.folder.resolve()
        for folder in (target, staging_folder(target)):
            if folder.is_relative_to(own) or own.is_relative_to(folder):
                raise FileExistsError(f"merge would write into {folder}, and the part {own} is there. Give another")
    manifests = [part.manifest for part in opened]
    plan: dict[str, Any] = {
        "merge": sorted(hashlib.sha256(repr(manifest).encode()).hexdigest() for manifest in manifests)
    }
    facts: dict[str, Any] = {
        "format": manifests[0].format,
        "classes": manifests[0].classes,
        "source": _common([each.source for each in manifests]),
        "options": _common([each.options | {"part": None} for each in manifests]),
        "versions": _common([each.versions for each in manifests]),
    }
    if is_converted(target):
        whole = Manifest.load(target)
        if not _is_made_of(target, whole, splits, facts):
            raise FileExistsError(
                f"{target} is a converted data set already; the last folder of merge is the one to make"
            )
        remove_leftover(target, plan)
        logger.info("%s is whole already: nothing to do", target)
        return summarize(target, whole, images=0, seconds=time.monotonic() - began)
    with staged(target, plan) as staging, stop_signals() as stop:
        num_bytes = sum(file.bytes for manifest in manifests for file in manifest.all_files)
        staging.check_room(num_bytes, "the parts have")
        for part in opened:  # a damaged part must not become a sound whole
            for name, problem in file_problems(part.folder, part.manifest.all_files, num_workers, stop):
                what = f"{part.folder / name} is not what its manifest says: {problem}"
                raise ValueError(f"{what}. Convert that part again")
        merged = {
            name: _merge_split(name, chosen, staging.folder, num_workers, stop) for name, chosen in splits.items()
        }
        quarantine = staging.folder / QUARANTINE_NAME
        _merge_quarantine(splits, quarantine)
        manifest = Manifest(
            splits=merged,
            **facts,
            quarantine=hash_files([(quarantine, None)], 1, stop)[0],
            account=manifests[0].account,
        )
        staging.publish(manifest)
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
        given = [part.manifest.part or (1, 1) for part in chosen]
        count = given[0][1]
        if len(given) != count or given != [(number, count) for number in range(1, count + 1)]:
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


def _is_made_of(target: Path, whole: Manifest, splits: dict[str, list[_Part]], facts: dict[str, Any]) -> bool:
    """Whether `target` is what an earlier merge of the same parts made: the same samples, in whole files."""
    if whole.splits.keys() != splits.keys() or any(getattr(whole, name) != value for name, value in facts.items()):
        return False
    require_files(target, whole.all_files)
    for name, parts in splits.items():
        ours = open_split(target, whole, name).records
        theirs = [open_split(part.folder, part.manifest, name).records for part in parts]
        for column in ("source_index", "position", "label", "hash"):
            if not np.array_equal(ours[column], np.concatenate([records[column] for records in theirs])):
                return False
    return True


def _merge_split(name: str, parts: list[_Part], folder: Path, num_workers: int, stop: StopSignals) -> SplitManifest:
    """Writes the files of a joined split into `folder`. Returns its manifest."""
    given = [open_split(part.folder, part.manifest, name) for part in parts]
    entries = [part.manifest.splits[name] for part in parts]
    output, positions = given[0].output, sum(entry.positions for entry in entries)
    shard_bytes = parts[0].manifest.options.get("shard_size")
    with (
        closing(RowFile(folder / f"{name}.rows")) as rows,
        closing(
            output.writer(
                folder,
                name,
                num_reserved=positions,
                page_bytes=max(entry.page_bytes or 0 for entry in entries),
                shard_bytes=shard_bytes if isinstance(shard_bytes, int) else max(entries[0].image_bytes),
                rows=rows,
            )
        ) as writer,
    ):
        for split in given:
            split.check()
            for start in range(0, len(split), CHUNK_IMAGES):
                stop.raise_if_requested()
                block = split.records.rows(start, start + CHUNK_IMAGES)
                images = b"".join(map(split.read_stored, range(start, start + len(block))))
                block["offset"] = np.cumsum(block["num_bytes"]) - block["num_bytes"]

                def read(offset: int, size: int, images: bytes = images) -> bytes:
                    return images[offset : offset + size]

                writer.write(block, read)
                rows.append(block)
        return complete_split(
            name,
            rows,
            PackedNames(each for split in given for each in split.names),
            writer.finish(rows),
            output,
            of_source=False,
            num_workers=num_workers,
            stop=stop,
            positions=positions,
            reasons=dict(sorted(sum((Counter(entry.reasons) for entry in entries), Counter[str]()).items())),
            quarantined=sum(entry.quarantined for entry in entries),
        )


def _merge_quarantine(splits: dict[str, list[_Part]], path: Path) -> None:
    lines = []
    for name, parts in splits.items():
        for part in parts:
            content = (part.folder / QUARANTINE_NAME).read_bytes()
            listed = zip(read_quarantine(content), content.splitlines(keepends=True), strict=True)
            lines += [line for entry, line in listed if entry.split == name]
    write_file(path, b"".join(lines))


def _common(values: list[dict[str, Any]]) -> dict[str, Any]:
    """The value on which all agree, or else a list of all."""
    if all(value == values[0] for value in values):
        return values[0]
    return {"merged": values}
