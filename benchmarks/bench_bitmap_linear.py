"""``bitmap_linear`` over sparsity, batch and shape; the cold batch-1 cases carry the read bandwidth beside them."""

from __future__ import annotations

from bench_bandwidth import read_only
from common import Case, Contender
from linear import linear_case, torch_sparse
from torch import Tensor

import fasticl

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
# (N, K), dtype, batches, where the weights are, tier: a 4096² layer of a decoder, and layers of a 124M model, which one
# call after the other finds in cache and a decoding step of the whole model does not
SHAPES = (
    ((4096, 4096), "float32", (1,), "cold", "headline"),
    ((4096, 4096), "bfloat16", (1,), "cold", "headline"),
    ((3072, 768), "float32", (64,), "hot", "headline"),
    ((3072, 768), "bfloat16", (64,), "hot", "headline"),
    ((768, 768), "float32", (1, 2, 4, 8, 16), "hot", "headline"),
    ((768, 768), "float32", (1, 4, 16), "cold", "headline"),
    ((3072, 768), "float32", (1, 2, 4, 8, 16), "hot", "headline"),
    ((3072, 768), "float32", (1, 4, 16), "cold", "headline"),
    ((3072, 768), "float32", (32, 128, 256), "hot", "sweep"),
    ((3072, 768), "bfloat16", (1, 4, 16, 256), "hot", "sweep"),
    ((768, 768), "float32", (64, 256), "hot", "sweep"),
    ((768, 768), "bfloat16", (1, 16, 64), "hot", "sweep"),
    ((4096, 4096), "float32", (4, 16, 64, 256), "hot", "sweep"),
    ((4096, 4096), "bfloat16", (16, 64), "hot", "sweep"),
)


def cases(quick: bool) -> list[Case]:
    sparsities = (0.5, 0.8, 0.9) if quick else SPARSITIES
    kept = [(sparsity, "unstructured") for sparsity in sparsities]
    found = []
    for (N, K), dtype, batches, cache, tier in SHAPES:
        for batch in batches:
            alone = (N, batch) == (4096, 1)
            middle = (N, batch, dtype) == (3072, 64, "float32")
            found.append(
                linear_case(
                    "bitmap_linear",
                    fasticl.ops.bitmap_linear,
                    N,
                    K,
                    batch,
                    dtype,
                    kept,
                    cache=cache,
                    tier=tier,
                    others=(lambda x: [read_only()]) if alone else alternatives if middle else None,
                    targets=(alone or middle) and dtype == "float32",
                )
            )
    return found


def alternatives(x: Tensor) -> list[Contender]:
    """What else a pruned 3072×768 layer can run on: torch's CSR, and a smaller dense layer with as many weights."""
    return [
        contender
        for sparsity in (0.5, 0.8, 0.9)
        for impl, pattern in (("torch_csr", "unstructured"), ("torch_smaller", "neuron"))
        for contender in torch_sparse(impl, 3072, 768, sparsity, pattern, x, "float32", "hot")
    ]
