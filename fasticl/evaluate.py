"""What pruning cost: perplexity of a text, and few-shot accuracy on tasks that the model learns from its context.

The tasks are in ``fasticl/data/``, written for this project: a table of two columns each, the input and its ``answer``,
which the model must say, or its ``label``, one of few, which it must find likelier than the others.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

SHOTS = (0, 1, 2, 4, 8, 16, 32)
FOLDS = 4  # of a task's items; each has examples of its own
_CACHED, _LOGITS = 8192, 512  # positions whose keys and values, and whose logits over the vocabulary, are held at once


# --- perplexity ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def token_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """``-log p(windows[w, i + 1] | windows[w, : i + 1])`` in nats: float32 ``[W, L - 1]`` of int64 ``[W, L]``."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = windows[:, 1:].flatten()
    losses = [
        nn.functional.cross_entropy(some.float(), wanted, reduction="none")
        for some, wanted in zip(logits.split(_LOGITS), targets.split(_LOGITS), strict=True)
    ]
    return torch.cat(losses).view(len(windows), -1)


@dataclass(frozen=True)
class Perplexity:
    """``perplexity = exp(loss)``, loss the mean of ``-log p`` over ``tokens`` tokens, in nats."""

    perplexity: float
    loss: float
    tokens: int
    window: int
    stride: int


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    advance: Callable[[], None] | None = None,
) -> Perplexity:
    """Perplexity of ``text`` by a sliding window: each token counts once, after at least ``window - stride`` others.

    Every window starts as the tokenizer starts texts (with its BOS token, if it has one). A token that nothing stands
    before, the first where there is no BOS token, does not count; those of the first window have what stands before.

    Args:
        window: tokens that the model sees at once; None is the smaller of 1024 and what the model takes.
        stride: tokens by which it moves; None is half of ``window``.
        max_tokens: of the text are read; None reads all.
        advance: called after each window.

    Raises:
        ValueError: the text has no token to count, or a number is out of range.
    """
    limit = _context(model)
    window = min(1024, limit) if window is None else window
    if not 2 <= window <= limit:
        raise ValueError(f"window: expected 2 to {limit} tokens, which the model takes, got {window}")
    stride = max(1, window // 2) if stride is None else stride
    start, tokens = _tokens(tokenizer, text)
    tokens = tokens[:max_tokens]
    if not 1 <= stride <= window - max(1, len(start)):
        raise ValueError(f"stride: expected 1 to {window - max(1, len(start))} tokens, got {stride}")
    if len(start) + len(tokens) < 2:
        raise ValueError(f"text: expected at least {2 - len(start)} tokens, got {len(tokens)}")
    device = next(model.parameters()).device
    total, counted = 0.0, 0
    for begin, end, new in sliding_windows(len(tokens), window - len(start), stride):
        row = torch.tensor([start + tokens[begin:end]], device=device)
        losses = token_losses(model, row)[0, -new:]  # one fewer where no token stands before the first
        total += losses.sum(dtype=torch.float64).item()
        counted += losses.numel()
        if advance is not None:
            advance()
    return Perplexity(math.exp(min(total / counted, 700.0)), total / counted, counted, window, stride)


def sliding_windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """``(begin, end, new)``: windows over ``count`` tokens, the last ``new`` of which no earlier window has counted."""
    end = 0
    while end < count:
        before, end = end, min(count, length if end == 0 else end + stride)
        yield max(0, end - length), end, end - before


def windows(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """``[count, length]`` int64, consecutive; each starts as the tokenizer starts texts.

    Raises:
        ValueError: the text is too short.
    """
    start, tokens = _tokens(tokenizer, text)
    step = length - len(start)
    if step < 1 or len(tokens) < count * step:
        raise ValueError(f"text: expected {count} windows of {length} tokens, got {len(tokens)} tokens")
    return torch.tensor([start + tokens[i * step : (i + 1) * step] for i in range(count)])


def calibration_batches(windows: Tensor, advance: Callable[[], None] | None = None) -> Iterator[dict[str, Any]]:
    """Windows for :func:`fasticl.sparsify_`, four at a time; of the logits, which no score sees, one is asked for."""
    for batch in windows.split(4):
        yield {"input_ids": batch, "use_cache": False, "logits_to_keep": 1}
        if advance is not None:
            advance()


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """What the tokenizer starts texts with, and the text's own tokens."""
    return tokenizer("")["input_ids"][:1], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _context(model: nn.Module) -> int:
    """Tokens that the model takes, as far as its config says."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else 1 << 20


# --- other people's tasks --------------------------------------------------------------------------------------------


def as_lm(model: nn.Module, tokenizer: Any, **options: Any) -> Any:
    """The model for lm-evaluation-harness: ``lm_eval.simple_evaluate(as_lm(model, tokenizer), tasks=["hellaswag"])``.

    Args:
        model: a causal language model of transformers, pruned, converted or neither.
        options: of its ``HFLM``, such as ``batch_size`` and ``max_length``.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("as_lm needs lm-evaluation-harness: pip install 'fasticl[eval]'") from error
    return HFLM(pretrained=model, tokenizer=tokenizer, **options)


# --- in-context learning ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """``items`` of (input, answer); with ``labels`` the answer is one of these, else it must be said."""

    name: str
    items: tuple[tuple[str, str], ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """Right answers of ``count`` after ``shots`` examples, and Wilson's interval at 95 % for independent items."""

    task: str
    shots: int
    right: int
    count: int

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.count)


def pooled(results: Sequence[Accuracy], shots: int) -> Accuracy:
    """All tasks' answers after ``shots`` examples as one; each task weighs as much as it has items."""
    some = [row for row in results if row.shots == shots]
    return Accuracy("all", shots, sum(row.right for row in some), sum(row.count for row in some))


def task_names() -> list[str]:
    """The tasks that FastICL ships."""
    return sorted(file.name.removesuffix(".tsv") for file in (files("fasticl") / "data").iterdir())


def load_task(name: str) -> Task:
    """A shipped task.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in task_names():
        raise ValueError(f"task: expected one of {', '.join(task_names())}, got {name!r}")
    header, *rows = (files("fasticl") / "data" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    items = tuple((text, answer) for text, answer in (row.split("\t") for row in rows))
    labels = sorted({answer for _, answer in items}) if header.endswith("\tlabel") else ()
    return Task(name, items, tuple(labels))


def few_shot_accuracy(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    shots: Sequence[int] = SHOTS,
    *,
    items: int | None = None,
    seed: int = 0,
    advance: Callable[[], None] | None = None,
) -> list[Accuracy]:
    """Accuracy after k examples for each k of ``shots``: ``input -> answer`` k times, then ``input ->``, one a line.

    The items are split into folds; the examples of a fold are drawn from the others, and those of a smaller k are the
    first of a larger one's. An answer is right if greedy decoding says all of it; a label, if it has the highest
    probability of all labels of the task.

    Args:
        items: of the task that are asked; None asks all.
        advance: called after each fold and k.

    Raises:
        ValueError: a k is negative or leaves no examples, or a prompt is longer than the model takes.
    """
    most = len(task.items) - -(-len(task.items) // FOLDS)
    if not all(0 <= k <= most for k in shots):
        raise ValueError(f"shots: expected 0 to {most} with {len(task.items)} items, got {list(shots)}")
    count = len(task.items) if items is None else items
    if not 1 <= count <= len(task.items):
        raise ValueError(f"items: expected 1 to {len(task.items)}, got {items}")
    shuffled = random.Random(seed).sample(task.items, len(task.items))
    right = dict.fromkeys(shots, 0)
    for fold in range(FOLDS):
        asked = shuffled[fold:count:FOLDS]
        others = [item for i, item in enumerate(shuffled) if i % FOLDS != fold]
        examples = random.Random(seed + fold).sample(others, max(shots, default=0))
        for k in right:
            if asked:
                prefix = "".join(f"{text} -> {answer}\n" for text, answer in examples[:k])
                right[k] += sum(_answers(model, tokenizer, prefix, asked, task.labels))
            if advance is not None:
                advance()
    return [Accuracy(task.name, k, hits, count) for k, hits in right.items()]


def _answers(
    model: nn.Module, tokenizer: Any, prefix: str, asked: Sequence[tuple[str, str]], labels: Sequence[str]
) -> list[bool]:
    """Which of the items are answered right after the examples in ``prefix``."""
    if not labels:
        pairs = [(f"{text} ->", f" {answer}") for text, answer in asked]
        return [greedy for _, greedy in score_continuations(model, tokenizer, prefix, pairs)]
    pairs = [(f"{text} ->", f" {label}") for text, _ in asked for label in labels]
    scores = torch.tensor([score for score, _ in score_continuations(model, tokenizer, prefix, pairs)])
    scores = scores.view(len(asked), len(labels))
    wanted = torch.tensor([labels.index(answer) for _, answer in asked])
    best = (scores.argmax(1) == wanted) & ~scores.isnan().any(1)
    return [bool(hit) for hit in best]


@torch.inference_mode()
def score_continuations(
    model: nn.Module, tokenizer: Any, prefix: str, pairs: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """Of each ``(question, continuation)`` after ``prefix``: its log-probability, and whether greedy decoding says it.

    The prefix is read once for all pairs. One pass over the rest shows both: a continuation is what greedy decoding
    says if each of its tokens is the likeliest after those before it. Padding comes last, where a causal model does not
    see it.

    Raises:
        ValueError: a prompt is longer than the model takes.
    """
    device = next(model.parameters()).device
    rows = [tokenizer(prefix + question + continuation)["input_ids"] for question, continuation in pairs]
    starts = [
        max(1, _common_prefix(row, tokenizer(prefix + question)["input_ids"]))
        for row, (question, _) in zip(rows, pairs, strict=True)
    ]
    longest, limit = max(map(len, rows)), _context(model)
    if longest > limit:
        raise ValueError(f"prompt: expected at most {limit} tokens, which the model takes, got {longest}")
    beginning = tokenizer(prefix)["input_ids"]
    # The token before an answer is read anew, for what follows it.
    shared = min(min(_common_prefix(row, beginning), start - 1) for row, start in zip(rows, starts, strict=True))
    cache = None
    if shared:
        first = torch.tensor([rows[0][:shared]], device=device)
        cache = model(input_ids=first, use_cache=True, logits_to_keep=1).past_key_values
    scored = []
    batch = max(1, min(_CACHED // longest, _LOGITS // (longest - shared)))
    for i in range(0, len(rows), batch):
        some = rows[i : i + batch]
        length = max(map(len, some))
        rest = torch.tensor([row[shared:] + [0] * (length - len(row)) for row in some], device=device)
        past = copy.deepcopy(cache) if len(rows) > batch else cache
        if past is not None:
            past.batch_repeat_interleave(len(some))
        logits = model(input_ids=rest, past_key_values=past, use_cache=past is not None).logits
        for row, start, found in zip(some, starts[i : i + batch], logits, strict=True):
            wanted = torch.tensor(row[start:], device=device)
            said = found[start - shared - 1 : len(row) - shared - 1].float()
            score = said.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
            scored.append((score, bool((said.argmax(-1) == wanted).all())))
    return scored


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def wilson_interval(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """``(p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)``, p = right / count: Wilson's score interval.

    Raises:
        ValueError: unless ``0 <= right <= count`` and ``count > 0``.
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"expected 0 to {count} right answers of at least 1, got {right}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, square = right / count, z * z / count
    half = z * math.sqrt(p * (1 - p) / count + square / (4 * count))
    return min(p, (p + square / 2 - half) / (1 + square)), max(p, (p + square / 2 + half) / (1 + square))
