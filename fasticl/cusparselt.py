"""2:4 weights by cuSPARSELt, as PyTorch has it: one more way to compute ``nm_linear`` on CUDA, for many tokens.

Nothing takes it by default: a weight gets its copy, 1.125 bytes a position, where the table of its GPU
(:mod:`fasticl.tuned`) found cuSPARSELt the fastest at some number of tokens. It was not measured yet.

``torch._cslt_compress`` and ``torch._cslt_sparse_mm`` are what torch.sparse.SparseSemiStructuredTensorCUSPARSELT calls.
That class itself does not fit: an op of torch.library takes tensors, not a subclass around them, and in older torch it
returns y as a transposed view, which a copy would have to put in order.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fasticl import tuned

if TYPE_CHECKING:
    from fasticl.formats import PackedWeight

NAME = "cuSPARSELt"  # among the implementations of nm_linear
DTYPES = (torch.bfloat16, torch.float16)
PATTERN = "2:4"
MULTIPLE = 16  # that rows and columns of a weight are of, in 16 bits
TOKENS = 8  # x is filled up to a multiple
ALIGNMENT = 16  # bytes, of all operands

_runs: dict[torch.device, bool] = {}


def built() -> bool:
    """Whether this torch has the library. ROCm's in its place, hipSPARSELt, is not used."""
    return torch.version.hip is None and torch.backends.cusparselt.is_available()


def runs_on(device: torch.device) -> bool:
    """Whether the library takes this CUDA device; it is asked once, and warns where it should and does not.

    The first device of a process that it takes remains the only one: torch opens the library once a thread, for the
    device of the first call, and products on another one fail (fixed by pytorch 189048, after torch 2.13).
    """
    if device.type != "cuda" or not built() or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if device not in _runs:
        _runs[device] = not any(_runs.values()) and _answers(device)
    return _runs[device]


def _answers(device: torch.device) -> bool:
    try:
        x = torch.zeros(64, 64, dtype=DTYPES[0], device=device)
        with torch.cuda.device_of(x):
            linear(x, torch._cslt_compress(x), None)
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        warnings.warn(f"cuSPARSELt is not used on {device}: {reason}", stacklevel=4)
        return False
    return True


def to_compressed(packed: PackedWeight) -> Tensor:
    """The library's layout of a 2:4 weight ``[N, K]`` on a CUDA device; what it holds is the library's own matter.

    Its values are the two of each four columns, and zeros, of whichever columns, where there are fewer; of -0.0 the
    sign may go.

    Raises:
        TypeError: the weight is of another dtype than bfloat16 and float16.
        ValueError: it is of another format or pattern, or N or K is 0 or no multiple of 16.
    """
    if packed.values.dtype not in DTYPES:
        raise TypeError(f"compressed: expected values of dtype bfloat16 or float16, got {packed.values.dtype}")
    if packed.pattern != PATTERN:
        raise ValueError(
            f"compressed: expected format nm with pattern {PATTERN}, got {packed.format}, {packed.pattern}"
        )
    if not _fits(*packed.shape):
        raise ValueError(f"compressed: expected shape of positive multiples of {MULTIPLE}, got {list(packed.shape)}")
    dense = packed.unpack()
    with torch.cuda.device_of(dense):
        return torch._cslt_compress(dense)


def _fits(N: int, K: int) -> bool:
    return min(N, K) > 0 and N % MULTIPLE == K % MULTIPLE == 0


def derive_compressed(packed: PackedWeight) -> Tensor | None:
    """The library's layout, or None: where it does not take the weight or its device, or the table never picks it."""
    N, K = packed.shape
    if packed.pattern != PATTERN or packed.values.dtype not in DTYPES or not _fits(N, K):
        return None
    if not tuned.picks("nm_linear", NAME, packed.values, N, K, packed.density) or not runs_on(packed.device):
        return None
    return to_compressed(packed)


def linear(x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
    """``y = x @ W.T + bias``, ``[..., N]`` in x's dtype: float32 sums, rounded once.

    Args:
        x: ``[..., K]`` of the weight's dtype, any strides.
        compressed: of ``W [N, K]``, by :func:`to_compressed`.
    """
    K = x.shape[-1]
    M = math.prod(x.shape[:-1])
    # The library is told that x^T is K x M with K elements from column to column, whatever its strides say.
    rows = x.reshape(M, K).contiguous()
    if M % TOKENS:
        rows = pad(rows, (0, 0, 0, -M % TOKENS))
    bias = None if bias is None else _aligned(bias.contiguous())
    y = torch._cslt_sparse_mm(compressed, _aligned(rows).t(), bias=bias, transpose_result=True)
    return y[:M].view(*x.shape[:-1], y.shape[1])


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
