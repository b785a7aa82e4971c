"""The augmentation alone: every implementation, on one batch of crops in the device's memory.

Legend: B images, V views of each, M = V B views, S side of a view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leoclr_fast.bench.device_timing import captured, first_results, interleaved_ms, peak_extra_mib
from leoclr_fast.bench.kernel_page import kernel_page
from leoclr_fast.bench.statistics import median_interval, quantiles
from leoclr_fast.bench.tables import number, spread
from leoclr_fast.config import MethodName
from leoclr_fast.machine.compiling import what_compiling_lacks
from leoclr_fast.method.methods import METHODS
from leoclr_fast.run.environment import environment
from pipelines.augment import AugmentParameters, augment, draw_augmentation
from pipelines.config import ViewConfig

_CHECKED_VIEWS = 24
_TORCH = "torch"
"""The contestant that the others are compared with."""


def bench_augment(
    *, method: MethodName, batch_size: int, image_size: int, precision: str, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Time every implementation that runs here, in turns, on the views of a method.

    Returns the setting, `environment`, `left_out` (implementation -> why), and `rows`: impl, ms, q20_ms, q80_ms,
    graph_ms (None where nothing was captured), images_per_s, speedup, speedup_low, speedup_high (over `torch`: the
    median over the rounds and its 95 % interval), peak_extra_mib (with the output), error (largest difference from
    float64 on some of the views, values in units of the standard deviation).
    Raises ValueError for numbers that are not allowed.
    """
    for name, given in (("batch size", batch_size), ("number of rounds", rounds)):
        if given < 1:
            raise ValueError(f"{name} {given} is not allowed: give at least 1")
    config = ViewConfig(image_size=image_size)
    if config.blur_kernel_size // 2 >= image_size:
        raise ValueError(f"image size {image_size} is not allowed: a blur of 3 taps needs at least 2 pixels")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    views = METHODS[method].views
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, len(views), image_size, image_size, 3)  # as loaders hand them out
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device).transpose(0, 1)
    drawn = draw_augmentation(views, config, 0, 0, np.arange(batch_size)).to(device)

    left_out: dict[str, str] = {}
    calls: dict[str, Callable[[], Tensor]] = {_TORCH: lambda: augment(crops, drawn, config, dtype=dtype, impl="torch")}
    lacking = what_compiling_lacks(device.type)
    if device.type == "cuda":
        left_out["numba"] = "it knows only the CPU"
        if lacking is None:
            compiled = torch.compile(augment, dynamic=False)
            calls["compiled"] = lambda: compiled(crops, drawn, config, dtype=dtype, impl="torch")
            calls["triton"] = lambda: augment(crops, drawn, config, dtype=dtype, impl="triton")
        else:
            left_out["compiled"] = left_out["triton"] = f"it lacks {lacking}"
    else:
        calls["numba"] = lambda: augment(crops, drawn, config, dtype=dtype, impl="numba")
        left_out["compiled"] = "on a CPU, torch goes through the views part by part"
        left_out["triton"] = "it needs a CUDA device"

    chosen = np.linspace(0, len(drawn.table) - 1, min(_CHECKED_VIEWS, len(drawn.table))).astype(int).tolist()
    truth = augment(
        crops.flatten(0, 1)[chosen], AugmentParameters(drawn.table[chosen]), config, dtype=torch.float64, impl="torch"
    )
    results = first_results({name: _chosen(call, chosen) for name, call in calls.items()}, _TORCH, left_out)
    errors = {name: (result.double() - truth).abs().max().item() for name, result in results.items()}
    calls = {name: calls[name] for name in results}
    times = interleaved_ms(calls, rounds, device)
    graph_ms = _graph_ms("triton", calls, rounds, device, left_out)
    rows = []
    for name, call in calls.items():
        taken = quantiles(times[name])
        pairs = zip(times[_TORCH], times[name], strict=True)
        speedup = median_interval([theirs / ours for theirs, ours in pairs])
        rows.append(
            {
                "impl": name,
                "ms": taken["median"],
                "q20_ms": taken["q20"],
                "q80_ms": taken["q80"],
                "graph_ms": graph_ms if name == "triton" else None,
                "images_per_s": 1e3 * batch_size / taken["median"],
                "speedup": speedup["median"],
                "speedup_low": speedup["low"],
                "speedup_high": speedup["high"],
                "peak_extra_mib": peak_extra_mib(call, device),
                "error": errors[name],
            }
        )
    return {
        "method": method, "batch_size": batch_size, "views": len(views), "image_size": image_size,
        "precision": precision, "rounds": rounds,
        "crops_mib": crops.numel() / 2**20, "output_mib": crops.numel() * dtype.itemsize / 2**20,
        "rows": rows, "left_out": left_out, "environment": environment(device, 1),
    }  # fmt: skip


def _graph_ms(
    name: str, calls: dict[str, Callable[[], Tensor]], rounds: int, device: torch.device, left_out: dict[str, str]
) -> float | None:
    """Median of what a GPU alone takes for the call of that name; None where there is no such call or it cannot be
    captured, and then the reason goes to ``left_out``.
    """
    if name not in calls:
        return None
    try:
        replay = captured(calls[name])
    except RuntimeError as error:
        left_out[f"{name}, captured"] = (str(error).strip() or repr(error)).splitlines()[0]
        return None
    return quantiles(interleaved_ms({name: replay}, rounds, device)[name])["median"]


def _chosen(call: Callable[[], Tensor], rows: list[int]) -> Callable[[], Tensor]:
    return lambda: call()[rows]


def augment_markdown(document: dict[str, Any], command: str | None = None) -> str:
    """The document of `bench_augment` as a page."""
    setting = (
        f"{document['batch_size']:,} images of {document['views']} views at {document['image_size']} pixels, uint8 "
        f"crops ({document['crops_mib']:,.1f} MiB) to normalised {document['precision']} "
        f"({document['output_mib']:,.1f} MiB); errors are against float64, in standard deviations"
    )
    header = (
        "implementation", "ms", "ms in a CUDA graph", "images/s", f"times as fast as {_TORCH}", "peak extra MiB",
        "largest error",
    )  # fmt: skip
    cells = [
        (
            row["impl"],
            spread(row["ms"], row["q20_ms"], row["q80_ms"], 3),
            number(row["graph_ms"], 3),
            number(row["images_per_s"], 0),
            spread(row["speedup"], row["speedup_low"], row["speedup_high"], 2),
            number(row["peak_extra_mib"]),
            f"{row['error']:.0e}",
        )
        for row in document["rows"]
    ]
    return kernel_page("MoCo-v2's photometric augmentation", setting, document, header, cells, command)
