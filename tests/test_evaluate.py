"""Perplexity and few-shot accuracy, against slow references that share no code with them; and the tasks themselves."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import save_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fasticl
from fasticl import evaluate
from fasticl.evaluate import Task, few_shot_accuracy, load_task, perplexity, score_continuations, task_names

transformers = pytest.importorskip("transformers")

TEXT = "A window slides over some text, and every token of it is counted once, but for the very first."


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random model, with weights so large that its probabilities differ, and its tokenizer of single bytes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


class WithBos:
    """A tokenizer that starts texts with token 0."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [0, *tokens] if add_special_tokens else tokens}


@torch.inference_mode()
def log_probability(model: nn.Module, tokens: list[int]) -> float:
    """Of the last token after the others."""
    logits = model(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits
    return logits[0, -1].log_softmax(-1)[tokens[-1]].item()


# --- perplexity ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 30), st.integers(1, 30))
def test_every_token_is_counted_once_after_enough_others(count: int, length: int, stride: int) -> None:
    stride = min(stride, length)
    counted: list[int] = []
    for begin, end, new in evaluate.sliding_windows(count, length, stride):
        assert 0 <= begin < end <= count
        assert end - begin <= length
        assert begin == 0 or end - new - begin >= length - stride
        counted += range(end - new, end)
    assert counted == list(range(count))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("window", "stride"), [(16, 5), (16, 15), (16, 1), (300, 7)])
def test_perplexity_is_that_of_each_token_alone(loaded: tuple[Any, Any], bos: bool, window: int, stride: int) -> None:
    model, tokenizer = loaded
    if bos:
        tokenizer = WithBos(tokenizer)
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    length, start = window - bos, [0] * bos
    losses = []
    for i in range(0 if bos else 1, len(tokens)):
        if i < length:  # the first window
            begin = 0
        else:
            end = min(len(tokens), length + stride * -(-(i + 1 - length) // stride))
            begin = end - length
        losses.append(-log_probability(model, start + tokens[begin : i + 1]))
    found = perplexity(model, tokenizer, TEXT, window=window, stride=stride)
    assert found.tokens == len(losses)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert (found.window, found.stride) == (window, stride)


def test_perplexity_of_part_of_a_text(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    calls: list[int] = []
    part = perplexity(model, tokenizer, TEXT, window=16, stride=8, max_tokens=40, advance=lambda: calls.append(1))
    assert part == perplexity(model, tokenizer, TEXT[:40], window=16, stride=8)
    assert len(calls) == 4
    assert perplexity(model, tokenizer, TEXT).window == 1024


class Uniform(nn.Module):
    """Says nothing about what comes next."""

    config = SimpleNamespace(max_position_embeddings=64)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 257))


def test_perplexity_of_a_uniform_model(loaded: tuple[Any, Any]) -> None:
    assert perplexity(Uniform(), loaded[1], TEXT).perplexity == pytest.approx(257)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "text: expected at least 2 tokens, got 0"),
        ("a", {}, "text: expected at least 2 tokens, got 1"),
        (TEXT, {"window": 1}, "window: expected 2 to 64 tokens, which the model takes, got 1"),
        (TEXT, {"window": 65}, "window: expected 2 to 64 tokens, which the model takes, got 65"),
        (TEXT, {"window": 16, "stride": 16}, "stride: expected 1 to 15 tokens, got 16"),
        (TEXT, {"stride": 0}, "stride: expected 1 to 63 tokens, got 0"),
    ],
)
def test_refused_windows(loaded: tuple[Any, Any], text: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(Uniform(), loaded[1], text, **options)


@pytest.mark.parametrize("bos", [False, True])
def test_calibration_windows(loaded: tuple[Any, Any], bos: bool) -> None:
    tokenizer = WithBos(loaded[1]) if bos else loaded[1]
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = evaluate.windows(tokenizer, TEXT, 4, 20)
    assert found.shape == (4, 20)
    assert found[:, bos:].flatten().tolist() == tokens[: 4 * (20 - bos)]
    assert not bos or not found[:, 0].any()
    batches = list(evaluate.calibration_batches(torch.arange(18).view(9, 2)))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), torch.arange(18).view(9, 2))
    with pytest.raises(ValueError, match=r"text: expected 99 windows of 20 tokens, got \d+ tokens"):
        evaluate.windows(tokenizer, TEXT, 99, 20)


# --- other people's tasks --------------------------------------------------------------------------------------------


