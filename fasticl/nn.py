"""Drop-in modules that compute on packed weights, and the paper's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fasticl import formats, ops
from fasticl.device_layouts import DeviceLayouts
from fasticl.formats import PackedWeight, SlicedLayout
from fasticl.icl.model import FusedICLTransformer, ICLTransformer
from fasticl.layers import is_linear
from fasticl.ops._registry import apply_activation, check_activation, needs_grad

__all__ = ["FusedICLTransformer", "ICLTransformer", "SparseLinear", "SparseMLP"]

_STORED = ("values", "scales", "bitmask", "row_offsets", "rows", "columns")  # in state_dict, where the format has them
_DERIVED = ("sliced_values", "steps", "slice_offsets", "row_order")  # the sliced layout; rebuilt on loading
_OPERANDS = {  # what an op takes of each format, in its order, besides scales
    "bitmap": ("values", "bitmask", "row_offsets"),
    "nm": ("values", "bitmask"),
    "sliced": ("values", "bitmask", "row_offsets", *_DERIVED),
    "compact": ("values",),
    "dense": ("values",),
}
_CHECKED = {
    "bitmap": ops.bitmap_linear, "nm": ops.nm_linear, "sliced": ops.sliced_linear, "dense": ops.nm_linear,
}  # fmt: skip
_OPS: dict[str, Callable[..., Tensor]] = {
    "bitmap": torch.ops.fasticl.bitmap_linear, "nm": torch.ops.fasticl.nm_linear,
    "sliced": torch.ops.fasticl.sliced_linear,
    "dense": lambda x, values, *rest, scales: torch.ops.fasticl.nm_linear(x, values, None, *rest, scales),
}  # fmt: skip


def dense_weight(linear: nn.Module) -> Tensor:
    """The ``[N, K]`` weight of an nn.Linear, of GPT-2's Conv1D (which stores ``[K, N]``) or of a SparseLinear.

    A mask of ``torch.nn.utils.prune`` is applied.

    Raises:
        TypeError: ``linear`` is none of them.
    """
    if isinstance(linear, SparseLinear):
        return linear.packed.unpack()
    if is_linear(linear):
        weight: Tensor = _masked(linear, "weight")
        return weight if isinstance(linear, nn.Linear) else weight.T
    raise TypeError(f"linear: expected nn.Linear, Conv1D or SparseLinear, got {type(linear).__name__}")


def dense_bias(linear: nn.Module) -> Tensor | None:
    """The ``[N]`` bias of such a layer, or None; a mask is applied."""
    return _masked(linear, "bias")


def _masked(linear: nn.Module, name: str) -> Any:
    # The attribute itself holds the masked tensor of the last forward: old, if parameters were loaded since.
    for hook in linear._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            return hook.apply_mask(linear)
    return getattr(linear, name)


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An ``nn.Linear`` of these tensors, not copied, that need no gradient."""
    linear = nn.Linear(1, 1, bias is not None, device="meta")  # of size 1: torch warns of sizes of 0, which may come
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


