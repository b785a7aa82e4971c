"""Each kind of image, good and bad: passed through, re-encoded (and why), or put in quarantine (and why)."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.conversion.transform import StoredImage, UnusableImageError, transform
from dataset_tools.conversion.verify import verify
from dataset_tools.formats.records import JPG, PASSED_THROUGH, PNG, RAW, REENCODED
from dataset_tools.images import MAX_PIXELS
from dataset_tools.sources.converted import open_converted
from tests.dataset_tools.conversion.pictures import (
    GOOD_JPEG,
    PASSED_JPEGS,
    before_tables,
    black_png,
    encoded,
    flat,
    noise,
    picture,
    pixels,
    truth,
    with_adobe_transform,
    with_frame,
)
from tests.dataset_tools.conversion.trouble import FORMATS
from tests.dataset_tools.made_up import write_files

MEAN_ERROR_OF_JPEG = 5.0
"""Of 255, at quality 90; the most is that of a GIF, whose palette is no smooth picture."""

REENCODED_JPEGS = {
    "CMYK": (encoded(picture(mode="CMYK")), "CMYK"),
    "YCCK": (with_adobe_transform(encoded(picture(mode="CMYK")), 2), "CMYK"),
    "RGB": (encoded(picture(), keep_rgb=True), "RGB colour space"),
    "arithmetic coding": (with_frame(GOOD_JPEG, marker=0xC9), "arithmetic coding"),
    "junk between markers": (before_tables(GOOD_JPEG, b"junk"), "irregular markers"),
    "zeros between markers": (before_tables(GOOD_JPEG, bytes(2)), "irregular markers"),
}
OTHERS = {
    "RGB PNG": (encoded(picture(), "PNG"), "PNG"),
    "PNG of odd sides": (encoded(picture(7, 5), "PNG"), "PNG"),
    "gray PNG": (encoded(picture(mode="L"), "PNG"), "PNG"),
    "two-colour PNG": (encoded(picture(mode="1"), "PNG"), "PNG"),
    "16-bit PNG": (encoded(Image.fromarray((np.arange(1200).reshape(30, 40) * 54).astype(np.uint16)), "PNG"), "PNG"),
    "palette PNG": (encoded(picture().quantize(64), "PNG"), "PNG"),
    "transparent palette PNG": (encoded(picture().quantize(64), "PNG", transparency=3), "PNG"),
    "transparent RGB PNG": (encoded(picture(), "PNG", transparency=(0, 0, 0)), "PNG"),
    "RGBA PNG": (encoded(Image.merge("RGBA", [*picture().split(), picture(mode="L")]), "PNG"), "PNG"),
    "gray and alpha PNG": (encoded(picture(mode="LA"), "PNG"), "PNG"),
    "one-pixel PNG": (encoded(picture(1, 1), "PNG"), "PNG"),
    "BMP": (encoded(picture(), "BMP"), "BMP"),
    "TIFF": (encoded(picture(), "TIFF"), "TIFF"),
    "LZW TIFF": (encoded(picture(), "TIFF", compression="tiff_lzw"), "TIFF"),
    "CMYK TIFF": (encoded(picture(mode="CMYK"), "TIFF"), "TIFF"),
    "PPM": (encoded(picture(), "PPM"), "PPM"),
    "PGM": (encoded(picture(mode="L"), "PPM"), "PPM"),
}
"""What is kept lossless; Pillow's name of the format."""
PASSED_PNGS = ("RGB PNG", "PNG of odd sides", "gray PNG", "one-pixel PNG")
"""Of 8 bits, gray or RGB: as they are, where the format has PNG."""
LOSSY = {
    "GIF": encoded(picture(), "GIF"),
    "WEBP": encoded(picture(), "WEBP"),
}
REJECTED = {
    "zero bytes": (b"", "it is empty"),
    "text": (b"<html>404 Not Found</html>", "it is no image of a format that is read"),
    "start of image only": (b"\xff\xd8", "it is no image of a format that is read"),
    "half a JPEG": (GOOD_JPEG[: len(GOOD_JPEG) // 2], "Truncated File Read"),
    "JPEG cut in its scan": (GOOD_JPEG[:-40], "image file is truncated"),
    "JPEG without its end": (GOOD_JPEG[:-2], "image file is truncated"),
    "zeros before a JPEG": (bytes(1) + GOOD_JPEG, "it is no image of a format that is read"),
    "12 bits": (with_frame(GOOD_JPEG, marker=0xC1, precision=12), "it is no image of a format that is read"),
    "lossless JPEG": (with_frame(GOOD_JPEG, marker=0xC3), "broken data stream"),
    "JPEG of no height": (with_frame(GOOD_JPEG, size=(40, 0)), "it is no image of a format that is read"),
    "JPEG bomb": (with_frame(GOOD_JPEG, size=(20_000, 20_000)), "decompression bomb"),
    "half a PNG": (encoded(noise(40, 30), "PNG")[:2000], "truncated"),
    "PNG of no width": (black_png(0, 30), "it is no image of a format that is read"),
    "PNG of no height": (black_png(40, 0), "it is no image of a format that is read"),
    "PNG of 2^31 pixels a row": (black_png(1 << 31, 1, with_pixels=False), "decompression bomb"),
    "PNG bomb, header only": (black_png(20_000, 20_000, with_pixels=False), "decompression bomb"),
}


def transformed(data: bytes, name: str, format: str = "ffcv", mode: str = "auto", **options: object) -> StoredImage:
    return transform(data, name, ConvertOptions(format=format, mode=mode, **options))


def assert_reencoded(result: StoredImage, original: bytes, reason: str, quality: int = 90) -> None:
    """As JPEG, of just the pixels that Pillow sees in the original."""
    assert (result.encoding, result.handling, result.reason) == (JPG, REENCODED, reason)
    expected = truth(original)
    assert result.data == encoded(Image.fromarray(expected), quality=quality)
    assert np.abs(pixels(result).astype(int) - expected).mean() < MEAN_ERROR_OF_JPEG


class TestKinds:
    """Each kind of image, in each --mode."""

    @pytest.mark.parametrize("kind", PASSED_JPEGS)
    def test_a_jpeg_that_every_decoder_reads_keeps_its_bytes(self, kind: str, format: str) -> None:
        data = PASSED_JPEGS[kind]
        height, width = truth(data).shape[:2]
        for name, mode, check in product(
            ("a.jpg", "a.JPEG", "a.png", "no extension"), ("auto", "passthrough"), ("header", "decode")
        ):
            result = transformed(data, name, format, mode, check=check)
            assert result == StoredImage(data, width, height, JPG, PASSED_THROUGH, "")
        np.testing.assert_array_equal(pixels(result), truth(data))
        assert_reencoded(transformed(data, "a.jpg", format, "reencode"), data, "asked for")

    @pytest.mark.parametrize("kind", REENCODED_JPEGS)
    def test_a_jpeg_that_some_decoder_misreads_is_reencoded(self, kind: str, format: str) -> None:
        data, reason = REENCODED_JPEGS[kind]
        for mode in ("auto", "reencode"):  # the reason is the first that would apply anyway
            result = transformed(data, "a.jpg", format, mode)
            assert (result.encoding, result.handling, result.reason) == (JPG, REENCODED, reason)
            assert result.data == encoded(Image.fromarray(truth(data)), quality=90)
        details = "there is no marker at byte 20" if reason == "irregular markers" else reason
        with pytest.raises(UnusableImageError, match=rf"re-encoded \({details}\); --mode passthrough does not"):
            transformed(data, "a.jpg", format, "passthrough")

    @pytest.mark.parametrize("kind", OTHERS)
    def test_lossless_images_stay_lossless(self, kind: str) -> None:
        """FFCV takes their pixels as they are; webdataset PNGs, and those that need no change as they are."""
        data, file_format = OTHERS[kind]
        expected, kept = truth(data), f"{file_format}, kept lossless"
        height, width = expected.shape[:2]
        for mode in ("auto", "passthrough"):
            raw = transformed(data, "a.png", "ffcv", mode)
            assert raw == StoredImage(expected.tobytes(), width, height, RAW, REENCODED, kept)
        png = transformed(data, "a.tif", "webdataset")
        assert png.encoding == PNG
        np.testing.assert_array_equal(truth(png.data), expected)
        if kind in PASSED_PNGS:
            assert (png.data, png.handling, png.reason) == (data, PASSED_THROUGH, "")
            assert transformed(data, "a.png", "webdataset", "passthrough").data == data
        else:
            assert (png.handling, png.reason) == (REENCODED, kept)
            assert Image.open(io.BytesIO(png.data)).mode == "RGB"
            with pytest.raises(UnusableImageError, match=f"it is {file_format} and would have to be re-encoded"):
                transformed(data, "a.png", "webdataset", "passthrough")
        for format in FORMATS:
            result = transformed(data, "a.png", format, "reencode")
            assert (result.encoding, result.reason) == (JPG, f"{file_format}, not JPEG")
            assert result.data == encoded(Image.fromarray(expected), quality=90)

    @pytest.mark.parametrize(
        ("kind", "names"),
        [
            ("GIF", ("a.webp", "a.jpg")),
            ("WEBP", ("a.webp", "a.jpg")),
            ("PNG", ("n02105855_2933.JPEG", "a.jpg", "a.Jpeg")),  # which is no JPEG, but is called one
        ],
    )
    def test_other_formats_become_jpeg(self, kind: str, names: tuple[str, ...], format: str) -> None:
        data = OTHERS["RGB PNG"][0] if kind == "PNG" else LOSSY[kind]
        for name in names:
            assert_reencoded(transformed(data, name, format), data, f"{kind}, not JPEG")
            with pytest.raises(UnusableImageError, match=f"it is {kind} and would have to be re-encoded"):
                transformed(data, name, format, "passthrough")

    @pytest.mark.parametrize("mode", ["auto", "passthrough", "reencode"])
    @pytest.mark.parametrize("kind", REJECTED)
    def test_what_cannot_be_decoded_is_refused(self, kind: str, mode: str, format: str) -> None:
        data, reason = REJECTED[kind]
        for name in ("a.jpg", "a.png"):
            with pytest.raises(UnusableImageError, match=reason) as first:
                transformed(data, name, format, mode)
            with pytest.raises(UnusableImageError) as second:
                transformed(bytes(bytearray(data)), name, format, mode)
            assert str(first.value) == str(second.value)  # no addresses in it


class TestLimits:
    def test_scaled_with_lanczos(self) -> None:
        data = encoded(picture(300, 200))
        result = transformed(data, "a.jpg", max_side=150)
        assert (result.width, result.height, result.reason) == (150, 100, "larger than the limit")
        expected = Image.fromarray(truth(data)).resize((150, 100), Image.Resampling.LANCZOS)
        assert result.data == encoded(expected, quality=90)

    def test_lossless_images_are_scaled_lossless(self) -> None:
        data = encoded(noise(300, 200), "PNG")
        expected = Image.fromarray(truth(data)).resize((60, 40), Image.Resampling.LANCZOS)
        raw = transformed(data, "a.png", "ffcv", short_side=40)
        assert (raw.encoding, raw.data) == (RAW, expected.tobytes())
        png = transformed(data, "a.png", "webdataset", short_side=40)
        assert (png.encoding, png.handling) == (PNG, REENCODED)
        np.testing.assert_array_equal(truth(png.data), np.asarray(expected))

    def test_images_within_the_limits_keep_their_bytes(self, format: str) -> None:
        for size, options in (((150, 100), {"max_side": 150}), ((900, 100), {"short_side": 100})):
            data = encoded(picture(*size))
            assert transformed(data, "a.jpg", format, **options).data == data
        data = encoded(picture(150, 100), "PNG")
        assert transformed(data, "a.png", "webdataset", max_side=150).data == data

    def test_a_jpeg_that_does_not_fit_into_a_page_is_reencoded(self) -> None:
        """Only by bytes that no decoder needs can a JPEG be larger than its pixels."""
        data = GOOD_JPEG + bytes(1 << 21)
        assert ConvertOptions(format="ffcv", max_side=100).page_bytes == 1 << 21
        result = transformed(data, "a.jpg", "ffcv", max_side=100)
        assert (result.reason, result.data) == (
            "more bytes than a page",
            encoded(Image.fromarray(truth(data)), quality=90),
        )
        assert transformed(data, "a.jpg", "webdataset", max_side=100).data == data

    def test_a_side_that_cannot_be_stored_is_refused(self, format: str) -> None:
        data = encoded(Image.new("RGB", (70_000, 1)), "PNG")
        with pytest.raises(UnusableImageError, match="a side of 70,000 pixels is more than can be stored, 65,535"):
            transformed(data, "a.png", format, max_side=0)
        assert transformed(data, "a.png", format, max_side=1057).width == 1057

    def test_the_largest_image_is_that_of_pillow(self) -> None:
        assert 2 * Image.MAX_IMAGE_PIXELS == MAX_PIXELS
        side = 13_377  # its square is just below
        assert side**2 < MAX_PIXELS < (side + 1) ** 2
        data = with_frame(GOOD_JPEG, size=(side, side))
        assert transformed(data, "a.jpg", "webdataset").width == side
        with pytest.raises(UnusableImageError, match="13,378 x 13,378 pixels are taken for a decompression bomb"):
            transformed(with_frame(GOOD_JPEG, size=(side + 1, side + 1)), "a.jpg", "webdataset")


def test_bombs_cost_neither_time_nor_memory() -> None:
    """400 million pixels in a file of 1.2 MB."""
    script = (
        "import resource, sys\n"
        "from dataset_tools.conversion.options import ConvertOptions\n"
        "from dataset_tools.conversion.transform import UnusableImageError, transform\n"
        "data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for format in ('ffcv', 'webdataset'):\n"
        "    for check in ('header', 'decode'):\n"
        "        for name in ('a.png', 'a.jpg'):\n"
        "            try:\n"
        "                transform(data, name, ConvertOptions(format=format, check=check))\n"
        "            except UnusableImageError as error:\n"
        "                assert 'decompression bomb' in str(error)\n"
        "            else:\n"
        "                sys.exit('passed')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    data = black_png(20_000, 20_000)
    assert len(data) < 8 << 20
    run = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, timeout=60, check=True)
    assert int(run.stdout) < 16 << 10, "KiB more than without it"


def test_a_png_that_is_damaged_inside() -> None:
    data = bytearray(encoded(noise(40, 30), "PNG"))
    data[1000] ^= 0xFF
    assert transformed(bytes(data), "a.png", "webdataset").handling == PASSED_THROUGH
    with pytest.raises(UnusableImageError, match=r"broken|checksum|CRC|truncated|error"):
        transformed(bytes(data), "a.png", "webdataset", check="decode")
    with pytest.raises(UnusableImageError):
        transformed(bytes(data), "a.png", "ffcv")  # decoded in any case


HARD_NAMES = [
    "blank/ leading and trailing .jpg",
    "clässe/日本.v1.2.jpg",
    "clässe/new\nline.jpg",
    "dots/a.b.c.JPEG",
    "dots/same.jpg",
    "other/same.jpg",
    "quotes/\"double\" and 'single'.jpg",
    os.fsdecode(b"raw \xff/\xfe\xff.jpg"),
    "tab\tand \u202e/\\.jpg",
]


class TestWholeFolders:
    def test_names_that_are_hard_to_write(self, tmp_path: Path, format: str) -> None:
        files = {name: encoded(flat((20 * number, 0, 0))) for number, name in enumerate(HARD_NAMES)}
        rejected = {os.path.dirname(name) + "/bad\n" + os.fsdecode(b"\xff") + ".jpg": b"bad" for name in HARD_NAMES[:3]}
        root = write_files(tmp_path / "source", files | rejected | {"empty class/": b""})
        summary = convert(root, tmp_path / "made", ConvertOptions(format=format, order="source"), workers=1)
        assert (summary["samples"], summary["passed_through"], summary["quarantined"]) == (9, 9, 2)
        source = open_converted(tmp_path / "made")
        split = source.splits["train"]
        assert source.classes == tuple(sorted({name.split("/")[0] for name in HARD_NAMES} | {"empty class"}))
        assert list(split.names) == sorted(HARD_NAMES)
        for index, name in enumerate(split.names):
            assert split.read(index) == files[name]
            assert source.classes[split.labels[index]] == name.split("/")[0]
        assert {line["name"] for line in quarantine(tmp_path / "made")} == rejected.keys()
        assert verify(tmp_path / "made", source=root, deep=True, workers=1) == {
            "ok": True,
            "num_problems": 0,
            "problems": [],
            "samples": 9,
        }

    @pytest.mark.parametrize("mode", ["auto", "passthrough", "reencode"])
    def test_everything_at_once(self, tmp_path: Path, format: str, mode: str) -> None:
        files = {f"good/{kind}.jpg": data for kind, data in PASSED_JPEGS.items()}
        files |= {f"mend/{kind}.jpg": data for kind, (data, _) in REENCODED_JPEGS.items()}
        files |= {f"lossless/{kind}.png": data for kind, (data, _) in OTHERS.items()}
        files |= {f"lossy/{kind}.webp": data for kind, data in LOSSY.items()}
        files |= {f"reject/{kind}.jpg": data for kind, (data, _) in REJECTED.items()}
        root = write_files(tmp_path / "source", files)
        (root / "good" / "up").symlink_to(root, target_is_directory=True)
        (root / "good" / "self").symlink_to(root / "good" / "self")
        (root / "good" / "nowhere.jpg").symlink_to(root / "nothing.jpg")
        options = ConvertOptions(format=format, mode=mode, order="source")
        summary = convert(root, tmp_path / "made", options, workers=2)

        expected, rejected = {}, {"good/nowhere.jpg": "No such file or directory (a link that leads nowhere)"}
        for name, data in files.items():
            try:
                expected[name] = transform(data, name, options)
            except UnusableImageError as error:
                rejected[name] = str(error)
        reasons = Counter(result.reason for result in expected.values() if result.reason)
        assert summary["samples"] == len(expected)
        assert summary["reencoded_because"] == reasons
        assert summary["reencoded"] == sum(reasons.values())
        assert summary["passed_through"] == len(expected) - sum(reasons.values())
        assert summary["quarantined"] == len(rejected)
        assert len(expected) + len(rejected) == len(files) + 1

        split = open_converted(tmp_path / "made").splits["train"]
        assert list(split.names) == sorted(expected)
        for index, name in enumerate(split.names):
            assert split.read_stored(index) == expected[name].data
            assert split.records["encoding"][index] == expected[name].encoding
            assert split.records["handling"][index] == expected[name].handling
        found = quarantine(tmp_path / "made")
        assert [line["name"] for line in found] == sorted(rejected)
        for line in found:
            assert line["split"] == "train"
            assert line["reason"].startswith(rejected[line["name"]])
            assert sorted([*expected, *rejected])[line["index"]] == line["name"]
        report = verify(tmp_path / "made", source=root, deep=True, workers=2)
        assert (report["ok"], report["problems"]) == (True, [])


def quarantine(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
