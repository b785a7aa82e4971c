"""Section `parity`: every implementation of the loss and of the augmentation against a float64 truth, on this device.

Legend: B queries, K negatives, D dimensions, P positives; V views, S side of a view.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig
from leoclr_fast.bench.page import markdown_table
from leoclr_fast.distributed.process_group import resolve_device
from leoclr_fast.losses.info_nce import InfoNCEImpl, info_nce
from pipelines.augment import Impl as AugmentImpl
from pipelines.augment import augment, draw_augmentation
from pipelines.config import ViewConfig
from pipelines.views import LEOCLR_VIEWS

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHAPES = ((256, 65_536, 128, 2), (256, 65_536, 128, 1), (123, 4_099, 96, 2), (7, 252, 128, 3))  # B, K, D, P
_TINY_SHAPES = ((16, 507, 32, 2), (7, 252, 128, 1))
_LEAST_FACTOR = 2.0


def run(config: SuiteConfig, say: Say) -> Answer:
    """Largest errors of value and gradient, each beside the error of the eager implementation in the same dtype."""
    device = resolve_device(config.device)
    losses = loss_parity(device, _TINY_SHAPES if config.tiny else _SHAPES)
    views = augmentation_parity(device, 32 if config.tiny else 224, 4 if config.tiny else 32)
    rows = [*losses, *views]
    for row in rows:
        say(f"{row['function']} {row['impl']} {row['case']}: {row.get('missing') or row['error']}")
    ran = [row for row in rows if "missing" not in row]
    table = markdown_table(
        ("function", "implementation", "case", "error of the value", "of the gradient", "reference", "outcome"),
        [
            (
                row["function"],
                row["impl"],
                row["case"],
                _shown(row["error"]),
                _shown(row.get("gradient_error")),
                _shown(row["reference_error"]),
                "good" if row["good"] else "**TOO FAR OFF**",
            )
            for row in ran
        ],
    )
    note = (
        "Errors are relative to the largest value of the float64 truth. Good: at most twice the error of the reference "
        "(eager, in the same dtype), plus that dtype's rounding.\n\n"
    )
    absent = Counter(f"{row['function']}, {row['impl']}: {row['missing']}" for row in rows if "missing" in row)
    lines = [f"- did not run, {cases} cases: {what}" for what, cases in absent.items()]
    result = {
        "rows": rows,
        "too_far_off": sum(not row["good"] for row in ran),
        "kernels_that_did_not_run": sum(row["impl"] == "triton" for row in rows if "missing" in row),
    }
    return Answer(result=result, markdown=note + table + "\n".join(["", *lines, ""]))


def loss_parity(device: torch.device, shapes: tuple[tuple[int, int, int, int], ...]) -> list[dict[str, Any]]:
    """One row for each implementation of InfoNCE but the compiled one, shape and dtype."""
    rows: list[dict[str, Any]] = []
    for B, K, D, P in shapes:
        for name, dtype in _DTYPES.items():
            generator = torch.Generator().manual_seed(B + K)
            query, queue, *keys = (
                F.normalize(torch.randn(rows, D, generator=generator, dtype=torch.float64), dim=1).to(device, dtype)
                for rows in (B, K, *[B] * P)
            )
            truth = _loss_and_gradient(query.double(), [key.double() for key in keys], queue.double(), "eager")
            reference: tuple[float, float] | None = None
            for impl in get_args(InfoNCEImpl):
                if impl in ("auto", "compiled"):  # the section `loss` has the error of the compiled one
                    continue
                row: dict[str, Any] = {
                    "function": "loss",
                    "impl": impl,
                    "case": f"B {B}, K {K:,}, D {D}, P {P}, {name}",
                }
                rows.append(row)
                try:
                    value, gradient = _loss_and_gradient(query, keys, queue, impl)
                except Exception as error:  # a missing implementation and a broken one are both told
                    row["missing"] = _first_line(error)
                    continue
                errors = (_relative_error(value, truth[0]), _relative_error(gradient, truth[1]))
                reference = reference or errors
                tolerance = torch.finfo(dtype).eps
                row |= {"error": errors[0], "gradient_error": errors[1], "reference_error": max(reference)}
                row["good"] = all(
                    error <= _LEAST_FACTOR * known + tolerance for error, known in zip(errors, reference, strict=True)
                )
    return rows


def augmentation_parity(device: torch.device, side: int, num_images: int) -> list[dict[str, Any]]:
    """One row for each implementation of the augmentation and output dtype."""
    config = ViewConfig(image_size=side)
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(
        0, 256, (len(LEOCLR_VIEWS) * num_images, side, side, 3), dtype=torch.uint8, generator=generator
    )
    parameters = draw_augmentation(LEOCLR_VIEWS, config, 0, 0, np.arange(num_images))
    truth = augment(crops, parameters, config, dtype=torch.float64, impl="torch")
    rows: list[dict[str, Any]] = []
    for name, dtype in _DTYPES.items():
        reference: float | None = None
        for impl in ("torch", *(impl for impl in get_args(AugmentImpl) if impl not in ("auto", "torch"))):
            row: dict[str, Any] = {"function": "augmentation", "impl": impl, "case": f"{side} px, {name}"}
            rows.append(row)
            try:
                views = augment(crops.to(device), parameters.to(device), config, dtype=dtype, impl=impl)
            except Exception as error:  # as above
                row["missing"] = _first_line(error)
                continue
            error_of_views = _relative_error(views.cpu(), truth)
            reference = reference or error_of_views
            row |= {"error": error_of_views, "reference_error": reference}
            row["good"] = error_of_views <= _LEAST_FACTOR * reference + torch.finfo(dtype).eps
    return rows


def _loss_and_gradient(query: Tensor, keys: list[Tensor], queue: Tensor, impl: Any) -> tuple[Tensor, Tensor]:
    leaf = query.detach().clone().requires_grad_()
    loss = info_nce(leaf, keys, queue, 0.2, impl)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def _relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max() / truth.abs().max())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _shown(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}"
