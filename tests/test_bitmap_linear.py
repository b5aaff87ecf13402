"""bitmap_linear: what all linear ops must do (linear_cases.py), and what is its own."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close_to_truth, guarded
from linear_cases import DTYPES, LinearCases, Op, dense, exact_in_int8, kernel_edge, kernel_values
from torch import Tensor
from torch.nn import functional as F

import fasticl
from fasticl import _C, PackedWeight
from fasticl.ops import _registry as registry


class TestBitmapLinear(LinearCases):
    @pytest.fixture
    def op(self) -> Op:
        return Op("bitmap_linear", "bitmap")

    def operator_arguments(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        return packed.values, packed.bitmask, packed.row_offsets

    def call_kernel(
        self, x: Tensor, packed: PackedWeight, bias: Tensor | None, activation: str | None, y: Tensor
    ) -> None:
        before, after = kernel_edge(x, y, bias, activation)
        portable = (packed.bitmask.data_ptr(), packed.row_offsets.data_ptr())
        _C.bitmap_linear(*before, *kernel_values(packed.values, packed), *portable, *packed.shape, *after)


@pytest.mark.parametrize("format", ["bitmap", "sliced"])
@pytest.mark.parametrize("value_dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_any_type_times_x_of_any(isa: str, dtype: torch.dtype, value_dtype: torch.dtype, format: str) -> None:
    """No op mixes them yet; the kernels do."""
    values = "int8" if value_dtype == torch.int8 else None
    weight = exact_in_int8(torch.randn(50, 200).masked_fill(torch.rand(50, 200) < 0.5, 0.0))
    packed = fasticl.pack(weight.to(dtype if values else value_dtype), format, values=values)
    bias = torch.randn(50).to(dtype)
    for M in (1, 3, 8, 20, 65):
        x, y = torch.randn(M, 200).to(dtype), torch.full((M, 50), torch.nan, dtype=dtype)
        before, after = kernel_edge(x, y, bias, "silu")
        if format == "sliced":
            stored, *rest = vars(packed.sliced).values()
            layout = (*kernel_values(stored, packed), *(t.data_ptr() for t in rest))
            _C.sliced_linear(*before, 200, *layout, packed.sliced.slice_offsets.shape[0] - 1, *after)
        else:
            portable = (packed.bitmask.data_ptr(), packed.row_offsets.data_ptr(), 50, 200)
            _C.bitmap_linear(*before, *kernel_values(packed.values, packed), *portable, *after)
        truth = dense(x.double(), weight.double(), bias.double(), "silu")
        assert_close_to_truth(y, truth, dense(x.float(), weight, bias.float(), "silu").to(dtype))


@pytest.mark.parametrize("format", ["sliced", "nm"])
def test_takes_the_portable_form_of_other_formats(isa: str, format: str) -> None:
    weight = Op("nm_linear", "nm", "2:4").weight(20, 64)
    other, bitmap = fasticl.pack(weight, format), fasticl.pack(weight, "bitmap")
    for M in (1, 20):
        x = torch.randn(M, 64)
        torch.testing.assert_close(fasticl.ops.bitmap_linear(x, other), fasticl.ops.bitmap_linear(x, bitmap))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_int8_values_do_not_hide_an_invalid_x(bad: float, isa: str) -> None:
    """Its token is not finite in any row; the others are what they are without it, and zeros stay zeros."""
    weight = torch.randn(20, 100) * (torch.rand(20, 100) < 0.5)
    weight[:, 7] = 1.0
    packed = fasticl.pack(weight, "bitmap", values="int8")
    x = torch.randn(3, 100)
    x[2] = 0
    expected = fasticl.ops.bitmap_linear(x, packed)
    x[0, 7] = bad
    found = fasticl.ops.bitmap_linear(x, packed)
    assert not found[0].isfinite().any()
    assert torch.equal(found[1:], expected[1:])
    assert torch.equal(found[2], torch.zeros(20))


def test_infinite_x_where_nothing_is_stored(isa: str) -> None:
    """With many tokens it is skipped; with few it is multiplied by zero, as by the dense layer."""
    weight = torch.randn(30, 64)
    weight[:, 5] = 0
    packed = fasticl.pack(weight, "bitmap")
    for M in (1, 4, 33, 64):
        x = torch.randn(M, 64)
        skipped = fasticl.ops.bitmap_linear(x.index_fill(1, torch.tensor(5), 0.0), packed)
        x[:, 5] = float("inf")
        result = fasticl.ops.bitmap_linear(x, packed)
        if M <= 4:
            assert F.linear(x, weight).isnan().all()
            assert result.isnan().all()
        else:
            assert torch.equal(result, skipped)


def test_inductor_calls_the_kernel() -> None:
    weight, bias = torch.randn(24, 40).masked_fill(torch.rand(24, 40) < 0.5, 0.0), torch.randn(24)
    packed = fasticl.pack(weight, "bitmap")

    def function(x: Tensor) -> Tensor:
        return fasticl.ops.bitmap_linear(x, packed, bias, "gelu")

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    for M in (3, 20):
        x = torch.randn(M, 40)
        assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("format", ["bitmap", "nm"])
def test_unpacks_rows_and_nothing_beside_them(isa: str, format: str, values: str | None) -> None:
    for N, K in ((1, 8), (33, 72), (300, 1096), (5, 64), (4, 0)):
        op = Op("", format, "4:8" if format == "nm" else None)
        weight = op.weight(N, K, 0.5, torch.bfloat16)
        packed = fasticl.pack(weight, format, pattern=op.pattern, values=values)
        for threads, first, end in ((1, 0, N), (3, 0, N), (2, N // 3, N - N // 4)):
            out, check = guarded(torch.full((end - first, K), torch.nan, dtype=torch.bfloat16))
            _C.unpack_rows(
                packed.values.data_ptr(), registry.VALUE_DTYPES[packed.values.dtype], packed.bitmask.data_ptr(),
                0 if format == "nm" else packed.row_offsets.data_ptr(), N, K, packed.values.numel() // N,
                first, end, out.data_ptr(), threads,
            )  # fmt: skip
            check()
            expected = weight if values is None else packed.unpack_values().bfloat16()
            assert torch.equal(out, expected[first:end])
