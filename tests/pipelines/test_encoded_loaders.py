"""What the loaders that are given encoded images have in common: files that change meanwhile, faults, threads."""

from __future__ import annotations

import os
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.jpeg import JpegHeader
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.images import MAX_PIXELS
from dataset_tools.sources import Split, open_source
from pipelines import encoded_batches
from pipelines.byte_readers import open_bytes
from pipelines.decode import UnreadableImageError, decode_bytes
from pipelines.encoded_batches import plain_header
from pipelines.encoded_loader import EncodedLoader
from tests.pipelines.optional_packages import needs_dali, needs_ffcv
from tests.pipelines.oracle import assert_like_the_oracle, in_order
from tests.pipelines.pictures import encode, picture

Open = Callable[..., EncodedLoader]
NAMES = [pytest.param("dali", marks=needs_dali), "nvjpeg", pytest.param("ffcv", marks=needs_ffcv)]
OF_ANY_SOURCE = NAMES[:2]


@pytest.mark.parametrize("name", NAMES)
def test_larger_than_the_data_set_says(name: str, as_beton: Any, split: Split, open_loader: Open) -> None:
    """The boxes are those of the image's true size, which its own header says."""
    beton = as_beton(split)
    loader = open_loader(beton, name, in_order(split, 6), workers=2)
    for side, wrong in (("width", {3: 7, 12: 1}), ("height", {12: 9000})):
        column = np.array(beton.records.columns[side])
        for index, value in wrong.items():
            column[index] = value
        beton.records.columns[side] = column
    loader._byte_reader = open_bytes(beton)
    assert_like_the_oracle(loader, epochs=2)
    assert loader.unreadable == {}
    assert loader.for_pillow == set()


@pytest.mark.parametrize("name", OF_ANY_SOURCE)
def test_a_decoder_that_sees_another_size(name: str, split: Split, open_loader: Open, monkeypatch: Any) -> None:
    """Than the header says: Pillow decodes the image, and its boxes fit it."""
    read_header = encoded_batches.read_jpeg_header
    odd = split.read(4)

    def misread(data: bytes) -> JpegHeader:
        header = read_header(data)
        return replace(header, width=header.width + 5) if data == odd else header

    monkeypatch.setattr(encoded_batches, "read_jpeg_header", misread)
    loader = open_loader(split, name, in_order(split, 6))
    assert_like_the_oracle(loader, epochs=2)
    assert loader.for_pillow == {4}


