"""Whole models on a GPU, with random weights: a decoding step of a language model, and the paper's over its neurons."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from bench_model import nonzeros
from common import DTYPES, Case, Contender, Truth, copies_of, device, generator, normal
from linear import bytes_of
from torch import Tensor, nn

import fasticl
from fasticl.icl import ICLTransformer
from fasticl.nn import SparseLinear, SparseMLP

PAST = 512  # tokens whose keys and values are cached
ROTARY_BASE = 500_000.0
# What is left of a layer: pattern, sparsity. The LM head stays dense.
KEPT = (("neuron", 0.5), ("2:4", 0.5), ("4:8", 0.5), ("unstructured", 0.5), ("unstructured", 0.8))
RATES = (0.0, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Shape:
    """Of a decoder: where gated like Llama's (RMS norm, rotary positions, a SiLU gate, no bias), else like GPT-2's."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    gated: bool


LLAMA = Shape("llama-3.2-1B", 16, 2048, 32, 8, 8192, 128256, True)
GPT2 = Shape("gpt2-124M", 12, 768, 12, 12, 3072, 50257, False)


class Attention(nn.Module):
    """One token of each of B sequences, at position ``PAST``, whose keys and values go where they stay."""

    def __init__(self, shape: Shape, batch: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, d = shape.heads, shape.kv_heads, shape.width // shape.heads
        bias = not shape.gated
        self.qkv = nn.Linear(shape.width, (shape.heads + 2 * shape.kv_heads) * d, bias)
        self.out = nn.Linear(shape.width, shape.width, bias)
        self.register_buffer("cache", torch.randn(2, batch, shape.kv_heads, PAST + 1, d))
        angles = PAST * ROTARY_BASE ** (torch.arange(0, d, 2) / -d) if shape.gated else torch.zeros(0)
        self.register_buffer("cos", angles.cos().repeat(2))
        self.register_buffer("sin", angles.sin().repeat(2))

    def rotate(self, x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * self.cos + torch.cat((-high, low), -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, width]``."""
        heads = self.qkv(x).view(len(x), self.heads + 2 * self.kv_heads, 1, -1)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 1)
        if self.cos.numel():
            q, k = self.rotate(q), self.rotate(k)
        self.cache[0, :, :, PAST:], self.cache[1, :, :, PAST:] = k, v
        keys, values = self.cache.unbind()
        y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.flatten(1))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        bias = not shape.gated
        self.up = nn.Linear(shape.width, shape.hidden, bias)
        self.gate = nn.Linear(shape.width, shape.hidden, bias) if shape.gated else None
        self.down = nn.Linear(shape.hidden, shape.width, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, shape: Shape, batch: int) -> None:
        super().__init__()
        norm = nn.RMSNorm if shape.gated else nn.LayerNorm
        self.attention_norm, self.attention = norm(shape.width, eps=1e-5), Attention(shape, batch)
        self.mlp_norm, self.mlp = norm(shape.width, eps=1e-5), MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class DecodeModel(nn.Module):
    """Logits ``[B, vocabulary]`` of ``tokens [B]``, each behind ``PAST`` others of its sequence. GPT-2's has no wpe."""

    def __init__(self, shape: Shape, batch: int) -> None:
        super().__init__()
        norm = nn.RMSNorm if shape.gated else nn.LayerNorm
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape, batch) for _ in range(shape.layers))
        self.norm, self.lm_head = norm(shape.width, eps=1e-5), nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def weight_bytes(self) -> int:
        """As stored and read: all but the embedding, of which a token reads a row, and the caches."""
        size = bytes_of(self.norm.weight, self.lm_head.weight)
        for module in self.blocks.modules():
            if isinstance(module, SparseLinear):
                size += module.packed.bytes_read + (0 if module.bias is None else bytes_of(module.bias))
            else:
                size += bytes_of(*module.parameters(recurse=False))
        return size


def prune_(model: DecodeModel, pattern: str, sparsity: float) -> DecodeModel:
    """Zeros the smallest weights of the blocks, or of an MLP's hidden neurons those whose rows of ``up`` are least."""
    if pattern != "neuron":
        fasticl.sparsify_(model.blocks, fasticl.Magnitude(sparsity, pattern))
        return model
    for block in model.blocks:
        mlp: MLP = block.mlp
        rows = mlp.up.weight.norm(dim=1).argsort()[: round(sparsity * mlp.up.out_features)]
        for linear in (mlp.up, mlp.gate):
            if linear is not None:
                linear.weight[rows] = 0
                if linear.bias is not None:
                    linear.bias[rows] = 0
        mlp.down.weight[:, rows] = 0
    return model


