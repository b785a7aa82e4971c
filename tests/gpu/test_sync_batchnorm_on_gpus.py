"""Our synchronised batch-norm and torch's, on two GPUs with NCCL."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.distributed.sync_batchnorm import SyncBatchNorm2d

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has fewer than two CUDA devices"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_torchs(dtype: torch.dtype, tmp_path: Path) -> None:
    """Outputs, gradients and running statistics of 5 and 4 images, channels-last."""
    mp.spawn(compare, (str(tmp_path / "store"), dtype), nprocs=2)


def compare(rank: int, store: str, dtype: torch.dtype) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    generator = torch.Generator().manual_seed(rank)
    images = 3 + torch.randn(5 - rank, 16, 8, 8, generator=generator)
    weights = torch.randn(5 - rank, 16, 8, 8, generator=generator).to("cuda", dtype)
    source = nn.BatchNorm2d(16).cuda()
    with torch.no_grad():
        source.weight.uniform_(0.5, 2, generator=torch.Generator("cuda").manual_seed(0))
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(source)
    ours = SyncBatchNorm2d(source, Ranks(rank, 2))
    seen = []
    for norm in (ours, theirs):
        part = images.to("cuda", dtype, memory_format=torch.channels_last).requires_grad_()
        output = norm(part)
        (output * weights).sum().backward()
        assert output.dtype == dtype
        assert output.is_contiguous(memory_format=torch.channels_last)
        seen.append([output, part.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for one, other in zip(*seen, strict=True):
        size = other.abs().max().item()
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=tolerance * size)
    dist.destroy_process_group()
