"""How fast this machine reads memory: the byte roofline of decode, where every weight is read once per token."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from common import Case, Contender, Truth
from environment import cold_bytes
from torch import Tensor

from fasticl.timing import interleaved

ROW = 4096
ROWS = cold_bytes() // (4 * ROW)


@lru_cache(maxsize=1)
def buffer() -> Tensor:
    """Ones ``[ROWS, ROW]``, float32: too many to stay in the cache."""
    return torch.ones(ROWS, ROW)


def readers() -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """Ways to read the buffer once, and what they return; which is fastest depends on the processor."""
    data, ones = buffer(), torch.ones(ROW)
    return {
        "matmul": (lambda: data @ ones, torch.full((ROWS,), float(ROW))),  # follows several rows at a time
        "sum": (data.sum, torch.tensor(float(ROWS * ROW))),
        "max": (data.amax, torch.tensor(1.0)),
    }


@lru_cache(maxsize=1)
def fastest() -> str:
    """The reader that is taken for the roofline on this machine."""
    timings = interleaved({name: call for name, (call, _) in readers().items()}, seconds=0.5)
    return min(timings, key=lambda name: timings[name].ms_p50)


def read_only(reader: str | None = None) -> Contender:
    """Reads the buffer once: by ``reader``, or, as ``read_only``, in the fastest way."""
    call, expected = readers()[reader or fastest()]
    truth = Truth(expected.double(), torch.finfo(torch.float32).eps)
    impl = "read_only" if reader is None else f"read_only_{reader}"
    return Contender(impl, [call], truth, 4 * buffer().numel(), 0, pattern="none")


def cases(quick: bool) -> list[Case]:
    def build() -> list[Contender]:
        return [read_only(), *(read_only(reader) for reader in readers() if reader != fastest())]

    return [Case("bandwidth", "float32", f"{ROWS}x{ROW}", 1, build, "cold", "headline")]
