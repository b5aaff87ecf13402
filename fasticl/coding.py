"""Lossless coding of bfloat16 weights for files: exponents, which take few values, are Huffman-coded.

A bfloat16 is a sign, 8 bits of exponent and 7 of mantissa. Signs and mantissas of trained weights are as good as
random and stay as they are, a byte a value; exponents hold few bits of information (Zhang et al., 2025, "70% Size,
100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via Dynamic-Length Float", arXiv 2504.11651), and
fewer where pruning has removed the small values. A tensor called ``p`` is stored as

    p.mantissas   uint8, of p's shape: bit 7 the sign, bits 6 to 0 the mantissa
    p.exponents   uint8 [bytes]: the exponents, a byte a value in p's order, as a zlib stream (RFC 1950), whose checksum
                  notices what was changed
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

PARTS = ("mantissas", "exponents")
_CODED = re.compile(r"\.(weight|compressed)$")  # matrices, and the values of packed ones


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``mantissas`` and ``exponents`` of a bfloat16 tensor, on the CPU."""
    bits = weight.detach().cpu().contiguous().view(torch.int16)
    exponents = (bits >> 7 & 0xFF).to(torch.uint8)
    mantissas = (bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8)
    coder = zlib.compressobj(memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    stream = coder.compress(exponents.numpy().tobytes()) + coder.flush()
    return mantissas, torch.from_numpy(np.frombuffer(stream, np.uint8).copy())


def decode(mantissas: Tensor, exponents: Tensor) -> Tensor:
    """The bfloat16 tensor, on the CPU, bit for bit.

    Raises:
        ValueError: the stream is damaged, or is not that of as many values as there are mantissas.
    """
    count = mantissas.numel()
    decoder = zlib.decompressobj()
    try:  # no more than that is unpacked, whatever the stream holds
        plain = decoder.decompress(exponents.numpy().tobytes(), count + 1)
    except zlib.error as error:
        raise ValueError(f"exponents: expected a whole zlib stream, got {error}") from error
    if len(plain) != count or not decoder.eof or decoder.unused_data:
        raise ValueError(f"exponents: expected a zlib stream of {count} bytes, got one of another size")
    bits = torch.from_numpy(np.frombuffer(plain, np.uint8).astype(np.int16)).view(mantissas.shape) << 7
    return bits.bitwise_or_(mantissas & 0x7F).bitwise_or_((mantissas & 0x80).to(torch.int16) << 8).view(torch.bfloat16)


def encode_state(state: dict[str, Tensor], tied: Collection[str]) -> dict[str, Tensor]:
    """``state`` with its bfloat16 matrices and packed values coded, where that makes them smaller.

    Args:
        tied: names that are not stored where another name has the same memory.
    """
    held: dict[tuple[int, int], str] = {}
    found: dict[str, Tensor] = {}
    coded: list[str] = []
    for name, tensor in sorted(state.items(), key=lambda item: item[0] in tied):
        fits = name.endswith(".compressed") or (tensor.dim() == 2 and name.endswith(".weight"))
        if not (fits and tensor.dtype == torch.bfloat16 and tensor.numel()):
            found[name] = tensor
        elif name not in tied or (tensor.data_ptr(), tensor.numel()) not in held:
            held[tensor.data_ptr(), tensor.numel()] = name
            coded.append(name)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # zlib lets other threads run
        for name, (mantissas, exponents) in zip(coded, pool.map(lambda name: encode(state[name]), coded), strict=True):
            if exponents.numel() < mantissas.numel():
                found |= {f"{name}.mantissas": mantissas, f"{name}.exponents": exponents}
            else:
                found[name] = state[name]
    return found


def decoded_header(header: dict[str, tuple[str, list[int]]]) -> dict[str, tuple[str, list[int]]]:
    """Dtypes and shapes as they are after decoding, from those in a file; only what is no coded tensor is unchanged.

    Raises:
        ValueError: one of the two parts is missing, or has a dtype or shape that it cannot have.
    """
    decoded = dict(header)
    for name in header:
        base, _, part = name.rpartition(".")
        if part not in PARTS or not _CODED.search(base):
            continue
        for part in PARTS:
            dtype, shape = header.get(f"{base}.{part}", ("no such tensor", []))
            if dtype != "U8" or (part == "exponents" and len(shape) != 1):
                raise ValueError(f"{base}.{part}: expected U8, got {dtype} {shape or ''}".rstrip())
        if base in header:
            raise ValueError(f"{base}: expected it coded or as it is, got both")
        decoded.pop(name)
        decoded[base] = ("BF16", header[f"{base}.mantissas"][1])
    return decoded
