"""``sliced_linear``: y = act(x W^T + b) for a W of which few values are left, each with its index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasticl import _C, tuned
from fasticl.formats import PackedWeight
from fasticl.ops import _linear
from fasticl.ops import _registry as registry
from fasticl.ops.bitmap_linear import cpu as bitmap_cpu
from fasticl.ops.bitmap_linear import gather_cuda, has_cuda_kernel
from fasticl.ops.bitmap_linear import reference as bitmap_reference

MAX_TOKENS = 8  # beyond, the portable form is faster: it lies beside the sliced one


def sliced_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """``y = act(x @ dense(weight).T + bias)``, touching only stored values; meant for 75 % zeros and more.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, any strides; float64 runs the reference.
        weight: ``[N, K]`` from :func:`fasticl.pack` in format ``"sliced"``, of ``x``'s dtype; its values may be int8.
            Up to 8 tokens run on its sliced layout, more on its portable form, as :func:`fasticl.ops.bitmap_linear`
            does.
        bias: ``[N]`` of ``x``'s dtype, or None.
        activation: None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.

    Returns:
        ``[..., N]`` in ``x.dtype``; products accumulate in float32, the result is rounded once.

    Up to 8 tokens x must be finite: sixteen rows share an instruction, and a value of x that only some of them need is
    multiplied by zero in the others, where infinity and NaN give NaN. The CUDA C++ kernel multiplies what is stored and
    zeros that fill its lists up; several multiprocessors may share an output's K, and equal calls give equal bits.

    Raises:
        TypeError: ``x`` or ``bias`` is not of the weight's dtype, or ``weight`` is no PackedWeight.
        ValueError: shapes, devices or the format do not fit, or the activation is unknown.
    """
    _linear.check_linear("sliced_linear", x, weight, bias, activation, ("sliced",))
    layout = weight.sliced
    assert layout is not None  # format "sliced" has it
    portable = (weight.values, weight.bitmask, weight.row_offsets)
    if registry.needs_grad(x, weight.values, bias, weight.scales):
        return bitmap_reference(x, *portable, bias, activation, scales=weight.scales)
    arguments = (x, *portable, *layout.tensors, bias, activation, weight.scales)
    layouts = {} if weight.layouts is None else weight.layouts.arguments
    return torch.ops.fasticl.sliced_linear(*arguments, **layouts)


def reference(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, sliced_values: Tensor, steps: Tensor,
    slice_offsets: Tensor, row_order: Tensor, bias: Tensor | None, activation: str | None,
    scales: Tensor | None = None, gather: list[Tensor] | None = None, gather_plan: list[int] | None = None,
) -> Tensor:  # fmt: skip
    return bitmap_reference(x, values, bitmask, row_offsets, bias, activation, scales=scales)


def _fake(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, sliced_values: Tensor, steps: Tensor,
    slice_offsets: Tensor, row_order: Tensor, bias: Tensor | None, activation: str | None,
    scales: Tensor | None = None, gather: list[Tensor] | None = None, gather_plan: list[int] | None = None,
) -> Tensor:  # fmt: skip
    return _linear.fake_linear(x, bitmask.shape[0])


def cpu(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, sliced_values: Tensor, steps: Tensor,
    slice_offsets: Tensor, row_order: Tensor, bias: Tensor | None, activation: str | None,
    scales: Tensor | None = None, gather: list[Tensor] | None = None, gather_plan: list[int] | None = None,
) -> Tensor:  # fmt: skip
    N, K = bitmask.shape[0], x.shape[-1]
    M = x.numel() // K if K else 0
    if M > MAX_TOKENS or K == 0 or not _linear.kernel_takes(x):
        return bitmap_cpu(x, values, bitmask, row_offsets, bias, activation, scales=scales)
    x2, M, stride = registry.rows(x)
    bias = registry.contiguous(bias)
    y = x.new_empty((*x.shape[:-1], N))
    _C.sliced_linear(
        x2.data_ptr(), M, stride, K, sliced_values.data_ptr(), registry.VALUE_DTYPES[values.dtype],
        registry.address(scales), steps.data_ptr(), slice_offsets.data_ptr(), row_order.data_ptr(),
        slice_offsets.shape[0] - 1, registry.address(bias), registry.ACTIVATIONS[activation], y.data_ptr(), N,
        registry.DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def cuda(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, sliced_values: Tensor, steps: Tensor,
    slice_offsets: Tensor, row_order: Tensor, bias: Tensor | None, activation: str | None,
    scales: Tensor | None = None, gather: list[Tensor] | None = None, gather_plan: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """``gather`` and ``gather_plan`` are those of :class:`fasticl.gather_layout.GatherLayout`: C++ computes on them for
    few tokens, the reference for int8 values, and Triton all else.
    """
    if scales is not None:
        return bitmap_reference(x, values, bitmask, row_offsets, bias, activation, scales=scales)
    N, K = bitmask.shape[0], x.shape[-1]
    M = x.numel() // K if K else math.prod(x.shape[:-1])
    if gather is None or gather_plan is None or implementation(values, N, K, M) == "Triton":
        layout = (sliced_values, steps, slice_offsets, row_order)
        return _triton(x, values, bitmask, row_offsets, *layout, bias, activation)
    return gather_cuda("sliced_linear", x, N, gather, gather_plan, bias, activation)


def implementation(values: Tensor, N: int, K: int, M: int) -> str:
    """What computes for M tokens on a GPU, of a weight with the gather layout: "CUDA C++ (gather)" for few tokens and
    values, else "Triton", or where the GPU's table found that faster.
    """
    density = values.numel() / max(1, N * K)
    found = tuned.lookup("sliced_linear", values, N, K, M, density).get("implementation")
    return _linear.GATHER if found != "Triton" and _linear.gathers(M, density) else "Triton"


_triton = registry.by_triton("sliced_linear", reference)

registry.define(
    "sliced_linear(Tensor x, Tensor values, Tensor bitmask, Tensor row_offsets, Tensor sliced_values, Tensor steps, "
    "Tensor slice_offsets, Tensor row_order, Tensor? bias, str? activation, Tensor? scales=None, "
    "Tensor[]? gather=None, int[]? gather_plan=None) -> Tensor",
    reference=reference,
    fake=_fake,
    cpu=cpu,
    triton=True,
    cuda=cuda if has_cuda_kernel else None,
    cuda_name="CUDA C++ (bfloat16, float16, up to 8 tokens), else Triton",
)
