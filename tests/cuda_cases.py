"""What the CUDA kernels of the linear ops must all do: one suite, run by the test file of each kernel.

A test file says by a subclass of :class:`Kernels` how its kernel is called, gives it to its tests by a fixture
``kernels``, and subclasses the cases. They run on the CPU, which executes the kernels, and compiled where a GPU is.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_close_to_truth, guarded
from hypothesis import strategies as st
from linear_cases import ACTIVATIONS, dense, double, kernel_edge
from torch import Tensor

import fasticl
from fasticl import PackedWeight
from fasticl.ops import _registry as registry
from fasticl.testing import cuda_on_cpu

CSRC = Path(__file__).parents[1] / "csrc"  # also where the package that is tested is a copy elsewhere
DTYPES = [torch.bfloat16, torch.float16]
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]  # of the fixture
ON_CPU = pytest.mark.parametrize("kernels", ["cpu"], indirect=True)  # what a GPU cannot show


def pruned(N: int, K: int, density: float | Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(N, K).to(dtype).masked_fill(torch.rand(N, K) >= density, 0.0)


class Kernels:
    """One kernel of the module that runs on a device, and the device on which that takes tensors."""

    layout_module: ModuleType  # that derives its layout
    tokens: tuple[int, ...]  # a number for each of its tiles; the last one leaves a tile not full
    plans: tuple[dict[str, Any], dict[str, Any]]  # the second with blocks that share K, if the kernel has them
    density = 0.5

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.module = cuda_on_cpu.load(CSRC) if device == "cpu" else importlib.import_module("fasticl._C_cuda")
        self.set_seed(0)

    def set_seed(self, seed: int) -> None:
        """Another order of blocks, threads and copies; a GPU has its own."""
        if self.device == "cpu":
            self.module.set_seed(seed)

    def weight(
        self, N: int, K: int, dtype: torch.dtype = torch.bfloat16, density: float | Tensor | None = None
    ) -> Tensor:
        """On the CPU; K is rounded down to what the format takes."""
        return pruned(N, K, self.density if density is None else density, dtype)

    def layout(self, weight: Tensor, **plan: Any) -> Any:
        """A dataclass of tensors on the device, and of the plan."""
        raise NotImplementedError

    def launch(self, before: tuple, layout: Any, N: int, K: int, workspace: Tensor, after: tuple) -> None:
        """``before`` and ``after`` are what all kernels take."""
        raise NotImplementedError

    def workspace_bytes(self, M: int, K: int, layout: Any) -> int:
        return 0

    def workspace(self, M: int, K: int, layout: Any) -> Tensor:
        """Of random bytes."""
        return torch.randint(256, (self.workspace_bytes(M, K, layout),), dtype=torch.uint8).to(self.device)

    def __call__(
        self, x: Tensor, layout: Any, y: Tensor, bias: Tensor | None = None, activation: str | None = None,
        workspace: Tensor | None = None,
    ) -> None:  # fmt: skip
        """``y = act(x W^T + bias)`` on matrices that may have row strides."""
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        workspace = self.workspace(*x.shape, layout) if workspace is None else workspace
        before, (*after, _) = kernel_edge(x, y, bias, activation)
        self.launch(before, layout, y.shape[1], x.shape[1], workspace, (*after, 0, stream))

    def output(self, x: Tensor, layout: Any, N: int, *arguments: Any, **options: Any) -> Tensor:
        """Of x on the device; it held NaN."""
        y = torch.full((len(x), N), float("nan"), dtype=x.dtype, device=self.device)
        self(x, layout, y, *arguments, **options)
        return y.cpu()

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **plan: Any
    ) -> Tensor:
        """The product of CPU tensors."""
        x, bias = x.to(self.device), None if bias is None else bias.to(self.device)
        return self.output(x, self.layout(weight, **plan), len(weight), bias, activation)

    def assert_as_dense(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **plan: Any
    ) -> None:
        assert_close_to_truth(
            self.linear(x, weight, bias, activation, **plan),
            dense(x.double(), weight.double(), double(bias), activation),
            dense(x, weight, bias, activation),
        )

    def assert_no_order_changes_a_bit(self, x: Tensor, weight: Tensor, seeds: int, **plan: Any) -> None:
        """The kernel waits for all that it reads, reads all before it is overwritten, and adds in one order."""
        results = []
        for seed in range(seeds):
            self.set_seed(seed)
            results.append(self.linear(x, weight, None, "gelu", **plan))
        assert not results[0].isnan().any()
        assert all(torch.equal(result, results[0]) for result in results)

    def assert_any_as_dense(self, data: st.DataObject, most: tuple[int, int, int], **plan: Any) -> None:
        """For N, M, K of at most those, with rows of any density, and any order of threads."""
        N, M, K = (data.draw(st.integers(0, size), name) for name, size in zip("NMK", most, strict=True))
        dtype = data.draw(st.sampled_from(DTYPES), "dtype")
        densities = st.sampled_from([0.0, 0.01, 0.03, 0.1, 0.5, 1.0])
        rows = torch.tensor(data.draw(st.lists(densities, min_size=N, max_size=N), "rows")).view(N, 1)
        weight = self.weight(N, K, dtype, rows)
        bias = torch.randn(N).to(dtype) if data.draw(st.booleans(), "bias") else None
        activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
        self.set_seed(data.draw(st.integers(0, 1000), "order of threads"))
        self.assert_as_dense(torch.randn(M, weight.shape[1]).to(dtype), weight, bias, activation, **plan)


class KernelCases:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    def test_bias_and_activation(self, kernels: Kernels, activation: str | None, dtype: torch.dtype) -> None:
        weight, bias = kernels.weight(37, 90, dtype), torch.randn(37).to(dtype)
        x = torch.randn(min(9, max(kernels.tokens)), weight.shape[1]).to(dtype)
        for given_bias, plan in itertools.product((bias, None), kernels.plans):
            kernels.assert_as_dense(x, weight, given_bias, activation, **plan)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("stride", "shift"), [(176, 0), (166, 0), (167, 1)])
    @ON_CPU
    def test_nothing_outside_is_read_or_written(
        self, kernels: Kernels, stride: int, shift: int, dtype: torch.dtype
    ) -> None:
        """Between guard bytes, with gaps of NaN between the rows of x and y: rows of x that begin at multiples of 16, 4
        and 2 bytes.
        """
        weight, bias, checks = kernels.weight(37, 165, dtype), torch.randn(37).to(dtype), []
        N, K = weight.shape

        def guard(tensor: Tensor, shift: int = 0) -> Tensor:
            copy, check = guarded(tensor, shift=shift)
            checks.append(check)
            return copy

        layout = kernels.layout(weight, **kernels.plans[shift])
        layout = replace(layout, **{name: guard(t) for name, t in vars(layout).items() if isinstance(t, Tensor)})
        guarded_bias = guard(bias, shift)
        for M in kernels.tokens:
            nan = torch.full((M, stride), float("nan"), dtype=dtype)
            x, y = guard(nan, shift), guard(nan[:, : N + stride - K], shift)
            x[:, :K] = torch.randn(M, K)
            kernels(x[:, :K], layout, y[:, :N], guarded_bias, "relu", guard(kernels.workspace(M, K, layout)))
            truth = dense(x[:, :K].double(), weight.double(), bias.double(), "relu")
            assert_close_to_truth(y[:, :N], truth, dense(x[:, :K], weight, bias, "relu"))
            assert y[:, N:].isnan().all(), "a write between the rows of y"
        for check in checks:
            check()

    @pytest.mark.parametrize(
        ("stride", "offset"), [(130, 0), (131, 0), (132, 0), (136, 0), (136, 1), (136, 2), (0, 0), (1, 0)]
    )
    def test_any_row_stride_and_alignment(self, kernels: Kernels, stride: int, offset: int) -> None:
        buffer = torch.randn(136 * max(kernels.tokens) + 200).bfloat16()
        for weight in (kernels.weight(16, 128), kernels.weight(16, 127)):
            layout = kernels.layout(weight, **kernels.plans[0])
            for M in kernels.tokens:
                strided = ((M, weight.shape[1]), (stride, 1), offset)
                y = kernels.output(buffer.to(kernels.device).as_strided(*strided), layout, 16)
                x = buffer.as_strided(*strided)
                assert_close_to_truth(y, dense(x.double(), weight.double()), dense(x, weight))

    def test_the_layout_has_the_kernels_numbers(self, kernels: Kernels) -> None:
        derived = kernels.layout_module
        numbers = getattr(kernels.module, derived.__name__.rpartition(".")[2])
        assert {name: getattr(derived, name) for name in numbers} == numbers


class WorkspaceCases(KernelCases):
    """Of kernels whose blocks share K: they leave their sums and meet in a workspace."""

    @pytest.mark.parametrize("kind", ["random", "zeros", "ones", "nan"])
    def test_what_the_workspace_held_does_not_matter(self, kernels: Kernels, kind: str) -> None:
        """And a launch leaves it as the next one, a replay of a CUDA graph, can take it."""
        weight = kernels.weight(40, 700)
        layout = kernels.layout(weight, **kernels.plans[1])
        x, results = torch.randn(kernels.tokens[-1], 700).bfloat16(), []
        workspace = kernels.workspace(*x.shape, layout)
        assert workspace.numel() > 0
        if kind != "random":
            ones = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
            workspace.view(torch.float32).fill_({"zeros": 0.0, "ones": ones, "nan": float("nan")}[kind])
        for seed in range(3):
            kernels.set_seed(seed)
            results.append(kernels.output(x.to(kernels.device), layout, 40, workspace=workspace))
        assert_close_to_truth(results[0], dense(x.double(), weight.double()), dense(x, weight))
        assert all(torch.equal(result, results[0]) for result in results)


# ---- behind the op --------------------------------------------------------------------------------------------------


def arguments(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, activation: str | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the op's implementations take, with the layouts that the weight has."""
    sliced = () if packed.sliced is None else vars(packed.sliced).values()
    portable = (packed.values, packed.bitmask, *(() if packed.format == "nm" else (packed.row_offsets,)), *sliced)
    layouts = {} if packed.layouts is None else packed.layouts.arguments
    return (x, *portable, bias, activation), {"scales": packed.scales, **layouts}


