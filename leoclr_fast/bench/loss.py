"""The loss alone: forward and backward of every implementation, beside one cross entropy for each key.

Legend: B queries, D dimensions, K negatives, P positives of each query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leoclr_fast.bench.device_timing import captured, first_results, interleaved_ms, peak_extra_mib
from leoclr_fast.bench.kernel_page import kernel_page
from leoclr_fast.bench.statistics import median_interval, quantiles
from leoclr_fast.bench.tables import number, spread
from leoclr_fast.losses.info_nce import InfoNCEImpl, info_nce
from leoclr_fast.machine.compiling import what_compiling_lacks
from leoclr_fast.run.environment import environment

CROSS_ENTROPIES = "cross entropies"
"""The contestant that the others are compared with."""

Loss = Callable[[Tensor, Sequence[Tensor], Tensor, float], Tensor]


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


def bench_loss(
    *,
    batch_size: int,
    queue_size: int,
    dim: int,
    positives: int,
    temperature: float,
    precision: str,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """Time every implementation that runs here, in turns.

    Returns the setting, `environment`, `left_out` (implementation -> why), and `rows`: impl, forward_backward_ms,
    q20_ms, q80_ms, graph_ms (None without a GPU), speedup, speedup_low, speedup_high (over `cross entropies`: the
    median over the rounds and its 95 % interval), peak_extra_mib, loss_error and gradient_error (relative, against
    float64).
    Raises ValueError for numbers that are not allowed.
    """
    for name, given in (
        ("batch size", batch_size), ("queue size", queue_size), ("dimension", dim),
        ("number of positives", positives), ("number of rounds", rounds),
    ):  # fmt: skip
        if given < 1:
            raise ValueError(f"{name} {given} is not allowed: give at least 1")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch_size, dim), (queue_size, dim), *[(batch_size, dim)] * positives]
    query, queue, *keys = (
        F.normalize(torch.randn(shape, generator=generator), dim=1).to(device, dtype) for shape in shapes
    )
    query.requires_grad_()

    def call_of(loss: Loss) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            value = loss(query, keys, queue, temperature)
            (gradient,) = torch.autograd.grad(value, query)
            return value.detach(), gradient

        return call

    left_out = {}
    lacking = what_compiling_lacks(device.type)
    if lacking is not None:
        left_out["compiled"] = f"it lacks {lacking}"
    if device.type != "cuda":
        left_out["triton"] = "it needs a CUDA device"
    elif lacking is not None:
        left_out["triton"] = f"it lacks {lacking}"
    losses: dict[str, Loss] = {CROSS_ENTROPIES: cross_entropies}
    losses |= {impl: _info_nce(impl) for impl in ("eager", "compiled", "triton") if impl not in left_out}
    calls = {name: call_of(loss) for name, loss in losses.items()}
    results = first_results(calls, CROSS_ENTROPIES, left_out)
    times = interleaved_ms(calls, rounds, device)
    graphs = _graph_ms(calls, rounds, device, left_out)
    truth = _truth(query, keys, queue, temperature)
    rows = []
    for name, call in calls.items():
        spread = quantiles(times[name])
        pairs = zip(times[CROSS_ENTROPIES], times[name], strict=True)
        speedup = median_interval([theirs / ours for theirs, ours in pairs])
        rows.append(
            {
                "impl": name,
                "forward_backward_ms": spread["median"],
                "q20_ms": spread["q20"],
                "q80_ms": spread["q80"],
                "graph_ms": graphs.get(name),
                "speedup": speedup["median"],
                "speedup_low": speedup["low"],
                "speedup_high": speedup["high"],
                "peak_extra_mib": peak_extra_mib(call, device),
                "loss_error": _relative_error(results[name][0], truth[0]),
                "gradient_error": _relative_error(results[name][1], truth[1]),
            }
        )
    return {
        "batch_size": batch_size, "queue_size": queue_size, "dim": dim, "positives": positives,
        "temperature": temperature, "precision": precision, "rounds": rounds,
        "logits_mib": batch_size * queue_size * query.element_size() / 2**20,
        "queue_mib": queue_size * dim * query.element_size() / 2**20,
        "rows": rows, "left_out": left_out, "environment": environment(device, 1),
    }  # fmt: skip


def loss_markdown(document: dict[str, Any], command: str | None = None) -> str:
    """The document of `bench_loss` as a page."""
    setting = (
        f"B = {document['batch_size']:,}, K = {document['queue_size']:,}, D = {document['dim']}, "
        f"P = {document['positives']}, {document['precision']}: a matrix of logits has {document['logits_mib']:,.1f} "
        f"MiB, the queue {document['queue_mib']:,.1f} MiB; errors are against float64"
    )
    header = (
        "implementation", "ms", "ms in a CUDA graph", f"times as fast as {CROSS_ENTROPIES}", "peak extra MiB",
        "error of the loss", "error of the gradient",
    )  # fmt: skip
    cells = [
        (
            row["impl"],
            spread(row["forward_backward_ms"], row["q20_ms"], row["q80_ms"], 3),
            number(row["graph_ms"], 3),
            spread(row["speedup"], row["speedup_low"], row["speedup_high"], 2),
            number(row["peak_extra_mib"]),
            f"{row['loss_error']:.0e}",
            f"{row['gradient_error']:.0e}",
        )
        for row in document["rows"]
    ]
    return kernel_page("InfoNCE, forward and backward", setting, document, header, cells, command)


def _info_nce(impl: InfoNCEImpl) -> Loss:
    return lambda query, keys, queue, temperature: info_nce(query, keys, queue, temperature, impl)


def _graph_ms(
    calls: dict[str, Callable[[], tuple[Tensor, Tensor]]], rounds: int, device: torch.device, left_out: dict[str, str]
) -> dict[str, float]:
    """Medians of what a GPU alone takes; the reason where a call cannot be captured goes to ``left_out``."""
    if device.type != "cuda":
        return {}
    replays = {}
    for name, call in calls.items():
        try:
            replays[name] = captured(call)
        except RuntimeError as error:
            left_out[f"{name}, captured"] = str(error).splitlines()[0]
    return {name: quantiles(times)["median"] for name, times in interleaved_ms(replays, rounds, device).items()}


def _truth(query: Tensor, keys: Sequence[Tensor], queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """In float64, from the inputs as they were rounded, some queries at a time."""
    queue = queue.double()
    value, gradients = queue.new_zeros(()), []
    for rows in torch.arange(len(query), device=query.device).split(64):
        part = query.detach()[rows].double().requires_grad_()
        loss = info_nce(part, [key[rows].double() for key in keys], queue, temperature, "eager")
        loss = loss * (len(rows) / len(query))
        gradients.append(torch.autograd.grad(loss, part)[0])
        value += loss.detach()
    return value, torch.cat(gradients)


def _relative_error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()
