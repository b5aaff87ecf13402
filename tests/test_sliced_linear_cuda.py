"""The CUDA kernel of sliced_linear, executed on the CPU; and, where a GPU is present, compiled, by the same tests."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cuda_cases import DEVICES, DTYPES, ON_CPU, ON_GPU, Kernels, Op, OpCases, WorkspaceCases, module_on_a_gpu, pruned
from helpers import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import dense
from torch import Tensor

import fasticl
from fasticl import PackedWeight, gather_layout, tuned
from fasticl.device_layouts import DeviceLayouts
from fasticl.gather_layout import GatherLayout, to_gather
from fasticl.lane_stream import to_lanes

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


class GatherKernels(Kernels):
    layout_module = gather_layout
    tokens = (1, 2, 3, 4, 8, 5)  # each kernel full, and those of 4 and 8 not
    plans = ({"plan": (1, 2, 3)}, {"plan": (2, 2, 3)})
    density = 0.2

    def layout(self, weight: Tensor, plan: tuple[int, int, int] = (1, 2, 3)) -> GatherLayout:
        return to_gather(fasticl.pack(weight, "bitmap").to(self.device), plan)

    def workspace_bytes(self, M: int, K: int, layout: GatherLayout) -> int:
        return self.module.sliced_linear_workspace(M, len(layout.row_order) // 4, layout.shares, layout.blocks)

    def launch(self, before: tuple, layout: GatherLayout, N: int, K: int, workspace: Tensor, after: tuple) -> None:
        tensors = (t.data_ptr() for t in layout.tensors)
        groups = len(layout.row_order) // 4
        self.module.sliced_linear(*before, *tensors, groups, K, *layout.plan, workspace.data_ptr(), *after)


@pytest.fixture(params=DEVICES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return GatherKernels(request.param)


class TestGatherKernel(WorkspaceCases):
    pass


# ---- parity with the float64 truth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(kernels: Kernels, shape: str, dtype: torch.dtype) -> None:
    N, K, plan = SHAPES[shape]
    weight, bias = pruned(N, K, 0.2, dtype), torch.randn(N).to(dtype)
    for M in kernels.tokens:
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


@ON_CPU
@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_and_mask(kernels: Kernels, data: st.DataObject) -> None:
    kernels.assert_any_as_dense(data, (50, 8, 600), plan=data.draw(st.tuples(*[st.integers(1, 4)] * 3), "plan"))


# ---- what is read, written and repeated -----------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 2, 4, 8])
@pytest.mark.parametrize(("N", "plan", "seeds"), [(40, (1, 2, 3), 6), (40, (3, 2, 2), 6), (5, (8, 1, 1), 40)])
@ON_CPU
def test_no_order_of_blocks_and_threads_changes_a_bit(
    kernels: Kernels, N: int, plan: tuple[int, int, int], seeds: int, M: int
) -> None:
    """Of many shares of few rows some have left their sums before all threads of another have."""
    kernels.assert_no_order_changes_a_bit(torch.randn(M, 300).bfloat16(), pruned(N, 300, 0.2), seeds, plan=plan)


def test_one_share_takes_no_workspace(kernels: Kernels) -> None:
    for M, groups, shares, blocks, expected in [
        (8, 5, 1, 3, 0),
        (0, 5, 2, 3, 0),
        (1, 5, 2, 3, 3 * 8 + 2 * 5 * 4 * 4),
        (3, 5, 2, 3, 3 * 8 + 2 * 5 * 4 * 4 * 4),
        (5, 7, 4, 2, 2 * 8 + 4 * 7 * 4 * 8 * 4),
    ]:
        assert kernels.module.sliced_linear_workspace(M, groups, shares, blocks) == expected


def test_negative_zeros_and_nan_are_weights(kernels: Kernels) -> None:
    """Of a position that is not stored x may be infinite: nothing is multiplied there unless it fills a list up."""
    weight, x = pruned(20, 80, 0.5), torch.randn(2, 80).bfloat16()
    weight[3, 7], weight[4, 8], weight[:, 5], weight[6, 5] = -0.0, float("nan"), 0.0, 2.0
    x[1, 7], x[0, 5] = float("inf"), float("-inf")
    y = kernels.linear(x, weight)
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
    x = torch.randn(9, 16, device=kernels.device).bfloat16()
    with pytest.raises(ValueError, match="sliced_linear: expected at most 8 tokens, got 9"):
        kernels(x, kernels.layout(pruned(8, 16, 0.2)), x.new_empty(9, 8), workspace=x)


# ---- behind the ops -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bitmap_linear", "sliced_linear"])
def op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Op:
    monkeypatch.setattr(importlib.import_module("fasticl.ops.bitmap_linear"), "has_wgmma", lambda values: True)
    return Op(request.param, monkeypatch)


def pack(op: Op, weight: Tensor, plan: tuple[int, int, int] | None = None) -> PackedWeight:
    """With every layout that a GPU's weight has."""
    packed = fasticl.pack(weight, op.name.removesuffix("_linear"))
    lanes = to_lanes(packed) if packed.format == "bitmap" else None
    return replace(packed, layouts=DeviceLayouts(lanes, to_gather(packed, plan)))


