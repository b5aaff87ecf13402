"""How fast this machine reads memory: the byte roofline of decode, where every weight is read once per token."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from common import Case, Contender, Truth
from environment import last_level_cache_bytes
from torch import Tensor

ROW = 4096
ROWS = max(1, 2 * last_level_cache_bytes() // (4 * ROW))  # what was read last time is gone


@lru_cache(maxsize=1)
def buffer() -> Tensor:
    """Ones ``[ROWS, ROW]``, float32, twice the last-level cache."""
    return torch.ones(ROWS, ROW)


def row_sums(data: Tensor) -> Tensor:
    """``data @ 1``: the fastest reader of the three, as it follows several rows at a time."""
    return data @ torch.ones(ROW)


def read_only(impl: str = "read_only") -> Contender:
    """Reads the buffer once."""
    data = buffer()
    readers: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "read_only": (row_sums, torch.full((ROWS,), float(ROW))),
        "read_only_sum": (torch.sum, torch.tensor(float(ROWS * ROW))),
        "read_only_max": (torch.amax, torch.tensor(1.0)),
    }
    call, expected = readers[impl]
    truth = Truth(expected.double(), torch.finfo(torch.float32).eps)
    return Contender(impl, [partial(call, data)], truth, 4 * data.numel(), 0, pattern="none")


def cases(quick: bool) -> list[Case]:
    def build() -> list[Contender]:
        return [read_only(), read_only("read_only_sum"), read_only("read_only_max")]

    return [Case("bandwidth", "float32", f"{ROWS}x{ROW}", 1, build, "cold", "headline")]
