"""What the loaders that are given encoded images have in common: files that change meanwhile, faults, threads."""

from __future__ import annotations

import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import Split, open_source
from pipelines.encoded_batches import EncodedBatches
from pipelines.encoded_loader import EncodedLoader
from tests.pipelines.optional_packages import needs_dali, needs_ffcv
from tests.pipelines.oracle import assert_like_the_oracle, in_order
from tests.pipelines.pictures import encode, picture

Open = Callable[..., EncodedLoader]
NAMES = [pytest.param("dali", marks=needs_dali), "nvjpeg", pytest.param("ffcv", marks=needs_ffcv)]
OF_ANY_SOURCE = NAMES[:2]


@pytest.mark.parametrize("name", NAMES)
def test_larger_than_the_data_set_says(name: str, as_beton: Any, split: Split, open_loader: Open) -> None:
    """The boxes are those of the image's true size."""
    beton = as_beton(split)
    loader = open_loader(beton, name, in_order(split, 6), workers=2)
    for side, wrong in (("width", {3: 7, 12: 1}), ("height", {12: 9000})):
        column = np.array(beton.records.columns[side])
        for index, value in wrong.items():
            column[index] = value
        beton.records.columns[side] = column
    loader._batches = EncodedBatches(
        beton, loader.views, loader.view_config, loader.order, seed=loader.seed, is_plain=loader.is_plain
    )
    assert_like_the_oracle(loader, epochs=2)
    assert loader.unreadable == {}
    assert sorted(loader._batches._sizes) == [3, 12]


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
def test_a_folder_that_is_deleted_while_training(
    name: str, write_split: Callable[..., Split], damage: Callable[..., None], open_loader: Open
) -> None:
    split = write_split(60)
    batches = open_loader(split, name, in_order(split, 6)).batches(0)
    next(batches)
    damage(split, *range(60), how="missing")
    with pytest.raises(RuntimeError, match=r"11 of 60 images cannot be read"):
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
    original, num_given = EncodedBatches.prepare, [0]

    def prepare(batches: EncodedBatches, epoch: int, step: int) -> Any:
        batch = original(batches, epoch, step)
        for row, index in enumerate(batch.indices.tolist()):
            if index in (5, 6) and index not in batches.for_pillow:
                batch.images[row] = gif
                num_given[0] += 1
        return batch

    monkeypatch.setattr(EncodedBatches, "prepare", prepare)
    loader = open_loader(split, name, in_order(split, 6), prefetch_batches=1)
    assert_like_the_oracle(loader, epochs=3)
    assert loader.unreadable == {}
    assert loader._batches.for_pillow == {5, 6}
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
            patch.setattr(loader if place == "decode_next" else loader._batches, place, fail)
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
        monkeypatch.setattr(loader._batches if place == "prepare" else loader, place, hang)
        doing = "reading the images of step 0" if place == "prepare" else "starting"
        try:
            with pytest.raises(RuntimeError, match=rf"thread has not answered for \d s while {doing}.*stall_timeout_s"):
                list(loader.batches(0))
        finally:
            released.set()
