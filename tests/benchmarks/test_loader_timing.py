"""`loader_timing`: what it counts is right, who cannot run is named, and all do the whole task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.loader_implementations import OURS, Epochs, TimedEpoch
from benchmarks.loader_timing import LoaderBenchConfig, LoaderTiming, bench_loader, loader_markdown
from benchmarks.processes import OwnProcess, process_use
from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from tests.pipelines.optional_packages import HAS_DALI, HAS_FFCV
from tests.pipelines.pictures import encode, picture, write_images

NUM_IMAGES = 10
NUM_PRETRAIN = 9
"""One is held out for kNN, as in pretrain."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for index in range(NUM_IMAGES):
        folder = tmp_path / "images" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(40 + index, 50, "waves", index)).save(folder / f"{index}.jpg")
    return tmp_path / "images"


LOADERS = [
    "torchvision",
    "resident",
    "stock-torchvision",
    *(["dali", "stock-dali"] if HAS_DALI else []),
    *(["ffcv", "stock-ffcv"] * HAS_FFCV),
]


@pytest.mark.long
def test_all_loaders(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in a process of its own, which takes seconds to start."""
    data = [images]
    if HAS_FFCV:
        data.append(tmp_path / "ffcv")
        convert(images, tmp_path / "ffcv", ConvertOptions(format="ffcv"), workers=1)
    config = LoaderBenchConfig(loaders=tuple(LOADERS), rounds=2, workers=1, image_size=16, batch_size=4, device="cpu")
    LoaderTiming(data=tuple(data), config=config).run()
    output = capsys.readouterr().out
    document = json.loads(output.splitlines()[-1])
    assert sorted(row["loader"] for row in document["rows"]) == sorted(LOADERS)
    assert [row["loader"] for row in document["ceilings"]] == ["read-only", "decode-only"]
    for row in (*document["ceilings"], *document["rows"]):
        whole_epoch = row["loader"] == "decode-only"  # it has no batches
        assert row["images"] == (NUM_PRETRAIN if whole_epoch else 8)
        assert len(row["rounds_images_per_s"]) == 2
        assert min(row["rounds_images_per_s"]) <= row["images_per_s"] <= max(row["rounds_images_per_s"])
        assert row["decodes_per_image"] == {"read-only": 0, "resident": 0, "stock-ffcv": 3}.get(row["loader"], 1)
        assert row["cpu_cores"] >= 0
        assert 0.05 < row["peak_rss_gib"] < 8
        assert row["device_memory_gib"] is None
    sizes = [path.stat().st_size for path in images.rglob("*.jpg")]
    read = next(row for row in document["ceilings"] if row["loader"] == "read-only")["bytes_read_per_image"]
    assert read >= min(sizes)  # and some of Python's own
    assert output.index("read-only (ceiling)") < output.index("| torchvision |")


class InThisProcess:
    """Stands for `OwnProcess`, without one."""

    pid = os.getpid()

    def __init__(self, name: str, function: Callable[[], Epochs]) -> None:
        self._epochs = function()

    def next(self) -> TimedEpoch:
        try:
            return next(self._epochs)
        except ValueError as error:
            raise RuntimeError(f"ValueError: {error}") from error

    def close(self) -> None:
        self._epochs.close()


def test_who_cannot_run_is_named(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.loader_timing.OwnProcess", InThisProcess)
    some = {name: OURS[name] for name in ("torchvision", "nvjpeg")}
    monkeypatch.setattr("benchmarks.loader_timing.OURS", some)
    monkeypatch.setattr("benchmarks.loader_timing.LOADERS", {})
    write_images(tmp_path / "pngs", {f"{i}.png": encode(Image.fromarray(picture(9, 9)), "PNG") for i in range(8)})
    config = LoaderBenchConfig(rounds=1, image_size=16, batch_size=4, workers=0, device="cpu")
    document = bench_loader(config, [tmp_path / "pngs"])
    assert [row["loader"] for row in document["rows"]] == ["torchvision"]
    assert [row["loader"] for row in document["ceilings"]] == ["read-only"]
    notes = "\n".join(document["notes"])
    assert "nvjpeg did not run: ValueError: nvJPEG decodes on a GPU, not on cpu" in notes
    assert "decode-only did not run: ValueError: it decodes JPEGs alone, and none of the images is one" in notes
    page = loader_markdown(document)
    assert "| torchvision |" in page
    assert "of the decoding alone" in page
    with pytest.raises(RuntimeError, match="the loader nvjpeg cannot run: ValueError: nvJPEG decodes on a GPU"):
        bench_loader(replace(config, loaders=("nvjpeg",)), [images])


def test_mistakes(images: Path) -> None:
    with pytest.raises(ValueError, match=r"timing loaders needs images: give --data PATH"):
        bench_loader(LoaderBenchConfig(device="cpu"), [])
    with pytest.raises(ValueError, match=r"there is no loader .dalli.\. Did you mean dali"):
        bench_loader(LoaderBenchConfig(loaders=("dalli",), device="cpu"), [images])
    with pytest.raises(ValueError, match="images has 9 images, fewer than one batch of 11; lower --batch-size"):
        bench_loader(LoaderBenchConfig(batch_size=11, device="cpu"), [images])
    with pytest.raises(ValueError, match="views 4 is not allowed: give at least 2 and at most 3"):
        LoaderBenchConfig(views=4)


def test_use_of_a_process_and_its_children() -> None:
    child = "import time\nballast = bytearray(b'x') * (120 << 20)\nwhile time.process_time() < 0.5: pass\n"
    child += "print('up', flush=True)\ninput()"
    before = process_use(os.getpid())
    with open("/dev/zero", "rb", buffering=0) as zeros:
        zeros.read(50 << 20)
    read = process_use(os.getpid())
    command = [sys.executable, "-c", child]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        during = process_use(os.getpid())
        process.communicate("\n")
    assert 50 << 20 <= read.read_bytes - before.read_bytes < 60 << 20
    assert 120 << 20 <= during.memory_bytes - read.memory_bytes < 300 << 20
    assert 0.4 <= during.cpu_s - read.cpu_s < 2
    with pytest.raises(ProcessLookupError, match="there is no process"):
        process_use(2**22 + 1)


def counts(first: int) -> Iterator[int]:
    yield first
    yield os.getpid()
    raise KeyError("enough")


class TestOwnProcess:
    def test_answers_and_a_failure(self) -> None:
        process = OwnProcess("counts", counts, 7)
        assert process.next() == 7
        assert process.next() == process.pid != os.getpid()
        with pytest.raises(RuntimeError, match=r"(?s)counts failed: .*KeyError: 'enough'"):
            process.next()
        process.close()
        process.close()
