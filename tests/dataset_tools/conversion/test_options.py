"""What each option does to the result, what it does not, and what is not allowed."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.formats.beton import DECODE_LIMIT_BYTES, DEFAULT_MAX_SIDE, page_bytes_for
from dataset_tools.formats.tar_shards import parse_bytes
from dataset_tools.sources import open_source
from dataset_tools.sources.converted import open_converted
from dataset_tools.subsets import shuffled_order
from tests.dataset_tools.conversion.pictures import encoded, flat, noise
from tests.dataset_tools.made_up import write_files


def test_shuffled_is_a_permutation_that_the_seed_chooses(mixed_tar: Path, tmp_path: Path, format: str) -> None:
    orders = {}
    for seed in (0, 1):
        options = ConvertOptions(format=format, order="shuffled", seed=seed)
        convert(mixed_tar, tmp_path / str(seed), options, workers=2)
        for name, split in open_converted(tmp_path / str(seed)).splits.items():
            orders[seed, name] = split.records["source_index"].tolist()
            original = open_source(mixed_tar).splits[name]
            positions = split.records["position"]
            expected = shuffled_order(len(original), seed)
            np.testing.assert_array_equal(orders[seed, name], expected[positions])
            assert (np.diff(positions) > 0).all()
            assert [original.names[index] for index in orders[seed, name]] == list(split.names)
    for name in ("train", "val"):
        assert orders[0, name] != orders[1, name]
        assert sorted(orders[0, name]) == sorted(orders[1, name])
        assert orders[0, name] != sorted(orders[0, name])


def test_shard_size(mixed_tar: Path, tmp_path: Path) -> None:
    convert(mixed_tar, tmp_path / "made", ConvertOptions(format="webdataset", shard_size="64KiB"), workers=1)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "made").glob("train-*.tar"))]
    assert len(sizes) > 3
    assert max(sizes) <= 64 << 10
    assert min(sizes[:-1]) > 56 << 10, "all but the last are full"


def test_a_sample_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    files = {f"a/{number}.jpg": encoded(flat((number, 0, 0))) for number in range(4)}
    files["a/2.jpg"] = encoded(noise(300, 300), quality=95)
    root = write_files(tmp_path / "source", files)
    options = ConvertOptions(format="webdataset", order="source", shard_size="64KiB")
    convert(root, tmp_path / "made", options, workers=1)
    split = open_converted(tmp_path / "made").splits["train"]
    assert split.records["shard"].tolist() == [0, 0, 1, 2]
    assert (tmp_path / "made" / "train-000001.tar").stat().st_size > 64 << 10
    assert split.read(2) == files["a/2.jpg"]


class TestLimits:
    def test_the_default_keeps_ffcvs_decoders_under_4_gib(self) -> None:
        assert DEFAULT_MAX_SIDE == 1057
        assert 5 * 256 * 1057 * 1057 * 3 < DECODE_LIMIT_BYTES == 4 * 2**30
        assert DECODE_LIMIT_BYTES <= 5 * 256 * 1058 * 1058 * 3

    @pytest.mark.parametrize(
        ("options", "max_side"),
        [
            ({"format": "ffcv"}, 1057),
            ({"format": "ffcv", "max_side": 0}, None),
            ({"format": "ffcv", "short_side": 256}, None),
            ({"format": "ffcv", "short_side": 256, "max_side": 900}, 900),
            ({"format": "ffcv", "mode": "passthrough"}, None),
            ({"format": "ffcv", "mode": "passthrough", "max_side": 0}, None),
            ({"format": "webdataset"}, None),
        ],
    )
    def test_defaults(self, options: dict[str, object], max_side: int | None) -> None:
        assert ConvertOptions(**options).settled_max_side == max_side

    def test_short_side_256_leaves_no_side_under_224(self) -> None:
        options = ConvertOptions(format="ffcv", short_side=256)
        sides = sorted({*range(1, 40), 100, 223, 224, 225, 255, 256, 257, 300, 499, 500, 1024, 1057, 4096, 9999, 65535})
        for width, height in product(sides, sides):
            scaled = options.target_size(width, height)
            assert min(scaled) == min(256, width, height)
            if min(width, height) <= 256:
                assert scaled == (width, height)
            else:
                assert abs(scaled[0] * height - scaled[1] * width) <= max(width, height), "the ratio, but for rounding"

    @pytest.mark.parametrize("limit", [1, 2, 31, 256, 1057])
    def test_max_side(self, limit: int) -> None:
        options = ConvertOptions(format="webdataset", max_side=limit)
        for width, height in product([1, 2, 3, 30, 31, 32, 255, 256, 257, 1056, 1057, 1058, 30_000], repeat=2):
            scaled = options.target_size(width, height)
            assert max(scaled) == min(limit, max(width, height))
            assert min(scaled) >= 1
            assert (scaled == (width, height)) == (max(width, height) <= limit)


class TestPages:
    def test_page_sizes(self) -> None:
        largest = (0, 1, 2 << 20, (2 << 20) + 1, 3 * 1057**2, (1 << 30) + 1)
        assert [page_bytes_for(size) >> 20 for size in largest] == [2, 2, 2, 4, 4, 2048]

    def test_the_largest_raw_image_fits(self) -> None:
        for side in (1, 100, 836, 837, 1057, 5000):
            page = ConvertOptions(format="ffcv", max_side=side).page_bytes
            assert page is not None
            assert 3 * side * side <= page
            assert page == 2 << 20 or 3 * side * side > page // 2
            assert math.log2(page).is_integer()
        assert ConvertOptions(format="ffcv", max_side=0).page_bytes == 8 << 20
        assert ConvertOptions(format="webdataset").page_bytes is None


class TestIdentity:
    """What is written into the manifest, and must agree for a conversion to be continued."""

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("format", "ffcv"), ("split", "train"), ("mode", "reencode"), ("check", "decode"), ("order", "source")),
            *(("seed", 1), ("short_side", 256), ("max_side", 256), ("quality", 91), ("shard_size", "1MB")),
            ("part", "1/2"),
        ],
    )
    def test_differs_with_each(self, name: str, value: object) -> None:
        base = ConvertOptions(format="webdataset")
        assert replace(base, **{name: value}).identity() != base.identity()

    def test_a_destination_inside_the_source_is_refused(self, tmp_path: Path) -> None:
        """It would be a class of its own the next time, and shift the labels."""
        root = write_files(tmp_path / "source", {"b/1.jpg": encoded(flat((9, 9, 9)))})
        (tmp_path / "link").symlink_to(root, target_is_directory=True)
        for source, target in ((root, root / "a"), (root, tmp_path / "link" / "a" / "deep"), (root, root)):
            with pytest.raises(ValueError, match=r"lies inside the source .*source, and would be part of it"):
                convert(source, target, ConvertOptions(format="ffcv"), workers=1)
        assert [path.name for path in root.rglob("*")] == ["b", "1.jpg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 0}, "quality 0 is not allowed: give at least 1 and at most 100"),
        ({"quality": 101}, "quality 101 is not allowed"),
        ({"short_side": 0}, "short side 0 is not allowed: give at least 1"),
        ({"max_side": -1}, "max side -1 is not allowed: give at least 0"),
        ({"mode": "passthrough", "short_side": 9}, "--mode passthrough changes no image, so --short-side and --max-s"),
        ({"mode": "passthrough", "max_side": 9}, "leave them out, or use --mode auto, which re-encodes only what is"),
        ({"shard_size": "65535"}, "--shard-size 65535 is not allowed: give at least 64KiB"),
        ({"shard_size": "much"}, "'much' is no size; write for example 256MiB, 1GB or a number of bytes"),
        ({"shard_size": "-1MB"}, "'-1MB' is no size"),
        ({"part": "3"}, "--part 3 is not allowed: give I/N with 1 <= I <= N, for example 3/8"),
        ({"part": "0/2"}, "--part 0/2 is not allowed"),
        ({"part": "3/2"}, "--part 3/2 is not allowed"),
        ({"part": "a/b"}, "--part a/b is not allowed"),
        ({"part": "1/"}, "--part 1/ is not allowed"),
        ({"part": "-1/2"}, "--part -1/2 is not allowed"),
        ({"part": "1/2/3"}, "--part 1/2/3 is not allowed"),
        ({"part": ""}, "--part  is not allowed"),
        ({"format": "tfrecord"}, "there is no format 'tfrecord'. Allowed: ffcv, webdataset."),
    ],
)
def test_what_is_not_allowed(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvertOptions(**{"format": "ffcv", **options})


def test_workers_and_parts_that_are_not_allowed(mixed_tar: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--workers 0 is not allowed: give at least 1"):
        convert(mixed_tar, tmp_path / "made", ConvertOptions(format="ffcv"), workers=0)
    with pytest.raises(ValueError, match="val has 60 images, too few for 61 parts"):
        convert(mixed_tar, tmp_path / "made", ConvertOptions(format="ffcv", part="1/61"), workers=1)
    assert list(tmp_path.iterdir()) == []


def test_sizes() -> None:
    sizes = {"65536": 65536, "64KiB": 65536, "64 kib": 65536, "256MiB": 256 << 20, "1GB": 10**9, "1.5GiB": 3 << 29}
    sizes |= {"2g": 2 * 10**9, "1TiB": 1 << 40, "100 B": 100, " 7mb ": 7 * 10**6}
    assert {text: parse_bytes(text) for text in sizes} == sizes


@pytest.mark.parametrize("text", ["", "MB", "1XB", "1 2", "0x10", "1e9", "1,5GB", "∞", "1MiBB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; write for example 256MiB"):
        parse_bytes(text)
