"""``fused_mlp``: down(act(up x)) or down(act(gate x) * up x) in one call, the weights dense or packed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    nm, sliced or dense, whose values may be int8. The activation is applied where the kernel still has its sums in
    registers; h ``[tokens, H]`` stays in cache and never becomes a tensor that the caller sees.

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
        (values, *rest), scales = _split(weight)
        dense = _linear.dense_from_bitmap(values, rest[0], x.shape[-1]) if rest else values
        return _linear.reference_linear(x, dense, bias, activation, scales)

    h = linear(x, up, up_bias, activation if gate is None else None)
    if gate is not None:
        h = linear(x, gate, gate_bias, activation) * h
    return linear(h, down, down_bias, None)


def _fake(
    x: Tensor, up: list[Tensor], down: list[Tensor], gate: list[Tensor] | None, up_bias: Tensor | None,
    down_bias: Tensor | None, gate_bias: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    (values, *rest), _ = _split(down)
    return _linear.fake_linear(x, (rest[0] if rest else values).shape[0])


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
    tensors, scales = _split(weight)
    return _KERNELS[len(tensors)](x, *tensors, bias, activation, scales=scales)


def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, scales: Tensor | None = None
) -> Tensor:
    """The row kernel on a dense weight for a few tokens, or any number if it is int8; else torch's matmul."""
    if scales is not None:
        return nm_cpu(x, weight, None, bias, activation, scales)
    K = weight.shape[1]
    M = x.numel() // K if K else 0
    least, most = DENSE_TOKENS[x.dtype]
    if not least <= M <= most or weight.stride() != (K, 1):
        return registry.apply_activation(torch.nn.functional.linear(x, weight, bias), activation)
    return nm_cpu(x, weight, None, bias, activation)


# By the number of tensors that a flattened weight has, besides its scales.
_KERNELS: dict[int, Callable[..., Tensor]] = {1: dense_linear, 2: nm_cpu, 3: bitmap_cpu, 7: sliced_cpu}


def _flatten(name: str, x: Tensor, weight: Tensor | PackedWeight, shape: tuple[int | str, int | str]) -> list[Tensor]:
    """The tensors of a checked weight: 1 dense, 2 nm, 3 bitmap, 7 sliced; of int8 values their scales behind them."""
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
    registry.check_dtype(name, weight.values if weight.scales is None else weight.scales, x.dtype)
    registry.check_device(name, weight.values, x.device)
    for size, want in zip(weight.shape, shape, strict=True):
        if isinstance(want, int) and size != want:
            raise ValueError(f"{name}: expected shape [{shape[0]}, {shape[1]}], got {list(weight.shape)}")
    tensors = [weight.values, weight.bitmask, weight.row_offsets]
    tensors = tensors[: {"dense": 1, "nm": 2}.get(weight.format, 3)]
    tensors += [] if weight.sliced is None else weight.sliced.tensors
    return tensors if weight.scales is None else [*tensors, weight.scales]


def _split(weight: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """A flattened weight without its scales, and those."""
    return (weight[:-1], weight[-1]) if weight[0].dtype == torch.int8 else (weight, None)


registry.define(
    "fused_mlp(Tensor x, Tensor[] up, Tensor[] down, Tensor[]? gate, Tensor? up_bias, Tensor? down_bias, "
    "Tensor? gate_bias, str? activation) -> Tensor",
    reference=reference,
    fake=_fake,
    cpu=_cpu,
    cpu_name="the C++ linears",
    triton=True,
)
