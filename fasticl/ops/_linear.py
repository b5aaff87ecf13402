"""What bitmap_linear, nm_linear and sliced_linear share: their reference and the checks at their door."""

from __future__ import annotations

import torch
from torch import Tensor

from fasticl import _C, gather_layout
from fasticl.bits import expand_bits
from fasticl.formats import PackedWeight
from fasticl.ops import _registry as registry

# Up to how many tokens, and below which density, the gather kernel is the fastest on CUDA. Computed from instructions
# and bytes (csrc/sliced_linear_cuda.cu), not measured; fasticl bench --tune may find otherwise.
GATHER_DENSITY = {4: gather_layout.MAX_DENSITY, gather_layout.MAX_TOKENS: 0.18}
GATHER = "CUDA C++ (gather)"
# On a CPU with products of bfloat16, from how many tokens and above which density torch's matmul of the unpacked weight
# is faster than the row kernel, which multiplies float32 there: chosen on Zen 5.
UNPACKED_TOKENS, UNPACKED_DENSITY = 17, 0.3
UNPACKED_BYTES = 1 << 23  # at a time, in one place: what the matmul reads is in cache, and no new pages are touched


def dense_from_bitmap(values: Tensor, bitmask: Tensor, K: int) -> Tensor:
    """The dense ``[N, K]`` weight of row-major ``values`` and ``bitmask``; differentiable in ``values``."""
    keep = expand_bits(bitmask, K)
    dense = torch.zeros(keep.shape, dtype=values.dtype, device=values.device)
    return dense.masked_scatter(keep, values.reshape(-1))


def reference_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, scales: Tensor | None = None
) -> Tensor:
    """``act(scales * (x @ weight.T) + bias)`` in float32 or wider, rounded once to ``x.dtype``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).T
    if scales is not None:
        y = y * scales.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return registry.apply_activation(y, activation).to(x.dtype)


def check_linear(
    op: str, x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str | None, formats: tuple[str, ...]
) -> None:
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"{op}: weight: expected a PackedWeight (fasticl.pack), got {type(weight).__name__}")
    if weight.format not in formats:
        raise ValueError(f"{op}: weight: expected format {' or '.join(formats)}, got {weight.format}")
    N, K = weight.shape
    registry.check_dtype(f"{op}: x", x, weight.dtype)
    registry.check_device(f"{op}: weight", weight.values, x.device)
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"{op}: x: expected shape [..., {K}], got {list(x.shape)}")
    if bias is not None:
        registry.check_dtype(f"{op}: bias", bias, weight.dtype)
        registry.check_device(f"{op}: bias", bias, x.device)
        registry.check_shape(f"{op}: bias", bias, (N,))
    registry.check_activation(activation)


def gathers(M: int, density: float) -> bool:
    """Whether the gather kernel is to compute for M tokens on CUDA, where a weight has its layout."""
    return any(tokens >= M and density < most for tokens, most in GATHER_DENSITY.items())


def fake_linear(x: Tensor, N: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], N))


def kernel_takes(x: Tensor) -> bool:
    """float64 runs the reference: the kernels accumulate in float32."""
    return x.dtype in registry.DTYPES


def multiplies_bfloat16() -> bool:
    """Whether the CPU has products of bfloat16, and they are in force."""
    return _C.target() == "avx512_bf16"


def unpacks(x: Tensor, values: Tensor, N: int) -> bool:
    """Whether :func:`unpacked_linear` is the faster one on this CPU."""
    K = x.shape[-1]
    if x.dtype != torch.bfloat16 or x.numel() < UNPACKED_TOKENS * K or values.dtype not in (x.dtype, torch.int8):
        return False
    return values.numel() > UNPACKED_DENSITY * N * K and multiplies_bfloat16()


def unpacked_linear(
    x: Tensor, values: Tensor, bitmask: Tensor | None, row_offsets: Tensor | None, bias: Tensor | None,
    activation: str | None, scales: Tensor | None,
) -> Tensor:  # fmt: skip
    """``act(scales * (x @ dense(weight).T) + bias)`` in bfloat16 by torch's matmul, the weight unpacked for this call.

    ``row_offsets`` are None where all rows have as many values, and ``bitmask`` too where they are the weight.
    """
    N, K = (values if bitmask is None else bitmask).shape[0], x.shape[-1]
    rows = max(1, UNPACKED_BYTES // (2 * K))
    block = x.new_empty(min(rows, N), K)
    parts = []
    for first in range(0, N, rows):
        end = min(first + rows, N)
        if bitmask is None:
            weight = values[first:end].to(x.dtype)
        else:
            weight = block[: end - first]
            _C.unpack_rows(
                values.data_ptr(), registry.VALUE_DTYPES[values.dtype], bitmask.data_ptr(),
                registry.address(row_offsets), N, K, values.numel() // N, first, end, weight.data_ptr(),
                torch.get_num_threads(),
            )  # fmt: skip
        some_bias = None if bias is None else bias[first:end]
        if scales is None:
            y = torch.nn.functional.linear(x, weight, some_bias)
        else:
            y = torch.nn.functional.linear(x, weight)
            y = y.mul_(scales[first:end]) if some_bias is None else torch.addcmul(some_bias, y, scales[first:end])
        parts.append(registry.apply_activation(y, activation))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
