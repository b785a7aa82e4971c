"""One split on its way to disk: which images, in which order, what has been written, and how to go on from there."""

from __future__ import annotations

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dataset_tools.conversion.hashing import hash_files
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.conversion.staging import SplitState
from dataset_tools.conversion.transform import UnusableImageError, transform
from dataset_tools.files import NoRegularFileError, raise_if_of_machine
from dataset_tools.formats.manifest import records_name
from dataset_tools.formats.output_format import OutputFormat, SampleWriter
from dataset_tools.formats.records import HASH_BYTES, REENCODED, ROW
from dataset_tools.formats.row_file import RowFile
from dataset_tools.formats.split_manifest import SplitManifest, check_split_name
from dataset_tools.packed_names import PackedNames
from dataset_tools.sources.split import RottenImageError, Split
from dataset_tools.stop_signals import StopSignals
from dataset_tools.subsets import shuffled_order

Positions: TypeAlias = tuple[int, int]
"""A task: positions [start, stop) of the order of the whole split."""
NO_ROWS = hashlib.sha256().hexdigest()
CHUNK_IMAGES, CHUNK_BYTES = 32, 1 << 26
"""A task has at most so many images, and fewer if these would be larger than so many bytes."""


@dataclass(frozen=True, slots=True)
class TransformedImages:
    """The transformed images of a task, whose bytes lie one behind the other in its payload."""

    rows: NDArray[np.void]
    """ROW [M]; `offset` counts in the payload, `shard` means nothing yet."""
    reasons: Counter[str]
    """Why images were re-encoded → how many."""
    rejected: list[tuple[int, str]]
    """(position, reason)."""


