"""The CUDA kernel of sliced_linear, executed on the CPU; and, where a GPU is present, compiled, by the same tests."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import assert_close_to_truth, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import ACTIVATIONS, dense, double
from torch import Tensor

import fasticl
from fasticl import gather_layout, tuned
from fasticl.formats import PackedWeight, device_layouts
from fasticl.gather_layout import GatherLayout, derive_gather, to_gather
from fasticl.lane_stream import derive_lanes, to_lanes
from fasticl.ops import _registry as registry
from fasticl.testing import cuda_on_cpu

DTYPES = gather_layout.DTYPES
CSRC = Path(__file__).parents[1] / "csrc"  # also where the package that is tested is a copy elsewhere
TENSORS = ("records", "starts", "row_order")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
WIDTHS = (1, 2, 3, 4, 5, 8)  # tokens: each kernel full, and those of 4 and 8 not
# (N, K), plan, and why
SHAPES = {
    "one_row": (1, 100, (1, 1, 1)),
    "one_column": (70, 1, (1, 2, 4)),
    "a_group_a_warp": (32, 128, (1, 2, 4)),
    "n_and_k_of_no_multiple": (33, 75, (1, 3, 2)),
    "several_groups_a_warp": (90, 203, (1, 2, 3)),
    "more_warps_than_groups": (9, 64, (1, 2, 16)),
    "shares_of_unequal_length": (50, 203, (3, 2, 3)),
    "more_shares_than_eights": (20, 30, (6, 1, 2)),
    "more_blocks_than_groups": (7, 200, (2, 5, 1)),
    "many_records": (5, 3001, (1, 1, 2)),
}


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
        """Another order of threads and blocks; a GPU has its own."""
        if self.device == "cpu":
            self.module.set_seed(seed)

    def __call__(
        self, x: Tensor, layout: GatherLayout, y: Tensor, bias: Tensor | None = None, activation: str | None = None,
        workspace: Tensor | None = None,
    ) -> None:  # fmt: skip
        """``y = act(x W^T + bias)`` on matrices that may have row strides."""
        M, K = x.shape
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        workspace = self.workspace(M, layout) if workspace is None else workspace
        self.module.sliced_linear(
            x.data_ptr(), M, x.stride(0), layout.records.data_ptr(), layout.starts.data_ptr(),
            layout.row_order.data_ptr(), len(layout.row_order) // 4, K, *layout.plan, workspace.data_ptr(),
            registry.address(bias), registry.ACTIVATIONS[activation], y.data_ptr(), y.stride(0),
            registry.DTYPES[x.dtype], 0, stream,
        )  # fmt: skip

    def workspace(self, M: int, layout: GatherLayout) -> Tensor:
        """Of random bytes."""
        size = self.module.sliced_linear_workspace(M, len(layout.row_order) // 4, layout.shares, layout.blocks)
        return torch.randint(256, (size,), dtype=torch.uint8).to(self.device)

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
        plan: tuple[int, int, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """The product of CPU tensors, into an output that held NaN."""
        x, bias = x.to(self.device), None if bias is None else bias.to(self.device)
        layout = to_gather(fasticl.pack(weight, "bitmap").to(self.device), plan)
        y = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype, device=self.device)
        self(x, layout, y, bias, activation)
        return y.cpu()

    def assert_as_dense(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
        plan: tuple[int, int, int] | None = (1, 2, 3),
    ) -> None:  # fmt: skip
        assert_close_to_truth(
            self.linear(x, weight, bias, activation, plan),
            dense(x.double(), weight.double(), double(bias), activation),
            dense(x, weight, bias, activation),
        )


def pruned(N: int, K: int, density: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(N, K).to(dtype).masked_fill(torch.rand(N, K) >= density, 0.0)


# ---- parity with the float64 truth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(kernels: Kernels, shape: str, dtype: torch.dtype) -> None:
    N, K, plan = SHAPES[shape]
    weight, bias = pruned(N, K, 0.2, dtype), torch.randn(N).to(dtype)
    for M in WIDTHS:
        kernels.assert_as_dense(torch.randn(M, K).to(dtype), weight, bias, plan=plan)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.2, 0.5, 1.0])
def test_densities(kernels: Kernels, density: float) -> None:
    """Lists from empty to full, and with gaps that no step has."""
    for dtype, M in itertools.product(DTYPES, (1, 2, 4, 7)):
        kernels.assert_as_dense(torch.randn(M, 700).to(dtype), pruned(30, 700, density, dtype))


def test_rows_of_very_different_length(kernels: Kernels) -> None:
    """Empty ones and dense ones, by rows and by columns: lanes of a warp end at different records."""
    for by_rows in (True, False):
        N, K = 45, 900
        chance = torch.rand(N, 1) ** 4 if by_rows else (torch.arange(K) % 8 == 3).float() * 0.7
        keep = torch.rand(N, K) < chance
        keep[:3] = False
        kernels.assert_as_dense(torch.randn(4, K).bfloat16(), torch.randn(N, K).bfloat16().masked_fill(~keep, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_bias_and_activation(kernels: Kernels, activation: str | None, dtype: torch.dtype) -> None:
    weight, bias, x = pruned(37, 90, 0.3, dtype), torch.randn(37).to(dtype), torch.randn(3, 90).to(dtype)
    for given_bias, plan in itertools.product((bias, None), ((1, 2, 3), (2, 2, 3))):
        kernels.assert_as_dense(x, weight, given_bias, activation, plan)


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_and_mask(data: st.DataObject) -> None:
    kernels = Kernels(cuda_on_cpu.load(CSRC), "cpu")
    N, M, K = (data.draw(st.integers(0, most), name) for most, name in ((50, "N"), (8, "M"), (600, "K")))
    plan, dtype = data.draw(st.tuples(*[st.integers(1, 4)] * 3), "plan"), data.draw(st.sampled_from(DTYPES), "dtype")
    kinds = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])
    rows = torch.tensor(data.draw(st.lists(kinds, min_size=N, max_size=N), "rows")).view(N, 1)
    weight = torch.randn(N, K).to(dtype).masked_fill(torch.rand(N, K) >= rows, 0.0)
    bias = torch.randn(N).to(dtype) if data.draw(st.booleans(), "bias") else None
    activation = data.draw(st.sampled_from(ACTIVATIONS), "activation")
    kernels.set_seed(data.draw(st.integers(0, 1000), "order of threads"))
    kernels.assert_as_dense(torch.randn(M, K).to(dtype), weight, bias, activation, plan)


# ---- what is read, written and repeated -----------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 2, 4, 8])
@pytest.mark.parametrize(("N", "plan", "seeds"), [(40, (1, 2, 3), 6), (40, (3, 2, 2), 6), (5, (8, 1, 1), 40)])
def test_no_order_of_blocks_and_threads_changes_a_bit(N: int, plan: tuple[int, int, int], seeds: int, M: int) -> None:
    """Of many shares of few rows some have left their sums before all threads of another have."""
    kernels = Kernels(cuda_on_cpu.load(CSRC), "cpu")
    weight, x = pruned(N, 300, 0.2), torch.randn(M, 300).bfloat16()
    results = []
    for seed in range(seeds):
        kernels.set_seed(seed)
        results.append(kernels.linear(x, weight, None, "gelu", plan))
    assert not results[0].isnan().any()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", ["random", "zeros", "ones", "nan"])
def test_what_the_workspace_held_does_not_matter(kernels: Kernels, kind: str) -> None:
    """And a launch leaves it as the next one, a replay of a CUDA graph, can take it."""
    weight, x = pruned(40, 300, 0.2), torch.randn(5, 300).bfloat16().to(kernels.device)
    layout = to_gather(fasticl.pack(weight, "bitmap").to(kernels.device), (4, 3, 2))
    workspace = kernels.workspace(5, layout)
    if kind != "random":
        held = {"zeros": 0.0, "ones": torch.tensor(-1, dtype=torch.int32).view(torch.float32), "nan": float("nan")}
        workspace.view(torch.float32).fill_(held[kind])
    results = []
    for seed in range(3):
        kernels.set_seed(seed)
        y = torch.full((5, 40), float("nan"), dtype=x.dtype, device=kernels.device)
        kernels(x, layout, y, workspace=workspace)
        results.append(y)
    x = x.cpu()
    assert_close_to_truth(results[0].cpu(), dense(x.double(), weight.double()), dense(x, weight))
    assert all(torch.equal(result, results[0]) for result in results)


def test_one_share_takes_no_workspace(kernels: Kernels) -> None:
    for M, groups, shares, blocks, expected in [
        (8, 5, 1, 3, 0),
        (0, 5, 2, 3, 0),
        (1, 5, 2, 3, 3 * 8 + 2 * 5 * 4 * 4),
        (3, 5, 2, 3, 3 * 8 + 2 * 5 * 4 * 4 * 4),
        (5, 7, 4, 2, 2 * 8 + 4 * 7 * 4 * 8 * 4),
    ]:
        assert kernels.module.sliced_linear_workspace(M, groups, shares, blocks) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_nothing_outside_is_read_or_written(shift: int, dtype: torch.dtype) -> None:
    """Between guard bytes, with gaps of NaN between the rows of x and y, aligned and off by one element."""
    kernels = Kernels(cuda_on_cpu.load(CSRC), "cpu")
    N, K, gap = 37, 165, 3
    weight, bias, checks = pruned(N, K, 0.2, dtype), torch.randn(N).to(dtype), []

    def guard(tensor: Tensor, shift: int = 0) -> Tensor:
        copy, check = guarded(tensor, shift=shift)
        checks.append(check)
        return copy

    layout = to_gather(fasticl.pack(weight, "bitmap"), (1 + shift, 2, 3))
    layout = replace(layout, **{name: guard(getattr(layout, name)) for name in TENSORS})
    guarded_bias = guard(bias, shift)
    for M in WIDTHS:
        nan = torch.full((M, K + gap), float("nan"), dtype=dtype)
        x, y = guard(nan, shift), guard(nan[:, : N + gap], shift)
        x[:, :K] = torch.randn(M, K)
        kernels(x[:, :K], layout, y[:, :N], guarded_bias, "relu", guard(kernels.workspace(M, layout)))
        truth = dense(x[:, :K].double(), weight.double(), bias.double(), "relu")
        assert_close_to_truth(y[:, :N], truth, dense(x[:, :K], weight, bias, "relu"))
        assert y[:, N:].isnan().all(), "a write between the rows of y"
    for check in checks:
        check()


@pytest.mark.parametrize(("stride", "offset"), [(130, 0), (131, 0), (136, 1), (0, 0), (1, 0)])
def test_any_row_stride_and_alignment(kernels: Kernels, stride: int, offset: int) -> None:
    buffer = torch.randn(8 * 136 + 200).bfloat16()
    weight = pruned(16, 127, 0.3)
    layout = to_gather(fasticl.pack(weight, "bitmap").to(kernels.device), (1, 1, 2))
    for M in WIDTHS:
        x = buffer.as_strided((M, 127), (stride, 1), offset)
        y = torch.full((M, 16), float("nan"), dtype=x.dtype, device=kernels.device)
        kernels(buffer.to(kernels.device).as_strided((M, 127), (stride, 1), offset), layout, y)
        assert_close_to_truth(y.cpu(), dense(x.double(), weight.double()), dense(x, weight))


def test_negative_zeros_and_nan_are_weights(kernels: Kernels) -> None:
    """Of a position that is not stored x may be infinite: nothing is multiplied there unless it fills a list up."""
    weight, x = pruned(20, 80, 0.5), torch.randn(2, 80).bfloat16()
    weight[3, 7], weight[4, 8], weight[:, 5], weight[6, 5] = -0.0, float("nan"), 0.0, 2.0
    x[1, 7], x[0, 5] = float("inf"), float("-inf")
    y = kernels.linear(x, weight, None, None)
    assert y[1, 3].isnan(), "infinity times a zero that is stored"
    assert y[:, 4].isnan().all()
    assert y[0, 6] == float("-inf")
    stored = weight.view(torch.int16) != 0
    meets = (x.isfinite().logical_not()[:, None] & stored).any(-1)
    assert not (y.isfinite() & meets).any()
    finite = ~meets & y.isfinite()
    assert finite[0, weight[:, 5].view(torch.int16) == 0].any(), "what is stored nowhere in a row is mostly skipped"
    expected = dense(x.nan_to_num(posinf=0.0, neginf=0.0), weight)
    torch.testing.assert_close(y[finite], expected[finite], rtol=0.02, atol=0.02)


def test_too_many_tokens_are_refused(kernels: Kernels) -> None:
    layout = to_gather(fasticl.pack(pruned(8, 16, 0.2), "bitmap").to(kernels.device))
    x = torch.randn(9, 16, device=kernels.device).bfloat16()
    with pytest.raises(ValueError, match="sliced_linear: expected at most 8 tokens, got 9"):
        kernels(x, layout, x.new_empty(9, 8), workspace=x)


# ---- behind the ops -------------------------------------------------------------------------------------------------


class Op:
    """What the dispatcher calls for CUDA tensors, on CPU tensors: with the module that runs there, and no stream.

    ``ran`` is what it ran of others: Triton, or a kernel of the lane stream.
    """

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        bitmap = importlib.import_module("fasticl.ops.bitmap_linear")
        module = importlib.import_module(f"fasticl.ops.{name}")
        loaded, self.name, self.ran = cuda_on_cpu.load(CSRC), name, []
        self.cuda = module.cuda

        def recorded(what: str, run: Callable[..., object]) -> Callable[..., object]:
            return lambda *arguments: (self.ran.append(what), run(*arguments))[1]

        kernels = {
            "bitmap_linear": lambda *arguments: recorded(
                "wgmma" if arguments[-1] else "lane stream", loaded.bitmap_linear
            )(*arguments),
            "sliced_linear": recorded("gather", loaded.sliced_linear),
            "bitmap_linear_workspace": loaded.bitmap_linear_workspace,
            "bitmap_linear_wgmma_workspace": loaded.bitmap_linear_wgmma_workspace,
            "sliced_linear_workspace": loaded.sliced_linear_workspace,
        }
        monkeypatch.setattr(bitmap, "_C_cuda", SimpleNamespace(**kernels))
        monkeypatch.setattr(bitmap, "has_wgmma", lambda values: True)
        monkeypatch.setattr(registry, "cuda_stream", lambda x: (0, 0))
        monkeypatch.setattr(module, "_triton", recorded("Triton", module.reference))

    def __call__(
        self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None, activation: str | None = None,
        gather: GatherLayout | None = None,
    ) -> Tensor:  # fmt: skip
        """With every layout that a GPU's weight has; ``gather`` takes the place of its own."""
        operands = [packed.values, packed.bitmask, packed.row_offsets]
        lanes = to_lanes(packed) if self.name == "bitmap_linear" else None
        if packed.sliced is not None:
            operands += vars(packed.sliced).values()
        layouts = device_layouts(lanes, gather or to_gather(packed))
        self.ran.clear()
        return self.cuda(x, *operands, bias, activation, **layouts)


