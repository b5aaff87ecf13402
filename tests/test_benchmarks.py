"""The benchmarks: rows are well formed, wrong kernels are not timed, runs resume, figures and tables come out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fasticl
from fasticl import sweep

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("benchmarks/ is not part of an installed package", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import bench_attention_mlp  # noqa: E402
import bench_bandwidth  # noqa: E402
import bench_decoder  # noqa: E402
import bench_decoder_block  # noqa: E402
import bench_fused_mlp  # noqa: E402
import bench_model  # noqa: E402
import common  # noqa: E402
import environment  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_clock  # noqa: E402
import gpu_models  # noqa: E402
import linear  # noqa: E402
import plot  # noqa: E402
import run  # noqa: E402
import strips  # noqa: E402
import tables  # noqa: E402

HERE = environment.Environment("cpu", 1, torch.__version__, "", "0", "abc")
QUICK = {"seconds": 0.01, "min_samples": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(function: Callable[..., Tensor] | None = None, **options: object) -> common.Case:
    kept = [(0.5, "unstructured"), (0.9, "unstructured")]
    function = function or fasticl.ops.bitmap_linear
    return linear.linear_case("bitmap_linear", function, 48, 32, 2, "float32", kept, **options)


def check_rows(rows: list[dict[str, str]]) -> None:
    baseline = next(row for row in rows if row["impl"] == row["baseline"])
    for row in rows:
        assert set(row) == set(common.COLUMNS)
        assert not any("," in value or "{" in value for value in row.values())
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert float(row["gbps"]) > 0
        assert 0 <= float(row["rel_err"]) < 0.05
        assert float(row["speedup"]) == pytest.approx(float(baseline["ms_p50"]) / float(row["ms_p50"]), rel=1e-2)


def test_rows_are_well_formed() -> None:
    rows = common.measure(tiny(targets=True), HERE, **QUICK)
    check_rows(rows)
    impls = [(row["impl"], row["sparsity"]) for row in rows]
    assert {("torch", "0"), ("numpy", "0"), ("fasticl", "0.5"), ("fasticl", "0.9")} <= set(impls)
    assert len(set(impls)) == len(impls)
    assert {row["baseline"] for row in rows} <= {"torch", "numpy"}
    lesser = {f"fasticl_{target}" for target in fasticl._C.targets()[:-1]}
    assert lesser <= {impl for impl, _ in impls}
    assert fasticl._C.target() == fasticl._C.targets()[-1]  # forced during those calls only


@pytest.mark.parametrize("batch", [1, 16])
def test_bytes_and_flops_count_what_is_stored(batch: int) -> None:
    case = linear.linear_case(
        "bitmap_linear", fasticl.ops.bitmap_linear, 48, 32, batch, "float32", [(0.5, "unstructured")]
    )
    found = {contender.impl: contender for contender in case.build()}
    assert found["torch"].bytes == 4 * (48 * 32 + batch * 32 + batch * 48)
    assert found["torch"].flops == 2 * 48 * 32 * batch
    assert found["fasticl"].flops == found["torch"].flops // 2
    packed = fasticl.pack(linear.pruned(48, 32, 0.5, "unstructured", "float32"), "bitmap")
    assert found["fasticl"].bytes == packed.bytes_read + 4 * (batch * 32 + batch * 48)


def test_plain_reading_gets_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_bandwidth, "ROWS", 8)
    bench_bandwidth.buffer.cache_clear()
    rows = common.measure(tiny(others=lambda x: [bench_bandwidth.read_only()]), HERE, **QUICK)
    rows += common.measure(bench_bandwidth.cases(True)[0], HERE, **QUICK)
    bench_bandwidth.buffer.cache_clear()
    reads = [row for row in rows if row["impl"].startswith("read_only")]
    assert len(reads) == 4
    assert [row["impl"] for row in reads].count("read_only") == 2
    assert {(row["baseline"], row["speedup"]) for row in reads} == {("", "")}
    assert all(
        float(row["gbps"]) == pytest.approx(8 * 4096 * 4 / float(row["ms_p50"]) / 1e6, rel=1e-3) for row in reads
    )


def drop_one_weight(x: Tensor, packed: fasticl.PackedWeight) -> Tensor:
    weight = packed.unpack()
    n, k = weight.nonzero()[-1]
    weight[n, k] = 0
    return x @ weight.T


def last_row_unwritten(x: Tensor, packed: fasticl.PackedWeight) -> Tensor:
    y = x @ packed.unpack().T
    y[..., -1] = float("nan")
    return y


def coarse(x: Tensor, packed: fasticl.PackedWeight) -> Tensor:
    return (x.bfloat16() @ packed.unpack().bfloat16().T).float()


@pytest.mark.parametrize("kernel", [drop_one_weight, last_row_unwritten, coarse])
def test_wrong_kernel_is_not_timed(
    kernel: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(common.WrongResult, match=r"fasticl unstructured 0\.5: expected a relative error of at most"):
        common.measure(tiny(kernel), HERE, **QUICK)
    monkeypatch.setattr(run, "selected", lambda options: [tiny(kernel)])
    out = tmp_path / "results.csv"
    assert run.main(["--quick", "--threads", "1", "--out", str(out)]) == 1
    assert not out.exists()
    assert "WRONG, not timed" in capsys.readouterr().out


def test_every_copy_is_checked() -> None:
    contender = next(c for c in tiny().build() if c.impl == "fasticl")
    broken = replace(contender, calls=[*contender.calls, lambda: contender.calls[0]() * 1.001])
    case = replace(tiny(), build=lambda: [broken])
    with pytest.raises(common.WrongResult):
        common.measure(case, HERE, **QUICK)


def test_cold_contenders_rotate_their_own_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "cold_bytes", lambda device: 5 * 48 * 32 * 4)
    cold = {f"{c.impl} {c.sparsity}": c for c in tiny(cache="cold").build()}
    assert len(cold["torch 0.0"].calls) == 5
    assert len(cold["fasticl 0.5"].calls) > 5
    assert len(cold["fasticl 0.9"].calls) > len(cold["fasticl 0.5"].calls)
    packed = [call.args[-1].values.data_ptr() for call in cold["fasticl 0.5"].calls]
    assert len(set(packed)) == len(packed)
    assert all(len(c.calls) == 1 for c in tiny(cache="hot").build())


def test_dense_torch_and_numpy_alone_are_best_dense() -> None:
    case = linear.linear_case("bitmap_linear", fasticl.ops.bitmap_linear, 48, 32, 16, "float32", [])
    assert {c.impl for c in case.build() if c.dense} == {"torch", "numpy"}
    half = linear.linear_case("bitmap_linear", fasticl.ops.bitmap_linear, 48, 32, 16, "bfloat16", [])
    assert {c.impl for c in half.build()} == {"torch"}


def test_onnxruntime_computes_the_same() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    x, weight = torch.randn(16, 32), torch.randn(48, 32)
    matmul = linear.onnxruntime_matmul(weight)
    assert matmul is not None
    torch.testing.assert_close(torch.from_numpy(matmul(x.numpy())), x @ weight.T)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16"])
def test_pruned_keeps_n_of_m(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    weight = linear.pruned(16, 32, 0.5, pattern, "float32")
    assert torch.count_nonzero(weight.view(-1, m), dim=1).eq(n).all()


def test_pruned_sparsity_is_exact() -> None:
    assert torch.count_nonzero(linear.pruned(50, 40, 0.95, "unstructured", "float32")) == 100
    assert linear.pruned(50, 40, 0.2, "neuron", "float32").shape == (40, 40)


def test_nm_case() -> None:
    kept = [(0.5, pattern) for pattern in ("2:4", "4:8", "8:16")]
    check_rows(
        common.measure(
            linear.linear_case("nm_linear", fasticl.ops.nm_linear, 16, 32, 1, "float32", kept), HERE, **QUICK
        )
    )


def test_sliced_case() -> None:
    case = linear.linear_case("sliced_linear", fasticl.ops.sliced_linear, 48, 64, 1, "float32", [(0.9, "unstructured")])
    check_rows(common.measure(case, HERE, **QUICK))


@pytest.mark.parametrize("mlp", [(48, 32, "gelu_tanh", False), (48, 32, "silu", True)], ids=["gelu", "gated"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mlp_case(mlp: tuple[int, int, str, bool], dtype: str) -> None:
    case = bench_fused_mlp.mlp_case(*mlp, 2, dtype, (0.5,), "sweep")
    rows = common.measure(case, HERE, **QUICK)
    check_rows(rows)
    assert {row["pattern"] for row in rows if row["impl"] == "fasticl"} == {"neuron", "unstructured"}


@pytest.mark.parametrize("Q", [None, 3])
def test_attention_case(Q: int | None) -> None:
    case = bench_attention_mlp.attention_case((3, 5, 16, 8), "float32", "sweep", compiled=False, Q=Q)
    rows = common.measure(case, HERE, **QUICK)
    check_rows(rows)
    assert ("fasticl+separate" in {row["impl"] for row in rows}) == (Q is not None)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("llama", [False, True], ids=["gpt2", "llama"])
def test_decoder_block_case(llama: bool, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decoder_block, "BLOCKS", {"tiny": (24, 4, 2 if llama else 4, 6, 16, llama)})
    rows = common.measure(bench_decoder_block.block_case("tiny", batch, "bfloat16", "sweep", context=9), HERE, **QUICK)
    check_rows(rows)
    assert {(row["impl"], row["sparsity"]) for row in rows} == {
        ("torch", "0"), ("torch_smaller", "0.5"), ("fasticl", "0"), ("fasticl", "0.5"),
    }  # fmt: skip


@pytest.mark.parametrize("library", ["plain", "transformers"])
@pytest.mark.parametrize("step", [bench_model.prefill, bench_model.decode])
def test_model_case(step: Callable[..., Callable[[], Tensor]], library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "transformers":
        pytest.importorskip("transformers")
    monkeypatch.setattr(sys.modules["fasticl.convert"], "SECONDS", 1e-3)
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 256}
    with torch.no_grad():
        rows = common.measure(bench_model.model_case(library, "tiny", step, 1, **sizes), HERE, **QUICK)
    check_rows(rows)
    assert {row["impl"] for row in rows} == {"torch", "masked", "fasticl", "fasticl+head"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoder_case(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys.modules["fasticl.convert"], "SECONDS", 1e-3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 80}  # fmt: skip
    monkeypatch.setattr(bench_decoder.llama_cpp_baseline, "available", lambda: False)
    ways = {"": bench_model.decode, "+decoder": bench_decoder.step}
    with torch.no_grad():
        rows = common.measure(bench_decoder.decoder_case("tiny", dtype, ways, 1, **sizes), HERE, **QUICK)
    check_rows(rows)
    assert {(row["impl"], row["sparsity"]) for row in rows} == {
        ("torch", "0"), ("fasticl+decoder", "0"),
        *((impl, sparsity) for sparsity in ("0.5", "0.8")
          for impl in ("masked", "fasticl", "fasticl+decoder", "fasticl+int8", "fasticl+int8+decoder")),
    }  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 16])
def test_llama_cpp_computes_the_same_model(tokens: int) -> None:
    pytest.importorskip("llama_cpp")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 96, "tie_word_embeddings": True}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16().eval()
    way = bench_model.decode if tokens == 1 else partial(bench_model.prefill, length=tokens)
    with torch.no_grad():
        contender = bench_decoder.llama_cpp(model, way, tokens)
        assert contender.truth.check(contender.calls[0](), "llama.cpp") < bench_decoder.LLAMA_CPP_TOLERANCE / 2


def test_model_bytes_count_packed_layers() -> None:
    layer = torch.nn.Linear(64, 48)
    fasticl.sparsify_(layer, fasticl.Magnitude(0.5))
    packed = fasticl.pack(layer.weight, "bitmap")
    assert bench_model.weight_bytes(layer) == 4 * (48 * 64 + 48)
    assert bench_model.nonzeros(layer) == 48 * 64 // 2
    assert bench_model.weight_bytes(fasticl.nn.SparseLinear.from_linear(layer, "bitmap")) == packed.bytes + 4 * 48


def test_all_cases_are_distinct_and_cover_every_op() -> None:
    for arguments in ([], ["--quick"]):
        cases = run.selected(run.parse(arguments))
        assert {case.op for case in cases} == set(run.CPU_OPS) - ({"model", "decoder"} if arguments else set())
        tiers = [case.tier for case in cases]
        assert tiers == sorted(tiers)  # headline first
    assert {case.op for case in run.selected(run.parse(["--op", "nm_linear"]))} == {"nm_linear"}
    assert {case.dtype for case in run.selected(run.parse(["--dtype", "bfloat16"]))} == {"bfloat16"}


def stub_capture(calls: Sequence[Callable[[], object]]) -> tuple[Callable[[], float], int]:
    """As gpu_clock.capture, without a GPU: the calls themselves, by the wall clock."""

    def replay() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e3

    return replay, len(calls)


def test_gpu_clock_divides_replays_by_their_calls() -> None:
    milliseconds = {"slow": iter([100.0, 6.0, 8.0, 10.0]), "fast": iter([100.0, 1.0, 2.0, 3.0])}
    calls = {"slow": 4, "fast": 2}

    def capture(contender: Sequence[Callable[[], object]]) -> tuple[Callable[[], float], int]:
        name = contender[0]()
        return lambda: next(milliseconds[name]), calls[name]

    timed, refused = gpu_clock.interleaved(
        {name: [lambda name=name: name] for name in calls}, seconds=1e-9, min_samples=3, capture=capture
    )
    assert not refused
    assert (timed["slow"].ms_p50, timed["fast"].ms_p50) == (2.0, 1.0)  # the first replay warms up
    assert (timed["slow"].samples, timed["slow"].repeats) == (3, 4)


def test_gpu_rows_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases' own tensors, checks and rows; where they lie and how they are timed is stubbed."""
    monkeypatch.setattr(gpu_clock, "interleaved", partial(gpu_clock.interleaved, capture=stub_capture))
    there = replace(HERE, device="cuda")
    rows = common.measure(tiny(), there, **QUICK)
    rows += common.measure(bench_attention_mlp.attention_case((3, 5, 16, 8), "float32", "sweep", compiled=False), there)
    assert {row["device"] for row in rows} == {"cuda"}
    assert {row["impl"] for row in rows} >= {"torch", "fasticl"}
    monkeypatch.setattr(gpu_cases, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_cases, "MATMUL", 64)
    for case in gpu_cases.cases(True)[:3]:
        (row,) = common.measure(case, there, **QUICK)
        assert row["impl"] in ("read_only", "copy", "matmul")
        assert (row["baseline"], row["speedup"]) == ("", "")


