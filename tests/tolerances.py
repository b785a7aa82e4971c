"""Every tolerance of the tests, in one table: what is compared, in which unit, how far it was off when it was set.

A tolerance is a few times what was measured (in brackets), so that it fails when something is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest allowed absolute differences."""

    max: float
    """Of any value."""
    mean: float = math.inf
    """On average over all values."""


# ---- pipelines: crops -------------------------------------------------------------------------------------------

RESIZE_AND_CENTER_CROP = Tolerance(max=1, mean=0.1)
"""Levels of 255, against torchvision's functions on Pillow images, of photographs: the evaluation's Resize(256) and
CenterCrop(224), and LeOCLR's original as center_crop and as pad (0 of 120 photographs, by numba and by torch), and
squashed, where Pillow 13 takes its passes in another order (1, 0.018).
python -m pytest tests/pipelines/test_crop_resize.py -k photographs"""

CROP_RESIZE = Tolerance(max=1, mean=0.3)
"""Levels of 255, against one call of PIL's resize. Up to Pillow 12 nothing differs; from 13 on, boxes that shrink more
in height are resized the other way round. (1, 0.24 for such a box of a photograph)"""

DALI_GPU_CROPS = Tolerance(max=24, mean=0.5)
"""Levels of 255, DALI's decoders on a GPU and our resize against the oracle's, not measured yet: their inverse
transform differs from libjpeg-turbo's."""
NVJPEG_CROPS = Tolerance(max=64, mean=3)
"""Levels of 255, torchvision's nvJPEG decoder and our resize on a GPU against the oracle's, of one batch; not measured
yet on a GPU. It repeats chroma: by libjpeg-turbo that is 43 levels from interpolating it, 2.0 on average over the worst
crop of 400 photographs. python -m pytest tests/leoclr_fast/parity -k chroma"""

# ---- pipelines: augment, values in [0, 1] before normalisation ---------------------------------------------------

AUGMENT = {
    torch.float64: Tolerance(max=5e-14, mean=5e-15),
    torch.float32: Tolerance(max=3e-6, mean=2e-7),
}
"""The whole chain or a part of it against torchvision's functions in float64. (4e-15 and 1e-6; torchvision's own
float32 is 1.3e-6 off)"""

AUGMENT_BESIDE_TORCHVISION = 5e-7
"""How much farther than torchvision's float32 our float32 may be from float64. (it is nearer)"""

AUGMENT_NUMBA_BESIDE_TORCH = 5e-7
"""How much farther than torch's float32 numba's may be from float64. (1.5e-7; its largest error is 1.7e-6,
torch's 3e-6)"""

AUGMENT_TRITON_BESIDE_TORCH = 5e-7
"""How much farther than torch's float32 Triton's may be from float64. (1e-7, in the interpreter)"""
AUGMENT_TRITON_ON_GPU = Tolerance(max=1e-5, mean=5e-7)
"""The whole chain on a GPU against float64, not measured yet: its exponential and its fused products differ a little
from the interpreter's."""

TORCHVISION_HUE = Tolerance(max=3e-6, mean=2e-7)
"""torchvision's adjust_hue computes in float32 whatever it is given. (1.1e-6)"""

COLORSYS = 1e-14
"""The hue shift in float64 against Python's colorsys. (1e-15)"""

# ---- pipelines: augment against the published path: PIL, uint8 after every step, in levels of 255 ----------------

PIL_BLUR = Tolerance(max=8, mean=0.5)
"""PIL's blur and ours are the same three boxes; PIL rounds to a level after each of six passes, and repeats the border
before each of the three, ours once. Smooth images, sigma 0.1 to 2. (4.7 at a border, 1.8 inside, 0.33)"""
PIL_CHAIN = Tolerance(max=30, mean=2.2)
"""All of them in a row, on smooth images; PIL's cut-offs make its views darker by 1.1 levels. (20, 1.65)"""

# ---- leoclr_fast: losses, relative errors against float64 on the same rounded inputs -----------------------------


@dataclass(frozen=True, slots=True)
class LossTolerance:
    """Largest allowed relative errors."""

    loss: float
    gradient: float
    """Norm of the difference over the norm of the truth."""


INFO_NCE_TRITON = {
    torch.float32: LossTolerance(loss=1e-6, gradient=2e-6),
    torch.float16: LossTolerance(loss=1e-6, gradient=5e-4),
    torch.bfloat16: LossTolerance(loss=1e-6, gradient=4e-3),
}
"""The fused loss. In the interpreter: losses 3e-7; gradients 1e-6, 2.2e-4 and 1.9e-3, which is the rounding of the
gradient itself and of the probabilities. (Eager's are up to 1e-6, 3e-3 and 2e-1.)"""
INFO_NCE_TRITON_ON_GPU = {
    torch.float32: LossTolerance(loss=2e-6, gradient=4e-6),
    torch.float16: LossTolerance(loss=2e-6, gradient=5e-4),
    torch.bfloat16: LossTolerance(loss=2e-6, gradient=4e-3),
}
"""The same on a GPU, at logits up to 5, not measured yet. Single products of TF32 would be 8e-6 off in the gradient."""

# ---- leoclr_fast: options that change only the speed, losses of a few steps relative to float64's ------------------

SPEED_OPTION_LOSS = 1e-4
"""float32 with either memory format, or with a compiled loss. (2e-5, 2e-5, 9e-7: a matter of luck at eight steps)"""
COMPILED_LOSS = 5e-6
"""float32 with encoders compiled for the CPU, four steps. (8e-7)"""

# ---- leoclr_fast: the captured step, losses relative to the eager step's; set by judgement, not measured yet ---------

CAPTURED_FIRST_LOSSES = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 2e-3}
"""Of the first five steps."""
CAPTURED_LOSS = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 3e-2}
"""Of fifty steps, in which differences grow."""
COMPILED_ON_GPU_LOSS = {"fp32": 1e-3, "bf16": 3e-2}
"""Of eight steps with compiled encoders."""
