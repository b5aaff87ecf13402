"""What is measured on a GPU: the ceilings of the device, then every op at shapes of real models and of the paper."""

from __future__ import annotations

from functools import partial

import bench_decoder_block
import gpu_models
import torch
from bench_attention_mlp import attention_case
from bench_fused_mlp import mlp_case
from common import Case, Contender, Truth, normal
from linear import bytes_of, linear_case, nm_on_cusparselt, rotated, torch_compiled, torch_sparse
from torch import Tensor

import fasticl

# (N, K): attention and MLP of Llama-3-8B, MLP of Llama-3.2-1B, MLP and attention of GPT-2
EIGHT_B, ONE_B, GPT2 = [(4096, 4096), (14336, 4096), (4096, 14336)], [(8192, 2048), (2048, 8192)], [(3072, 768)]
BATCHES = (1, 8, 32, 256)
SHAPES = {  # and the batches of each
    "bitmap_linear": dict.fromkeys([*EIGHT_B, *ONE_B, *GPT2], BATCHES) | {(768, 768): (1, 8)},
    "sliced_linear": dict.fromkeys([*EIGHT_B, *GPT2], (1, 8)) | {(4096, 4096): (1, 8, 256)},
    "nm_linear": dict.fromkeys(EIGHT_B, (*BATCHES, 1024)) | dict.fromkeys(ONE_B, BATCHES) | {(3072, 768): (1, 32)},
}
KEPT = {
    "bitmap_linear": [(sparsity, "unstructured") for sparsity in (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)],
    "sliced_linear": [(sparsity, "unstructured") for sparsity in (0.7, 0.8, 0.9, 0.95)],
    "nm_linear": [(0.5, pattern) for pattern in ("2:4", "4:8", "8:16")],
}
# Where torch's own ways are measured too: what a compiler finds, and the slow ones at few cases
COMPILED = {(N, K, batch) for N, K in ((4096, 4096), (4096, 14336)) for batch in (1, 8, 32)}
SPARSE = {(4096, 4096, 1), (4096, 14336, 8), (4096, 4096, 256)}
COMPILE_SECONDS = 15.0
HEADLINE_KEPT = {"bitmap_linear": (0.5, 0.8), "sliced_linear": (0.8, 0.9), "nm_linear": (0.5,)}
MLPS = ((14336, 4096, "silu", True), (8192, 2048, "silu", True), (3072, 768, "gelu_tanh", False))
# B prompts, L columns, width d, m neurons
PROMPTS = (
    (1024, 512, 64, 256),
    (4096, 512, 64, 256),
    (1024, 512, 256, 256),
    (1024, 512, 1024, 1024),
    (1024, 20, 60, 64),
    (1, 4096, 64, 256),
)
READ_BYTES = 1 << 30
MATMUL = 8192


def read_only() -> Contender:
    """The largest of random numbers that do not fit in the L2 cache."""
    data = normal(READ_BYTES // 4, salt=1)
    truth = Truth(data.amax().double(), 0.0)
    return Contender("read_only", [lambda: data.amax()], truth, bytes_of(data), 0, pattern="none")


def copy() -> Contender:
    data = normal(READ_BYTES // 8, salt=2)
    target = torch.empty_like(data)
    truth = Truth(data.double(), 0.0)
    return Contender("copy", [lambda: target.copy_(data)], truth, 2 * bytes_of(data), 0, pattern="none")


def matmul() -> Contender:
    a, b = (normal(MATMUL, MATMUL, salt=i).bfloat16() for i in (3, 4))
    calls = rotated(partial(torch.mm, a), b, bytes_of(b), "hot")
    return Contender("matmul", calls, Truth.of(torch.mm, a, b), 3 * bytes_of(a), 2 * MATMUL**3, pattern="none")


def baselines(op: str, N: int, K: int, x: Tensor) -> list[Contender]:
    """What torch has for this layer: dense as a compiler does it, and its own sparse and smaller ones."""
    found = []
    batch = len(x)
    if op == "nm_linear":
        found += torch_sparse("torch_2_4", N, K, 0.5, "2:4", x, "bfloat16", "cold")
        found += nm_on_cusparselt(N, K, x, "bfloat16", "cold")
    elif op == "bitmap_linear":
        found += torch_sparse("torch_smaller", N, K, 0.5, "neuron", x, "bfloat16", "cold")
        if (N, K, batch) in COMPILED:
            found += torch_compiled(N, K, x, "bfloat16", "cold")
        for sparsity in (0.5, 0.9) if (N, K, batch) in SPARSE else ():
            found += torch_sparse("torch_csr", N, K, sparsity, "unstructured", x, "bfloat16", "cold")
            found += torch_sparse("torch_bsr", N, K, sparsity, "block", x, "bfloat16", "cold")
    return found


def cases(quick: bool) -> list[Case]:
    """Ceilings first; with ``quick`` the smallest set that answers whether an op meets its goal."""
    found = [
        Case("bandwidth", "float32", "read", 1, lambda: [read_only()], "cold", "headline"),
        Case("bandwidth", "float32", "copy", 1, lambda: [copy()], "cold", "headline"),
        Case("bandwidth", "bfloat16", "matmul", MATMUL, lambda: [matmul()], "hot", "headline"),
    ]
    for op, kept in KEPT.items():
        for (N, K), batches in SHAPES[op].items():
            for batch in batches:
                headline = (N, K) == (4096, 14336) and batch <= 8
                wanted = [k for k in kept if not quick or k[0] in HEADLINE_KEPT[op]]
                compiled = op == "bitmap_linear" and (N, K, batch) in COMPILED
                found.append(
                    linear_case(
                        op,
                        getattr(fasticl.ops, op),
                        N,
                        K,
                        batch,
                        "bfloat16",
                        wanted,
                        cache="cold",
                        tier="headline" if headline else "sweep",
                        others=None if quick else partial(baselines, op, N, K),
                        extra_seconds=COMPILE_SECONDS if compiled and not quick else 0.0,
                    )
                )
    for mlp in MLPS:
        for batch in BATCHES:
            tier = "headline" if mlp[0] == 14336 and batch == 1 else "sweep"
            found.append(mlp_case(*mlp, batch, "bfloat16", (0.5,) if quick else (0.3, 0.5, 0.8), tier))
    for shape in PROMPTS:
        tier = "headline" if shape[0] >= 1024 and shape[1] == 512 else "sweep"
        found.append(attention_case(shape, "bfloat16", tier, compiled=not quick and tier == "headline"))
    found.append(attention_case((64, 512, 64, 256), "bfloat16", "sweep", compiled=False, Q=64))
    return found + bench_decoder_block.cases(quick) + gpu_models.cases(quick)