class SparseLinear(nn.Module):
    """``y = x W^T + b`` with W packed; replaces an ``nn.Linear`` for inference.

    Shapes: x ``[..., K]`` of the weight's dtype, y ``[..., N]``. Under autocast x is cast to the weight's dtype, and y
    to autocast's, which is what nn.Linear returns there.

    state_dict holds the portable form (``values``, ``bitmask``, ``row_offsets``, for int8 values ``scales``, for
    compact weights ``rows`` and ``columns``) and ``bias``. A state with another number of values loads too, after it
    was validated; layouts derived from it are rebuilt. A cast reaches scales, but not int8 values. The weight gets no
    gradient; x and a bias that requires one do, through the reference, which is slow: run inference under
    ``torch.inference_mode()``.
    """

    values: Tensor
    scales: Tensor | None
    bitmask: Tensor
    row_offsets: Tensor
    rows: Tensor | None
    columns: Tensor | None
    bias: nn.Parameter | None
    _layouts: DeviceLayouts | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(packed, PackedWeight):
            raise TypeError(f"packed: expected a PackedWeight (fasticl.pack), got {type(packed).__name__}")
        N, K = packed.shape
        if bias is not None and list(bias.shape) != [N]:
            raise ValueError(f"bias: expected shape [{N}], got {list(bias.shape)}")
        if bias is not None and bias.dtype != packed.dtype:
            raise TypeError(f"bias: expected dtype {packed.dtype} like the weight, got {bias.dtype}")
        if bias is not None and bias.device != packed.device:
            raise ValueError(f"bias: expected on {packed.device} like the weight, got {bias.device}")
        self.out_features, self.in_features = N, K
        held = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", held)
        self._hold(packed)

    @classmethod
    def from_linear(cls, linear: nn.Module, format: str = "auto", values: str | None = None) -> SparseLinear:
        """Packs the weight of an ``nn.Linear``, a GPT-2 ``Conv1D`` or another SparseLinear.

        ``format`` and ``values`` are those of :func:`fasticl.pack`, except that elements equal to -0.0, which a mask
        that was multiplied on leaves behind, are dropped like other zeros.

        Raises:
            TypeError: ``linear`` is none of these layers, or its dtype cannot be packed.
            ValueError: the format or values are unknown, or the weight does not fit them.
        """
        weight, bias = dense_weight(linear).detach(), dense_bias(linear)
        if not weight.is_floating_point():  # of quantized layers; adding 0.0 would make it float
            raise TypeError(f"linear.weight: expected a floating-point dtype, got {weight.dtype}")
        packed = formats.pack(weight + 0.0, format, values=values)  # -0.0 + 0.0 is 0.0
        return cls(packed, bias).train(linear.training)

    def _hold(self, packed: PackedWeight) -> None:
        self.format, self.pattern = packed.format, packed.pattern
        for name in _STORED:
            self.register_buffer(name, getattr(packed, name))
        layout = (None,) * len(_DERIVED) if packed.sliced is None else packed.sliced.tensors
        for name, tensor in zip(_DERIVED, layout, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self._layouts = packed.layouts

    @property
    def packed(self) -> PackedWeight:
        """The weight; shares the module's tensors."""
        sliced = None
        if self.format == "sliced":
            sliced = SlicedLayout(*(getattr(self, name) for name in _DERIVED))
        return PackedWeight(
            self.format, (self.out_features, self.in_features), self.values, self.bitmask, self.row_offsets,
            self.pattern, self.rows, self.columns, sliced, self.scales, self._layouts,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Moves or casts the tensors, and derives the CUDA kernels' layouts from them anew where they then are."""
        self._layouts = None
        super()._apply(fn, recurse)
        self._layouts = DeviceLayouts.derive(self.packed)
        return self

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the same weight, zeros included, and bias."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return frozen_linear(self.packed.unpack(), bias).requires_grad_().train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        # One call takes microseconds on a small layer: what fits goes straight to the op, the rest through its checks.
        (operands, scales), bias = _operands(self), self._parameters["bias"]
        typed = operands[0] if scales is None else scales
        if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
            return _without_autocast(self.forward, x, typed.dtype)
        if self.format == "compact":
            return self._compact_linear(x)
        if _fits(x, self.in_features, typed, bias) and not needs_grad(x, bias):
            if scales is not None:
                return _OPS[self.format](x, *operands, bias, None, scales=scales)
            if self._layouts is not None:
                return _OPS[self.format](x, *operands, bias, None, **self._layouts.arguments)
            return _OPS[self.format](x, *operands, bias, None)
        return _CHECKED[self.format](x, self.packed, bias)

    def _compact_linear(self, x: Tensor) -> Tensor:
        rows, columns, bias = self.rows, self.columns, self.bias
        assert rows is not None
        assert columns is not None
        if not isinstance(x, Tensor) or x.dtype != self.values.dtype:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a tensor of dtype {self.values.dtype}, got {got}")
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x: expected shape [..., {self.in_features}], got {list(x.shape)}")
        kept = x if columns.numel() == self.in_features else x.index_select(-1, columns)
        if rows.numel() == self.out_features:
            return nn.functional.linear(kept, self.values, bias)
        y = nn.functional.linear(kept, self.values, None if bias is None else bias[rows])
        rest = x.new_zeros(self.out_features) if bias is None else bias
        return rest.expand(*x.shape[:-1], self.out_features).index_copy(-1, rows, y)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        held = self.packed
        for name in _STORED:
            old, new = self._buffers[name], state_dict.get(prefix + name)
            if old is not None and isinstance(new, Tensor):  # another weight has other counts: take the new sizes
                both = old.is_floating_point() and new.is_floating_point()
                dtype = old.dtype if both else new.dtype  # integers of another dtype are refused
                setattr(self, name, torch.empty_like(new, device=old.device, dtype=dtype))
            elif old is not None:
                setattr(self, name, old.clone())  # assignment below must not reach what is held
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        try:
            loaded = self.packed
            if self.format in ("compact", "dense"):
                loaded.validate()
            else:
                loaded = formats.from_portable(
                    self.format, loaded.shape, loaded.values, loaded.bitmask, loaded.row_offsets, self.pattern,
                    loaded.scales,
                )  # fmt: skip
        except ValueError as error:  # a kernel must never see it
            error_msgs.append(f"{prefix.removesuffix('.') or 'SparseLinear'}: {error}")
            loaded = held
        self._hold(loaded)

    def extra_repr(self) -> str:
        pattern = f", pattern={self.pattern}" if self.pattern else ""
        values = "" if self.scales is None else ", values=int8"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}{pattern}{values}, density={self.packed.density:.3f}"
        )


