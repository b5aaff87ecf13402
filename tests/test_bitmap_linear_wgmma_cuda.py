"""The Hopper kernel of bitmap_linear, executed on the CPU; and, on a Hopper GPU, compiled, by the same tests."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from cuda_cases import DTYPES, ON_CPU, Kernels, Op, pruned
from helpers import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import dense
from test_bitmap_linear_cuda import LaneStreamCases, LaneStreamKernels
from torch import Tensor

import fasticl
from fasticl import tuned
from fasticl.device_layouts import DeviceLayouts
from fasticl.lane_stream import LaneStream, to_lanes

ops = importlib.import_module("fasticl.ops.bitmap_linear")
ON_HOPPER = torch.cuda.is_available() and ops.has_wgmma(torch.empty(1, device="cuda"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not ON_HOPPER, reason="no Hopper GPU"))]
# (N, K), splits, and why
SHAPES = {
    "one_row": (1, 100, 1),
    "one_column": (70, 1, 1),
    "a_block_of_whole_chunks": (192, 128, 2),
    "n_and_k_of_no_multiple": (33, 75, 1),
    "two_blocks_of_outputs": (200, 200, 3),
    "more_splits_than_chunks": (20, 150, 8),
    "shares_of_unequal_length": (16, 64 * 7, 4),
    "several_shares_a_block": (40, 64 * 23, 16),
    "the_ring_wraps": (16, 64 * 40, 1),
}
# Tokens and why: one and several tiles of 64, of 128 and of 256, full or not.
TOKENS = (1, 17, 64, 65, 128, 129, 256, 257)


class WgmmaKernels(LaneStreamKernels):
    tokens = (70, 17)
    plans = ({"splits": 2}, {"splits": 8})

    def workspace_bytes(self, M: int, K: int, lanes: LaneStream) -> int:
        return self.module.bitmap_linear_wgmma_workspace(M, len(lanes.masks), K, lanes.splits, 0)

    def launch(self, before: tuple, lanes: LaneStream, N: int, K: int, workspace: Tensor, after: tuple) -> None:
        super().launch(before, lanes, N, K, workspace, (*after, True))


@pytest.fixture(params=DEVICES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return WgmmaKernels(request.param)


class TestWgmmaKernel(LaneStreamCases):
    pass


# ---- parity with the float64 truth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(kernels: Kernels, shape: str, dtype: torch.dtype) -> None:
    N, K, splits = SHAPES[shape]
    weight, bias = pruned(N, K, 0.5, dtype), torch.randn(N).to(dtype)
    for M, seed in ((5, 0), (20, 1)):
        kernels.set_seed(seed)
        kernels.assert_as_dense(torch.randn(M, K).to(dtype), weight, bias, splits=splits, blocks=1 + (splits > 8))


@pytest.mark.parametrize("M", TOKENS)
def test_tokens(kernels: Kernels, M: int) -> None:
    for dtype, K, splits in zip(DTYPES, (192, 100), (1, 2), strict=True):
        kernels.assert_as_dense(torch.randn(M, K).to(dtype), pruned(20, K, 0.4, dtype), splits=splits)


@pytest.mark.parametrize("density", [0.0, 0.005, 0.1, 0.9, 1.0])
def test_densities(kernels: Kernels, density: float) -> None:
    """From pairs of chunks that add no row, so that all slots are under way, to those that add 32."""
    for seed, dtype in enumerate(DTYPES):
        kernels.set_seed(seed)
        kernels.assert_as_dense(torch.randn(3, 1500).to(dtype), pruned(40, 1500, density, dtype), splits=1)


def test_lanes_of_very_different_length(kernels: Kernels) -> None:
    """Lanes that lag skip ahead, within each share and between them, and the ring is full of one lane's values."""
    N, K = 32, 64 * 24
    keep = torch.zeros(N, K, dtype=torch.bool)
    keep.view(N, -1, 4, 16)[:, :, 2] = True
    keep.view(N, -1, 4, 16)[:, [7, 12, 23], 1] = True
    keep[5] = True
    weight = torch.randn(N, K).bfloat16().masked_fill(~keep, 0.0)
    for splits, seed in ((1, 0), (3, 1), (8, 2)):  # copies land, and products are added, late, early, or as drawn
        kernels.set_seed(seed)
        kernels.assert_as_dense(torch.randn(8, K).bfloat16(), weight, splits=splits)


@ON_CPU
@settings(max_examples=15)
@given(data=st.data())
def test_any_shape_and_mask(kernels: Kernels, data: st.DataObject) -> None:
    kernels.assert_any_as_dense(data, (210, 70, 300), splits=data.draw(st.integers(1, 8), "splits"))


# ---- what is read, written and repeated -----------------------------------------------------------------------------


@pytest.mark.parametrize(("chunks", "splits", "M"), [(25, 1, 4), (12, 4, 4), (5, 1, 200)])
@ON_CPU
def test_no_order_of_blocks_threads_copies_and_products_changes_a_bit(
    kernels: Kernels, chunks: int, splits: int, M: int
) -> None:
    weight, x = pruned(16, 64 * chunks, 0.6), torch.randn(M, 64 * chunks).bfloat16()
    kernels.assert_no_order_changes_a_bit(x, weight, 6, splits=splits)


def test_a_workspace_is_asked_for_where_blocks_share_k(kernels: Kernels) -> None:
    """Of an H200: few tiles of outputs share it, 152 tiles are more than it has multiprocessors."""
    workspace = kernels.module.bitmap_linear_wgmma_workspace
    assert workspace(20, 1824, 4096, 1, 0) == workspace(20, 12, 64, 8, 0) == workspace(0, 5, 64, 8, 0) == 0
    per_tile, rest = divmod(workspace(20, 256, 4096, 8, 0), 22)  # 22 tiles of 192 outputs, 64 tokens each
    assert rest == 0
    assert (per_tile - 8) % (192 * 64 * 4) == 0
    assert 2 <= (per_tile - 8) // (192 * 64 * 4) <= 8


# ---- behind the op --------------------------------------------------------------------------------------------------


def test_tokens_and_the_table_choose_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has a workspace of its own; and on a GPU that is no Hopper mma.sync stays."""
    op, packed = Op("bitmap_linear", monkeypatch), fasticl.pack(pruned(20, 700, 0.5), "bitmap")
    weight, held = packed.unpack(), replace(packed, layouts=DeviceLayouts(to_lanes(packed, 4, 2)))

    def kernel(M: int) -> str:
        x = torch.randn(M, 700).bfloat16()
        y = op(x, held, None, "silu")
        assert_close_to_truth(y, dense(x.double(), weight.double(), None, "silu"), dense(x, weight, None, "silu"))
        return op.ran.pop() if op.ran else ""

    assert kernel(40) == "lane stream"
    monkeypatch.setattr(ops, "has_wgmma", lambda values: True)
    assert [kernel(M) for M in (16, 17, 256, 257)] == ["lane stream", "wgmma", "wgmma", ""]
    for name in ("wgmma", "lane stream"):
        with tuned.forced("bitmap_linear", {"implementation": name}):
            assert [kernel(M) for M in (3, 40)] == [name, name]
    assert ops.implementation(packed.values, 20, 700, 40) == "CUDA C++ (wgmma)"
