"""Measurements of in-context learners: each against a construction whose answer is known."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasticl.icl import (
    BASELINES,
    ICLGPT2,
    PRUNING_ORDERS,
    ICLData,
    ICLTransformer,
    Prompts,
    Training,
    attention_by_layer,
    baseline_errors,
    clusters,
    evaluate,
    projections,
    pruning_order,
    row_geometry,
    train,
)
from fasticl.icl.lm import CATEGORIES, measure_language_model

SMALL: dict[str, Any] = {"M1": 4, "M2": 4, "d_x": 10, "d_y": 3, "tasks_per_pattern": 2}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gpt2(seed: int = 0, **sizes: int) -> ICLGPT2:
    pytest.importorskip("transformers")
    return ICLGPT2(13, 8, max_length=12, generator=rng(seed), **sizes)


# Label noise


def test_label_noise_flips_the_task_labels_only() -> None:
    clean, noisy = ICLData(**SMALL), ICLData(**SMALL, label_noise=0.2)
    tasks = torch.tensor([[0, 1]])
    prompts = noisy.sample(4000, 10, 0.8, tasks=tasks, generator=rng())
    pattern = (prompts.context[..., :10] @ noisy.patterns.relevant.T).argmax(-1)
    label = prompts.context[..., 10:].sum(-1)
    for of, right in ((0, 1.0), (1, -1.0)):
        flipped = (label[pattern == of] != right).double()
        assert flipped.mean().item() == pytest.approx(0.2, abs=4 * 0.4 / math.sqrt(len(flipped)))
    sure = clean.sample(500, 10, 0.8, tasks=tasks, generator=rng())
    pattern = (sure.context[..., :10] @ clean.patterns.relevant.T).argmax(-1)
    assert bool((sure.context[..., 10:].sum(-1)[pattern == 0] == 1).all())
    with pytest.raises(ValueError, match=r"label_noise: expected in \[0, 0.5\), got 0.5"):
        ICLData(label_noise=0.5)


# The one-layer model


def test_projections_are_norms_of_what_the_weights_make() -> None:
    data = ICLData(**SMALL)
    model = ICLTransformer(data.d_x, data.d_y, 4, generator=rng())
    with torch.no_grad():
        for weight in (model.W_Q, model.W_K):
            weight.copy_(torch.randn(weight.shape, generator=rng(1)))
    prompts = data.sample(7, 5, 0.8, generator=rng(2))
    found = projections(model, data, prompts)

    def without_irrelevant(column: Tensor) -> Tensor:
        part = sum(
            ((column[:10] @ mu) / (mu @ mu)) * mu for mu in data.patterns.relevant
        )  # patterns are orthogonal: what is left is the relevant pattern
        return torch.cat([part, torch.zeros(3)])

    queries = list(prompts.query)
    keys = list(prompts.context.flatten(0, 1))
    for name, weight, columns in (("query", model.W_Q, queries), ("key", model.W_K, keys)):
        whole = sum((weight @ column).norm().item() for column in columns) / len(columns)
        relevant = sum((weight @ without_irrelevant(column)).norm().item() for column in columns) / len(columns)
        assert getattr(found, name) == pytest.approx(whole, rel=1e-5)
        assert getattr(found, f"{name}_relevant") == pytest.approx(relevant, rel=1e-5)
        assert abs(whole - relevant) > 0.01


def test_initial_projections_are_delta_times_their_input() -> None:
    data = ICLData()
    found = projections(ICLTransformer(delta=0.3), data, data.sample(5, 4, 0.8, generator=rng()))
    assert found.query_relevant == pytest.approx(0.3 * data.beta, rel=1e-5)


def test_row_geometry_of_known_rows() -> None:
    data = ICLData(**SMALL)
    model = ICLTransformer(10, 3, 3, m_b=13, generator=rng())
    mean = data.patterns.relevant.mean(dim=0)
    across = torch.linalg.qr(torch.stack([mean, data.patterns.irrelevant[0]], dim=1)).Q[:, 1]
    with torch.no_grad():
        model.a.copy_(torch.tensor([1.0, -1.0, 1.0]) / 3)
        model.W_V.copy_(2 * torch.eye(13))
        model.W_O.copy_(
            torch.stack(
                [
                    torch.cat([mean, torch.tensor([0.5, 0, 0])]),  # as theory has it for a > 0
                    torch.cat([-mean, torch.tensor([0.5, 0, 0])]),  # both parts the wrong way for a < 0
                    torch.cat([3 * across, torch.zeros(3)]),
                ]
            )
        )
    found = row_geometry(model, data)
    size = mean.norm().item()
    assert found.feature.tolist() == pytest.approx([2 * size, 2 * size, 6.0], rel=1e-5)
    assert found.label.tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert found.feature_angle.tolist() == pytest.approx([0, math.pi, math.pi / 2], abs=1e-3)
    assert found.label_angle.tolist() == pytest.approx([0, math.pi, math.pi / 2], abs=1e-3)


@pytest.mark.parametrize(
    ("scores", "small", "gap"),
    [
        ([1.0, 0.1, 1.1, 0.12], [1, 3], 1 / 0.12),
        ([5.0, 5.5, 0.5], [2], 10.0),
        ([0.0, 2.0, 0.0, 1.0], [0, 2], math.inf),
    ],
)
def test_clusters_cut_at_the_widest_ratio(scores: list[float], small: list[int], gap: float) -> None:
    found = clusters(torch.tensor(scores))
    assert found.small.tolist() == small
    assert sorted([*small, *found.large.tolist()]) == list(range(len(scores)))
    assert found.gap == pytest.approx(gap, rel=1e-6)
    assert found.small_fraction == len(small) / len(scores)


@pytest.mark.parametrize("scores", [[1.0], [0.0, 0.0], [1.0, math.nan], [1.0, -1.0], [1.0, math.inf]])
def test_clusters_refuse(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="scores: expected"):
        clusters(torch.tensor(scores))


def test_pruning_orders() -> None:
    model = ICLTransformer(4, 3, 6, generator=rng())
    with torch.no_grad():
        model.W_O.copy_(torch.eye(7)[:6] * torch.tensor([3.0, 0.1, 2.0, 0.2, 4.0, 1.0])[:, None])
        model.W_V.copy_(torch.diag(torch.tensor([1.0, 1, 6, 1, 1, 1, 1])))  # makes the third the largest
    assert pruning_order(model, "W_O").tolist() == [1, 3, 5, 2, 0, 4]
    assert pruning_order(model, "W_O W_V").tolist() == [1, 3, 5, 0, 4, 2]
    assert pruning_order(model, "largest first").tolist() == [4, 0, 2, 5, 3, 1]
    drawn = [tuple(pruning_order(model, "random", generator=rng(seed)).tolist()) for seed in range(5)]
    assert len(set(drawn)) > 1
    assert {tuple(sorted(order)) for order in drawn} == {tuple(range(6))}
    then = [pruning_order(model, "small, then random", generator=rng(seed)).tolist() for seed in range(20)]
    # The widest gap is from 0.2 to 1: what lies below goes first, smallest first.
    assert {tuple(order[:2]) for order in then} == {(1, 3)}
    assert len({tuple(order[2:]) for order in then}) > 1
    with pytest.raises(ValueError, match=r"by: expected one of 'W_O', .*got 'smallest'"):
        pruning_order(model, "smallest")  # type: ignore[arg-type]
    assert len(PRUNING_ORDERS) == 5


def test_attention_by_layer_is_the_mean_of_its_prompts() -> None:
    data = ICLData(**SMALL)
    prompts = data.sample(40, 9, 0.7, tasks=data.unseen_tasks, generator=rng(3))
    arguments: dict[str, Any] = {"n": 40, "length": 9, "alpha": 0.7, "tasks": data.unseen_tasks}
    one = ICLTransformer(10, 3, 4, delta=0.7, generator=rng())
    weights = one.attention(prompts.context, prompts.query)
    expected = sum(w[s].sum().item() for w, s in zip(weights, prompts.same_pattern, strict=True)) / 40
    assert attention_by_layer(one, data, generator=rng(3), **arguments) == [pytest.approx(expected, rel=1e-5)]
    three = gpt2()
    layers = attention_by_layer(three, data, generator=rng(3), **arguments)
    assert len(layers) == 3
    for layer, found in zip(three.attention(prompts.context, prompts.query), layers, strict=True):
        assert found == pytest.approx((layer * prompts.same_pattern).sum().item() / 40, rel=1e-5)
    evaluated = evaluate(three, data, n=40, length=9, alpha=0.7, generator=rng(3))
    assert evaluated.attention == pytest.approx(sum(layers) / 3, rel=1e-5)


# GPT-2


def test_gpt2_reads_the_whole_context_and_the_query() -> None:
    model = gpt2().double()
    context = torch.randn(2, 5, 13, dtype=torch.float64, generator=rng())
    query = torch.randn(2, 13, dtype=torch.float64, generator=rng(1))
    F = model(context, query)
    assert F.shape == (2,)
    for column in range(5):
        changed = context.clone()
        changed[0, column] += 1
        moved = (model(changed, query) - F).abs()
        assert moved[0] > 1e-6
        assert moved[1] == 0
    assert (model(context, query + 1) - F).abs().min() > 1e-6


def test_gpt2_attention_sums_to_one_and_is_that_of_the_query() -> None:
    model = gpt2(n_layer=2)
    context, query = torch.randn(3, 6, 13, generator=rng()), torch.randn(3, 13, generator=rng(1))
    found = model.attention(context, query)
    assert found.shape == (2, 3, 6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))
    hidden = model.read(torch.cat([context, query[:, None]], dim=1))
    heads = model.blocks(inputs_embeds=hidden, output_attentions=True).attentions[0]  # [B, heads, 7, 7]
    row = heads[1, :, 6].mean(0)[:6]
    torch.testing.assert_close(found[0, 1], row / row.sum())


def test_gpt2_seeds_reproduce_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = gpt2(), gpt2(), gpt2(1)
    assert torch.get_rng_state().equal(before)
    for name, weight in first.state_dict().items():
        assert weight.equal(again.state_dict()[name])
    assert not first.read.weight.equal(other.read.weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m(torch.zeros(2, 3, 12), torch.zeros(2, 13)),
            r"context: expected \[B=2, L, d=13\], got \[2, 3, 12\]",
        ),
        (lambda m: m(torch.zeros(2, 3, 13), torch.zeros(2, 12)), r"query: expected \[B, d=13\], got \[2, 12\]"),
        (lambda m: m(torch.zeros(2, 13, 13), torch.zeros(2, 13)), "at most max_length=12 columns, got 13"),
        (lambda m: gpt2(n_head=3), "n_embd: expected a multiple of n_head=3, got 8"),
        (lambda m: gpt2(n_layer=0), "n_layer: expected at least 1, got 0"),
    ],
)
def test_gpt2_refuses(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(gpt2())


# Training that stops, goes on, fails


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_goes_on_from_its_checkpoint(tmp_path: Path, optimizer: Any) -> None:
    """Stopped after 5 of 8 steps, of which the checkpoint has 4: the rest is what it would have been."""
    data, file = ICLData(**SMALL), tmp_path / "model.pt"
    start = ICLTransformer(data.d_x, data.d_y, 8, xi=0.5, generator=rng())

    def run(model: ICLTransformer, steps: int, checkpoint: Path | None, generator: torch.Generator) -> Training:
        return train(
            model,
            data,
            steps=steps,
            batch=16,
            lr=0.1,
            length=6,
            optimizer=optimizer,
            generator=generator,
            measure=lambda: model.W_O.sum().item(),
            measure_every=2,
            checkpoint=checkpoint,
            checkpoint_every=4,
        )

    whole = copy.deepcopy(start)
    expected = run(whole, 8, None, rng(1))
    assert [step for step, _ in expected.measurements] == [0, 2, 4, 6, 8]

    class Stop(Exception):
        pass

    def stop_at_5(step: int, loss: float) -> None:
        if step == 5:
            raise Stop

    cut = copy.deepcopy(start)
    with pytest.raises(Stop):
        train(
            cut,
            data,
            steps=8,
            batch=16,
            lr=0.1,
            length=6,
            optimizer=optimizer,
            generator=rng(1),
            progress=stop_at_5,
            measure=lambda: cut.W_O.sum().item(),
            measure_every=2,
            checkpoint=file,
            checkpoint_every=4,
        )
    resumed = copy.deepcopy(start)
    found = run(resumed, 8, file, rng(99))
    assert found == expected
    for name, weight in whole.state_dict().items():
        assert weight.equal(resumed.state_dict()[name])
    done = copy.deepcopy(start)
    assert run(done, 8, file, rng(5)) == expected  # nothing left to do
    assert done.W_O.equal(whole.W_O)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    data, file = ICLData(**SMALL), tmp_path / "model.pt"

    def run(m: int = 8, lr: float = 0.1, generator: torch.Generator | None = None) -> None:
        model = ICLTransformer(data.d_x, data.d_y, m, generator=rng())
        train(model, data, steps=2, batch=4, lr=lr, length=5, generator=generator, checkpoint=file)

    run(generator=rng())
    with pytest.raises(ValueError, match=r"checkpoint: expected one of .*'lr': 0.2.*got one of .*'lr': 0.1"):
        run(lr=0.2, generator=rng())
    with pytest.raises(ValueError, match=r"(?s)does not hold a training of this model: .*size mismatch"):
        run(m=9, generator=rng())
    with pytest.raises(ValueError, match="generator: expected one with a checkpoint"):
        run()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="does not hold a training of this model"):
        run(generator=rng())


def test_stop_below_ends_training_where_the_loss_is(tmp_path: Path) -> None:
    data = ICLData()
    model, file = ICLTransformer(generator=rng()), tmp_path / "model.pt"
    found = train(model, data, stop_below=0.5, generator=rng(1), checkpoint=file)
    assert 50 < len(found.losses) < 400
    assert sum(found.losses[-20:]) / 20 < 0.5
    assert sum(found.losses[-21:-1]) / 20 >= 0.5
    again = train(ICLTransformer(generator=rng()), data, stop_below=0.5, generator=rng(1), checkpoint=file)
    assert again.losses == found.losses  # it had ended, and is not continued


def test_chance_is_told_from_learning() -> None:
    assert Training([1.0] * 30).at_chance
    assert Training([0.2] * 30 + [0.95] * 20).at_chance
    assert not Training([1.0] * 30 + [0.5] * 20).at_chance


class Loud(nn.Module):
    """Answers as wrongly and as loudly as told, finite."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(size))

    def forward(self, context: Tensor, query: Tensor) -> Tensor:
        return self.size * (2 * (torch.arange(len(query)) % 2) - 1)