@pytest.fixture(params=["bitmap_linear", "sliced_linear"])
def op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Op:
    return Op(request.param, monkeypatch)


def pack(op: Op, weight: Tensor) -> PackedWeight:
    return fasticl.pack(weight, op.name.removesuffix("_linear"))


def test_the_ops_take_any_x(op: Op) -> None:
    """Batch dimensions, strides, no tokens, a strided bias; a workspace and none."""
    weight, bias = pruned(20, 70, 0.15), torch.randn(20, 2).bfloat16()[:, 0]
    packed = pack(op, weight)
    layouts = {
        "one": torch.randn(70),
        "batches": torch.randn(2, 3, 70),
        "transposed": torch.randn(70, 4).T,
        "every second column": torch.randn(3, 140)[:, ::2],
        "every second row": torch.randn(6, 70)[::2],
        "no tokens": torch.randn(0, 70),
    }
    for (name, x), plan in itertools.product(layouts.items(), ((1, 2, 2), (2, 2, 2))):
        x = x.bfloat16()
        y = op(x, packed, bias, "silu", to_gather(packed, plan))
        assert op.ran == ["gather"], name
        assert y.is_contiguous(), name
        truth = dense(x.double(), weight.double(), bias.double(), "silu")
        assert_close_to_truth(y, truth, dense(x, weight, bias, "silu"))


