"""``decoder_block``: a token of each of B sequences through a pre-norm decoder block, over cached keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasticl import _C
from fasticl.ops import _registry as registry


@dataclass(frozen=True)
class BlockWeights:
    """A decoder block of width d: H heads of D dimensions, G heads of keys and values (G divides H), m neurons.

    All tensors have one dtype and device. Pruned heads and neurons are rows and columns that are not there.

    Attributes:
        norm, mlp_norm: ``[d]``.
        qkv: ``[(H + 2 G) D, d]``: the queries of all heads, then the keys, then the values.
        out: ``[d, H D]``.
        up, gate: ``[m, d]``; gate None: the MLP is not gated.
        down: ``[d, m]``.
        activation: None, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        eps: of both norms.
        norm_bias, mlp_norm_bias, out_bias, down_bias: ``[d]``; qkv_bias: ``[(H + 2 G) D]``; up_bias, gate_bias:
            ``[m]``. Each may be None.
        layer_norm: whether the norms are LayerNorm; else they are RMSNorm.

    Raises:
        TypeError: dtypes differ.
        ValueError: shapes or devices do not fit, or the activation is unknown.
    """

    norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    up: Tensor
    down: Tensor
    activation: str | None
    eps: float
    gate: Tensor | None = None
    norm_bias: Tensor | None = None
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    mlp_norm_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    layer_norm: bool = False

    def __post_init__(self) -> None:
        registry.check_activation(self.activation)
        registry.check_dtype("decoder_block: norm", self.norm)
        registry.check_shape("decoder_block: norm", self.norm, ("d",))
        for name in ("qkv", "out", "up"):
            _check_tensor(name, getattr(self, name), self.norm, ("", ""))
        d, m, heads = self.norm.shape[0], self.up.shape[0], self.qkv.shape[0]
        shapes: dict[str, tuple[int | str, ...]] = {
            "qkv": ("(H + 2 G) D", d), "out": (d, "H D"), "mlp_norm": (d,), "up": ("m", d), "down": (d, m),
            "gate": (m, d), "norm_bias": (d,), "qkv_bias": (heads,), "out_bias": (d,), "mlp_norm_bias": (d,),
            "up_bias": (m,), "gate_bias": (m,), "down_bias": (d,),
        }  # fmt: skip
        for name, shape in shapes.items():
            if getattr(self, name) is not None or name in ("mlp_norm", "down"):
                _check_tensor(name, getattr(self, name), self.norm, shape)
        if self.gate is None and self.gate_bias is not None:
            raise ValueError("decoder_block: gate_bias: expected None without a gate, got a tensor")


_FIELDS = tuple(BlockWeights.__dataclass_fields__)


def weights_of(fields: tuple[Any, ...]) -> BlockWeights:
    """From the flat arguments of the op, which were checked."""
    weights = object.__new__(BlockWeights)
    vars(weights).update(zip(_FIELDS, fields, strict=True))
    return weights


def decoder_block(
    x: Tensor,
    weights: BlockWeights,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """``r = x + out(attention(norm(x)))``, then ``y = r + down(act(up n))`` with ``n = mlp_norm(r)``, or, with a gate,
    ``y = r + down(act(gate n) * up n)``: Llama's block, and GPT-2's.

    Of sequence b, whose token stands at ``t = positions[b]``: q, k, v are ``qkv(norm(x[b]))``, cut into heads; q and k
    are turned by t's angles; k and v are written to ``keys[b, :, t]`` and ``values[b, :, t]``; and head h attends to
    ``softmax_i(q_h . keys[b, g, i] / sqrt(D)) values[b, g, i]`` over i = 0..t, g = h G // H. Positions behind t are
    not read. norm(x) is RMSNorm, ``x / sqrt(mean(x^2) + eps) * norm + norm_bias``, or LayerNorm.

    No launch depends on a value that is on the device: a CUDA graph of it may be replayed with new positions.

    Args:
        x: ``[B, d]``; float32, bfloat16 or float16; float64 runs the reference.
        weights: see :class:`BlockWeights`; contiguous, or they are copied at every call.
        keys, values: ``[B, G, L, D]`` of ``x.dtype``, the last two dimensions contiguous; written in place.
        positions: int32 or int64 ``[B]``, each in [0, L).
        cos, sin: float32 ``[L, R / 2]``, R at most D: dimension i < R / 2 of a head is turned with
            dimension i + R / 2. None: no rotary positions (learned ones are in x already).

    Returns:
        ``[B, d]`` in ``x.dtype``; products accumulate in float32.

    Raises:
        TypeError: dtypes differ, or are not those above.
        ValueError: shapes, strides or devices do not fit, the activation is unknown, or a position is out of range. On
            CUDA that would have to wait for the device: there the y of such a sequence is NaN, and nothing is written.
        RuntimeError: a gradient would be needed: this op has none.
    """
    _check(x, weights, keys, values, positions, cos, sin)
    flat = tuple(getattr(weights, name) for name in _FIELDS)
    if registry.needs_grad(x, keys, values, *(t for t in flat if isinstance(t, Tensor))):
        raise RuntimeError("decoder_block: expected torch.no_grad() or no tensor that requires grad, got one")
    return torch.ops.fasticl.decoder_block(x, keys, values, positions, cos, sin, *flat)


def reference(
    x: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor | None, sin: Tensor | None, *weights: Any
) -> Tensor:
    w, dtype, wide = weights_of(weights), x.dtype, torch.promote_types(x.dtype, torch.float32)
    (B, d), (_, G, L, D) = x.shape, keys.shape
    H = w.out.shape[1] // D
    _check_range(positions, L)

    def widened(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(wide)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(wide), widened(bias))

    def normalize(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if w.layer_norm:
            return F.layer_norm(x, (d,), weight.to(wide), widened(bias), w.eps)
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + w.eps) * weight.to(wide)
        return x if bias is None else x + bias.to(wide)

    def turn(x: Tensor) -> Tensor:  # [B, heads, D]
        if cos is None or sin is None:
            return x
        c, s = (table[positions].unsqueeze(1).to(wide) for table in (cos, sin))
        low, high, rest = x.split([c.shape[2], c.shape[2], D - 2 * c.shape[2]], 2)
        return torch.cat([low * c - high * s, high * c + low * s, rest], 2)

    r = x.to(wide)
    heads = linear(normalize(r, w.norm, w.norm_bias), w.qkv, w.qkv_bias).view(B, H + 2 * G, D)
    q, k, v = heads.split([H, G, G], 1)
    every = torch.arange(B, device=x.device)
    keys[every, :, positions] = turn(k).to(dtype)
    values[every, :, positions] = v.to(dtype)
    unseen = (torch.arange(L, device=x.device) > positions.unsqueeze(1))[:, None, :, None]
    seen_keys, seen_values = (t.to(wide).masked_fill(unseen, 0) for t in (keys, values))  # 0 * NaN would be NaN
    scores = (turn(q).view(B, G, H // G, D) @ seen_keys.mT * D**-0.5).masked_fill(unseen.mT, -torch.inf)
    contexts = torch.softmax(scores, 3) @ seen_values
    r = r + linear(contexts.reshape(B, H * D), w.out, w.out_bias)
    normed = normalize(r, w.mlp_norm, w.mlp_norm_bias)
    hidden = linear(normed, w.up, w.up_bias)
    if w.gate is not None:
        hidden = registry.apply_activation(linear(normed, w.gate, w.gate_bias), w.activation) * hidden
    else:
        hidden = registry.apply_activation(hidden, w.activation)
    return (r + linear(hidden, w.down, w.down_bias)).to(dtype)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _cpu(
    x: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor | None, sin: Tensor | None, *weights: Any
) -> Tensor:
    """As :class:`fasticl.Decoder` runs a model of one block (csrc/decoder.cpp)."""
    w = weights_of(weights)
    (B, d), (_, G, L, D), m = x.shape, keys.shape, w.up.shape[0]
    if x.dtype not in registry.DTYPES or 0 in (B, d, m):
        return reference(x, keys, values, positions, cos, sin, *weights)
    _check_range(positions, L)
    dtype, held = registry.DTYPES[x.dtype], []

    def address(t: Tensor) -> int:
        held.append(t.contiguous())  # lives as long as its address is used
        return held[-1].data_ptr()

    def floats(t: Tensor | None) -> int:
        return 0 if t is None else address(t if t.dtype == torch.float32 else t.float())

    def linear(weight: Tensor, bias: Tensor | None) -> dict[str, int]:
        N, K = weight.shape
        return {"values": address(weight), "bitmask": 0, "row_offsets": 0, "N": N, "K": K, "row_values": K,
                "dtype": dtype, "scales": 0, "bias": floats(bias)}  # fmt: skip

    def norm(weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
        return {"weight": floats(weight), "bias": floats(bias), "eps": w.eps, "centred": w.layer_norm}

    H = w.out.shape[1] // D
    block = {
        "norm": norm(w.norm, w.norm_bias), "mlp_norm": norm(w.mlp_norm, w.mlp_norm_bias),
        **dict.fromkeys(("q_norm", "k_norm", "out_norm", "mlp_out_norm")),
        "qkv": [linear(w.qkv, w.qkv_bias)], "q": (H, 0, D), "k": (G, H * D, D), "v": (G, (H + G) * D, D),
        "out": linear(w.out, w.out_bias), "up": linear(w.up, w.up_bias), "down": linear(w.down, w.down_bias),
        "gate": None if w.gate is None else linear(w.gate, w.gate_bias),
        "scale": D**-0.5, "window": 0, "parallel": False, "activation": registry.ACTIVATIONS[w.activation],
        "cos": floats(cos), "sin": floats(sin), "rotary": 0 if cos is None else 2 * cos.shape[1],
        "keys": (keys.data_ptr(), *keys.stride()[:2]), "cached_values": (values.data_ptr(), *values.stride()[:2]),
    }  # fmt: skip
    places = positions.new_empty((4, B), dtype=torch.int64)  # angles, slot, and from where to where it attends
    places[:2], places[2], places[3] = positions, 0, positions + 1
    y = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(x)
    _C.Decoder(d, D, dtype, [block], None, None).step(
        y.data_ptr(), B, places.data_ptr(), 0, torch.get_num_threads()
    )  # fmt: skip
    return y.to(x.dtype)


def _check(
    x: Tensor, w: BlockWeights, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor | None, sin: Tensor | None
) -> None:
    if not isinstance(w, BlockWeights):
        raise TypeError(f"decoder_block: weights: expected BlockWeights, got {type(w).__name__}")
    _check_tensor("x", x, w.norm, ("B", w.norm.shape[0]))
    B = x.shape[0]
    _check_tensor("keys", keys, x, (B, "G", "L", "D"))
    _, G, L, D = keys.shape
    _check_tensor("values", values, x, (B, G, L, D))
    if 0 in (G, L, D):
        raise ValueError(f"decoder_block: keys: expected G, L and D of at least 1, got shape {list(keys.shape)}")
    for name, cache in (("keys", keys), ("values", values)):
        if (D > 1 and cache.stride(3) != 1) or (L > 1 and cache.stride(2) != D):
            raise ValueError(
                f"decoder_block: {name}: expected the last two dimensions contiguous, got strides {cache.stride()}"
            )
    H, rest = divmod(w.out.shape[1], D)
    if rest or H == 0 or H % G:
        raise ValueError(
            f"decoder_block: out: expected shape [d, H D] with D = {D} and H a multiple of G = {G}, as in the cache, "
            f"got {list(w.out.shape)}"
        )
    if w.qkv.shape[0] != (H + 2 * G) * D:
        registry.check_shape("decoder_block: qkv", w.qkv, ((H + 2 * G) * D, x.shape[1]))
    if not isinstance(positions, Tensor) or positions.dtype != torch.int32:
        registry.check_dtype("decoder_block: positions", positions, torch.int64)
    _check_tensor("positions", positions, x, (B,), positions.dtype)
    if (cos is None) != (sin is None):
        raise ValueError("decoder_block: cos and sin: expected both or neither, got one")
    if cos is not None:
        _check_tensor("cos", cos, x, (L, "R / 2"), torch.float32)
        if 2 * cos.shape[1] > D:
            raise ValueError(f"decoder_block: cos: expected at most {D // 2} columns (D / 2), got {cos.shape[1]}")
        _check_tensor("sin", sin, x, (L, cos.shape[1]), torch.float32)


def _check_tensor(name: str, t: Any, x: Tensor, shape: tuple[int | str, ...], dtype: torch.dtype | None = None) -> None:
    """Of the dtype and the device of x, or of another dtype."""
    dtype = dtype or x.dtype
    if not isinstance(t, Tensor) or (t.shape, t.dtype, t.device, t.layout) != (shape, dtype, x.device, torch.strided):
        registry.check_dtype(f"decoder_block: {name}", t, dtype)
        registry.check_device(f"decoder_block: {name}", t, x.device)
        registry.check_shape(f"decoder_block: {name}", t, shape)


def _check_range(positions: Tensor, L: int) -> None:
    """Part of the implementations, not of the door: values are not known while torch.compile traces."""
    if positions.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(positions))
    if low < 0 or high >= L:
        raise ValueError(f"decoder_block: positions: expected in [0, {L}), got {low if low < 0 else high}")


registry.define(
    "decoder_block(Tensor x, Tensor(a!) keys, Tensor(b!) values, Tensor positions, Tensor? cos, Tensor? sin, "
    "Tensor norm, Tensor qkv, Tensor out, Tensor mlp_norm, Tensor up, Tensor down, str? activation, float eps, "
    "Tensor? gate, Tensor? norm_bias, Tensor? qkv_bias, Tensor? out_bias, Tensor? mlp_norm_bias, Tensor? up_bias, "
    "Tensor? gate_bias, Tensor? down_bias, bool layer_norm) -> Tensor",
    reference=reference,
    fake=_fake,
    cpu=_cpu,
    cpu_name="the C++ decoder",
    triton=True,
)