def test_a_graph_holds_as_many_rounds_as_are_short() -> None:
    assert gpu_clock.rounds_of(3, 0.06) == 7  # 20 calls
    assert gpu_clock.rounds_of(20, 0.4) == 1
    assert gpu_clock.rounds_of(1, 2.0) == 5  # 10 ms
    assert gpu_clock.rounds_of(4, 80.0) == 1


@pytest.mark.parametrize("gated", [True, False], ids=["llama", "gpt2"])
def test_decoding_models(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "PAST", 5)
    shape = gpu_models.Shape("tiny", 2, 64, 4, 2 if gated else 4, 96, 80, gated)
    with torch.no_grad():
        case = gpu_models.decode_case(shape, 3, "float32", tier="sweep")
        contenders = case.build()
        found = {contender.name: contender for contender in contenders}
        again = found["fasticl unstructured 0.5"]
        torch.testing.assert_close(again.calls[0](), again.calls[0](), rtol=0, atol=0)  # a step leaves no trace
        dense = found["torch dense 0"]
        assert found["fasticl neuron 0.5"].bytes == found["torch_smaller neuron 0.5"].bytes < dense.bytes
        assert found["fasticl unstructured 0.8"].bytes < again.bytes < dense.bytes
        rows = common.measure(replace(case, build=lambda: contenders), HERE, **QUICK)
    check_rows(rows)
    assert len(rows) == 2 + len(gpu_models.KEPT)