def test_the_ops_without_rows_or_columns(op: Op) -> None:
    for N, K in ((0, 70), (5, 0)):
        bias = torch.randn(N).half()
        y = op(torch.randn(3, K).half(), pack(op, torch.zeros(N, K).half()), bias, "relu")
        assert torch.equal(y, bias.relu().expand(3, N))


@pytest.mark.parametrize(
    ("M", "density", "gathers"),
    [(1, 0.24, True), (4, 0.24, True), (5, 0.24, False), (5, 0.17, True), (8, 0.0, True), (9, 0.1, False),
     (1, 0.26, False)],
)  # fmt: skip
def test_tokens_and_density_choose_the_kernel(op: Op, M: int, density: float, gathers: bool) -> None:
    weight = torch.zeros(10, 400).half()
    weight.view(-1)[torch.randperm(4000)[: round(4000 * density)]] = torch.randn(round(4000 * density)).half()
    packed, x = pack(op, weight), torch.randn(M, 400).half()
    y = op(x, packed)
    other = "lane stream" if op.name == "bitmap_linear" else "Triton"
    assert op.ran == ["gather" if gathers else other]
    assert_close_to_truth(y, dense(x.double(), weight.double()), dense(x, weight))


def test_a_sliced_weight_under_bitmap_linear_gathers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layouts it has only these lists: for more tokens Triton computes."""
    op, weight = Op("bitmap_linear", monkeypatch), pruned(10, 400, 0.1)
    packed = fasticl.pack(weight, "sliced")
    for M, runs in ((2, "gather"), (9, "Triton")):
        x = torch.randn(M, 400).bfloat16()
        layouts = device_layouts(None, to_gather(packed))
        op.ran.clear()
        y = op.cuda(x, packed.values, packed.bitmask, packed.row_offsets, None, None, **layouts)
        assert op.ran == [runs]
        assert_close_to_truth(y, dense(x.double(), weight.double()), dense(x, weight))


def test_a_table_has_the_last_word(op: Op) -> None:
    weight, x = pruned(10, 400, 0.1), torch.randn(2, 400).bfloat16()
    packed = pack(op, weight)
    for name in tuned.SPACE[op.name]["implementation"]:
        with tuned.forced(op.name, {"implementation": name}):
            y = op(x, packed)
            assert op.ran == {"CUDA C++": ["gather"], "PyTorch": []}.get(name, [name])
            assert_close_to_truth(y, dense(x.double(), weight.double()), dense(x, weight))


def test_the_ops_refuse_by_name(op: Op) -> None:
    packed = pack(op, pruned(20, 70, 0.1))
    wrong = replace(to_gather(packed, (2, 1, 1)), shares=1)
    with pytest.raises(TypeError, match=rf"{op.name}: x: expected dtype bfloat16 or float16 .*, got torch\.float32"):
        op(torch.randn(1, 70), packed)
    with pytest.raises(ValueError, match=rf"{op.name}: starts: expected shape \[6\], got \[11\]"):
        op(torch.randn(1, 70).bfloat16(), packed, gather=wrong)


def test_the_schemas_take_the_layout() -> None:
    """On the CPU it is passed over; fake tensors and the dispatcher take it."""
    weight, x = pruned(20, 70, 0.1), torch.randn(2, 3, 70).bfloat16()
    for name in ("bitmap", "sliced"):
        packed = fasticl.pack(weight, name)
        held = replace(packed, gather=to_gather(packed))
        call = getattr(fasticl.ops, f"{name}_linear")
        assert torch.equal(call(x, held.validate(), None, "relu"), call(x, packed, None, "relu"))
        layout = () if packed.sliced is None else tuple(vars(packed.sliced).values())
        arguments = (x, packed.values, packed.bitmask, packed.row_offsets, *layout, None, "relu")
        function = getattr(torch.ops.fasticl, f"{name}_linear").default
        torch.library.opcheck(function, arguments, device_layouts(None, held.gather))


def test_validate_sees_a_layout_that_is_not_the_weights() -> None:
    packed = fasticl.pack(pruned(20, 100, 0.2), "bitmap")
    layout = to_gather(packed)
    held = replace(packed, gather=layout).validate()
    assert held.bytes == packed.bytes + held.bytes_read
    assert held.bytes_read == sum(t.numel() * t.element_size() for t in layout.tensors)
    for name in TENSORS:
        wrong = getattr(layout, name).clone()
        wrong.view(-1)[0] += 1
        with pytest.raises(ValueError, match=rf"gather\.{name}: expected what the portable form gives"):
            replace(packed, gather=replace(layout, **{name: wrong})).validate()


def test_a_layer_hands_its_layouts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it has when it is called, to the op of its format."""
    from fasticl import nn

    x = torch.randn(2, 100).bfloat16()
    for name in ("bitmap", "sliced"):
        packed = fasticl.pack(pruned(20, 100, 0.2), name)
        layer = nn.SparseLinear(replace(packed, gather=to_gather(packed)))
        assert layer.packed.gather is layer._gather is not None
        seen: dict[str, object] = {}
        monkeypatch.setitem(nn._OPS, name, lambda *arguments, seen=seen, **layouts: seen.update(layouts))
        layer(x)
        assert seen == {"gather": layer._gather.tensors, "gather_plan": layer._gather.plan}
        assert layer.to(torch.float16)._gather is None  # derived anew, which on the CPU is not at all


