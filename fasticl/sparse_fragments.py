"""The fragment layout: a 2:4 weight as the sparse tensor cores of a GPU take it (csrc/nm_linear_cuda.cu).

16 outputs are a strip, 64 columns a chunk, and a record holds a strip's values in a chunk and where they stand, 1152
bytes for 1024 positions: 1.125 bytes a position. Records follow each other by strips, then chunks: int32
``[strips, chunks, 288]``, of which lane ``l = 4 g + t`` of a warp reads, for operand A of two
``mma.sp::ordered_metadata.m16n8k32``, the steps 0 and 1:

    words 128 step + 4 l + r  r from 0 to 3: the two values in the four columns from 32 step + 16 (r // 2) + 4 t on of
                              output g + 8 (r % 2), the first in the lower half
    word 256 + l              metadata of step t // 2, which is the selector: four bits for each four of the columns
                              16 t to 16 t + 15, of output g in the lower half and g + 8 in the upper one: the place of
                              the first value, 0 to 3, and above it of the second

Outputs from N and columns from K on hold zeros at places 0 and 1, which are valid metadata. What the portable form
stores is kept bit for bit: -0.0, NaN with its payload, and the zeros of groups that have fewer than two values.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from fasticl.formats import PackedWeight

DTYPES = (torch.bfloat16, torch.float16)
PATTERN = "2:4"
STRIP, CHUNK, LANES = 16, 64, 32  # outputs, columns, lanes
STEPS, REGISTERS = 2, 4  # of a chunk; words of a lane and step
RECORD = STEPS * LANES * REGISTERS + LANES  # words
MAX_TOKENS = 64  # that the kernel takes
_FIRST_TWO = 0b0100  # places 0 and 1


def to_fragments(packed: PackedWeight) -> Tensor:
    """The fragment layout of a 2:4 weight ``[N, K]`` in the portable form: int32 ``[strips, chunks, 288]``, beside it.

    Raises:
        TypeError: the weight is of another dtype than bfloat16 and float16.
        ValueError: it is of another format or pattern, or too large.
    """
    if packed.values.dtype not in DTYPES:
        raise TypeError(f"fragments: expected values of dtype bfloat16 or float16, got {packed.values.dtype}")
    if packed.pattern != PATTERN:
        raise ValueError(f"fragments: expected format nm with pattern {PATTERN}, got {packed.format}, {packed.pattern}")
    N, K = packed.shape
    strips, chunks = -(-N // STRIP), -(-K // CHUNK)
    if strips >= 2**31 or K > 2**27:
        raise ValueError(f"fragments: expected fewer than 2**35 rows and at most 2**27 columns, got {N} x {K}")
    if N == 0 or K == 0:
        return torch.empty((strips, chunks, RECORD), dtype=torch.int32, device=packed.device)
    rows, columns = strips * STRIP - N, chunks * CHUNK - K
    values = packed.values.view(torch.int16).view(N, K // 2)
    if rows or columns or values.data_ptr() % 4:
        values = pad(values, (0, columns // 2, 0, rows))
    metadata = _metadata_of_bytes(values.device).index_select(0, packed.bitmask.flatten().int())
    metadata = metadata.view(packed.bitmask.shape)
    metadata = pad(metadata, (0, columns // 8, 0, rows), value=_FIRST_TWO | _FIRST_TWO << 4)

    fragments = torch.empty((strips, chunks, RECORD), dtype=torch.int32, device=values.device)
    registers, words = _parts(fragments)
    # A word of two values for each four columns: [strip, half, g, chunk, step, quarter, t]
    pairs = values.flatten().view(torch.int32).view(strips, 2, 8, chunks, STEPS, 2, 4)
    registers.copy_(pairs.permute(0, 3, 4, 2, 6, 5, 1))
    # A byte for each eight columns: [strip, half, g, chunk, t, byte]
    words.copy_(metadata.view(strips, 2, 8, chunks, 4, 2).permute(0, 3, 2, 4, 1, 5))
    return fragments


def from_fragments(fragments: Tensor, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """The dense ``[N, K]`` weight, from the values and metadata of the layout."""
    strips, chunks, _ = fragments.shape
    registers, words = _parts(fragments)
    values = registers.permute(0, 6, 3, 1, 2, 5, 4).reshape(strips * STRIP, chunks * CHUNK // 4).view(torch.int16)
    metadata = words.permute(0, 4, 2, 1, 3, 5).reshape(strips * STRIP, chunks * CHUNK // 8)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=fragments.device)
    places = (metadata[..., None] >> shifts & 3).view(strips * STRIP, chunks * CHUNK // 4, 2).long()
    dense = torch.zeros((*places.shape[:2], 4), dtype=torch.int16, device=fragments.device)
    dense.scatter_(2, places, values.view(places.shape))
    return dense.view(strips * STRIP, chunks * CHUNK)[:N, :K].contiguous().view(dtype)


def _parts(fragments: Tensor) -> tuple[Tensor, Tensor]:
    """Views: values int32 ``[strip, chunk, step, g, t, quarter, half]``, metadata uint8 ``[…, g, t, half, byte]``."""
    values, metadata = fragments.split((STEPS * LANES * REGISTERS, LANES), 2)
    return (
        values.unflatten(2, (STEPS, 8, 4, 2, 2)),
        metadata.view(torch.uint8).unflatten(2, (8, 4, 2, 2)),
    )


@cache
def _metadata_of_bytes(device: torch.device) -> Tensor:
    """uint8 [256]: the places of the values of two groups of four columns, by the eight bits of a bitmask.

    Where a group has no bits, as behind the last column, places 0 and 1.
    """
    nibbles = [_FIRST_TWO] * 16
    for first, second in itertools.combinations(range(4), 2):
        nibbles[1 << first | 1 << second] = first | second << 2
    low = torch.tensor(nibbles, dtype=torch.uint8, device=device)
    return (low | low[:, None] << 4).flatten()
