"""InfoNCE in Triton: one pass over the queue for all positives of a query, and never a B x K tensor.

With the logits x = q Q^T / t, the first kernel leaves, for each query and each share of the queue, the highest logit,
the sum of the exponentials and their sum weighted by the queue's rows. The second kernel makes of these
L = logsumexp(x) and O = softmax(x) Q; with s = q k / t and w = 1 - p = sigmoid(L - s), the loss of a positive is
softplus(L - s), and its gradient w (O - k) / (B t). So the gradient is known when the forward pass ends, and the
backward pass only scales it. Sums are in float32 and in a fixed order: two runs give the same bits.

Logits are computed in units of log 2, which is what the hardware's exponential takes.
Legend: B queries, D dimensions, K negatives, P positives of each query, S shares of the queue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipelines.kernels import KernelLaunch

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set when Triton was imported: then the kernels run on the CPU, slowly."""

_PROGRAMS = 256  # two for each multiprocessor, about; not the device's number, so that every device sums up alike


class _Tiles(NamedTuple):
    """Largest sides of a program's tiles."""

    queries: int
    negatives: int
    dims: int
    num_warps: int
    num_stages: int


# By whether D <= 128. The largest that compile without spilled registers for sm_80, sm_90 and sm_100.
_HALF = {True: _Tiles(64, 64, 128, 4, 3), False: _Tiles(64, 64, 64, 8, 3)}
_SINGLE = {True: _Tiles(32, 64, 128, 8, 2), False: _Tiles(32, 32, 32, 8, 2)}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FLOAT16_SHIFT = 15.0  # float16 ends at 2^-24: its exponentials are of 2^15 x, so that they reach down to 2^-39


def info_nce_triton(query: Tensor, keys: Sequence[Tensor], queue: Tensor, temperature: float) -> Tensor:
    """`leoclr_fast.losses.info_nce.info_nce` in Triton: a float32 scalar, with a gradient for the query alone.

    query: [B, D]; keys: P tensors [B, D]; queue: [K, D]; each float32, float16 or bfloat16, on one device. The
    negatives' products are of the query's dtype: the queue is rounded to it tile by tile, without a copy; those of the
    positives are in float32. Extra memory: about (16,384 + P B) D numbers, or 2 B D if that is more.

    float32 products are split into three of TF32 (`tf32x3`), for the tensor cores. Emulated on a CPU (B = 64,
    K = 65,536, D = 128, temperature 0.2) the loss is then 7e-8 and the gradient 6e-8 off float64, no more than with
    IEEE's products; with a single product of TF32 the gradient would be 8e-6 off.
    Raises ValueError for what the kernels cannot take (`what_keeps_triton_out`).
    """
    obstacle = what_keeps_triton_out(query, keys, queue)
    if obstacle is not None:
        raise ValueError(f"the Triton loss cannot run here, since {obstacle}; choose loss_impl auto or eager")
    return _InfoNCE.apply(query, torch.stack([key.detach() for key in keys]), queue.detach(), temperature)


