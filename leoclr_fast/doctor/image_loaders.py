"""Image loaders, each tried on two small JPEGs."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

from dataset_tools.versions import installed_version
from leoclr_fast.doctor.result import Result, failed, not_applicable, warning

_SIDE = 16
_SIZE = (48, 40)
_MAX_MEAN_DIFFERENCE = 2.0
_PACKAGES = {
    "torchvision": (("torchvision",), ""),
    "dali": (("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "`pip install 'leoclr-fast[dali]'`"),
    "ffcv": (
        ("ffcv",),
        "`apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++`, then `make ffcv` (or `pip install "
        "'leoclr-fast[ffcv]'`)",
    ),
    "nvjpeg": (("torchvision",), ""),
}
"""Loader → the packages that it may come from, and how to get one."""


def loader(name: str) -> Result:
    """One batch of two drawn JPEGs through a loader of ours; the uncropped view is compared with Pillow's resize."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "nvjpeg" and device.type == "cpu":
        return not_applicable("no GPU: nvJPEG decodes there")
    packages, install = _PACKAGES[name]
    versions = {package: installed_version(package) for package in packages}
    package = next((f"{package} {version}: " for package, version in versions.items() if version), None)
    if package is None:
        if name == "dali" and device.type == "cuda":
            found = "not installed; on a GPU it is the loader that --loader auto would take"
            return warning(found, f"Install it: {install}.")
        return not_applicable(f"not installed; everything else works without it. Install it: {install}.")
    try:
        with tempfile.TemporaryDirectory() as folder:
            crops, truth = _load(name, Path(folder), device)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"
        instead = f"Train with `--loader {'resident' if name == 'torchvision' else 'torchvision'}`"
        remedy = f"{instead}, or install it again: {install}." if install else f"{instead}."
        return failed(f"{package}does not load two JPEGs ({why})", remedy)
    difference = float((crops.double().cpu() - truth.double()).abs().mean())
    found = f"{package}two JPEGs on {device.type}, {difference:.3f} levels of 255 from Pillow's pixels on average"
    if difference > _MAX_MEAN_DIFFERENCE:
        return failed(found, "Train with another `--loader`, and tell us the versions.")
    return Result(found)


def draw_jpeg(number: int) -> bytes:
    """A JPEG of 48 x 40 pixels with soft colours."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[: _SIZE[1], : _SIZE[0]]
    pixels = np.stack([4 * x, 5 * y, x + y + 40 * number], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _load(name: str, folder: Path, device: Any) -> tuple[Any, Any]:
    """The uncropped views of both images, and the truth: uint8 [2, S, S, 3]."""
    import numpy as np
    import torch
    from PIL import Image

    from dataset_tools.images import decode_rgb
    from dataset_tools.sources import open_source
    from pipelines.config import LoaderConfig, ViewConfig
    from pipelines.factory import make_loader
    from pipelines.order import TrainOrder
    from pipelines.views import LEOCLR_VIEWS

    truths = []
    for number in range(2):
        file = folder / "images" / "train" / f"class{number}" / f"{number}.jpg"
        file.parent.mkdir(parents=True)
        file.write_bytes(draw_jpeg(number))
        truths.append(np.asarray(decode_rgb(file).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)))
    data = folder / "images"
    if name == "ffcv":
        from dataset_tools.conversion.convert import convert
        from dataset_tools.conversion.options import ConvertOptions

        data = folder / "beton"
        convert(folder / "images", data, ConvertOptions(format="ffcv"), workers=1)
    split = open_source(data, quietly=True).splits["train"]
    order = TrainOrder(num_images=2, batch_size=2, seed=0)
    config = LoaderConfig(name=name, workers=1)
    views = ViewConfig(image_size=_SIDE)
    with make_loader(split, LEOCLR_VIEWS, views, config, order, seed=0, device=device) as opened:
        batch = next(opened.batches(0))
        uncropped = torch.as_tensor(batch.crops[:, 0]).clone()
        return uncropped, torch.from_numpy(np.stack([truths[index] for index in batch.indices]))
