"""The fragment layout of 2:4 weights: every bit comes back, and stands where the instruction looks for it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import BITS, random_bits, same_bits, special_values
from torch import Tensor

import fasticl
from fasticl import sparse_fragments
from fasticl.device_layouts import DeviceLayouts
from fasticl.sparse_fragments import from_fragments, to_fragments

DTYPES = sparse_fragments.DTYPES
SHAPES = [(1, 4), (16, 64), (33, 76), (32, 128), (5, 200), (40, 700), (0, 8), (5, 0)]


def two_of_four(N: int, K: int) -> Tensor:
    """Which of four columns: two, anywhere."""
    return torch.rand(N, K // 4, 4).argsort(-1).argsort(-1).view(N, K) < 2


def fragments_of(weight: Tensor) -> Tensor:
    return to_fragments(fasticl.pack(weight, "nm", pattern="2:4"))


def decoded(fragments: Tensor) -> dict[tuple[int, int], int]:
    """``{(row, column): the 16 bits of its value}`` of all that is stored, padding too.

    Read lane by lane as the text of sparse_fragments.py says, in plain Python: no line is shared with what it checks.
    """
    found = {}
    for strip, chunks in enumerate(fragments.tolist()):
        for chunk, words in enumerate(chunks):
            for step, lane, r in itertools.product(range(2), range(32), range(4)):
                g, t = lane // 4, lane % 4
                pair = words[128 * step + 4 * lane + r]
                row, column = 8 * (r % 2), 32 * step + 16 * (r // 2) + 4 * t
                # The lane of the same rows that has the metadata of these columns, and their four bits.
                metadata = words[256 + 4 * g + column // 16] >> 2 * row >> column % 16
                first, second = metadata & 3, metadata >> 2 & 3
                assert first < second
                for half, place in enumerate((first, second)):
                    bits = pair >> 16 * half & 0xFFFF
                    found[16 * strip + row + g, 64 * chunk + column + place] = bits - 2**16 * (bits >> 15)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_comes_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    N, K = shape
    weight = random_bits(N, K, dtype).masked_fill(~two_of_four(N, K), 0.0)
    assert same_bits(from_fragments(fragments_of(weight), N, K, dtype), weight)


@settings(max_examples=30)
@given(data=st.data())
def test_any_weight_is_as_the_text_says(data: st.DataObject) -> None:
    """Groups of two, one and no values; past the last row and column, zeros with valid metadata."""
    N, K = data.draw(st.integers(0, 40), "N"), 4 * data.draw(st.integers(0, 50), "groups")
    dtype, density = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.sampled_from([0.0, 0.5, 1.0]), "density")
    weight = random_bits(N, K, dtype).masked_fill(~two_of_four(N, K) | (torch.rand(N, K) >= density), 0.0)
    packed = fasticl.pack(weight, "nm", pattern="2:4")
    fragments = to_fragments(packed)
    assert list(fragments.shape) == [-(-N // 16), -(-K // 64), 288]
    found = decoded(fragments)
    assert len(found) == fragments.shape[0] * 16 * fragments.shape[1] * 32
    inside = {place: bits for place, bits in found.items() if place[0] < N and place[1] < K}
    bits = weight.view(BITS[dtype])
    assert inside == {(n, k): int(bits[n, k]) for n, k in packed.keep.nonzero().tolist()}
    assert not any(bits for place, bits in found.items() if place not in inside)
    assert same_bits(from_fragments(fragments, N, K, dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_come_back(dtype: torch.dtype) -> None:
    """-0.0, denormals, infinities and NaN with payloads."""
    special = special_values(dtype)
    weight = torch.zeros(18, 4 * len(special), dtype=dtype)
    for row, groups in enumerate(weight.view(18, -1, 4)):
        groups[:, row % 4] = special
    weight[17, 1] = -0.0
    assert same_bits(from_fragments(fragments_of(weight), *weight.shape, dtype), weight)


def test_values_that_begin_anywhere() -> None:
    """Values of a checkpoint may begin at an odd element of their storage."""
    weight = torch.randn(16, 64).half().masked_fill(~two_of_four(16, 64), 0.0)
    packed = fasticl.pack(weight, "nm", pattern="2:4")
    moved = torch.cat((packed.values[:1], packed.values))[1:]
    assert torch.equal(to_fragments(dataclasses.replace(packed, values=moved)), to_fragments(packed))


def test_bytes() -> None:
    weight = torch.randn(32, 192).half().masked_fill(~two_of_four(32, 192), 0.0)
    assert fragments_of(weight).nbytes == 1.125 * weight.numel()


def test_errors_name_expected_and_got() -> None:
    weight = torch.zeros(16, 64)
    with pytest.raises(TypeError, match=r"expected values of dtype bfloat16 or float16, got torch\.float32"):
        to_fragments(fasticl.pack(weight, "nm", pattern="2:4"))
    with pytest.raises(ValueError, match="expected format nm with pattern 2:4, got nm, 4:8"):
        to_fragments(fasticl.pack(weight.half(), "nm", pattern="4:8"))
    with pytest.raises(ValueError, match="expected format nm with pattern 2:4, got bitmap, None"):
        to_fragments(fasticl.pack(weight.half(), "bitmap"))


def test_what_is_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU nothing; a packed weight that has the layout counts its bytes and sees whether it is its own."""
    packed = fasticl.pack(torch.randn(20, 100).half().masked_fill(~two_of_four(20, 100), 0.0), "nm", pattern="2:4")
    assert packed.layouts is None
    fragments = to_fragments(packed)
    held = dataclasses.replace(packed, layouts=DeviceLayouts(fragments=fragments)).validate()
    assert held.bytes_read == fragments.nbytes
    assert held.bytes == packed.bytes + fragments.nbytes
    wrong = fragments.clone()
    wrong[0, 0, 0] += 1
    with pytest.raises(ValueError, match="fragments: expected what the portable form gives"):
        dataclasses.replace(packed, layouts=DeviceLayouts(fragments=wrong)).validate()
    assert held.to("cpu").layouts is None
