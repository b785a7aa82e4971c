"""What is particular to the nvJPEG loader, with torchvision's CPU decoder in place of the GPU's; see test_loader.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.sources import Split
from pipelines import nvjpeg_loader
from pipelines.nvjpeg_loader import NvjpegLoader, nvjpeg_obstacle
from tests.pipelines.oracle import CPU, assert_like_the_oracle, in_order, open_by_name
from tests.pipelines.pictures import encode, picture, write_images

Open = Callable[..., NvjpegLoader]
Decode = Callable[..., Any]


@pytest.fixture
def replace_decoder(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[torch.Tensor]], None]], None]:
    """Calls a function before each batch of JPEGs is decoded; what it raises is the decoder's error."""
    original = nvjpeg_loader.decode_jpeg

    def replace(look: Callable[[list[torch.Tensor]], None]) -> None:
        def decode(images: list[torch.Tensor], device: torch.device) -> Any:
            look(images)
            return original(images, device)

        monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", decode)

    return replace


def test_only_plain_jpegs_go_to_nvjpeg(tmp_path: Path, open_loader: Open, replace_decoder: Any) -> None:
    waves = Image.fromarray(picture(40, 50, "waves"))
    plain = {
        "baseline.jpg": encode(waves, "JPEG"),
        "progressive.jpg": encode(waves, "JPEG", progressive=True),
        "odd.jpg": encode(waves.crop((0, 0, 37, 29)), "JPEG", subsampling=0),
    }
    others = {
        "cmyk.jpg": encode(waves.convert("CMYK"), "JPEG"),
        "deep.png": encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
        "gray.jpg": encode(waves.convert("L"), "JPEG"),
        "rgb.jpg": encode(waves, "JPEG", keep_rgb=True),
        "small.gif": encode(waves, "GIF"),
        "tail.jpg": encode(waves, "JPEG") + b"more",
    }
    split = write_images(tmp_path / "kinds", plain | others)
    loader = open_loader(split, "nvjpeg", in_order(split, 4))
    given: list[bytes] = []
    replace_decoder(lambda images: given.extend(image.numpy().tobytes() for image in images))
    assert_like_the_oracle(loader)
    assert Counter(given) == Counter(plain.values())


def test_nvjpeg_decodes_nothing(split: Split, open_loader: Open, replace_decoder: Any) -> None:
    """At the start: one clear error. Later: the run ends instead of decoding on the CPU in silence."""

    def refuse(_: list[torch.Tensor]) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    loader = open_loader(split, "nvjpeg")
    list(loader.batches(0))
    replace_decoder(refuse)
    with pytest.raises(RuntimeError, match=r"nvJPEG decodes none of the 5 images of a batch, and Pillow"):
        list(loader.batches(1))
    nvjpeg_obstacle.cache_clear()
    message = "the nvjpeg loader cannot be used: torchvision cannot decode a JPEG on cpu: decode_jpegs_cuda: .*"
    with pytest.raises(RuntimeError, match=f"{message}; choose --loader torchvision"):
        open_loader(split, "nvjpeg")
    nvjpeg_obstacle.cache_clear()


def test_an_error_that_no_image_explains(split: Split, open_loader: Open, replace_decoder: Any) -> None:
    def refuse(images: list[torch.Tensor]) -> None:
        if len(images) > 1:
            raise RuntimeError("CUDA error: something")

    loader = open_loader(split, "nvjpeg")
    replace_decoder(refuse)
    message = "nvJPEG failed at step 0 of epoch 0: CUDA error: something"
    with pytest.raises(RuntimeError, match=message):
        list(loader.batches(0))


def test_a_torchvision_without_its_decoder(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of why another loader is taken, and one error where it is asked for."""
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    nvjpeg_obstacle.cache_clear()
    reason = "torchvision cannot decode a JPEG on cpu: cannot import name 'decode_jpeg' from 'torchvision.io'"
    monkeypatch.setattr(NvjpegLoader, "devices", ("cpu",))
    assert (NvjpegLoader.obstacle(split, CPU) or "").startswith(reason)
    with pytest.raises(RuntimeError, match=f"^the nvjpeg loader cannot be used: {reason}.*; choose"):
        open_by_name("nvjpeg", split)
    nvjpeg_obstacle.cache_clear()


def test_without_a_gpu(split: Split) -> None:
    with pytest.raises(ValueError, match="on a GPU, not on cpu; choose"):
        open_by_name("nvjpeg", split)