def test_the_token_of_a_decoding_model_sees_the_whole_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention against the definition, head by head, positions as complex numbers."""
    monkeypatch.setattr(gpu_models, "PAST", 5)
    shape = gpu_models.Shape("tiny", 1, 32, 4, 2, 8, 8, True)
    attention = gpu_models.Attention(shape, 2).double()
    past = attention.cache[..., :5, :].clone()
    x = torch.randn(2, 32, dtype=torch.float64)
    with torch.no_grad():
        y = attention(x)
        q, k, v = attention.qkv(x).view(2, 8, 8).split((4, 2, 2), 1)
    turn = torch.polar(torch.ones(4).double(), 5 * gpu_models.ROTARY_BASE ** (torch.arange(4).double() / -4))

    def rotate(heads: Tensor) -> Tensor:
        turned = torch.complex(*heads.chunk(2, -1)) * turn
        return torch.cat((turned.real, turned.imag), -1)

    keys, values = torch.cat((past[0], rotate(k)[:, :, None]), 2), torch.cat((past[1], v[:, :, None]), 2)
    heads = []
    for head in range(4):
        scores = (keys[:, head // 2] @ rotate(q)[:, head, :, None]).squeeze(2) / 8**0.5
        heads.append((scores.softmax(1)[:, None] @ values[:, head // 2]).squeeze(1))
    torch.testing.assert_close(y, attention.out(torch.cat(heads, 1)), rtol=1e-5, atol=1e-5)


def test_icl_model_over_pruning_rates() -> None:
    with torch.no_grad():
        rows = common.measure(gpu_models.icl_case(5, 16, 20, 3, "float32", tier="sweep"), HERE, **QUICK)
    check_rows(rows)
    assert [row["sparsity"] for row in rows if row["impl"] == "fasticl"] == ["0", "0.25", "0.5", "0.75", "0.9"]


def test_torch_s_own_sparse_layers(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(3, 64)
    for impl, pattern in (("torch_csr", "unstructured"), ("torch_bsr", "block"), ("torch_smaller", "neuron")):
        (contender,) = linear.torch_sparse(impl, 96, 64, 0.5, pattern, x, "float32", "hot")
        assert contender.optional
        assert contender.truth.check(contender.calls[0](), impl) < 1e-5
        assert contender.flops == 2 * 96 * 64 * 3 // 2
    assert torch.count_nonzero(linear.pruned(96, 64, 0.5, "block", "float32")) == 96 * 64 // 2
    if not torch.cuda.is_available():
        assert linear.torch_sparse("torch_2_4", 96, 64, 0.5, "2:4", x, "float32", "hot") == []
        assert "torch_2_4 is not measured: RuntimeError: " in capsys.readouterr().out
        assert linear.nm_on_cusparselt(96, 64, x, "float32", "hot") == []
        refused = "fasticl_cusparselt is not measured: RuntimeError: cuSPARSELt does not take [96, 64], torch.float32"
        assert refused in capsys.readouterr().out


def test_strips_of_rows_list_the_columns_of_all_their_rows() -> None:
    keep = torch.rand(40, 30) < 0.1  # the last strip has eight rows
    union = [{int(k) for row in keep[n : n + 16] for k in row.nonzero()} for n in range(0, 40, 16)]
    assert strips.listed(keep) == pytest.approx(sum(map(len, union)) / (3 * 30))
    assert sorted(strips.similar_rows(keep).tolist()) == list(range(40))


def test_strips_find_rows_that_share_their_columns() -> None:
    """Four kinds of rows, shuffled: sorted, a strip lists what one of its rows stores."""
    kinds = torch.rand(4, 96).argsort(1) < 24
    keep = kinds.repeat_interleave(16, 0)[torch.randperm(64)]
    (row, total) = strips.count({"a.up_proj": keep})
    assert (row["linear"], total["linear"]) == ("up_proj", "all")
    assert float(row["density"]) == float(row["sorted"]) == 0.25
    assert float(row["as_they_are"]) > 0.5
    assert float(row["strip_bytes"]) == pytest.approx(2 * 0.25 * 17 / 16, abs=1e-4)


@pytest.mark.parametrize("when", ["checked", "captured", "wrong"])
def test_an_optional_baseline_may_be_refused(
    when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_clock, "interleaved", partial(gpu_clock.interleaved, capture=stub_capture))
    normal, *others = tiny().build()
    calls = 0

    def call() -> Tensor:
        nonlocal calls
        calls += 1
        if when == "checked" or (when == "captured" and calls > 1):
            raise NotImplementedError("no kernel\nin this torch")
        return normal.calls[0]() * (1.1 if when == "wrong" else 1)

    refusing = replace(normal, impl="torch_csr", calls=[call], optional=True)
    rows = common.measure(replace(tiny(), build=lambda: [normal, refusing, *others]), replace(HERE, device="cuda"))
    assert {row["impl"] for row in rows} == {"torch", "fasticl", "numpy"}
    reason = "WrongResult" if when == "wrong" else "NotImplementedError: no kernel\n"
    assert f"torch_csr dense 0 is not measured: {reason}" in capsys.readouterr().out
    needed, calls = replace(tiny(), build=lambda: [normal, replace(refusing, optional=False)]), 0
    with pytest.raises((NotImplementedError, common.WrongResult)):
        common.measure(needed, replace(HERE, device="cuda"))


def test_compiled_linear() -> None:
    x = torch.randn(2, 32)
    for contender in linear.torch_compiled(48, 32, x, "float32", "hot"):  # none without a compiler
        assert contender.dense
        assert contender.truth.check(contender.calls[0](), "torch_compile") < 1e-5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ranges_around_cases_and_contenders(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_clock, "interleaved", partial(gpu_clock.interleaved, capture=stub_capture))
    opened: list[str] = []

    @contextmanager
    def annotate(message: str) -> Iterator[None]:
        opened.append(message)
        yield

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    common.measure(tiny(), replace(HERE, device=device), mark=common.nvtx_ranges(), **QUICK)
    assert opened[0] == str(tiny())
    assert {"torch dense 0", "fasticl unstructured 0.5", "fasticl unstructured 0.9"} <= set(opened[1:])
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with common.nvtx_ranges()("without the package"):
        pass


def test_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "selected", lambda options: [tiny(), replace(tiny(), shape="other")])
    file, out = tmp_path / "folder" / "trace.json", tmp_path / "results.csv"
    assert run.main(["--quick", "--threads", "1", "--out", str(out), "--trace", str(file)]) == 0
    assert not out.exists()
    names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
    for case in (tiny(), replace(tiny(), shape="other")):
        assert names.count(str(case)) == 1
    assert names.count("fasticl unstructured 0.9") == 2
    assert names.count("fasticl::bitmap_linear") == 4  # once each: what checks them is before
    assert "aten::randn" not in names


def test_a_run_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "selected", lambda options: [tiny(), replace(tiny(), shape="other")])
    arguments = ["--quick", "--threads", "1", "--out", str(tmp_path / "results.csv")]
    assert run.main([*arguments, "--minutes", "1e-6"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 cases to measure" in out
    assert "past 0 s; run again for the rest" in out
    assert run.main(arguments) == 0
    assert {row["shape"] for row in common.read_rows(tmp_path / "results.csv")} == {"48x32", "other"}


class DrawnOnTheDevice(TorchFunctionMode):
    """A generator of a GPU draws for tensors there alone, and where these are has to be said."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: dict | None = None
    ) -> object:
        if kwargs and kwargs.get("generator") is not None:
            assert "device" in kwargs, f"{func}: a generator, and no device"
        return func(*args, **(kwargs or {}))


