"""The in-context learner: data against its definition, module against its formula, training by its effect."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from fasticl.icl import (
    FusedICLTransformer,
    ICLData,
    ICLTransformer,
    Patterns,
    evaluate,
    hinge_loss,
    pruning_curve,
    train,
)

SMALL = {"M1": 4, "M2": 4, "d_x": 10, "d_y": 3, "tasks_per_pattern": 2}  # d_x > M1 + M2: x leaves directions unused


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained() -> tuple[ICLData, ICLTransformer, list[float]]:
    """The recipe, 64 neurons and 400 steps; about 1.5 s on one core. Tests leave it as it is."""
    data, generator = ICLData(), rng()
    model = ICLTransformer(generator=generator)
    return data, model, train(model, data, generator=generator).losses


def formula(model: ICLTransformer, context: Tensor, query: Tensor) -> Tensor:
    """F of one prompt, column by column as defined; context ``[L, d]``, query ``[d]``."""
    score = torch.stack([(model.W_K @ p) @ (model.W_Q @ query) for p in context])
    weight = score.exp() / score.exp().sum()
    value = sum(w * (model.W_V @ p) for w, p in zip(weight, context, strict=True))
    return model.a @ torch.relu(model.W_O @ value)


def random_model(seed: int = 0, m: int = 12) -> ICLTransformer:
    """Float64, with every weight dense and of order one, so that no term of the formula hides."""
    generator = rng(seed)
    model = ICLTransformer(4, 3, m, m_a=5, m_b=6, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, dtype=weight.dtype, generator=generator))
    return model


def random_prompts(B: int = 5, L: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = rng(seed)
    context = torch.randn(B, L, 7, dtype=torch.float64, generator=generator)
    return context, torch.randn(B, 7, dtype=torch.float64, generator=generator)


# Data


def decode(data: ICLData, columns: Tensor, patterns: Patterns | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Per column ``[..., d]``: the relevant pattern, the coefficients of the irrelevant ones, the label +1, -1 or 0."""
    patterns = data.patterns if patterns is None else patterns
    x, y = columns.split([data.d_x, data.d_y], dim=-1)
    relevant = x @ patterns.relevant.T / data.beta**2
    irrelevant = x @ patterns.irrelevant.T / data.beta**2
    rebuilt = relevant @ patterns.relevant + irrelevant @ patterns.irrelevant
    torch.testing.assert_close(rebuilt, x, atol=1e-5, rtol=0)
    assert y[..., 1:].abs().max() == 0  # q = e_1
    one_hot = torch.nn.functional.one_hot(relevant.argmax(-1), relevant.shape[-1]).float()
    torch.testing.assert_close(relevant, one_hot, atol=1e-5, rtol=0)
    return relevant.argmax(-1), irrelevant, y[..., 0]


def test_prompt_shapes_and_dtypes():
    data = ICLData(**SMALL)
    prompts = data.sample(6, 7, 0.8, generator=rng())
    assert prompts.context.shape == (6, 7, 13)
    assert prompts.query.shape == (6, 13)
    assert prompts.target.shape == (6,)
    assert prompts.same_pattern.shape == (6, 7)
    assert prompts.same_pattern.dtype == torch.bool
    assert {t.dtype for t in (prompts.context, prompts.query, prompts.target)} == {torch.float32}
    double = prompts.to(dtype=torch.float64)
    assert {t.dtype for t in (double.context, double.query, double.target)} == {torch.float64}
    assert double.same_pattern.dtype == torch.bool
    assert data.sample(0, 7, 0.8).context.shape == (0, 7, 13)