def pack_(model: DecodeModel, pattern: str, *, ours: bool = True) -> DecodeModel:
    """The pruned model on packed weights, or without its dead neurons; these by torch's layers if not ``ours``."""
    for block in model.blocks:
        if pattern == "neuron":
            mlp, activation = block.mlp, "gelu_tanh" if block.mlp.gate is None else "silu"
            block.mlp = SparseMLP.from_linears(mlp.up, mlp.down, mlp.gate, activation=activation)
            if not ours:
                mlp.up, mlp.down, mlp.gate = block.mlp.up, block.mlp.down, block.mlp.gate
                block.mlp = mlp
            continue
        for parent in (block.attention, block.mlp):
            for name, linear in list(parent.named_children()):
                packed = SparseLinear.from_linear(linear, "nm" if ":" in pattern else "bitmap")
                setattr(parent, name, packed)
    return model


def decode_case(shape: Shape, batch: int, dtype: str, *, tier: str) -> Case:
    """One token of each of ``batch`` sequences: dense against each of ``KEPT``."""

    def build() -> list[Contender]:
        torch.manual_seed(torch.initial_seed())
        with torch.device(device()):
            dense = DecodeModel(shape, batch).to(DTYPES[dtype]).eval().requires_grad_(False)
        tokens = torch.randint(shape.vocabulary, (batch,), generator=generator(batch), device=device())

        def contender(impl: str, model: DecodeModel, truth: Truth, flops: int, *zeros: object) -> Contender:
            caches = [block.attention.cache for block in model.blocks]
            size = model.weight_bytes() + bytes_of(*caches)
            return Contender(impl, [partial(model, tokens)], truth, size, flops, *zeros, dense=impl == "torch")

        def truth_of(model: DecodeModel) -> Truth:
            return Truth.against(copy.deepcopy(model).double()(tokens), model(tokens))

        def flops_of(model: DecodeModel) -> int:
            return 2 * nonzeros(model) * batch

        found = [contender("torch", dense, truth_of(dense), flops_of(dense))]
        for pattern, sparsity in KEPT:
            pruned = prune_(copy.deepcopy(dense), pattern, sparsity)
            truth, flops = truth_of(pruned), flops_of(pruned)
            if pattern == "neuron":
                smaller = pack_(copy.deepcopy(pruned), pattern, ours=False)
                found.append(contender("torch_smaller", smaller, truth, flops, sparsity, pattern))
            found.append(contender("fasticl", pack_(pruned, pattern), truth, flops, sparsity, pattern))
        return found

    # Pruning and packing a billion weights some times over, and a model at float64 beside each.
    extra = 5.0 + shape.layers * shape.width**2 / 5e6
    return Case("model", dtype, f"{shape.name}-decode{PAST}", batch, build, "cold", tier, 2 + len(KEPT), extra)


def icl_case(L: int, d: int, m: int, batch: int, dtype: str, *, tier: str) -> Case:
    """The paper's model over the rate of its neurons that are pruned; a row's prompts a second are ``batch`` / ms."""

    def build() -> list[Contender]:
        model = ICLTransformer(d // 2, d - d // 2, m, xi=1.0, generator=torch.Generator().manual_seed(L + m))
        model = model.to(device(), DTYPES[dtype]).requires_grad_(False)
        context, query = (normal(batch, *size, salt=batch + L).to(DTYPES[dtype]) for size in ((L, d), (d,)))
        count = copies_of(bytes_of(context), "cold" if device() == "cuda" else "hot")
        copies = [context, *(context.clone() for _ in range(count - 1))]

        def contender(impl: str, run: nn.Module, exact: nn.Module, neurons: int, rate: float) -> Contender:
            expected = copy.deepcopy(exact).double()(context.double(), query.double())
            output = exact(context, query)
            truth = Truth.against(expected, output)
            if run is not exact:  # folding rounds products of weights to the dtype once more
                truth = Truth(expected, 2 * truth.tolerance)
            size = bytes_of(context, query, output, *run.parameters(), *run.buffers())
            flops = 2 * batch * (2 * L * d + d * d + neurons * d + neurons)
            zeros = (rate, "neuron") if rate else (0.0, "dense")
            calls = [partial(run, each, query) for each in copies]
            return Contender(impl, calls, truth, size, flops, *zeros, dense=impl == "torch")

        found = []
        for rate in RATES:
            pruned = copy.deepcopy(model).prune_neurons_(rate)
            neurons = len(pruned.W_O)
            found.append(contender("torch_smaller" if rate else "torch", pruned, pruned, neurons, rate))
            found.append(contender("fasticl", pruned.compile_for_inference(), pruned, neurons, rate))
        return found

    return Case("model", dtype, f"icl-L{L}-d{d}-m{m}", batch, build, "hot", tier, 2 * len(RATES))


def cases(quick: bool) -> list[Case]:
    found = [decode_case(shape, batch, "bfloat16", tier="headline") for shape in (LLAMA, GPT2) for batch in (1, 8)]
    found += [
        icl_case(20, 60, 64, 16384, "float32", tier="headline"),
        icl_case(64, 256, 1024, 4096, "float32", tier="sweep"),
    ]
    return found[:1] if quick else found