def test_divergence_is_noticed_before_it_overflows() -> None:
    data = ICLData(**SMALL)
    with pytest.raises(FloatingPointError, match=r"training diverged: the loss is .* at step 1 "):
        train(Loud(100.0), data, steps=30, batch=64, lr=1e-9, length=5, generator=rng())
    assert len(train(Loud(1.0), data, steps=30, batch=64, lr=1e-9, length=5, generator=rng()).losses) == 30


# Classical learners


def prompts_of(x: Tensor, y: Tensor, query: Tensor, target: Tensor) -> Prompts:
    """``x [B, L, d_x]``, ``y [B, L]`` in one label coordinate."""
    B, L, _ = x.shape
    return Prompts(
        torch.cat([x, y[..., None]], -1), torch.cat([query, torch.zeros(B, 1)], -1), target, torch.zeros(B, L).bool()
    )


def test_baselines_learn_what_is_separable() -> None:
    pytest.importorskip("sklearn")
    y = (2 * torch.randint(2, (20, 16), generator=rng()) - 1).float()
    target = (2 * torch.randint(2, (20,), generator=rng(1)) - 1).float()
    x = 0.1 * torch.randn(20, 16, 4, generator=rng(2))
    x[..., 0] += y
    query = 0.1 * torch.randn(20, 4, generator=rng(3))
    query[:, 0] += target
    assert baseline_errors(prompts_of(x, y, query, target), 4) == dict.fromkeys(BASELINES, 0.0)
    assert baseline_errors(prompts_of(x, y, query, -target), 4) == dict.fromkeys(BASELINES, 1.0)