def test_the_harness_hears_what_the_model_says(loaded: tuple[Any, Any]) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    model, tokenizer = loaded
    packed = copy.deepcopy(model).float()
    fasticl.sparsify_(packed, fasticl.Magnitude(0.5))
    packed = fasticl.convert(packed, min_speedup=0).model
    for some, tolerance in ((model, 1e-9), (packed, 1e-3)):
        lm = evaluate.as_lm(some, tokenizer, batch_size=2, max_length=64)

        def ask(kind: str, *arguments: Any, lm: Any = lm) -> Any:
            (answer,) = getattr(lm, kind)([Instance(kind, {}, arguments, 0)])
            return answer

        context, continuation = "The cat", " sat down"
        tokens = tokenizer(context + continuation)["input_ids"]
        asked = range(len(tokenizer(context)["input_ids"]), len(tokens))
        wanted = sum(log_probability(some, tokens[: i + 1]) for i in asked)
        score, greedy = ask("loglikelihood", context, continuation)
        assert score == pytest.approx(wanted, abs=tolerance * abs(wanted))
        assert not greedy

        tokens = [tokenizer.eos_token_id, *tokenizer(TEXT[:40])["input_ids"]]
        wanted = sum(log_probability(some, tokens[: i + 1]) for i in range(1, len(tokens)))
        assert ask("loglikelihood_rolling", TEXT[:40]) == pytest.approx(wanted, abs=tolerance * abs(wanted))

        tokens = tokenizer(context)["input_ids"]
        for _ in range(5):
            with torch.inference_mode():
                tokens.append(int(some(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        said = tokenizer.decode(tokens[-5:])
        assert ask("generate_until", context, {"until": ["never said"], "max_gen_toks": 5}) == said


def test_the_harness_may_be_absent(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ImportError, match=r"pip install 'fasticl\[eval\]'"):
        evaluate.as_lm(*loaded)


# --- in-context learning ---------------------------------------------------------------------------------------------


def said_pair(model: Any, tokenizer: Any, prefix: str) -> tuple[str, str]:
    """A question and what greedy decoding says after it, where that is a letter and no part of one."""
    for letter in map(chr, range(33, 127)):
        prompt = tokenizer(f"{prefix}{letter} ->")["input_ids"]
        said = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].argmax().item()
        for answer in map(chr, range(33, 127)):
            if tokenizer(f"{prefix}{letter} ->{answer}")["input_ids"] == [*prompt, said]:
                return f"{letter} ->", answer
    raise AssertionError("expected a question that is answered by a letter, got none")


@pytest.mark.parametrize("budget", [(8192, 512), (100, 512), (8192, 30)])
@pytest.mark.parametrize("prefix", ["", "one -> two\n", "one -> two\nthree -> four\n"])
@pytest.mark.parametrize("bos", [False, True])
def test_scores_are_those_of_each_prompt_alone(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, prefix: str, bos: bool, budget: tuple[int, int]
) -> None:
    model, tokenizer = loaded
    if bos:
        tokenizer = WithBos(tokenizer)
    monkeypatch.setattr(evaluate, "_CACHED", budget[0])
    monkeypatch.setattr(evaluate, "_LOGITS", budget[1])
    pairs = [("a ->", " b"), ("longer ->", " c"), ("a ->", " another"), ("x ->", " yz"), ("many words ->", " w")]
    pairs.append(said_pair(model, tokenizer, prefix))
    found = score_continuations(model, tokenizer, prefix, pairs)
    for (question, continuation), (score, greedy) in zip(pairs, found, strict=True):
        tokens = tokenizer(prefix + question + continuation)["input_ids"]
        start = len(tokenizer(prefix + question)["input_ids"])
        each = [log_probability(model, tokens[: i + 1]) for i in range(start, len(tokens))]
        assert score == pytest.approx(sum(each), rel=1e-5)
        likeliest = [
            model(input_ids=torch.tensor([tokens[:i]]), use_cache=False).logits[0, -1].argmax().item() == tokens[i]
            for i in range(start, len(tokens))
        ]
        assert greedy == all(likeliest)
    assert found[-1][1]
    assert not found[0][1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[tuple[str, str]]]]:
    """What is asked after which examples; in place of a model, which knows answers that begin with an even number."""
    calls: list[tuple[str, list[tuple[str, str]]]] = []

    def answers(
        model: object, tokenizer: object, prefix: str, items: list[tuple[str, str]], labels: object
    ) -> list[bool]:
        calls.append((prefix, items))
        return [int(answer) % 2 == 0 for _, answer in items]

    monkeypatch.setattr(evaluate, "_answers", answers)
    return calls


NUMBERS = Task("numbers", tuple((f"item{i}", str(i)) for i in range(21)))


def test_examples_are_never_asked(asked: list[tuple[str, list[tuple[str, str]]]]) -> None:
    found = few_shot_accuracy(nn.Identity(), None, NUMBERS, (0, 2, 15), seed=3)
    assert [(row.shots, row.count, row.right) for row in found] == [(0, 21, 11), (2, 21, 11), (15, 21, 11)]
    for k in (0, 2, 15):
        some = [(prefix, items) for prefix, items in asked if prefix.count("\n") == k]
        assert sorted(item for _, items in some for item in items) == sorted(NUMBERS.items)
        for prefix, items in some:
            examples = prefix.splitlines()
            assert len(set(examples)) == k
            assert not {f"{text} -> {answer}" for text, answer in items} & set(examples)
    for small, large in ((0, 1), (1, 2)):
        assert all(b[0].startswith(a[0]) for a, b in zip(asked[small::3], asked[large::3], strict=True))
    assert len({prefix for prefix, _ in asked[2::3]}) == evaluate.FOLDS


def test_a_seed_draws_the_same_questions(asked: list[tuple[str, list[tuple[str, str]]]]) -> None:
    for seed in (1, 1, 2):
        few_shot_accuracy(nn.Identity(), None, NUMBERS, (3,), items=10, seed=seed)
    runs = [asked[i : i + 4] for i in (0, 4, 8)]
    assert runs[0] == runs[1] != runs[2]
    assert sum(len(items) for _, items in runs[0]) == 10


def test_labels_are_compared(loaded: tuple[Any, Any]) -> None:
    """Accuracy on labels is that of the likeliest label of each prompt; of an exact answer, of greedy decoding."""
    model, tokenizer = loaded
    items = tuple((f"question {i}", "ab"[i % 2]) for i in range(8))
    (found,) = few_shot_accuracy(model, tokenizer, Task("t", items, ("a", "b")), (0,))
    right = 0
    for text, answer in items:
        scores = {label: log_probability(model, tokenizer(f"{text} -> {label}")["input_ids"]) for label in "ab"}
        right += max(scores, key=scores.__getitem__) == answer  # the space before them is the same for both
    assert found.right == right
    assert 0 < right < 8
    (exact,) = few_shot_accuracy(model, tokenizer, Task("t", items), (0,))
    assert exact.right == 0


def test_a_model_that_says_nan_knows_nothing(loaded: tuple[Any, Any]) -> None:
    class Broken(Uniform):
        def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 257), torch.nan))

    items = tuple((f"q{i}", "a") for i in range(8))
    for task in (Task("t", items, ("a", "b")), Task("t", items)):
        assert few_shot_accuracy(Broken(), loaded[1], task, (0,))[0].right == 0