@pytest.mark.parametrize("task", [(2, 0), (1, 3)], ids=["a_above_b", "a_below_b"])
def test_columns_follow_the_task(task):
    """Patterns, labels, coefficients and the query, decoded from the columns alone; alpha off its default."""
    data, alpha, (a, b) = ICLData(**SMALL), 0.6, task
    prompts = data.sample(4000, 8, alpha, tasks=torch.tensor([task]), generator=rng())
    pattern, irrelevant, label = decode(data, prompts.context)
    query_pattern, _, query_label = decode(data, prompts.query)

    assert (label[pattern == a] == 1).all()
    assert (label[pattern == b] == -1).all()
    coin = label[(pattern != a) & (pattern != b)]
    assert set(coin.unique().tolist()) == {-1.0, 1.0}
    assert abs(coin.mean()) < 4 / math.sqrt(coin.numel())

    n = pattern.numel()
    for j in range(data.M1):
        expected = alpha / 2 if j in task else (1 - alpha) / (data.M1 - 2)
        assert abs((pattern == j).float().mean() - expected) < 4 * math.sqrt(expected / n)

    assert (query_label == 0).all()
    assert query_pattern.equal(torch.where(prompts.target > 0, a, b))
    assert abs(prompts.target.mean()) < 4 / math.sqrt(4000)
    assert prompts.same_pattern.equal(pattern == query_pattern.unsqueeze(1))

    present = irrelevant.abs() > 1e-5
    assert (present.sum(-1) <= 1).all()
    k = irrelevant.sum(-1)  # uniform on [-1/2, 1/2]: variance 1/12
    assert k.abs().max() <= data.kappa + 1e-5
    assert k.abs().max() > 0.99 * data.kappa
    assert abs(k.mean()) < 4 * math.sqrt(1 / 12 / n)
    assert abs(k.var() * 12 - 1) < 0.03
    assert abs(present.float().mean((0, 1)) - 1 / data.M2).max() < 4 * math.sqrt(1 / data.M2 / n)


def test_default_tasks_are_all_ordered_pairs():
    data = ICLData(**SMALL)
    prompts = data.sample(3000, 12, 1.0, generator=rng())  # at alpha = 1 the labels reveal the task
    pattern, _, label = decode(data, prompts.context)
    tasks = {
        (int(p[y > 0][0]), int(p[y < 0][0]))
        for p, y in zip(pattern, label, strict=True)
        if (y > 0).any() and (y < 0).any()
    }
    assert tasks == {(a, b) for a in range(4) for b in range(4) if a != b}


def test_task_split_covers_patterns_and_labels_evenly():
    data = ICLData()
    seen, unseen = ({tuple(pair) for pair in tasks.tolist()} for tasks in (data.training_tasks, data.unseen_tasks))
    assert (len(seen), len(unseen)) == (18, 12)
    assert seen | unseen == {(a, b) for a in range(6) for b in range(6) if a != b}
    for side in (0, 1):
        assert data.training_tasks[:, side].bincount().tolist() == [3] * 6
    assert len(ICLData(tasks_per_pattern=5).unseen_tasks) == 0


