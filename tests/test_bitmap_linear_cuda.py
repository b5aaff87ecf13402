"""The CUDA kernel of bitmap_linear, executed on the CPU; and, where a GPU is present, compiled, by the same tests."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import assert_close_to_truth, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import ACTIVATIONS, activate, dense, double
from torch import Tensor

import fasticl
from fasticl import lane_stream
from fasticl.lane_stream import LaneStream, to_lanes
from fasticl.ops import _linear
from fasticl.ops import _registry as registry
from fasticl.testing import cuda_on_cpu

DTYPES = lane_stream.DTYPES
CSRC = Path(__file__).parents[1] / "csrc"  # also where the package that is tested is a copy elsewhere
TENSORS = ("values", "masks", "starts", "row_order")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
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


@pytest.fixture(params=DEVICES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "cuda":
        from fasticl import _C_cuda

        return Kernels(_C_cuda, "cuda")
    return Kernels(cuda_on_cpu.load(CSRC), "cpu")


class Kernels:
    """The module with the kernels, and the device on which it takes tensors."""

    def __init__(self, module: ModuleType, device: str) -> None:
        self.module, self.device = module, device
        self.set_seed(0)

    def set_seed(self, seed: int) -> None:
        """Another order of threads and of copies; a GPU has its own."""
        if self.device == "cpu":
            self.module.set_seed(seed)

    def __call__(
        self,
        x: Tensor,
        lanes: LaneStream,
        y: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        workspace: Tensor | None = None,
    ) -> None:
        """``y = act(x W^T + bias)`` on matrices that may have row strides."""
        M, K = x.shape
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        workspace = self.workspace(M, lanes) if workspace is None else workspace
        self.module.bitmap_linear(
            x.data_ptr(), M, x.stride(0), lanes.values.data_ptr(), lanes.masks.data_ptr(), lanes.starts.data_ptr(),
            lanes.row_order.data_ptr(), lanes.masks.shape[0], K, *lanes.plan, workspace.data_ptr(),
            registry.address(bias), registry.ACTIVATIONS[activation], y.data_ptr(), y.stride(0),
            registry.DTYPES[x.dtype], 0, stream,
        )  # fmt: skip

    def workspace(self, M: int, lanes: LaneStream) -> Tensor:
        """Of random bytes."""
        size = self.module.bitmap_linear_workspace(M, lanes.masks.shape[0], lanes.blocks)
        return torch.randint(256, (size,), dtype=torch.uint8).to(self.device)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        splits: int | None = None,
        blocks: int = 1,
    ) -> Tensor:
        """The product of CPU tensors, into an output that held NaN."""
        x, bias = x.to(self.device), None if bias is None else bias.to(self.device)
        lanes = to_lanes(fasticl.pack(weight, "bitmap").to(self.device), splits, blocks)
        y = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype, device=self.device)
        self(x, lanes, y, bias, activation)
        return y.cpu()

    def assert_as_dense(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **options: int
    ) -> None:
        assert_close_to_truth(
            self.linear(x, weight, bias, activation, **options),
            dense(x.double(), weight.double(), double(bias), activation),
            dense(x, weight, bias, activation),
        )


def pruned(N: int, K: int, density: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(N, K).to(dtype).masked_fill(torch.rand(N, K) >= density, 0.0)


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
    lanes = to_lanes(fasticl.pack(weight, "bitmap"), 1)
    assert lanes.depth == max(lane_stream.DEPTHS)
    y = torch.full((4, 16), float("nan"), dtype=x.dtype, device=kernels.device)
    moved = LaneStream(*(getattr(lanes, name).to(kernels.device) for name in TENSORS), *lanes.plan[:-1], depth)
    kernels(x.to(kernels.device), moved, y)
    assert_close_to_truth(y.cpu(), dense(x.double(), weight.double()), dense(x, weight))


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
def test_bias_and_activation(kernels: Kernels, activation: str | None, dtype: torch.dtype) -> None:
    weight, bias, x = pruned(37, 90, 0.5, dtype), torch.randn(37).to(dtype), torch.randn(9, 90).to(dtype)
    for given_bias in (bias, None):
        kernels.assert_as_dense(x, weight, given_bias, activation)


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


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_and_mask(data: st.DataObject) -> None:
    kernels = Kernels(cuda_on_cpu.load(CSRC), "cpu")
    N, M, K = (data.draw(st.integers(0, most), name) for most, name in ((50, "N"), (20, "M"), (300, "K")))
    blocks = data.draw(st.integers(1, 4), "blocks")
    splits, dtype = blocks * data.draw(st.integers(1, 4), "warps"), data.draw(st.sampled_from(DTYPES), "dtype")
    kinds = st.sampled_from([0.0, 1.0, 0.5, 0.03])
    rows = torch.tensor(data.draw(st.lists(kinds, min_size=N, max_size=N), "rows")).view(N, 1)
    weight = torch.randn(N, K).to(dtype).masked_fill(torch.rand(N, K) >= rows, 0.0)
    bias = torch.randn(N).to(dtype) if data.draw(st.booleans(), "bias") else None
    activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    kernels.set_seed(data.draw(st.integers(0, 1000), "order of threads"))
    kernels.assert_as_dense(torch.randn(M, K).to(dtype), weight, bias, activation, splits=splits, blocks=blocks)


# ---- what is read, written and repeated -----------------------------------------------------------------------------


@pytest.mark.parametrize(("chunks", "splits", "blocks"), [(25, 3, 1), (12, 4, 4), (6, 6, 3)])
def test_no_order_of_blocks_threads_and_copies_changes_a_bit(chunks: int, splits: int, blocks: int) -> None:
    """The kernel waits for all that it reads, reads all before it is overwritten, and adds in one order.

    Blocks of one chunk a warp are over soon: some have left their sums before all threads of another have.
    """
    kernels = Kernels(cuda_on_cpu.load(CSRC), "cpu")
    weight, x = pruned(16, 64 * chunks, 0.6), torch.randn(4, 64 * chunks).bfloat16()
    results = []
    for seed in range(150 // chunks):
        kernels.set_seed(seed)
        results.append(kernels.linear(x, weight, None, "gelu", splits=splits, blocks=blocks))
    assert not results[0].isnan().any()
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("kind", ["random", "zeros", "ones", "nan"])
def test_what_the_workspace_held_does_not_matter(kernels: Kernels, kind: str) -> None:
    """And a launch leaves it as the next one, a replay of a CUDA graph, can take it."""
    weight, x = pruned(40, 700, 0.5), torch.randn(70, 700).bfloat16().to(kernels.device)
    lanes = to_lanes(fasticl.pack(weight, "bitmap").to(kernels.device), 10, 5)
    workspace = kernels.workspace(70, lanes)
    if kind != "random":
        held = {"zeros": 0.0, "ones": torch.tensor(-1, dtype=torch.int32).view(torch.float32), "nan": float("nan")}
        workspace.view(torch.float32).fill_(held[kind])
    results = []
    for seed in range(3):
        kernels.set_seed(seed)
        y = torch.full((70, 40), float("nan"), dtype=x.dtype, device=kernels.device)
        kernels(x, lanes, y, workspace=workspace)
        results.append(y)
    x = x.cpu()
    assert_close_to_truth(results[0].cpu(), dense(x.double(), weight.double()), dense(x, weight))
    assert all(torch.equal(result, results[0]) for result in results)


def test_counts_of_a_launch_that_was_broken_off_do_not_matter(kernels: Kernels) -> None:
    weight, x = pruned(40, 700, 0.5), torch.randn(8, 700).bfloat16().to(kernels.device)
    lanes = to_lanes(fasticl.pack(weight, "bitmap").to(kernels.device), 4, 2)
    workspace = kernels.workspace(8, lanes)
    counts = workspace[: len(lanes.masks) * 8].view(torch.int64)
    expected = torch.empty(8, 40, dtype=x.dtype, device=kernels.device)
    kernels(x, lanes, expected, workspace=workspace)
    counts += 1  # as if one block of each strip had come, and the other had not
    workspace[len(counts) * 8 :] = 0xFF
    y = torch.empty_like(expected)
    kernels(x, lanes, y, workspace=workspace)
    assert torch.equal(y, expected)


def test_one_block_a_strip_takes_no_workspace(kernels: Kernels) -> None:
    for M, strips, blocks, expected in [
        (8, 5, 1, 0),
        (1, 5, 2, 5 * (8 + 2 * 8 * 16 * 4)),
        (65, 3, 4, 6 * (8 + 4 * 64 * 16 * 4)),
        (0, 5, 2, 0),
    ]:
        assert kernels.module.bitmap_linear_workspace(M, strips, blocks) == expected


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

    lanes = to_lanes(fasticl.pack(weight, "bitmap"), 2 + 2 * shift, 1 + shift)
    lanes = replace(lanes, **{name: guard(getattr(lanes, name)) for name in TENSORS})
    guarded_bias = guard(bias, shift)
    for M in (1, 8, 17):
        nan = torch.full((M, K + gap), float("nan"), dtype=dtype)
        x, y = guard(nan, shift), guard(nan[:, : N + gap], shift)
        x[:, :K] = torch.randn(M, K)
        kernels(x[:, :K], lanes, y[:, :N], guarded_bias, "relu", guard(kernels.workspace(M, lanes)))
        truth = dense(x[:, :K].double(), weight.double(), bias.double(), "relu")
        assert_close_to_truth(y[:, :N], truth, dense(x[:, :K], weight, bias, "relu"))
        assert y[:, N:].isnan().all(), "a write between the rows of y"
    for check in checks:
        check()


@pytest.mark.parametrize(("stride", "offset"), [(130, 0), (136, 0), (136, 1), (0, 0), (1, 0)])
def test_any_row_stride_and_alignment(kernels: Kernels, stride: int, offset: int) -> None:
    buffer = torch.randn(5 * 136 + 200).bfloat16()
    x = buffer.as_strided((5, 128), (stride, 1), offset)
    weight = pruned(16, 128, 0.5)
    lanes = to_lanes(fasticl.pack(weight, "bitmap").to(kernels.device), 2)
    y = torch.full((5, 16), float("nan"), dtype=x.dtype, device=kernels.device)
    kernels(buffer.to(kernels.device).as_strided((5, 128), (stride, 1), offset), lanes, y)
    assert_close_to_truth(y.cpu(), dense(x.double(), weight.double()), dense(x, weight))


def test_negative_zeros_and_nan_are_weights(kernels: Kernels) -> None:
    weight, x = pruned(20, 80, 0.5), torch.randn(2, 80).bfloat16()
    weight[3, 7], weight[4, 8] = -0.0, float("nan")
    x[1, 7] = float("inf")
    # infinity times zero, stored or not, is NaN, as in the dense product
    kernels.assert_as_dense(x, weight)
    assert torch.equal(kernels.linear(x, weight, None, None).isnan(), dense(x, weight).isnan())


# ---- behind the op --------------------------------------------------------------------------------------------------


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """What the dispatcher calls for CUDA tensors, on CPU tensors: with the module that runs there, and no stream."""
    module = importlib.import_module("fasticl.ops.bitmap_linear")
    monkeypatch.setattr(module, "_C_cuda", cuda_on_cpu.load(CSRC))
    monkeypatch.setattr(registry, "cuda_stream", lambda x: (0, 0))
    return module.cuda


def test_the_op_takes_any_x(op: Callable[..., Tensor]) -> None:
    """Batch dimensions, strides, no tokens, a strided bias."""
    weight, bias = pruned(20, 70, 0.5), torch.randn(20, 2).bfloat16()[:, 0]
    packed = fasticl.pack(weight, "bitmap")
    layouts = {
        "one": torch.randn(70),
        "batches": torch.randn(2, 3, 70),
        "transposed": torch.randn(70, 4).T,
        "every second column": torch.randn(3, 140)[:, ::2],
        "every second row": torch.randn(6, 70)[::2],
        "no tokens": torch.randn(0, 70),
    }
    for (name, x), lanes in itertools.product(layouts.items(), (to_lanes(packed), to_lanes(packed, 4, 2))):
        x = x.bfloat16()
        y = op(x, packed.values, packed.bitmask, packed.row_offsets, bias, "silu", lanes.tensors, lanes.plan)
        assert y.is_contiguous(), name
        truth = dense(x.double(), weight.double(), bias.double(), "silu")
        assert_close_to_truth(y, truth, dense(x, weight, bias, "silu"))


def test_the_op_without_rows_or_columns(op: Callable[..., Tensor]) -> None:
    for N, K in ((0, 70), (5, 0)):
        packed = fasticl.pack(torch.zeros(N, K).half(), "bitmap")
        lanes, bias = to_lanes(packed), torch.randn(N).half()
        x = torch.randn(3, K).half()
        y = op(x, packed.values, packed.bitmask, packed.row_offsets, bias, "relu", lanes.tensors, lanes.plan)
        assert torch.equal(y, bias.relu().expand(3, N))


def test_the_op_refuses_by_name(op: Callable[..., Tensor]) -> None:
    packed = fasticl.pack(pruned(20, 70, 0.5), "bitmap")
    lanes, portable = to_lanes(packed), (packed.values, packed.bitmask, packed.row_offsets)
    with pytest.raises(TypeError, match=r"bitmap_linear: x: expected dtype bfloat16 or float16 .*, got torch\.float32"):
        op(torch.randn(1, 70), *portable, None, None, lanes.tensors, lanes.plan)
    with pytest.raises(ValueError, match=r"bitmap_linear: masks: expected shape \[2, 3, 32\], got \[2, 2, 32\]"):
        op(torch.randn(1, 140).bfloat16(), *portable, None, None, lanes.tensors, lanes.plan)


def test_the_op_leaves_to_others_what_the_kernel_does_not_take(
    op: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than it pays for to PyTorch in x's dtype, weights without the layout to Triton."""
    packed = fasticl.pack(pruned(20, 70, 0.5), "bitmap")
    portable = (packed.values, packed.bitmask, packed.row_offsets)
    x, lanes = torch.randn(257, 70).bfloat16(), to_lanes(packed)
    expected = fasticl.ops.bitmap_linear(x, packed)
    monkeypatch.setattr(_linear, "reference_linear", None)  # in float32
    torch.testing.assert_close(op(x, *portable, None, None, lanes.tensors, lanes.plan), expected)
    bias = torch.randn(20).bfloat16()
    activated = torch.nn.functional.silu(dense(x, packed.unpack(), bias))
    torch.testing.assert_close(op(x, *portable, bias, "silu", lanes.tensors, lanes.plan), activated)
    seen: list[object] = []
    monkeypatch.setattr(
        importlib.import_module("fasticl.ops.bitmap_linear"),
        "_triton",
        lambda *arguments: seen.extend(arguments) or expected,
    )
    assert op(x, *portable, None, None) is expected
    assert all(a is b for a, b in zip(seen, (x, *portable, None, None), strict=True))


