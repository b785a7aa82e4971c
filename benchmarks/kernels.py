"""The loss and the augmentation alone: every implementation that runs here, interleaved, with its error and memory.
`python -m benchmarks.kernels loss|augment --help`

Legend: B queries or images, D dimensions, K negatives, P positives of each query; V views, S side of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.calls import captured, interleaved_ms
from benchmarks.results import print_document
from dataset_tools.limits import Count, Limited, Temperature
from leoclr_fast.bench.page import bench_page, number, spread, table_of
from leoclr_fast.bench.setting import bench_device
from leoclr_fast.bench.statistics import quantiles, ratio_interval
from leoclr_fast.bench.timing import peak_extra_mib
from leoclr_fast.config import MethodName
from leoclr_fast.config_file import as_plain
from leoclr_fast.losses.info_nce import InfoNCEImpl, info_nce
from leoclr_fast.machine.compiling import what_compiling_lacks
from leoclr_fast.machine.precision import settled
from leoclr_fast.method.methods import method_class
from leoclr_fast.run.environment import environment
from pipelines.augment import Impl as AugmentImpl
from pipelines.augment import augment, draw_augmentation
from pipelines.config import ViewConfig

CROSS_ENTROPIES = "cross entropies"
"""The loss that the others are compared with."""
TORCH = "torch"
"""The augmentation that the others are compared with."""

Loss = Callable[[Tensor, Sequence[Tensor], Tensor, float], Tensor]
Result = TypeVar("Result")

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CHECKED_VIEWS = 24
_TRUTH_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _CallsConfig(Limited):
    rounds: Count = 15
    """Timed calls of each implementation, after two that are not counted."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossBenchConfig(_CallsConfig):
    """The sizes of the loss, and how often it is timed."""

    batch_size: Count = 256
    queue_size: Count = 65536
    dim: Count = 128
    """Of the projection."""
    positives: Count = 2
    """Keys of each query: 2 are LeOCLR's, 1 is MoCo-v2's."""
    temperature: Temperature = 0.2
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of query, keys and queue; a training hands them over in fp32, whatever its own precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentBenchConfig(_CallsConfig):
    """The views that are augmented, and how often they are timed."""

    method: MethodName = "leoclr"
    """Whose views: leoclr has three of each image, mocov2 two."""
    batch_size: Count = 256
    """Images."""
    image_size: Annotated[int, Meta(ge=2)] = 224
    """Side of a view, pixels."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of the views that come out; auto is what a training takes there."""


def cross_entropies(query: Tensor, keys: Sequence[Tensor], queue: Tensor, temperature: float) -> Tensor:
    """The loss in the published form of MoCo: B x (1 + K) logits and a cross entropy, once for each key."""
    criterion = nn.CrossEntropyLoss()
    labels = torch.zeros(len(query), dtype=torch.long, device=query.device)
    total = query.new_zeros(())
    for key in keys:
        positive = torch.einsum("nc,nc->n", query, key)[:, None]
        negative = torch.einsum("nc,kc->nk", query, queue)
        total = total + criterion(torch.cat([positive, negative], dim=1) / temperature, labels)
    return total


def bench_loss(config: LossBenchConfig) -> dict[str, Any]:
    """Time forward and backward of every implementation.

    Returns the setting, `environment`, `left_out` (implementation -> why), and `rows`, as `timed_rows` makes them, with
    loss_error and gradient_error (relative, against float64). Raises ValueError for a device that is not there.
    """
    device, dtype = bench_device(config.device), _DTYPES[config.precision]
    generator = torch.Generator().manual_seed(0)
    B, K, D = config.batch_size, config.queue_size, config.dim
    query, queue, *keys = (
        F.normalize(torch.randn(rows, D, generator=generator), dim=1).to(device, dtype)
        for rows in (B, K, *[B] * config.positives)
    )
    query.requires_grad_()

    def call_of(loss: Loss) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            value = loss(query, keys, queue, config.temperature)
            (gradient,) = torch.autograd.grad(value, query)
            return value.detach(), gradient

        return call

    left_out = _left_out(device)
    calls = {CROSS_ENTROPIES: call_of(cross_entropies)}
    calls |= {impl: call_of(_info_nce(impl)) for impl in ("eager", "compiled", "triton") if impl not in left_out}
    graphs = tuple(calls) if device.type == "cuda" else ()
    truth = _true_loss(query, keys, queue, config.temperature)

    def errors(result: tuple[Tensor, Tensor]) -> dict[str, float]:
        value, gradient = (_relative_error(ours, true) for ours, true in zip(result, truth, strict=True))
        return {"loss_error": value, "gradient_error": gradient}

    return {
        **as_plain(config),
        "logits_mib": B * K * dtype.itemsize / 2**20,
        "queue_mib": K * D * dtype.itemsize / 2**20,
        "rows": timed_rows(calls, errors, left_out, rounds=config.rounds, device=device, graphs=graphs),
        "left_out": left_out,
        "environment": environment(device, 1),
    }