def test_in_domain_patterns_are_orthogonal_of_norm_beta():
    data = ICLData(beta=1.7)
    rows = torch.cat([data.patterns.relevant, data.patterns.irrelevant])
    torch.testing.assert_close(rows @ rows.T, 1.7**2 * torch.eye(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.patterns.coefficients @ data.patterns.relevant, data.patterns.relevant)


@pytest.mark.parametrize(
    ("count", "S1"),
    [(3, 1.2), (3, 0.5), (3, -1.0), (2, 1.7), (3, math.sqrt(2)), (5, 1.0), (6, 1.0)],
    ids=["default", "control", "negative", "two", "on_the_bound", "all_but_one", "all"],
)
def test_out_of_domain_patterns(count, S1):
    data = ICLData(d_x=33)  # span(mu, nu) is not everything
    patterns = data.out_of_domain(count, S1, generator=rng())
    rows = torch.cat([patterns.relevant, patterns.irrelevant])
    torch.testing.assert_close(rows @ rows.T, 4.0 * torch.eye(count + 24), atol=1e-4, rtol=0)
    torch.testing.assert_close(patterns.coefficients.sum(1), torch.full((count,), S1), atol=1e-5, rtol=0)
    torch.testing.assert_close(patterns.coefficients @ data.patterns.relevant, patterns.relevant)
    nu = data.patterns.irrelevant
    torch.testing.assert_close(patterns.irrelevant @ nu.T @ nu / 4.0, patterns.irrelevant, atol=1e-5, rtol=0)
    assert not torch.allclose(patterns.irrelevant, nu, atol=0.1)

    prompts = data.sample(50, 6, 1.0 if count == 2 else 0.8, patterns=patterns, generator=rng())
    pattern, _, _ = decode(data, prompts.context, patterns)
    query_pattern, _, _ = decode(data, prompts.query, patterns)
    assert prompts.same_pattern.equal(pattern == query_pattern.unsqueeze(1))


def test_seeds_reproduce():
    first, again, other = ICLData(seed=3), ICLData(seed=3), ICLData(seed=4)
    assert first == again
    assert first != other
    assert first.patterns.relevant.equal(again.patterns.relevant)
    assert not first.patterns.relevant.equal(other.patterns.relevant)
    assert not first.training_tasks.equal(other.training_tasks)
    x, y, z = (first.sample(4, 5, 0.8, generator=rng(seed)).context for seed in (0, 0, 1))
    assert x.equal(y)
    assert not x.equal(z)
    p, q = (first.out_of_domain(generator=rng(7)).relevant for _ in range(2))
    assert p.equal(q)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: d.sample(2, 3, 0.0), ValueError, r"alpha: expected in \(0, 1\], got 0.0"),
        (lambda d: d.sample(2, 3, 1.1), ValueError, r"alpha: expected in \(0, 1\], got 1.1"),
        (lambda d: d.sample(2, 3, math.nan), ValueError, r"alpha: expected in \(0, 1\], got nan"),
        (lambda d: d.sample(2, 0, 0.8), ValueError, "length: expected at least 1, got 0"),
        (lambda d: d.sample(2, 2.0, 0.8), TypeError, "length: expected an integer, got 2.0"),
        (lambda d: d.sample(-1, 2, 0.8), ValueError, "batch: expected at least 0, got -1"),
        (
            lambda d: d.sample(2, 3, 0.8, tasks=torch.tensor([[0, 6]])),
            ValueError,
            r"expected patterns in 0..5, got 0..6",
        ),
        (lambda d: d.sample(2, 3, 0.8, tasks=torch.tensor([[1, 1]])), ValueError, "expected a != b"),
        (
            lambda d: d.sample(2, 3, 0.8, tasks=torch.tensor([[0.0, 1.0]])),
            TypeError,
            "int64 or int32, got torch.float32",
        ),
        (lambda d: d.sample(2, 3, 0.8, tasks=torch.empty(0, 2).long()), ValueError, r"at least one pair.*got \[0, 2\]"),
        (lambda d: d.sample(2, 3, 0.8, patterns=ICLData(d_x=31).patterns), ValueError, r"d_x=30\], got \[6, 31\]"),
        (lambda d: d.sample(2, 3, 0.8, patterns=d.out_of_domain(2, 1.0)), ValueError, "alpha: expected 1 with 2"),
        (lambda d: d.out_of_domain(3, 1.5), ValueError, r"count \* S1\*\*2 <= M1 = 6, got 3 \* 1.5\*\*2 = 6.75"),
        (lambda d: d.out_of_domain(3, math.nan), ValueError, r"count \* S1\*\*2 <= M1 = 6"),
        (lambda d: d.out_of_domain(7, 0.5), ValueError, "count: expected at most M1 = 6 orthogonal patterns.*got 7"),
        (lambda d: d.out_of_domain(6, 0.5), ValueError, "need S1 = 1 or -1, got 0.5"),
        (lambda d: d.out_of_domain(1, 1.0), ValueError, "count: expected at least 2, got 1"),
        (lambda d: ICLData(d_x=29), ValueError, r"d_x: expected at least M1 \+ M2 = 30 .*, got 29"),
        (lambda d: ICLData(tasks_per_pattern=6), ValueError, "tasks_per_pattern: expected 1 to M1 - 1 = 5, got 6"),
        (lambda d: ICLData(beta=0.0), ValueError, "beta: expected finite and positive, got 0.0"),
        (lambda d: ICLData(kappa=math.inf), ValueError, "kappa: expected finite and not negative, got inf"),
        (lambda d: ICLData(M1=1), ValueError, "M1: expected at least 2, got 1"),
        (lambda d: ICLData(M2=True), TypeError, "M2: expected an integer, got True"),
    ],
)
def test_data_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(ICLData())


