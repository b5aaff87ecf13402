"""``nm_linear`` for the three N:M patterns, all of them 50 % zeros."""

from __future__ import annotations

from common import Case
from linear import linear_case

import fasticl

PATTERNS = ("2:4", "4:8", "8:16")
SHAPES = (
    ((4096, 4096), "float32", (1,), "headline"),
    ((3072, 768), "float32", (1, 16, 64), "sweep"),
    ((4096, 4096), "float32", (16,), "sweep"),
    ((4096, 4096), "bfloat16", (1, 16), "sweep"),
    ((3072, 768), "bfloat16", (1, 16, 64), "sweep"),
)


def cases(quick: bool) -> list[Case]:
    kept = [(0.5, pattern) for pattern in PATTERNS]
    return [
        linear_case(
            "nm_linear",
            fasticl.ops.nm_linear,
            N,
            K,
            batch,
            dtype,
            kept,
            cache="cold" if (N, batch) == (4096, 1) else "hot",
            tier=tier,
        )
        for (N, K), dtype, batches, tier in SHAPES
        for batch in batches
    ]
