"""Lossless coding of bfloat16: every bit pattern comes back, trained-like weights become smaller, damage is noticed."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from fasticl import coding


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


@pytest.mark.parametrize("shape", [(65536,), (128, 512), (512, 128), (0,), (0, 7)])
def test_every_bit_pattern_comes_back(shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    weight = torch.randperm(1 << 16)[:count].to(torch.int16).view(torch.bfloat16).view(shape)
    if len(shape) == 2 and shape[0] > shape[1]:
        weight = weight.view(shape[::-1]).T  # any strides
    mantissas, exponents = coding.encode(weight)
    assert mantissas.shape == weight.shape
    assert (mantissas.dtype, exponents.dtype) == (torch.uint8, torch.uint8)
    decoded = coding.decode(mantissas, exponents)
    assert decoded.dtype == torch.bfloat16
    assert torch.equal(bits(decoded), bits(weight.contiguous()))


def test_the_parts_are_those_of_the_documentation() -> None:
    weight = torch.tensor([-1.5, 0.0, 2.0], dtype=torch.bfloat16)  # 1 01111111 1000000, 0, 0 10000000 0000000
    mantissas, exponents = coding.encode(weight)
    assert mantissas.tolist() == [0xC0, 0, 0]
    assert list(zlib.decompress(exponents.numpy().tobytes())) == [127, 0, 128]


def test_normal_weights_shrink_to_their_entropy() -> None:
    weight = (0.02 * torch.randn(1 << 18)).bfloat16()
    mantissas, exponents = coding.encode(weight)
    counts = torch.bincount((bits(weight).int() >> 7) & 0xFF).double()
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * share.log2()).sum()) / 8  # bytes a value
    assert mantissas.numel() == weight.numel()
    assert entropy < exponents.numel() / weight.numel() < 1.05 * entropy


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda stream: stream[:-1], "of 1000 bytes, got one of another size"),
        (lambda stream: stream + b"\0", "of 1000 bytes, got one of another size"),
        (lambda stream: stream[:20] + bytes([stream[20] ^ 1]) + stream[21:], "expected a whole zlib stream, got"),
        (lambda stream: b"", "of 1000 bytes, got one of another size"),
        (lambda stream: zlib.compress(bytes(999)), "of 1000 bytes, got one of another size"),
        (lambda stream: zlib.compress(bytes(1 << 26)), "of 1000 bytes, got one of another size"),
    ],
)
def test_damaged_streams(damage, message: str) -> None:
    mantissas, exponents = coding.encode(torch.randn(1000).bfloat16())
    stream = torch.tensor(list(damage(exponents.numpy().tobytes())), dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        coding.decode(mantissas, stream)


def test_what_of_a_state_is_coded() -> None:
    matrix = torch.randn(64, 64).bfloat16()
    patterns = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).view(256, 256)
    state = {
        "head.weight": matrix,
        "embed.weight": matrix,
        "norm.weight": torch.randn(64).bfloat16(),
        "wide.weight": torch.randn(64, 64),
        "layer.compressed": torch.randn(4096).bfloat16(),
        "layer.bitmask": torch.ones(8, 8, dtype=torch.uint8),
        "copy.weight": matrix,
        "noise.weight": patterns,  # all exponents alike: nothing to gain
    }
    coded = coding.encode_state(state, tied=["head.weight"])
    parts = [f"{name}.{part}" for name in ("embed.weight", "layer.compressed", "copy.weight") for part in coding.PARTS]
    assert set(coded) == {*parts, "norm.weight", "wide.weight", "layer.bitmask", "noise.weight"}
    header = {name: ("U8" if t.dtype == torch.uint8 else "BF16", list(t.shape)) for name, t in coded.items()}
    decoded = coding.decoded_header(header)
    assert decoded["layer.compressed"] == ("BF16", [4096])
    assert decoded["embed.weight"] == ("BF16", [64, 64])
    assert set(decoded) == set(state) - {"head.weight"}
