"""What inductor writes of the encoders for a GPU, without building it: what its kernels move, and must not do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from math import prod
from typing import Any
from unittest import mock

import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering

from leoclr_fast.bench.config import BenchSetting
from leoclr_fast.config import BackboneConfig, RunConfig, SpeedConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.sync_batchnorm import replace_batchnorm
from leoclr_fast.machine.precision import encoder_precision
from leoclr_fast.method import backbone
from leoclr_fast.method.split_batchnorm import SplitBatchNorm2d
from leoclr_fast.training.state import TrainingState
from leoclr_fast.training.step import TrainingStep
from tests.leoclr_fast.training.test_training_step import crop_batches

BATCH_SIZE = 64
_BUFFER = re.compile(r"empty_strided_cuda\(\(([\d, ]+)\), \(([\d, ]+)\), torch\.(\w+)\)")
_NUM_GB = re.compile(r"'kernel_num_gb': ([\d.e-]+)")


class UnbuiltKernel:
    """Stands for a kernel that inductor has written."""

    def run(self, *_: object, **__: object) -> None:
        """Nothing, as on the fake GPU everything does."""


@contextmanager
def unbuilt_kernels() -> Iterator[tuple[list[str], list[str]]]:
    """Inductor writes kernels, and none is built; the sources of them, and of the programs that launch them."""
    kernels: list[str] = []
    programs: list[str] = []

    def unbuilt(_: AsyncCompile, name: str, source: str, *__: object, **___: object) -> UnbuiltKernel:
        kernels.append(source)
        return UnbuiltKernel()

    config = {"fx_graph_cache": False, "compile_threads": 1, "benchmark_kernel": True}
    with (
        mock.patch.object(AsyncCompile, "triton", unbuilt),
        mock.patch.object(GraphLowering, "save_output_code", programs.append),
        torch._inductor.config.patch(config),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield kernels, programs


def findings(kernels: list[str], programs: list[str]) -> dict[str, Any]:
    """kernels: how many. gb: what they move. atomics: those that add atomically. And of the buffers that hold
    activations, sizes and strides: nchw, those whose channels do not lie side by side, and float32, those of it.
    """
    large = BATCH_SIZE * 3 * 224 * 224 // 64
    nchw, wide = [], []
    for *shape, dtype in _BUFFER.findall("\n".join(programs)):
        sizes, strides = (tuple(map(int, text.strip(", ").split(","))) for text in shape)
        if len(sizes) < 4 or sizes[-1] * sizes[-2] < 49 or prod(sizes) < large:
            continue
        if strides[-1] == 1:
            nchw.append((sizes, strides))
        if dtype == "float32":
            wide.append((sizes, strides))
    return {
        "kernels": len(kernels),
        "gb": sum(float(gb) for source in kernels for gb in _NUM_GB.findall(source)),
        "atomics": sorted({re.search(r"def (\w+)\(", source)[1] for source in kernels if "tl.atomic_add(" in source}),
        "nchw": nchw,
        "float32": wide,
    }


def of_a_step(precision: str, depths: str, max_pool: str = "ours") -> dict[str, Any]:
    """Of LeOCLR's encoders at 224 pixels, as a training step compiles them.

    depths: the blocks of each stage of the ResNet. max_pool: ours, or torch's.
    """
    device = torch.device("cuda", 0)
    result = BenchSetting(batch_size=BATCH_SIZE, queue_size=1024).result("leoclr")
    speed = SpeedConfig(device="cuda", precision=precision, compile="on", cuda_graph="on")
    config = RunConfig(recipe="guard", result=result, speed=speed)
    architecture = {"resnet50": (backbone.Bottleneck, tuple(map(int, depths)), {})}
    with mock.patch.dict(backbone.ARCHITECTURES, architecture), _max_pool(max_pool), unbuilt_kernels() as written:
        step = TrainingStep(TrainingState.fresh(config, Ranks(), device), config, device)
        step(crop_batches(config, 1, device)[0], 0.01)
    return findings(*written)


def of_the_stem(precision: str, max_pool: str = "ours") -> dict[str, Any]:
    """Of a ResNet-50 to the end of its first block, forward and backward: in seconds."""
    with _max_pool(max_pool):
        network = backbone.build_backbone(BackboneConfig())
    replace_batchnorm(network, lambda norm: SplitBatchNorm2d(norm, 32))
    stem = [network.conv1, network.bn1, network.relu, network.maxpool, network.layer1[0]]
    module = torch.nn.Sequential(*stem).cuda().to(memory_format=torch.channels_last)
    images = torch.empty(BATCH_SIZE, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    with unbuilt_kernels() as written:
        with encoder_precision(precision, images.device):
            features = torch.compile(module, dynamic=False)(images)
        features.float().mean().backward()
    return findings(*written)


def _max_pool(whose: str) -> AbstractContextManager[object]:
    torchs = partial(torch.nn.MaxPool2d, 3, 2, 1)
    return nullcontext() if whose == "ours" else mock.patch.object(backbone, "MaxPool", torchs)
