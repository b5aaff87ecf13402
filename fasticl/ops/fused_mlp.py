"""``fused_mlp``: down(act(up x)) or down(act(gate x) * up x) in one call, the weights dense or packed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fasticl import _C
from fasticl.formats import PackedWeight
from fasticl.ops import _linear
from fasticl.ops import _registry as registry
from fasticl.ops.bitmap_linear import cpu as bitmap_cpu
from fasticl.ops.nm_linear import cpu as nm_cpu
from fasticl.ops.sliced_linear import cpu as sliced_cpu

# For how many tokens the row kernel multiplies dense weights; else torch does, whose float32 is as fast for one or two.
DENSE_TOKENS = {torch.float32: (3, 8), torch.bfloat16: (1, 8), torch.float16: (1, 8)}


def fused_mlp(
    x: Tensor,
    up: Tensor | PackedWeight,
    down: Tensor | PackedWeight,
    gate: Tensor | PackedWeight | None = None,
    *,
    activation: str | None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """``y = h @ down.T + down_bias`` with ``h = act(x @ up.T + up_bias)``, or, with a gate,
    ``h = act(x @ gate.T + gate_bias) * (x @ up.T + up_bias)``.

    A weight is a dense tensor (after neurons were removed, simply a smaller one) or a packed weight of format bitmap,
    nm or sliced. The activation is applied where the kernel still has its sums in registers; h ``[tokens, H]`` stays in
    cache and never becomes a tensor that the caller sees.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16; float64 runs the reference.
        up, gate: ``[H, K]``.
        down: ``[N, H]``.
        activation: None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        up_bias, gate_bias: ``[H]``; down_bias: ``[N]``.

    Returns:
        ``[..., N]`` in ``x.dtype``. h is rounded to ``x.dtype`` in between, as an unfused module rounds it.

    Raises:
        TypeError: dtypes differ, or a weight is neither a tensor nor a PackedWeight.
        ValueError: shapes, devices or formats do not fit, or the activation is unknown.
    """
    registry.check_activation(activation)
    registry.check_dtype("fused_mlp: x", x)
    if x.dim() < 1:
        raise ValueError(f"fused_mlp: x: expected shape [..., K], got {list(x.shape)}")
    H = up.shape[0] if isinstance(up, (Tensor, PackedWeight)) and len(up.shape) == 2 else "H"
    flat_up = _flatten("up", x, up, ("H", x.shape[-1]))
    flat_gate = None if gate is None else _flatten("gate", x, gate, (H, x.shape[-1]))
    flat_down = _flatten("down", x, down, ("N", H))
    sizes = (("up_bias", up_bias, H), ("down_bias", down_bias, down.shape[0]), ("gate_bias", gate_bias, H))
    for name, bias, size in sizes:
        if bias is not None:
            registry.check_dtype(f"fused_mlp: {name}", bias, x.dtype)
            registry.check_device(f"fused_mlp: {name}", bias, x.device)
            registry.check_shape(f"fused_mlp: {name}", bias, (size,))
    if gate is None and gate_bias is not None:
        raise ValueError("fused_mlp: gate_bias: expected None without a gate, got a tensor")
    arguments = (x, flat_up, flat_down, flat_gate, up_bias, down_bias, gate_bias, activation)
    if registry.needs_grad(x, *flat_up, *flat_down, *(flat_gate or ()), up_bias, down_bias, gate_bias):
        return reference(*arguments)
    return torch.ops.fasticl.fused_mlp(*arguments)


def reference(
    x: Tensor, up: list[Tensor], down: list[Tensor], gate: list[Tensor] | None, up_bias: Tensor | None,
    down_bias: Tensor | None, gate_bias: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    def linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        return _linear.reference_linear(x, _dense(weight, x.shape[-1]), bias, activation)

    h = linear(x, up, up_bias, activation if gate is None else None)
    if gate is not None:
        h = linear(x, gate, gate_bias, activation) * h
    return linear(h, down, down_bias, None)


def _fake(
    x: Tensor, up: list[Tensor], down: list[Tensor], gate: list[Tensor] | None, up_bias: Tensor | None,
    down_bias: Tensor | None, gate_bias: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    return _linear.fake_linear(x, down[0].shape[0] if len(down) == 1 else down[1].shape[0])


def _cpu(
    x: Tensor, up: list[Tensor], down: list[Tensor], gate: list[Tensor] | None, up_bias: Tensor | None,
    down_bias: Tensor | None, gate_bias: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    if not _linear.kernel_takes(x):
        return reference(x, up, down, gate, up_bias, down_bias, gate_bias, activation)
    h = linear(x, up, up_bias, activation if gate is None else None)
    if gate is not None:
        h.mul_(linear(x, gate, gate_bias, activation))
    return linear(h, down, down_bias, None)


def linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
    """``act(x @ weight.T + bias)`` on the CPU, by the kernel of the flattened weight's format."""
    return _KERNELS[len(weight)](x, *weight, bias, activation)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The row kernel on a dense weight for a few tokens; torch's matmul beyond."""
    N, K = weight.shape
    M = x.numel() // K if K else 0
    least, most = DENSE_TOKENS[x.dtype]
    if not least <= M <= most or weight.stride() != (K, 1):
        return registry.apply_activation(torch.nn.functional.linear(x, weight, bias), activation)
    x2, M, stride = registry.rows(x)
    bias = registry.contiguous(bias)
    y = x.new_empty((*x.shape[:-1], N))
    _C.nm_linear(
        x2.data_ptr(), M, stride, weight.data_ptr(), 0, N, K, K, registry.address(bias),
        registry.ACTIVATIONS[activation], y.data_ptr(), N, registry.DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


# By the number of tensors that a flattened weight has.
_KERNELS: dict[int, Callable[..., Tensor]] = {1: dense_linear, 2: nm_cpu, 3: bitmap_cpu, 7: sliced_cpu}


def _flatten(name: str, x: Tensor, weight: Tensor | PackedWeight, shape: tuple[int | str, int | str]) -> list[Tensor]:
    """The tensors of a checked weight: 1 dense, 2 nm, 3 bitmap, 7 sliced."""
    name = f"fused_mlp: {name}"
    if isinstance(weight, Tensor):
        registry.check_dtype(name, weight, x.dtype)
        registry.check_device(name, weight, x.device)
        registry.check_shape(name, weight, shape)
        return [weight]
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"{name}: expected a torch.Tensor or a PackedWeight, got {type(weight).__name__}")
    if weight.format == "compact":
        raise ValueError(f"{name}: expected format bitmap, nm or sliced (or the dense rest as a tensor), got compact")
    registry.check_dtype(name, weight.values, x.dtype)
    registry.check_device(name, weight.values, x.device)
    for size, want in zip(weight.shape, shape, strict=True):
        if isinstance(want, int) and size != want:
            raise ValueError(f"{name}: expected shape [{shape[0]}, {shape[1]}], got {list(weight.shape)}")
    if weight.format == "nm":
        return [weight.values, weight.bitmask]
    portable = [weight.values, weight.bitmask, weight.row_offsets]
    if (layout := weight.sliced) is None:
        return portable
    return [*portable, layout.values, layout.steps, layout.slice_offsets, layout.row_order]


def _dense(weight: list[Tensor], K: int) -> Tensor:
    return weight[0] if len(weight) == 1 else _linear.dense_from_bitmap(weight[0], weight[1], K)


registry.define(
    "fused_mlp(Tensor x, Tensor[] up, Tensor[] down, Tensor[]? gate, Tensor? up_bias, Tensor? down_bias, "
    "Tensor? gate_bias, str? activation) -> Tensor",
    reference=reference,
    fake=_fake,
    cpu=_cpu,
    cpu_name="the C++ linears",
    triton=True,
)
