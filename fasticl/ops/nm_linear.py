"""``nm_linear``: y = act(x W^T + b) for a W with as many stored values in every row: N:M-sparse, or dense int8."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasticl import _C, cusparselt, sparse_fragments, tuned
from fasticl.formats import PackedWeight
from fasticl.ops import _linear
from fasticl.ops import _registry as registry

try:
    from fasticl import _C_cuda
except ImportError:  # not built: CUDA tensors run the Triton kernel
    _C_cuda = None  # type: ignore[assignment]


def nm_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """``y = act(x @ dense(weight).T + bias)`` for 2:4, 4:8 or 8:16 sparsity, or for a dense weight of int8 values.

    Every row stores ``K * n / m`` values (zeros among them where the pattern demands them), so rows need no offsets.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, any strides; float64 runs the reference.
        weight: ``[N, K]`` from :func:`fasticl.pack` in format ``"nm"`` or ``"dense"``, of ``x``'s dtype; its values may
            be int8, as in :func:`fasticl.ops.bitmap_linear`.
        bias: ``[N]`` of ``x``'s dtype, or None.
        activation: None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.

    Returns:
        ``[..., N]`` in ``x.dtype``; products accumulate in float32, the result is rounded once.

    On a CPU with products of bfloat16, more than 16 tokens of it are multiplied as :func:`fasticl.ops.bitmap_linear`
    says.
    On CUDA the C++ kernel, for 2:4 and up to 64 tokens, multiplies what is stored, zeros that fill a group included,
    and nothing else: an infinite or NaN x gives NaN there, and elsewhere, unlike in the dense product, nothing. So does
    cuSPARSELt, which computes where the GPU's tuned table says so; the zeros that fill its groups may be others, and it
    rounds once more, before the activation.

    Raises:
        TypeError: ``x`` or ``bias`` is not of the weight's dtype, or ``weight`` is no PackedWeight.
        ValueError: shapes, devices or the format do not fit, or the activation is unknown.
    """
    _linear.check_linear("nm_linear", x, weight, bias, activation, ("nm", "dense"))
    bitmask = None if weight.format == "dense" else weight.bitmask
    arguments = (x, weight.values, bitmask, bias, activation, weight.scales)
    if registry.needs_grad(x, weight.values, bias, weight.scales):
        return reference(*arguments)
    layouts = {} if weight.layouts is None else weight.layouts.arguments
    return torch.ops.fasticl.nm_linear(*arguments, **layouts)


def reference(
    x: Tensor, values: Tensor, bitmask: Tensor | None, bias: Tensor | None, activation: str | None,
    scales: Tensor | None = None, fragments: Tensor | None = None, compressed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    dense = values if bitmask is None else _linear.dense_from_bitmap(values, bitmask, x.shape[-1])
    return _linear.reference_linear(x, dense, bias, activation, scales)


def _fake(
    x: Tensor, values: Tensor, bitmask: Tensor | None, bias: Tensor | None, activation: str | None,
    scales: Tensor | None = None, fragments: Tensor | None = None, compressed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _linear.fake_linear(x, (values if bitmask is None else bitmask).shape[0])


def cpu(
    x: Tensor, values: Tensor, bitmask: Tensor | None, bias: Tensor | None, activation: str | None,
    scales: Tensor | None = None, fragments: Tensor | None = None, compressed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``bitmask`` is None of a dense weight, whose ``values`` are [N, K]."""
    if not _linear.kernel_takes(x):
        return reference(x, values, bitmask, bias, activation, scales)
    N, K = (values if bitmask is None else bitmask).shape[0], x.shape[-1]
    if _linear.unpacks(x, values, N):
        return _linear.unpacked_linear(x, values, bitmask, None, bias, activation, scales)
    x2, M, stride = registry.rows(x)
    bias = registry.contiguous(bias)
    y = x.new_empty((*x.shape[:-1], N))
    _C.nm_linear(
        x2.data_ptr(), M, stride, values.data_ptr(), registry.VALUE_DTYPES[values.dtype], registry.address(scales),
        registry.address(bitmask), N, K, values.numel() // N if N else 0, registry.address(bias),
        registry.ACTIVATIONS[activation], y.data_ptr(), N, registry.DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def cuda(
    x: Tensor, values: Tensor, bitmask: Tensor | None, bias: Tensor | None, activation: str | None,
    scales: Tensor | None = None, fragments: Tensor | None = None, compressed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Who computes: the reference for int8 values; :func:`implementation` of a weight that has ``fragments``
    (fasticl/sparse_fragments.py) or is ``compressed`` (fasticl/cusparselt.py); Triton for all else: other patterns,
    float32, an extension not built.
    """
    if scales is not None:
        return reference(x, values, bitmask, bias, activation, scales)
    N, K = values.shape[0] if bitmask is None else bitmask.shape[0], x.shape[-1]
    M = math.prod(x.shape[:-1])
    runs = implementation(values, N, K, M, fragments is not None, compressed is not None)
    if runs == cusparselt.NAME:
        assert compressed is not None
        return _cusparselt(x, N, compressed, bias, activation)
    if runs == "Triton":
        return _triton(x, values, bitmask, bias, activation)
    assert fragments is not None
    if x.dtype not in sparse_fragments.DTYPES:
        raise TypeError(f"nm_linear: x: expected dtype bfloat16 or float16 with fragments, got {x.dtype}")
    expected = (-(-N // sparse_fragments.STRIP), -(-K // sparse_fragments.CHUNK), sparse_fragments.RECORD)
    registry.check_shape("nm_linear: fragments", fragments, expected)
    x2, M, stride = registry.rows(x)
    bias = registry.contiguous(bias)
    y = x.new_empty((*x.shape[:-1], N))
    device, current_stream = registry.cuda_stream(x)
    _C_cuda.nm_linear(
        x2.data_ptr(), M, stride, fragments.data_ptr(), N, K, registry.address(bias), registry.ACTIVATIONS[activation],
        y.data_ptr(), N, registry.DTYPES[x.dtype], device, current_stream,
    )  # fmt: skip
    return y


def _cusparselt(x: Tensor, N: int, compressed: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    registry.check_dtype("nm_linear: x", x, compressed.dtype)
    if 16 * compressed.numel() < 9 * N * x.shape[-1]:  # the library would read on
        expected = f"at least {9 * N * x.shape[-1] // 16} elements for shape {[N, x.shape[-1]]}"
        raise ValueError(f"nm_linear: compressed: expected {expected}, got {compressed.numel()}")
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], N))
    with torch.cuda.device_of(x):
        return registry.apply_activation(cusparselt.linear(x, compressed, bias), activation)


def implementation(values: Tensor, N: int, K: int, M: int, fragments: bool = True, compressed: bool = False) -> str:
    """What computes for M tokens on a GPU, of a weight with these layouts: "CUDA C++" on fragments, or "Triton" for
    more tokens than that takes; and what the GPU's table found faster: "Triton", or "cuSPARSELt" if ``compressed``.
    """
    found = tuned.lookup("nm_linear", values, N, K, M, values.numel() / max(1, N * K)).get("implementation")
    if compressed and found == cusparselt.NAME:
        return cusparselt.NAME
    return "CUDA C++" if fragments and M <= sparse_fragments.MAX_TOKENS and found != "Triton" else "Triton"


def _cuda_names() -> list[str]:
    names = ["CUDA C++ (2:4, bfloat16, float16, up to 64 tokens)"] if _C_cuda is not None else []
    names += [f"{cusparselt.NAME} (2:4, bfloat16, float16, where tuned)"] if cusparselt.built() else []
    return [*names, "else Triton" if names else "Triton"]


_triton = registry.by_triton("nm_linear", reference)

registry.define(
    "nm_linear(Tensor x, Tensor values, Tensor? bitmask, Tensor? bias, str? activation, Tensor? scales=None, "
    "Tensor? fragments=None, Tensor? compressed=None) -> Tensor",
    reference=reference,
    fake=_fake,
    cpu=cpu,
    triton=True,
    cuda=cuda,
    cuda_name=", ".join(_cuda_names()),
)