def test_gpu_cases_draw_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA", "GPT2"):
        sizes = {"layers": 1, "width": 64, "heads": 4, "kv_heads": 4, "hidden": 64, "vocabulary": 32}
        monkeypatch.setattr(gpu_models, name, replace(getattr(gpu_models, name), **sizes))
    blocks = {name: (24, 4, 2, 6, 16, llama) for name, (*_, llama) in bench_decoder_block.BLOCKS.items()}
    monkeypatch.setattr(bench_decoder_block, "BLOCKS", blocks)
    found = [
        tiny(),
        bench_attention_mlp.attention_case((3, 5, 16, 8), "bfloat16", "sweep", compiled=False, Q=2),
        bench_fused_mlp.mlp_case(32, 16, "silu", True, 2, "bfloat16", (0.5,), "sweep"),
        *bench_decoder_block.cases(False),
        gpu_models.decode_case(gpu_models.LLAMA, 1, "bfloat16", tier="sweep"),
    ]
    with torch.no_grad(), DrawnOnTheDevice():
        for case in found:
            assert case.build()


def test_a_case_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build() -> list[common.Contender]:
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(run, "selected", lambda options: [replace(tiny(), shape="refused", build=build), tiny()])
    assert run.main(["--quick", "--threads", "1", "--out", str(tmp_path / "results.csv")]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: CUDA error: invalid argument" in out
    assert out.count("FAILED, not timed") == 1
    assert {row["shape"] for row in common.read_rows(tmp_path / "results.csv")} == {"48x32"}


def test_gpu_cases_rotate_copies_past_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "device", lambda: "cuda")
    monkeypatch.setattr(bench_attention_mlp, "device", lambda: "cuda")
    properties = SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert common.copies_of(32 << 20, "cold") == 3
    assert environment.last_level_cache_bytes("cuda") == 60 << 20
    assert environment.cold_bytes("cuda") == 75 << 20
    assert environment.cold_bytes() >= 256 << 20
    assert common.copies_of(32 << 20, "hot") == 1


