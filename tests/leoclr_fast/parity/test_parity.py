"""`parity`: equal loaders are found equal, and a difference is found where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset_tools.conversion.convert import convert
from dataset_tools.conversion.options import ConvertOptions
from leoclr_fast.cli import run_command
from leoclr_fast.parity.comparison import REPEATED_CHROMA_LIMITS, ParityConfig, measure_parity
from pipelines import ffcv_decoder
from pipelines.resident_loader import ResidentLoader
from tests.pipelines.optional_packages import HAS_DALI, HAS_FFCV
from tests.pipelines.pictures import picture
from tests.tolerances import NVJPEG_CROPS

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for index in range(12):
        folder = tmp_path / "images" / (HOSTILE if index % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(40 + index, 50, "waves", index)).save(folder / f"{index}.jpg")
    return tmp_path / "images"


def small(*loaders: str) -> ParityConfig:
    return ParityConfig(loaders=loaders, image_size=24, batch_size=4, workers=0, device="cpu")


def test_the_command(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [images]
    if HAS_FFCV:
        convert(images, tmp_path / "ffcv", ConvertOptions(format="ffcv"), workers=1)
        data.append(tmp_path / "ffcv")
    out = tmp_path / "pages" / "parity.html"
    flags = ["--image-size", "24", "--batch-size", "4", "--workers", "1", "--device", "cpu", "--json"]
    assert run_command(["parity", "--data", *map(str, data), "--out", str(out), *flags]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = {(row["loader"], row["data"]): row for row in document["rows"]}
    expected = {("resident", "images")}
    expected |= {("dali", "images")} if HAS_DALI else set()
    expected |= {("resident", "ffcv"), ("ffcv", "ffcv")} if HAS_FFCV else set()
    expected |= {("dali", "ffcv")} if HAS_DALI and HAS_FFCV else set()
    assert set(found) == expected
    for (loader, _), row in found.items():
        assert row["ok"]
        assert row["images"] == 11  # one is held out for kNN
        assert row["unequal"] == []
        assert row["max"] == 0, loader
    assert any("nvjpeg on images: nvJPEG decodes on a GPU" in line for line in document["not_compared"])
    page = out.read_text()
    assert "<img src=x" not in page
    assert "https://" not in page.replace("http://www.w3.org", "")
    assert f"{len(found)} of {len(found)} comparisons are within their limits." in page


@pytest.mark.skipif(not HAS_FFCV, reason="needs FFCV's TurboJPEG")
def test_the_limit_of_repeated_chroma(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TurboJPEG, told to repeat chroma, on real photographs; they are nvJPEG's colours, but for its rounding."""
    convert(real_data / "imagenet-sample-400.tar", tmp_path / "ffcv", ConvertOptions(format="ffcv"), workers=2)
    monkeypatch.setattr(ffcv_decoder, "_ACCURATE_DCT", 4096 | 256)  # TJFLAG_FASTUPSAMPLE
    config = ParityConfig(loaders=("ffcv",), max_images=None, workers=2, device="cpu")
    (result,), _ = measure_parity(config, [tmp_path / "ffcv"])
    assert not result.ok  # by the limits of a CPU
    limits = REPEATED_CHROMA_LIMITS
    assert 0.1 * limits.mean < result.mean < 0.5 * limits.mean
    assert 0.5 * limits.max < result.max < 0.75 * limits.max
    assert result.worst[0].mean_difference < 0.75 * NVJPEG_CROPS.mean


class TestDifferencesAreFound:
    @pytest.fixture
    def spoiled(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A resident loader of which one value, one label or one box is off."""
        original = ResidentLoader.batches

        def spoil(what: str) -> None:
            def batches(loader: ResidentLoader, epoch: int, start_step: int = 0) -> Any:
                for batch in original(loader, epoch, start_step):
                    if batch.step == 1:
                        if what == "inside":
                            batch.crops[2, 1, 9, 11, 0] ^= 64
                        else:
                            getattr(batch, what)[0] += 1
                    yield batch

            monkeypatch.setattr(ResidentLoader, "batches", batches)

        return spoil

    def test_of_one_value(self, images: Path, spoiled: Any, tmp_path: Path) -> None:
        spoiled("inside")
        (result,), _ = measure_parity(small("resident"), [images])
        assert not result.ok
        assert result.max == 64
        assert result.counts[64] == 1
        assert result.counts.sum() == 11 * 3 * 24 * 24 * 3
        assert result.mean == pytest.approx(64 / result.counts.sum(), rel=1e-12)
        worst = result.worst[0]
        assert worst.view == "crop 1"
        assert worst.mean_difference == pytest.approx(64 / (24 * 24 * 3), rel=1e-12)
        assert np.argwhere(worst.ours != worst.oracle).tolist() == [[9, 11, 0]]
        assert [crop.mean_difference for crop in result.worst[1:]] == [0, 0, 0]
        out = tmp_path / "p.html"
        flags = ["--loaders", "resident", "--image-size", "24", "--batch-size", "4", "--device", "cpu"]
        assert run_command(["parity", "--data", str(images), "--out", str(out), *flags]) == 1
        assert "0 of 1 comparisons are within their limits; not resident on images." in out.read_text()

    @pytest.mark.parametrize("what", ["labels", "boxes", "indices"])
    def test_of_what_must_be_equal(self, what: str, images: Path, spoiled: Any) -> None:
        spoiled(what)
        (result,), _ = measure_parity(small("resident"), [images])
        assert not result.ok
        assert result.unequal == {what}


def test_a_loader_that_does_not_work_here_is_named(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the nvjpeg loader cannot be used: no driver")

    monkeypatch.setattr(ResidentLoader, "__init__", broken)
    monkeypatch.setattr("leoclr_fast.parity.comparison.BACKENDS", ("resident", "torchvision"))
    results, obstacles = measure_parity(small(), [images])
    assert [result.loader for result in results] == ["torchvision"]
    assert obstacles == ["resident on images: the nvjpeg loader cannot be used: no driver"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loaders", "dalli"], "there is no loader to compare with torchvision 'dalli'. Did you mean dali"),
        (["--loaders", "nvjpeg"], "nothing was compared for nvjpeg: nvjpeg on images: nvJPEG decodes on a GPU"),
        (["--image-size", "0"], "image size 0 is not allowed: give at least 1"),
        (["--batch-size", "0"], "batch size 0 is not allowed: give at least 1"),
    ],
)
def test_mistakes(
    flags: list[str], message: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.html"
    assert run_command(["parity", "--data", str(images), "--out", str(out), "--device", "cpu", *flags]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()
