"""The theory's measurements on a pretrained language model: kinds of neurons, what may go, where attention looks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasticl.icl.measure import clusters
from fasticl.layers import default_filter, distinct_groups, find_neurons
from fasticl.prune import activation_scores

# Two categories are a task: their names are the labels, the words the inputs. Words of one or two common tokens each.
CATEGORIES = {
    "animal": "lion tiger horse cow sheep goat rabbit mouse wolf bear deer monkey snake frog duck eagle whale shark",
    "fruit": "apple banana grape orange lemon peach pear plum cherry mango melon fig kiwi apricot papaya lime coconut",
    "color": "red blue green yellow purple black white brown pink gray gold silver violet crimson turquoise beige",
    "country": "France Germany Italy Spain Japan China India Brazil Canada Mexico Egypt Kenya Norway Poland Greece",
    "vehicle": "car truck bus train bicycle boat ship airplane helicopter motorcycle van tractor taxi ferry tram",
    "body": "hand foot leg arm head nose ear eye mouth knee finger toe neck shoulder elbow chest stomach tongue",
    "clothing": "shirt pants dress hat coat shoe sock glove scarf jacket skirt sweater belt boot suit tie jeans",
    "tool": "hammer saw drill wrench screwdriver shovel axe ladder pliers chisel rake nail bolt file knife",
}
PRUNING_ORDERS = ("activation", "weight norm", "random")


@dataclass(frozen=True)
class NeuronClusters:
    """One MLP's neurons, by ``mean|h_i| * ||W_down[:, i]||``, cut at the widest gap.

    The five smallest and largest of a hundred are left out of the search: an outlier is not a cluster.

    Attributes:
        layer: name of the down projection.
        gap: the widest ratio of neighbours in sorted order.
        small_fraction: the share below it.
        quantiles: scores at 0, 5, 25, 50, 75, 95 and 100 %, over the median.
    """

    layer: str
    gap: float
    small_fraction: float
    quantiles: list[float]


@dataclass(frozen=True)
class LanguageModelICL:
    """What :func:`measure_language_model` found.

    Attributes:
        neurons: of each MLP.
        accuracy: order of pruning -> rate -> fraction of prompts answered right, labels compared by their first token.
        prompts: how many each accuracy comes from; its standard error is ``sqrt(p (1 - p) / prompts)``.
        attention: ``[layers]``, what the last token pays to examples of the query's class, of what it pays to all
            examples; the mean over heads and prompts. Looking at none of them in particular gives 1/2.
        attention_best_head: ``[layers]``, the same of the head that looks at them most.
    """

    neurons: list[NeuronClusters]
    accuracy: dict[str, dict[float, float]]
    prompts: int
    attention: list[float]
    attention_best_head: list[float]


@dataclass(frozen=True)
class _Prompt:
    """Token ids; where each example lies, and whether it is of the query's class; the labels' first tokens."""

    tokens: list[int]
    examples: list[tuple[int, int]]
    same_class: list[bool]
    right: int
    wrong: int


@torch.no_grad()
def measure_language_model(
    model: nn.Module,
    tokenizer: Any,
    calibration: Sequence[Any],
    *,
    rates: Sequence[float] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    shots: int = 8,
    prompts: int = 100,
    attention_prompts: int = 30,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> LanguageModelICL:
    """The one-layer model's measurements, on prompts ``word: category`` of two categories, half the examples of each.

    Args:
        model: a causal language model of transformers; left as it is.
        tokenizer: its own.
        calibration: batches for the activation scores, as for :func:`fasticl.sparsify_`.
        rates: fractions of every MLP's neurons that go, zeroed.
        shots: examples of a prompt, even.
        prompts: for each accuracy, the same for all.
        attention_prompts: how many of them attention is read on.
        seed: draws prompts and the random order.
        progress: called after each of ``len(rates) * 3 + 1`` parts.

    Raises:
        ValueError: ``shots`` is odd or less than 2, a rate is outside [0, 1], or the model has no MLP of a known
            layout.
    """
    if shots < 2 or shots % 2:
        raise ValueError(f"shots: expected an even number of at least 2, got {shots}")
    if bad := [rate for rate in rates if not 0 <= rate <= 1]:
        raise ValueError(f"rates: expected fractions in [0, 1], got {bad[0]}")
    asked = _prompts(tokenizer, prompts, shots, seed)
    found = find_neurons(model, default_filter(model))
    if not found:
        raise ValueError(f"model: expected MLPs of a known layout, got none in {type(model).__name__}")
    activation, mlps = activation_scores(model, found, calibration), distinct_groups(found)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        "activation": activation,
        "weight norm": [group.layers[0].weight.double().norm(dim=1).cpu() for group in mlps],
        "random": [torch.rand(group.size, generator=generator) for group in mlps],
    }
    attention, best = _attention(model, asked[:attention_prompts])
    progress()
    accuracy: dict[str, dict[float, float]] = {}
    for order in PRUNING_ORDERS:
        accuracy[order] = {}
        pruned = copy.deepcopy(model)
        groups = distinct_groups(find_neurons(pruned, default_filter(pruned)))
        for rate in sorted(rates):  # what goes at one rate goes at all larger ones
            for group, score in zip(groups, scores[order], strict=True):
                mask = torch.zeros(group.size, dtype=torch.bool)
                mask[score.cpu().argsort(stable=True)[: round(rate * group.size)]] = True
                group.zero_(mask)
            accuracy[order][rate] = _accuracy(pruned, asked)
            progress()
    neurons = [_clusters(group.layers[1].name, score.cpu()) for group, score in zip(mlps, activation, strict=True)]
    return LanguageModelICL(neurons, accuracy, prompts, attention, best)


def _clusters(layer: str, scores: Tensor) -> NeuronClusters:
    ordered = scores.sort().values
    trim = len(ordered) // 20
    found = clusters(ordered[trim : len(ordered) - trim])
    at = torch.tensor([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0], dtype=ordered.dtype)
    quantiles = ordered.quantile(at) / ordered.median()
    return NeuronClusters(layer, found.gap, (trim + len(found.small)) / len(ordered), quantiles.tolist())


def _prompts(tokenizer: Any, count: int, shots: int, seed: int) -> list[_Prompt]:
    rng = random.Random(seed)
    made: list[_Prompt] = []
    while len(made) < count:
        a, b = rng.sample(list(CATEGORIES), 2)
        labels = [a] * (shots // 2) + [b] * (shots // 2)
        rng.shuffle(labels)
        words = {label: rng.sample(CATEGORIES[label].split(), shots // 2 + 1) for label in (a, b)}
        tokens = tokenizer("")["input_ids"][:1]  # what the tokenizer starts texts with, if anything
        examples = []
        for label in labels:
            line = tokenizer(f"{words[label].pop()}: {label}\n", add_special_tokens=False)["input_ids"]
            examples.append((len(tokens), len(tokens) + len(line)))
            tokens += line
        tokens += tokenizer(f"{words[a].pop()}:", add_special_tokens=False)["input_ids"]
        right, wrong = (tokenizer(f" {label}", add_special_tokens=False)["input_ids"][0] for label in (a, b))
        if right == wrong:
            raise ValueError(f"labels: expected {a!r} and {b!r} to differ in their first token")
        made.append(_Prompt(tokens, examples, [label == a for label in labels], right, wrong))
    return made


def _accuracy(model: nn.Module, prompts: Sequence[_Prompt]) -> float:
    device = next(model.parameters()).device
    hits = 0
    for start in range(0, len(prompts), 10):
        batch = prompts[start : start + 10]
        length = max(len(prompt.tokens) for prompt in batch)
        # Padding comes last, where a causal model does not see it.
        tokens = torch.tensor([p.tokens + [0] * (length - len(p.tokens)) for p in batch], device=device)
        logits = model(input_ids=tokens, use_cache=False).logits
        for row, prompt in zip(logits, batch, strict=True):
            last = row[len(prompt.tokens) - 1]
            hits += bool(last[prompt.right] > last[prompt.wrong])
    return hits / len(prompts)


def _attention(model: nn.Module, prompts: Sequence[_Prompt]) -> tuple[list[float], list[float]]:
    """Per layer, the mean over heads, and the head with the largest mean over prompts."""
    device = next(model.parameters()).device
    config: Any = model.config
    before = config._attn_implementation
    model.set_attn_implementation("eager")  # type: ignore[operator]  # the one that returns its attention
    try:
        shares = []
        for prompt in prompts:
            tokens = torch.tensor([prompt.tokens], device=device)
            layers = model(input_ids=tokens, use_cache=False, output_attentions=True).attentions
            last = torch.stack([layer[0, :, -1] for layer in layers]).double()  # [layers, heads, tokens]
            paid = torch.stack([last[..., begin:end].sum(-1) for begin, end in prompt.examples], dim=-1)
            same = paid[..., torch.tensor(prompt.same_class)].sum(-1)
            shares.append(same / paid.sum(-1))
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
    heads = torch.stack(shares).mean(dim=0)  # [layers, heads]
    return heads.mean(dim=1).tolist(), heads.max(dim=1).values.tolist()
