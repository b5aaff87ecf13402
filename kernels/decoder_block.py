"""``decoder_block`` on the GPU in five launches: QKV, attention, output projection, up and gate, down.

Four of them are one kernel: a linear of few tokens that reads each weight once, normalizes its input itself (which is
short, and spares a launch), and adds biases, activation, gate and residual to its sums. One token is multiplied row by
row as the weights arrive, the next tile of them already asked for; several are the columns of a product for the tensor
cores. In between, what a product reads has the weights' dtype; q, k, v and the residual stay float32.

Attention turns q and k by their angles, writes k and v to the cache, and splits what a token has seen into equal parts,
as many programs each as the capacity of the cache says: where they lie depends on the position, which is read on the
device. The last program of a group to finish merges them, always in the same order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasticl.kernels._common import OPTIONS, activate, block, dot_precision, halves
from fasticl.ops.decoder_block import reference, weights_of

MAX_TILE_B = 16  # sequences of a product; of more, the weights are read again for each so many
TILE = 16384  # weights that a program multiplies at a time, times the square of their bytes: larger ones spill
PROGRAMS = 512  # of a linear for one token: they take as many rows each as leave so many
MAX_ROWS = 4  # of such a program
SPLIT_PROGRAMS = 256  # attention is split while there are fewer programs than these
MAX_SPLITS = 32


@triton.jit
def _statistics(
    x_ptr, tokens, B, K, x_stride, eps, CENTRED: tl.constexpr, BLOCK_B: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Of x's rows, [BLOCK_B]: the mean (0 unless CENTRED), and 1 / sqrt(mean((x - mean)^2) + eps)."""
    mean = tl.zeros((BLOCK_B,), tl.float32)
    if CENTRED:
        sums = tl.zeros((STEP, BLOCK_B), tl.float32)
        for first in range(0, K, STEP):
            k = first + tl.arange(0, STEP)
            inside = (k < K)[:, None] & (tokens < B)[None, :]
            sums += tl.load(x_ptr + tokens[None, :] * x_stride + k[:, None], mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(sums, 0) / K
    squares = tl.zeros((STEP, BLOCK_B), tl.float32)
    for first in range(0, K, STEP):
        k = first + tl.arange(0, STEP)
        inside = (k < K)[:, None] & (tokens < B)[None, :]
        x = tl.load(x_ptr + tokens[None, :] * x_stride + k[:, None], mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - mean[None, :], 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, 0) / K + eps)


