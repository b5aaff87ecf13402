"""The CUDA kernel of bitmap_linear, executed on the CPU; and, where a GPU is present, compiled, by the same tests."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_cases import DEVICES, DTYPES, ON_CPU, ON_GPU, Kernels, Op, OpCases, WorkspaceCases, module_on_a_gpu, pruned
from helpers import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import ACTIVATIONS, activate, dense
from torch import Tensor

import fasticl
from fasticl import PackedWeight, lane_stream
from fasticl.device_layouts import DeviceLayouts
from fasticl.lane_stream import LaneStream, to_lanes
from fasticl.ops import _linear

# (N, K), splits, blocks, and why
SHAPES = {
    "one_row": (1, 100, 1, 1),
    "one_column": (70, 1, 1, 1),
    "whole_strips_and_chunks": (32, 128, 2, 1),
    "n_and_k_of_no_multiple": (33, 75, 1, 1),
    "k_of_8_not_64": (17, 200, 3, 1),
    "more_splits_than_chunks": (20, 150, 8, 1),
    "shares_of_unequal_length": (16, 64 * 7, 4, 1),
    "the_ring_wraps": (16, 64 * 40, 1, 1),
    "a_block_a_share": (33, 75, 2, 2),
    "blocks_of_several_warps": (20, 64 * 13, 6, 3),
    "more_blocks_than_chunks": (40, 100, 16, 8),
}
# Tokens and why: tiles of 8, 16, 32 and 64, full or not, and several of 64.
TOKENS = (1, 7, 8, 9, 16, 17, 32, 33, 64, 65)


class LaneStreamKernels(Kernels):
    layout_module = lane_stream
    tokens = (1, 8, 17, 70)
    plans = ({"splits": 2}, {"splits": 10, "blocks": 5})

    def layout(self, weight: Tensor, splits: int | None = None, blocks: int = 1) -> LaneStream:
        return to_lanes(fasticl.pack(weight, "bitmap").to(self.device), splits, blocks)

    def workspace_bytes(self, M: int, K: int, lanes: LaneStream) -> int:
        return self.module.bitmap_linear_workspace(M, len(lanes.masks), lanes.blocks)

    def launch(self, before: tuple, lanes: LaneStream, N: int, K: int, workspace: Tensor, after: tuple) -> None:
        tensors = (t.data_ptr() for t in lanes.tensors)
        layout = (*tensors, len(lanes.masks), K, *lanes.plan, workspace.data_ptr())
        self.module.bitmap_linear(*before, *layout, *after)


@pytest.fixture(params=DEVICES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return LaneStreamKernels(request.param)


class LaneStreamCases(WorkspaceCases):
    def test_negative_zeros_and_nan_are_weights(self, kernels: Kernels) -> None:
        weight, x = pruned(20, 80, 0.5), torch.randn(2, 80).bfloat16()
        weight[3, 7], weight[4, 8] = -0.0, float("nan")
        x[1, 7] = float("inf")
        # infinity times zero, stored or not, is NaN, as in the dense product
        kernels.assert_as_dense(x, weight)
        assert torch.equal(kernels.linear(x, weight).isnan(), dense(x, weight).isnan())


class TestLaneStreamKernel(LaneStreamCases):
    pass


# ---- parity with the float64 truth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(kernels: Kernels, shape: str, dtype: torch.dtype) -> None:
    N, K, splits, blocks = SHAPES[shape]
    weight, bias = pruned(N, K, 0.5, dtype), torch.randn(N).to(dtype)
    for M in (1, 5, 8):
        kernels.assert_as_dense(torch.randn(M, K).to(dtype), weight, bias, splits=splits, blocks=blocks)


@pytest.mark.parametrize("M", TOKENS)
def test_tokens(kernels: Kernels, M: int) -> None:
    for dtype, K, blocks in zip(DTYPES, (128, 100), (1, 2), strict=True):
        kernels.assert_as_dense(torch.randn(M, K).to(dtype), pruned(20, K, 0.4, dtype), splits=2, blocks=blocks)


@pytest.mark.parametrize("density", [0.0, 0.005, 0.1, 0.9, 1.0])
def test_densities(kernels: Kernels, density: float) -> None:
    for dtype in DTYPES:
        kernels.assert_as_dense(torch.randn(3, 700).to(dtype), pruned(40, 700, density, dtype), splits=1)


@pytest.mark.parametrize("depth", lane_stream.DEPTHS)
def test_both_depths(kernels: Kernels, depth: int) -> None:
    """Of a weight that fits both, so that neither the one nor the other is all that runs."""
    weight, x = pruned(16, 64 * 30, 0.2), torch.randn(4, 64 * 30).bfloat16()
    lanes = kernels.layout(weight, splits=1)
    assert lanes.depth == max(lane_stream.DEPTHS)
    y = kernels.output(x.to(kernels.device), replace(lanes, depth=depth), 16)
    assert_close_to_truth(y, dense(x.double(), weight.double()), dense(x, weight))


@pytest.mark.parametrize("kind", ["one_dense_output", "one_dense_lane", "lanes_take_turns", "skewed_rows"])
def test_lanes_of_very_different_length(kernels: Kernels, kind: str) -> None:
    """Lanes that lag skip ahead, the ring is full of one lane's values, and rows are reordered."""
    N, K = 32, 64 * 24
    keep = torch.zeros(N, K, dtype=torch.bool)
    if kind == "one_dense_output":
        keep[5] = True
        keep[:, ::97] = True
    elif kind == "one_dense_lane":
        keep.view(N, -1, 4, 16)[:, :, 2] = True
        keep.view(N, -1, 4, 16)[:, [7, 12, 23], 1] = True  # far behind: its words are the oldest in a full ring
    elif kind == "lanes_take_turns":
        keep.view(N, -1, 6 * 64)[:, 0::2, :][..., torch.arange(6 * 64) % 64 < 16] = True
        keep.view(N, -1, 6 * 64)[:, 1::2, :][..., torch.arange(6 * 64) % 64 >= 48] = True
    else:
        keep = torch.rand(N, K) < torch.rand(N, 1) ** 2
    weight = torch.randn(N, K).bfloat16().masked_fill(~keep, 0.0)
    for splits, seed in ((1, 0), (1, 1), (3, 2)):  # copies land late, early, or as drawn
        kernels.set_seed(seed)
        kernels.assert_as_dense(torch.randn(8, K).bfloat16(), weight, splits=splits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_over_their_whole_range(kernels: Kernels, activation: str | None, dtype: torch.dtype) -> None:
    """``act(v)`` alone: a tail is judged by its own size, and infinities and NaN are torch's."""
    edges = [0.0, 1e-3, 0.1, 1.0, 2.0, 4.0, 6.0, 10.0, 15.0, 50.0, 100.0]
    ranges = [torch.linspace(a, b, 33) for a, b in itertools.pairwise(edges)]
    special = torch.tensor([0.0, -0.0, 1e-4, -1e-4, *map(float, ("inf", "-inf", "nan"))])
    for v in (*ranges, *(-r for r in ranges), special):
        v = v.to(dtype)
        result = kernels.linear(torch.ones(1, 1, dtype=dtype), v[:, None], None, activation)[0]
        truth = activate(v.double(), activation)
        if activation == "gelu_tanh" and v is not special:  # 1 + tanh(y) cancels
            assert_close_to_truth(result, truth, activate(v, activation))
        else:
            rtol = 2 * torch.finfo(dtype).eps
            atol = max(1e-36, torch.finfo(dtype).smallest_normal)  # below, results may be flushed to zero
            torch.testing.assert_close(result, truth.to(dtype), rtol=rtol, atol=atol, equal_nan=True)


@ON_CPU
@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_and_mask(kernels: Kernels, data: st.DataObject) -> None:
    blocks, warps = data.draw(st.integers(1, 4), "blocks"), data.draw(st.integers(1, 4), "warps")
    kernels.assert_any_as_dense(data, (50, 20, 300), splits=blocks * warps, blocks=blocks)


# ---- what is read, written and repeated -----------------------------------------------------------------------------


@pytest.mark.parametrize(("chunks", "splits", "blocks"), [(25, 3, 1), (12, 4, 4), (6, 6, 3)])
@ON_CPU
def test_no_order_of_blocks_threads_and_copies_changes_a_bit(
    kernels: Kernels, chunks: int, splits: int, blocks: int
) -> None:
    """Blocks of one chunk a warp are over soon: some have left their sums before all threads of another have."""
    weight, x = pruned(16, 64 * chunks, 0.6), torch.randn(4, 64 * chunks).bfloat16()
    kernels.assert_no_order_changes_a_bit(x, weight, 150 // chunks, splits=splits, blocks=blocks)


def test_counts_of_a_launch_that_was_broken_off_do_not_matter(kernels: Kernels) -> None:
    weight, x = pruned(40, 700, 0.5), torch.randn(8, 700).bfloat16().to(kernels.device)
    lanes = kernels.layout(weight, splits=4, blocks=2)
    workspace = kernels.workspace(8, 700, lanes)
    counts = workspace[: len(lanes.masks) * 8].view(torch.int64)
    expected = kernels.output(x, lanes, 40, workspace=workspace)
    counts += 1  # as if one block of each strip had come, and the other had not
    workspace[len(counts) * 8 :] = 0xFF
    assert torch.equal(kernels.output(x, lanes, 40, workspace=workspace), expected)


def test_one_block_a_strip_takes_no_workspace(kernels: Kernels) -> None:
    for M, strips, blocks, expected in [
        (8, 5, 1, 0),
        (1, 5, 2, 5 * (8 + 2 * 8 * 16 * 4)),
        (65, 3, 4, 6 * (8 + 4 * 64 * 16 * 4)),
        (0, 5, 2, 0),
    ]:
        assert kernels.module.bitmap_linear_workspace(M, strips, blocks) == expected


# ---- behind the op --------------------------------------------------------------------------------------------------


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Op:
    return Op("bitmap_linear", monkeypatch)


class TestOp(OpCases):
    runs = "lane stream"

    def weight(self) -> Tensor:
        return pruned(20, 70, 0.5)

    def packed(self, op: Op, weight: Tensor) -> list[PackedWeight]:
        packed = fasticl.pack(weight, "bitmap")
        return [replace(packed, layouts=DeviceLayouts(to_lanes(packed, *plan))) for plan in ((None, 1), (4, 2))]


def test_the_op_refuses_a_layout_by_name(op: Op) -> None:
    packed = fasticl.pack(pruned(20, 70, 0.5), "bitmap")
    with pytest.raises(ValueError, match=r"bitmap_linear: masks: expected shape \[2, 3, 32\], got \[2, 2, 32\]"):
        op(torch.randn(1, 140).bfloat16(), replace(packed, layouts=DeviceLayouts(to_lanes(packed))))


def test_the_op_leaves_to_others_what_the_kernel_does_not_take(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than it pays for to PyTorch in x's dtype, weights without the layout to Triton."""
    packed, x = fasticl.pack(pruned(20, 70, 0.5), "bitmap"), torch.randn(257, 70).bfloat16()
    held = replace(packed, layouts=DeviceLayouts(to_lanes(packed)))
    expected = fasticl.ops.bitmap_linear(x, packed)
    monkeypatch.setattr(_linear, "reference_linear", None)  # in float32
    torch.testing.assert_close(op(x, held), expected)
    bias = torch.randn(20).bfloat16()
    activated = torch.nn.functional.silu(dense(x, packed.unpack(), bias))
    torch.testing.assert_close(op(x, held, bias, "silu"), activated)
    seen: list[Any] = []
    monkeypatch.setattr(op.module, "_triton", lambda *arguments: seen.extend(arguments) or expected)
    assert op(x, packed) is expected
    portable = (packed.values, packed.bitmask, packed.row_offsets)
    assert all(a is b for a, b in zip(seen, (x, *portable, None, None), strict=True))


@ON_GPU
def test_on_a_gpu_the_module_runs_the_kernel() -> None:
    """And blocks share its strips."""
    packed = module_on_a_gpu(fasticl.pack(pruned(48, 8192, 0.5, torch.float16), "bitmap"))
    assert packed.layouts.lanes.blocks > 1