def test_the_schema_takes_the_layout() -> None:
    """On the CPU it is passed over; fake tensors and the dispatcher take it."""
    weight, x = pruned(20, 70, 0.5), torch.randn(2, 3, 70).bfloat16()
    packed = fasticl.pack(weight, "bitmap")
    lanes = to_lanes(packed)
    arguments = (x, packed.values, packed.bitmask, packed.row_offsets, None, "relu", lanes.tensors, lanes.plan)
    torch.library.opcheck(torch.ops.fasticl.bitmap_linear.default, arguments)
    held = replace(packed, lanes=lanes)
    assert torch.equal(
        fasticl.ops.bitmap_linear(x, held, None, "relu"), fasticl.ops.bitmap_linear(x, packed, None, "relu")
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_module_runs_the_kernel() -> None:
    """A layer moved there, cast there and captured in a CUDA graph, which is replayed; blocks share its strips."""
    from fasticl.nn import SparseLinear

    weight, x = pruned(48, 8192, 0.5, torch.float16), torch.randn(5, 8192)
    layer = SparseLinear(fasticl.pack(weight, "bitmap")).cuda().bfloat16()
    assert layer.packed.validate().lanes.blocks > 1
    static = x.bfloat16().cuda()
    expected = layer(static).clone()
    rounded = weight.bfloat16()
    assert_close_to_truth(expected.cpu(), dense(x.bfloat16().double(), rounded.double()), dense(x.bfloat16(), rounded))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(static)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


def test_the_layout_has_the_kernels_numbers() -> None:
    numbers = cuda_on_cpu.load(CSRC).lane_stream
    assert {name: getattr(lane_stream, name) for name in numbers} == numbers