def test_nearest_neighbours_are_the_nearest() -> None:
    pytest.importorskip("sklearn")
    x, query = torch.randn(50, 9, 5, generator=rng()), torch.randn(50, 5, generator=rng(1))
    y = (2 * torch.randint(2, (50, 9), generator=rng(2)) - 1).float()
    target = torch.ones(50)
    order = (x - query[:, None]).norm(dim=-1).argsort(dim=1)
    expected = {k: (y.gather(1, order[:, :k]).sum(1) < 0).double().mean().item() for k in (1, 3)}
    found = baseline_errors(prompts_of(x, y, query, target), 5, ("1-NN", "3-NN"))
    assert found == {"1-NN": expected[1], "3-NN": expected[3]}
    assert 0 < expected[1] < 1


def test_a_context_of_one_label_gives_that_label() -> None:
    pytest.importorskip("sklearn")
    x, query = torch.randn(4, 1, 5, generator=rng()), torch.randn(4, 5, generator=rng(1))
    y = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    target = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert baseline_errors(prompts_of(x, y, query, target), 5) == dict.fromkeys(BASELINES, 0.75)
    with pytest.raises(ValueError, match=r"names: expected of logistic.*got forest"):
        baseline_errors(prompts_of(x, y, query, target), 5, ("forest",))


