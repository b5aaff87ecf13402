"""nm_linear: what all linear ops must do (linear_cases.py), and what is its own."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from helpers import assert_close_to_truth, guarded
from linear_cases import (
    DTYPES,
    SHAPES,
    TOKENS,
    LinearCases,
    Op,
    assert_as_dense,
    exact_in_int8,
    kernel_edge,
    kernel_values,
)
from torch import Tensor
from torch.nn import functional as F

import fasticl
from fasticl import _C, PackedWeight
from fasticl.formats import PATTERNS, from_dense


class TestNmLinear(LinearCases):
    @pytest.fixture
    def op(self) -> Op:
        return Op(
            "nm_linear", "nm", "2:4"
        )  # its K can end anywhere in a byte's half; the kernel sees no other difference

    def operator_arguments(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        return packed.values, packed.bitmask

    def call_kernel(
        self, x: Tensor, packed: PackedWeight, bias: Tensor | None, activation: str | None, y: Tensor
    ) -> None:
        before, after = kernel_edge(x, y, bias, activation)
        stored = packed.values.numel() // packed.shape[0]
        values = kernel_values(packed.values, packed)
        _C.nm_linear(*before, *values, packed.bitmask.data_ptr(), *packed.shape, stored, *after)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", ["4:8", "8:16"])
def test_other_patterns(isa: str, pattern: str, shape: str) -> None:
    op = Op("nm_linear", "nm", pattern)
    for dtype in DTYPES:
        weight = op.weight(*SHAPES[shape], dtype=dtype)
        assert_as_dense(op, torch.randn(65, weight.shape[1]).to(dtype), weight, tokens=(1, 3, 8, 9, 20, 65))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_choice_of_n_among_m(isa: str, pattern: str) -> None:
    """Full groups, as a pruner leaves them, at every place of the n values; the other tests prune further."""
    n, m = map(int, pattern.split(":"))
    choices = torch.tensor(list(itertools.combinations(range(m), n)))  # 6, 70 and 12870
    groups = torch.zeros(len(choices), m).scatter_(1, choices, torch.randn(choices.shape))
    for dtype in DTYPES:
        weight = torch.zeros(len(choices), 2 * m, dtype=dtype)
        weight[:, :m], weight[:, m:] = groups, groups.flip(0)
        packed = fasticl.pack(weight, "nm", pattern=pattern)
        assert packed.values.numel() == len(choices) * 2 * n
        x = torch.randn(9, 2 * m).to(dtype)
        truth, pytorch_result = F.linear(x.double(), weight.double()), F.linear(x, weight)
        for M in (1, 9):
            assert_close_to_truth(fasticl.ops.nm_linear(x[:M], packed), truth[:M], pytorch_result[:M])


DENSE = Op("nm_linear", "dense", values="int8")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_int8_values(isa: str, shape: str, dtype: torch.dtype) -> None:
    weight = DENSE.weight(*SHAPES[shape], 1.0, dtype)
    weight *= 2.0 ** torch.randint(-4, 5, (len(weight), 1))
    x = torch.randn(max(TOKENS), weight.shape[1]).to(dtype)
    assert_as_dense(DENSE, x, weight, tokens=TOKENS)
    assert_as_dense(DENSE, x, weight, torch.randn(len(weight)).to(dtype), "gelu", tokens=(1, 3, 8, 9, 20, 65))


@pytest.mark.parametrize("K", [64, 165])
@pytest.mark.parametrize("shift", [0, 1])
def test_dense_int8_values_between_guards(isa: str, shift: int, K: int) -> None:
    weight = exact_in_int8(torch.randn(83, K))
    values, scales = DENSE.pack(weight).values, DENSE.pack(weight).scales
    (values, check_values), (scales, check_scales) = guarded(values, shift=shift), guarded(scales, shift=shift)
    for M in (1, 2, 4, 8, 9, 65):
        x, check = guarded(torch.randn(M, K), shift=shift)
        y = fasticl.ops.nm_linear(x, from_dense(values, scales), None, "relu")
        assert_close_to_truth(y, F.linear(x.double(), weight.double()).relu(), F.linear(x, weight).relu())
        check()
    check_values()
    check_scales()


def test_dense_empty_sizes_and_operator() -> None:
    bias = torch.randn(5)
    result = DENSE(torch.zeros(3, 0), DENSE.pack(torch.zeros(5, 0)), bias, "silu")
    torch.testing.assert_close(result, F.silu(bias).expand(3, 5))
    assert DENSE(torch.zeros(3, 8), DENSE.pack(torch.zeros(0, 8))).shape == (3, 0)
    packed, x = DENSE.pack(torch.randn(5, 24)), torch.randn(2, 3, 24)
    arguments = (x, packed.values, None, bias, "silu")
    torch.library.opcheck(DENSE.overload, arguments, {"scales": packed.scales})
    wide = dataclasses.replace(packed, scales=packed.scales.double())
    expected = F.linear(x.double(), packed.unpack_values().double() * wide.scales[:, None], bias.double())
    torch.testing.assert_close(DENSE(x.double(), wide, bias.double()), expected)


def test_another_format_is_refused() -> None:
    weight = torch.zeros(4, 16)
    for format in ("bitmap", "sliced"):
        with pytest.raises(ValueError, match=f"nm_linear: weight: expected format nm or dense, got {format}"):
            fasticl.ops.nm_linear(torch.zeros(1, 16), fasticl.pack(weight, format))
