"""A decoding step on a GPU: the whole language model captured in a CUDA graph once, and replayed for every token.

A block is up to some thirty launches, which take the host longer than a token's kernels take the device. A graph of all
of them is launched at once, on tensors that stay where they are: :class:`Step` holds those and says what is computed,
:class:`Graphs` captures it and replays it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, cuda, nn
from torch.nn import functional as F

from fasticl.architectures import Block, Parts, check_shapes, norm_of, size_of
from fasticl.layers import is_linear
from fasticl.nn import dense_bias, dense_weight
from fasticl.ops._registry import apply_activation, runs_triton
from fasticl.ops.decoder_block import BlockWeights, decoder_block

Angles = tuple[Tensor, Tensor]


class Step:
    """A token of each of M sequences through a model; nothing in it waits for the device, which may be the CPU.

    A block of dense linears that computes what :func:`fasticl.ops.decoder_block` does runs as that op; the weights of
    its queries, keys and values are copied into one matrix, and of GPT-2's, which lie transposed, all. Any other block
    runs its own linears, and scaled_dot_product_attention over the whole cache, of which what a token does not see is
    masked, but has to be finite.

    Args:
        model, parts: see :func:`fasticl.architectures.parts_of`.
        cache: keys and values, ``[2, blocks, B, G, L, d]``, of the model's dtype and device.
        angles: cos and sin of each ``layer_type``, float32 ``[L, rotary / 2]``.

    Attributes:
        inputs: int64 ``[2 B]``, of which :meth:`run` reads M tokens, and behind them their M positions in [0, L).
        logits: float32 ``[B, vocabulary]``, of which it writes M.

    Raises:
        ValueError: a weight has not the shape that the model's configuration says.
    """

    def __init__(self, model: Any, parts: Parts, cache: Tensor, angles: Mapping[str | None, Angles]) -> None:
        (_, _, B, _, L, d), device = cache.shape, cache.device
        self._parts, self._norm, self._head = parts, _norm(parts.norm), model.get_output_embeddings()
        self._layers: list[tuple[_OneOp | _Modules, Tensor]] = []
        for block, own in zip(parts.blocks, cache.unbind(1), strict=True):
            check_shapes(block, parts.embedding.weight.shape[1])
            window = block.window if block.window and block.window < L else None
            weights = _weights(block, cache) if window is None else None
            if weights is None:
                self._layers.append((_Modules(block, window), own))
            else:
                cos_sin = (None, None) if parts.rotary is None else angles[block.layer_type]
                self._layers.append((_OneOp(weights, cos_sin), own))
        modules = [layer for layer, _ in self._layers if isinstance(layer, _Modules)]
        self._windows = {layer.window for layer in modules}
        turned = {layer.block.layer_type for layer in modules} if parts.rotary is not None else ()
        self._turns = {kind: _turns(*angles[kind], d) for kind in turned}
        self._count = torch.arange(max(B, L), device=device)
        self._length = L
        self.inputs = torch.zeros(2 * B, dtype=torch.long, device=device)
        self.logits = cache.new_empty((B, size_of(self._head)[0]), dtype=torch.float32)

    def run(self, M: int) -> None:
        """Of the first M sequences: their keys and values go to the cache, and ``logits[:M]`` are what comes next."""
        tokens, positions = self.inputs[: 2 * M].view(2, M)
        x, learned = self._parts.embedding(tokens), self._parts.positions
        if learned is not None:
            x = x + F.embedding(positions + self._parts.first_position, learned.weight)
        now = _Now(
            self._count[:M],
            positions,
            {window: self._mask(positions, window, x) for window in self._windows},
            {
                kind: (partner, *(table.index_select(0, positions)[:, None] for table in tables))
                for kind, (partner, *tables) in self._turns.items()
            },
        )
        for layer, cache in self._layers:
            x = layer(x, cache[:, :M], now)
        self.logits[:M].copy_(self._head(self._norm(x)))

    def _mask(self, positions: Tensor, window: int | None, x: Tensor) -> Tensor:
        """What is added to scores, ``[M, 1, 1, L]`` of x's dtype."""
        there, last = self._count[: self._length], positions[:, None]
        unseen = there > last if window is None else (there > last) | (there <= last - window)
        return x.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, None, None]


@dataclass(frozen=True)
class _Now:
    """What the blocks of one step share; ``turns`` are those of :func:`_turns` at its positions, by layer_type."""

    rows: Tensor  # 0 to M - 1
    positions: Tensor
    masks: dict[int | None, Tensor]  # by window
    turns: dict[str | None, tuple[Tensor, ...]]


class _OneOp:
    def __init__(self, weights: BlockWeights, angles: tuple[Tensor | None, Tensor | None]) -> None:
        self._weights, self._angles = weights, angles

    def __call__(self, x: Tensor, cache: Tensor, now: _Now) -> Tensor:
        keys, values = cache.unbind()
        return decoder_block(x, self._weights, keys, values, now.positions, *self._angles)