# Model


def test_forward_is_the_formula():
    model, (context, query) = random_model(), random_prompts()
    expected = torch.stack([formula(model, *prompt) for prompt in zip(context, query, strict=True)])
    torch.testing.assert_close(model(context, query), expected, atol=1e-12, rtol=1e-12)
    assert expected.abs().min() > 1e-3  # the ReLU did not make the comparison idle


def test_initial_weights():
    model = ICLTransformer(4, 3, 5000, m_a=6, m_b=9, delta=0.3, xi=0.05, generator=rng())
    assert model.W_Q.equal(0.3 * torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0, 0]))[:6])
    assert model.W_K.equal(model.W_Q)
    assert model.W_V.equal(0.3 * torch.eye(9, 7))
    assert abs(model.W_O.std() / 0.05 - 1) < 4 / math.sqrt(2 * model.W_O.numel())
    assert model.a.abs().unique().tolist() == pytest.approx([1 / 5000])
    assert abs(model.a.sum()) < 4 / math.sqrt(5000)
    again = ICLTransformer(4, 3, 5000, m_a=6, m_b=9, delta=0.3, xi=0.05, generator=rng())
    assert again.W_O.equal(model.W_O)
    assert again.a.equal(model.a)


def test_gradients_flow_to_the_four_matrices_and_not_to_a():
    model, (context, query) = random_model(), random_prompts(3, 4)
    names = [name for name, _ in model.named_parameters()]
    assert names == ["W_Q", "W_K", "W_V", "W_O"]
    model(context, query).sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.parameters())
    assert not model.a.requires_grad

    lengths = torch.tensor([4, 2, 0])  # through padding and an empty prompt too

    def F(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (context, query, lengths))

    assert torch.autograd.gradcheck(F, tuple(weight.detach().requires_grad_() for weight in model.parameters()))


@pytest.mark.parametrize("fused", [False, True], ids=["model", "fused"])
def test_lengths_cut_the_context(fused):
    model, (context, query) = random_model(), random_prompts(4, 6)
    module = model.compile_for_inference() if fused else model
    lengths = torch.tensor([6, 1, 0, 3])
    poisoned = context.clone()
    for prompt, length in zip(poisoned, lengths.tolist(), strict=True):
        prompt[length:] = math.nan
    F, attention = module(poisoned, query, lengths), module.attention(poisoned, query, lengths)
    for i, length in enumerate(lengths.tolist()):
        cut = context[i : i + 1, :length], query[i : i + 1]
        torch.testing.assert_close(F[i : i + 1], model(*cut), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(attention[i : i + 1, :length], model.attention(*cut))
    assert F[2] == 0
    assert attention[1].tolist() == [1, 0, 0, 0, 0, 0]
    torch.testing.assert_close(attention.sum(1), (lengths > 0).double())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 8)}, ValueError, r"query: expected \[B, d=7\], got \[2, 8\]"),
        ({"context": torch.zeros(3, 4, 7)}, ValueError, r"context: expected \[B=2, L, d=7\].*got \[3, 4, 7\]"),
        ({"context": torch.zeros(2, 4, 8)}, ValueError, r"context: expected \[B=2, L, d=7\].*got \[2, 4, 8\]"),
        ({"context": torch.zeros(2, 4, 7).double()}, TypeError, "context: expected torch.float32.*got torch.float64"),
        ({"query": torch.zeros(2, 7, device="meta")}, ValueError, "query: expected on cpu.*got on meta"),
        ({"lengths": torch.ones(2)}, TypeError, "lengths: expected int64 or int32, got torch.float32"),
        ({"lengths": torch.ones(3).long()}, ValueError, r"lengths: expected \[B=2\], got \[3\]"),
        ({"lengths": torch.tensor([1, 5])}, ValueError, r"lengths: expected 0..L=4, got 1..5"),
        ({"lengths": torch.tensor([-1, 4])}, ValueError, r"lengths: expected 0..L=4, got -1..4"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "attention"])
