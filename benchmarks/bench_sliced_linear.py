"""``sliced_linear`` where it is meant to win: from about 75 % zeros."""

from __future__ import annotations

from bench_bandwidth import read_only
from common import Case
from linear import linear_case

import fasticl

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
SHAPES = (
    ((4096, 4096), "float32", (1,), "headline"),
    ((3072, 768), "float32", (64,), "headline"),
    ((3072, 768), "bfloat16", (64,), "headline"),
    ((4096, 4096), "bfloat16", (1,), "sweep"),
    ((4096, 4096), "float32", (16, 64), "sweep"),
    ((3072, 768), "float32", (1, 4, 16, 256), "sweep"),
    ((3072, 768), "bfloat16", (1, 16), "sweep"),
    ((768, 768), "float32", (1, 16), "sweep"),
)


def cases(quick: bool) -> list[Case]:
    kept = [(sparsity, "unstructured") for sparsity in ((0.5, 0.8, 0.9) if quick else SPARSITIES)]
    found = []
    for (N, K), dtype, batches, tier in SHAPES:
        for batch in batches:
            cold = (N, batch) == (4096, 1)
            found.append(
                linear_case(
                    "sliced_linear",
                    fasticl.ops.sliced_linear,
                    N,
                    K,
                    batch,
                    dtype,
                    kept,
                    cache="cold" if cold else "hot",
                    tier=tier,
                    others=(lambda x: [read_only()]) if cold else None,
                )
            )
    return found
