"""``fused_mlp`` on the GPU.

Dense weights, a few tokens: a program computes some hidden neurons and multiplies them by their columns of ``down`` at
once, so that they never leave the chip; what it adds to y goes to memory in float32, and a second launch sums it in a
fixed order. Where those sums would be more than a small part of the weights' bytes, and for many tokens, one launch
writes the hidden activations, the gate's product with them, and torch multiplies by ``down``. Packed weights run their
own ops' kernels, one after the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fasticl import tuned
from fasticl.kernels import sliced_linear
from fasticl.kernels._common import OPTIONS, activate, dot_precision, last_contiguous, matrix
from fasticl.kernels._packed import launch_packed
from fasticl.ops import _registry as registry
from fasticl.ops.fused_mlp import reference

ONE_PASS_TOKENS = 16  # at most: the tokens of a tile
ONE_PASS_SHARE = 1 / 16  # of the weights' bytes, at most, that partial sums may take
PROGRAM_NEURONS = 32


@triton.jit
def hidden_tile(
    x_ptr, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, neurons, tokens, M, H, K, x_stride, up_stride, gate_stride,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act(up x) or act(gate x) * up x as float32 [BLOCK_H, BLOCK_M]; 0 for neurons that do not exist."""
    exists = neurons < H
    up = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
    gate = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + tokens[None, :] * x_stride + k[:, None], mask=(tokens < M)[None, :] & (k < K)[:, None], other=0.0
        )
        inside = exists[:, None] & (k < K)[None, :]
        w = tl.load(up_ptr + neurons[:, None] * up_stride + k[None, :], mask=inside, other=0.0)
        up = tl.dot(w, x, up, input_precision=PRECISION)
        if gate_ptr is not None:
            w = tl.load(gate_ptr + neurons[:, None] * gate_stride + k[None, :], mask=inside, other=0.0)
            gate = tl.dot(w, x, gate, input_precision=PRECISION)
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + neurons, mask=exists, other=0.0).to(tl.float32)[:, None]
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + neurons, mask=exists, other=0.0).to(tl.float32)[:, None]
    if gate_ptr is not None:
        up = activate(gate, ACTIVATION) * up
    else:
        up = activate(up, ACTIVATION)
    return tl.where(exists[:, None], up, 0.0)


@triton.jit
def hidden_kernel(
    x_ptr, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, h_ptr, M, H, K, x_stride, up_stride, gate_stride,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h [M, H]."""
    neurons = tl.program_id(0).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = hidden_tile(
        x_ptr, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, neurons, tokens, M, H, K, x_stride, up_stride, gate_stride,
        ACTIVATION, PRECISION, BLOCK_M, BLOCK_H, BLOCK_K,
    )  # fmt: skip
    tl.store(
        h_ptr + tokens[None, :] * H + neurons[:, None], h.to(h_ptr.dtype.element_ty),
        mask=(tokens < M)[None, :] & (neurons < H)[:, None],
    )  # fmt: skip


@triton.jit
def mlp_kernel(
    x_ptr, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, down_ptr, sums_ptr, M, N, H, K,
    x_stride, up_stride, gate_stride, down_stride,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What BLOCK_H neurons add to y: sums float32 [programs, M, N]."""
    program = tl.program_id(0).to(tl.int64)
    neurons, tokens = program * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_M)
    h = hidden_tile(
        x_ptr, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, neurons, tokens, M, H, K, x_stride, up_stride, gate_stride,
        ACTIVATION, PRECISION, BLOCK_M, BLOCK_H, BLOCK_K,
    ).to(x_ptr.dtype.element_ty)  # fmt: skip
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        w = tl.load(
            down_ptr + n.to(tl.int64)[:, None] * down_stride + neurons[None, :],
            mask=(n < N)[:, None] & (neurons < H)[None, :], other=0.0,
        )  # fmt: skip
        tl.store(
            sums_ptr + (program * M + tokens)[None, :] * N + n[:, None], tl.dot(w, h, input_precision=PRECISION),
            mask=(tokens < M)[None, :] & (n < N)[:, None],
        )  # fmt: skip