def test_model_refuses_prompts(change, error, message, method):
    arguments = {"context": torch.zeros(2, 4, 7), "query": torch.zeros(2, 7), **change}
    with pytest.raises(error, match=message):
        getattr(ICLTransformer(4, 3), method)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"m": 0}, ValueError, "m: expected at least 1, got 0"),
        ({"m_b": 2.0}, TypeError, "m_b: expected an integer, got 2.0"),
        ({"delta": -0.1}, ValueError, "delta: expected finite and positive, got -0.1"),
        ({"xi": math.nan}, ValueError, "xi: expected finite and positive, got nan"),
    ],
)
def test_model_refuses_sizes(arguments, error, message):
    with pytest.raises(error, match=message):
        ICLTransformer(**arguments)


def test_neuron_scores():
    model = random_model()
    torch.testing.assert_close(model.neuron_scores(), model.W_O.detach().pow(2).sum(1).sqrt())
    product = (model.W_O @ model.W_V).detach()
    torch.testing.assert_close(model.neuron_scores("W_O W_V"), product.pow(2).sum(1).sqrt())
    with pytest.raises(ValueError, match="expected 'W_O' or 'W_O W_V', got 'W_V'"):
        model.neuron_scores("W_V")


def test_removing_zero_neurons_changes_nothing():
    model, prompts = random_model(), random_prompts()
    with torch.no_grad():
        model.W_O[[2, 5, 11]] = 0
    before, W_O, a = model(*prompts), model.W_O.detach().clone(), model.a.clone()
    assert model.prune_neurons_(3 / 12) is model
    kept = [0, 1, 3, 4, 6, 7, 8, 9, 10]
    assert model.W_O.equal(W_O[kept])
    assert model.a.equal(a[kept])
    torch.testing.assert_close(model(*prompts), before, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("weight", ["W_O", "W_O W_V"])
@pytest.mark.parametrize(("rate", "gone"), [(0.0, 0), (0.29, 3), (0.5, 6), (1.0, 12)])
def test_pruning_takes_the_smallest(weight, rate, gone):
    model = random_model()
    scores, W_O = model.neuron_scores(weight), model.W_O.detach().clone()
    model.prune_neurons_(rate, weight=weight)
    kept = scores.argsort()[gone:].sort().values
    assert model.W_O.equal(W_O[kept])
    assert model.a.shape == (12 - gone,)


@pytest.mark.parametrize("neurons", [[1, 7], torch.tensor([7, 1], dtype=torch.int32)], ids=["list", "int32_tensor"])
def test_pruning_by_indices(neurons):
    model, W_O = random_model(), random_model().W_O.detach()
    model.W_O.requires_grad_(False)
    model.prune_neurons_(neurons)
    assert model.W_O.equal(W_O[[0, 2, 3, 4, 5, 6, 8, 9, 10, 11]])
    assert not model.W_O.requires_grad  # frozen stays frozen
    assert model.prune_neurons_([]).W_O.shape == (10, 6)


@pytest.mark.parametrize(
    ("neurons", "error", "message"),
    [
        (1.5, ValueError, r"expected a fraction in \[0, 1\], got 1.5"),
        (math.nan, ValueError, r"expected a fraction in \[0, 1\], got nan"),
        (1, TypeError, "expected a float or integer indices, got 1"),
        ([0, 12], ValueError, "expected indices in 0..11, got 0..12"),
        ([-1], ValueError, "expected indices in 0..11, got -1..-1"),
        ([0.5], TypeError, "expected integer indices"),
        (torch.ones(12, dtype=torch.bool), TypeError, "expected integer indices.*got torch.bool"),
    ],
)
def test_pruning_refuses(neurons, error, message):
    model = random_model()
    with pytest.raises(error, match=message):
        model.prune_neurons_(neurons)
    assert len(model.W_O) == len(model.a) == 12


def test_pruning_refuses_to_rank_nan():
    model = random_model()
    with torch.no_grad():
        model.W_O[3, 0] = math.nan
    with pytest.raises(ValueError, match="expected finite weights to rank"):
        model.prune_neurons_(0.5)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_pruned_then_fused_is_the_same_function(rate):
    model, (context, query) = random_model().prune_neurons_(rate), random_prompts()
    fused = model.compile_for_inference()
    torch.testing.assert_close(fused(context, query), model(context, query).detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(fused.attention(context, query), model.attention(context, query).detach())
    assert list(fused.parameters()) == []
    assert {name: tuple(t.shape) for name, t in fused.state_dict().items()} == {
        "A": (7, 7),
        "W": (len(model.W_O), 7),
        "a": (len(model.W_O),),
    }


@pytest.mark.parametrize("columns", [0, 6])
def test_many_queries_of_a_prompt(columns):
    model, (context, _) = random_model(), random_prompts(4, columns)
    fused, queries = model.compile_for_inference(), torch.randn(4, 3, 7, dtype=context.dtype)
    for lengths in (None, torch.tensor([columns, 0, columns, 0])):
        expected = [model(context, query, lengths).detach() for query in queries.unbind(1)]
        torch.testing.assert_close(fused(context, queries, lengths), torch.stack(expected, 1), atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match=r"query: expected \[B, d=7\] or \[B, Q, d=7\], got \[4, 3, 6\]"):
        fused(context, queries[:, :, :6])
    with pytest.raises(ValueError, match=r"query: expected \[B, d=7\], got \[4, 3, 7\]"):
        model(context, queries)


def test_fused_is_a_copy():
    model, prompts = random_model(), random_prompts()
    fused = model.compile_for_inference()
    before = fused(*prompts)
    with torch.no_grad():
        model.W_O.zero_()
    model.a.zero_()
    assert fused(*prompts).equal(before)


def test_fused_refuses():
    A, W, a = torch.zeros(3, 3), torch.zeros(5, 3), torch.zeros(5)
    with pytest.raises(ValueError, match=r"A: expected a square matrix \[d, d\], got \[3, 4\]"):
        FusedICLTransformer(torch.zeros(3, 4), W, a)
    with pytest.raises(ValueError, match=r"W: expected \[m, d=3\], got \[5, 4\]"):
        FusedICLTransformer(A, torch.zeros(5, 4), a)
    with pytest.raises(ValueError, match=r"a: expected \[m=5\], got \[4\]"):
        FusedICLTransformer(A, W, a[:4])
    with pytest.raises(TypeError, match=r"one dtype, got .*float64"):
        FusedICLTransformer(A, W, a.double())


@pytest.mark.parametrize("fused", [False, True], ids=["model", "fused"])
def test_pruned_modules_copy_pickle_and_convert(fused):
    module, (context, query) = random_model().prune_neurons_(0.25), random_prompts()
    module = module.compile_for_inference() if fused else module
    expected = module(context, query).detach()
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied(context, query).equal(expected)
        next(iter(copied.state_dict().values())).zero_()
        assert module(context, query).equal(expected)  # nothing shared
    single = copy.deepcopy(module).to(torch.float32)
    assert {tensor.dtype for tensor in single.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(single(context.float(), query.float()).double(), expected, atol=1e-5, rtol=1e-5)
    assert "m=9" in repr(module)


def test_state_dict_after_pruning():
    pruned, prompts = random_model().prune_neurons_(0.25), random_prompts()
    same_size, full_size = random_model(seed=5, m=9), random_model(seed=5)
    same_size.load_state_dict(pruned.state_dict())
    assert same_size(*prompts).equal(pruned(*prompts))
    with pytest.raises(RuntimeError, match="size mismatch for W_O"):
        full_size.load_state_dict(pruned.state_dict())


# Training


def test_recipe_trains_and_generalises(trained):
    """Unseen tasks in the domain, and patterns out of it; untrained, error is 1/2 and attention little above 0.4."""
    data, model, losses = trained
    assert len(losses) == 400
    assert losses[0] == pytest.approx(1.0, abs=0.05)
    untrained = evaluate(ICLTransformer(generator=rng()), data, n=2000, generator=rng(1))
    assert 0.3 < untrained.zero_one < 0.7
    assert untrained.hinge == pytest.approx(1.0, abs=0.02)
    assert untrained.attention < 0.6
    for patterns in (None, data.out_of_domain(3, 1.2, generator=rng(2))):
        result = evaluate(model, data, n=4000, patterns=patterns, generator=rng(3))
        assert result.zero_one <= 0.01
        assert result.hinge < 0.05
        assert result.attention > 0.9


def test_pruned_model_learns_on(trained):
    """Training after pruning repairs it: gradients reach the new parameter, and ``a`` fits it."""
    data, model, _ = trained
    model = copy.deepcopy(model).prune_neurons_(0.4)
    before = evaluate(model, data, n=2000, generator=rng())
    a = model.a.clone()
    train(model, data, steps=30, generator=rng(1))
    assert evaluate(model, data, n=2000, generator=rng()).hinge < 0.5 * before.hinge
    assert model.a.equal(a)


def test_training_reproduces_and_reports_progress():
    data, runs, calls = ICLData(**SMALL), [], []
    for _ in range(2):
        model = ICLTransformer(data.d_x, data.d_y, 16, generator=rng())
        losses = train(
            model,
            data,
            steps=3,
            batch=8,
            length=5,
            generator=rng(1),
            progress=lambda step, loss: calls.append((step, loss)),
        ).losses
        runs.append((losses, model.W_O.detach()))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1].equal(runs[1][1])
    assert calls == [*enumerate(runs[0][0], start=1)] * 2


def test_training_step_is_plain_sgd_on_the_training_tasks():
    data, lr = ICLData(**SMALL), 0.7
    model = ICLTransformer(data.d_x, data.d_y, 16, generator=rng())
    expected = copy.deepcopy(model)
    prompts = data.sample(8, 5, 0.9, tasks=data.training_tasks, generator=rng(1))
    F = expected(prompts.context, prompts.query)
    loss = (1 - prompts.target * F).clamp(min=0).mean()
    gradients = torch.autograd.grad(loss, list(expected.parameters()))
    losses = train(model, data, steps=1, batch=8, lr=lr, length=5, alpha=0.9, generator=rng(1)).losses
    assert losses == [loss.item()]
    for weight, start, gradient in zip(model.parameters(), expected.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight, start - lr * gradient)
    assert model.a.equal(expected.a)


@pytest.mark.parametrize(
    ("steps", "message"),
    [(1, "a weight is not finite after step 1 with lr=3e"), (20, r"the loss is nan at step \d+ with lr=3e")],
    ids=["last_update", "loss"],
)
def test_divergence_raises(steps, message):
    data = ICLData(**SMALL)
    model = ICLTransformer(data.d_x, data.d_y, 16, xi=100.0, generator=rng())  # gradients that overflow in one update
    with pytest.raises(FloatingPointError, match=f"training diverged: {message}"):
        train(model, data, steps=steps, batch=8, lr=3e38, generator=rng())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"batch": 0}, ValueError, "batch: expected at least 1, got 0"),
        ({"lr": -1.0}, ValueError, "lr: expected finite and positive, got -1.0"),
        ({"alpha": 2.0}, ValueError, "alpha: expected in"),
    ],
)
def test_training_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        train(ICLTransformer(), ICLData(), **arguments)