def test_gpu_cases_cover_every_op() -> None:
    for arguments in (["--quick"], []):
        cases = run.selected(run.parse(["--device", "cuda", *arguments]))
        assert {case.op for case in cases} == set(run.OPS) - {"decoder"}
        assert cases[0].op == "bandwidth"  # ceilings first
        assert run.estimate(cases, 0.3) < 60 * run.GPU_MINUTES
    batches = {case.batch for case in cases if case.op == "bitmap_linear"}
    assert (min(batches), max(batches)) == (1, 256)
    assert {case.op for case in run.selected(run.parse(["--device", "cuda", "--op", "nm_linear"]))} == {"nm_linear"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_gpu_run_without_a_gpu_is_refused() -> None:
    with pytest.raises(SystemExit, match="expected cpu on a machine without a CUDA device, got cuda"):
        run.main(["--device", "cuda", "--quick"])


def test_a_case_that_is_listed_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_nm_linear

    monkeypatch.setattr(bench_nm_linear, "cases", lambda quick: [tiny(), tiny()])
    with pytest.raises(ValueError, match="expected each of them once"):
        run.selected(run.parse(["--op", "nm_linear"]))


def test_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(tiny(), shape="other")
    monkeypatch.setattr(run, "selected", lambda options: [tiny(), other])
    arguments = ["--quick", "--threads", "1", "--out", str(tmp_path / "results.csv")]
    assert run.main(arguments) == 0
    first = common.read_rows(tmp_path / "results.csv")
    assert {row["shape"] for row in first} == {"48x32", "other"}
    assert run.main(arguments) == 0
    assert capsys.readouterr().out.count("already measured") == 2
    assert common.read_rows(tmp_path / "results.csv") == first
    assert run.main([*arguments, "--force"]) == 0
    assert len(common.read_rows(tmp_path / "results.csv")) == len(first)


def test_other_sources_are_measured_again(tmp_path: Path) -> None:
    results = common.Results(tmp_path / "results.csv")
    results.put(common.measure(tiny(), HERE, **QUICK))
    results = common.Results(tmp_path / "results.csv")
    assert results.has(tiny(), HERE)
    assert not results.has(tiny(), replace(HERE, git="def"))
    assert not results.has(tiny(), replace(HERE, threads=2))
    assert not results.has(replace(tiny(), batch=3), HERE)


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("op,impl\na,b\n")
    with pytest.raises(ValueError, match=r"expected columns op,impl,device.*got op,impl"):
        common.Results(tmp_path / "results.csv")


def test_source_version_names_commit_and_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ("git", "-C", str(tmp_path), *who, *arguments), check=True, capture_output=True, text=True
        ).stdout

    assert environment.source_version(tmp_path) == ""
    (tmp_path / "setup.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short=10", "HEAD").strip()
    assert environment.source_version(tmp_path) == commit
    (tmp_path / "notes.txt").write_text("not a source")
    assert environment.source_version(tmp_path) == commit
    versions = {commit}
    for text in ("2", "3"):
        (tmp_path / "setup.py").write_text(text)
        versions.add(environment.source_version(tmp_path))
    assert len(versions) == 3
    assert all(version.startswith(commit) for version in versions)


