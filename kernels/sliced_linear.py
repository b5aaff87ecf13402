"""``sliced_linear`` on the GPU: the sliced layout for up to eight tokens, the portable form for more.

A program takes a slice of 16 rows and follows its steps, a block at a time: a step has at most one value of each row,
found by counting bits, and the column that it multiplies, which is gathered from x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasticl import tuned
from fasticl.formats import STEP_BYTES
from fasticl.kernels._common import OPTIONS, activate, block, count_bits, matrix
from fasticl.kernels._packed import launch_packed
from fasticl.ops.sliced_linear import MAX_TOKENS


@triton.jit
def sliced_kernel(
    x_ptr, values_ptr, steps_ptr, slice_offsets_ptr, row_order_ptr, bias_ptr, y_ptr, M, N, x_stride,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, STEPS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """y [M, N], M at most BLOCK_M. A step is HALVES words of 16 bits: lane mask, first column, indices of a byte."""
    slice = tl.program_id(0).to(tl.int64)
    lane, token = tl.arange(0, 16), tl.arange(0, BLOCK_M)
    begin = tl.load(slice_offsets_ptr + 2 * slice)
    position = tl.load(slice_offsets_ptr + 2 * slice + 1)
    count = (tl.load(slice_offsets_ptr + 2 * slice + 2) - begin).to(tl.int32)
    acc = tl.zeros((STEPS, 16, BLOCK_M), tl.float32)
    for first in range(0, count, STEPS):
        at = first + tl.arange(0, STEPS)
        step_ptr = steps_ptr + (begin + at) * HALVES
        mask = tl.load(step_ptr, mask=at < count, other=0).to(tl.int32) & 0xFFFF
        window = tl.load(step_ptr + 1, mask=at < count, other=0).to(tl.int32) & 0xFFFF
        counts = count_bits(mask)
        start = position + (tl.cumsum(counts, 0) - counts)
        position += tl.sum(counts, 0)
        stored = ((mask[:, None] >> lane[None, :]) & 1) != 0
        rank = count_bits(mask[:, None] & ((1 << lane[None, :]) - 1))
        w = tl.load(values_ptr + start[:, None] + rank, mask=stored, other=0.0).to(tl.float32)
        pair = tl.load(step_ptr[:, None] + 2 + lane[None, :] // 2, mask=stored, other=0).to(tl.int32)
        column = window[:, None] + ((pair >> (8 * (lane[None, :] % 2))) & 0xFF)
        x = tl.load(
            x_ptr + column[:, :, None] + token[None, None, :].to(tl.int64) * x_stride,
            mask=stored[:, :, None] & (token < M)[None, None, :], other=0.0,
        )  # fmt: skip
        acc += w[:, :, None] * x.to(tl.float32)
    row = tl.load(row_order_ptr + slice * 16 + lane)
    sums = tl.sum(acc, 0)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + row, mask=row >= 0, other=0.0).to(tl.float32)[:, None]
    y = activate(sums, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token[None, :].to(tl.int64) * N + row[:, None], y, mask=(row >= 0)[:, None] & (token < M)[None, :])


def launch(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, sliced_values: Tensor, steps: Tensor,
    slice_offsets: Tensor, row_order: Tensor, bias: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    N, K = bitmask.shape[0], x.shape[-1]
    if K == 0 or x.numel() > MAX_TOKENS * K or steps.data_ptr() % 2:
        return launch_packed(x, values, bitmask, row_offsets, bias, activation)
    y = x.new_empty((*x.shape[:-1], N))
    if y.numel() == 0:
        return y
    x = matrix(x)
    M = x.shape[0]
    block_m = block(M, 1, MAX_TOKENS)
    found = {**tuned.lookup("sliced_linear", x, N, K, M, values.numel() / max(1, N * K))}
    found.pop("implementation", None)
    sliced_kernel[(slice_offsets.shape[0] - 1,)](
        x, sliced_values, steps.view(torch.int16), slice_offsets, row_order,
        None if bias is None else bias.contiguous(), y, M, N, x.stride(0),
        ACTIVATION=activation, BLOCK_M=block_m, HALVES=STEP_BYTES // 2,
        **{"STEPS": 64 // block_m, "num_warps": 4, **found}, **OPTIONS,
    )  # fmt: skip
    return y