def test_hinge_loss():
    F, target = torch.tensor([0.5, 2.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, -1.0])
    assert hinge_loss(F, target).tolist() == [0.5, 0.0, 2.0, 1.0]


def test_evaluation_is_the_mean_over_its_prompts():
    """All three scores and their standard errors recomputed; n spans two chunks, the second of another size."""
    data, n = ICLData(**SMALL), 2500
    model = ICLTransformer(data.d_x, data.d_y, 16, xi=1.0, generator=rng())
    result = evaluate(model, data, n=n, length=6, alpha=0.7, generator=rng(1))
    generator = rng(1)
    chunks = [data.sample(b, 6, 0.7, tasks=data.unseen_tasks, generator=generator) for b in (2048, n - 2048)]
    with torch.no_grad():
        margin = torch.cat([p.target * model(p.context, p.query) for p in chunks]).double()
        attention = torch.cat([(model.attention(p.context, p.query) * p.same_pattern).sum(1) for p in chunks]).double()
    assert result.n == n
    for name, score in (
        ("hinge", (1 - margin).clamp(min=0)),
        ("zero_one", (margin <= 0).double()),
        ("attention", attention),
    ):
        assert getattr(result, name) == pytest.approx(score.mean().item(), abs=1e-6)
        assert getattr(result, f"{name}_se") == pytest.approx(score.std().item() / math.sqrt(n), abs=1e-6)
    assert 0.2 < result.zero_one < 0.8