class TestOps(OpCases):
    runs = "gather"

    def weight(self) -> Tensor:
        return pruned(20, 70, 0.15)

    def packed(self, op: Op, weight: Tensor) -> list[PackedWeight]:
        return [pack(op, weight, plan) for plan in ((1, 2, 2), (2, 2, 2))]


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
    packed = replace(packed, sliced=None, layouts=DeviceLayouts(gather=to_gather(packed)))  # what this op takes of it
    for M, runs in ((2, "gather"), (9, "Triton")):
        x = torch.randn(M, 400).bfloat16()
        y = op(x, packed)
        assert op.ran.pop() == runs
        assert not op.ran
        assert_close_to_truth(y, dense(x.double(), weight.double()), dense(x, weight))


def test_a_table_has_the_last_word(op: Op) -> None:
    weight, x = pruned(10, 400, 0.1), torch.randn(2, 400).bfloat16()
    packed = pack(op, weight)
    for name in tuned.SPACE[op.name]["implementation"]:
        with tuned.forced(op.name, {"implementation": name}):
            y = op(x, packed)
            assert op.ran == {"CUDA C++": ["gather"], "PyTorch": []}.get(name, [name])
            op.ran.clear()
            assert_close_to_truth(y, dense(x.double(), weight.double()), dense(x, weight))


def test_the_ops_refuse_a_layout_by_name(op: Op) -> None:
    packed = pack(op, pruned(20, 70, 0.1), (2, 1, 1))
    layouts = DeviceLayouts(gather=replace(packed.layouts.gather, shares=1))
    with pytest.raises(ValueError, match=rf"{op.name}: starts: expected shape \[6\], got \[11\]"):
        op(torch.randn(1, 70).bfloat16(), replace(packed, layouts=layouts))


def test_a_layer_hands_its_layouts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it has when it is called, to the op of its format."""
    from fasticl import nn

    x = torch.randn(2, 100).bfloat16()
    for name in ("bitmap", "sliced"):
        packed = fasticl.pack(pruned(20, 100, 0.2), name)
        gather = to_gather(packed)
        layer = nn.SparseLinear(replace(packed, layouts=DeviceLayouts(gather=gather)))
        assert layer.packed.layouts.gather is gather
        seen: dict[str, object] = {}
        monkeypatch.setitem(nn._OPS, name, lambda *arguments, seen=seen, **layouts: seen.update(layouts))
        layer(x)
        assert seen == {"gather": gather.tensors, "gather_plan": gather.plan}
        assert layer.to(torch.float16)._layouts is None  # derived anew, which on the CPU is not at all


@pytest.mark.parametrize(
    ("format", "density", "names"),
    [
        ("bitmap", 0.2, ["lanes", "gather"]),
        ("bitmap", 0.3, ["lanes"]),
        ("sliced", 0.2, ["gather"]),
        ("nm", 0.5, ["fragments"]),
        ("compact", 0.5, []),
    ],
)
def test_which_weights_of_a_gpu_have_which_layouts(
    format: str, density: float, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by a CPU weight that says it is on a GPU of 100 KiB shared memory."""
    weight = pruned(20, 100, density) if format != "nm" else torch.ones(20, 100).half() * (torch.arange(100) % 2)
    packed = fasticl.pack(weight, format)
    card = SimpleNamespace(major=8, multi_processor_count=3, shared_memory_per_block_optin=100 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(fasticl.PackedWeight, "device", property(lambda self: torch.device("cuda")))
    for name in ("lanes", "gather", "fragments"):
        monkeypatch.setattr(f"fasticl.device_layouts.to_{name}", lambda packed, **options: options)
    gpu = {"multiprocessors": 3, "shared_bytes": 100 << 10}
    expected = {name: {} if name == "fragments" else gpu for name in names}
    assert DeviceLayouts.derive(packed) == (DeviceLayouts(**expected) if names else None)


@ON_GPU
@pytest.mark.parametrize("format", ["bitmap", "sliced"])
def test_on_a_gpu_the_module_runs_the_kernel(format: str) -> None:
    """And blocks share its rows."""
    packed = module_on_a_gpu(fasticl.pack(pruned(48, 8192, 0.1, torch.float16), format))
    assert packed.layouts.gather.shares > 1
