"""sliced_linear: what all linear ops must do (linear_cases.py), and what is its own."""

from __future__ import annotations

import pytest
import torch
from linear_cases import DTYPES, LinearCases, Op, assert_as_dense, kernel_edge, kernel_values
from torch import Tensor

import fasticl
from fasticl import _C, PackedWeight

SLICED = Op("sliced_linear", "sliced")


class TestSlicedLinear(LinearCases):
    @pytest.fixture
    def op(self) -> Op:
        return SLICED

    def operator_arguments(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        assert packed.sliced is not None
        return packed.values, packed.bitmask, packed.row_offsets, *vars(packed.sliced).values()

    def call_kernel(
        self, x: Tensor, packed: PackedWeight, bias: Tensor | None, activation: str | None, y: Tensor
    ) -> None:
        assert packed.sliced is not None
        before, after = kernel_edge(x, y, bias, activation)
        values, *rest = vars(packed.sliced).values()
        layout = (*kernel_values(values, packed), *(t.data_ptr() for t in rest))
        _C.sliced_linear(*before, packed.shape[1], *layout, packed.sliced.slice_offsets.shape[0] - 1, *after)


@pytest.mark.parametrize("gap", [31, 32, 33])
def test_columns_at_the_edge_of_a_window(isa: str, gap: int) -> None:
    """A step takes columns within 32 of its first: rows whose columns lie just inside and just outside of that."""
    keep = torch.zeros(20, 200, dtype=torch.bool)
    for row in range(20):
        keep[row, row % 3 :: gap] = True
    for dtype in DTYPES:
        weight = SLICED.prune(torch.randn(20, 200).to(dtype), keep)
        assert_as_dense(SLICED, torch.randn(8, 200).to(dtype), weight, tokens=(1, 2, 4, 8))


def test_last_columns_of_the_widest_weight(isa: str) -> None:
    """Windows start at 16-bit columns."""
    weight = torch.zeros(17, 65535)
    weight[:, -40:] = torch.randn(17, 40)
    assert_as_dense(SLICED, torch.randn(2, 65535), weight)


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="sliced_linear: weight: expected format sliced, got bitmap"):
        fasticl.ops.sliced_linear(torch.zeros(1, 16), fasticl.pack(torch.zeros(4, 16), "bitmap"))
