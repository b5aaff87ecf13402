"""SparseGPT: equal to slow float64 arithmetic, better than what only chooses, exact in count, block by block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasticl import reconstruct as R
from fasticl.calibration import input_means, run
from fasticl.layers import default_filter, find_blocks, find_layers
from fasticl.prune import Magnitude, SparseGPT, Wanda, detect_pattern, sparsify_
from fasticl.scores import N_OF_M


def correlated(tokens: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs that depend on each other, of sizes from 1 to 100."""
    sizes = torch.logspace(0, 2, inputs)[torch.randperm(inputs)]
    return (torch.randn(tokens, inputs) @ torch.randn(inputs, inputs) / inputs * sizes).to(dtype)


def pruned(weight: Tensor, x: Tensor, config: Any) -> Tensor:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    sparsify_(layer, config, [x])
    return layer.weight.detach()


def naive(weight: Tensor, x: Tensor, sparsity: float, n_of_m: tuple[int, int] | None, damping: float) -> Tensor:
    """Optimal brain surgeon, one column after the other: the inverse is taken anew of what is left of H."""
    W = weight.double().clone()
    K = W.shape[1]
    H = x.double().T @ x.double() / len(x)
    H += damping * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    inverses = [H[k:, k:].inverse() for k in range(K)]
    denominators = torch.stack([inverse[0, 0] for inverse in inverses])
    gone = torch.zeros_like(W, dtype=torch.bool)

    def cheapest(begin: int, end: int, count: int, factors: Tensor) -> Tensor:
        costs = (W[:, begin:end] ** 2 * factors[begin:end]).T.flatten()
        mask = torch.zeros_like(costs, dtype=torch.bool)
        mask[costs.argsort(stable=True)[:count]] = True
        return mask.view(end - begin, -1).T

    at_first = cheapest(0, K, round(sparsity * W.numel()), H.diagonal())
    for k in range(K):
        if n_of_m is None and k % R.COLUMNS == 0:
            end = min(k + R.COLUMNS, K)
            gone[:, k:end] = cheapest(k, end, int(at_first[:, k:end].sum()), 1 / denominators)
        elif n_of_m is not None and k % n_of_m[1] == 0:
            n, m = n_of_m
            for row in range(len(W)):
                costs = W[row, k : k + m] ** 2 / denominators[k : k + m]
                gone[row, k + costs.argsort()[: m - n]] = True
        for row in range(len(W)):
            if gone[row, k]:
                W[row, k:] -= W[row, k] * inverses[k][0] / inverses[k][0, 0]
                W[row, k] = 0.0
    return W


