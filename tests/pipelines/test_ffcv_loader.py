"""What is particular to FFCV's .betons; see test_loader.py and test_encoded_loaders.py for the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.formats.beton import METADATA_START
from dataset_tools.formats.records import RAW
from dataset_tools.sources import Split, open_source
from dataset_tools.sources.converted import ConvertedSplit
from pipelines import ffcv_decoder
from pipelines.ffcv_loader import FfcvLoader
from tests.pipelines.conftest import overwrite
from tests.pipelines.optional_packages import needs_ffcv
from tests.pipelines.oracle import assert_is, assert_like_the_oracle, in_order, open_by_name, plain_batch
from tests.pipelines.pictures import encode, picture, write_images

Open = Callable[..., FfcvLoader]


@pytest.fixture
def beton(split: Split, as_beton: Callable[[Split], ConvertedSplit]) -> ConvertedSplit:
    """The 23 images of `split`, in the same order, their JPEG bytes unchanged."""
    return as_beton(split)


def assert_plain(loader: FfcvLoader) -> None:
    for batch in loader.batches(0):
        assert_is(batch, plain_batch(loader.split, loader.order.indices(0, batch.step), 0))
    assert loader.unreadable == {}


@needs_ffcv
class TestPixels:
    def test_raw_pixels_are_not_decoded(self, tmp_path: Path, open_loader: Open) -> None:
        sizes = [(3, 5), (1, 1), (7, 1), (1, 9), (20, 30)]
        images = {f"{i}.png": encode(Image.fromarray(picture(*size, seed=i)), "PNG") for i, size in enumerate(sizes)}
        split = write_images(tmp_path / "in", images)
        loader = open_loader(split, "ffcv", in_order(split))
        num_raw = int((loader.split.records["encoding"] == RAW).sum())  # type: ignore[attr-defined]
        assert num_raw >= 4
        assert_plain(loader)
        assert loader.num_decodes == 5 - num_raw

    def test_progressive_gray_and_odd_subsampling(self, tmp_path: Path, open_loader: Open) -> None:
        image = Image.fromarray(picture(61, 47, "waves"))
        images = {"gray.jpg": encode(image.convert("L"), "JPEG")} | {
            f"{subsampling}{progressive}.jpg": encode(
                image, "JPEG", subsampling=subsampling, progressive=progressive, quality=95
            )
            for subsampling in (0, 1, 2)
            for progressive in (False, True)
        }
        split = write_images(tmp_path / "in", images)
        loader = open_loader(split, "ffcv", in_order(split))
        assert_plain(loader)
        assert loader.num_decodes == 7

    def test_what_turbojpeg_only_warns_of_is_read_as_by_pillow(self, beton: ConvertedSplit, open_loader: Open) -> None:
        middle = int(beton.records["num_bytes"][6]) * 2 // 3
        overwrite(beton, 6, b"\xff\x00\x12\x34" * 8, at=middle)
        loader = open_loader(beton, "ffcv", in_order(beton))
        assert_plain(loader)
        assert loader.for_pillow == {6}

    def test_a_jpeg_whose_second_half_is_lost(self, beton: ConvertedSplit, open_loader: Open) -> None:
        half = int(beton.records["num_bytes"][6]) // 2
        overwrite(beton, 6, bytes(half), at=half)
        assert_like_the_oracle(open_loader(beton, "ffcv", in_order(beton)))

    @pytest.mark.parametrize(("height", "width"), [(5, 7), (10, 9), (200, 210)])
    def test_another_image_in_its_place(
        self, height: int, width: int, beton: ConvertedSplit, open_loader: Open
    ) -> None:
        """TurboJPEG would scale it to the size that the .beton states."""
        image = Image.fromarray(picture(height, width, "waves")).convert("L")
        index = int(np.argmax(beton.records["num_bytes"]))
        overwrite(beton, index, encode(image, "JPEG", quality=1))
        assert_plain(open_loader(beton, "ffcv", in_order(beton)))


@needs_ffcv
class TestRefusals:
    def test_other_data(self, split: Split, tmp_path: Path) -> None:
        todo = r"convert the data first \(python -m dataset_tools convert SOURCE DEST --format ffcv\)"
        with pytest.raises(ValueError, match=rf"reads \.beton files alone, but 'train' is made of \w+; {todo}"):
            open_by_name("ffcv", split.subset(np.arange(10)))
        convert(tmp_path / "images", tmp_path / "tars", ConvertOptions(format="webdataset"), workers=1)
        with pytest.raises(ValueError, match=r"is made of tars \(train-\S+\.tar, …\); convert"):
            open_by_name("ffcv", open_source(tmp_path / "tars").splits["train"])

    def test_a_beton_that_does_not_fit_its_records(self, beton: ConvertedSplit) -> None:
        with open(beton.files[0].path, "r+b") as file:
            file.seek(METADATA_START + 1)
            file.write((60000).to_bytes(2, "little"))
        with pytest.raises(ValueError, match=r"train\.beton does not fit .*: width differs\. Copy or convert"):
            open_by_name("ffcv", beton)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (None, "No module named 'ffcv'"),
        ((), "there is no _libffcv in the package ffcv"),
        (("_libffcv.so",), "_libffcv.so: file too short"),
    ],
)
def test_without_ffcv(
    files: tuple[str, ...] | None, reason: str, beton: ConvertedSplit, tmp_path: Path, monkeypatch: Any
) -> None:
    """It is not installed, or what it is linked to is not."""

    class Spec:
        submodule_search_locations = [str(tmp_path)]  # noqa: RUF012

    for name in files or ():
        (tmp_path / name).touch()
    monkeypatch.setattr(ffcv_decoder, "find_spec", lambda _: None if files is None else Spec)
    monkeypatch.setattr(ffcv_decoder, "load_turbojpeg", ffcv_decoder.load_turbojpeg.__wrapped__)
    todo = r"libopencv-dev libturbojpeg0-dev pkg-config g\+\+, then make ffcv \(or pip install 'leoclr-fast\[ffcv\]'\)"
    with pytest.raises(ImportError, match=rf"which cannot be imported \(.*{reason}\).*{todo}.*torchvision loader"):
        open_by_name("ffcv", beton)