def test_refused_shots(loaded: tuple[Any, Any]) -> None:
    for shots in ((-1,), (16,)):
        with pytest.raises(ValueError, match=r"shots: expected 0 to 15 with 21 items, got"):
            few_shot_accuracy(Uniform(), loaded[1], NUMBERS, shots)
    with pytest.raises(ValueError, match="items: expected 1 to 21, got 22"):
        few_shot_accuracy(Uniform(), loaded[1], NUMBERS, (0,), items=22)
    with pytest.raises(ValueError, match=r"prompt: expected at most 64 tokens, which the model takes, got \d+"):
        few_shot_accuracy(Uniform(), loaded[1], NUMBERS, (12,))


@pytest.mark.parametrize(("right", "count"), [(0, 10), (3, 10), (10, 10), (70, 100)])
def test_wilson_interval_solves_its_equation(right: int, count: int) -> None:
    """The ends are the rates x at which the observed one is z standard errors away, ``|p - x| = z sqrt(x(1-x)/n)``."""
    p = right / count
    low, high = evaluate.wilson_interval(right, count)
    for end in (low, high):
        assert abs(p - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-6)
    assert low <= p <= high
    assert high - low > 0.1
    with pytest.raises(ValueError, match="expected 0 to 3 right answers of at least 1, got 4"):
        evaluate.wilson_interval(4, 3)


# --- the tasks -------------------------------------------------------------------------------------------------------


def test_there_are_enough_tasks() -> None:
    assert len(task_names()) >= 8
    assert sum(bool(load_task(name).labels) for name in task_names()) >= 4
    with pytest.raises(ValueError, match=r"task: expected one of antonym, .*, got 'chess'"):
        load_task("chess")


@pytest.mark.parametrize("name", task_names())
def test_a_task(name: str) -> None:
    task = load_task(name)
    inputs = [text for text, _ in task.items]
    assert len(inputs) >= 100
    assert len(set(inputs)) == len(inputs)
    for text, answer in task.items:
        assert text == text.strip()
        assert answer == answer.strip()
        assert text
        assert answer
        assert "->" not in text + answer
    if task.labels:
        counts = [sum(answer == label for _, answer in task.items) for label in task.labels]
        assert len(set(counts)) == 1
        assert len(counts) >= 2
    else:
        assert len({answer for _, answer in task.items}) > 0.9 * len(inputs)


def test_tasks_are_packaged() -> None:
    root = Path(evaluate.__file__).parents[1]
    assert '"data/*.tsv"' in (root / "setup.py").read_text()
    assert "*.tsv" in (root / "MANIFEST.in").read_text()
