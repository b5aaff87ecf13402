"""``y = act(x Wᵀ + b)`` from W's portable form, for bitmap_linear and nm_linear.

A program decodes a tile [BLOCK_N, BLOCK_K] of W in registers and multiplies it: weights are the rows of the tensor
cores' product, tokens its columns; for one token the products are summed without them. A value lies behind as many
others as bits are set before it, and bits are counted a byte at a time: within it, before it in the tile, and before
the tile. Rows are not split over K, because nothing says where their values stand in the middle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasticl import tuned
from fasticl.kernels._common import (
    OPTIONS,
    activate,
    block,
    count_bits,
    dot_precision,
    matrix,
    permute_bytes,
)  # fmt: skip


@triton.jit
def load_stored(values_ptr, position, byte, BLOCK_N: tl.constexpr, BYTES: tl.constexpr):
    """[BLOCK_N, 8 * BYTES] of W: ``byte`` int32 [BLOCK_N, BYTES] of its mask, values from ``position`` [BLOCK_N] on."""
    counts = count_bits(byte)
    start = position[:, None] + (tl.cumsum(counts, 1) - counts)
    bit = tl.arange(0, 8)[None, None, :]
    rank = count_bits(byte[:, :, None] & ((1 << bit) - 1))
    stored = ((byte[:, :, None] >> bit) & 1) != 0
    tile = tl.load(values_ptr + start[:, :, None] + rank, mask=stored, other=0.0)
    return tl.reshape(tile, (BLOCK_N, 8 * BYTES)), position + tl.sum(counts, 1)


@triton.jit
def _pair(mask, w0, w1, w2, w3, PAIR: tl.constexpr):
    """Columns 2 PAIR and 2 PAIR + 1 of sixteen, as the halves of int32; the eight stored values are w0 to w3."""
    before = count_bits(mask & ((1 << (2 * PAIR)) - 1))
    bits = mask >> (2 * PAIR)
    word = tl.minimum(before >> 1, 2)  # the value of either column is one of four from this word on
    low = tl.where(word == 0, w0, tl.where(word == 1, w1, w2))
    high = tl.where(word == 0, w1, tl.where(word == 1, w2, w3))
    selector = 0x1010 + 0x2222 * (before - 2 * word) + 0x2200 * (bits & 1)  # nibbles 2 i + 1, 2 i choose value i
    keep = ((bits & 1) * 0xFFFF) | (-((bits >> 1) & 1) << 16)
    return permute_bytes(low, high, selector) & keep


@triton.jit
def permute_stored(words, mask, dtype: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """[BLOCK_N, 16 * GROUPS] of W, which stores eight 16-bit values in every sixteen columns: 2:4, 4:8 and 8:16.

    words: int32 [BLOCK_N, 4 * GROUPS], two values each; mask: int32 [BLOCK_N, GROUPS], a bit for each column.
    """
    even, odd = tl.split(tl.reshape(words, (BLOCK_N, GROUPS, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    # Joined from the highest bit of the pair's number to the lowest, so that pairs end in the order of their columns.
    p04 = tl.join(_pair(mask, w0, w1, w2, w3, 0), _pair(mask, w0, w1, w2, w3, 4))
    p15 = tl.join(_pair(mask, w0, w1, w2, w3, 1), _pair(mask, w0, w1, w2, w3, 5))
    p26 = tl.join(_pair(mask, w0, w1, w2, w3, 2), _pair(mask, w0, w1, w2, w3, 6))
    p37 = tl.join(_pair(mask, w0, w1, w2, w3, 3), _pair(mask, w0, w1, w2, w3, 7))
    pairs = tl.join(tl.join(p04, p26), tl.join(p15, p37))
    halves = tl.join((pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(halves, (BLOCK_N, 16 * GROUPS)).to(dtype, bitcast=True)


@triton.jit
def packed_kernel(
    x_ptr, values_ptr, words_ptr, bitmask_ptr, row_offsets_ptr, bias_ptr, y_ptr, M, N, K, stored_per_row, x_stride,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """y [M, N]. row_offsets None: every row stores stored_per_row; words: the values again, as int32, or None."""
    BLOCK_K: tl.constexpr = 8 * BYTES
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    bytes_per_row = tl.cdiv(K, 8)
    if row_offsets_ptr is not None:
        position = tl.load(row_offsets_ptr + n, mask=n < N, other=0)
    else:
        position = n * stored_per_row
    acc = tl.zeros((BLOCK_N, BLOCK_K if BLOCK_M == 1 else BLOCK_M), tl.float32)
    for first in range(0, bytes_per_row, BYTES):
        if words_ptr is not None:
            at = first + 2 * tl.arange(0, BYTES // 2)
            byte_ptr = bitmask_ptr + n[:, None] * bytes_per_row + at[None, :]
            exists = (n < N)[:, None]
            low = tl.load(byte_ptr, mask=exists & (at < bytes_per_row)[None, :], other=0).to(tl.int32)
            high = tl.load(byte_ptr + 1, mask=exists & (at + 1 < bytes_per_row)[None, :], other=0).to(tl.int32)
            word = 2 * first + tl.arange(0, 2 * BYTES)  # of the row; two values each
            words = tl.load(
                words_ptr + n[:, None] * (stored_per_row // 2) + word[None, :],
                mask=exists & (word < stored_per_row // 2)[None, :], other=0,
            )  # fmt: skip
            w = permute_stored(words, low | high << 8, x_ptr.dtype.element_ty, BLOCK_N, BYTES // 2)
        else:
            at = first + tl.arange(0, BYTES)
            inside = (n < N)[:, None] & (at < bytes_per_row)[None, :]
            byte = tl.load(bitmask_ptr + n[:, None] * bytes_per_row + at[None, :], mask=inside, other=0).to(tl.int32)
            w, position = load_stored(values_ptr, position, byte, BLOCK_N, BYTES)
        k = first * 8 + tl.arange(0, BLOCK_K)
        if BLOCK_M == 1:
            x = tl.load(x_ptr + k, mask=k < K, other=0.0)
            acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
        else:
            x = tl.load(
                x_ptr + tokens[None, :] * x_stride + k[:, None],
                mask=(tokens < M)[None, :] & (k < K)[:, None], other=0.0,
            )  # fmt: skip
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
    if BLOCK_M == 1:
        acc = tl.sum(acc, 1)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y = activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + tokens[None, :] * N + n[:, None], y, mask=(tokens < M)[None, :] & (n < N)[:, None])


def launch_packed(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, bias: Tensor | None, activation: str | None
) -> Tensor:  # fmt: skip
    """``row_offsets`` None: half of every sixteen columns is stored, and of each row the same number."""
    N, K = bitmask.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], N))
    if y.numel() == 0:
        return y
    x = matrix(x)
    M = x.shape[0]
    if M == 1:
        block_m, block_n, bytes_ = 1, 16, 32
    elif M <= 16:
        block_m, block_n, bytes_ = 16, 16, 16
    else:
        block_m = block_n = 32 if x.dtype == torch.float32 else 64  # larger float32 tiles spill
        bytes_ = 8
    op = "nm_linear" if row_offsets is None else "bitmap_linear"
    found = {**tuned.lookup(op, x, N, K, M, values.numel() / max(1, N * K))}
    found.pop("implementation", None)
    block_n, bytes_ = found.pop("BLOCK_N", block_n), found.pop("BYTES", bytes_)
    # Words of two values: what is stored begins at even places, but may do so anywhere in memory.
    words = row_offsets is None and x.element_size() == 2 and K > 0 and values.data_ptr() % 4 == 0
    packed_kernel[(triton.cdiv(N, block_n), triton.cdiv(M, block_m))](
        x, values, values.view(torch.int32) if words else None, bitmask, row_offsets,
        None if bias is None else bias.contiguous(), y, M, N, K, values.numel() // N, x.stride(0),
        ACTIVATION=activation, PRECISION=dot_precision(x.dtype), BLOCK_M=block_m, BLOCK_N=block_n,
        BYTES=min(bytes_, block(triton.cdiv(K, 8), 2, 32)), **{"num_warps": 4, "num_stages": 2, **found}, **OPTIONS,
    )  # fmt: skip
    return y
