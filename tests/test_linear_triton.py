"""The Triton kernels of bitmap_linear, nm_linear and sliced_linear: parity with float64, nothing out of bounds."""

from __future__ import annotations

import dataclasses
import importlib
import itertools

import pytest
import torch
from helpers import assert_close_to_truth
from linear_cases import ACTIVATIONS, DTYPES, Op, dense, double
from torch import Tensor
from torch.nn import functional as F
from triton_device import DEVICE, INTERPRETED

import fasticl
from fasticl import PackedWeight
from fasticl.kernels import _common
from fasticl.testing import interpreter
from fasticl.testing.interpreter import checked

OPS = {
    "bitmap": Op("bitmap_linear", "bitmap"),
    "2:4": Op("nm_linear", "nm", "2:4"),
    "4:8": Op("nm_linear", "nm", "4:8"),
    "8:16": Op("nm_linear", "nm", "8:16"),
    "sliced": Op("sliced_linear", "sliced"),
}
# (N, K) and why; the widest tiles have 64 rows and 256 columns, a group of permuted values 16 columns, a slice 16 rows.
SHAPES = {
    "one_row": (1, 100),
    "one_column": (18, 1),
    "k_within_a_byte": (16, 5),
    "k_of_no_multiple": (33, 75),
    "k_of_4_not_8": (20, 76),
    "k_of_8_not_16": (20, 120),
    "whole_tiles": (64, 256),
    "several_tiles": (40, 270),
}
TOKENS = (1, 3, 9, 20)  # one, a few, more than the sliced layout takes, more than the smallest tile
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def launch(
    op: Op, x: Tensor, packed: PackedWeight, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    packed = packed.to(DEVICE)
    portable = [packed.values, packed.bitmask, packed.row_offsets]
    operands = {
        "bitmap": portable,
        "nm": portable[:2],
        "sliced": [*portable, *(vars(packed.sliced).values() if packed.sliced else ())],
    }[op.format]
    kernel = importlib.import_module(f"fasticl.kernels.{op.name}")
    with checked():
        return kernel.launch(x.to(DEVICE), *operands, None if bias is None else bias.to(DEVICE), activation).cpu()


def assert_as_dense(
    op: Op, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, tokens=(None,)
) -> None:
    packed = op.pack(weight)
    truth = dense(x.double(), weight.double(), double(bias), activation)
    pytorch_result = dense(x, weight, bias, activation)
    for M in tokens:
        assert_close_to_truth(launch(op, x[:M], packed, bias, activation), truth[:M], pytorch_result[:M])


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [OPS[name] for name in ("bitmap", "8:16", "sliced")], ids=["bitmap", "8:16", "sliced"])
def test_shapes_and_tokens(op: Op, shape: str, dtype: torch.dtype) -> None:
    N, K = SHAPES[shape]
    weight = op.weight(N, K, dtype=dtype)
    x = torch.randn(max(TOKENS), weight.shape[1]).to(dtype)
    assert_as_dense(op, x, weight, torch.randn(N).to(dtype), tokens=TOKENS)


@dtypes
@pytest.mark.parametrize(("pattern", "K"), [("2:4", 76), ("2:4", 20), ("4:8", 120), ("4:8", 8)])
def test_other_patterns_where_no_group_of_16_ends(pattern: str, K: int, dtype: torch.dtype) -> None:
    weight = OPS[pattern].weight(20, K, dtype=dtype)
    assert_as_dense(OPS[pattern], torch.randn(20, K).to(dtype), weight, tokens=(1, 9, 20))


@ops
def test_more_tokens_than_a_tile(op: Op) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = op.weight(33, 70, dtype=dtype)
        assert_as_dense(op, torch.randn(70, weight.shape[1]).to(dtype), weight)


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
@ops
def test_densities(op: Op, density: float) -> None:
    weight = op.weight(40, 200, density)
    assert_as_dense(op, torch.randn(20, weight.shape[1]), weight, tokens=(1, 5, 20))


@ops
def test_rows_of_very_different_length(op: Op) -> None:
    N, K = 50, op.columns(140)
    keep = (torch.rand(N, 1) < 0.3).expand(N, K).clone()
    keep[:20] = False
    keep[-10:] = True
    assert_as_dense(op, torch.randn(20, K), op.prune(torch.randn(N, K), keep), tokens=(1, 5, 20))


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("op", [OPS["bitmap"], OPS["sliced"]], ids=["bitmap", "sliced"])
def test_activations(op: Op, activation: str | None, dtype: torch.dtype) -> None:
    weight = op.weight(30, 40, dtype=dtype)
    x = torch.randn(20, 40).to(dtype)
    assert_as_dense(op, x, weight, torch.randn(30).to(dtype), activation, tokens=(1, 5, 20))
    assert_as_dense(op, x, weight, None, activation, tokens=(1,))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16"])
