"""Sweeps over sparsity, pattern and method: the rows are what was measured, and are measured once."""

from __future__ import annotations

import copy
import csv
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import fasticl
from fasticl import checkpoint, evaluate, sweep
from fasticl.cli import app
from fasticl.sweep import Measure, Point, Row, grid, identity, pareto

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("matplotlib")

TEXT = "Rain fell on the roof, and nobody in the house was awake to hear it but the cat. " * 8
OTHER = "The quick brown fox jumps over the lazy dog, which does not mind it in the least. " * 8
MEASURE = Measure(TEXT, OTHER, windows=3, length=32, max_tokens=120, prefill=16, decode=2, seconds=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(path)
    return path


@pytest.fixture
def loaded(folder: Path) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return checkpoint.load(folder, dtype=torch.float32, device="cpu")


def test_a_grid_has_each_point_once() -> None:
    points = grid(["wanda", "neurons"], ["unstructured", "2:4"], [0.25, 0.5])
    assert points == [
        Point("wanda", "unstructured", 0.25),
        Point("wanda", "unstructured", 0.5),
        Point("wanda", "2:4", 0.5),
        Point("neurons", "neuron", 0.25),
        Point("neurons", "neuron", 0.5),
    ]


def test_rows_are_what_was_measured(folder: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    before = copy.deepcopy(model.state_dict())
    points = [Point("sparsegpt", "unstructured", 0.5), Point("magnitude", "2:4", 0.5), Point("neurons", "neuron", 0.25)]
    measure = replace(MEASURE, tasks=("antonym",), shots=1)
    steps: list[None] = []
    rows = sweep.run(folder, model, tokenizer, points, measure, tmp_path / "out", lambda: steps.append(None))
    assert len(steps) == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [row.point for row in rows] == points

    batches = list(evaluate.calibration_batches(evaluate.windows(tokenizer, OTHER, 3, 32)))
    for row, config in zip(
        rows, [fasticl.SparseGPT(0.5), fasticl.Magnitude(0.5, "2:4"), fasticl.NeuronActivation(0.25)], strict=True
    ):
        pruned = copy.deepcopy(model)
        assert fasticl.sparsify_(pruned, config, batches).total == row.zeros
        found = evaluate.perplexity(pruned, tokenizer, TEXT, max_tokens=120).perplexity
        assert row.perplexity == pytest.approx(found, rel=1e-4)
        assert row.dense_perplexity == evaluate.perplexity(model, tokenizer, TEXT, max_tokens=120).perplexity
        assert row.accuracy is not None
        assert 0 <= row.accuracy <= 1
        assert (row.model, row.dtype, row.device, row.threads) == ("tiny", "float32", "cpu", 1)
        assert row.dense_megabytes == pytest.approx(sum(p.numel() for p in model.parameters()) * 4e-6, rel=0.01)
        assert 0.3 < row.checkpoint_megabytes / row.dense_megabytes < 1.05  # with its header
        assert min(row.decode_tokens_per_s, row.decode_speedup, row.prefill_tokens_per_s, row.prefill_speedup) > 0
    assert sweep.read(tmp_path / "out" / "sweep.csv") == rows
    assert (tmp_path / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_checkpoints_are_those_of_users(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    pruned = copy.deepcopy(loaded[0]).bfloat16()
    fasticl.sparsify_(pruned, fasticl.Wanda(0.5), [torch.arange(32)[None]])
    fasticl.convert(pruned, min_speedup=0.0, tokens=(1,))
    fasticl.save_pretrained(pruned, tmp_path / "out", compress=True)
    assert sweep._checkpoint_megabytes(pruned) == (tmp_path / "out" / "model.safetensors").stat().st_size / 1e6


def test_a_sweep_goes_on_where_it_stopped(
    folder: Path, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = grid(["magnitude"], ["unstructured", "2:4"], [0.25, 0.5])
    measured: list[Point] = []
    right = sweep._measure

    def measure_some(dense: Any, whole: Any, tokenizer: Any, point: Point, *others: Any) -> Row:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(point)
        return right(dense, whole, tokenizer, point, *others)

    monkeypatch.setattr(sweep, "_measure", measure_some)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(folder, *loaded, points, MEASURE, tmp_path)
    first = sweep.read(tmp_path / "sweep.csv")
    assert [row.point for row in first] == points[:2] == measured

    measured.clear()
    rows = sweep.run(folder, *loaded, points, MEASURE, tmp_path)
    assert measured == points[2:]
    assert rows[:2] == first
    measured.clear()
    assert sweep.run(folder, *loaded, points, MEASURE, tmp_path) == rows
    assert not measured

    other = sweep.run(folder, *loaded, points[:1], replace(MEASURE, max_tokens=60), tmp_path)
    assert measured == points[:1]
    assert other[0].settings != rows[0].settings
    assert sweep.read(tmp_path / "sweep.csv") == [*rows, *other]


def test_identity(folder: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model = loaded[0]
    here = identity(folder, model, MEASURE)
    assert here == identity(folder, copy.deepcopy(model), replace(MEASURE))
    others = [identity(folder, model, replace(MEASURE, **{field: value})) for field, value in [
        ("text", TEXT + "."), ("calibration", OTHER + "."), ("windows", 4), ("seconds", 0.02), ("tasks", ("antonym",))
    ]]  # fmt: skip
    others.append(identity(folder, copy.deepcopy(model).bfloat16(), MEASURE))
    (tmp_path / "config.json").write_text("{}")
    others.append(identity(tmp_path, model, MEASURE))
    torch.set_num_threads(2)
    others.append(identity(folder, model, MEASURE))
    assert len({here, *others}) == 1 + len(others)


ROW = Row("0", "m", "wanda", "2:4", 0.5, 0.5, 9.0, 8.0, None, None, *[1.0] * 7, 1, "f", "c", "", 1, "", "", "")


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12))
def test_pareto_front(points: list[tuple[int, int]]) -> None:
    rows = [replace(ROW, decode_speedup=float(s), perplexity=float(p)) for s, p in points]
    front = {(row.decode_speedup, row.perplexity) for row in pareto(rows, "decode_speedup")}
    assert front == {(s, p) for s, p in points if not any((a >= s and b < p) or (a > s and b <= p) for a, b in points)}


def test_what_is_refused(folder: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="calibration text other than the one whose perplexity is taken, got the same"):
        Measure(TEXT, TEXT)
    with pytest.raises(ValueError, match="points: expected at least one, got none"):
        sweep.run(folder, *loaded, [], MEASURE, tmp_path)
    with pytest.raises(ValueError, match=r"sparsity in \[0, 1\), got 1.0"):
        sweep.run(folder, *loaded, [Point("wanda", "unstructured", 1.0)], MEASURE, tmp_path)
    (tmp_path / "sweep.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"sweep.csv: expected a CSV with the columns of this version"):
        sweep.run(folder, *loaded, [Point("wanda", "unstructured", 0.5)], MEASURE, tmp_path)


def test_command(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name, text in (("text", TEXT), ("other", OTHER)):
        (tmp_path / name).write_text(text)
    arguments = ["eval", "sweep", str(folder), "--text", str(tmp_path / "text"), "--calibration",
                 str(tmp_path / "other"), "--out", str(tmp_path / "out"), "--method", "wanda", "--sparsity", "0.5",
                 "--windows", "2", "--length", "32", "--max-tokens", "150", "--seconds", "0.01"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    for word in ("wanda", "unstructured", "2:4", "50.0%", "decode", "sweep.png"):
        assert word in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [(row["method"], row["pattern"], row["zeros"]) for row in rows] == [
        ("wanda", "unstructured", 0.5), ("wanda", "2:4", 0.5)
    ]  # fmt: skip
    assert all(math.isfinite(row["perplexity"]) for row in rows)
    with (tmp_path / "out" / "sweep.csv").open(newline="") as file:
        assert csv.DictReader(file).fieldnames == [field.name for field in fields(Row)]
    same = [str(tmp_path / "text") if argument == str(tmp_path / "other") else argument for argument in arguments]
    result = CliRunner().invoke(app, same)
    assert result.exit_code == 1
    assert "calibration text other than" in result.stderr
    assert CliRunner().invoke(app, [*arguments, "--pattern", "head"]).exit_code == 2
    assert CliRunner().invoke(app, [*arguments, "--task", "chess"]).exit_code == 2
