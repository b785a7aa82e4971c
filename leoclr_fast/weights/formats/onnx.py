"""An `.onnx` graph: images [N, 3, S, S] -> features [N, D], any number of images."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from leoclr_fast.config import BackboneConfig
from leoclr_fast.weights.formats.export_format import ExportFormat
from leoclr_fast.weights.pretrained import Pretrained

INPUT, OUTPUT = "images", "features"


class OnnxFormat(ExportFormat):
    """The graph holds the network too, so any stem and width; the side of the images is the pretraining's."""

    name = "onnx"
    ending = ".onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    tolerance = 1e-4
    any_backbone = True

    def write(self, path: Path, pretrained: Pretrained) -> None:
        side = pretrained.description.views.image_size
        with _quiet():
            torch.onnx.export(
                pretrained.backbone.eval(),
                (torch.zeros(2, 3, side, side),),
                str(path),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("num_images")},),
                external_data=False,
                dynamo=True,
                verbose=False,
            )

    def features(self, path: Path, config: BackboneConfig, images: Tensor) -> Tensor:
        import onnx
        import onnxruntime

        onnx.checker.check_model(str(path), full_check=True)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (features,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(features)

    def usage(self, file_name: str, pretrained: Pretrained) -> str:
        side = pretrained.description.views.image_size
        return (
            "import onnxruntime\n"
            f'session = onnxruntime.InferenceSession("{file_name}", providers=["CPUExecutionProvider"])\n'
            f'(features,) = session.run(["{OUTPUT}"], {{"{INPUT}": images}})  # float32 [N, 3, {side}, {side}]'
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports every stage on stdout and its own deprecations as warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