@pytest.mark.parametrize("name", OF_ANY_SOURCE)
def test_all_workers_read_a_batch_and_each_image_once(
    name: str, split: Split, open_loader: Open, monkeypatch: Any
) -> None:
    loader = open_loader(split, name, in_order(split, 20), workers=4)
    together, reads = threading.Barrier(4, timeout=8), Counter[int]()
    read_some, read_one = loader._byte_reader.read, type(split).read

    def read_together(indices: Any) -> Any:
        if len(indices) == 5:
            together.wait()  # breaks unless four threads read at a time
        return read_some(indices)

    monkeypatch.setattr(loader._byte_reader, "read", read_together)
    monkeypatch.setattr(type(split), "read", lambda split, index: reads.update([index]) or read_one(split, index))
    assert [batch.indices.tolist() for batch in loader.batches(0)] == [list(range(20)), [20, 21, 22]]
    assert reads == Counter(range(23))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        *(pytest.param("dali", source, marks=needs_dali) for source in ("ffcv", "webdataset", "tar")),
        ("nvjpeg", "tar"),
        pytest.param("ffcv", "ffcv", marks=needs_ffcv),
    ],
)
def test_a_file_that_is_cut_while_training(
    name: str, source: str, tmp_path: Path, write_split: Callable[..., Split], open_loader: Open
) -> None:
    """A memory map would kill the process."""
    write_split(60)
    path = tmp_path / "images.tar"
    if source == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "images", arcname="images")
    else:
        convert(tmp_path / "images", tmp_path / source, ConvertOptions(format=source), workers=1)  # type: ignore[arg-type]
        (path,) = (path for path in (tmp_path / source).iterdir() if path.suffix in (".beton", ".tar"))
    split = open_source(path if source == "tar" else tmp_path / source).splits["train"]
    batches = open_loader(split, name, in_order(split, 6)).batches(0)
    next(batches)
    os.truncate(path, path.stat().st_size // 4)
    with pytest.raises(RuntimeError, match=r"11 of 60 images cannot be read.*cut short"):
        list(batches)


@pytest.mark.parametrize("name", OF_ANY_SOURCE)
def test_later_epochs_do_not_stumble(name: str, split: Split, open_loader: Open, monkeypatch: Any) -> None:
    """A JPEG whose Huffman tables are damaged has a size, and gets as far as the decoder: once."""
    for index in (7, 8, 20):
        path = split.root / split.names[index]  # type: ignore[attr-defined]
        data = bytearray(path.read_bytes())
        tables = data.index(b"\xff\xc4") + 4
        data[tables : tables + 20] = bytes([255]) * 20
        path.write_bytes(data)
    loader = open_loader(split, name, in_order(split, 6))
    monkeypatch.setattr(loader, "try_to_decode", lambda *_: pytest.fail("Pillow cannot read them either"))
    faults: list[int] = []
    find_fault = loader.find_fault
    monkeypatch.setattr(
        loader, "find_fault", lambda batch, error: faults.append(batch.step) or find_fault(batch, error)
    )
    assert_like_the_oracle(loader, epochs=3)
    assert sorted(loader.unreadable) == [7, 8, 20]
    assert faults == [1, 3]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_decoder_alone_cannot_read_is_decoded_by_pillow(
    name: str, split: Split, open_loader: Open, monkeypatch: Any, package_log: pytest.LogCaptureFixture
) -> None:
    """Pillow reads a GIF, decoders of JPEGs do not: here they are given one, as if it were a plain JPEG."""
    gif = np.frombuffer(encode(Image.fromarray(picture(33, 44, "waves")), "GIF"), dtype=np.uint8)
    original, num_given = EncodedLoader.prepare, [0]

    def prepare(loader: EncodedLoader, *given: Any) -> Any:
        batch = original(loader, *given)
        for row, index in enumerate(batch.indices.tolist()):
            if index in (5, 6) and index not in loader.for_pillow:
                batch.images[row] = gif
                num_given[0] += 1
        return batch

    monkeypatch.setattr(EncodedLoader, "prepare", prepare)
    loader = open_loader(split, name, in_order(split, 6), prefetch_batches=1)
    assert_like_the_oracle(loader, epochs=3)
    assert loader.unreadable == {}
    assert loader.for_pillow == {5, 6}
    assert num_given[0] <= 4  # later epochs do not stumble again
    warned = [message for message in package_log.messages if "Pillow" in message]
    if name != "ffcv":  # there, a warning of TurboJPEG's is enough
        assert warned == [f"{loader.decoder} cannot decode {split.names[index]}, Pillow does" for index in (5, 6)]


class TestThreads:
    """Whatever happens in a thread reaches who waits for a batch, within ten seconds."""

    @pytest.fixture(autouse=True)
    def _soon(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        assert time.monotonic() - began < 10

    @pytest.mark.parametrize("name", OF_ANY_SOURCE)
    @pytest.mark.parametrize("error", [MemoryError("no memory"), KeyError("bug"), SystemExit(4)])
    @pytest.mark.parametrize("place", ["prepare", "will_need", "decode_next"])
    def test_errors(
        self, place: str, error: BaseException, name: str, split: Split, open_loader: Open, monkeypatch: Any
    ) -> None:
        def fail(*_: Any) -> Any:
            raise error

        loader = open_loader(split, name)
        list(loader.batches(0))
        with monkeypatch.context() as patch:
            patch.setattr(loader._byte_reader if place == "will_need" else loader, place, fail)
            with pytest.raises(type(error)):
                list(loader.batches(1))
        assert len(list(loader.batches(2))) == loader.steps_per_epoch

    @pytest.mark.parametrize("name", OF_ANY_SOURCE)
    @pytest.mark.parametrize("place", ["prepare", "decode_next"])
    def test_a_thread_that_hangs(
        self, place: str, name: str, split: Split, open_loader: Open, monkeypatch: Any
    ) -> None:
        released = threading.Event()

        def hang(*_: Any) -> Any:
            released.wait(30)
            raise RuntimeError("released")

        loader = open_loader(split, name, stall_timeout_s=0.5)
        monkeypatch.setattr(loader, place, hang)
        doing = "reading the images of step 0" if place == "prepare" else "starting"
        try:
            with pytest.raises(RuntimeError, match=rf"thread has not answered for \d s while {doing}.*stall_timeout_s"):
                list(loader.batches(0))
        finally:
            released.set()


_JPEG = encode(Image.fromarray(picture(40, 52, "waves")), "JPEG", progressive=True)
_SCAN = _JPEG[_JPEG.rindex(b"\xff\xda") : -2]


@pytest.mark.parametrize(
    "irregular",
    {
        "padding between markers": b"\xff\xd8\xff" + _JPEG[2:],
        "a marker without a segment": b"\xff\xd8\xff\x01" + _JPEG[2:],
        "garbage between markers": b"\xff\xd8\x00\x00" + _JPEG[2:],
        "a segment that ends elsewhere": b"\xff\xd8\xff\xe1\x00\x20Exif\0\0MM" + _JPEG[2:],
        "cut": _JPEG[:-2],
        "bytes behind its end": _JPEG + b"\0",
        "thousands of scans": _JPEG[:-2] + 2000 * _SCAN + _JPEG[-2:],
        "PNG": encode(Image.new("RGB", (4, 4)), "PNG"),
        "CMYK": encode(Image.new("CMYK", (4, 4)), "JPEG"),
        "nothing": b"",
    }.items(),
    ids=lambda item: item[0],
)
def test_only_regular_jpegs_are_given_to_other_decoders_than_pillow(irregular: tuple[str, bytes]) -> None:
    assert plain_header(np.frombuffer(_JPEG, dtype=np.uint8)) is not None
    assert plain_header(np.frombuffer(irregular[1], dtype=np.uint8)) is None


@given(st.lists(st.tuples(st.integers(0, len(_JPEG) - 1), st.integers(0, 255)), max_size=8), st.integers(0, len(_JPEG)))
def test_the_bytes_of_a_jpeg_may_be_anything(changes: list[tuple[int, int]], length: int) -> None:
    """What is given to other decoders has the size that Pillow sees, within limits; all else goes to Pillow."""
    data = bytearray(_JPEG)
    for at, value in changes:
        data[at] = value
    data = data if length % 2 else data[:length]
    header = plain_header(np.frombuffer(bytes(data), dtype=np.uint8))
    if header is not None:
        assert header.width * header.height <= MAX_PIXELS
        with suppress(UnreadableImageError):
            decoded = decode_bytes(bytes(data))
            assert (decoded.width, decoded.height) == (header.width, header.height)


def test_what_a_decoder_refuses_is_found_by_halves(split: Split, open_loader: Open, monkeypatch: Any) -> None:
    """With DALI each try takes a pipeline of its own: for each image of a large batch that were minutes."""
    loader, tried = open_loader(split, "nvjpeg"), Counter[int]()

    def try_to_decode(_: Any, rows: list[int]) -> None:
        tried.update(rows[:1])
        if {3, 200} & set(rows):
            raise RuntimeError("refused")

    monkeypatch.setattr(loader, "try_to_decode", try_to_decode)
    assert loader._refused(None, list(range(256))) == [3, 200]
    assert tried.total() < 40