# A language model


@pytest.fixture(scope="module")
def word_model() -> tuple[Any, Any]:
    """A tiny Llama with random weights whose tokens are whole words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = sorted({word for words in CATEGORIES.values() for word in words.split()} | set(CATEGORIES) | {":", "[UNK]"})
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    return model, transformers.PreTrainedTokenizerFast(tokenizer_object=plain)


def test_language_model_measurements(word_model: tuple[Any, Any]) -> None:
    model, tokenizer = word_model
    before = copy.deepcopy(model.state_dict())
    calibration = [torch.randint(len(tokenizer), (2, 8), generator=rng())]
    calls: list[None] = []
    found = measure_language_model(
        model,
        tokenizer,
        calibration,
        rates=(0.0, 0.5, 1.0),
        shots=4,
        prompts=30,
        attention_prompts=4,
        progress=lambda: calls.append(None),
    )
    assert len(calls) == 3 * 3 + 1
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    # All orders agree on the dense model, and on the one without any neuron.
    for rate in (0.0, 1.0):
        assert len({curve[rate] for curve in found.accuracy.values()}) == 1
    assert all(0 <= accuracy <= 1 for curve in found.accuracy.values() for accuracy in curve.values())
    assert len(found.neurons) == len(found.attention) == 2
    for neurons in found.neurons:
        assert neurons.quantiles == sorted(neurons.quantiles)
        assert neurons.quantiles[3] == pytest.approx(1, rel=0.1)  # over the median
        assert 0.05 <= neurons.small_fraction <= 0.95
    for mean, best in zip(found.attention, found.attention_best_head, strict=True):
        assert 0.3 < mean < 0.7  # of random weights: a half of the examples are of the query's class
        assert best >= mean
    json.dumps(found.neurons[0].quantiles)


def test_language_model_that_copies_the_right_label_is_right(
    word_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that name the category of the last word: accuracy 1, and 0 if it names the other one."""
    model, tokenizer = copy.deepcopy(word_model[0]), word_model[1]
    category = {word: name for name, words in CATEGORIES.items() for word in words.split()}
    names = {tokenizer.convert_tokens_to_ids(word): tokenizer.convert_tokens_to_ids(n) for word, n in category.items()}
    forward = type(model).forward

    def naming(self: Any, input_ids: Tensor, sign: float, **options: Any) -> Any:
        output = forward(self, input_ids=input_ids, **options)
        logits = torch.zeros_like(output.logits)
        for row, tokens in enumerate(input_ids.tolist()):
            for at in range(1, len(tokens)):
                if tokens[at - 1] in names:  # at is the colon after a word
                    logits[row, at, names[tokens[at - 1]]] = sign
        output.logits = logits
        return output

    for sign, expected in ((1.0, 1.0), (-1.0, 0.0)):
        monkeypatch.setattr(
            type(model), "forward", lambda self, input_ids, s=sign, **o: naming(self, input_ids, s, **o)
        )
        found = measure_language_model(
            model, tokenizer, [torch.zeros(1, 4).long()], rates=(0.0,), shots=2, prompts=12, attention_prompts=1
        )
        assert found.accuracy["activation"][0.0] == expected
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": 3}, "shots: expected an even number of at least 2, got 3"),
        ({"rates": (0.0, 1.2)}, r"rates: expected fractions in \[0, 1\], got 1.2"),
    ],
)
def test_language_model_measurement_refuses(word_model: tuple[Any, Any], arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_language_model(*word_model, [], **arguments)