def bench_augment(config: AugmentBenchConfig) -> dict[str, Any]:
    """Time every implementation of the augmentation on one batch of crops [V, B, S, S, 3] in the device's memory.

    Returns the setting, `environment`, `left_out` (implementation -> why), and `rows`, as `timed_rows` makes them, with
    images_per_s and error (largest difference from float64 on some of the views, in units of the standard deviation).
    Raises ValueError for a device that is not there.
    """
    device = bench_device(config.device)
    config = settled(config, device)
    dtype = _DTYPES[config.precision]
    views, view_config = method_class(config.method).views, ViewConfig(image_size=config.image_size)
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, len(views), config.image_size, config.image_size, 3)  # as loaders hand them out
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device).transpose(0, 1)
    drawn = draw_augmentation(views, view_config, 0, 0, np.arange(config.batch_size)).to(device)

    left_out = _left_out(device)
    if device.type == "cuda":
        left_out["numba"] = "it knows only the CPU"
    else:
        left_out["compiled"] = "on a CPU, torch goes through the views part by part"

    def call_of(impl: AugmentImpl, function: Callable[..., Tensor] = augment) -> Callable[[], Tensor]:
        return lambda: function(crops, drawn, view_config, dtype=dtype, impl=impl)

    calls = {TORCH: call_of("torch"), "numba": call_of("numba"), "triton": call_of("triton")}
    calls["compiled"] = call_of("torch", torch.compile(augment, dynamic=False))
    calls = {name: call for name, call in calls.items() if name not in left_out}
    chosen = np.linspace(0, len(drawn) - 1, min(_CHECKED_VIEWS, len(drawn))).astype(int).tolist()
    parameters = drawn[chosen]
    truth = augment(crops.flatten(0, 1)[chosen], parameters, view_config, dtype=torch.float64, impl="torch")

    def errors(result: Tensor) -> dict[str, float]:
        return {"error": (result[chosen].double() - truth).abs().max().item()}

    rows = timed_rows(calls, errors, left_out, rounds=config.rounds, device=device, graphs=("triton",))
    return {
        **as_plain(config),
        "views": len(views),
        "crops_mib": crops.numel() / 2**20,
        "output_mib": crops.numel() * dtype.itemsize / 2**20,
        "rows": [row | {"images_per_s": 1e3 * config.batch_size / row["ms"]} for row in rows],
        "left_out": left_out,
        "environment": environment(device, 1),
    }


def timed_rows(
    calls: dict[str, Callable[[], Result]],
    errors: Callable[[Result], dict[str, float]],
    left_out: dict[str, str],
    *,
    rounds: int,
    device: torch.device,
    graphs: Sequence[str],
) -> list[dict[str, Any]]:
    """A row for each implementation: impl, ms with its quantiles, graph_ms (in a CUDA graph, of those in ``graphs``;
    else None), speedup, speedup_low, speedup_high (over the first: the median over the rounds and its 95 % interval),
    peak_extra_mib (with the output), and its ``errors``.

    One that fails, or cannot be captured, is named in ``left_out`` with its reason; if the first fails, this does.
    """
    reference, found = next(iter(calls)), {}
    for name, call in calls.items():
        try:
            found[name] = errors(call())  # what is compiled at its first call is compiled here
        except Exception as error:
            if name == reference:
                raise
            left_out[name] = _first_line(error)
    times = interleaved_ms({name: calls[name] for name in found}, rounds, device)
    replays = {}
    for name in graphs:
        try:
            if name in found:
                replays[name] = captured(calls[name])
        except RuntimeError as error:
            left_out[f"{name}, captured"] = _first_line(error)
    graph_times = interleaved_ms(replays, rounds, device)
    rows = []
    for name, own in times.items():
        speedup = ratio_interval(times[reference], own)
        rows.append(
            {
                "impl": name,
                **quantiles("ms", own),
                "graph_ms": quantiles("ms", graph_times[name])["ms"] if name in graph_times else None,
                "speedup": speedup["median"],
                "speedup_low": speedup["low"],
                "speedup_high": speedup["high"],
                "peak_extra_mib": peak_extra_mib(calls[name], device),
                **found[name],
            }
        )
    return rows


