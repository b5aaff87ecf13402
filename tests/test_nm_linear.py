"""nm_linear: what all linear ops must do (linear_cases.py), and what is its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import assert_close_to_truth
from linear_cases import DTYPES, SHAPES, LinearCases, Op, assert_as_dense, kernel_edge
from torch import Tensor
from torch.nn import functional as F

import fasticl
from fasticl import _C, PackedWeight
from fasticl.formats import PATTERNS


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
        _C.nm_linear(*before, packed.values.data_ptr(), packed.bitmask.data_ptr(), *packed.shape, stored, *after)


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


def test_another_format_is_refused() -> None:
    weight = torch.zeros(4, 16)
    for format in ("bitmap", "sliced"):
        with pytest.raises(ValueError, match=f"nm_linear: weight: expected format nm, got {format}"):
            fasticl.ops.nm_linear(torch.zeros(1, 16), fasticl.pack(weight, format))
