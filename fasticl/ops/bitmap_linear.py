"""``bitmap_linear``: y = act(x W^T + b) for an unstructured-sparse W, stored as a bitmask and its non-zeros."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fasticl import _C, gather_layout, lane_stream, tuned
from fasticl.formats import PackedWeight
from fasticl.ops import _linear
from fasticl.ops import _registry as registry

try:
    from fasticl import _C_cuda
except ImportError:  # not built: CUDA tensors run the Triton kernel
    _C_cuda = None  # type: ignore[assignment]

has_cuda_kernel = _C_cuda is not None
WGMMA = "CUDA C++ (wgmma)"
WGMMA_TOKENS = 16  # beyond, x's way through L2 costs mma.sync more: computed (csrc/bitmap_linear_wgmma_cuda.cu)
CUDA_TOKENS = 256  # beyond, the weight is unpacked for torch's matmul: where that pays, a tuned table may know better


def bitmap_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """``y = act(x @ dense(weight).T + bias)``, reading only a bit per position and the stored values.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, any strides; float64 runs the reference.
        weight: ``[N, K]`` from :func:`fasticl.pack` in format ``"bitmap"`` (or ``"sliced"`` or ``"nm"``, whose portable
            form is the same), of ``x``'s dtype; its values may be int8.
        bias: ``[N]`` of ``x``'s dtype, or None.
        activation: None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.

    Returns:
        ``[..., N]`` in ``x.dtype``; products accumulate in float32, the result is rounded once.

    Int8 values are multiplied as integers times float32, and each sum by its row's scale: nothing else is rounded. On
    CUDA they run the reference.

    On a CPU with products of bfloat16 (AVX512_BF16: Zen 4, Sapphire Rapids) up to 16 tokens are multiplied by these,
    for which numbers below 2^-126 count as zero, and more by the unpacked weight, if more than 30 % of it is stored: a
    matmul of PyTorch, which rounds once more before the scales and the activation. So are more than 256 tokens on CUDA
    where a CUDA C++ kernel runs; there several multiprocessors may share an output's K, and their sums are added in one
    order, so that equal calls give equal bits.

    Where a weight is not stored, a few tokens (at most 8, 16 in products of bfloat16, 4 without AVX-512, and fewer the
    sparser the weight) are multiplied by zero, more are not, unless the weight is unpacked: an infinite or NaN x there
    gives NaN, as in the dense product, or nothing. On CUDA it always gives NaN, but for the kernel of up to 8 tokens
    and a density below a quarter (the one of :func:`fasticl.ops.sliced_linear`), which multiplies what is stored, zeros
    that fill its lists up, and nothing else.

    Raises:
        TypeError: ``x`` or ``bias`` is not of the weight's dtype, or ``weight`` is no PackedWeight.
        ValueError: shapes, devices or the format do not fit, or the activation is unknown.
    """
    _linear.check_linear("bitmap_linear", x, weight, bias, activation, ("bitmap", "sliced", "nm"))
    arguments = (x, weight.values, weight.bitmask, weight.row_offsets, bias, activation)
    if registry.needs_grad(x, weight.values, bias, weight.scales):
        return reference(*arguments, scales=weight.scales)
    # Those of format nm are for nm_linear.
    layouts = {} if weight.layouts is None or weight.format == "nm" else weight.layouts.arguments
    return torch.ops.fasticl.bitmap_linear(*arguments, scales=weight.scales, **layouts)


def reference(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None, activation: str | None,
    lanes: list[Tensor] | None = None, plan: list[int] | None = None, scales: Tensor | None = None,
    gather: list[Tensor] | None = None, gather_plan: list[int] | None = None,
) -> Tensor:  # fmt: skip
    dense = _linear.dense_from_bitmap(values, bitmask, x.shape[-1])
    return _linear.reference_linear(x, dense, bias, activation, scales)


def _fake(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None, activation: str | None,
    lanes: list[Tensor] | None = None, plan: list[int] | None = None, scales: Tensor | None = None,
    gather: list[Tensor] | None = None, gather_plan: list[int] | None = None,
) -> Tensor:  # fmt: skip
    return _linear.fake_linear(x, bitmask.shape[0])


def cpu(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None, activation: str | None,
    lanes: list[Tensor] | None = None, plan: list[int] | None = None, scales: Tensor | None = None,
    gather: list[Tensor] | None = None, gather_plan: list[int] | None = None,
) -> Tensor:  # fmt: skip
    if not _linear.kernel_takes(x):
        return reference(x, values, bitmask, row_offsets, bias, activation, scales=scales)
    N, K = bitmask.shape[0], x.shape[-1]
    if _linear.unpacks(x, values, N):
        return _linear.unpacked_linear(x, values, bitmask, row_offsets, bias, activation, scales)
    x2, M, stride = registry.rows(x)
    bias = registry.contiguous(bias)
    y = x.new_empty((*x.shape[:-1], N))
    _C.bitmap_linear(
        x2.data_ptr(), M, stride, values.data_ptr(), registry.VALUE_DTYPES[values.dtype], registry.address(scales),
        bitmask.data_ptr(), row_offsets.data_ptr(), N, K, registry.address(bias), registry.ACTIVATIONS[activation],
        y.data_ptr(), N, registry.DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def cuda(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None, activation: str | None,
    lanes: list[Tensor] | None = None, plan: list[int] | None = None, scales: Tensor | None = None,
    gather: list[Tensor] | None = None, gather_plan: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """``lanes`` and ``plan`` are those of :class:`fasticl.lane_stream.LaneStream`, ``gather`` and ``gather_plan`` of
    :class:`fasticl.gather_layout.GatherLayout`; where neither the one nor the other can, Triton computes.
    """
    if scales is not None:
        return reference(x, values, bitmask, row_offsets, bias, activation, scales=scales)
    x2, M, stride = registry.rows(x)
    N, K = bitmask.shape[0], x.shape[-1]
    runs = "Triton" if lanes is None and gather is None else implementation(values, N, K, M, gather is not None)
    if runs == _linear.GATHER:
        assert gather is not None
        assert gather_plan is not None
        return gather_cuda("bitmap_linear", x, N, gather, gather_plan, bias, activation)
    if runs == "Triton" or lanes is None or plan is None:
        return _triton(x, values, bitmask, row_offsets, bias, activation)
    if runs == "PyTorch":
        dense = _linear.dense_from_bitmap(values, bitmask, K)
        return registry.apply_activation(torch.nn.functional.linear(x, dense, bias), activation)
    if x.dtype not in lane_stream.DTYPES:
        raise TypeError(f"bitmap_linear: x: expected dtype bfloat16 or float16 with lane streams, got {x.dtype}")
    lane_values, masks, starts, row_order = lanes
    splits, blocks, depth = plan
    strips = -(-N // lane_stream.STRIP)
    registry.check_shape("bitmap_linear: masks", masks, (strips, -(-K // lane_stream.CHUNK), lane_stream.LANES))
    registry.check_shape("bitmap_linear: row_order", row_order, (strips * lane_stream.STRIP,))
    bias = registry.contiguous(bias)
    y = x.new_empty((*x.shape[:-1], N))
    device, current_stream = registry.cuda_stream(x)
    wgmma = runs == WGMMA
    size = (
        _C_cuda.bitmap_linear_wgmma_workspace(M, strips, K, splits, device)
        if wgmma
        else _C_cuda.bitmap_linear_workspace(M, strips, blocks)
    )
    # Of torch's allocator, whose memory no other stream has and a CUDA graph keeps.
    workspace = x.new_empty(size, dtype=torch.uint8) if size else None
    _C_cuda.bitmap_linear(
        x2.data_ptr(), M, stride, lane_values.data_ptr(), masks.data_ptr(), starts.data_ptr(), row_order.data_ptr(),
        strips, K, splits, blocks, depth, registry.address(workspace), registry.address(bias),
        registry.ACTIVATIONS[activation], y.data_ptr(), N, registry.DTYPES[x.dtype], device, current_stream, wgmma,
    )  # fmt: skip
    return y


def gather_cuda(
    op: str, x: Tensor, N: int, gather: list[Tensor], plan: list[int], bias: Tensor | None, activation: str | None
) -> Tensor:
    """The CUDA C++ kernel of sliced_linear, for up to 8 tokens; ``gather`` and ``plan`` are a GatherLayout's."""
    if x.dtype not in gather_layout.DTYPES:
        raise TypeError(f"{op}: x: expected dtype bfloat16 or float16 with the gather layout, got {x.dtype}")
    records, starts, row_order = gather
    groups, (shares, blocks, warps) = -(-N // gather_layout.GROUP), plan
    registry.check_shape(f"{op}: starts", starts, (shares * groups + 1,))
    registry.check_shape(f"{op}: row_order", row_order, (groups * gather_layout.GROUP,))
    x2, M, stride = registry.rows(x)
    bias = registry.contiguous(bias)
    y = x.new_empty((*x.shape[:-1], N))
    workspace = None  # as the lane stream's
    if shares > 1:
        workspace = x.new_empty(_C_cuda.sliced_linear_workspace(M, groups, shares, blocks), dtype=torch.uint8)
    device, current_stream = registry.cuda_stream(x)
    _C_cuda.sliced_linear(
        x2.data_ptr(), M, stride, records.data_ptr(), starts.data_ptr(), row_order.data_ptr(), groups, x.shape[-1],
        shares, blocks, warps, registry.address(workspace), registry.address(bias), registry.ACTIVATIONS[activation],
        y.data_ptr(), N, registry.DTYPES[x.dtype], device, current_stream,
    )  # fmt: skip
    return y


def implementation(values: Tensor, N: int, K: int, M: int, gather: bool = False) -> str:
    """What computes for M tokens on a GPU, of a weight with lane streams and, if ``gather``, the gather layout:
    "CUDA C++ (gather)" for few tokens and values, else "CUDA C++", on Hopper "CUDA C++ (wgmma)" for more than
    ``WGMMA_TOKENS``, or for more than ``CUDA_TOKENS`` "PyTorch", on the unpacked weight; and what the GPU's table found
    faster than these would be.
    """
    density = values.numel() / max(1, N * K)
    found = tuned.lookup("bitmap_linear", values, N, K, M, density).get("implementation")
    if found in ("Triton", "PyTorch"):
        return str(found)
    if gather and found not in ("lane stream", "wgmma") and _linear.gathers(M, density):
        return _linear.GATHER
    if M > CUDA_TOKENS and found not in ("lane stream", "wgmma"):
        return "PyTorch"
    if (found == "wgmma" or (found != "lane stream" and M > WGMMA_TOKENS)) and has_wgmma(values):
        return WGMMA
    return "CUDA C++"


def has_wgmma(values: Tensor) -> bool:
    """Whether the device of ``values`` is a Hopper GPU, and the kernels were compiled for it."""
    return has_cuda_kernel and values.is_cuda and _device_has_wgmma(values.get_device())


@lru_cache(maxsize=64)
def _device_has_wgmma(device: int) -> bool:
    return bool(_C_cuda.has_bitmap_linear_wgmma(device))


_triton = registry.by_triton("bitmap_linear", reference)

registry.define(
    "bitmap_linear(Tensor x, Tensor values, Tensor bitmask, Tensor row_offsets, Tensor? bias, str? activation, "
    "Tensor[]? lanes=None, int[]? plan=None, Tensor? scales=None, Tensor[]? gather=None, int[]? gather_plan=None) "
    "-> Tensor",
    reference=reference,
    fake=_fake,
    cpu=cpu,
    triton=True,
    cuda=cuda if _C_cuda is not None else None,
    cuda_name="CUDA C++ (bfloat16, float16), else Triton",
)