@triton.jit
def _normed(
    x_ptr, norm_ptr, norm_bias_ptr, tokens, k, B, K, x_stride, mean, scale
):  # fmt: skip
    """norm(x), or x without a norm, as float32 [len(k), len(tokens)]; 0 outside."""
    inside = (k < K)[:, None] & (tokens < B)[None, :]
    x = tl.load(x_ptr + tokens[None, :] * x_stride + k[:, None], mask=inside, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        weight = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        x = (x - mean[None, :]) * scale[None, :] * weight[:, None]
        if norm_bias_ptr is not None:
            x += tl.load(norm_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[:, None]
    return x


@triton.jit
def linear_kernel(
    x_ptr, norm_ptr, norm_bias_ptr, w_ptr, bias_ptr, gate_ptr, gate_bias_ptr, residual_ptr, y_ptr, counters_ptr,
    B, N, K, x_stride, residual_stride, counters, eps,
    CENTRED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    """y [B, N] = residual + act(W norm(x) + bias), or residual + act(gate norm(x) + gate_bias) * (W norm(x) + bias).

    norm, biases, gate and residual may be None. K comes divided by UNIT: so the compiler sees how many elements lie
    aligned. ``counters``: how many of those that attention will count with are set to 0 on the way.
    """
    K = K * UNIT
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.arange(0, BLOCK_K)
    exists = (n < N)[:, None]
    if counters_ptr is not None:
        at = tl.arange(0, COUNTERS)
        mine = tl.where(tl.program_id(0) + tl.program_id(1) == 0, counters, 0)  # all of the first program
        tl.store(counters_ptr + at, tl.zeros((COUNTERS,), tl.int32), mask=at < mine)

    rows = n[:, None] * K + columns[None, :]
    if BLOCK_B == 1:  # asked for before anything is waited for
        inside = exists & (columns < K)[None, :]
        w_ahead = tl.load(w_ptr + rows, mask=inside, other=0.0)
        if gate_ptr is not None:
            gate_ahead = tl.load(gate_ptr + rows, mask=inside, other=0.0)
    mean = tl.zeros((BLOCK_B,), tl.float32)
    scale = mean
    if norm_ptr is not None:
        mean, scale = _statistics(x_ptr, tokens, B, K, x_stride, eps, CENTRED, BLOCK_B, STEP)

    acc = tl.zeros((BLOCK_N, BLOCK_K if BLOCK_B == 1 else BLOCK_B), tl.float32)
    gate_acc = acc
    if BLOCK_B == 1:
        for first in range(0, K, BLOCK_K):
            w = w_ahead
            inside = exists & (first + BLOCK_K + columns < K)[None, :]
            w_ahead = tl.load(w_ptr + rows + first + BLOCK_K, mask=inside, other=0.0)
            if gate_ptr is not None:
                gate = gate_ahead
                gate_ahead = tl.load(gate_ptr + rows + first + BLOCK_K, mask=inside, other=0.0)
            x = _normed(x_ptr, norm_ptr, norm_bias_ptr, tokens, first + columns, B, K, x_stride, mean, scale)
            x = tl.reshape(x, (1, BLOCK_K))
            acc += w.to(tl.float32) * x
            if gate_ptr is not None:
                gate_acc += gate.to(tl.float32) * x
        acc = tl.sum(acc, 1)[:, None]
        if gate_ptr is not None:
            gate_acc = tl.sum(gate_acc, 1)[:, None]
    else:
        for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            inside = exists & (first + columns < K)[None, :]
            w = tl.load(w_ptr + rows + first, mask=inside, other=0.0)
            x = _normed(x_ptr, norm_ptr, norm_bias_ptr, tokens, first + columns, B, K, x_stride, mean, scale)
            x = x.to(w.dtype)
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
            if gate_ptr is not None:
                gate = tl.load(gate_ptr + rows + first, mask=inside, other=0.0)
                gate_acc = tl.dot(gate, x, gate_acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if gate_ptr is not None:
        if gate_bias_ptr is not None:
            gate_acc += tl.load(gate_bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        acc = activate(gate_acc, ACTIVATION) * acc
    else:
        acc = activate(acc, ACTIVATION)
    inside = exists & (tokens < B)[None, :]
    if residual_ptr is not None:
        at = residual_ptr + tokens[None, :] * residual_stride + n[:, None]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + tokens[None, :] * N + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _head(x_ptr, cos_ptr, sin_ptr, position, dims, inside, D, ROTARY: tl.constexpr):
    """Heads as float32, turned by the angles of the position; ``x_ptr`` points at their first dimensions."""
    x = tl.load(x_ptr + dims, mask=inside, other=0.0)
    if ROTARY:
        HALF: tl.constexpr = ROTARY // 2
        turns = inside & (dims < ROTARY)
        other = tl.load(x_ptr + tl.where(dims < HALF, dims + HALF, dims - HALF), mask=turns, other=0.0)
        angle = position * HALF + dims % HALF
        cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
        x = x * cos + tl.where(dims < HALF, -other, other) * sin
    return x


@triton.jit
def attention_kernel(
    qkv_ptr, keys_ptr, values_ptr, positions_ptr, cos_ptr, sin_ptr, context_ptr, parts_ptr, states_ptr, counters_ptr,
    G, L, splits, scale, keys_stride_b, keys_stride_g, values_stride_b, values_stride_g,
    D: tl.constexpr, GROUP: tl.constexpr, ROTARY: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """A split of what one token has seen, for the GROUP heads that share keys and values: context [B, H D].

    qkv float32 [B, (H + 2 G) D]; ``scale``: of q . k, in powers of two. parts float32 [B, G, splits, GROUP D] and
    states [B, G, splits, 2, GROUP] are what a split leaves: its weighted sum of values, the largest score and the
    weights' sum. counters int32 [B, G], 0 at first.
    """
    group, split = tl.program_id(0), tl.program_id(1)
    b, g = (group // G).to(tl.int64), group % G
    heads, dims, rows = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_L)
    inside = (heads < GROUP)[:, None] & (dims < D)[None, :]
    position = tl.load(positions_ptr + b).to(tl.int64)
    H = G * GROUP
    context_ptr += b * H * D + g * GROUP * D
    if (position < 0) | (position >= L):
        if split == 0:
            at = heads[:, None] * D + dims[None, :]
            tl.store(context_ptr + at, tl.full((BLOCK_H, BLOCK_D), float("nan"), context_ptr.dtype.element_ty), inside)
        return
    seen = position.to(tl.int32) + 1
    split_rows = tl.cdiv(tl.cdiv(seen, splits), BLOCK_L) * BLOCK_L
    used = tl.cdiv(seen, split_rows)
    if split >= used:
        return

    dtype = keys_ptr.dtype.element_ty
    qkv_ptr += b * (H + 2 * G) * D
    keys_ptr += b * keys_stride_b + g.to(tl.int64) * keys_stride_g
    values_ptr += b * values_stride_b + g.to(tl.int64) * values_stride_g
    q_ptr = qkv_ptr + (g * GROUP + heads)[:, None] * D
    q = _head(q_ptr, cos_ptr, sin_ptr, position, dims[None, :], inside, D, ROTARY) * scale
    largest = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    mixed = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    if split == used - 1:  # the token's own key and value, which no other program reads in the cache
        k = _head(qkv_ptr + (H + g) * D, cos_ptr, sin_ptr, position, dims, dims < D, D, ROTARY).to(dtype)
        v = tl.load(qkv_ptr + (H + G + g) * D + dims, mask=dims < D, other=0.0).to(dtype)
        tl.store(keys_ptr + position * D + dims, k, mask=dims < D)
        tl.store(values_ptr + position * D + dims, v, mask=dims < D)
        largest = tl.sum(q * k.to(tl.float32)[None, :], 1)
        total += 1.0
        mixed += v.to(tl.float32)[None, :]
    if dtype != tl.float32:
        q, q_rest = halves(q, dtype)
    end = tl.minimum((split + 1) * split_rows, seen - 1)
    for start in tl.range(split * split_rows, end, BLOCK_L, num_stages=STAGES):
        at = start + rows
        present = (at < end)[:, None] & (dims < D)[None, :]
        k = tl.load(keys_ptr + at.to(tl.int64)[:, None] * D + dims[None, :], mask=present, other=0.0)
        v = tl.load(values_ptr + at.to(tl.int64)[:, None] * D + dims[None, :], mask=present, other=0.0)
        score = tl.dot(q, k.T, input_precision=PRECISION)
        if dtype != tl.float32:
            score = tl.dot(q_rest, k.T, score)
        score = tl.where((at < end)[None, :], score, -float("inf"))
        top = tl.maximum(largest, tl.max(score, 1))
        zero = tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN
        weight, fade = tl.exp2(score - zero[:, None]), tl.exp2(largest - zero)
        total = total * fade + tl.sum(weight, 1)
        mixed = tl.dot(weight.to(dtype), v, mixed * fade[:, None], input_precision=PRECISION)
        largest = top

    if splits == 1:
        at = context_ptr + heads[:, None] * D + dims[None, :]
        tl.store(at, (mixed / total[:, None]).to(context_ptr.dtype.element_ty), mask=inside)
    else:
        parts_ptr += group.to(tl.int64) * splits * GROUP * D
        states_ptr += group.to(tl.int64) * splits * 2 * GROUP
        tl.store(parts_ptr + split * GROUP * D + heads[:, None] * D + dims[None, :], mixed, mask=inside)
        tl.store(states_ptr + split * 2 * GROUP + heads, largest, mask=heads < GROUP)
        tl.store(states_ptr + (split * 2 + 1) * GROUP + heads, total, mask=heads < GROUP)
        tl.debug_barrier()  # all threads' stores before the one atomic that tells of them
        if tl.atomic_add(counters_ptr + group, 1, sem="acq_rel", scope="gpu") == used - 1:
            every = tl.arange(0, SPLITS)
            for first in range(0, GROUP, MERGE):
                head = first + tl.arange(0, MERGE)
                there = (every < used)[:, None] & (head < GROUP)[None, :]
                state = states_ptr + every[:, None] * 2 * GROUP + head[None, :]
                tops = tl.load(state, mask=there, other=-float("inf"))
                sums = tl.load(state + GROUP, mask=there, other=0.0)
                part = parts_ptr + every[:, None, None] * GROUP * D + (head * D)[None, :, None] + dims[None, None, :]
                mixes = tl.load(part, mask=there[:, :, None] & (dims < D)[None, None, :], other=0.0)
                top = tl.max(tops, 0)
                shares = tl.exp2(tops - tl.where(top == -float("inf"), 0.0, top)[None, :])
                merged = tl.sum(shares[:, :, None] * mixes, 0) / tl.sum(shares * sums, 0)[:, None]
                tl.store(
                    context_ptr + (head * D)[:, None] + dims[None, :], merged.to(context_ptr.dtype.element_ty),
                    mask=(head < GROUP)[:, None] & (dims < D)[None, :],
                )  # fmt: skip


def _linear(
    x: Tensor, w: Tensor, y: Tensor, *, norm: tuple[Tensor | None, Tensor | None] = (None, None),
    bias: Tensor | None = None, gate: Tensor | None = None, gate_bias: Tensor | None = None,
    residual: Tensor | None = None, counters: Tensor | None = None, activation: str | None = None,
    centred: bool = False, eps: float = 0.0,
) -> None:  # fmt: skip
    (B, K), N, size = x.shape, w.shape[0], w.element_size()
    block_b = 1 if B == 1 else MAX_TILE_B
    block_n = 16 if B > 1 else block(N // PROGRAMS // 2 + 1, 1, MAX_ROWS)
    elements = TILE // size**2 // (1 if gate is None else 2)
    block_k = block(K, 16, elements // block_n)
    linear_kernel[(triton.cdiv(N, block_n), triton.cdiv(B, block_b))](
        x, *norm, w, bias, gate, gate_bias, residual, y, counters,
        B, N, K // (unit := math.gcd(8, K)), x.stride(0), 0 if residual is None else residual.stride(0),
        0 if counters is None else counters.numel(), eps,
        CENTRED=centred, ACTIVATION=activation, PRECISION=dot_precision(w.dtype), BLOCK_B=block_b, BLOCK_N=block_n,
        BLOCK_K=block_k, STEP=block(K, 16, 4096 // block_b), STAGES=3, UNIT=unit,
        COUNTERS=1 if counters is None else triton.next_power_of_2(counters.numel()),
        num_warps=4, num_stages=1, **OPTIONS,
    )  # fmt: skip


def launch(
    x: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor | None, sin: Tensor | None, *weights: object
) -> Tensor:
    """Positions are on the device and not waited for: a sequence whose position is out of range gets NaN."""
    weights = tuple(t.contiguous() if isinstance(t, Tensor) else t for t in weights)
    w = weights_of(weights)
    (B, d), (_, G, L, D), m = x.shape, keys.shape, w.up.shape[0]
    if 0 in (B, d, m):
        return reference(x, keys, values, positions, cos, sin, *weights)
    H = w.out.shape[1] // D
    cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
    x = x if d == 1 or x.stride(1) == 1 else x.contiguous()
    splits = min(MAX_SPLITS, triton.cdiv(SPLIT_PROGRAMS, B * G), triton.cdiv(L, 64))
    norms = {"centred": w.layer_norm, "eps": w.eps}

    sizes = [B * (H + 2 * G) * D, B * d, B * H * splits * D, B * H * splits * 2]
    qkv, r, parts, states = x.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    qkv, r, counters = qkv.view(B, -1), r.view(B, d), positions.new_empty(B * G, dtype=torch.int32)
    contexts, hidden, y = x.new_empty(B, H * D), x.new_empty(B, m), x.new_empty(B, d)
    _linear(x, w.qkv, qkv, norm=(w.norm, w.norm_bias), bias=w.qkv_bias, counters=counters, **norms)
    block_d, most_splits = block(D, 16, 1 << 16), triton.next_power_of_2(splits)
    attention_kernel[(B * G, splits)](
        qkv, keys, values, positions.contiguous(), cos, sin, contexts, parts, states, counters,
        G, L, splits, D**-0.5 * math.log2(math.e), *keys.stride()[:2], *values.stride()[:2],
        D=D, GROUP=H // G, ROTARY=0 if cos is None else 2 * cos.shape[1], PRECISION=dot_precision(x.dtype),
        BLOCK_H=block(H // G, 16, 1 << 16), BLOCK_L=block(8192 // x.element_size() // block_d, 16, 64),
        BLOCK_D=block_d, STAGES=2,
        SPLITS=most_splits, MERGE=block(H // G, 1, max(1, 4096 // most_splits // block_d)), num_warps=4, **OPTIONS,
    )  # fmt: skip
    _linear(contexts, w.out, r, bias=w.out_bias, residual=x)
    _linear(
        r, w.up, hidden, norm=(w.mlp_norm, w.mlp_norm_bias), bias=w.up_bias, gate=w.gate, gate_bias=w.gate_bias,
        activation=w.activation, **norms,
    )  # fmt: skip
    _linear(hidden, w.down, y, bias=w.down_bias, residual=r)
    return y
