"""Section `profile`: where the device's time goes in a LeOCLR step, kernel by kernel."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_suite.suite_config import Answer, Say, SuiteConfig
from leoclr_fast.bench.page import markdown_table, percent, table_of
from leoclr_fast.bench.rounds import SYNTHETIC, OurMethod, open_batches, training_images
from leoclr_fast.bench.setting import bench_device, setting_header
from leoclr_fast.bench.timing import synchronize

_STEPS = 3
_WARMUP = 5
_TOP = 25


def _kernels(*modules: str) -> str:
    """A pattern of the names of our Triton kernels in these modules, which fits none where Triton is not installed."""
    try:
        import triton
    except ImportError:
        return "(?!)"
    names = [
        re.escape(value.__name__)
        for module in modules
        for value in vars(import_module(module)).values()
        if isinstance(value, triton.KernelInterface)
    ]
    return rf"^({'|'.join(names)})$"


KINDS: tuple[tuple[str, str], ...] = (
    ("loss", _kernels("leoclr_fast.losses.info_nce_triton")),
    ("augmentation", _kernels("pipelines.augment_triton", "pipelines.crop_resize_triton")),
    ("loss", r"info_?nce|logsumexp|logaddexp|softmax|nll_loss|cross_entropy"),
    ("batch-norm", r"batch_?norm|bn_fw|bn_bw|cudnn.*::bn|_bn_|welford|^triton_.*(var_mean|rsqrt)"),
    ("optimizer", r"multi_tensor|fused_?sgd|foreach|lerp|sgd"),
    ("pooling", r"pool"),
    # The compiler's own, named after all that is fused in them; templates (tem) are convolutions and products.
    ("pointwise and reduction", r"^triton_(?!tem|mm|bmm|convolution)"),
    ("convolution", r"conv|implicit_?gemm|wgrad|dgrad|fprop|winograd|xmma_(?!gemm)|nchwto|nhwcto|nchw_to|nhwc_to"),
    ("matrix product", r"gemm|gemv|matmul|aten::mm|aten::addmm|aten::bmm|cutlass|nvjet|dot_kernel|^triton_"),
    ("copy", r"memcpy|memset|copy|aten::cat|aten::index|gather|scatter|fill"),
    ("pointwise and reduction", r"elementwise|vectorized|pointwise|relu|reduce|threshold|aten::"),
)
"""What a kernel is for, by the first pattern that its name fits."""


def run(config: SuiteConfig, say: Say) -> Answer:
    """Top kernels by time, the share of each kind of work, and how long the device had nothing to do."""
    speed = config.speed()
    device = bench_device(speed.device)
    on_gpu = device.type == "cuda"
    result = config.result
    header = setting_header(result, speed, device)
    say(header)
    ours = OurMethod(result.method.name, config.setting, speed, device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with open_batches(training_images(None, result), [ours.views], result, SYNTHETIC, device) as (batches, _):
        batch = next(batches[ours.views])
        for _ in range(_WARMUP):
            ours.step(batch)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(_STEPS):
            ours.step(batch)
        synchronize(device)
        step_ms = 1000 * (time.perf_counter() - start) / _STEPS
        with profile(activities=activities) as profiler:
            for _ in range(_STEPS):
                ours.step(batch)
            synchronize(device)
    totals: dict[str, list[float]] = defaultdict(list)
    for name, milliseconds in _work(profiler, on_gpu):
        totals[name].append(milliseconds)
    ms_per_step = {name: sum(times) / _STEPS for name, times in totals.items()}
    if not ms_per_step:
        raise RuntimeError("the profiler saw nothing of the device's work")
    busy_ms = sum(ms_per_step.values())
    shares: dict[str, float] = defaultdict(float)
    for name, milliseconds in ms_per_step.items():
        shares[kind_of(name)] += milliseconds / busy_ms
    top = sorted(ms_per_step, key=lambda name: -ms_per_step[name])[:_TOP]
    document = {
        "header": header,
        "what": "kernels on the GPU" if on_gpu else "PyTorch's operators on the CPU, without those they call",
        "step_ms": step_ms,
        "busy_ms_per_step": busy_ms,
        "unseen_fraction": max(0.0, 1 - busy_ms / step_ms),
        "shares": dict(sorted(shares.items(), key=lambda item: -item[1])),
        "calls_per_step": sum(map(len, totals.values())) / _STEPS,
        "top": [
            {
                "name": name,
                "kind": kind_of(name),
                "ms_per_step": ms_per_step[name],
                "calls_per_step": len(totals[name]) / _STEPS,
            }
            for name in top
        ],
    }
    return Answer(result=document, markdown=_markdown(document, on_gpu))


def kind_of(name: str) -> str:
    """What a kernel, or an operator, is for, by its name."""
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), "other")


def _work(profiler: Any, on_gpu: bool) -> Iterable[tuple[str, float]]:
    """Name and milliseconds of each kernel on a GPU, of each operator's own time on a CPU."""
    for event in profiler.events():
        if on_gpu:
            # Ranges such as the optimizer's step are drawn on the GPU's line too, over the kernels in them.
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
                yield event.name, event.time_range.elapsed_us() / 1000
        elif event.device_type == torch.autograd.DeviceType.CPU and event.self_cpu_time_total > 0:
            yield event.name, event.self_cpu_time_total / 1000


def _markdown(document: dict[str, Any], on_gpu: bool) -> str:
    unseen = "the device had nothing to do" if on_gpu else "spent outside PyTorch's operators, or in other threads"
    shares = markdown_table(
        ("kind of work, by the kernel's name", "share of the busy time"),
        [(kind, percent(share)) for kind, share in document["shares"].items()],
    )
    top: list[dict[str, Any]] = document["top"]
    kernels = table_of(
        top,
        {
            "kernel" if on_gpu else "operator": lambda kernel: f"`{kernel['name'][:110]}`",
            "kind": lambda kernel: kernel["kind"],
            "ms a step": lambda kernel: f"{kernel['ms_per_step']:.3f}",
            "calls a step": lambda kernel: f"{kernel['calls_per_step']:g}",
        },
    )
    summary = (
        f"One step takes {document['step_ms']:.2f} ms without the profiler; {document['what']}: "
        f"{document['busy_ms_per_step']:.2f} ms in {document['calls_per_step']:.0f} calls; "
        f"{percent(document['unseen_fraction'])} of the step {unseen}."
    )
    return f"{document['header']}\n\n{summary}\n\n{shares}\n{kernels}"