@pytest.mark.parametrize(
    ("format", "density", "lanes", "gather"),
    [
        ("bitmap", 0.2, True, True),
        ("bitmap", 0.3, True, False),
        ("sliced", 0.2, False, True),
        ("nm", 0.5, False, False),
    ],
)
def test_which_weights_of_a_gpu_have_which_layouts(
    format: str, density: float, lanes: bool, gather: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by a CPU weight that says it is on a GPU of 100 KiB shared memory."""
    weight = pruned(20, 100, density) if format != "nm" else torch.ones(20, 100).half() * (torch.arange(100) % 2)
    packed = fasticl.pack(weight, format)
    card = SimpleNamespace(major=8, multi_processor_count=3, shared_memory_per_block_optin=100 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(fasticl.PackedWeight, "device", property(lambda self: torch.device("cuda")))
    for module, derive, expected in (("lane_stream", derive_lanes, lanes), ("gather_layout", derive_gather, gather)):
        make = {"lane_stream": "to_lanes", "gather_layout": "to_gather"}[module]
        monkeypatch.setattr(f"fasticl.{module}.{make}", lambda packed, **options: options)
        assert derive(packed) == ({"multiprocessors": 3, "shared_bytes": 100 << 10} if expected else None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("format", ["bitmap", "sliced"])
def test_on_a_gpu_the_module_runs_the_kernel(format: str) -> None:
    """A layer moved there, cast there and captured in a CUDA graph, which is replayed; blocks share its rows."""
    from fasticl.nn import SparseLinear

    weight, x = pruned(48, 8192, 0.1, torch.float16), torch.randn(5, 8192)
    layer = SparseLinear(fasticl.pack(weight, format)).cuda().bfloat16()
    assert layer.packed.validate().gather.shares > 1
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
    numbers = cuda_on_cpu.load(CSRC).gather_layout
    assert {name: getattr(gather_layout, name) for name in numbers} == numbers
