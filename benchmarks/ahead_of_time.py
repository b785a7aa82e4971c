"""Compiles our Triton kernels for GPUs that are not here: ``python -m benchmarks.ahead_of_time``.

What is compiled is what would be launched, with the same tiles and the same knowledge of alignment. Prints one JSON
document: for each kernel and target, the registers of a thread, the bytes it spills to memory, the shared memory of a
block, and how many blocks a multiprocessor runs at once. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leoclr_fast.losses import info_nce_triton
from pipelines import augment_triton, crop_resize_triton
from pipelines.augment import blur_weights
from pipelines.config import ViewConfig
from pipelines.crops import squashed
from pipelines.kernels import KernelLaunch
from pipelines.packed_images import PackedImages

Launches = Iterator[tuple[str, KernelLaunch]]

TARGETS = (80, 90, 100)
"""Compute capabilities: A100; H100 and H200; B200."""
_SHARED_KIB = {80: 164, 90: 228, 100: 228}
"""Shared memory of a multiprocessor; each block of it takes 1 KiB more than it asks for (CUDA Programming Guide)."""
_REGISTERS, _THREADS, _BLOCKS, _REGISTERS_AT_ONCE = 65_536, 2_048, 32, 256
"""Of a multiprocessor; and the registers that a warp is given at once."""

_TYPE_NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def compile_launch(launch: KernelLaunch, target: int) -> dict[str, Any]:
    """Compile for compute capability ``target`` / 10; its tensors may be on the meta device.

    Returns kernel, target, registers (of a thread), spilled_bytes (of a thread), shared_bytes (of a block),
    blocks_per_sm (that a multiprocessor runs at once, 0 if not even one fits).
    """
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    alignment: dict[tuple[int], list[list[Any]]] = {}
    for number, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPE_NAMES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or value == 1:  # Triton makes a constant of an argument of 1
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value != 1 and value % 16 == 0):
            alignment[number,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, alignment)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch.options)
    usage = _resource_usage(compiled.asm["cubin"])
    return {
        "kernel": launch.kernel.__name__.lstrip("_"),
        "target": f"sm_{target}",
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "blocks_per_sm": _blocks_per_sm(usage["REG"], compiled.metadata.num_warps, compiled.metadata.shared, target),
    }


def _blocks_per_sm(registers: int, num_warps: int, shared_bytes: int, target: int) -> int:
    of_a_warp = -(-32 * registers // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
    by_shared_memory = _SHARED_KIB[target] * 1024 // (shared_bytes + 1024)
    return min(_REGISTERS // (of_a_warp * num_warps), by_shared_memory, _THREADS // (32 * num_warps), _BLOCKS)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and others, from the cuobjdump that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}


def _info_nce(dtype: torch.dtype, B: int, K: int, D: int, P: int) -> Launches:
    query, keys, queue = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((B, D), (P, B, D), (K, D)))
    losses, gradient = (torch.empty(shape, device="meta") for shape in ((B,), (B, D)))
    for launch in info_nce_triton.launches(query, keys, queue, 0.2, losses, gradient):
        yield f"{_TYPE_NAMES[dtype]} B={B} K={K} D={D} P={P}", launch


def _augment(dtype: torch.dtype, side: int, batch_size: int, blur_probability: float = 0.5) -> Launches:
    crops = torch.empty(batch_size, 3, side, side, 3, dtype=torch.uint8, device="meta").transpose(0, 1)
    table = torch.empty(3 * batch_size, 13, dtype=torch.float64, device="meta")
    output = torch.empty(3 * batch_size, side, side, 3, dtype=dtype, device="meta")
    config = ViewConfig(image_size=side, blur_probability=blur_probability)
    weights = blur_weights(table[:, -1], config)
    all_launches = augment_triton.launches(crops, table, weights, config, output)
    for launch in {launch.kernel: launch for launch in all_launches}.values():
        yield f"{_TYPE_NAMES[dtype]} S={side} B={batch_size}", launch


def _crop_resize(size: int, count: int, planar: bool) -> Launches:
    first, height, width = (np.full(1, number, dtype=np.int64) for number in (0, 375, 500))
    pixels = torch.empty(3 * 375 * 500, dtype=torch.uint8, device="meta")
    images = PackedImages(pixels=pixels, offsets=first, heights=height, widths=width, planar=planar)
    boxes = squashed(np.full((count, 4), (0, 0, 375, 500), dtype=np.int32), size)
    output = torch.empty(count, size, size, 3, dtype=torch.uint8, device="meta")
    for launch in crop_resize_triton.launches(images, np.zeros(count, dtype=np.int64), boxes, output, (0, 0, 0)):
        yield f"S={size} M={count} planar={planar}", launch


_FP32, _FP16, _BF16 = torch.float32, torch.float16, torch.bfloat16
_ODD_LOSSES = ((3, 507, 33, 1), (70, 4096, 300, 3), (4096, 65536, 128, 2))
CASES: dict[str, tuple[Callable[..., Launches], list[tuple[Any, ...]]]] = {
    "info_nce": (_info_nce, [(_FP32, 256, 65536, 128, 2), (_BF16, 256, 65536, 128, 2)]),
    "info_nce_odd": (
        _info_nce,
        [
            (_FP16, 256, 65536, 128, 2),
            (_FP32, 1, 1, 16, 1),
            (_FP16, 1, 1, 1, 1),
            *((dtype, *sizes) for dtype in (_FP32, _FP16, _BF16) for sizes in _ODD_LOSSES),
        ],
    ),
    "augment": (_augment, [(_BF16, 224, 256)]),
    "augment_odd": (
        _augment,
        [
            *((dtype, *sizes) for dtype in (_FP32, _FP16) for sizes in ((224, 96), (33, 5))),
            (_BF16, 224, 4096),
            (_BF16, 32, 64, 0.0),
            (_FP32, 3, 1),
        ],
    ),
    "crop_resize": (_crop_resize, [(224, 768, False)]),
    "crop_resize_odd": (
        _crop_resize,
        [(224, 3 * 4096, False), (224, 5, True), (33, 5, False), (33, 5, True), (32, 5, False)],
    ),
}
"""Each kernel at the paper's sizes, and `odd`: in the other dtypes, and at sizes that fit no tile. What makes its
launches, and the arguments of that."""


def launches(name: str) -> Launches:
    """Of a name in `CASES`."""
    make, cases = CASES[name]
    return (launch for arguments in cases for launch in make(*arguments))


def compile_all(names: Sequence[str] = tuple(CASES), targets: Sequence[int] = TARGETS) -> list[dict[str, Any]]:
    """One row for each kernel, case and target."""
    return [
        {"case": case, **compile_launch(launch, target)}
        for name in names
        for case, launch in launches(name)
        for target in targets
    ]


if __name__ == "__main__":
    print(json.dumps({"triton": triton.__version__, "rows": compile_all(sys.argv[1:] or tuple(CASES))}, indent=1))