def _computes_itself(part: nn.Module) -> bool:
    """Of an MLP: adapters of PEFT, accelerate's offloading and the like, which were put in since and want to be called;
    and a weight that has the layout of a CUDA C++ kernel, which fused_mlp has not."""
    if not isinstance(part, (nn.Linear, SparseLinear)) or "forward" in part.__dict__:
        return True
    return isinstance(part, SparseLinear) and part._layouts is not None


class SparseMLP(nn.Module):
    """``down(act(up x))``, or with a gate ``down(act(gate x) * up x)``, in one op; weights dense or packed.

    On a GPU, where a packed part has a kernel in CUDA C++, each part runs as its own op.

    Shapes: x ``[..., K]``, up and gate ``[H, K]``, down ``[N, H]``, y ``[..., N]``. Autocast and gradients as in
    :class:`SparseLinear`.

    Args:
        up, down, gate: ``nn.Linear`` or :class:`SparseLinear` (any format but compact), used as they are.
        activation: None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.

    Raises:
        TypeError: a layer is neither.
        ValueError: their sizes do not fit together, one is compact, or the activation is unknown.
    """

    up: Any  # nn.Linear or SparseLinear
    down: Any
    gate: Any  # or None

    def __init__(
        self, up: nn.Linear | SparseLinear, down: nn.Linear | SparseLinear,
        gate: nn.Linear | SparseLinear | None = None, *, activation: str | None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_activation(activation)
        for name, linear in (("up", up), ("down", down), ("gate", gate)):
            if linear is not None and not isinstance(linear, nn.Linear | SparseLinear):
                raise TypeError(f"{name}: expected nn.Linear or SparseLinear, got {type(linear).__name__}")
            if isinstance(linear, SparseLinear) and linear.format == "compact":
                raise ValueError(f"{name}: expected format bitmap, nm or sliced, got compact; see from_linears")
        if down.in_features != up.out_features:
            raise ValueError(f"down: expected {up.out_features} in_features like up's outputs, got {down.in_features}")
        if gate is not None and (gate.out_features, gate.in_features) != (up.out_features, up.in_features):
            raise ValueError(
                f"gate: expected shape {[up.out_features, up.in_features]} like up, "
                f"got {[gate.out_features, gate.in_features]}"
            )
        self.up, self.down, self.activation = up, down, activation
        self.register_module("gate", gate)

    @classmethod
    def from_linears(
        cls, up: nn.Module, down: nn.Module, gate: nn.Module | None = None, *, activation: str | None,
        format: str = "compact", values: str | None = None,
    ) -> SparseMLP:  # fmt: skip
        """Packs the linears (``nn.Linear``, Conv1D) of an MLP; ``"compact"`` removes dead hidden neurons instead.

        A neuron is dead, and removed, where its row of up is zero and so is its bias, or its row of gate is, or its
        column of down is zero: then it adds nothing to the output (every activation maps 0 to 0). The layers left are
        dense and smaller. Other formats, and ``values``, are those of :func:`fasticl.pack`.
        """
        if format != "compact" or values is not None:
            parts = [
                None if part is None else SparseLinear.from_linear(part, format, values) for part in (up, down, gate)
            ]
            return cls(*parts, activation=activation)  # type: ignore[arg-type]
        alive = dense_weight(down).ne(0).any(0)
        for part in (up, gate):
            if part is not None:
                live, bias = dense_weight(part).ne(0).any(1), dense_bias(part)
                alive = alive & (live if bias is None else live | bias.ne(0))
        kept = alive.nonzero().squeeze(1)

        def rows(part: nn.Module) -> nn.Linear:
            bias = dense_bias(part)
            return frozen_linear(dense_weight(part).index_select(0, kept), None if bias is None else bias[kept])

        bias = dense_bias(down)
        columns = frozen_linear(dense_weight(down).index_select(1, kept), None if bias is None else bias.clone())
        return cls(rows(up), columns, None if gate is None else rows(gate), activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        up, down, gate = self.up, self.down, self.gate
        parts = (up, down) if gate is None else (up, down, gate)
        if any(map(_computes_itself, parts)):
            hidden = up(x) if gate is None else gate(x)
            hidden = apply_activation(hidden, self.activation)
            return down(hidden if gate is None else hidden * up(x))
        weights, biases = [_operands(part) for part in parts], [part.bias for part in parts]
        typed = [tensors[0] if scales is None else scales for tensors, scales in weights]
        if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
            return _without_autocast(self.forward, x, typed[0].dtype)
        fits = down.in_features == up.out_features and (
            gate is None or (gate.out_features, gate.in_features) == (up.out_features, up.in_features)
        )
        for weight, bias in zip(typed, biases, strict=True):
            fits = fits and _fits(x, up.in_features, weight, bias) and not needs_grad(x, weight, bias)
        up_bias, down_bias, gate_bias = biases if gate is not None else (*biases, None)
        if fits:
            flat = [tensors if scales is None else [*tensors, scales] for tensors, scales in weights]
            gate_tensors = None if gate is None else flat[2]
            return torch.ops.fasticl.fused_mlp(
                x, flat[0], flat[1], gate_tensors, up_bias, down_bias, gate_bias, self.activation
            )
        packed = [part.packed if isinstance(part, SparseLinear) else part.weight for part in parts]
        return ops.fused_mlp(
            x, *packed, activation=self.activation, up_bias=up_bias, down_bias=down_bias, gate_bias=gate_bias
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def _operands(linear: Any) -> tuple[list[Any], Tensor | None]:
    """The tensors of a weight, values first, as the ops take them, and the scales of int8 values."""
    if isinstance(linear, SparseLinear):
        buffers = linear._buffers  # nn.Module's attribute lookup would take half a microsecond each
        return [buffers[name] for name in _OPERANDS[linear.format]], buffers["scales"]
    return [linear.weight], None


def _fits(x: Any, K: int, typed: Tensor, bias: Tensor | None) -> bool:
    """Whether ``x`` has K features, and bias and ``typed``, a tensor in the weight's dtype, its dtype and device."""
    if not isinstance(x, Tensor) or x.shape[-1:] != (K,):
        return False
    dtype, device = x.dtype, x.device
    return (
        typed.dtype == dtype
        and typed.device == device
        and (bias is None or (bias.dtype == dtype and bias.device == device))
    )


def _without_autocast(call: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """``call`` in the weight's own dtype: casting what is packed at every call would cost more than it saves.

    Returns autocast's dtype, as torch's layers do; float64 stays what it is, as it does there.
    """
    device = x.device.type
    cast = x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
    with torch.autocast(device, enabled=False):
        y = call(cast)
    return y if y.dtype == torch.float64 else y.to(torch.get_autocast_dtype(device))