def loss_markdown(document: dict[str, Any], command: str | None = None) -> str:
    setting = (
        f"B = {document['batch_size']:,}, K = {document['queue_size']:,}, D = {document['dim']}, "
        f"P = {document['positives']}, {document['precision']}: a matrix of logits has {document['logits_mib']:,.1f} "
        f"MiB, the queue {document['queue_mib']:,.1f} MiB; errors are against float64"
    )
    columns = {"error of the loss": "loss_error", "error of the gradient": "gradient_error"}
    return _kernel_page("InfoNCE, forward and backward", setting, document, CROSS_ENTROPIES, columns, command)


def augment_markdown(document: dict[str, Any], command: str | None = None) -> str:
    setting = (
        f"{document['batch_size']:,} images of {document['views']} views at {document['image_size']} pixels, uint8 "
        f"crops ({document['crops_mib']:,.1f} MiB) to normalised {document['precision']} "
        f"({document['output_mib']:,.1f} MiB); errors are against float64, in standard deviations"
    )
    columns = {"largest error": "error"}
    return _kernel_page("MoCo-v2's photometric augmentation", setting, document, TORCH, columns, command)


def _kernel_page(
    title: str, setting: str, document: dict[str, Any], reference: str, errors: dict[str, str], command: str | None
) -> str:
    machine = document["environment"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} threads"
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "implementation": lambda row: row["impl"],
        "ms": lambda row: spread(row, "ms", 3),
        "ms in a CUDA graph": lambda row: number(row["graph_ms"], 3),
        "images/s": lambda row: number(row["images_per_s"], 0),
        f"times as fast as {reference}": lambda row: (
            f"{row['speedup']:,.2f} [{row['speedup_low']:,.2f}, {row['speedup_high']:,.2f}]"
        ),
        "peak extra MiB": lambda row: number(row["peak_extra_mib"]),
        **{title: partial(_error, name) for title, name in errors.items()},
    }
    if "images_per_s" not in document["rows"][0]:
        del columns["images/s"]
    return bench_page(
        title,
        f"{setting}. {where}, torch {machine['versions']['torch']}",
        table_of(document["rows"], columns),
        rounds=f"{document['rounds']} interleaved rounds.",
        command=command,
        remarks=[f"{name}: left out, since {why}." for name, why in document["left_out"].items()],
    )


def _left_out(device: torch.device) -> dict[str, str]:
    """Of what is compiled, what cannot run on a device, and why."""
    lacking = what_compiling_lacks(device.type)
    left_out = {} if lacking is None else dict.fromkeys(("compiled", "triton"), f"it lacks {lacking}")
    return left_out if device.type == "cuda" else left_out | {"triton": "it needs a CUDA device"}


def _info_nce(impl: InfoNCEImpl) -> Loss:
    return lambda query, keys, queue, temperature: info_nce(query, keys, queue, temperature, impl)


def _true_loss(query: Tensor, keys: Sequence[Tensor], queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64, from the inputs as they were rounded, some queries at a time."""
    queue = queue.double()
    value, gradients = queue.new_zeros(()), []
    for rows in torch.arange(len(query), device=query.device).split(_TRUTH_ROWS):
        part = query.detach()[rows].double().requires_grad_()
        loss = info_nce(part, [key[rows].double() for key in keys], queue, temperature, "eager")
        loss = loss * (len(rows) / len(query))
        gradients.append(torch.autograd.grad(loss, part)[0])
        value += loss.detach()
    return value, torch.cat(gradients)


def _error(name: str, row: Mapping[str, float]) -> str:
    return f"{row[name]:.0e}"


def _relative_error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


if __name__ == "__main__":
    import tyro  # a machine with a GPU may lack it, and the suite does not need it

    config = tyro.cli(
        Annotated[LossBenchConfig, tyro.conf.subcommand("loss")]
        | Annotated[AugmentBenchConfig, tyro.conf.subcommand("augment")]
    )
    if isinstance(config, LossBenchConfig):
        print_document(bench_loss(config), loss_markdown)
    else:
        print_document(bench_augment(config), augment_markdown)
