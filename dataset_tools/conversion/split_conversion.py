"""One split on its way to disk: which images, in which order, what has been written, and how to go on from there."""

from __future__ import annotations

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.conversion.treatment import Policy, UnusableImageError, treat
from dataset_tools.formats.beton import BetonWriter
from dataset_tools.formats.records import HASH_BYTES, PASSED_THROUGH, ROW
from dataset_tools.formats.row_file import RowFile
from dataset_tools.formats.sample_writer import SampleWriter
from dataset_tools.formats.tar_shards import ShardWriter
from dataset_tools.sources.image_folder import DanglingLinkError
from dataset_tools.sources.split import Split
from dataset_tools.subsets import shuffled_order

Positions: TypeAlias = tuple[int, int]
"""A task: positions [start, stop) of the order of the whole split."""
CHUNK_IMAGES, CHUNK_BYTES = 32, 1 << 26
"""A task has at most so many images, and fewer if these would be larger than so many bytes."""


@dataclass(frozen=True, slots=True)
class TreatedImages:
    """What became of the images of a task; their bytes lie one behind the other in its payload."""

    rows: NDArray[np.void]
    """ROW [M]; `offset` counts in the payload, `shard` means nothing yet."""
    reasons: Counter[str]
    """Why images were re-encoded → how many."""
    rejected: list[tuple[int, str]]
    """(position, reason)."""


def treat_images(split: Split, order: NDArray[np.int64] | None, policy: Policy) -> Callable[[Positions], Any]:
    """The work of a worker: positions → (TreatedImages, their bytes)."""

    def work(positions: Positions) -> tuple[TreatedImages, list[bytes]]:
        rows, payload, offset = np.zeros(positions[1] - positions[0], dtype=ROW), list[bytes](), 0
        reasons, rejected = Counter[str](), list[tuple[int, str]]()
        for position in range(*positions):
            index = position if order is None else int(order[position])
            try:
                image = treat(_read(split, index), split.names[index], policy)
            except UnusableImageError as error:
                rejected.append((position, str(error)))
                continue
            row = rows[len(payload)]
            row["source_index"], row["position"], row["label"] = index, position, split.labels[index]
            row["width"], row["height"] = image.width, image.height
            row["encoding"], row["handling"] = image.encoding, image.handling
            row["offset"], row["num_bytes"] = offset, len(image.data)
            row["hash"] = np.frombuffer(hashlib.sha256(image.data).digest()[:HASH_BYTES], dtype=np.uint8)
            if image.reason:
                reasons[image.reason] += 1
            payload.append(image.data)
            offset += len(image.data)
        return TreatedImages(rows[: len(payload)], reasons, rejected), payload

    return work


def crashed_image(positions: Positions, reason: str) -> TreatedImages:
    """What becomes of an image whose decoding kills its worker each time."""
    return TreatedImages(np.zeros(0, dtype=ROW), Counter(), [(positions[0], reason)])


def _read(split: Split, index: int) -> bytes:
    """Raises UnusableImageError for a link that leads nowhere, OSError for anything else that cannot be read."""
    try:
        return split.read(index)
    except DanglingLinkError as error:
        raise UnusableImageError(str(error.strerror)) from error
    except OSError as error:
        raise OSError(
            error.errno or errno.EIO,
            f"{error.strerror or error}. A source must not change while it is converted: nothing was left out. When it "
            "is whole again, the same command continues; to leave this image out, put an empty file in its place",
        ) from error


class SplitConversion:
    """A split, its files in `folder`, and the journal's `state` of it, which `checkpoint` brings up to date."""

    def __init__(self, split: Split, options: ConvertOptions, folder: Path, state: dict[str, Any]) -> None:
        """`state`: {} at the very beginning, else what `checkpoint` left. Raises ValueError if files do not fit it."""
        self.split, self.options, self.folder, self.state = split, options, folder, state
        shuffled = options.settled_order == "shuffled"
        self.order = shuffled_order(len(split), options.seed) if shuffled else None
        number, count = options.part_numbers or (1, 1)
        self.start, self.stop = len(split) * (number - 1) // count, len(split) * number // count
        state.setdefault("done", self.start)
        state.setdefault("rows", 0)
        state.setdefault("counts", {"passed_through": 0, "reencoded": 0, "quarantined": 0, "bytes": 0})
        state.setdefault("reasons", {})
        self._writer: SampleWriter | None = None
        self._task_images = CHUNK_IMAGES

    @property
    def num_positions(self) -> int:
        return self.stop - self.start

    def open(self) -> None:
        """Cut the files back to what the journal knows."""
        saved = self.state.get("writer")
        remedy = f"Delete {self.folder} to start anew."
        try:
            self._rows = RowFile(self.folder / f"{self.split.name}.rows", self.state["rows"])
            if self.options.format == "ffcv":
                page_bytes = self.options.page_bytes
                assert page_bytes is not None
                path = self.folder / f"{self.split.name}.beton"
                self._writer = BetonWriter(path, num_reserved=self.num_positions, page_bytes=page_bytes, state=saved)
            else:
                self._writer = ShardWriter(
                    self.folder, self.split.name, shard_bytes=self.options.shard_bytes, state=saved
                )
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"the unfinished conversion cannot be continued: {error}. {remedy}") from error

    @property
    def writer(self) -> SampleWriter:
        assert self._writer is not None, "open() comes first"
        return self._writer

    def tasks(self) -> Iterator[Positions]:
        """What is left to do, in order."""
        for start in range(self.state["done"], self.stop, self._task_images):
            yield start, min(start + self._task_images, self.stop)

    def limit_task_bytes(self, image_bytes: int) -> None:
        """Make tasks smaller where images are as large as `image_bytes`. Changes nothing but memory."""
        self._task_images = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // max(1, image_bytes)))

    def add(self, positions: Positions, images: TreatedImages, payload: memoryview) -> None:
        """Write what became of `positions`, which follow those before."""
        assert positions[0] == self.state["done"]
        rows, counts = images.rows.copy(), self.state["counts"]
        self.writer.write(rows, lambda offset, size: payload[offset : offset + size])
        self._rows.append(rows)
        passed = int((rows["handling"] == PASSED_THROUGH).sum())
        counts["passed_through"] += passed
        counts["reencoded"] += len(rows) - passed
        counts["quarantined"] += len(images.rejected)
        counts["bytes"] += len(payload)
        for reason, number in images.reasons.items():
            self.state["reasons"][reason] = self.state["reasons"].get(reason, 0) + number
        self.state["rows"] = len(self._rows)
        self.state["done"] = positions[1]

    def checkpoint(self) -> None:
        """Bring everything to the disk and `state` up to date."""
        self.state["writer"] = self.writer.sync()
        self._rows.sync()

    @property
    def rows(self) -> RowFile:
        """Of all samples that were written."""
        return self._rows

    def quarantine_lines(self, images: TreatedImages) -> bytes:
        """What is rejected of a task, as lines of quarantine.jsonl."""
        lines = []
        for position, reason in images.rejected:
            index = self._source_index(position)
            entry = {"split": self.split.name, "name": self.split.names[index], "index": index, "reason": reason}
            lines.append(json.dumps(entry) + "\n")
        return "".join(lines).encode()

    def name_at(self, position: int) -> str:
        """Of the image at a position of the order."""
        return self.split.names[self._source_index(position)]

    def _source_index(self, position: int) -> int:
        return position if self.order is None else int(self.order[position])

    def descriptors(self) -> list[int]:
        return [*self.writer.descriptors(), self._rows.fileno()] if self._writer else []

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._rows.close()
            self._writer = None
