"""Drop-in modules that compute on packed weights, and the paper's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasticl import formats, ops
from fasticl.formats import PackedWeight, SlicedLayout
from fasticl.icl.model import FusedICLTransformer, ICLTransformer

__all__ = ["FusedICLTransformer", "ICLTransformer", "SparseLinear", "SparseMLP", "dense_weight"]

_DERIVED = ("sliced_values", "steps", "slice_offsets", "row_order")  # buffers of the sliced layout; not in state_dict


def dense_weight(linear: nn.Module) -> Tensor:
    """The ``[N, K]`` weight of an nn.Linear, of GPT-2's Conv1D (which stores ``[K, N]``) or of a SparseLinear.

    Raises:
        TypeError: ``linear`` is none of them.
    """
    if isinstance(linear, SparseLinear):
        return linear.packed.unpack()
    if isinstance(linear, nn.Linear):
        return linear.weight
    if type(linear).__name__ == "Conv1D" and hasattr(linear, "nf"):
        return linear.weight.T  # type: ignore[union-attr,operator]
    raise TypeError(f"linear: expected nn.Linear, Conv1D or SparseLinear, got {type(linear).__name__}")


class SparseLinear(nn.Module):
    """``y = x W^T + b`` with W packed; replaces an ``nn.Linear`` for inference.

    state_dict holds the portable form (``values``, ``bitmask``, ``row_offsets``, or for compact weights ``rows`` and
    ``columns``) and ``bias``; layouts derived from it are rebuilt when a state is loaded. The weight gets no gradient;
    x and bias do, through the reference.
    """

    values: Tensor
    bitmask: Tensor
    row_offsets: Tensor
    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        N, K = packed.shape
        if bias is not None and list(bias.shape) != [N]:
            raise ValueError(f"bias: expected shape [{N}], got {list(bias.shape)}")
        if bias is not None and bias.dtype != packed.dtype:
            raise TypeError(f"bias: expected dtype {packed.dtype} like the weight, got {bias.dtype}")
        self.out_features, self.in_features = N, K
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._hold(packed)

    @classmethod
    def from_linear(cls, linear: nn.Module, format: str = "auto") -> SparseLinear:
        """Packs the weight of an ``nn.Linear`` or a GPT-2 ``Conv1D``; see :func:`fasticl.pack` for ``format``."""
        bias = getattr(linear, "bias", None)
        return cls(formats.pack(dense_weight(linear), format), bias).train(linear.training)

    def _hold(self, packed: PackedWeight) -> None:
        self.format, self.pattern = packed.format, packed.pattern
        for name in ("values", "bitmask", "row_offsets", "rows", "columns"):
            self.register_buffer(name, getattr(packed, name))
        layout = (None,) * len(_DERIVED) if packed.sliced is None else tuple(vars(packed.sliced).values())
        for name, tensor in zip(_DERIVED, layout, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def packed(self) -> PackedWeight:
        sliced = None
        if self.format == "sliced":
            sliced = SlicedLayout(*(getattr(self, name) for name in _DERIVED))
        return PackedWeight(
            self.format, (self.out_features, self.in_features), self.values, self.bitmask, self.row_offsets,
            self.pattern, self.rows, self.columns, sliced,
        )  # fmt: skip

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the same weight, zeros included, and bias."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=self.values.device, dtype=self.values.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(self.packed.unpack())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.format == "sliced":
            return ops.sliced_linear(x, self.packed, self.bias)
        if self.format == "nm":
            return ops.nm_linear(x, self.packed, self.bias)
        if self.format == "bitmap":
            return ops.bitmap_linear(x, self.packed, self.bias)
        return self._compact_linear(x)

    def _compact_linear(self, x: Tensor) -> Tensor:
        assert self.rows is not None and self.columns is not None
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected shape [..., {self.in_features}], got {list(x.shape)}")
        kept = x if self.columns.numel() == self.in_features else x[..., self.columns]
        y = nn.functional.linear(kept, self.values)
        if self.rows.numel() < self.out_features:
            y = y.new_zeros((*y.shape[:-1], self.out_features)).index_copy_(-1, self.rows, y)
        return y if self.bias is None else y + self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Another weight has other counts of values: take its tensors as they are, then derive what is not stored.
        if prefix + "values" not in state_dict:
            return super()._load_from_state_dict(state_dict, prefix, *args)
        names = ("values", "bitmask", "row_offsets", "rows", "columns")
        for name in names:
            held, new = getattr(self, name), state_dict.get(prefix + name)
            if held is not None and new is not None:
                setattr(self, name, torch.empty_like(new, device=held.device, dtype=held.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.format == "compact":
            self.packed.validate()
        else:
            shape = (self.out_features, self.in_features)
            self._hold(
                formats.from_portable(self.format, shape, self.values, self.bitmask, self.row_offsets, self.pattern)
            )

    def extra_repr(self) -> str:
        density = self.packed.density
        pattern = f", pattern={self.pattern}" if self.pattern else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}{pattern}, density={density:.3f}"
        )


class SparseMLP(nn.Module):
    """``down(act(up x))``, or with a gate ``down(act(gate x) * up x)``, in one op; weights dense or packed.

    ``up``, ``down`` and ``gate`` are ``nn.Linear`` or :class:`SparseLinear` (format bitmap, nm or sliced).
    """

    def __init__(
        self, up: nn.Module, down: nn.Module, gate: nn.Module | None = None, *, activation: str | None
    ) -> None:
        super().__init__()
        ops.check_activation(activation)
        self.up, self.down, self.gate, self.activation = up, down, gate, activation
        for name, linear in (("up", up), ("down", down), ("gate", gate)):
            if linear is not None and not isinstance(linear, nn.Linear | SparseLinear):
                raise TypeError(f"{name}: expected nn.Linear or SparseLinear, got {type(linear).__name__}")

    @classmethod
    def from_linears(
        cls, up: nn.Module, down: nn.Module, gate: nn.Module | None = None, *, activation: str | None,
        format: str = "compact",
    ) -> SparseMLP:  # fmt: skip
        """Packs the linears of an MLP. ``"compact"`` removes the hidden neurons whose weights are all zero.

        A neuron is removed where its row of up is zero with a bias that makes its activation zero, or its row of gate is,
        or its column of down is zero: then it adds nothing to the output. Other formats are those of :func:`fasticl.pack`.
        """
        parts = [part for part in (up, down, gate) if part is not None]
        if format != "compact":
            packed = [SparseLinear.from_linear(part, format) for part in parts]
            return cls(*packed, activation=activation)
        alive = dense_weight(down).ne(0).any(0)
        for part in (up, gate):
            if part is not None:
                bias = getattr(part, "bias", None)
                live = dense_weight(part).ne(0).any(1)
                alive = alive & (live if bias is None else live | bias.ne(0))
        kept = alive.nonzero().squeeze(1)

        def smaller(part: nn.Module, dim: int) -> nn.Linear:
            weight, bias = dense_weight(part).detach().index_select(dim, kept), getattr(part, "bias", None)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
            linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter((bias[kept] if dim == 0 else bias).detach().clone(), requires_grad=False)
            return linear

        return cls(
            smaller(up, 0), smaller(down, 1), None if gate is None else smaller(gate, 0), activation=activation
        )

    def forward(self, x: Tensor) -> Tensor:
        def weight(linear: Any) -> Tensor | PackedWeight:
            return linear.packed if isinstance(linear, SparseLinear) else linear.weight

        return ops.fused_mlp(
            x, weight(self.up), weight(self.down), None if self.gate is None else weight(self.gate),
            activation=self.activation, up_bias=self.up.bias, down_bias=self.down.bias,
            gate_bias=None if self.gate is None else self.gate.bias,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