@pytest.mark.parametrize("pattern", ["unstructured", *N_OF_M])
@pytest.mark.parametrize("tokens", [200, 20])  # of 48 inputs: a full H, and one of low rank
def test_equals_one_column_after_the_other(pattern: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(R, "COLUMNS", 16)
    weight, x = torch.randn(7, 48, dtype=torch.float64), correlated(tokens, 48, torch.float64)
    expected = naive(weight, x, 0.5, N_OF_M.get(pattern), 0.01)
    found = pruned(weight, x, SparseGPT(0.5, pattern))
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert int((found == 0).sum()) == 7 * 24


@pytest.mark.parametrize("columns", [1, 48, 200])
def test_ragged_blocks(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(R, "COLUMNS", columns)
    weight, x = torch.randn(5, 50, dtype=torch.float64), correlated(90, 50, torch.float64)
    found = pruned(weight, x, SparseGPT(0.37, damping=0.1))
    torch.testing.assert_close(found, naive(weight, x, 0.37, None, 0.1), rtol=1e-7, atol=1e-9)
    assert int((found == 0).sum()) == round(0.37 * 250)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pattern", ["unstructured", *N_OF_M])
def test_outputs_stay_nearer_than_by_choice_alone(pattern: str, dtype: torch.dtype) -> None:
    weight, x = torch.randn(96, 256, dtype=dtype), correlated(1000, 256, dtype)

    def error(found: Tensor) -> float:
        return ((found.double() - weight.double()) @ x.double().T).norm().item()

    before = weight.clone()
    ours, wanda, magnitude = (pruned(weight, x, c(0.5, pattern)) for c in (SparseGPT, Wanda, Magnitude))
    assert torch.equal(weight, before)
    assert error(ours) < 0.95 * error(wanda)
    assert error(ours) < 0.95 * error(magnitude)
    assert ours.dtype == dtype
    assert int((ours == 0).sum()) == ours.numel() // 2
    assert detect_pattern(ours) == pattern


def test_zeros_stay_and_count() -> None:
    weight, x = torch.randn(16, 64), correlated(300, 64)
    weight[:, 5] = 0
    weight[3, 10:40] = 0
    found = pruned(weight, x, SparseGPT(0.5))
    assert bool((found[weight == 0] == 0).all())
    assert int((found == 0).sum()) == 512
    again = pruned(found, x, SparseGPT(0.25))
    assert torch.equal(again, found)
    groups = pruned(found, x, SparseGPT(0.5, "2:4"))
    assert bool((groups[found == 0] == 0).all())
    assert bool((groups.view(-1, 4) != 0).sum(1).le(2).all())


def test_dead_inputs_move_nothing() -> None:
    weight, x = torch.randn(16, 64), correlated(300, 64)
    x[:, :32] = 0
    found = pruned(weight, x, SparseGPT(0.25))
    dead, live = (found[:, :32] == 0), (found[:, 32:] == 0)
    assert int(dead.sum() + live.sum()) == 256
    assert dead.sum() > 2 * live.sum()
    assert torch.equal(found[:, :32][~dead], weight[:, :32][~dead])
    torch.testing.assert_close(
        found[:, 32:], pruned(weight[:, 32:], x[:, 32:], SparseGPT(int(live.sum()) / 512, damping=0.005))
    )
    nothing = pruned(weight, torch.zeros(3, 64), SparseGPT(0.5))
    assert torch.equal(nothing, pruned(weight, x, Magnitude(0.5)))


@pytest.mark.parametrize("sparsity", [0.0, 0.999])
def test_extreme_sparsities(sparsity: float) -> None:
    weight, x = torch.randn(16, 64), correlated(300, 64)
    found = pruned(weight, x, SparseGPT(sparsity))
    assert int((found == 0).sum()) == round(sparsity * 1024)
    if sparsity == 0:
        assert torch.equal(found, weight)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SparseGPT(1.0), ValueError, r"sparsity in \[0, 1\), got 1.0"),
        (lambda: SparseGPT(0.5, "head"), ValueError, "pattern to be one of unstructured, 2:4, 4:8, 8:16, got 'head'"),
        (lambda: SparseGPT(0.6, "2:4"), ValueError, "expected sparsity 0.5 with pattern 2:4, got 0.6"),
        (lambda: SparseGPT(0.5, damping=0), ValueError, "expected damping > 0, got 0"),
        (lambda: SparseGPT(0.5, allocation="even"), ValueError, "allocation 'uniform' or 'sensitivity', got 'even'"),
        (lambda: Wanda(0.5, "2:4", "sensitivity"), ValueError, "'uniform' with pattern '2:4', .* got 'sensitivity'"),
        (lambda: SparseGPT(0.5, damping=float("nan")), ValueError, "expected damping > 0, got nan"),
    ],
)
def test_refused_configs(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_refused_models() -> None:
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match="calibration batches for SparseGPT, got None"):
        sparsify_(nn.Linear(4, 4), SparseGPT(0.5))
    with pytest.raises(ValueError, match=r"^0: expected finite layer inputs on the calibration, got NaN or inf"):
        sparsify_(nn.Sequential(nn.Linear(4, 4)), SparseGPT(0.5), [x * torch.nan])
    with pytest.raises(ValueError, match=r"^1: .* a multiple of 4, got K = 6"):
        sparsify_(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), SparseGPT(0.5, "2:4"), [x])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^0: expected calibration that reaches this layer"):
        sparsify_(model, SparseGPT(0.5), [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    few = correlated(3, 64)
    with pytest.raises(ValueError, match=r"^0: expected more damping, or more calibration tokens: "):
        sparsify_(nn.Sequential(nn.Linear(64, 4)), SparseGPT(0.5, damping=1e-30), [few])
    model = nn.Sequential(Guarded(), Guarded())
    with pytest.raises(ValueError, match=r"^1\.linear: expected finite layer inputs"):
        sparsify_(model, SparseGPT(0.5), [x])


class Guarded(nn.Module):
    """Says inf once it has been pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if bool(self.linear.weight.all()) else self.linear(x) * torch.inf


# --- block by block ---------------------------------------------------------------------------------------------------


def tiny(architecture: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if architecture == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=4, vocab_size=50, n_positions=32)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=50, max_position_embeddings=32,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@torch.no_grad()
def slowly(model: nn.Module, batches: list[Any], config: SparseGPT) -> None:
    """The whole model is run anew for each block."""
    layers = find_layers(model, default_filter(model))
    for block in find_blocks(model, layers):
        own = [layer for layer in layers if layer.module in set(block.modules())]
        grams = input_means(model, own, lambda: run(model, batches), lambda x: x.t() @ x)
        for layer in own:
            n_of_m = N_OF_M.get(config.pattern)
            layer.weight.copy_(R.reconstruct(layer.weight, grams[layer.key], config.sparsity, n_of_m, config.damping))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("cache", [True, False])
def test_blocks_are_those_of_the_whole_model(architecture: str, pattern: str, cache: bool) -> None:
    model = tiny(architecture)
    ids = torch.randint(0, 50, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    batches = [{"input_ids": ids[:2], "attention_mask": mask[:2], "use_cache": cache}, {"input_ids": ids[2:]}]
    expected, steps = copy.deepcopy(model), []
    slowly(expected, batches, SparseGPT(0.5, pattern))
    report = sparsify_(model, SparseGPT(0.5, pattern), iter(batches), advance=lambda: steps.append(None))
    assert len(steps) == 3
    assert len(report.layers) == 3 * (7 if architecture == "llama" else 4)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-9)
    for row in report.layers:
        assert row.zeros_after == row.shape[0] * row.shape[1] // 2
        assert (row.pattern, row.score) == (pattern, "SparseGPT")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_models_of_each_dtype_say_nearly_what_they_said(dtype: torch.dtype) -> None:
    model, ids = tiny("llama", dtype), torch.randint(0, 50, (32, 24))
    batches = [{"input_ids": ids}]
    with torch.no_grad():
        before = model(ids).logits.double()
        errors = []
        for config in (SparseGPT(0.5), Magnitude(0.5)):
            some = copy.deepcopy(model)
            report = sparsify_(some, config, batches)
            assert report.total == pytest.approx(0.5, abs=1e-3)
            errors.append((some(ids).logits.double() - before).norm().item())
    assert errors[0] < errors[1]


class Branching(nn.Module):
    """Its blocks read the same input: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return sum(block(x) for block in self.blocks)


def test_blocks_that_are_no_chain_are_pruned_together() -> None:
    model, x = Branching(), correlated(100, 16, torch.float64)
    weights = [block.weight.detach().clone() for block in model.blocks]
    sparsify_(model, SparseGPT(0.5), [x])
    for block, weight in zip(model.blocks, weights, strict=True):
        torch.testing.assert_close(block.weight.detach(), pruned(weight, x, SparseGPT(0.5)))


def test_shared_weights_are_pruned_once_by_all_that_they_see() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False, dtype=torch.float64) for _ in range(3)))
    model[2].weight = model[0].weight
    x = correlated(100, 16, torch.float64)
    first, second = (model[i].weight.detach().clone() for i in (0, 1))
    report = sparsify_(model, SparseGPT(0.5), [x])
    assert [row.name for row in report.layers] == ["0", "1"]
    middle = pruned(second, x @ first.T, SparseGPT(0.5))  # a block of its own, before the shared ones
    torch.testing.assert_close(model[1].weight.detach(), middle)
    seen = torch.cat([x, x @ first.T @ middle.T])
    torch.testing.assert_close(model[0].weight.detach(), pruned(first, seen, SparseGPT(0.5)))
    assert model[2].weight is model[0].weight


def test_layers_outside_the_blocks_come_last() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = (nn.Linear(16, 16, dtype=torch.float64) for _ in range(2))
            self.blocks = nn.Sequential(*(nn.Linear(16, 16, dtype=torch.float64) for _ in range(2)))

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.blocks(self.before(x)))

    model, x = Model(), correlated(100, 16, torch.float64)
    dense = copy.deepcopy(model)
    assert find_blocks(model, find_layers(model, default_filter(model))) == list(model.blocks)
    report = sparsify_(model, SparseGPT(0.5), [x])
    assert report.total == 0.5
    torch.testing.assert_close(
        model.blocks[0].weight, pruned(dense.blocks[0].weight.detach(), dense.before(x).detach(), SparseGPT(0.5))
    )
    after = model.blocks(dense.before(x)).detach()
    torch.testing.assert_close(model.after.weight, pruned(dense.after.weight.detach(), after, SparseGPT(0.5)))
