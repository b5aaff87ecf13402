"""A short benchmark of this machine: each op against PyTorch's dense layer, checked, then timed.

The repository's benchmarks/ measure all cases, against every baseline, with weights out of the cache. Here the weights
stay wherever repeated calls leave them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import fasticl
from fasticl.timing import interleaved


class WrongResult(RuntimeError):
    """An op's result is further from the float64 one than rounding explains."""


@dataclass(frozen=True)
class Case:
    """``shape`` is N x K of a linear, or L x d x m of ``attention_mlp``; ``pattern`` that of the zeros."""

    op: str
    shape: tuple[int, ...]
    batch: int
    sparsity: float | None = None
    pattern: str | None = None

    def __str__(self) -> str:
        zeros = "" if self.sparsity is None else f", {self.sparsity:.0%} {self.pattern}"
        return f"{self.op} {'x'.join(map(str, self.shape))}, batch {self.batch}{zeros}"


CASES = (
    Case("bitmap_linear", (4096, 4096), 1, 0.5, "unstructured"),  # decode: bound by the bytes of the weight
    Case("bitmap_linear", (4096, 4096), 1, 0.8, "unstructured"),
    Case("bitmap_linear", (3072, 768), 64, 0.8, "unstructured"),  # prefill: bound by arithmetic
    Case("sliced_linear", (4096, 4096), 1, 0.9, "unstructured"),
    Case("sliced_linear", (3072, 768), 64, 0.9, "unstructured"),
    Case("nm_linear", (4096, 4096), 1, 0.5, "2:4"),
    Case("attention_mlp", (512, 64, 256), 64),
)
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def run(
    ops: list[str], dtype: torch.dtype, device: str, seed: int, seconds: float = 2.0
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case of ``ops`` with its JSON-ready row, as it is measured.

    Args:
        seconds: of timing for each case.

    Raises:
        WrongResult: from the case whose result is wrong; it is not timed.
    """
    for case in CASES:
        if case.op in ops:
            generator = torch.Generator().manual_seed(seed)
            make = _attention_mlp if case.op == "attention_mlp" else _linear
            yield case, _measure(case, *make(case, dtype, device, generator), seconds=seconds)


Contenders = tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]  # FastICL, PyTorch, float64 truth


def _linear(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Contenders:
    N, K = case.shape
    weight = torch.randn(N, K, generator=generator)
    x = torch.randn(case.batch, K, generator=generator).to(device, dtype)
    if case.pattern == "2:4":
        keep = torch.zeros(N, K // 4, 4, dtype=torch.bool)
        keep.scatter_(2, weight.abs().unflatten(1, (-1, 4)).topk(2, dim=2).indices, True)
        weight = weight.masked_fill(~keep.flatten(1), 0.0)
    else:
        threshold = weight.abs().flatten().kthvalue(round((case.sparsity or 0.0) * N * K)).values
        weight = weight.masked_fill(weight.abs() <= threshold, 0.0)
    weight = weight.to(device, dtype)
    format = case.op.removesuffix("_linear")
    packed = fasticl.pack(weight, format, pattern="2:4") if format == "nm" else fasticl.pack(weight, format)
    op = getattr(fasticl.ops, case.op)
    return (lambda: op(x, packed)), (lambda: linear(x, weight)), (lambda: linear(x.double(), weight.double()))


def _attention_mlp(case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Contenders:
    (L, d, m), B = case.shape, case.batch

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    inputs = (normal(B, L, d), normal(B, d), normal(d, d, scale=1 / d), normal(m, d, scale=d**-0.5), normal(m))

    def eager(context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor) -> Tensor:
        attention = torch.softmax(torch.bmm(context, (query @ A.T).unsqueeze(2)).squeeze(2), dim=1)
        return torch.relu(torch.bmm(attention.unsqueeze(1), context).squeeze(1) @ W.T) @ a

    exact = [tensor.double() for tensor in inputs]
    return (lambda: fasticl.ops.attention_mlp(*inputs)), (lambda: eager(*inputs)), (lambda: eager(*exact))


@torch.inference_mode()
def _measure(
    case: Case,
    ours: Callable[[], Tensor],
    dense: Callable[[], Tensor],
    truth: Callable[[], Tensor],
    *,
    seconds: float,
) -> dict[str, Any]:
    expected = truth()
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    error, dense_error = (float((y().double() - expected).abs().max() / scale) for y in (ours, dense))
    output = ours()
    # Twice PyTorch's own error, and one rounding for where PyTorch happens to be exact.
    tolerance = 2 * dense_error + torch.finfo(output.dtype).eps
    if not error <= tolerance:
        raise WrongResult(f"{case}: expected a relative error of at most {tolerance:.2e}, got {error:.2e}")
    synchronize = torch.cuda.synchronize if output.device.type == "cuda" else None
    timings = interleaved({"fasticl": ours, "torch": dense}, seconds=seconds, synchronize=synchronize)
    return {
        "op": case.op,
        "shape": "x".join(map(str, case.shape)),
        "batch": case.batch,
        "sparsity": case.sparsity,
        "pattern": case.pattern,
        "dtype": str(output.dtype).removeprefix("torch."),
        "relative_error": error,
        "torch_relative_error": dense_error,
        "fasticl_ms": timings["fasticl"].ms_p50,
        "torch_ms": timings["torch"].ms_p50,
        "speedup": timings["torch"].ms_p50 / timings["fasticl"].ms_p50,
    }