@triton.jit
def sum_kernel(
    sums_ptr, bias_ptr, y_ptr, programs, M, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """y [M, N] = the sum of [programs, M, N] + bias."""
    n, token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P).to(tl.int64)
        acc += tl.load(
            sums_ptr + (program * M + token)[:, None] * N + n[None, :],
            mask=(program < programs)[:, None] & (n < N)[None, :], other=0.0,
        )  # fmt: skip
    y = tl.sum(acc, 0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def launch(
    x: Tensor, up: list[Tensor], down: list[Tensor], gate: list[Tensor] | None, up_bias: Tensor | None,
    down_bias: Tensor | None, gate_bias: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    if any(len(weight) > 1 for weight in (up, down, gate or up)):
        h = _linear(x, up, up_bias, activation if gate is None else None)
        if gate is not None:
            h.mul_(_linear(x, gate, gate_bias, activation))
        return _linear(h, down, down_bias, None)
    N, H = down[0].shape
    if 0 in (x.numel(), H, N):
        return reference(x, up, down, gate, up_bias, down_bias, gate_bias, activation)
    return _dense(x, up[0], down[0], gate[0] if gate else None, up_bias, down_bias, gate_bias, activation)


def _linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
    """By the number of tensors that a flattened weight has: 1 dense, 2 nm, 3 bitmap, 7 sliced."""
    if len(weight) == 1:
        return registry.apply_activation(F.linear(x, weight[0], bias), activation)
    if len(weight) == 7:
        return sliced_linear.launch(x, *weight, bias, activation)
    return launch_packed(x, weight[0], weight[1], weight[2] if len(weight) == 3 else None, bias, activation)


def _dense(
    x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None,
    gate_bias: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    (N, H), K, size = down.shape, x.shape[-1], x.element_size()
    x2, up, down = matrix(x), last_contiguous(up), last_contiguous(down)
    gate = None if gate is None else last_contiguous(gate)
    up_bias, down_bias, gate_bias = (None if b is None else b.contiguous() for b in (up_bias, down_bias, gate_bias))
    M = x2.shape[0]
    found = {**tuned.lookup("fused_mlp", x, H, K, M)}
    block_h, block_k = found.pop("BLOCK_H", None), found.pop("BLOCK_K", None)
    neurons = block_h or PROGRAM_NEURONS
    programs = triton.cdiv(H, neurons)
    hidden = (x2, up, gate, up_bias, gate_bias)
    strides = (x2.stride(0), up.stride(0), 0 if gate is None else gate.stride(0))
    # Loads of single elements, whose addresses take registers: with larger blocks than these some spill.
    narrow = any(stride % 16 for stride in (K, *strides))
    options = {"ACTIVATION": activation, "PRECISION": dot_precision(x.dtype), "num_warps": 4, **found, **OPTIONS}

    weights = size * H * (K * (1 if gate is None else 2) + N)
    if M <= ONE_PASS_TOKENS and 2 * 4 * programs * M * N <= ONE_PASS_SHARE * weights:
        step = 256 // size if not narrow else 64 if size == 2 else 16
        sums = x.new_empty((programs, M, N), dtype=torch.float32)
        mlp_kernel[(programs,)](
            *hidden, down, sums, M, N, H, K, *strides, down.stride(0),
            BLOCK_M=16, BLOCK_H=neurons, BLOCK_K=block_k or step, BLOCK_N=128 if size == 2 else 64, **options,
        )  # fmt: skip
        y = x.new_empty((*x.shape[:-1], N))
        sum_kernel[(triton.cdiv(N, 64), M)](sums, down_bias, y, programs, M, N, BLOCK_P=32, BLOCK_N=64, **OPTIONS)
        return y
    block_m, rows = (16, 32) if M <= 16 else (32, 32) if size == 4 or narrow else (64, 64)
    rows, block_k = block_h or (rows // 2 if size == 4 and narrow else rows), block_k or (64 if size == 2 else 16)
    h = x.new_empty((*x.shape[:-1], H))
    hidden_kernel[(triton.cdiv(H, rows), triton.cdiv(M, block_m))](
        *hidden, h, M, H, K, *strides, BLOCK_M=block_m, BLOCK_H=rows, BLOCK_K=block_k, **options
    )
    return F.linear(h, down, down_bias)