class _Modules:
    """A block of any kind that :class:`fasticl.architectures.Block` describes, by its own linears."""

    def __init__(self, block: Block, window: int | None) -> None:
        self.block, self.window = block, window
        names = ("norm", "q_norm", "k_norm", "out_norm", "mlp_norm", "mlp_out_norm")
        self._norms = {name: _norm(getattr(block, name)) for name in names}

    def __call__(self, x: Tensor, cache: Tensor, now: _Now) -> Tensor:
        """x ``[M, D]``, cache ``[2, M, G, L, d]``."""
        r = x + self._norms["out_norm"](self._attend(self._norms["norm"](x), cache, now))
        return r + self._norms["mlp_out_norm"](self._mlp(self._norms["mlp_norm"](x if self.block.parallel else r)))

    def _attend(self, x: Tensor, cache: Tensor, now: _Now) -> Tensor:
        block, M = self.block, len(x)
        H, G, d = block.heads, block.groups, block.head_dim
        outputs = [linear(x) for linear in block.qkv]
        if block.interleaved:
            q, k, v = outputs[0].view(M, H, 3, d).unbind(2)
        else:
            both = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            q, k, v = both.view(M, H + 2 * G, d).split([H, G, G], 1)
        q, k = self._norms["q_norm"](q), self._norms["k_norm"](k)
        if now.turns:
            partner, cos, sin = now.turns[block.layer_type]
            both = torch.cat([q, k], 1)
            both = torch.addcmul(both * cos, both.index_select(2, partner), sin).to(x.dtype)
            q, k = both.split([H, G], 1)
        cache[:, now.rows, :, now.positions] = torch.stack([k, v], 1)
        keys, values = cache.unbind()
        q = q.reshape(M, G, H // G, d)  # heads that share keys and values are one head's several queries
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=now.masks[self.window], scale=block.scale)
        return block.out(y.reshape(M, H * d))

    def _mlp(self, x: Tensor) -> Tensor:
        block = self.block
        if block.mlp is not None:
            return block.mlp(x)
        y = apply_activation(block.up(x) if block.gate is None else block.gate(x), block.activation)
        return block.down(y if block.gate is None else y * block.up(x))


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """A norm in one op; None is none."""
    if norm is None:
        return lambda x: x
    if isinstance(norm, nn.LayerNorm):
        return norm
    weight, _, eps = norm_of(norm)
    return lambda x: F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def _turns(cos: Tensor, sin: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """``partner [d], C, S [L, d]``, by which x of a head is turned to ``x C + x[partner] S``."""
    L, half = cos.shape
    rest = cos.new_zeros(L, d - 2 * half)
    partner = torch.arange(d, device=cos.device)
    partner[: 2 * half] = partner[: 2 * half].roll(half)
    return partner, torch.cat([cos, cos, rest + 1], 1), torch.cat([-sin, sin, rest], 1)


def _weights(block: Block, like: Tensor) -> BlockWeights | None:
    """The block as decoder_block takes it; None if it is something else, or its linears are not all dense."""
    linears = {name: getattr(block, name) for name in ("out", "up", "down", "gate")}
    norms, more = (block.norm, block.mlp_norm), (block.q_norm, block.k_norm, block.out_norm, block.mlp_out_norm)
    (norm, norm_bias, eps), (mlp_norm, mlp_norm_bias, mlp_eps) = map(norm_of, norms)
    if (
        not all(linear is None or is_linear(linear) for linear in (*linears.values(), *block.qkv))
        or any(norm is not None for norm in more)
        or len({isinstance(norm, nn.LayerNorm) for norm in norms}) == 2
        or eps != mlp_eps
        or block.parallel
        or not math.isclose(block.scale, block.head_dim**-0.5)
        or size_of(block.up)[0] == 0  # which the reference computes; it looks at positions, and so waits
        or (like.is_cuda and not runs_triton(like.device))  # likewise
    ):
        return None
    qkv, biases = [dense_weight(part) for part in block.qkv], [dense_bias(part) for part in block.qkv]
    qkv_bias = None
    if any(bias is not None for bias in biases):
        pairs = zip(biases, qkv, strict=True)
        qkv_bias = torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for bias, weight in pairs])
    found = {
        "norm": norm, "mlp_norm": mlp_norm, "norm_bias": norm_bias, "mlp_norm_bias": mlp_norm_bias,
        "qkv": qkv[0] if len(qkv) == 1 else torch.cat(qkv), "qkv_bias": qkv_bias,
        **{name: None if linear is None else dense_weight(linear) for name, linear in linears.items()},
        **{f"{name}_bias": None if linear is None else dense_bias(linear) for name, linear in linears.items()},
    }  # fmt: skip
    if block.interleaved:
        for name in ("qkv", "qkv_bias"):
            if (each := found[name]) is not None:
                found[name] = each.view(block.heads, 3, block.head_dim, -1).transpose(0, 1).reshape(each.shape)
    if any(t is not None and (t.dtype, t.device) != (like.dtype, like.device) for t in found.values()):
        return None
    tensors: dict[str, Any] = {
        name: None if tensor is None else tensor.detach().contiguous() for name, tensor in found.items()
    }
    return BlockWeights(
        **tensors, activation=block.activation, eps=eps, layer_norm=isinstance(block.norm, nn.LayerNorm)
    )


class Graphs:
    """``run(M)`` captured in a CUDA graph for each M when it is first called, and replayed.

    Raises:
        RuntimeError: ``run`` does something that cannot be captured: it waits for the device, say.
    """

    def __init__(self, run: Callable[[int], None], device: torch.device) -> None:
        self._run, self._device = run, device
        self._graphs: dict[int, Any] = {}
        self._pool: Any = None  # of the memory in between, which all graphs use, one at a time

    def __call__(self, M: int) -> None:
        with cuda.device(self._device):
            if M not in self._graphs:
                self._graphs[M] = self._capture(M)
            self._graphs[M].replay()

    def _capture(self, M: int) -> Any:
        stream, before = cuda.Stream(), cuda.current_stream()
        stream.wait_stream(before)
        with cuda.stream(stream):  # compiles kernels, and makes what libraries make once
            self._run(M)
        before.wait_stream(stream)
        graph = cuda.CUDAGraph()
        try:
            with cuda.graph(graph, pool=self._pool, stream=stream):
                self._run(M)
        except RuntimeError as error:
            cuda.set_stream(before)  # which a failed capture does not
            raise RuntimeError(f"model: expected a step that a CUDA graph can capture, got: {error}") from error
        self._pool = graph.pool()
        return graph
