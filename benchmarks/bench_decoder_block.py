"""``decoder_block``: one token through a block of Llama-3.2-1B or GPT-2, dense and with half of its neurons removed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import DTYPES, Case, Contender, Truth, copies_of, device, generator
from linear import bytes_of
from torch import Tensor

from fasticl.ops import BlockWeights, decoder_block

# width d, H heads, G of keys and values, head dimension D, m neurons; gated with RMSNorm, or with LayerNorm and biases
BLOCKS = {"llama-3.2-1b": (2048, 32, 8, 64, 8192, True), "gpt2": (768, 12, 12, 64, 3072, False)}
BATCHES = (1, 8)
CONTEXT = 1024  # positions that the cache has room for; the token is the last but one


def weights(d: int, H: int, G: int, D: int, m: int, llama: bool, dtype: torch.dtype, neurons: int) -> BlockWeights:
    """Random, with the first so many of m neurons."""
    random = generator(d)

    def weight(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device()) / size[-1] ** 0.5

    heads = (H + 2 * G) * D
    tensors: dict[str, Tensor] = {
        "norm": torch.ones(d), "qkv": weight(heads, d), "out": weight(d, H * D), "mlp_norm": torch.ones(d),
        "up": weight(m, d)[:neurons], "down": weight(d, m)[:, :neurons],
    }  # fmt: skip
    if llama:
        tensors["gate"] = weight(m, d)[:neurons]
    else:
        sizes = {"norm": d, "qkv": heads, "out": d, "mlp_norm": d, "up": neurons, "down": d}
        tensors |= {f"{name}_bias": weight(size) for name, size in sizes.items()}
    placed = {name: t.to(device(), dtype).contiguous() for name, t in tensors.items()}
    return BlockWeights(
        **placed, activation="silu" if llama else "gelu_tanh", eps=1e-5, layer_norm=not llama
    )  # fmt: skip


def eager(
    w: BlockWeights, x: Tensor, keys: Tensor, values: Tensor, seen: int, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    """The same block of PyTorch's functions; every sequence's token is its ``seen``-th, so that nothing is masked."""
    (B, d), (_, G, _, D) = x.shape, keys.shape

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, (d,), weight, bias, w.eps) if w.layer_norm else F.rms_norm(x, (d,), weight, w.eps)

    def turn(x: Tensor) -> Tensor:
        if cos is None or sin is None:
            return x
        c, s = (torch.cat([table[seen - 1]] * 2).to(x.dtype) for table in (cos, sin))
        low, high = x.chunk(2, 2)
        return x * c + torch.cat([-high, low], 2) * s

    heads = F.linear(norm(x, w.norm, w.norm_bias), w.qkv, w.qkv_bias).view(B, -1, D)
    q, k, v = heads.split([heads.shape[1] - 2 * G, G, G], 1)
    keys[:, :, seen - 1], values[:, :, seen - 1] = turn(k), v
    q = turn(q).unsqueeze(2)
    context = F.scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen], enable_gqa=q.shape[1] != G)
    r = x + F.linear(context.reshape(B, -1), w.out, w.out_bias)
    n = norm(r, w.mlp_norm, w.mlp_norm_bias)
    hidden = F.linear(n, w.up, w.up_bias)
    hidden = F.gelu(hidden, approximate="tanh") if w.gate is None else F.silu(F.linear(n, w.gate)) * hidden
    return r + F.linear(hidden, w.down, w.down_bias)


def block_case(name: str, batch: int, dtype: str, tier: str, *, context: int = CONTEXT) -> Case:
    d, H, G, D, m, llama = BLOCKS[name]
    seen = context - 1

    def build() -> list[Contender]:
        random, like = generator(batch), DTYPES[dtype]

        def gaussian(*size: int) -> Tensor:
            return torch.randn(size, generator=random, device=device())

        x, cache = gaussian(batch, d).to(like), gaussian(2, batch, G, context, D).to(like)
        angles = gaussian(context, D // 2)
        cos, sin = (angles.cos(), angles.sin()) if llama else (None, None)
        positions = torch.full((batch,), seen - 1, device=device())

        def contender(impl: str, neurons: int, call: Callable[..., Tensor], where: Tensor | int) -> Contender:
            dense = weights(d, H, G, D, m, llama, like, neurons)
            tensors = {field: t for field, t in vars(dense).items() if isinstance(t, Tensor)}
            stored = bytes_of(*tensors.values())
            wide = BlockWeights(**{**vars(dense), **{field: t.double() for field, t in tensors.items()}})
            count = copies_of(stored + bytes_of(cache), "cold" if device() == "cuda" else "hot")
            calls = []
            for _ in range(count):
                own = BlockWeights(**{**vars(dense), **{field: t.clone() for field, t in tensors.items()}})
                calls.append(partial(call, own, x, *cache.clone(), where, cos, sin))
            truth = Truth.against(
                eager(wide, x.double(), *cache.double(), seen, cos, sin),
                eager(dense, x, *cache.clone(), seen, cos, sin),
            )
            read = bytes_of(cache) * seen // context
            flops = 2 * batch * (sum(t.numel() for t in tensors.values() if t.dim() == 2) + 2 * H * D * seen)
            removed = 1 - neurons / m
            return Contender(
                impl, calls, truth, stored + read + 2 * bytes_of(x), flops, removed,
                "neuron" if removed else "dense", dense=impl == "torch",
            )  # fmt: skip

        def fused(w: BlockWeights, x: Tensor, keys: Tensor, values: Tensor, *rest: Tensor | None) -> Tensor:
            return decoder_block(x, w, keys, values, *rest)

        return [
            contender("torch", m, eager, seen),
            contender("torch_smaller", m // 2, eager, seen),
            contender("fasticl", m, fused, positions),
            contender("fasticl", m // 2, fused, positions),
        ]

    return Case("decoder_block", dtype, f"{name}-L{context}", batch, build, "cold", tier, contenders=4)


def cases(quick: bool) -> list[Case]:
    """On a GPU alone: on a CPU, models decode by :class:`fasticl.Decoder`, which ``bench_decoder.py`` measures."""
    return [
        block_case(name, batch, "bfloat16", "headline" if batch == 1 else "sweep")
        for name in BLOCKS
        for batch in BATCHES
    ]