def test_silence_counts_as_wrong():
    data = ICLData(**SMALL)
    silent = ICLTransformer(data.d_x, data.d_y, 8).prune_neurons_(1.0)
    result = evaluate(silent, data, n=10)
    assert (result.hinge, result.zero_one) == (1.0, 1.0)


def test_evaluation_refuses_one_prompt():
    with pytest.raises(ValueError, match="n: expected at least 2, got 1"):
        evaluate(ICLTransformer(), ICLData(), n=1)


def test_pruning_curve(trained):
    """The small neurons are free, the large ones are not, a random order costs more; the model stays."""
    data, model, _ = trained
    before = copy.deepcopy(model.state_dict())
    rates = [0.0, 0.1, 0.5, 1.0]
    patterns = data.out_of_domain(generator=rng())
    curve = pruning_curve(model, data, rates, n=2000, out_of_domain=patterns, generator=rng(1))
    order = torch.randperm(64, generator=rng(2))
    control = pruning_curve(model, data, rates, n=2000, out_of_domain=patterns, order=order, generator=rng(1))
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert [(p.rate, p.neurons) for p in curve] == [(0.0, 64), (0.1, 58), (0.5, 32), (1.0, 0)]
    assert curve[0] == control[0]  # the same prompts

    generator = rng(1)
    assert curve[0].in_domain == evaluate(model, data, n=2000, generator=generator)
    assert curve[0].out_of_domain == evaluate(model, data, n=2000, patterns=patterns, generator=generator)
    for domain in ("in_domain", "out_of_domain"):
        full, light, heavy, empty = (getattr(point, domain).hinge for point in curve)
        assert light - full < 0.005
        assert heavy - full > 0.15
        assert empty == 1.0
        assert getattr(control[1], domain).hinge > light + 0.005


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rates": [0.5, 1.5]}, r"rates: expected fractions in \[0, 1\], got 1.5"),
        ({"order": torch.zeros(64, dtype=torch.int64)}, r"order: expected an int64 permutation of 0..63"),
        ({"order": torch.arange(63)}, r"order: expected an int64 permutation of 0..63.*\[63\]"),
    ],
)
def test_pruning_curve_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pruning_curve(ICLTransformer(), ICLData(), **arguments)