def test_source_version_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment.source_version() == ""


def test_cpu_slug_is_a_file_name() -> None:
    slug = environment.cpu_slug(2)
    assert slug.endswith("-2threads")
    assert set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def row(op: str, impl: str, speedup: float, **columns: object) -> dict[str, str]:
    """A row as ``measure`` writes it, its dense baseline taking 2 ms and reading 64e6 bytes."""
    ms = 2 / speedup
    density = 1 - float(str(columns.get("sparsity", 0)))
    made = {
        "op": op, "impl": impl, "device": "cpu", "dtype": "float32", "shape": "4096x4096", "sparsity": "0",
        "pattern": "unstructured" if density < 1 else "dense", "batch": "1", "ms_p50": f"{ms}", "ms_p20": f"{ms}",
        "ms_p80": f"{ms}", "gbps": f"{64 * (density + (density < 1) / 32) / ms}", "tflops": "1", "rel_err": "1e-7",
        "baseline": "torch", "speedup": f"{speedup}", "torch": "2.0", "triton": "", "fasticl": "0.1", "git": "abc",
        "utc": "2000-01-01T00:00:00Z", "threads": "2", "cache": "hot",
    }  # fmt: skip
    return made | {column: str(value) for column, value in columns.items()}


@pytest.fixture
def rows() -> list[dict[str, str]]:
    made = []
    for op in ("bitmap_linear", "sliced_linear", "fused_mlp"):
        for batch in (1, 16):
            for impl in ("torch", "onnxruntime"):
                made.append(row(op, impl, 1.0 if impl == "torch" else 1.2, batch=batch))
            for sparsity in (0.5, 0.8, 0.9):
                made.append(row(op, "fasticl", 1 / (1.1 - sparsity), batch=batch, sparsity=sparsity))
    made.append(row("bitmap_linear", "read_only", 1, pattern="none", gbps=32))
    made += [row("nm_linear", "torch", 1), row("nm_linear", "fasticl", 1.7, sparsity=0.5, pattern="2:4")]
    shape = "L512-d64-m256"
    for impl, speedup in (("torch", 0.5), ("torch_compile", 1), ("fasticl", 1.9)):
        made.append(row("attention_mlp", impl, speedup, batch=64, shape=shape, baseline="torch_compile"))
    for impl, sparsity, speedup in (
        ("torch", 0, 1),
        ("masked", 0.5, 1),
        ("fasticl", 0.5, 1.7),
        ("fasticl+head", 0.5, 2),
    ):
        made.append(row("model", impl, speedup, sparsity=sparsity, shape="gpt2-124M-decode"))
    for impl, sparsity, speedup in (("torch", 0, 1), ("fasticl+decoder", 0.5, 4), ("llama_cpp_q4_1", 0, 3)):
        made.append(row("decoder", impl, speedup, sparsity=sparsity, shape="smollm2-135M-decode128"))
    return made