def test_every_choice_of_n_among_m(pattern: str) -> None:
    """Full groups, at every place of the n values: 6, 70 and, of 12870, every 41st."""
    op, (n, m) = OPS[pattern], map(int, pattern.split(":"))
    choices = torch.tensor(list(itertools.combinations(range(m), n)))[:: 41 if m == 16 else 1]
    groups = torch.zeros(len(choices), m).scatter_(1, choices, torch.randn(choices.shape))
    weight = torch.cat((groups, groups.flip(0)), 1).bfloat16()
    assert_as_dense(op, torch.randn(20, 2 * m).bfloat16(), weight, tokens=(1, 20))


@ops
def test_empty_sizes(op: Op) -> None:
    K, bias = op.columns(24), torch.randn(5)
    for M in (1, 20):
        result = launch(op, torch.zeros(M, 0), op.pack(torch.zeros(5, 0)), bias, "silu")
        torch.testing.assert_close(result, F.silu(bias).expand(M, 5))
        assert launch(op, torch.randn(M, K), op.pack(torch.zeros(0, K)), torch.zeros(0)).shape == (M, 0)
    packed = op.pack(op.weight(5, K))
    for batch in ((0,), (2, 0), (0, 3)):
        assert launch(op, torch.randn(*batch, K), packed, bias, "relu").shape == (*batch, 5)


@ops
def test_batch_dimensions_strides_and_alignment(op: Op) -> None:
    dtype = torch.bfloat16
    weight, bias = op.weight(19, 50, dtype=dtype), torch.randn(19).to(dtype)
    packed, K = op.pack(weight), weight.shape[1]
    x = torch.randn(2, 3, K).to(dtype)
    result = launch(op, x, packed, bias)
    assert result.shape == (2, 3, 19)
    assert torch.equal(result.view(6, 19), launch(op, x.view(6, K), packed, bias))
    buffer = torch.randn(6 * 3 * K + 1).to(dtype)
    rows = buffer[:-1].view(6, 3 * K)
    for view in (rows[:, :K], rows[:, ::3], rows[:1, :K].expand(6, K), buffer[1 : 6 * K + 1].view(6, K)):
        assert torch.equal(launch(op, view, packed, bias), launch(op, view.clone().contiguous(), packed, bias))
    strided_bias = torch.stack((bias, bias + 1), 1)[:, 0]
    assert torch.equal(launch(op, x, packed, strided_bias), result)


@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_values_at_odd_addresses(pattern: str) -> None:
    """They cannot be loaded as words of two."""
    op = OPS[pattern]
    weight = op.weight(20, 64, dtype=torch.bfloat16)
    packed = op.pack(weight)
    moved = torch.cat((torch.full((1,), torch.nan, dtype=torch.bfloat16), packed.values))[1:]
    x = torch.randn(3, 64).bfloat16()
    result = launch(op, x, dataclasses.replace(packed, values=moved))
    assert_close_to_truth(result, dense(x.double(), weight.double()), dense(x, weight))


@ops
def test_tf32_where_torch_allows_it(op: Op) -> None:
    weight = op.weight(40, 128)
    x, packed = torch.randn(20, 128), op.pack(weight)
    exact = launch(op, x, packed)
    torch.set_float32_matmul_precision("high")
    try:
        result = launch(op, x, packed)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not torch.equal(result, exact)
    assert_close_to_truth(result, dense(x.double(), weight.double()), dense(x.bfloat16(), weight.bfloat16()).float())


@ops
def test_a_nan_stays_in_its_token_and_is_not_lost(op: Op) -> None:
    weight = op.weight(40, 64)
    column = int(weight.count_nonzero(0).argmax())
    packed = op.pack(weight)
    for M in (1, 4, 20):
        x = torch.randn(M, 64)
        clean = launch(op, x, packed)
        x[M // 2, column] = torch.nan
        result = launch(op, x, packed)
        others = torch.arange(M) != M // 2
        assert torch.equal(result[others], clean[others])
        assert result[M // 2, weight[:, column] != 0].isnan().all()


def test_last_columns_of_the_widest_sliced_weight() -> None:
    """Windows start at 16-bit columns."""
    weight = torch.zeros(17, 65535)
    weight[:, -40:] = torch.randn(17, 40)
    assert_as_dense(OPS["sliced"], torch.randn(2, 65535), weight)


def test_bitmap_takes_the_portable_form_of_other_formats() -> None:
    weight = OPS["2:4"].weight(20, 64)
    x = torch.randn(3, 64)
    expected = launch(OPS["bitmap"], x, fasticl.pack(weight, "bitmap"))
    for format in ("sliced", "nm"):
        torch.testing.assert_close(launch(OPS["bitmap"], x, fasticl.pack(weight, format)), expected)


@pytest.mark.skipif(not INTERPRETED, reason="the compiler of another GPU is needed")
@pytest.mark.parametrize("M", [1, 9])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_without_the_assembly_of_nvidia(op: Op, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on AMD: bits are counted and bytes permuted by arithmetic."""
    monkeypatch.setattr(_common, "is_hip", lambda: True)
    monkeypatch.setattr(interpreter, "_twins", {})
    K = op.columns(120)
    assert_as_dense(op, torch.randn(M, K).bfloat16(), op.weight(20, K, dtype=torch.bfloat16))
