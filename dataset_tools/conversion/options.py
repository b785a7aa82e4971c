"""How to convert, and what of that the bytes of the result depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from dataset_tools.conversion.treatment import Policy
from dataset_tools.formats.beton import page_bytes_for
from dataset_tools.formats.manifest import FFCV_BATCH_SIZE, FFCV_BATCHES_AHEAD, FORMATS
from dataset_tools.formats.tar_shards import parse_bytes

DECODE_LIMIT_BYTES = 4 << 30
DEFAULT_MAX_SIDE = math.isqrt((DECODE_LIMIT_BYTES - 1) // ((FFCV_BATCHES_AHEAD + 2) * FFCV_BATCH_SIZE * 3))
"""Pixels: with no side above this, FFCV's stock decoders stay under 4 GiB."""
UNLIMITED_PAGE_BYTES = 1 << 23
"""Where the images have no limit: FFCV's own page size, and larger ones if a sample needs it."""

_ALLOWED: dict[str, tuple[str | None, ...]] = {
    "format": FORMATS,
    "mode": ("auto", "passthrough", "reencode"),
    "check": ("header", "decode"),
    "order": ("source", "shuffled", None),
}
"""The command line asks for these by their types; others may not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """The flags of `convert`. Raises ValueError for what is not allowed."""

    format: Literal["ffcv", "webdataset"]
    """ffcv: one .beton for each split; webdataset: numbered tars, with the .idx files of DALI."""
    split: str | None = None
    """Convert only this split; all of them if not given."""
    mode: Literal["auto", "passthrough", "reencode"] = "auto"
    """auto: keep the bytes of a JPEG that needs no change, re-encode the rest. passthrough: never re-encode, put
    what would need it in quarantine. reencode: every image becomes a new JPEG."""
    check: Literal["header", "decode"] = "header"
    """What is looked at before bytes are kept: markers, dimensions and end of image, or every pixel."""
    order: Literal["source", "shuffled"] | None = None
    """Of the samples. source: by class, as ImageFolder has them. If not given: shuffled for webdataset, else source."""
    seed: int = 0
    """Of --order shuffled."""
    short_side: int | None = None
    """Scale images down until their shorter side has at most this many pixels. Replaces the default of --max-side."""
    max_side: int | None = None
    """Scale images down until no side has more pixels; 0: no limit. If not given: 1057 for ffcv (its stock decoders
    then stay under 4 GiB), no limit for webdataset and in --mode passthrough."""
    quality: int = 90
    """Of JPEGs that are re-encoded, 1 to 100."""
    shard_size: str = "256MiB"
    """At most this large is a tar of webdataset (unless one sample is larger)."""
    part: str | None = None
    """I/N: convert only the I-th of N parts of each split (1/N … N/N); `merge` joins them."""

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)} is not allowed: give {_either(allowed)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality} is not allowed: give 1 to 100")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"--short-side {self.short_side} is not allowed: give at least 1 pixel")
        if self.max_side is not None and self.max_side < 0:
            raise ValueError(f"--max-side {self.max_side} is not allowed: give at least 1 pixel, or 0 for no limit")
        if self.mode == "passthrough" and (self.short_side or self.max_side):
            raise ValueError(
                "--mode passthrough changes no image, so --short-side and --max-side cannot go with it: leave "
                "them out, or use --mode auto, which re-encodes only what is too large"
            )
        if self.shard_bytes < 1 << 16:
            raise ValueError(f"--shard-size {self.shard_size} is not allowed: give at least 64KiB")
        self.part_numbers  # noqa: B018 - raises

    @property
    def part_numbers(self) -> tuple[int, int] | None:
        """(I, N) of --part."""
        if self.part is None:
            return None
        number, slash, count = self.part.partition("/")
        if not slash or not number.isdecimal() or not count.isdecimal() or not 1 <= int(number) <= int(count):
            raise ValueError(f"--part {self.part} is not allowed: give I/N with 1 <= I <= N, for example 3/8")
        return int(number), int(count)

    @property
    def shard_bytes(self) -> int:
        return parse_bytes(self.shard_size)

    @property
    def settled_order(self) -> str:
        return self.order or ("shuffled" if self.format == "webdataset" else "source")

    @property
    def settled_max_side(self) -> int | None:
        if self.max_side is not None:
            return self.max_side or None
        if self.format == "ffcv" and self.mode != "passthrough" and not self.short_side:
            return DEFAULT_MAX_SIDE
        return None

    @property
    def page_bytes(self) -> int | None:
        """FFCV's page size, which holds the largest image within the limits, uncompressed."""
        if self.format != "ffcv":
            return None
        side = self.settled_max_side
        return page_bytes_for(3 * side * side) if side else UNLIMITED_PAGE_BYTES

    @property
    def policy(self) -> Policy:
        return Policy(
            format=self.format,
            mode=self.mode,
            check=self.check,
            short_side=self.short_side,
            max_side=self.settled_max_side,
            quality=self.quality,
            max_jpeg_bytes=self.page_bytes if self.settled_max_side else None,
        )

    def identity(self) -> dict[str, Any]:
        """What the bytes of the result depend on, as JSON."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        settled = {"order": self.settled_order, "max_side": self.settled_max_side, "shard_size": self.shard_bytes}
        identity = given | settled
        if self.settled_order == "source":
            del identity["seed"]
        if self.format != "webdataset":
            del identity["shard_size"]
        return identity


def _either(values: tuple[str | None, ...]) -> str:
    *some, last = [value for value in values if value]
    return f"{', '.join(some)} or {last}"
