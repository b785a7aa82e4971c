"""What the two loaders that hand encoded bytes to a decoder's threads have in common: DALI's and nvJPEG's."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from dataset_tools.sources import Split, open_source
from pipelines.config import LoaderConfig
from pipelines.dali_loader import DaliLoader
from pipelines.nvjpeg_loader import NvjpegLoader
from pipelines.order import Order, SequentialOrder
from tests.pipelines.optional_packages import needs_dali
from tests.pipelines.oracle import assert_like_the_oracle, cpu_loader

Open = Callable[..., DaliLoader | NvjpegLoader]


@pytest.fixture(params=[pytest.param("dali", marks=needs_dali), "nvjpeg"])
def open_loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens loaders of one kind, nvJPEG's with torchvision's CPU decoder, and closes them when the test ends."""
    monkeypatch.setattr(NvjpegLoader, "devices", ("cpu", "cuda"))
    kind: type[DaliLoader | NvjpegLoader] = {"dali": DaliLoader, "nvjpeg": NvjpegLoader}[request.param]
    with ExitStack() as stack:

        def start(
            split: Split, order: Order | None = None, image_size: int = 16, prefetch_batches: int = 2
        ) -> DaliLoader | NvjpegLoader:
            config = LoaderConfig(workers=2, prefetch_batches=prefetch_batches)
            return stack.enter_context(cpu_loader(kind, split, order, image_size=image_size, config=config))

        yield start


def test_larger_than_the_data_set_says(tmp_path: Path, split: Split, open_loader: Open) -> None:
    """The boxes are those of the image's true size."""
    convert(tmp_path / "images", tmp_path / "ffcv", ConvertOptions(format="ffcv", order="source"), workers=1)
    converted = open_source(tmp_path / "ffcv").splits["train"]
    records = converted.records  # type: ignore[attr-defined]
    for side, wrong in (("width", {3: 7, 12: 1}), ("height", {12: 9000})):
        column = np.array(records.columns[side])
        for index, value in wrong.items():
            column[index] = value
        records.columns[side] = column
    loader = open_loader(converted, SequentialOrder(num_images=23, batch_size=6))
    assert_like_the_oracle(loader, epochs=2)
    assert loader.unreadable == {}
    assert sorted(loader._batches._sizes) == [3, 12]


@pytest.mark.parametrize("kind", ["ffcv", "webdataset", "tar"])
def test_a_file_that_is_cut_while_training(
    kind: str, tmp_path: Path, write_split: Callable[..., Split], open_loader: Open
) -> None:
    split = write_split(60)
    if kind == "tar":
        subprocess.run(["tar", "-cf", tmp_path / "x.tar", "-C", tmp_path, "images"], check=True)
        path, source = tmp_path / "x.tar", open_source(tmp_path / "x.tar")
    else:
        convert(tmp_path / "images", tmp_path / kind, ConvertOptions(format=kind), workers=1)  # type: ignore[arg-type]
        source = open_source(tmp_path / kind)
        (path,) = (path for path in (tmp_path / kind).iterdir() if path.suffix in (".beton", ".tar"))
    loader = open_loader(source.splits["train"], SequentialOrder(num_images=len(split), batch_size=6))
    batches = loader.batches(0)
    next(batches)
    os.truncate(path, path.stat().st_size // 4)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"11 of 60 images cannot be read.*cut short"):
        list(batches)
    assert time.monotonic() - began < 10


def test_abandoned_epochs_leave_nothing(write_split: Callable[..., Split], open_loader: Open) -> None:
    """Threads of this process, the decoder's among them, open files, and memory: less than one for five of 50 epochs.

    Not to the last one, since what tests before this one have left goes away meanwhile.
    """
    loader = open_loader(write_split(40), image_size=64, prefetch_batches=3)
    process, states = psutil.Process(), []
    for epoch in range(60):
        batches = loader.batches(epoch)
        list(islice(batches, epoch % 5))
        if epoch % 2:
            batches.close()
        if epoch in (9, 59):
            list(loader.batches(100))
            states.append((len(os.listdir("/proc/self/task")), process.num_fds(), process.memory_info().rss))
    (threads, files, memory), (threads_later, files_later, memory_later) = states
    assert threads_later - threads < 10
    assert files_later - files < 10
    assert memory_later - memory < 10 * 2**20


def test_closing_and_going_on(split: Split, open_loader: Open) -> None:
    threads = set(threading.enumerate())
    loader = open_loader(split)
    first = list(loader.batches(1))
    next(loader.batches(2))
    loader.close()
    loader.close()
    assert set(threading.enumerate()) <= threads
    for batch, other in zip(loader.batches(1), first, strict=True):
        assert torch.equal(batch.crops, other.crops)


def test_a_pass_that_another_one_overtook(split: Split, open_loader: Open) -> None:
    loader = open_loader(split)
    overtaken = loader.batches(0)
    next(overtaken)
    assert len(list(loader.batches(1))) == loader.steps_per_epoch
    with pytest.raises(AssertionError, match="another pass over this loader has begun"):
        next(overtaken)


@pytest.mark.parametrize("role", ["readers", "decoder"])
def test_a_thread_that_died(role: str, split: Split, open_loader: Open) -> None:
    loader = open_loader(split, prefetch_batches=1)
    batches = loader.batches(0)
    next(batches)
    worker = loader._readers if role == "readers" else loader._decoder
    assert worker is not None
    for _ in worker._threads:
        worker._calls.put(None)
    for thread in worker._threads:
        thread.join()
    with pytest.raises(RuntimeError, match=f"a {worker.name} thread has died while "):
        list(batches)
