"""Narrow networks on a CPU, where oneDNN's channels-last 1 x 1 convolutions of few channels corrupt memory."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F

from leoclr_fast.cli import run_command
from leoclr_fast.config import BackboneConfig
from leoclr_fast.method.backbone import build_backbone
from tests.leoclr_fast.narrow_training import train
from tests.leoclr_fast.tiny_flags import TINY_FLAGS

RECIPES = ("leoclr_demo", "mocov2_demo")
ISA_LEVELS = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
              "AVX512_CORE_FP16", "AVX512_CORE_AMX", "ALL")  # fmt: skip
"""Of oneDNN; a machine without one takes the best below it."""


def is_nhwc(tensor: Tensor) -> bool:
    """Whether torch takes a tensor [B, C, H, W] for channels-last: it looks at the strides alone."""
    return bool(suggest_memory_format(tensor) == torch.channels_last)


@pytest.fixture
def narrow_passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of every 1 x 1 convolution of fewer than 16 channels that runs: whether its images and its weights are NHWC."""
    passes: list[tuple[bool, bool]] = []
    convolution = F.conv2d

    def watched(images: Tensor, weight: Tensor, *others: Any) -> Tensor:
        if weight.shape[1] < 16 and weight.shape[2:] == (1, 1):
            passes.append((is_nhwc(images), is_nhwc(weight)))
        return convolution(images, weight, *others)

    monkeypatch.setattr(F, "conv2d", watched)
    return passes


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_demo_trains_contiguous(recipe: str, narrow_passes: list[tuple[bool, bool]]) -> None:
    train(recipe, batch_size=7, side=32, num_steps=2)
    assert len(narrow_passes) >= 4
    assert set(narrow_passes) == {(False, False)}


def test_so_do_the_evaluations(tiny_data: Path, tmp_path: Path, narrow_passes: list[tuple[bool, bool]]) -> None:
    run, data = tmp_path / "run", f"--data={tiny_data}"
    commands = (
        ["pretrain", "leoclr_demo", data, f"--out={run}", "--max-steps=1", *TINY_FLAGS],
        ["knn", str(run), data, "--device=cpu"],
        ["linear", str(run), data, "--epochs=1", "--batch-size=16", "--device=cpu"],
        ["finetune", str(run), data, "--percent=50", "--epochs=1", "--batch-size=16", "--device=cpu"],
    )
    for command in commands:
        narrow_passes.clear()
        assert run_command(command) == 0
        assert narrow_passes, command[0]
        assert set(narrow_passes) == {(False, False)}, command[0]


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_format_is_that_of_the_weights(channels_last: bool) -> None:
    """The views are always channels-last; without `channels_last` the network is not, from its first layer on."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    config = BackboneConfig(arch="resnet18", stem="small", width_multiplier=0.125)
    network = build_backbone(config).to(memory_format=memory_format)
    formats: list[bool] = []
    network.layer2[0].conv1.register_forward_hook(lambda module, inputs, output: formats.append(is_nhwc(output)))
    images = torch.rand(2, 3, 16, 16)
    outputs = [network(images), network(images.contiguous(memory_format=torch.channels_last))]
    assert formats == [channels_last, channels_last]
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("width", [0.0625, 0.125])
def test_a_narrow_shortcut_is_torchs_convolution(width: float) -> None:
    """Against plain nested loops in float64, by way of a full convolution: values and gradients."""
    shortcut = build_backbone(BackboneConfig(arch="resnet18", width_multiplier=width)).layer2[0].downsample[0].double()
    assert shortcut.stride == (2, 2)
    images = torch.randn(3, shortcut.in_channels, 6, 6, dtype=torch.float64).requires_grad_()
    ours = shortcut(images.to(memory_format=torch.channels_last))
    truth = torch.einsum("bchw,oc->bohw", images[:, :, ::2, ::2], shortcut.weight[:, :, 0, 0])
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(ours)
    inputs = (images, shortcut.weight)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(truth, inputs, upstream),
        rtol=1e-12,
        atol=1e-12,
    )


def trains_in_its_own_process(
    recipe: str, sizes: tuple[str, ...], *, num_threads: int, num_steps: int = 4, width: str = "0.125", isa: str = "ALL"
) -> None:
    """sizes: batch x side of the views, one after the other. isa: the best instructions that oneDNN may use."""
    words = [recipe, width, str(num_threads), str(num_steps), *sizes]
    command = [sys.executable, "-m", "tests.leoclr_fast.narrow_training", *words]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert ended.returncode == 0, f"{words} with {isa}: {ended.stderr[-2000:]}"


def test_with_three_threads() -> None:
    """What `make demo` trains, on a machine of three cores: with AVX-512 this was a segmentation fault."""
    trains_in_its_own_process("leoclr_demo", ("64x32",), num_threads=3)


def test_with_fewer_channels_than_avx2_has_lanes() -> None:
    """Four channels: with AVX2 a batch that two threads do not share evenly did not end."""
    trains_in_its_own_process("leoclr_demo", ("7x32",), num_threads=2, width="0.0625", isa="AVX2")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("isa", ISA_LEVELS)
def test_with_any_threads_and_batch(isa: str) -> None:
    sizes = tuple(f"{batch_size}x{side}" for batch_size, side in product((7, 17, 63, 64), (32, 64, 96)))
    for num_threads, width in product((1, 2, 3, 5, 8), ("0.0625", "0.125")):
        trains_in_its_own_process("leoclr_demo", sizes, num_threads=num_threads, width=width, isa=isa)
