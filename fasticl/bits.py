"""Bits and booleans as the packed formats need them, on any device. Bit k % 8 of byte k // 8 is that of column k."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def expand_bits(bitmask: Tensor, K: int) -> Tensor:
    """``bitmask`` uint8 [N, ceil(K / 8)] as bool [N, K]."""
    # Eight bools are looked up as one int64, which is sooner than shifting.
    table = _bits_of_bytes(bitmask.device).view(torch.int64).flatten()
    bits = table.index_select(0, bitmask.flatten().int()).view(torch.bool)
    return bits.view(bitmask.shape[0], 8 * bitmask.shape[1])[:, :K].contiguous()


def count_bits(bitmask: Tensor) -> Tensor:
    """Set bits of each row, int64 ``[...]`` of uint8 ``[..., bytes]``."""
    table = _bits_of_bytes(bitmask.device).sum(1, dtype=torch.uint8)
    return table.index_select(0, bitmask.flatten().int()).view(bitmask.shape).sum(-1, dtype=torch.int64)


def pack_bits(keep: Tensor) -> Tensor:
    """``keep`` bool [N, K] as uint8 [N, ceil(K / 8)], tail bits 0."""
    if keep.device.type == "cpu":
        return torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8)).view(keep.shape[0], -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(-1, dtype=torch.uint8)


def true_positions(keep: Tensor) -> Tensor:
    """Where True stands in the flattened bool tensor: int64, ascending."""
    if keep.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(keep.numpy()))  # sooner than torch's
    return keep.flatten().nonzero().squeeze(1)


def _bits_of_bytes(device: torch.device) -> Tensor:
    """uint8 [256, 8], on the device."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    return byte[:, None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1