class Op:
    """What the dispatcher calls for CUDA tensors, on CPU tensors: with the module that runs there, and no stream.

    ``ran`` has what computed: "Triton", or a kernel by the name of its layout, or "wgmma".
    """

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.module, self.ran = name, importlib.import_module(f"fasticl.ops.{name}"), []
        kernels = cuda_on_cpu.load(CSRC)

        def record(module: ModuleType, function: str, what: str, run: Callable[..., Any]) -> None:
            def recorded(*arguments: Any) -> Any:
                self.ran.append("wgmma" if arguments[-1] is True else what)  # bitmap_linear is told so
                return run(*arguments)

            monkeypatch.setattr(module, function, recorded)

        record(self.module, "_triton", "Triton", self.module.reference)
        layouts = {"bitmap_linear": "lane stream", "nm_linear": "fragments", "sliced_linear": "gather"}
        for function, layout in layouts.items():
            record(kernels, function, layout, getattr(kernels, function))
        for module in ("bitmap_linear", "nm_linear"):
            monkeypatch.setattr(importlib.import_module(f"fasticl.ops.{module}"), "_C_cuda", kernels)
        monkeypatch.setattr(registry, "cuda_stream", lambda x: (0, 0))

    def __call__(
        self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        operands, options = arguments(x, packed, bias, activation)
        return self.module.cuda(*operands, **options)


class OpCases:
    """With a fixture ``op``."""

    runs: str  # the kernel

    def weight(self) -> Tensor:
        """``[20, K]`` in bfloat16, for the kernel."""
        raise NotImplementedError

    def packed(self, op: Op, weight: Tensor) -> list[PackedWeight]:
        """With the layouts that a GPU's weight has, by different plans."""
        raise NotImplementedError

    def test_takes_any_x(self, op: Op) -> None:
        """Batch dimensions, strides, no tokens, a strided bias; a workspace and none."""
        weight, bias = self.weight(), torch.randn(20, 2).bfloat16()[:, 0]
        K = weight.shape[1]
        layouts = {
            "one": torch.randn(K),
            "batches": torch.randn(2, 3, K),
            "transposed": torch.randn(K, 4).T,
            "every second column": torch.randn(3, 2 * K)[:, ::2],
            "every second row": torch.randn(6, K)[::2],
            "no tokens": torch.randn(0, K),
        }
        for (name, x), packed in itertools.product(layouts.items(), self.packed(op, weight)):
            x = x.bfloat16()
            y = op(x, packed, bias, "silu")
            assert op.ran.pop() == self.runs, name
            assert not op.ran, name
            assert y.is_contiguous(), name
            truth = dense(x.double(), weight.double(), bias.double(), "silu")
            assert_close_to_truth(y, truth, dense(x, weight, bias, "silu"))

    def test_without_rows_or_columns(self, op: Op) -> None:
        for N, K in ((0, 72), (5, 0)):
            bias, x = torch.randn(N).half(), torch.randn(3, K).half()
            for packed in self.packed(op, torch.zeros(N, K).half()):
                assert torch.equal(op(x, packed, bias, "relu"), bias.relu().expand(3, N))

    def test_float32_is_refused_by_name(self, op: Op) -> None:
        weight = self.weight()
        expected = rf"{op.name}: x: expected dtype bfloat16 or float16 .*, got torch\.float32"
        with pytest.raises(TypeError, match=expected):
            op(torch.randn(1, weight.shape[1]), self.packed(op, weight)[0])

    def test_the_schema_takes_the_layout(self, op: Op) -> None:
        """On the CPU it is passed over; fake tensors and the dispatcher take it."""
        weight = self.weight()
        x, packed = torch.randn(2, 3, weight.shape[1]).bfloat16(), self.packed(op, weight)[0].validate()
        torch.library.opcheck(getattr(torch.ops.fasticl, op.name).default, *arguments(x, packed, None, "relu"))
        without, call = replace(packed, layouts=None), getattr(fasticl.ops, op.name)
        assert torch.equal(call(x, packed, None, "relu"), call(x, without, None, "relu"))


def module_on_a_gpu(packed: PackedWeight) -> PackedWeight:
    """In a layer that is moved there, cast there and captured in a CUDA graph, which is replayed; the weight there."""
    from fasticl.nn import SparseLinear

    weight, x = packed.unpack().bfloat16(), torch.randn(5, packed.shape[1]).bfloat16()
    layer, static = SparseLinear(packed).cuda().bfloat16(), x.cuda()
    expected = layer(static).clone()
    assert_close_to_truth(expected.cpu(), dense(x.double(), weight.double()), dense(x, weight))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(static)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
    return layer.packed.validate()