def test_figures(rows: list[dict[str, str]], tmp_path: Path) -> None:
    results = common.Results(tmp_path / "cpu.csv")
    results.put(rows)
    assert plot.main([str(tmp_path / "cpu.csv")]) == 0
    drawn = {path.name for path in tmp_path.glob("*.png") if path.stat().st_size > 10_000}
    assert drawn == {
        *(f"cpu-{op}-sparsity.png" for op in ("bitmap_linear", "sliced_linear", "fused_mlp")),
        *(f"cpu-{op}-batch.png" for op in ("bitmap_linear", "sliced_linear", "fused_mlp", "nm_linear")),
        "cpu-attention_mlp.png",
        "cpu-model.png",
        "cpu-decoder.png",
    }


def test_readme_tables(rows: list[dict[str, str]], tmp_path: Path) -> None:
    common.Results(tmp_path / "cpu.csv").put(rows)
    readme = tmp_path / "README.md"
    names = ("headline", "bandwidth", "bitmap_linear", "attention_mlp", "model")
    readme.write_text("# Title\n" + "".join(f"<!-- table:{name} -->\nstale\n<!-- end -->\ntext\n" for name in names))
    arguments = [str(tmp_path / "cpu.csv"), "--readme", str(readme)]
    assert plot.main(arguments) == 0
    text = readme.read_text()
    assert "stale" not in text
    assert text.startswith("# Title\n<!-- table:headline -->\n| case |")
    assert text.endswith("<!-- end -->\ntext\n")
    assert text.count("From `cpu.csv`: threads 2, torch 2.0, fasticl 0.1, git abc.") == len(names)
    assert "| 4096x4096, batch 1, float32, hot | 2 ms (torch) | 1.20× | 1.67× | 3.33× | 5.00× |" in text
    assert plot.main(arguments) == 0
    assert readme.read_text() == text
    common.Results(tmp_path / "cpu-other.csv").put(rows)
    common.Results(tmp_path / "gpu.csv").put([each | {"device": "cuda"} for each in rows])
    assert plot.main([str(tmp_path / "cpu-other.csv"), str(tmp_path / "gpu.csv"), *arguments]) == 0
    text = readme.read_text()
    assert "| case | at least | other (bold: reached) | cpu (bold: reached) |" in text
    assert "batch 1, from memory: GB/s of plain reading's | other | cpu |" in text
    assert text.count("From `cpu.csv`: ") == text.count("From `cpu-other.csv`: ") == len(names)
    assert "gpu" not in text