def what_keeps_triton_out(query: Tensor, keys: Sequence[Tensor], queue: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, or None if they can."""
    tensors = (query, *keys, queue)
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            return f"it takes float32, float16 and bfloat16, and here is {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.device != query.device:
            return f"the tensors are on different devices, {query.device} and {tensor.device}"
    if not (query.is_cuda or (INTERPRETED and query.device.type == "cpu")):
        return f"the tensors are on {query.device}: it needs a CUDA device (or, for tests, TRITON_INTERPRET=1)"
    if query.is_cuda and not INTERPRETED and torch.cuda.get_device_capability(query.device) < (8, 0):
        return f"{torch.cuda.get_device_name(query.device)} is older than compute capability 8.0"
    if len(query) == 0 or len(queue) == 0:
        return f"there are {len(query)} queries and {len(queue)} negatives, and it needs at least one of each"
    return None


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
        losses = torch.empty(len(query), dtype=torch.float32, device=query.device)
        gradient = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        with torch.cuda.device_of(query):
            for launch in launches(query, keys, queue, temperature, losses, gradient):
                launch.run()
        ctx.save_for_backward(gradient)
        ctx.dtype = query.dtype
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors  # in float32, since 1 / (B t) of it may be nothing in float16 before the scale
        return (gradient * loss_gradient).to(ctx.dtype), None, None, None


def launches(
    query: Tensor, keys: Tensor, queue: Tensor, temperature: float, losses: Tensor, gradient: Tensor
) -> tuple[KernelLaunch, KernelLaunch]:
    """The two launches that fill ``losses`` [B] and ``gradient`` [B, D], both float32 and contiguous.

    query: [B, D]; keys: [P, B, D]; queue: [K, D]. All shapes are known on the host: nothing is waited for.
    """
    B, D = query.shape
    K, P = len(queue), len(keys)
    query, keys, queue = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, keys, queue))
    keys = keys.contiguous()
    tiles = (_SINGLE if query.dtype == torch.float32 else _HALF)[D <= 128]
    block_b = min(tiles.queries, max(16, triton.next_power_of_2(B)))
    block_k = tiles.negatives
    block_d = min(tiles.dims, max(16, triton.next_power_of_2(D)))
    row_blocks, dim_blocks = triton.cdiv(B, block_b), triton.cdiv(D, block_d)
    shares = min(triton.cdiv(_PROGRAMS, row_blocks), triton.cdiv(K, block_k))
    keys_per_share = triton.cdiv(triton.cdiv(K, block_k), shares) * block_k
    shares = triton.cdiv(K, keys_per_share)  # none of them empty
    scale = math.log2(math.e) / temperature

    highest = torch.empty(shares, B, dtype=torch.float32, device=query.device)
    total = torch.empty_like(highest)
    weighted = torch.empty(shares, B, D, dtype=torch.float32, device=query.device)
    operand = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[query.dtype]
    first = KernelLaunch(
        kernel=_share_of_the_queue,
        grid=(row_blocks, shares, dim_blocks),
        arguments={
            "query": query, "queue": queue, "highest": highest, "total": total, "weighted": weighted,
            "B": B, "K": K, "D": D, "query_stride": query.stride(0), "queue_stride": queue.stride(0),
            "keys_per_share": keys_per_share, "scale": scale,
        },
        constants={
            "BLOCK_B": block_b, "BLOCK_K": block_k, "BLOCK_D": block_d, "DIM_BLOCKS": dim_blocks,
            "OPERAND": operand,
            # The interpreter multiplies the bit patterns of bfloat16.
            "PRODUCT": tl.float32 if INTERPRETED else operand,
            "SHIFT": _FLOAT16_SHIFT if query.dtype == torch.float16 else 0.0,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    second = KernelLaunch(
        kernel=_all_shares,
        grid=(B,),
        arguments={
            "query": query, "keys": keys, "highest": highest, "total": total, "weighted": weighted,
            "losses": losses, "gradient": gradient,
            "B": B, "D": D, "P": P, "S": shares, "query_stride": query.stride(0),
            "scale": scale, "gradient_scale": 1.0 / (B * temperature),
        },
        constants={
            "BLOCK_D": block_d, "BLOCK_P": triton.next_power_of_2(P), "BLOCK_S": triton.next_power_of_2(shares),
            "TILE_S": min(16, triton.next_power_of_2(shares)),
        },
    )  # fmt: skip
    return first, second


@triton.jit
def _share_of_the_queue(
    query, queue, highest, total, weighted,
    B, K, D, query_stride, queue_stride, keys_per_share, scale,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DIM_BLOCKS: tl.constexpr,
    OPERAND: tl.constexpr, PRODUCT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Highest logit [S, B], sum of 2^(logit - highest) [S, B], that sum weighted by the queue's rows [S, B, D].

    A program has BLOCK_B queries, one share of the queue, and BLOCK_D of the dimensions of its output.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    share = tl.program_id(1)
    dims = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_row, is_dim = rows < B, dims < D
    query_rows = query + rows.to(tl.int64)[:, None] * query_stride
    if DIM_BLOCKS == 1:
        query_tile = tl.load(query_rows + dims[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0)
        query_tile = query_tile.to(OPERAND).to(PRODUCT)

    first = share * keys_per_share
    stop = tl.minimum(first + keys_per_share, K)
    top = tl.full([BLOCK_B], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_B], tl.float32)
    weighted_rows = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for start in range(first, stop, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        is_column = columns < stop
        queue_rows = queue + columns.to(tl.int64)[:, None] * queue_stride
        queue_tile = tl.load(queue_rows + dims[None, :], mask=is_column[:, None] & is_dim[None, :], other=0.0)
        queue_tile = queue_tile.to(OPERAND).to(PRODUCT)
        if DIM_BLOCKS == 1:
            logits = tl.dot(query_tile, tl.trans(queue_tile), input_precision="tf32x3")
        else:
            logits = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
            for block in range(DIM_BLOCKS):
                others = block * BLOCK_D + tl.arange(0, BLOCK_D)
                is_other = others < D
                part = tl.load(query_rows + others[None, :], mask=is_row[:, None] & is_other[None, :], other=0.0)
                other_tile = tl.load(
                    queue_rows + others[None, :], mask=is_column[:, None] & is_other[None, :], other=0.0
                )
                logits = tl.dot(
                    part.to(OPERAND).to(PRODUCT),
                    tl.trans(other_tile.to(OPERAND).to(PRODUCT)),
                    logits,
                    input_precision="tf32x3",
                )
        logits = tl.where(is_column[None, :], logits * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        exponentials = tl.exp2(logits - new_top[:, None] + SHIFT)
        shrink = tl.exp2(top - new_top)
        sums = sums * shrink + tl.sum(exponentials, axis=1)
        weighted_rows = tl.dot(
            exponentials.to(OPERAND).to(PRODUCT),
            queue_tile,
            weighted_rows * shrink[:, None],
            input_precision="tf32x3",
        )
        top = new_top

    place = share.to(tl.int64) * B + rows
    if tl.program_id(2) == 0:
        tl.store(highest + place, top - SHIFT, mask=is_row)
        tl.store(total + place, sums, mask=is_row)
    tl.store(weighted + place[:, None] * D + dims[None, :], weighted_rows, mask=is_row[:, None] & is_dim[None, :])


@triton.jit
def _all_shares(
    query, keys, highest, total, weighted, losses, gradient,
    B, D, P, S, query_stride, scale, gradient_scale,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, TILE_S: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of one query; ``highest``, ``total`` and ``weighted`` are the first kernel's."""
    row = tl.program_id(0).to(tl.int64)
    shares, positives = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_P)
    tops = tl.load(highest + shares.to(tl.int64) * B + row, mask=shares < S, other=float("-inf"))
    top = tl.max(tops, axis=0)
    sums = tl.load(total + shares.to(tl.int64) * B + row, mask=shares < S, other=0.0)
    sums = tl.sum(sums * tl.exp2(tops - top), axis=0)
    negatives = top + tl.log2(sums)  # logsumexp, in units of log 2

    key_rows = keys + (positives.to(tl.int64)[:, None] * B + row) * D
    similarity = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        query_part = tl.load(query + row * query_stride + dims, mask=dims < D, other=0.0).to(tl.float32)
        key_part = tl.load(key_rows + dims[None, :], mask=(positives < P)[:, None] & (dims < D)[None, :], other=0.0)
        similarity += tl.sum(key_part.to(tl.float32) * query_part[None, :], axis=1)

    behind = (negatives - similarity * scale) * 0.6931471805599453  # L - s
    exponential = tl.exp(-tl.abs(behind))
    logarithm = tl.where(  # of 1 + exponential, whose own rounding would show where the loss is nearly 0
        exponential < 1e-3,
        exponential * (1.0 - exponential * (0.5 - exponential * 0.3333333)),
        tl.log(1.0 + exponential),
    )
    loss = tl.maximum(behind, 0.0, propagate_nan=tl.PropagateNan.ALL) + logarithm
    tl.store(losses + row, tl.sum(tl.where(positives < P, loss, 0.0), axis=0))
    weights = tl.where(behind >= 0, 1.0, exponential) / (1.0 + exponential)
    weights = tl.where(positives < P, weights, 0.0)
    all_weights = tl.sum(weights, axis=0)

    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        mean_negative = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, S, TILE_S):
            tile_shares = first + tl.arange(0, TILE_S)
            is_share = tile_shares < S
            place = tile_shares.to(tl.int64) * B + row
            share_weights = tl.exp2(tl.load(highest + place, mask=is_share, other=float("-inf")) - top)
            tile = tl.load(
                weighted + place[:, None] * D + dims[None, :], mask=is_share[:, None] & (dims < D)[None, :], other=0.0
            )
            mean_negative += tl.sum(tile * share_weights[:, None], axis=0)
        key_part = tl.load(key_rows + dims[None, :], mask=(positives < P)[:, None] & (dims < D)[None, :], other=0.0)
        mean_key = tl.sum(key_part.to(tl.float32) * weights[:, None], axis=0)
        tl.store(
            gradient + row * D + dims,
            (mean_negative * (all_weights / sums) - mean_key) * gradient_scale,
            mask=dims < D,
        )
