"""Tuned tables: what is looked up, what is refused, and how a configuration wins; by a fake clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import fasticl
from fasticl import tune, tuned
from fasticl.cli import app
from fasticl.convert import _implementations_text
from fasticl.device_layouts import DeviceLayouts
from fasticl.gather_layout import to_gather
from fasticl.lane_stream import to_lanes
from fasticl.ops.bitmap_linear import implementation
from fasticl.sparse_fragments import to_fragments

BF16 = torch.bfloat16
ON_GPU: Any = SimpleNamespace(is_cuda=True, get_device=lambda: 0, dtype=BF16)
ENTRY = {
    "op": "bitmap_linear", "N": 4096, "K": 4096, "batch": 16, "value_bytes": 2, "density": 0.6,
    "config": {"implementation": "Triton", "BLOCK_N": 32}, "ms": 1.0, "default_ms": 2.0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the table of a GPU sm_90 is looked for."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
    for cache in (tuned._measured, tuned._table):
        cache.cache_clear()
    yield tmp_path
    for cache in (tuned._measured, tuned._table):
        cache.cache_clear()


def test_a_problem_finds_the_entry_of_its_bucket(folder: Path) -> None:
    tune.write(folder / "sm_90.json", [ENTRY], {})
    for N, K, M, density in ((4096, 4096, 16, 0.5), (2049, 4000, 2, 0.26)):
        assert tuned.lookup("bitmap_linear", ON_GPU, N, K, M, density) == ENTRY["config"]
    for N, K, M, density in ((4097, 4096, 16, 0.5), (4096, 4096, 1, 0.5), (4096, 4096, 16, 0.7)):
        assert tuned.lookup("bitmap_linear", ON_GPU, N, K, M, density) == {}
    assert tuned.lookup("nm_linear", ON_GPU, 4096, 4096, 16, 0.5) == {}
    assert tuned.bucket("nm_linear", 1, 10**6, 10**6, BF16) == ("nm_linear", 512, 16384, 1024, 2, 1.0)
    values = torch.zeros(4096 * 2048, dtype=BF16, device="meta")
    assert implementation(values, 4096, 4096, 16) == "CUDA C++"  # not on that GPU


def test_without_a_table_the_defaults_stay(folder: Path) -> None:
    assert tuned.lookup("bitmap_linear", ON_GPU, 4096, 4096, 16, 0.5) == {}
    assert tuned.lookup("bitmap_linear", torch.zeros(1), 4096, 4096, 16, 0.5) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "conv"}, "op: expected one of bitmap_linear, nm_linear, .*got 'conv'"),
        ({"config": {"BLOCK_X": 1}}, "expected settings among implementation, BLOCK_N, .*got 'BLOCK_X'"),
        ({"config": {"BLOCK_N": 33}}, r"BLOCK_N: expected one of \(8, 16, .*got 33"),
        ({"config": {"implementation": "magic"}}, "got 'magic'"),
        ({"batch": 3}, r"bitmap_linear: batch: expected one of \(1, 16, .*got 3"),
        ({"density": "all"}, "density: .*got 'all'"),
    ],
    ids=str,
)
def test_what_a_release_does_not_know_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "sm_90.json"
    path.write_text(json.dumps({"entries": [ENTRY | change]}))
    with pytest.raises(ValueError, match=message):
        tuned.lookup("bitmap_linear", ON_GPU, 4096, 4096, 16, 0.5)


@pytest.mark.parametrize("text", ["", "[]", '{"entries": [{}]}'])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sm_80.json").write_text(text)
    with pytest.raises(ValueError, match=r"sm_80\.json: expected a table of fasticl bench --tune"):
        tuned.read(tmp_path / "sm_80.json")


def test_the_shipped_tables_are_valid() -> None:
    for path in tuned.FOLDER.glob("*.json"):
        tuned.read(path)


def test_writing_keeps_other_problems(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    tune.write(path, [ENTRY, ENTRY | {"batch": 1}], {"device": "a GPU"})
    tune.write(path, [ENTRY | {"config": {}}], {"device": "a GPU"})
    table = tuned.read(path)
    assert [config for _, config in sorted(table.items())] == [ENTRY["config"], {}]
    assert json.loads(path.read_text())["about"] == {"device": "a GPU"}
    with pytest.raises(ValueError, match="got 33"):
        tune.write(path, [ENTRY | {"config": {"BLOCK_N": 33}}], {})
    assert tuned.read(path) == table


def problem(call: Callable[[dict[str, Any]], Tensor], op: str = "fused_mlp", dtype: torch.dtype = BF16) -> tune.Problem:
    """Its result depends on the configuration in force."""
    return tune.Problem(op, 4096, 4096, 8, dtype, 0.5, lambda: [lambda: call(dict(tuned._forced[op]))])


def clock(ms_of: Callable[[dict[str, Any]], float]) -> tune.Timer:
    def time(_: tune.Problem, calls: Sequence[Any], configs: Sequence[Any]) -> list[float]:
        return [ms_of(dict(config)) for config in configs]

    return time


RESULT = torch.linspace(-1, 1, 99).to(BF16)


def test_the_fastest_combination_wins() -> None:
    def ms(config: dict[str, Any]) -> float:
        return 1 - 0.2 * (config.get("BLOCK_H") == 64) - 0.3 * (config.get("num_warps") == 8)

    entry = tune.search(problem(lambda config: RESULT), clock(ms))
    assert {name: entry["config"][name] for name in ("BLOCK_H", "num_warps")} == {"BLOCK_H": 64, "num_warps": 8}
    assert (entry["ms"], entry["default_ms"]) == (0.5, 1.0)
    tuned.check("", "fused_mlp", entry["config"])


@pytest.mark.parametrize(("gain", "wins"), [(0.02, False), (0.04, True)])
def test_the_default_stays_without_a_margin(gain: float, wins: bool) -> None:
    ms = clock(lambda config: 1 / (1 + gain) if config.get("num_warps") == 8 else 1.0)
    assert bool(tune.search(problem(lambda config: RESULT), ms)["config"]) == wins


@pytest.mark.parametrize("broken", ["wrong", "nan", "raises"])
def test_what_computes_something_else_does_not_win(broken: str) -> None:
    def compute(config: dict[str, Any]) -> Tensor:
        if config.get("num_warps") != 8:
            return RESULT * (1 + 2**-8) if config else RESULT  # a rounding
        if broken == "raises":
            raise RuntimeError("out of resource: shared memory")
        return RESULT * 1.1 if broken == "wrong" else RESULT * torch.nan

    ms = clock(lambda config: 0.1 if config.get("num_warps") == 8 else 0.5 if config.get("num_warps") == 2 else 1.0)
    assert tune.search(problem(compute), ms)["config"]["num_warps"] == 2


@pytest.mark.parametrize("triton_ms", [0.4, 2.0])
def test_the_winning_implementation_is_recorded(triton_ms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "has_cuda_kernel", True)

    def ms(config: dict[str, Any]) -> float:
        if config.get("implementation") != "Triton":
            return 1.0
        return triton_ms if config.get("BLOCK_N") == 32 else 4.0

    config = tune.search(problem(lambda config: RESULT, "bitmap_linear"), clock(ms))["config"]
    assert config == ({"implementation": "Triton", "BLOCK_N": 32} if triton_ms < 1 else {"implementation": "CUDA C++"})
    in_float32 = tune.search(problem(lambda config: RESULT, "bitmap_linear", torch.float32), clock(lambda config: 1.0))
    assert in_float32["config"] == {}  # which only Triton takes


def test_an_implementation_between_wins_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "has_cuda_kernel", True)
    ms = clock(lambda config: 0.5 if config.get("implementation") == "lane stream" else 1.0)
    entry = tune.search(problem(lambda config: RESULT, "bitmap_linear"), ms)
    assert (entry["config"], entry["ms"]) == ({"implementation": "lane stream"}, 0.5)


@pytest.mark.parametrize("op", tuned.SPACE)
def test_problems_of_every_op_compute(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "LAYERS", ((48, 64),))
    monkeypatch.setattr(tune, "MLPS", ((48, 32),))
    monkeypatch.setattr(tune, "PROMPTS", ((7, 16, 3),))
    monkeypatch.setattr(tune, "BATCHES", (1, 16))
    found = tune.problems([op], BF16, "cpu")
    assert len({each.bucket for each in found}) == len(found) >= 1
    said: list[str] = []
    (entry,) = tune.tune(found[-1:], said.append, clock(lambda config: 1.0))
    assert entry["config"].get("implementation", "CUDA C++") == "CUDA C++"
    assert said[0].startswith(str(found[-1]))


def test_explain_says_which_implementation_runs() -> None:
    linear = torch.nn.Linear(64, 48, bias=False).bfloat16()
    linear.weight.data[torch.rand(48, 64) < 0.5] = 0
    layer = fasticl.nn.SparseLinear.from_linear(linear, "bitmap")
    assert _implementations_text(layer, (1, 16)) == ""  # on the CPU
    layer._layouts = DeviceLayouts(to_lanes(layer.packed))
    assert _implementations_text(layer, (1, 16, 512)) == "; CUDA C++ at 1 / 16; PyTorch at 512"
    with tuned.forced("bitmap_linear", {"implementation": "Triton"}):
        assert _implementations_text(layer, (1, 16)) == "; Triton at 1 / 16"
    with tuned.forced("bitmap_linear", {"implementation": "PyTorch"}):
        assert _implementations_text(layer, (1, 16)) == "; PyTorch at 1 / 16"
    with tuned.forced("bitmap_linear", {"implementation": "lane stream"}):
        assert _implementations_text(layer, (16, 512)) == "; CUDA C++ at 16 / 512"
    linear.weight.data[torch.rand(48, 64) < 0.7] = 0
    for format, other in (("bitmap", "CUDA C++"), ("sliced", "Triton")):
        layer = fasticl.nn.SparseLinear.from_linear(linear, format)
        lanes = to_lanes(layer.packed) if format == "bitmap" else None
        layer._layouts = DeviceLayouts(lanes, to_gather(layer.packed))
        assert _implementations_text(layer, (1, 8, 16)) == f"; CUDA C++ (gather) at 1 / 8; {other} at 16"
    linear.weight.data.view(-1, 4)[:, :2] = 0
    layer = fasticl.nn.SparseLinear.from_linear(linear, "nm")
    layer._layouts = DeviceLayouts(fragments=to_fragments(layer.packed))
    assert _implementations_text(layer, (1, 64, 65)) == "; CUDA C++ at 1 / 64; Triton at 65"
    with tuned.forced("nm_linear", {"implementation": "Triton"}):
        assert _implementations_text(layer, (1, 64)) == "; Triton at 1 / 64"


def test_a_configuration_reaches_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", minversion="3.6")
    from fasticl.kernels import _packed, attention_mlp, fused_mlp, sliced_linear

    launched: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: launched.append((grid, options))

    def launch(op: str, config: dict[str, Any], call: Callable[[], object]) -> tuple[tuple[int, ...], dict[str, Any]]:
        launched.clear()
        with tuned.forced(op, config):
            call()
        return launched[0]

    for module, name in ((_packed, "packed_kernel"), (sliced_linear, "sliced_kernel"), (fused_mlp, "mlp_kernel"),
                         (fused_mlp, "sum_kernel"), (fused_mlp, "hidden_kernel"),
                         (attention_mlp, "attention_kernel")):  # fmt: skip
        monkeypatch.setattr(module, name, Recorder())

    def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    mask, offsets = empty(256, 32, dtype=torch.uint8), empty(257, dtype=torch.int64)
    x, values = empty(8, 256), empty(256 * 128)
    packed = partial(_packed.launch_packed, x, values, mask, offsets, None, None)
    assert launch("bitmap_linear", {}, packed)[0] == (16, 1)
    config = {"implementation": "Triton", "BLOCK_N": 64, "BYTES": 8, "num_warps": 2, "num_stages": 3}
    grid, options = launch("bitmap_linear", config, packed)
    assert grid == (4, 1)
    assert options.items() >= {"BLOCK_N": 64, "BYTES": 8, "num_warps": 2, "num_stages": 3}.items()
    assert launch("nm_linear", config, packed)[0] == (16, 1)  # another op's

    steps, slices = empty(9, 20, dtype=torch.uint8), empty(17, 2, dtype=torch.int64)
    order = empty(256, dtype=torch.int32)
    sliced = partial(sliced_linear.launch, x, values, mask, offsets, values, steps, slices, order, None, None)
    options = launch("sliced_linear", {"implementation": "Triton", "STEPS": 32, "num_warps": 2}, sliced)[1]
    assert options.items() >= {"STEPS": 32}.items()
    assert "implementation" not in options
    assert launch("sliced_linear", {}, sliced)[1]["STEPS"] == 8

    up, down = [empty(256, 256)], [empty(256, 256)]
    for M, grid in ((1, (4,)), (64, (4, 1))):
        mlp = partial(fused_mlp.launch, empty(M, 256), up, down, None, None, None, None, "relu")
        found, options = launch("fused_mlp", {"BLOCK_H": 64, "BLOCK_K": 32, "num_warps": 8}, mlp)
        assert found[: len(grid)] == grid
        assert options.items() >= {"BLOCK_H": 64, "BLOCK_K": 32, "num_warps": 8}.items()

    attention = partial(attention_mlp.launch, empty(4, 200, 64), empty(4, 64), empty(64, 64), empty(8, 64), empty(8),
                        None)  # fmt: skip
    assert launch("attention_mlp", {}, attention)[1].items() >= {"BLOCK_L": 64, "STAGES": 3}.items()
    options = launch("attention_mlp", {"TILE": 1024, "STAGES": 2}, attention)[1]
    assert options.items() >= {"BLOCK_L": 16, "STAGES": 2}.items()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tuning_without_a_gpu_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "--tune"])
    assert result.exit_code == 1
    assert "bench --tune: expected a CUDA or ROCm device, got none" in result.stderr
    result = CliRunner().invoke(app, ["bench", "--tune", "--op", "decoder"])
    assert result.exit_code == 2


def test_the_command_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tune, "PROMPTS", ((7, 16, 3),))
    monkeypatch.setattr(tune, "problems", partial(tune.problems, device="cpu"))
    monkeypatch.setattr(tune, "tune", partial(tune.tune, time=clock(lambda config: 0.5 if config else 1.0)))
    path = tmp_path / "sm_90.json"
    result = CliRunner().invoke(app, ["bench", "--tune", "--op", "attention_mlp", "--out", str(path)])
    assert result.exit_code == 0, result.output
    assert "1 problems, of 1 another configuration" in " ".join(result.stdout.split())
    assert list(tuned.read(path)) == [tuned.bucket("attention_mlp", 7, 16, 3, torch.float32)]
