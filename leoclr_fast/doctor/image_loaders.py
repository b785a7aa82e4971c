"""Image loaders, each tried on two small JPEGs; whether their crops are the same to the pixel, `parity` tells."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from dataset_tools.versions import installed_version
from leoclr_fast.doctor.result import Result, failed, in_short, not_applicable, warning

_COLOURS = ((200, 60, 20), (30, 90, 150))
_MAX_DIFFERENCE = 4.0
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
    """One batch of two JPEGs, each of one colour, through a loader of ours."""
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
            difference = _largest_difference(name, Path(folder), device)
    except Exception as error:
        instead = f"Train with `--loader {'resident' if name == 'torchvision' else 'torchvision'}`"
        remedy = f"{instead}, or install it again: {install}." if install else f"{instead}."
        return failed(f"{package}does not load two JPEGs ({in_short(error)})", remedy)
    found = f"{package}two JPEGs on {device.type}, at most {difference:.0f} levels of 255 from their colours"
    if difference > _MAX_DIFFERENCE:
        return failed(found, "Train with another `--loader`, and tell us the versions.")
    return Result(found)


def _largest_difference(name: str, folder: Path, device: Any) -> float:
    """Of all views of both images from their colours."""
    import torch
    from PIL import Image

    from dataset_tools.sources import open_source
    from pipelines.config import LoaderConfig, ViewConfig
    from pipelines.factory import make_loader
    from pipelines.order import TrainOrder
    from pipelines.views import LEOCLR_VIEWS

    data = folder / "images"
    for number, colour in enumerate(_COLOURS):
        file = data / "train" / f"class{number}" / f"{number}.jpg"
        file.parent.mkdir(parents=True)
        Image.new("RGB", (48, 40), colour).save(file, quality=95)
    if name == "ffcv":
        from dataset_tools.conversion.convert import convert
        from dataset_tools.conversion.options import ConvertOptions

        convert(data, folder / "beton", ConvertOptions(format="ffcv"), workers=1)
        data = folder / "beton"
    split = open_source(data, quietly=True).splits["train"]
    order = TrainOrder(num_images=2, batch_size=2, seed=0)
    config = LoaderConfig(name=name, workers=1)
    views = ViewConfig(image_size=16)
    with make_loader(split, LEOCLR_VIEWS, views, config, order, seed=0, device=device) as opened:
        batch = next(opened.batches(0))
        expected = torch.tensor([_COLOURS[label] for label in batch.labels])
        return float((batch.crops.cpu().double() - expected[:, None, None, None]).abs().max())
