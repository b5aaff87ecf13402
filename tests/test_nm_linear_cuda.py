"""The CUDA kernel of nm_linear, executed on the CPU; and, where a GPU is present, compiled, by the same tests."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from helpers import assert_close_to_truth, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import ACTIVATIONS, dense, double
from test_bitmap_linear_cuda import CSRC, DEVICES
from test_sparse_fragments import fragments_of, two_of_four
from torch import Tensor

import fasticl
from fasticl import sparse_fragments
from fasticl.ops import _registry as registry
from fasticl.sparse_fragments import to_fragments
from fasticl.testing import cuda_on_cpu

DTYPES = sparse_fragments.DTYPES
# (N, K), splits, and why
SHAPES = {
    "one_group": (1, 4, 1),
    "whole_strips_and_chunks": (32, 128, 2),
    "n_and_k_of_no_multiple": (33, 76, 1),
    "more_splits_than_chunks": (20, 152, 8),
    "shares_of_unequal_length": (16, 64 * 7, 4),
    "more_strips_than_a_block": (100, 136, 2),
    "the_ring_wraps": (16, 64 * 15, 1),
}
# Tokens and why: tiles of 8, 16, 32 and 64, full or not.
TOKENS = (1, 7, 8, 9, 16, 17, 32, 33, 64)


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
        self, x: Tensor, fragments: Tensor, y: Tensor, bias: Tensor | None = None, activation: str | None = None,
        **plan: int,
    ) -> None:  # fmt: skip
        """``y = act(x W^T + bias)`` on matrices that may have row strides."""
        M, K = x.shape
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        self.module.nm_linear(
            x.data_ptr(), M, x.stride(0), fragments.data_ptr(), y.shape[1], K, registry.address(bias),
            registry.ACTIVATIONS[activation], y.data_ptr(), y.stride(0), registry.DTYPES[x.dtype], 0, stream, **plan,
        )  # fmt: skip

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **plan: int
    ) -> Tensor:
        """The product of CPU tensors, into an output that held NaN."""
        x, bias = x.to(self.device), None if bias is None else bias.to(self.device)
        y = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype, device=self.device)
        self(x, fragments_of(weight).to(self.device), y, bias, activation, **plan)
        return y.cpu()

    def assert_as_dense(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **plan: int
    ) -> None:
        assert_close_to_truth(
            self.linear(x, weight, bias, activation, **plan),
            dense(x.double(), weight.double(), double(bias), activation),
            dense(x, weight, bias, activation),
        )


def pruned(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(N, K).to(dtype).masked_fill(~two_of_four(N, K), 0.0)


# ---- parity with the float64 truth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(kernels: Kernels, shape: str, dtype: torch.dtype) -> None:
    N, K, splits = SHAPES[shape]
    weight, bias = pruned(N, K, dtype), torch.randn(N).to(dtype)
    for M, strips in ((1, 1), (5, 4), (8, 2)):
        kernels.assert_as_dense(torch.randn(M, K).to(dtype), weight, bias, strips=strips, splits=splits)


@pytest.mark.parametrize("strips", [1, 2, 4])
@pytest.mark.parametrize("M", TOKENS)
def test_tokens(kernels: Kernels, M: int, strips: int) -> None:
    for dtype, K in zip(DTYPES, (128, 100), strict=True):
        kernels.assert_as_dense(torch.randn(M, K).to(dtype), pruned(72, K, dtype), strips=strips, splits=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_two_of_four(kernels: Kernels, dtype: torch.dtype) -> None:
    """At every place in a strip and chunk: its six columns of x are powers of two, whose sums are exact."""
    for first, second in itertools.combinations(range(4), 2):
        weight = torch.zeros(16, 16, 4, dtype=dtype)
        weight[:, :, first], weight[:, :, second] = 1.0, -3.0
        x = torch.zeros(64, 64, dtype=dtype)
        x.diagonal()[:] = 2.0 ** (torch.arange(64) % 11)  # one column a token
        result = kernels.linear(x, weight.view(16, 64))
        assert torch.equal(result, (x.double() @ weight.view(16, 64).double().T).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_bias_and_activation(kernels: Kernels, activation: str | None, dtype: torch.dtype) -> None:
    weight, bias, x = pruned(37, 92, dtype), torch.randn(37).to(dtype), torch.randn(9, 92).to(dtype)
    for given_bias in (bias, None):
        kernels.assert_as_dense(x, weight, given_bias, activation)


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_and_mask(data: st.DataObject) -> None:
    kernels = Kernels(cuda_on_cpu.load(CSRC), "cpu")
    N, M, groups = (data.draw(st.integers(0, most), name) for name, most in (("N", 70), ("M", 64), ("groups", 75)))
    plan = {
        "strips": data.draw(st.sampled_from([0, 1, 2, 4]), "strips"),
        "splits": data.draw(st.integers(0, 8), "splits"),
    }
    dtype, density = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.sampled_from([0.0, 0.6, 1.0]), "density")
    weight = pruned(N, 4 * groups, dtype).masked_fill(torch.rand(N, 4 * groups) >= density, 0.0)
    bias = torch.randn(N).to(dtype) if data.draw(st.booleans(), "bias") else None
    activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    kernels.set_seed(data.draw(st.integers(0, 1000), "order of threads"))
    kernels.assert_as_dense(torch.randn(M, 4 * groups).to(dtype), weight, bias, activation, **plan)


# ---- what is read, written and repeated -----------------------------------------------------------------------------


def test_no_order_of_threads_and_copies_changes_a_bit() -> None:
    """The kernel waits for all that it reads, reads all before it is overwritten, and adds in one order."""
    kernels = Kernels(cuda_on_cpu.load(CSRC), "cpu")
    for K in (64 * 13, 64 * 13 - 4):  # rows of x begin at multiples of 16 bytes, and of 8
        weight, x, results = pruned(32, K), torch.randn(12, K).bfloat16(), []
        for seed in range(9):
            kernels.set_seed(seed)
            results.append(kernels.linear(x, weight, None, "gelu", strips=2, splits=2))
        assert not results[0].isnan().any()
        for result in results[1:]:
            assert torch.equal(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gap", "shift"), [(12, 0), (2, 0), (3, 1)])
def test_nothing_outside_is_read_or_written(gap: int, shift: int, dtype: torch.dtype) -> None:
    """Between guard bytes, with gaps of NaN between the rows of x and y: rows that begin at multiples of 16, 4 and 2
    bytes."""
    kernels = Kernels(cuda_on_cpu.load(CSRC), "cpu")
    N, K = 37, 164
    weight, bias, checks = pruned(N, K, dtype), torch.randn(N).to(dtype), []

    def guard(tensor: Tensor, shift: int = 0) -> Tensor:
        copy, check = guarded(tensor, shift=shift)
        checks.append(check)
        return copy

    fragments, guarded_bias = guard(fragments_of(weight)), guard(bias, shift)
    for M in (1, 8, 17, 40):
        nan = torch.full((M, K + gap), float("nan"), dtype=dtype)
        x, y = guard(nan, shift), guard(nan[:, : N + gap], shift)
        x[:, :K] = torch.randn(M, K)
        kernels(x[:, :K], fragments, y[:, :N], guarded_bias, "relu", splits=2)
        truth = dense(x[:, :K].double(), weight.double(), bias.double(), "relu")
        assert_close_to_truth(y[:, :N], truth, dense(x[:, :K], weight, bias, "relu"))
        assert y[:, N:].isnan().all(), "a write between the rows of y"
    for check in checks:
        check()


@pytest.mark.parametrize(("stride", "offset"), [(130, 0), (132, 0), (136, 0), (136, 1), (136, 2), (0, 0), (1, 0)])
def test_any_row_stride_and_alignment(kernels: Kernels, stride: int, offset: int) -> None:
    buffer, weight = torch.randn(5 * 136 + 200).bfloat16(), pruned(16, 128)
    x = buffer.as_strided((5, 128), (stride, 1), offset)
    y = torch.full((5, 16), float("nan"), dtype=x.dtype, device=kernels.device)
    moved = buffer.to(kernels.device).as_strided((5, 128), (stride, 1), offset)
    kernels(moved, fragments_of(weight).to(kernels.device), y)
    assert_close_to_truth(y.cpu(), dense(x.double(), weight.double()), dense(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(kernels: Kernels, dtype: torch.dtype) -> None:
    """-0.0 and NaN are weights; infinity and NaN in x are multiplied by what is stored, and by nothing else."""
    weight, x = pruned(20, 80, dtype), torch.randn(9, 80).to(dtype)
    weight[3, 4:8] = torch.tensor([0.0, 1.0, 0.0, -0.0])
    weight[4, 8:12] = torch.tensor([float("nan"), 0.0, 2.0, 0.0])
    weight[5, 4:8] = torch.tensor([0.0, 0.0, 0.0, 1.0])  # the first zero is stored
    x[1, 7], x[2, 9], x[3, 4] = float("inf"), float("nan"), float("-inf")
    keep = fasticl.pack(weight, "nm", pattern="2:4").keep
    products = torch.where(keep, x[:, None].float() * weight.float(), 0.0)  # [M, N, K]
    result, expected = kernels.linear(x, weight), products.sum(-1)
    assert torch.equal(result.isnan(), expected.isnan())
    assert result[1, 3].isnan()  # infinity by -0.0
    assert result[3, 5].isnan()  # by a zero that fills its group
    finite = expected.isfinite()
    torch.testing.assert_close(result[finite].float(), expected[finite], rtol=2e-2, atol=2e-2)
    assert torch.equal(result[expected.isinf()].float(), expected[expected.isinf()])
    assert not torch.equal(dense(x, weight).isnan(), result.isnan())


# ---- behind the op --------------------------------------------------------------------------------------------------


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """What the dispatcher calls for CUDA tensors, on CPU tensors: with the module that runs there, and no stream."""
    module = importlib.import_module("fasticl.ops.nm_linear")
    monkeypatch.setattr(module, "_C_cuda", cuda_on_cpu.load(CSRC))
    monkeypatch.setattr(registry, "cuda_stream", lambda x: (0, 0))
    return module.cuda


def test_the_op_takes_any_x(op: Callable[..., Tensor]) -> None:
    """Batch dimensions, strides, no tokens, a strided bias."""
    weight, bias = pruned(20, 72), torch.randn(20, 2).bfloat16()[:, 0]
    packed = fasticl.pack(weight, "nm", pattern="2:4")
    layouts = {
        "one": torch.randn(72),
        "batches": torch.randn(2, 3, 72),
        "transposed": torch.randn(72, 4).T,
        "every second column": torch.randn(3, 144)[:, ::2],
        "every second row": torch.randn(6, 72)[::2],
        "no tokens": torch.randn(0, 72),
    }
    for name, x in layouts.items():
        x = x.bfloat16()
        y = op(x, packed.values, packed.bitmask, bias, "silu", None, to_fragments(packed))
        assert y.is_contiguous(), name
        truth = dense(x.double(), weight.double(), bias.double(), "silu")
        assert_close_to_truth(y, truth, dense(x, weight, bias, "silu"))


def test_the_op_without_rows_or_columns(op: Callable[..., Tensor]) -> None:
    for N, K in ((0, 72), (5, 0)):
        packed = fasticl.pack(torch.zeros(N, K).half(), "nm", pattern="2:4")
        bias, x = torch.randn(N).half(), torch.randn(3, K).half()
        y = op(x, packed.values, packed.bitmask, bias, "relu", None, to_fragments(packed))
        assert torch.equal(y, bias.relu().expand(3, N))


def test_the_op_refuses_by_name(op: Callable[..., Tensor]) -> None:
    packed = fasticl.pack(pruned(20, 72), "nm", pattern="2:4")
    portable, fragments = (packed.values, packed.bitmask, None, None, None), to_fragments(packed)
    with pytest.raises(TypeError, match=r"nm_linear: x: expected dtype bfloat16 or float16 .*, got torch\.float32"):
        op(torch.randn(1, 72), *portable, fragments)
    with pytest.raises(ValueError, match=r"nm_linear: fragments: expected shape \[2, 3, 288\], got \[2, 2, 288\]"):
        op(torch.randn(1, 144).bfloat16(), *portable, fragments)
    x = torch.zeros(65, 72).bfloat16()
    with pytest.raises(ValueError, match="nm_linear: expected at most 64 tokens, got 65"):
        Kernels(cuda_on_cpu.load(CSRC), "cpu")(x, fragments, x[:, :20])


def test_the_op_leaves_to_others_what_the_kernel_does_not_take(
    op: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens and weights without the layout to Triton, int8 values to the reference."""
    packed, expected, seen = fasticl.pack(pruned(20, 72), "nm", pattern="2:4"), torch.zeros(0), []
    module = importlib.import_module("fasticl.ops.nm_linear")
    monkeypatch.setattr(module, "_triton", lambda *arguments: seen.append(arguments) or expected)
    for x, fragments in ((torch.zeros(5, 13, 72), to_fragments(packed)), (torch.zeros(64, 72), None)):
        x = x.bfloat16()
        assert op(x, packed.values, packed.bitmask, None, "relu", None, fragments) is expected
        assert all(a is b for a, b in zip(seen.pop(), (x, packed.values, packed.bitmask, None, "relu"), strict=True))
    assert op(x, packed.values, packed.bitmask, None, None, None, to_fragments(packed)).shape == (64, 20)
    int8 = fasticl.pack(pruned(20, 72), "nm", pattern="2:4", values="int8")
    y = op(x, int8.values, int8.bitmask, None, None, int8.scales)
    assert torch.equal(y, fasticl.ops.nm_linear(x, int8))
    assert not seen