def test_headline_compares_with_the_goals(rows: list[dict[str, str]]) -> None:
    text = tables.headline_table({"cpu-some-2threads.csv": rows, "cpu-other-4threads.csv": rows[:6]})
    lines = {line.split(" | ")[0].lstrip("| "): line for line in text.splitlines()}
    assert lines["case"] == "| case | at least | some (bold: reached) | other (bold: reached) |"
    bitmap = "`bitmap_linear` 4096×4096, batch 1, float32, 50 / 80 %"
    assert lines[bitmap] == f"| {bitmap} | 1.6 / 3.4× | 1.67 / 3.33× | 1.67 / 3.33× |"
    assert lines["`sliced_linear` 4096×4096, batch 1, float32, 90 %"].endswith("| 5.5× | 5.00× | not measured |")
    assert lines["`attention_mlp` B=64, L=512, d=64, m=256, against eager"].endswith(
        "| 3.5× | **3.80×** | not measured |"
    )
    assert lines["the same, against `torch.compile`"].endswith("| 2× | 1.90× | not measured |")


def test_roofline_is_the_bandwidth_of_the_same_case(rows: list[dict[str, str]]) -> None:
    shares = {r["sparsity"]: float(r["gbps"]) / roofline for r, roofline in tables.rooflines(rows, "bitmap_linear")}
    assert set(shares) == {"0.5", "0.8", "0.9"}
    assert shares["0.5"] == pytest.approx((0.5 + 1 / 32) / (1.1 - 0.5))


def test_paper_table(tmp_path: Path) -> None:
    claims = [
        {"what": "error falls", "paper": "yes", "ours": "by 0.1", "verdict": "reproduced"},
        {"what": "error", "paper": "0.1", "ours": "0.01", "verdict": "in trend"},
        {"what": "gap", "paper": "2", "ours": "1", "verdict": "not reproduced"},
    ]
    found = {"figures": {"alpha": claims}, "quick": False, "failures": [], "seeds": 5, "job_seconds": 1260.0}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**found, "torch": "2.0", "fasticl": "0.1", "cpu": "A CPU"}))
    text = tables.paper_table(file)
    assert "| `alpha` | error falls | yes | by 0.1 | reproduced | 1 + 1 of 3 |" in text
    assert text.endswith("From `results.json`: 5 seeds, 21 core-minutes, torch 2.0, fasticl 0.1, A CPU.")
    for broken in ({"quick": True}, {"failures": ["alpha: no figure"]}):
        file.write_text(json.dumps({**found, **broken}))
        with pytest.raises(ValueError, match="expected a full run without failures"):
            tables.paper_table(file)


def test_sweep_table(tmp_path: Path) -> None:
    rest = (2.5, 512.0, 4.0, 99.5, 200.0, 80.0, 210, "bfloat16", "cpu", "A CPU", 2, "2.0", "0.1", "2026-01-01")
    row = sweep.Row("abc", "LM", "wanda", "2:4", 0.5, 0.5, 25.0, 20.0, None, None, 60.0, *rest)
    other = replace(row, pattern="unstructured", sparsity=0.7, perplexity=40.0)
    file = tmp_path / "sweep.csv"
    sweep._write([row, other], file)
    lines = tables.sweep_table(file).splitlines()
    assert lines[2:5] == [
        "| dense | 20.0 | 1× | 1× | 1× |",
        "| wanda, unstructured, 70% | 40.0 | 2.50× | 4.00× | 0.40× |",
        "| wanda, 2:4, 50% | 25.0 | 2.50× | 4.00× | 0.40× |",
    ]
    assert lines[-1] == "From `sweep.csv`: LM, bfloat16, A CPU, threads 2, torch 2.0, fasticl 0.1."
    sweep._write([row, replace(row, settings="def")], file)
    with pytest.raises(ValueError, match="expected rows of one model and settings, got 2"):
        tables.sweep_table(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no tables here", "expected `<!-- table:NAME -->` lines"),
        ("<!-- table:headline -->\n<!-- table:model -->\n<!-- end -->\n", "got 2 and 1"),
        ("<!-- table:fast -->\n<!-- end -->\n", "table fast: expected rows"),
    ],
    ids=["no markers", "not closed", "unknown"],
)
def test_bad_readme_is_left_alone(rows: list[dict[str, str]], tmp_path: Path, text: str, message: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=message):
        tables.fill(readme, {"cpu.csv": rows})
    assert readme.read_text() == text
