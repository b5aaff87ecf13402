"""2:4 weights by cuSPARSELt: on the CPU against a double of torch's two functions, on a GPU with the library itself."""

from __future__ import annotations

import dataclasses
import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_cases import arguments
from helpers import assert_close_to_truth
from linear_cases import ACTIVATIONS, dense, double
from test_nm_linear_cuda import pruned
from torch import Tensor

import fasticl
from fasticl import PackedWeight, cusparselt, tune, tuned
from fasticl.convert import _implementations_text
from fasticl.cusparselt import derive_compressed, to_compressed
from fasticl.device_layouts import DeviceLayouts
from fasticl.sparse_fragments import to_fragments

DTYPES = cusparselt.DTYPES
ON = {"implementation": cusparselt.NAME}
HAS_LIBRARY = torch.cuda.is_available() and torch.backends.cusparselt.is_available()
GPU = pytest.mark.skipif(not HAS_LIBRARY, reason="no GPU, or torch without cuSPARSELt")
# (N, K), tokens, and why
SHAPES = {
    "smallest": (16, 16, (1, 8)),
    "odd_multiples": (48, 80, (7, 9, 65)),
    "wide": (32, 1040, (64, 200)),
    "tall": (272, 64, (1, 65)),
}


class Double:
    """What torch._cslt_compress and torch._cslt_sparse_mm compute, and what they want to be given.

    The layout, of a row: its K / 2 values, then for each a place of two bits. By value, not by bits, two of four are
    chosen; groups that have fewer are filled up from behind, unlike PackedWeight's. Sums are exact and rounded once.
    """

    def __init__(self) -> None:
        self.products = 0

    @staticmethod
    def compress(input: Tensor) -> Tensor:
        N, K = input.shape
        assert input.is_contiguous()
        assert input.dtype in DTYPES
        assert min(N, K) > 0
        assert N % 16 == K % 16 == 0
        groups = input.view(N, K // 4, 4)
        assert ((groups != 0).sum(-1) <= 2).all(), "more than two of four"
        order = 8 * (groups != 0).int() + torch.arange(4, dtype=torch.int32)
        places = order.topk(2, -1).indices.sort(-1).values
        bits = (places.view(N, K // 16, 8) << torch.arange(0, 16, 2)).sum(-1)
        bits = torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16)
        return torch.cat((groups.gather(2, places).view(N, K // 2), bits.view(input.dtype)), 1)

    def sparse_mm(
        self, compressed_A: Tensor, dense_B: Tensor, bias: Tensor | None = None, *, transpose_result: bool
    ) -> Tensor:
        (N, columns), (K, M) = compressed_A.shape, dense_B.shape
        assert columns == 9 * K // 16
        assert transpose_result
        # Strides are not looked at: what is not contiguous counts as the transpose of what is.
        assert dense_B.stride() == (1, K)
        assert not dense_B.is_contiguous()
        assert M % 8 == 0
        for operand in (compressed_A, dense_B, bias):
            if operand is not None:
                assert operand.dtype == compressed_A.dtype
                assert operand.data_ptr() % 16 == 0
        assert bias is None or (bias.shape == (N,) and bias.is_contiguous())
        values, words = compressed_A[:, : K // 2], compressed_A[:, K // 2 :].contiguous().view(torch.int16)
        places = (words[..., None].long() >> torch.arange(0, 16, 2) & 3).view(N, K // 4, 2)
        chosen = dense_B.T.reshape(M, 1, K // 4, 4).expand(M, N, K // 4, 4).gather(3, places.expand(M, -1, -1, -1))
        y = (chosen.double() * values.double().view(N, K // 4, 2)).sum((2, 3))
        self.products += 1
        return (y if bias is None else y + bias.double()).to(dense_B.dtype)


def with_double(monkeypatch: pytest.MonkeyPatch) -> Double:
    double_ = Double()
    monkeypatch.setattr(torch, "_cslt_compress", double_.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", double_.sparse_mm)
    monkeypatch.setattr(cusparselt, "runs_on", lambda device: True)
    return double_


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Double:
    return with_double(monkeypatch)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the double, or the library."""
    if request.param == "cpu":
        with_double(monkeypatch)
    return request.param


def packed_of(weight: Tensor, device: str = "cpu") -> PackedWeight:
    """With the library's layout, as on a GPU whose table names it."""
    with tuned.forced("nm_linear", ON):
        packed = fasticl.pack(weight.to(device), "nm", pattern="2:4")
    assert packed.layouts.compressed is not None
    return packed


def op(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """What the dispatcher calls for CUDA tensors."""
    operands, options = arguments(x, packed, bias, activation)
    return importlib.import_module("fasticl.ops.nm_linear").cuda(*operands, **options)


def assert_as_dense(
    x: Tensor, weight: Tensor, device: str, bias: Tensor | None = None, activation: str | None = None
) -> None:
    packed, on_device = packed_of(weight, device), None if bias is None else bias.to(device)
    with tuned.forced("nm_linear", ON):
        y = op(x.to(device), packed, on_device, activation)
    assert y.is_contiguous()
    truth = dense(x.double(), weight.double(), double(bias), activation)
    assert_close_to_truth(y.cpu(), truth, dense(x, weight, bias, activation))


# ---- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(device: str, shape: str, dtype: torch.dtype) -> None:
    N, K, tokens = SHAPES[shape]
    weight, bias = pruned(N, K, dtype), torch.randn(N).to(dtype)
    for M in tokens:
        for given in (None, bias):
            assert_as_dense(torch.randn(M, K).to(dtype), weight, device, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(device: str, activation: str | None, dtype: torch.dtype) -> None:
    assert_as_dense(torch.randn(70, 64).to(dtype), pruned(32, 64, dtype), device, torch.randn(32).to(dtype), activation)


def test_any_x_and_bias(device: str) -> None:
    """Batch dimensions, strides, tensors that begin anywhere, no tokens."""
    weight, bias = pruned(32, 64), torch.randn(65).bfloat16()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16()

    layouts = {
        "one": normal(64),
        "batches": normal(2, 36, 64),
        "transposed": normal(64, 72).T,
        "every second column": normal(8, 128)[:, ::2],
        "gaps between rows": normal(16, 72)[:, :64],
        "an odd element": normal(16 * 64 + 1)[1:].view(16, 64),
        "no tokens": normal(3, 0, 64),
    }
    for given in (bias[:32], bias[1:33], bias[::2][:32]):
        for x in layouts.values():
            assert_as_dense(x, weight, device, given, "silu")


def test_zeros_of_all_kinds(device: str) -> None:
    """-0.0 and groups of one value and of none, which the library fills up as it likes; a NaN weight stays."""
    weight, x = pruned(32, 64), torch.randn(72, 64).bfloat16()
    weight[0] = 0.0
    weight[1, ::4], weight[1, 1::4], weight[1, 2::4], weight[1, 3::4] = 1.0, -0.0, 0.0, 0.0
    weight[2] = 0.0
    weight[2, 3::4] = -0.0
    weight[3, :4] = torch.tensor([0.0, 0.0, 3.0, 0.0])
    assert_as_dense(x, weight, device)
    weight[4, :4] = torch.tensor([float("nan"), 0.0, 0.0, 0.0])
    packed = packed_of(weight, device)
    with tuned.forced("nm_linear", ON):
        y = op(x.to(device), packed).cpu()
    assert y[:, 4].isnan().all()
    assert y.isnan().sum() == len(x)


def test_an_infinite_x_meets_what_is_stored(library: Double) -> None:
    weight, x = pruned(32, 64), torch.randn(72, 64).bfloat16()
    x[5, 7] = float("inf")
    packed = packed_of(weight)
    with tuned.forced("nm_linear", ON):
        y = op(x, packed)
    stored = packed.keep[:, 7]
    assert torch.equal(y[5].isinf(), stored)
    assert y[torch.arange(72) != 5].isfinite().all()


# ---- who computes ---------------------------------------------------------------------------------------------------


def test_it_computes_where_the_table_says_so_and_nowhere_else(library: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    module, by_triton = importlib.import_module("fasticl.ops.nm_linear"), []
    monkeypatch.setattr(module, "_triton", lambda x, *rest: by_triton.append(x) or x)
    packed, x = packed_of(pruned(32, 64)), torch.randn(65, 64).bfloat16()
    without = dataclasses.replace(packed, layouts=None)
    for config, weight, computes in (
        (ON, packed, True),
        (ON, without, False),
        ({}, packed, False),
        ({"implementation": "Triton"}, packed, False),
        ({"implementation": "CUDA C++"}, packed, False),
    ):
        before = library.products
        with tuned.forced("nm_linear", config):
            op(x, weight)
        assert library.products - before == computes
        assert len(by_triton) == (not computes)
        by_triton.clear()


def test_names_of_what_computes() -> None:
    name = importlib.import_module("fasticl.ops.nm_linear").implementation
    values = torch.zeros(32 * 32, dtype=torch.bfloat16)
    for config, fragments, compressed, at_1_and_65 in (
        (ON, True, True, ("cuSPARSELt", "cuSPARSELt")),
        (ON, False, True, ("cuSPARSELt", "cuSPARSELt")),
        (ON, True, False, ("CUDA C++", "Triton")),
        ({}, True, True, ("CUDA C++", "Triton")),
        ({}, False, True, ("Triton", "Triton")),
        ({"implementation": "Triton"}, True, True, ("Triton", "Triton")),
    ):
        with tuned.forced("nm_linear", config):
            assert tuple(name(values, 32, 64, M, fragments, compressed) for M in (1, 65)) == at_1_and_65


def test_the_op_refuses_by_name(library: Double) -> None:
    packed = packed_of(pruned(32, 64))
    with tuned.forced("nm_linear", ON):
        with pytest.raises(TypeError, match=r"nm_linear: x: expected dtype torch\.bfloat16, got torch\.float16"):
            op(torch.zeros(65, 64).half(), packed)
        with pytest.raises(ValueError, match=r"compressed: expected at least 2304 elements for shape \[32, 128\], got"):
            op(torch.zeros(65, 128).bfloat16(), packed)


def test_the_schema_takes_the_layout(library: Double) -> None:
    packed, x = packed_of(pruned(32, 64)), torch.randn(2, 3, 64).bfloat16()
    torch.library.opcheck(torch.ops.fasticl.nm_linear.default, *arguments(x, packed, None, "relu"))


# ---- which weights have the layout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 1024])
def test_a_weight_has_it_where_the_table_names_it_for_some_tokens(
    library: Double, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of a GPU, with CPU tensors that say they are there."""
    entry = {"op": "nm_linear", "N": 512, "K": 64, "batch": batch, "value_bytes": 2, "density": 0.6, "config": ON}
    (tmp_path / "sm_90.json").write_text(json.dumps({"entries": [entry]}))
    table = tuned.read(tmp_path / "sm_90.json")

    def measured(op: str, x: Tensor, N: int, K: int, M: int, density: float = 1.0) -> Any:
        return table.get(tuned.bucket(op, N, K, M, x.dtype, density), {})

    monkeypatch.setattr(tuned, "lookup", measured)
    assert fasticl.pack(pruned(32, 64), "nm", pattern="2:4").layouts is not None
    assert fasticl.pack(pruned(32, 80), "nm", pattern="2:4").layouts is None  # another bucket


def test_what_it_does_not_take_has_none(library: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    def derived(weight: Tensor, pattern: str = "2:4", **options: Any) -> DeviceLayouts | None:
        return fasticl.pack(weight, "nm", pattern=pattern, **options).layouts

    weight = pruned(32, 64)
    assert derived(weight) is None  # no table
    with tuned.forced("nm_linear", ON):
        assert derived(weight) is not None
        assert derived(weight.float()) is None
        assert derived(weight, "4:8") is None
        assert derived(weight, values="int8") is None
        assert fasticl.pack(weight, "bitmap").layouts is None
        for N, K in ((33, 64), (32, 72), (0, 64), (32, 0)):
            assert derived(pruned(N, K)) is None
        monkeypatch.setattr(cusparselt, "runs_on", lambda device: False)
        assert derived(weight) is None


def test_errors_name_expected_and_got() -> None:
    def packed(*shape: int, pattern: str = "2:4") -> PackedWeight:
        return fasticl.pack(pruned(*shape), "nm", pattern=pattern)

    with pytest.raises(TypeError, match=r"expected values of dtype bfloat16 or float16, got torch\.float32"):
        to_compressed(fasticl.pack(torch.zeros(16, 64), "nm", pattern="2:4"))
    with pytest.raises(ValueError, match="expected format nm with pattern 2:4, got nm, 4:8"):
        to_compressed(packed(16, 64, pattern="4:8"))
    with pytest.raises(ValueError, match=r"expected shape of positive multiples of 16, got \[16, 72\]"):
        to_compressed(packed(16, 72))


def test_a_packed_weight_counts_and_checks_it(library: Double) -> None:
    packed = packed_of(pruned(32, 64)).validate()
    plain = dataclasses.replace(packed, layouts=None)
    assert packed.bytes == plain.bytes + 32 * 64 * 2 * 9 // 16
    assert packed.bytes_read == plain.bytes_read
    assert packed.to("cpu").layouts is None  # derived anew, and no table says so
    wrong = dataclasses.replace(packed, layouts=packed_of(pruned(32, 80)).layouts)
    with pytest.raises(ValueError, match=r"compressed: expected torch\.bfloat16 \[32, 36\], got .* \[32, 45\]"):
        wrong.validate()


def test_a_module_hands_it_to_the_op(library: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    from fasticl import nn

    packed, bias, x = packed_of(pruned(32, 64)), torch.randn(32).bfloat16(), torch.randn(70, 64).bfloat16()
    layer = nn.SparseLinear(packed, bias)
    monkeypatch.setitem(nn._OPS, "nm", importlib.import_module("fasticl.ops.nm_linear").cuda)
    with tuned.forced("nm_linear", ON):
        y = layer(x)
        assert layer.half()._layouts.compressed.dtype == torch.float16
        assert "_layouts" not in layer.state_dict()
    assert library.products == 1
    torch.testing.assert_close(y, fasticl.ops.nm_linear(x, packed, bias))
    assert layer.bfloat16()._layouts is None


def test_explain_names_it(library: Double) -> None:
    layer = fasticl.nn.SparseLinear(packed_of(pruned(32, 64)))
    assert _implementations_text(layer, (1, 128)) == "; Triton at 1 / 128"
    layer._layouts = dataclasses.replace(layer._layouts, fragments=to_fragments(layer.packed))
    with tuned.forced("nm_linear", ON):
        assert _implementations_text(layer, (1, 128)) == "; cuSPARSELt at 1 / 128"
    assert _implementations_text(layer, (1, 128)) == "; CUDA C++ at 1; Triton at 128"


# ---- where the library runs -----------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with GPUs of compute capability 9.0, whose tensors are the CPU's, and a library that takes them."""
    double_, here = Double(), SimpleNamespace(capability=(9, 0), error=None, asked=[])

    def compress(input: Tensor) -> Tensor:
        here.asked.append(input.shape)
        if here.error:
            raise RuntimeError(here.error)
        return double_.compress(input)

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", double_.sparse_mm)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: here.capability)
    monkeypatch.setattr(cusparselt, "_runs", {})
    return here


def test_one_device_of_a_process_has_it(card: SimpleNamespace) -> None:
    for _ in range(2):
        assert cusparselt.runs_on(torch.device("cuda", 1))
        assert not cusparselt.runs_on(torch.device("cuda", 0))
        assert not cusparselt.runs_on(torch.device("cpu"))
    assert len(card.asked) == 1


@pytest.mark.parametrize("reason", ["not built", "rocm", "old card", "refused"])
def test_elsewhere_it_is_not_used(card: SimpleNamespace, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: Callable[[], Any] = warnings.catch_warnings
    if reason == "not built":
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    elif reason == "rocm":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    elif reason == "old card":
        card.capability = (7, 5)
    else:
        card.error = "CUDA error: architecture mismatch when calling `cusparseLtInit(&handle)`\nmore"

        def warned() -> Any:
            return pytest.warns(
                UserWarning, match=r"not used on cuda:0: CUDA error: architecture mismatch .*handle\)`$"
            )

    with warned():
        assert not cusparselt.runs_on(torch.device("cuda", 0))
    assert not cusparselt.runs_on(torch.device("cuda", 0))
    assert len(card.asked) == (reason == "refused")


def test_what_is_said_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    names = importlib.import_module("fasticl.ops.nm_linear")._cuda_names
    for available in (False, True):
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda available=available: available)
        assert any("cuSPARSELt" in name for name in names()) == available


# ---- how it is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpp", [True, False])
@pytest.mark.parametrize("fastest", ["cuSPARSELt", "Triton", "default"])
def test_tuning_records_it_where_it_is_faster(
    library: Double, fastest: str, cpp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a fake clock; the calls compute with the double, where their configuration says so."""
    ran = []
    monkeypatch.setattr(tune, "has_cuda_kernel", cpp)
    monkeypatch.setattr(tune, "_runs", lambda name, dtype: cpp or name != "CUDA C++")
    monkeypatch.setattr(tune, "LAYERS", ((48, 64),))
    monkeypatch.setattr(fasticl.ops, "nm_linear", op)
    module = importlib.import_module("fasticl.ops.nm_linear")
    monkeypatch.setattr(module, "_triton", module.reference)

    def time(problem: tune.Problem, calls: Any, configs: Any) -> list[float]:
        ran.extend(config.get("implementation", "default") for config in configs)
        return [0.5 if config.get("implementation", "default") == fastest else 1.0 for config in configs]

    problems = tune.problems(["nm_linear"], torch.bfloat16, "cpu")
    assert [problem.batch for problem in problems] == [1, 16, 64, 256, 1024]
    entry = tune.search(problems[-1], time)
    default = {"implementation": "CUDA C++"} if cpp else {}
    assert entry["config"] == {"cuSPARSELt": ON, "Triton": {"implementation": "Triton"}}.get(fastest, default)
    assert library.products == 1  # agreed with the default before it was timed
    assert "cuSPARSELt" in ran
    tuned.check("", "nm_linear", entry["config"])


def test_without_the_library_it_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "has_cuda_kernel", True)
    monkeypatch.setattr(tune, "LAYERS", ((48, 64),))
    ran: list[str] = []

    def time(problem: tune.Problem, calls: Any, configs: Any) -> list[float]:
        ran.extend(config.get("implementation", "default") for config in configs)
        return [1.0] * len(configs)

    monkeypatch.setattr(cusparselt, "runs_on", lambda device: False)
    tune.search(tune.problems(["nm_linear"], torch.bfloat16, "cpu")[-1], time)
    assert {*ran} == {"default", "Triton"}


@GPU
def test_on_a_gpu_a_module_runs_in_a_cuda_graph() -> None:
    from fasticl.nn import SparseLinear

    layer = SparseLinear(packed_of(pruned(256, 512), "cuda"), torch.randn(256).bfloat16().cuda())
    with tuned.forced("nm_linear", ON):
        x = torch.randn(130, 512).bfloat16().cuda()
        expected = layer(x).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
    dense_layer = layer.to_dense()
    assert_close_to_truth(expected.cpu(), dense_layer.double()(x.double()).cpu(), dense_layer.bfloat16()(x).cpu())


def test_derive_on_the_cpu_is_none() -> None:
    packed = fasticl.pack(pruned(32, 64), "nm", pattern="2:4")
    with tuned.forced("nm_linear", ON):
        assert derive_compressed(packed) is None