def test_the_schema_takes_the_layout() -> None:
    """On the CPU it is passed over; fake tensors and the dispatcher take it."""
    packed, x = fasticl.pack(pruned(20, 72), "nm", pattern="2:4"), torch.randn(2, 3, 72).bfloat16()
    fragments = to_fragments(packed)
    arguments = (x, packed.values, packed.bitmask, None, "relu", None, fragments)
    torch.library.opcheck(torch.ops.fasticl.nm_linear.default, arguments)
    held = replace(packed, fragments=fragments)
    assert torch.equal(fasticl.ops.nm_linear(x, held, None, "relu"), fasticl.ops.nm_linear(x, packed, None, "relu"))


def test_a_module_hands_the_layout_to_the_op(op: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    from fasticl import nn

    packed = fasticl.pack(pruned(20, 72), "nm", pattern="2:4")
    layer = nn.SparseLinear(replace(packed, fragments=to_fragments(packed)), torch.randn(20).bfloat16())
    assert layer.packed.validate().fragments is not None
    monkeypatch.setitem(nn._OPS, "nm", op)
    x = torch.randn(3, 72).bfloat16()
    torch.testing.assert_close(layer(x), fasticl.ops.nm_linear(x, packed, layer.bias))
    assert layer.half().packed.fragments is None  # derived anew where the tensors are: on the CPU there is none


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_module_runs_the_kernel() -> None:
    """A layer moved there, cast there and captured in a CUDA graph."""
    from fasticl.nn import SparseLinear

    weight, x = pruned(48, 200, torch.float16), torch.randn(5, 200)
    layer = SparseLinear(fasticl.pack(weight, "nm", pattern="2:4")).cuda().bfloat16()
    assert layer.packed.validate().fragments is not None
    static = x.bfloat16().cuda()
    expected = layer(static).clone()
    rounded = weight.bfloat16()
    assert_close_to_truth(expected.cpu(), dense(x.bfloat16().double(), rounded.double()), dense(x.bfloat16(), rounded))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(static)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_the_layout_has_the_kernels_numbers() -> None:
    numbers = cuda_on_cpu.load(CSRC).sparse_fragments
    assert {name: getattr(sparse_fragments, name) for name in numbers} == numbers
