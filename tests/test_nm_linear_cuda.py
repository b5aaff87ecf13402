"""The CUDA kernel of nm_linear, executed on the CPU; and, where a GPU is present, compiled, by the same tests."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import cuda_cases
import pytest
import torch
from cuda_cases import DEVICES, DTYPES, ON_CPU, ON_GPU, KernelCases, Kernels, Op, OpCases, module_on_a_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import dense
from test_sparse_fragments import fragments_of, two_of_four
from torch import Tensor

import fasticl
from fasticl import PackedWeight, sparse_fragments
from fasticl.device_layouts import DeviceLayouts
from fasticl.sparse_fragments import to_fragments

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


def pruned(N: int, K: int, dtype: torch.dtype = torch.bfloat16, density: float | Tensor = 1.0) -> Tensor:
    """Of that density within two of four."""
    return cuda_cases.pruned(N, K, density, dtype).masked_fill(~two_of_four(N, K), 0.0)


def packed_of(weight: Tensor) -> PackedWeight:
    """With the layout."""
    packed = fasticl.pack(weight, "nm", pattern="2:4")
    return replace(packed, layouts=DeviceLayouts(fragments=to_fragments(packed)))


@dataclass(frozen=True)
class Planned:
    fragments: Tensor
    plan: tuple[int, int]  # strips a block, splits; 0: the kernel chooses


class FragmentKernels(Kernels):
    layout_module = sparse_fragments
    tokens = (1, 8, 17, 40)
    plans = ({"splits": 2}, {"strips": 2, "splits": 3})

    def weight(
        self, N: int, K: int, dtype: torch.dtype = torch.bfloat16, density: float | Tensor | None = None
    ) -> Tensor:
        return pruned(N, K // 4 * 4, dtype, 1.0 if density is None else density)

    def layout(self, weight: Tensor, strips: int = 0, splits: int = 0) -> Planned:
        return Planned(fragments_of(weight).to(self.device), (strips, splits))

    def launch(self, before: tuple, layout: Planned, N: int, K: int, workspace: Tensor, after: tuple) -> None:
        self.module.nm_linear(*before, layout.fragments.data_ptr(), N, K, *after, *layout.plan)


@pytest.fixture(params=DEVICES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return FragmentKernels(request.param)


class TestFragmentKernel(KernelCases):
    pass


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


@ON_CPU
@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_and_mask(kernels: Kernels, data: st.DataObject) -> None:
    strips, splits = data.draw(st.sampled_from([0, 1, 2, 4]), "strips"), data.draw(st.integers(0, 8), "splits")
    kernels.assert_any_as_dense(data, (70, 64, 300), strips=strips, splits=splits)


# ---- what is read, written and repeated -----------------------------------------------------------------------------


@pytest.mark.parametrize("K", [64 * 13, 64 * 13 - 4])  # rows of x begin at multiples of 16 bytes, and of 8
@ON_CPU
def test_no_order_of_threads_and_copies_changes_a_bit(kernels: Kernels, K: int) -> None:
    kernels.assert_no_order_changes_a_bit(torch.randn(12, K).bfloat16(), pruned(32, K), 9, strips=2, splits=2)


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
def op(monkeypatch: pytest.MonkeyPatch) -> Op:
    return Op("nm_linear", monkeypatch)


class TestOp(OpCases):
    runs = "fragments"

    def weight(self) -> Tensor:
        return pruned(20, 72)

    def packed(self, op: Op, weight: Tensor) -> list[PackedWeight]:
        return [packed_of(weight)]


def test_the_op_refuses_a_layout_by_name(op: Op) -> None:
    with pytest.raises(ValueError, match=r"nm_linear: fragments: expected shape \[2, 3, 288\], got \[2, 2, 288\]"):
        op(torch.randn(1, 144).bfloat16(), packed_of(pruned(20, 72)))


def test_too_many_tokens_are_refused(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match="nm_linear: expected at most 64 tokens, got 65"):
        kernels.linear(torch.zeros(65, 72).bfloat16(), pruned(20, 72))


def test_the_op_leaves_to_others_what_the_kernel_does_not_take(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens and weights without the layout to Triton, int8 values to the reference."""
    packed, expected, seen = packed_of(pruned(20, 72)), torch.zeros(0), []
    monkeypatch.setattr(op.module, "_triton", lambda *arguments: seen.append(arguments) or expected)
    for x, held in ((torch.zeros(5, 13, 72), packed), (torch.zeros(64, 72), replace(packed, layouts=None))):
        x = x.bfloat16()
        assert op(x, held, None, "relu") is expected
        assert all(a is b for a, b in zip(seen.pop(), (x, packed.values, packed.bitmask, None, "relu"), strict=True))
    assert op(x, packed).shape == (64, 20)
    int8 = fasticl.pack(pruned(20, 72), "nm", pattern="2:4", values="int8")
    assert torch.equal(op(x, int8), fasticl.ops.nm_linear(x, int8))
    assert not seen


def test_a_module_hands_the_layout_to_the_op(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    from fasticl import nn

    packed = packed_of(pruned(20, 72))
    layer = nn.SparseLinear(packed, torch.randn(20).bfloat16())
    assert layer.packed.validate().layouts is packed.layouts
    monkeypatch.setitem(nn._OPS, "nm", op.module.cuda)
    x = torch.randn(3, 72).bfloat16()
    torch.testing.assert_close(layer(x), fasticl.ops.nm_linear(x, packed, layer.bias))
    assert layer.half().packed.layouts is None  # derived anew where the tensors are: on the CPU there is none


@ON_GPU
def test_on_a_gpu_the_module_runs_the_kernel() -> None:
    packed = module_on_a_gpu(fasticl.pack(pruned(48, 200, torch.float16), "nm", pattern="2:4"))
    assert packed.layouts.fragments is not None
