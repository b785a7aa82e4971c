"""Arithmetic per image, the peak of a GPU, and their quotient: model FLOPs utilisation (MFU).

One multiply-accumulate (MAC) is two floating-point operations (FLOPs).
"""

from __future__ import annotations

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from leoclr_fast.config import BackboneConfig, ResultConfig
from leoclr_fast.method.backbone import Encoder
from leoclr_fast.method.methods import method_class

_TERA = 10**12

_PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "GB200": {"fp16": 2500, "bf16": 2500, "tf32": 1250},
    "B200": {"fp16": 2250, "bf16": 2250, "tf32": 1100},
    "H200 NVL": {"fp16": 835.5, "bf16": 835.5, "tf32": 417.7, "fp32": 60.3, "fp64": 60.3},
    "H200": {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9, "fp64": 66.9},
    "GH200": {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9, "fp64": 66.9},
    "H100 NVL": {"fp16": 835.5, "bf16": 835.5, "tf32": 417.7, "fp32": 60.3, "fp64": 60.3},
    "H100 PCIe": {"fp16": 756.5, "bf16": 756.5, "tf32": 378.3, "fp32": 51.2, "fp64": 51.2},
    "H100 80GB HBM3": {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9, "fp64": 66.9},
    "A100": {"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5, "fp64": 19.5},
    "V100 PCIE": {"fp16": 112, "fp32": 14, "fp64": 7},
    "V100": {"fp16": 125, "fp32": 15.7, "fp64": 7.8},
    "L40S": {"fp16": 362, "bf16": 362, "tf32": 183, "fp32": 91.6},
    "A40": {"fp16": 149.7, "bf16": 149.7, "tf32": 74.8, "fp32": 37.4},
    "A10": {"fp16": 125, "bf16": 125, "tf32": 62.5, "fp32": 31.2},
    "T4": {"fp16": 65, "fp32": 8.1},
}
"""Words of a GPU's name -> its rates; the first that fits counts."""


@cache
def encoder_macs(backbone: BackboneConfig, projection_dim: int, image_size: int, projection_layers: int = 2) -> int:
    """Multiply-accumulates of one forward pass of an encoder for one image of `image_size` pixels a side: backbone
    and projection head. ResNet-50 at 224: 4.09 billion. Batch-norm, activations and pooling are not counted.
    """
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        encoder = Encoder(backbone, projection_dim, projection_layers)
        encoder(torch.empty(2, 3, image_size, image_size))  # batch-norm in training mode wants more than one value
    return int(counter.get_total_flops()) // 4  # of two images, and a MAC is two


def training_flops_per_image(result: ResultConfig) -> int:
    """FLOPs of a training step for each image: the method's `num_forwards` times those of a forward pass.

    Counted though no step needs it: the gradient of the images (0.6 % of a ResNet-50 step). Not counted: the logits of
    the queue (0.1 % there), batch-norm, activations, augmentation.
    """
    head = result.method.projection_dim, result.views.image_size, result.method.projection_layers
    forward = 2 * encoder_macs(result.backbone, *head)
    return method_class(result.method.name).num_forwards * forward


def peak_flops_per_s(device: torch.device, precision: str) -> tuple[float | None, str]:
    """Peak FLOP/s of the device at a `--precision`, and where the number comes from; None, and why, if unknown.

    fp32 means TF32 where PyTorch lets convolutions use it (its default). See `peak_of_gpu`.
    """
    if device.type != "cuda":
        return None, f"the peak of a {device.type.upper()} is not known"
    arithmetic = "tf32" if precision == "fp32" and _convolutions_use_tf32() else precision
    return peak_of_gpu(torch.cuda.get_device_name(device), arithmetic)


def peak_of_gpu(name: str, arithmetic: str) -> tuple[float | None, str]:
    """Peak FLOP/s of the GPU that CUDA calls `name` in bf16, fp16, tf32, fp32 or fp64, and a remark; None and why not,
    if it is not in the table.

    The table holds the dense tensor-core rates (fp32: those of the CUDA cores) of NVIDIA's data sheets and white
    papers of the GPUs it names; the rates with sparsity, twice as high, are not meant. They assume the boost clock and
    the whole chip, so a MIG slice has no entry.
    """
    words = f" {name.replace('-', ' ')} "
    if " MIG " in words:
        return None, f"{name} is a MIG slice, a part of a GPU"
    for gpu, rates in _PEAK_TFLOPS.items():
        if f" {gpu} " in words:
            if arithmetic not in rates:
                return None, f"the peak of {name} in {arithmetic} is not in our table"
            return rates[arithmetic] * _TERA, f"{rates[arithmetic]:g} TFLOP/s, dense {arithmetic}, by the data sheet"
    return None, f"the peak of {name} is not in our table"


def mfu(flops_per_image: int, images_per_s: float, peak: float | None) -> float | None:
    """Share of the peak that the model's arithmetic takes, 0 to 1; None where the peak is unknown."""
    return None if peak is None else flops_per_image * images_per_s / peak


def _convolutions_use_tf32() -> bool:
    supported = torch.cuda.get_device_capability()[0] >= 8
    return supported and torch.backends.cudnn.allow_tf32