class SplitConversion:
    """A split, its files in `folder`, and the journal's `state` of it, which `checkpoint` brings up to date."""

    writer: SampleWriter
    rows: RowFile
    """One row for each sample that was written. Both exist while the conversion is `opened`."""

    def __init__(self, split: Split, options: ConvertOptions, folder: Path, states: dict[str, SplitState]) -> None:
        """`states`: of the splits, as `checkpoint` left them. Raises ValueError for the name of a split."""
        check_split_name(split.name)
        self.split, self.options, self.folder = split, options, folder
        shuffled = options.settled_order == "shuffled"
        self.order = shuffled_order(len(split), options.seed) if shuffled else None
        number, count = options.part_numbers or (1, 1)
        self.start, self.stop = len(split) * (number - 1) // count, len(split) * number // count
        self.num_positions = self.stop - self.start
        self.state = states.setdefault(split.name, SplitState(self.start, 0, NO_ROWS, {}))
        self._task_images = CHUNK_IMAGES

    @property
    def num_left(self) -> int:
        return self.stop - self.state.done

    @property
    def num_quarantined(self) -> int:
        """As the journal knows it."""
        return self.state.done - self.start - self.state.rows

    @property
    def counts(self) -> str:
        """What became of the images so far."""
        reencoded, quarantined = sum(self.state.reasons.values()), self.state.done - self.start - len(self.rows)
        return f"passed {len(self.rows) - reencoded:,}, re-encoded {reencoded:,}, quarantined {quarantined:,}"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Opens the files, cut back to what the journal knows. Raises ValueError if they do not fit it."""
        try:
            self.rows = RowFile(self.folder / f"{self.split.name}.rows", self.state.rows)
            self._check_rows()
            self.writer = self.options.output.writer(
                self.folder,
                self.split.name,
                num_reserved=self.num_positions,
                page_bytes=self.options.page_bytes,
                shard_bytes=self.options.shard_bytes,
                rows=self.rows,
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the unfinished conversion cannot be continued: {error}. Delete {self.folder} to start anew."
            ) from error
        with closing(self.rows), closing(self.writer):
            yield

    def _check_rows(self) -> None:
        """Raises ValueError if what the journal says of the rows is not so."""
        state = self.state
        reencoded = sum(int((block["handling"] == REENCODED).sum()) for block, _ in self.rows.blocks())
        if (
            self.rows.sha256() != state.rows_sha256
            or sum(state.reasons.values()) != reencoded
            or not self.start + state.rows <= state.done <= self.stop
        ):
            raise ValueError(f"{self.rows.path} is not what the journal says")

    def tasks(self) -> Iterator[Positions]:
        """The positions that are left to do, in order."""
        for start in range(self.state.done, self.stop, self._task_images):
            yield start, min(start + self._task_images, self.stop)

    def limit_task_bytes(self, image_bytes: int) -> None:
        """Make tasks smaller where images are as large as `image_bytes`. Changes nothing but memory."""
        self._task_images = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // max(1, image_bytes)))

    def transform(self, positions: Positions) -> tuple[TransformedImages, list[bytes]]:
        """The work of a worker: what becomes of the images at `positions`, and their bytes."""
        rows, payload, offset = np.zeros(positions[1] - positions[0], dtype=ROW), list[bytes](), 0
        reasons, rejected = Counter[str](), list[tuple[int, str]]()
        for position in range(*positions):
            index = self._source_index(position)
            try:
                image = transform(_read(self.split, index), self.split.names[index], self.options)
            except UnusableImageError as error:
                rejected.append((position, str(error)))
                continue
            row = rows[len(payload)]
            row["source_index"], row["position"], row["label"] = index, position, self.split.labels[index]
            row["width"], row["height"] = image.width, image.height
            row["encoding"], row["handling"] = image.encoding, image.handling
            row["offset"], row["num_bytes"] = offset, len(image.data)
            row["hash"] = np.frombuffer(hashlib.sha256(image.data).digest()[:HASH_BYTES], dtype=np.uint8)
            if image.reason:
                reasons[image.reason] += 1
            payload.append(image.data)
            offset += len(image.data)
        return TransformedImages(rows[: len(payload)], reasons, rejected), payload

    def add(self, positions: Positions, images: TransformedImages, payload: memoryview) -> None:
        """Write what became of `positions`, which follow those before."""
        assert positions[0] == self.state.done
        rows = images.rows.copy()
        self.writer.write(rows, lambda offset, size: payload[offset : offset + size])
        self.rows.append(rows)
        self.state.reasons = dict(Counter(self.state.reasons) + images.reasons)
        self.state.done = positions[1]

    def checkpoint(self) -> None:
        """Bring everything to the disk and `state` up to date."""
        self.state.rows, self.state.rows_sha256 = len(self.rows), self.rows.sha256()
        self.writer.sync()
        self.rows.sync()

    def quarantine_lines(self, images: TransformedImages) -> bytes:
        """Lists the rejected images of a task, as lines of quarantine.jsonl."""
        lines = []
        for position, reason in images.rejected:
            index = self._source_index(position)
            entry = {"split": self.split.name, "name": self.split.names[index], "index": index, "reason": reason}
            lines.append(json.dumps(entry) + "\n")
        return "".join(lines).encode()

    def name_at(self, position: int) -> str:
        """The name of the image at a position of the order."""
        return self.split.names[self._source_index(position)]

    def _source_index(self, position: int) -> int:
        return position if self.order is None else int(self.order[position])


def _read(split: Split, index: int) -> bytes:
    """Raises UnusableImageError where there is no regular file, OSError for anything else that cannot be read."""
    try:
        return split.read_checked(index)
    except NoRegularFileError as error:
        raise UnusableImageError(str(error.strerror).rpartition(": ")[2]) from error  # without the place of the source
    except RottenImageError as error:
        raise UnusableImageError(str(error)) from error
    except OSError as error:
        raise_if_of_machine(error)
        raise OSError(
            error.errno or errno.EIO,
            f"{error.strerror or error}. A source must not change while it is converted: nothing was left out. When it "
            "is whole again, the same command continues; to leave this image out, put an empty file in its place",
        ) from error


def complete_split(
    name: str,
    rows: RowFile,
    names: PackedNames,
    files: Sequence[Path],
    output: OutputFormat,
    *,
    of_source: bool,
    num_workers: int,
    stop: StopSignals,
    **counted: Any,
) -> SplitManifest:
    """Writes the records of a split beside its `rows`, and hashes its files. Returns its manifest.

    `names`, `of_source`: as `RowFile.write_records` takes them. `files`: of images, in order. `counted`: what of the
    manifest the rows do not tell.
    """
    path = rows.path.with_name(records_name(name))
    rows.write_records(path, names, of_source=of_source)
    to_hash = [(path, None), *((file, output.hash_block_bytes) for file in files)]
    records, *images = hash_files(to_hash, num_workers, stop)
    page_bytes = output.settled_page_bytes(files)
    return SplitManifest.of(rows, page_bytes=page_bytes, records=records, files=tuple(images), **counted)
