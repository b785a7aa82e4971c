"""How to convert, and what of that the bytes of the result depend on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from dataset_tools.formats.formats import FORMATS
from dataset_tools.formats.output_format import OutputFormat
from dataset_tools.formats.tar_shards import parse_bytes
from dataset_tools.limits import Count, CountOrZero, require_allowed, unknown

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """The flags of `convert`. Raises ValueError for what is not allowed."""

    format: FormatName
    """ffcv: one .beton for each split; webdataset: numbered tars, with the .idx files of DALI."""
    split: str | None = None
    """Convert only this split; all of them if not given."""
    mode: Literal["auto", "passthrough", "reencode"] = "auto"
    """auto: keep the bytes of a JPEG that needs no change, re-encode the rest. passthrough: never re-encode, put
    what would need it in quarantine. reencode: every image becomes a new JPEG."""
    check: Literal["header", "decode"] = "header"
    """What is looked at before bytes are kept. header: markers, dimensions and end of image; damage inside an image is
    not seen, and loaders replace, and name, what they cannot decode. decode: every pixel, which takes several times as
    long."""
    order: Literal["source", "shuffled"] | None = None
    """Of the samples. source: by class, as ImageFolder has them. If not given: shuffled for webdataset, else source."""
    seed: int = 0
    """Of --order shuffled."""
    short_side: Count | None = None
    """Scale images down until their shorter side has at most this many pixels. Replaces the default of --max-side."""
    max_side: CountOrZero | None = None
    """Scale images down until no side has more pixels; 0: no limit. If not given: 1057 for ffcv (its stock decoders
    then stay under 4 GiB), no limit for webdataset and in --mode passthrough."""
    quality: Annotated[int, Meta(ge=1, le=100)] = 90
    """Of JPEGs that are re-encoded, 1 to 100."""
    shard_size: str = "256MiB"
    """At most this large is a tar of webdataset (unless one sample is larger)."""
    part: str | None = None
    """I/N: convert only the I-th of N parts of each split (1/N … N/N); `merge` joins them."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(unknown("format", self.format, FORMATS))
        require_allowed(self)
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
    def output(self) -> OutputFormat:
        return FORMATS[self.format]

    @property
    def settled_order(self) -> str:
        return self.order or self.output.default_order

    @property
    def settled_max_side(self) -> int | None:
        if self.max_side is not None:
            return self.max_side or None
        return None if self.mode == "passthrough" or self.short_side else self.output.default_max_side

    @property
    def page_bytes(self) -> int | None:
        """The size of the format's pages, which hold the largest image within the limits, uncompressed."""
        return self.output.page_bytes(self.settled_max_side)

    @property
    def max_jpeg_bytes(self) -> int | None:
        """A JPEG of more bytes is encoded anew; None: any number."""
        return self.page_bytes if self.settled_max_side else None

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) within the limits, with the same ratio; never larger."""
        limits = (self.short_side, min), (self.settled_max_side, max)
        for limit, side_of in limits:
            if limit and (side := side_of(width, height)) > limit:
                width, height = max(1, round(width * limit / side)), max(1, round(height * limit / side))
        return width, height

    def identity(self) -> dict[str, Any]:
        """What the bytes of the result depend on, as JSON."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        settled = {"order": self.settled_order, "max_side": self.settled_max_side, "shard_size": self.shard_bytes}
        identity = given | settled
        if self.settled_order == "source":
            del identity["seed"]
        if not self.output.has_shards:
            del identity["shard_size"]
        return identity
