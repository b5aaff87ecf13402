"""``attention_mlp`` on the GPU: each prompt is read once, by an online softmax.

Every row of a tile keeps a softmax state of its own (largest score, sum of weights, weighted sum of columns), so that
nothing is exchanged between the threads of a program but the scores; the states are merged at the end. Where the
weights cost less to read again for each prompt than two more launches do, one launch computes F; else A q comes from a
launch before, and merging, MLP and readout from one behind, and a few long prompts are each split among programs.

Several queries of each prompt are the rows of a tile: the prompt is read once for a tile, and scores and sums are
products for the tensor cores. A q and the readout are launches of their own then.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasticl import tuned
from fasticl.kernels._common import OPTIONS, block, dot_precision, halves, last_contiguous, matrix, relu
from fasticl.ops.attention_mlp import reference

MAX_D = 8192  # a row of a prompt lies in the registers of one program
TILE = 4096  # elements of a prompt, per 4 warps
PROGRAMS = 512  # a prompt is split while there are fewer programs than these
SPLIT_ROWS = 256  # at least, of each split
REREAD_BYTES = 8 << 20  # of A and W over all prompts
MAX_TILE_D = 256  # of a tile of queries: wider ones are programs of their own


@triton.jit
def _merge(largest, total, mixed):
    """The softmax states of rows as one: scalar, scalar, [D]."""
    top = tl.max(largest, 0)
    scale = tl.exp(largest - tl.where(top == -float("inf"), 0.0, top))
    return top, tl.sum(total * scale, 0), tl.sum(mixed * scale[:, None], 0)


@triton.jit
def attention_kernel(
    context_ptr, query_ptr, A_ptr, W_ptr, a_ptr, lengths_ptr, key_ptr, out_ptr, mixed_ptr, state_ptr,
    Q, L, d, m, splits, split_rows, context_stride_b, context_stride_l, query_stride, A_stride, W_stride,
    ONE_LAUNCH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One query, a split of its prompt: F of the whole prompt if ONE_LAUNCH, else mixed [N, splits, d] and state
    [N, splits, 2]; N = B Q.

    d and the strides of context, A and W come divided by UNIT: so the compiler sees how many elements lie aligned.
    """
    d, A_stride, W_stride = d * UNIT, A_stride * UNIT, W_stride * UNIT
    context_stride_b, context_stride_l = context_stride_b * UNIT, context_stride_l * UNIT
    query, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b = query // Q
    columns, rows = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_L)
    inside = columns < d
    end = tl.minimum(L, (split + 1) * split_rows)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b)
        valid = (length >= 1) & (length <= L)
        end = tl.minimum(tl.where(valid, length, 0).to(tl.int32), end)

    if ONE_LAUNCH:  # key = A q
        key = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, d, STEP):
            step = start + tl.arange(0, STEP)
            q = tl.load(query_ptr + query * query_stride + step, mask=step < d, other=0.0).to(tl.float32)
            weights = tl.load(
                A_ptr + columns[:, None] * A_stride + step[None, :],
                mask=inside[:, None] & (step < d)[None, :],
                other=0.0,
            )
            key += tl.sum(weights.to(tl.float32) * q[None, :], 1)
    else:
        key = tl.load(key_ptr + query * d + columns, mask=inside, other=0.0)

    largest = tl.full((BLOCK_L,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    mixed = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    prompt_ptr = context_ptr + b * context_stride_b
    for start in tl.range(split * split_rows, end, BLOCK_L, num_stages=STAGES):
        at = start + rows
        present = at < end
        p = tl.load(
            prompt_ptr + at.to(tl.int64)[:, None] * context_stride_l + columns[None, :],
            mask=present[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        score = tl.where(present, tl.sum(p * key[None, :], 1), -float("inf"))
        top = tl.maximum(largest, score)
        zero = tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN
        weight, fade = tl.exp(score - zero), tl.exp(largest - zero)
        mixed = mixed * fade[:, None] + weight[:, None] * p
        total = total * fade + weight
        largest = top
    top, sum_of_weights, c = _merge(largest, total, mixed)

    if ONE_LAUNCH:
        c /= sum_of_weights
        f = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, m, BLOCK_M):
            neurons = start + tl.arange(0, BLOCK_M)
            weights = tl.load(
                W_ptr + neurons.to(tl.int64)[:, None] * W_stride + columns[None, :],
                mask=(neurons < m)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            hidden = relu(tl.sum(weights.to(tl.float32) * c[None, :], 1))
            f += hidden * tl.load(a_ptr + neurons, mask=neurons < m, other=0.0).to(tl.float32)
        result = tl.sum(f, 0)
        if lengths_ptr is not None:
            result = tl.where(valid, result, float("nan"))
        tl.store(out_ptr + query, result.to(out_ptr.dtype.element_ty))
    else:
        at = query * splits + split
        tl.store(mixed_ptr + at * d + columns, c, mask=inside)
        tl.store(state_ptr + at * 2, top)
        tl.store(state_ptr + at * 2 + 1, sum_of_weights)


@triton.jit
def queries_kernel(
    context_ptr, key_ptr, lengths_ptr, mixed_ptr, state_ptr, Q, L, d, splits, split_rows,
    context_stride_b, context_stride_l,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A tile of a prompt's queries, a split of the prompt: mixed [N, splits, d] and state [N, splits, 2]; N = B Q.

    d and the strides of context come divided by UNIT.
    """
    d, context_stride_b, context_stride_l = d * UNIT, context_stride_b * UNIT, context_stride_l * UNIT
    tiles = tl.cdiv(Q, BLOCK_Q)
    b, split = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    queries = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = queries < Q
    columns, rows = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_L)
    inside = columns < d
    end = tl.minimum(L, (split + 1) * split_rows)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b)
        end = tl.minimum(tl.where((length >= 1) & (length <= L), length, 0).to(tl.int32), end)

    dtype = context_ptr.dtype.element_ty
    key = tl.load(
        key_ptr + (b * Q + queries)[:, None] * d + columns[None, :], mask=exists[:, None] & inside[None, :], other=0.0
    )
    if dtype == tl.float16:  # whose range a key may exceed
        norm = (tl.max(tl.abs(key), 1).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        norm = tl.where(norm == 0, 1.0, norm)  # a power of two
        key = key / norm[:, None]
    if dtype != tl.float32:
        key, key_rest = halves(key, dtype)

    largest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    mixed = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    prompt_ptr = context_ptr + b * context_stride_b
    for start in tl.range(split * split_rows, end, BLOCK_L, num_stages=STAGES):
        at = start + rows
        present = at < end
        p = tl.load(
            prompt_ptr + at.to(tl.int64)[:, None] * context_stride_l + columns[None, :],
            mask=present[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        score = tl.dot(key, p.T, input_precision=PRECISION)
        if dtype != tl.float32:
            score = tl.dot(key_rest, p.T, score)
        if dtype == tl.float16:
            score *= norm[:, None]
        score = tl.where(present[None, :], score, -float("inf"))
        top = tl.maximum(largest, tl.max(score, 1))
        zero = tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN
        weight, fade = tl.exp(score - zero[:, None]), tl.exp(largest - zero)
        total = total * fade + tl.sum(weight, 1)
        mixed *= fade[:, None]
        if dtype == tl.float32:
            mixed = tl.dot(weight, p, mixed, input_precision=PRECISION)
        else:
            weight, rest = halves(weight, dtype)
            mixed = tl.dot(weight, p, mixed)
            mixed = tl.dot(rest, p, mixed)
        largest = top

    at = (b * Q + queries) * splits + split
    tl.store(mixed_ptr + at[:, None] * d + columns[None, :], mixed, mask=exists[:, None] & inside[None, :])
    tl.store(state_ptr + at * 2, largest, mask=exists)
    tl.store(state_ptr + at * 2 + 1, total, mask=exists)


@triton.jit
def key_kernel(
    query_ptr, A_ptr, key_ptr, N, d, query_stride, A_stride,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """key = query Aᵀ, float32 [N, d]."""
    queries = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, d, STEP):
        step = start + tl.arange(0, STEP)
        q = tl.load(
            query_ptr + queries[:, None] * query_stride + step[None, :],
            mask=(queries < N)[:, None] & (step < d)[None, :], other=0.0,
        )  # fmt: skip
        weights = tl.load(
            A_ptr + columns.to(tl.int64)[None, :] * A_stride + step[:, None],
            mask=(columns < d)[None, :] & (step < d)[:, None], other=0.0,
        )  # fmt: skip
        acc = tl.dot(q, weights, acc, input_precision=PRECISION)
    tl.store(
        key_ptr + queries[:, None] * d + columns[None, :], acc, mask=(queries < N)[:, None] & (columns < d)[None, :]
    )


@triton.jit
def readout_kernel(
    mixed_ptr, state_ptr, W_ptr, a_ptr, out_ptr, N, d, m, splits, W_stride,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """F = aᵀ ReLU(W c), c merged from the splits of its prompt."""
    queries = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = queries < N
    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    for split in range(0, splits):
        largest = tl.load(state_ptr + (queries * splits + split) * 2, mask=exists, other=0.0)
        top = tl.maximum(top, largest)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(0, splits):
        state = state_ptr + (queries * splits + split) * 2
        scale = tl.exp(tl.load(state, mask=exists, other=0.0) - top)
        total += scale * tl.load(state + 1, mask=exists, other=1.0)

    f = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, m, BLOCK_M):
        neurons = start + tl.arange(0, BLOCK_M)
        hidden = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for first in range(0, d, STEP):
            step = first + tl.arange(0, STEP)
            c = tl.zeros((BLOCK_N, STEP), tl.float32)
            for split in range(0, splits):
                at = queries * splits + split
                scale = tl.exp(tl.load(state_ptr + at * 2, mask=exists, other=0.0) - top) / total
                part = tl.load(
                    mixed_ptr + at[:, None] * d + step[None, :], mask=exists[:, None] & (step < d)[None, :], other=0.0
                )
                c += scale[:, None] * part
            weights = tl.load(
                W_ptr + neurons.to(tl.int64)[None, :] * W_stride + step[:, None],
                mask=(neurons < m)[None, :] & (step < d)[:, None], other=0.0,
            )  # fmt: skip
            if weights.dtype == tl.float32:
                hidden = tl.dot(c, weights, hidden, input_precision=PRECISION)
            else:  # c stays as precise as the sums are
                c, rest = halves(c, weights.dtype)
                hidden = tl.dot(c, weights, hidden)
                hidden = tl.dot(rest, weights, hidden)
        readout = tl.load(a_ptr + neurons, mask=neurons < m, other=0.0).to(tl.float32)
        f += tl.sum(relu(hidden) * readout[None, :], 1)
    tl.store(out_ptr + queries, f.to(out_ptr.dtype.element_ty), mask=exists)


def launch(context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor, lengths: Tensor | None) -> Tensor:
    """Lengths are on the device and not waited for: a prompt whose length is out of range gets NaN."""
    (B, L, d), m = context.shape, W.shape[0]
    out = context.new_empty(query.shape[:-1])
    N = out.numel()  # queries of all prompts
    if N == 0:
        return out
    if d > MAX_D:
        return reference(context, query, A, W, a, lengths)
    Q, query = N // B, matrix(query)
    context, A, W, a = (last_contiguous(x) for x in (context, A, W, a))
    lengths = None if lengths is None else lengths.contiguous()

    block_d, step = block(d, 16, MAX_D), 128 // W.element_size()
    unit = math.gcd(8, d, *context.stride()[:2], A.stride(0), W.stride(0))
    found = tuned.lookup("attention_mlp", context, L, d, N) if Q == 1 else {}
    by_tile = Q > 1 and d <= MAX_TILE_D
    if by_tile:
        block_q, block_l, warps = _query_tile(context.dtype, Q, L, block_d, unit)
        programs = B * triton.cdiv(Q, block_q)
    else:
        warps = 4 if block_d <= TILE // 4 else 8
        tile = (
            found.get("TILE", TILE) * warps // 4 // (2 if unit < 4 else 1)
        )  # addresses of single elements take registers too
        block_l, programs = block(L, 1, max(1, tile // block_d)), N
    splits = min(triton.cdiv(found.get("PROGRAMS", PROGRAMS), programs), triton.cdiv(L, SPLIT_ROWS))
    split_rows = triton.cdiv(triton.cdiv(L, splits), block_l) * block_l
    splits = triton.cdiv(L, split_rows)
    reread = N * d * (d + m) * W.element_size()
    one_launch = not by_tile and splits == 1 and d <= TILE // 16 and (d + m <= L or reread <= REREAD_BYTES)

    precision = dot_precision(context.dtype)
    # Loads of single elements, whose addresses take registers: with larger blocks than these some spill.
    narrow = any(size % 16 for size in (d, query.stride(0), A.stride(0), W.stride(0)))
    block_n = block(N, 16, 32 if narrow else 64)
    key = mixed = state = None
    if not one_launch:
        scratch = context.new_empty(N * (d + splits * (d + 2)), dtype=torch.float32)
        key, mixed, state = scratch.split([N * d, N * splits * d, N * splits * 2])
        key_kernel[(triton.cdiv(N, block_n), triton.cdiv(d, 64))](
            query, A, key, N, d, query.stride(0), A.stride(0),
            PRECISION=precision, BLOCK_N=block_n, BLOCK_D=64, STEP=step, num_warps=4, **OPTIONS,
        )  # fmt: skip
    if by_tile:
        queries_kernel[(programs, splits)](
            context, key, lengths, mixed, state, Q, L, d // unit, splits, split_rows,
            context.stride(0) // unit, context.stride(1) // unit,
            PRECISION=precision, BLOCK_Q=block_q, BLOCK_L=block_l, BLOCK_D=block_d, STAGES=2, UNIT=unit,
            num_warps=warps, **OPTIONS,
        )  # fmt: skip
    else:
        attention_kernel[(N, splits)](
            context, query, A, W, a, lengths, key, out, mixed, state,
            Q, L, d // unit, m, splits, split_rows, context.stride(0) // unit, context.stride(1) // unit,
            query.stride(0), A.stride(0) // unit, W.stride(0) // unit,
            ONE_LAUNCH=one_launch, BLOCK_L=block_l, BLOCK_D=block_d,
            BLOCK_M=block(m, 1, max(1, TILE // 2 // block_d)), STEP=max(16, min(block_d, TILE // 2 // block_d)),
            STAGES=found.get("STAGES", 3), UNIT=unit, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    if not one_launch:
        # Of more rows or columns, float32 sums spill on sm_80.
        rows, columns = (16, 16) if W.dtype == torch.float32 else (16 if narrow else min(block_n, 32), step)
        readout_kernel[(triton.cdiv(N, rows),)](
            mixed, state, W, a, out, N, d, m, splits, W.stride(0),
            PRECISION=precision, BLOCK_N=rows, BLOCK_M=step, STEP=columns, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out


def _query_tile(dtype: torch.dtype, Q: int, L: int, block_d: int, unit: int) -> tuple[int, int, int]:
    """Queries and columns of a tile, and warps: what fits into registers, addresses of single elements among it."""
    wide = (block_d > 128) + (unit < 4)
    if dtype == torch.float32:
        queries, columns = (16, 16) if wide else (32, 32)
    else:
        queries, columns = (32 if wide else 64), (16 if wide == 2 else 64 if wide == 0 and block_d <= 64 else 32)
    return block(Q, 16, queries), block(L, 16, columns), 4 if block_d <= 64 else 8
