"""The Hopper kernel of bitmap_linear, executed on the CPU; and, on a Hopper GPU, compiled, by the same tests."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import test_bitmap_linear_cuda as mma
import torch
from helpers import assert_close_to_truth, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import ACTIVATIONS, dense
from test_bitmap_linear_cuda import CSRC, DTYPES, TENSORS, pruned
from torch import Tensor

import fasticl
from fasticl import tuned
from fasticl.lane_stream import LaneStream, to_lanes
from fasticl.ops import _registry as registry
from fasticl.testing import cuda_on_cpu

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


class Kernels(mma.Kernels):
    def __call__(
        self,
        x: Tensor,
        lanes: LaneStream,
        y: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        workspace: Tensor | None = None,
    ) -> None:
        M, K = x.shape
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        workspace = self.workspace(M, lanes, K) if workspace is None else workspace
        self.module.bitmap_linear(
            x.data_ptr(), M, x.stride(0), lanes.values.data_ptr(), lanes.masks.data_ptr(), lanes.starts.data_ptr(),
            lanes.row_order.data_ptr(), lanes.masks.shape[0], K, *lanes.plan, workspace.data_ptr(),
            registry.address(bias), registry.ACTIVATIONS[activation], y.data_ptr(), y.stride(0),
            registry.DTYPES[x.dtype], 0, stream, True,
        )  # fmt: skip

    def workspace(self, M: int, lanes: LaneStream, K: int = 0) -> Tensor:
        size = self.module.bitmap_linear_wgmma_workspace(M, lanes.masks.shape[0], K, lanes.splits, 0)
        return torch.randint(256, (size,), dtype=torch.uint8).to(self.device)


@pytest.fixture(params=DEVICES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "cuda":
        from fasticl import _C_cuda

        return Kernels(_C_cuda, "cuda")
    return Kernels(cuda_on_cpu.load(CSRC), "cpu")


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


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_bias_and_activation(kernels: Kernels, activation: str | None) -> None:
    for dtype in DTYPES:
        weight, bias, x = pruned(37, 90, 0.5, dtype), torch.randn(37).to(dtype), torch.randn(19, 90).to(dtype)
        for given_bias in (bias, None):
            kernels.assert_as_dense(x, weight, given_bias, activation)


def test_negative_zeros_and_nan_are_weights(kernels: Kernels) -> None:
    weight, x = pruned(20, 80, 0.5), torch.randn(2, 80).bfloat16()
    weight[3, 7], weight[4, 8] = -0.0, float("nan")
    x[1, 7] = float("inf")
    kernels.assert_as_dense(x, weight)


@settings(max_examples=15)
@given(data=st.data())
def test_any_shape_and_mask(data: st.DataObject) -> None:
    kernels = Kernels(cuda_on_cpu.load(CSRC), "cpu")
    N, M, K = (data.draw(st.integers(0, most), name) for most, name in ((210, "N"), (70, "M"), (300, "K")))
    splits, dtype = data.draw(st.integers(1, 8), "splits"), data.draw(st.sampled_from(DTYPES), "dtype")
    kinds = st.sampled_from([0.0, 1.0, 0.5, 0.03])
    rows = torch.tensor(data.draw(st.lists(kinds, min_size=N, max_size=N), "rows")).view(N, 1)
    weight = torch.randn(N, K).to(dtype).masked_fill(torch.rand(N, K) >= rows, 0.0)
    bias = torch.randn(N).to(dtype) if data.draw(st.booleans(), "bias") else None
    activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    kernels.set_seed(data.draw(st.integers(0, 1000), "order of threads"))
    kernels.assert_as_dense(torch.randn(M, K).to(dtype), weight, bias, activation, splits=splits)


# ---- what is read, written and repeated -----------------------------------------------------------------------------


@pytest.mark.parametrize(("chunks", "splits", "M"), [(25, 1, 4), (12, 4, 4), (5, 1, 200)])
def test_no_order_of_blocks_threads_copies_and_products_changes_a_bit(chunks: int, splits: int, M: int) -> None:
    kernels = Kernels(cuda_on_cpu.load(CSRC), "cpu")
    weight, x = pruned(16, 64 * chunks, 0.6), torch.randn(M, 64 * chunks).bfloat16()
    results = []
    for seed in range(6):
        kernels.set_seed(seed)
        results.append(kernels.linear(x, weight, None, "gelu", splits=splits))
    assert not results[0].isnan().any()
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_what_the_workspace_held_does_not_matter(kernels: Kernels) -> None:
    """And a launch leaves it as the next one, a replay of a CUDA graph, can take it."""
    weight, x = pruned(40, 700, 0.5), torch.randn(20, 700).bfloat16().to(kernels.device)
    lanes = to_lanes(fasticl.pack(weight, "bitmap").to(kernels.device), 8)
    workspace = kernels.workspace(20, lanes, 700)
    assert workspace.numel() > 0
    results = []
    for seed in range(3):
        kernels.set_seed(seed)
        y = torch.full((20, 40), float("nan"), dtype=x.dtype, device=kernels.device)
        kernels(x, lanes, y, workspace=workspace)
        results.append(y)
    assert_close_to_truth(results[0].cpu(), dense(x.cpu().double(), weight.double()), dense(x.cpu(), weight))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_workspace_is_asked_for_where_blocks_share_k(kernels: Kernels) -> None:
    """Of an H200: few tiles of outputs share it, 152 tiles are more than it has multiprocessors."""
    workspace = kernels.module.bitmap_linear_wgmma_workspace
    assert workspace(20, 1824, 4096, 1, 0) == workspace(20, 12, 64, 8, 0) == workspace(0, 5, 64, 8, 0) == 0
    per_tile, rest = divmod(workspace(20, 256, 4096, 8, 0), 22)  # 22 tiles of 192 outputs, 64 tokens each
    assert rest == 0
    assert (per_tile - 8) % (192 * 64 * 4) == 0
    assert 2 <= (per_tile - 8) // (192 * 64 * 4) <= 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_nothing_outside_is_read_or_written(shift: int, dtype: torch.dtype) -> None:
    """Between guard bytes, with gaps of NaN between the rows of x and y, aligned and off by one element."""
    kernels = Kernels(cuda_on_cpu.load(CSRC), "cpu")
    N, K, gap = 37, 165, 3
    weight, bias, checks = pruned(N, K, 0.5, dtype), torch.randn(N).to(dtype), []

    def guard(tensor: Tensor, shift: int = 0) -> Tensor:
        copy, check = guarded(tensor, shift=shift)
        checks.append(check)
        return copy

    lanes = to_lanes(fasticl.pack(weight, "bitmap"), 2 + shift)
    lanes = replace(lanes, **{name: guard(getattr(lanes, name)) for name in TENSORS})
    guarded_bias = guard(bias, shift)
    for M in (17, 70):
        nan = torch.full((M, K + gap), float("nan"), dtype=dtype)
        x, y = guard(nan, shift), guard(nan[:, : N + gap], shift)
        x[:, :K] = torch.randn(M, K)
        kernels(x[:, :K], lanes, y[:, :N], guarded_bias, "relu", guard(kernels.workspace(M, lanes, K)))
        truth = dense(x[:, :K].double(), weight.double(), bias.double(), "relu")
        assert_close_to_truth(y[:, :N], truth, dense(x[:, :K], weight, bias, "relu"))
        assert y[:, N:].isnan().all(), "a write between the rows of y"
    for check in checks:
        check()


# ---- behind the op --------------------------------------------------------------------------------------------------


def test_tokens_and_the_table_choose_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has a workspace of its own; and on a GPU that is no Hopper mma.sync stays."""
    module, ran = cuda_on_cpu.load(CSRC), []

    class Recorded:
        bitmap_linear_workspace = module.bitmap_linear_workspace
        bitmap_linear_wgmma_workspace = module.bitmap_linear_wgmma_workspace

        @staticmethod
        def bitmap_linear(*arguments: object) -> None:
            ran.append("wgmma" if arguments[-1] else "mma.sync")
            module.bitmap_linear(*arguments)

    monkeypatch.setattr(ops, "_C_cuda", Recorded)
    monkeypatch.setattr(registry, "cuda_stream", lambda x: (0, 0))
    packed = fasticl.pack(pruned(20, 700, 0.5), "bitmap")
    lanes = to_lanes(packed, 4, 2)

    def kernel(M: int) -> str:
        x = torch.randn(M, 700).bfloat16()
        y = ops.cuda(
            x, packed.values, packed.bitmask, packed.row_offsets, None, "silu", lanes.tensors, lanes.plan
        )  # fmt: skip
        weight = packed.unpack()
        assert_close_to_truth(y, dense(x.double(), weight.double(), None, "silu"), dense(x, weight, None, "silu"))
        return ran.pop() if ran else ""

    assert kernel(40) == "mma.sync"
    monkeypatch.setattr(ops, "has_wgmma", lambda values: True)
    assert [kernel(M) for M in (16, 17, 256, 257)] == ["mma.sync", "wgmma", "wgmma", ""]
    for name, expected in (("wgmma", ["wgmma", "wgmma"]), ("lane stream", ["mma.sync", "mma.sync"])):
        with tuned.forced("bitmap_linear", {"implementation": name}):
            assert [kernel(M) for M in (3, 40)] == expected
    assert ops.implementation(packed.values, 20, 700, 40) == "CUDA C++ (wgmma)"
