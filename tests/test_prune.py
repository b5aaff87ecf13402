"""``sparsify_``: exact counts whatever the ties, scores against naive float64, real architectures at toy size."""

from __future__ import annotations

import copy
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import BaseTunerLayer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from fasticl import scores
from fasticl.layers import find_mlps, fold_masks_
from fasticl.prune import Magnitude, NeuronActivation, Wanda, detect_pattern, sparsify_

N_OF_M = {"2:4": (2, 4), "4:8": (4, 8), "8:16": (8, 16)}


def linear(weight) -> nn.Linear:
    weight = torch.as_tensor(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def smallest(scores: np.ndarray, k: int) -> np.ndarray:
    """The specification: True at the k smallest of a vector; of equal scores the earlier ones stay."""
    mask = np.zeros(len(scores), bool)
    mask[sorted(range(len(scores)), key=lambda i: (scores[i], -i))[:k]] = True
    return mask


def mlp(hidden: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, hidden), nn.GELU(), nn.Dropout(0.5), nn.Linear(hidden, 6))


class Gated(nn.Module):
    def __init__(self, width: int = 6, hidden: int = 10, bias: bool = True):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, heads: int, kv_heads: int, size: int, **attributes):
        super().__init__()
        width = heads * size
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(width, kv_heads * size), nn.Linear(width, kv_heads * size)
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Magnitude(1.0), ValueError, r"sparsity in \[0, 1\), got 1.0"),
        (lambda: Wanda(-0.1), ValueError, r"sparsity in \[0, 1\), got -0.1"),
        (lambda: NeuronActivation(float("nan")), ValueError, r"sparsity in \[0, 1\), got nan"),
        (lambda: Magnitude("0.5"), TypeError, "sparsity to be a number, got str"),
        (lambda: Magnitude(True), TypeError, "sparsity to be a number, got bool"),
        (lambda: Magnitude(0.5, "1:2"), ValueError, "pattern to be one of unstructured, 2:4, .*head, got '1:2'"),
        (lambda: Wanda(0.5, "neuron"), ValueError, "pattern to be one of unstructured, 2:4, 4:8, 8:16, got 'neuron'"),
        (lambda: Magnitude(0.6, "2:4"), ValueError, "expected sparsity 0.5 with pattern 2:4, got 0.6"),
        (lambda: Wanda(0.25, "8:16"), ValueError, "expected sparsity 0.5 with pattern 8:16, got 0.25"),
        (lambda: Magnitude(0.5, scope="row"), ValueError, "scope 'layer' or 'global', got 'row'"),
        (lambda: Magnitude(0.5, "4:8", "global"), ValueError, "scope 'layer' with pattern '4:8'"),
    ],
)
def test_config_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Lonely(nn.Module):
    """``b`` is never called."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x)


def integer_linear() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(layer)


def half_shared_mlps() -> nn.Module:
    model = nn.Sequential(Gated(), Gated())
    model[1].up_proj.weight = model[0].up_proj.weight
    return model


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("model", "config", "calibration", "error", "message"),
    [
        (None, Magnitude(0.5), None, TypeError, "model to be a torch.nn.Module, got NoneType"),
        (nn.Linear(4, 4), 0.5, None, TypeError, "config to be .*NeuronActivation or RouterNorm, got float"),
        (nn.Linear(4, 4), Wanda(0.5), None, ValueError, "calibration batches for Wanda, got None"),
        (mlp(), NeuronActivation(0.5), None, ValueError, "calibration batches for NeuronActivation, got None"),
        (nn.Linear(4, 4), Wanda(0.5), X, TypeError, "iterable of batches for Wanda, such as a list, got Tensor"),
        (nn.Linear(4, 4), Wanda(0.5), {"x": X}, TypeError, "iterable of batches .* got dict"),
        (nn.Linear(4, 4), Wanda(0.5), 3, TypeError, "iterable of batches .* got int"),
        (
            nn.Linear(4, 4),
            Wanda(0.5),
            ["text"],
            TypeError,
            "each batch to be a tensor, tuple, list or mapping, got str",
        ),
        (nn.Linear(4, 4), Wanda(0.5), [], ValueError, "calibration that reaches this layer, got no token"),
        (nn.Linear(4, 4), Wanda(0.5), [X[:0]], ValueError, "calibration that reaches this layer, got no token"),
        (Lonely(), Wanda(0.5), [X], ValueError, "^b: expected calibration that reaches this layer"),
        (nn.Sequential(nn.Linear(4, 4)), Wanda(0.5), [X * torch.inf], ValueError, "^0: expected finite layer inputs"),
        (nn.ReLU(), Magnitude(0.5), None, ValueError, "at least one nn.Linear or Conv1D that filter_fn accepts"),
        (nn.Linear(4, 4), Magnitude(0.5, "neuron"), None, ValueError, "an MLP of a known layout .* got none in Linear"),
        (nn.Linear(4, 4), Magnitude(0.5, "head"), None, ValueError, "an attention module of a known layout"),
        (
            nn.ModuleDict({"up": linear(torch.ones(2, 6))}),
            Magnitude(0.5, "2:4"),
            None,
            ValueError,
            "^up: .*of 4, got K = 6",
        ),
        (
            nn.Sequential(linear([[1.0, torch.nan]])),
            Magnitude(0.5),
            None,
            ValueError,
            "^0: expected finite weights, got NaN",
        ),
        (nn.Sequential(linear([[1.0, -torch.inf]])), Wanda(0.5), [X], ValueError, "^0: expected finite weights"),
        (integer_linear(), Magnitude(0.5), None, TypeError, "^0: expected a floating-point weight, got torch.int8"),
        (nn.Sequential(nn.Linear(4, 4, device="meta")), Magnitude(0.5), None, ValueError, "^0: .*not materialised"),
        (nn.Sequential(nn.LazyLinear(4)), Magnitude(0.5), None, ValueError, "^0: .*not materialised"),
        (
            nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))),
            Magnitude(0.5),
            None,
            ValueError,
            "^0: expected a plain weight parameter, got one computed",
        ),
        (half_shared_mlps(), NeuronActivation(0.5), [X], ValueError, "^1.up_proj: .*share all its weights or none"),
    ],
)
def test_errors_change_nothing(model, config, calibration, error, message):
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=message):
        sparsify_(model, config, calibration)
    for name, value in before.items():
        if not (value.is_meta or nn.parameter.is_lazy(value)):
            assert torch.equal(value.nan_to_num(), model.state_dict()[name].nan_to_num())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_magnitude_is_exact_whatever_the_ties(data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=3))
    scope, block = data.draw(st.sampled_from(["layer", "global"])), data.draw(st.sampled_from([1, 20, 1 << 22]))
    sparsity = data.draw(st.floats(0, 0.999))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    weights = [rng.integers(1, 4, shape) * rng.choice([-0.25, 0.25], shape) for shape in shapes]
    model = nn.Sequential(*(linear(torch.tensor(w).to(dtype)) for w in weights))
    with mock.patch.object(scores, "_BLOCK", block):
        report = sparsify_(model, Magnitude(sparsity, scope=scope))
    flat = [np.abs(w).ravel() for w in weights]
    pools = [np.concatenate(flat)] if scope == "global" else flat
    expected = np.concatenate([smallest(pool, round(sparsity * len(pool))) for pool in pools])
    got = torch.cat([layer.weight.detach().flatten() for layer in model]).double().numpy()
    assert np.array_equal(got == 0, expected)
    assert np.array_equal(got[~expected], np.concatenate([w.ravel() for w in weights])[~expected])
    assert report.total == pytest.approx(expected.mean())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_n_of_m_and_rows_are_exact_whatever_the_ties(data):
    pattern = data.draw(st.sampled_from([*N_OF_M, "unstructured"]))
    n, m = N_OF_M.get(pattern, (None, 5))
    shape = data.draw(st.integers(1, 5)), m * data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    weight = rng.integers(1, 4, shape) * rng.choice([-1.0, 1.0], shape)
    sparsity = data.draw(st.floats(0, 0.999)) if n is None else 0.5
    ones = [torch.ones(3, shape[1])]  # every norm is equal, so Wanda's ties are Magnitude's
    layer = linear(torch.tensor(weight, dtype=torch.float32))
    config = Wanda(sparsity, pattern) if data.draw(st.booleans()) or n is None else Magnitude(sparsity, pattern)
    with mock.patch.object(scores, "_BLOCK", data.draw(st.sampled_from([1, 30, 1 << 22]))):
        sparsify_(layer, config, ones)
    groups = np.abs(weight).reshape(-1, shape[1] if n is None else m)
    count = round(sparsity * shape[1]) if n is None else m - n
    expected = np.stack([smallest(group, count) for group in groups]).reshape(shape)
    assert np.array_equal(layer.weight.detach().numpy() == 0, expected)


def test_float64_scores_stay_float64():
    weight = torch.ones(1, 4, dtype=torch.float64) + torch.tensor([3e-12, 1e-12, 2e-12, 0])
    layer = linear(weight)
    sparsify_(layer, Magnitude(0.5))
    assert layer.weight[0].ne(0).tolist() == [True, False, True, False]


def test_extreme_floats_order():
    weight = torch.tensor([[3e38, -1e-45, 65504.0, -1e-38, 0.0, -0.0, 1.0, -2.0]])  # denormals, largest, both zeros
    layer = linear(weight)
    sparsify_(layer, Magnitude(0.5))
    assert layer.weight.tolist() == [[*weight[0, [0]].tolist(), 0, 65504.0, 0, 0, 0, 1, -2]]


def test_what_was_pruned_goes_first():
    layer = linear(torch.randn(16, 16))
    sparsify_(layer, Magnitude(0.3))
    first = layer.weight == 0
    report = sparsify_(layer, Magnitude(0.5))
    assert bool((layer.weight[first] == 0).all())
    assert (report.layers[0].zeros_before, report.layers[0].zeros_after) == (round(0.3 * 256), 128)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77])
def test_agrees_with_torch_prune(sparsity):
    ours = nn.Sequential(nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 5))
    theirs, ours_global, theirs_global = copy.deepcopy(ours), copy.deepcopy(ours), copy.deepcopy(ours)
    sparsify_(ours, Magnitude(sparsity))
    sparsify_(ours_global, Magnitude(sparsity, scope="global"))
    for i in (0, 2):
        torch_prune.l1_unstructured(theirs[i], "weight", sparsity)
        assert torch.equal(ours[i].weight, theirs[i].weight)
    torch_prune.global_unstructured(
        [(theirs_global[0], "weight"), (theirs_global[2], "weight")], torch_prune.L1Unstructured, amount=sparsity
    )
    assert all(torch.equal(ours_global[i].weight, theirs_global[i].weight) for i in (0, 2))


def test_magnitude_neurons_agree_with_torch_prune():
    ours = mlp(hidden=16)
    theirs = copy.deepcopy(ours)
    torch_prune.ln_structured(theirs[0], "weight", amount=0.25, n=2, dim=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # only gated MLPs warn
        report = sparsify_(ours, Magnitude(0.25, "neuron"))
    gone = theirs[0].weight_mask[:, 0] == 0
    assert torch.equal(ours[0].weight, theirs[0].weight)
    assert torch.equal(ours[0].bias == 0, gone)
    assert torch.equal((ours[3].weight == 0).all(0), gone)
    assert bool((ours[3].bias != 0).all())
    assert [(row.name, row.shape, row.zeros_after) for row in report.layers] == [("0", (16, 6), 24), ("3", (6, 16), 24)]


def test_magnitude_neurons_globally():
    model = nn.Sequential(mlp(8), mlp(24))
    with torch.no_grad():
        model[0][0].weight.mul_(1e-3)
    sparsify_(model, Magnitude(0.25, "neuron", scope="global"))
    assert bool((model[0][0].weight == 0).all())
    assert bool((model[1][0].weight != 0).all())


def test_gated_mlps_warn_for_magnitude_neurons():
    with pytest.warns(UserWarning, match="gated MLPs.*NeuronActivation") as caught:
        sparsify_(Gated(), Magnitude(0.5, "neuron"))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_against_naive_float64(pattern):
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 7)).train()
    batches = [torch.randn(b, 3, 24) * torch.logspace(-2, 2, 24) for b in (1, 4, 2)]
    inputs = {0: torch.cat([x.reshape(-1, 24) for x in batches])}
    inputs[2] = torch.tanh(model[0](inputs[0])).detach()
    expected = {}
    for i, x in inputs.items():
        weight = model[i].weight.detach().double()
        scores = (weight.abs() * x.double().square().sum(0).sqrt()).numpy()
        groups = scores.reshape(-1, 4 if pattern == "2:4" else scores.shape[1])
        count = 2 if pattern == "2:4" else round(0.5 * scores.shape[1])
        mask = torch.from_numpy(np.stack([smallest(group, count) for group in groups]).reshape(scores.shape))
        expected[i] = weight.masked_fill(mask, 0).float()
    report = sparsify_(model, Wanda(0.5, pattern), iter(batches))
    for i in (0, 2):
        assert torch.equal(model[i].weight, expected[i])
    assert model.training
    assert {(row.pattern, row.score) for row in report.layers} == {(pattern, "Wanda")}


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)

    def forward(self, x, scale=1.0):
        return self.body(input=x * scale)


def test_batches_may_be_tensors_tuples_or_mappings():
    base, x = Keyword(), torch.randn(5, 8)
    pruned = []
    for batch in (x, (x,), [x, 1.0], {"x": x}):
        model = copy.deepcopy(base)
        sparsify_(model, Wanda(0.5), [batch])
        pruned.append(model.body.weight.detach())
    assert all(torch.equal(weight, pruned[0]) for weight in pruned[1:])
    assert bool(((pruned[0] == 0).sum(1) == 4).all())


def test_half_precision_inputs_accumulate_wide():
    model = nn.Linear(2, 1, bias=False).half()
    model.weight.data = torch.tensor([[1.0, 1.5]]).half()
    x = torch.tensor([[3e4, 2.5e4]]).half().expand(1000, 2)  # squares overflow float16; scores 3e4 against 3.75e4
    sparsify_(model, Wanda(0.5), [x])
    assert model.weight.tolist() == [[0, 1.5]]


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.frozen = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()

    def forward(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.frozen(self.first(x))
        raise RuntimeError("out of luck")


def test_a_failing_model_is_left_as_it_was():
    model = Failing()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of luck"):
        sparsify_(model, Wanda(0.5), [torch.randn(3, 4)])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert [m.training for m in (model, model.first, model.frozen, model.frozen[1])] == [True, True, False, False]
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_neuron_activation_score_and_removal():
    model = nn.Sequential(Gated(6, 20), nn.LayerNorm(6), Gated(6, 12)).eval()
    batches, x = [torch.randn(2, 5, 6), torch.randn(1, 3, 6)], torch.randn(4, 6)
    expected, hidden, hooks = [], {}, []
    for block in (model[0], model[2]):
        hooks.append(
            block.down_proj.register_forward_pre_hook(lambda m, a: hidden.setdefault(m, []).append(a[0].detach()))
        )
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    dense = copy.deepcopy(model)
    for i, sparsity in ((0, 0.3), (2, 0.3)):
        down = model[i].down_proj
        h = torch.cat([t.flatten(0, 1) for t in hidden[down]]).double()
        score = h.abs().mean(0) * down.weight.detach().double().norm(dim=0)
        expected.append(torch.from_numpy(smallest(score.numpy(), round(sparsity * len(score)))))
    sparsify_(model, NeuronActivation(0.3), batches)
    for block, kept, gone in zip((model[0], model[2]), (dense[0], dense[2]), expected, strict=True):
        for part in ("up_proj", "gate_proj"):
            assert torch.equal((getattr(block, part).weight == 0).all(1), gone)
            assert torch.equal(getattr(block, part).bias == 0, gone)
            assert torch.equal(getattr(block, part).weight[~gone], getattr(kept, part).weight[~gone])
        assert torch.equal((block.down_proj.weight == 0).all(0), gone)
        kept.down_proj.register_forward_pre_hook(lambda m, a, gone=gone: (a[0].masked_fill(gone, 0),))
    torch.testing.assert_close(model(x), dense(x))


def test_activation_of_shared_weights_is_over_all_that_they_see():
    """Two MLPs with the same weights: the second alone would keep other neurons than both together."""
    model = nn.Sequential(Gated(6, 20), nn.LayerNorm(6), Gated(6, 20)).eval()
    for part in ("up_proj", "gate_proj", "down_proj"):
        for name in ("weight", "bias"):
            setattr(getattr(model[2], part), name, getattr(getattr(model[0], part), name))
    batch, hidden = torch.randn(50, 6), []
    hooks = [
        block.down_proj.register_forward_pre_hook(lambda m, a: hidden.append(a[0].detach()))
        for block in (model[0], model[2])
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    norms = model[0].down_proj.weight.detach().double().norm(dim=0)
    gone = [
        torch.from_numpy(smallest((h.double().abs().mean(0) * norms).numpy(), 10))
        for h in (torch.cat(hidden), hidden[0], hidden[1])
    ]
    assert not gone[0].equal(gone[1])
    assert not gone[0].equal(gone[2])
    sparsify_(model, NeuronActivation(0.5), [batch])
    assert torch.equal((model[2].down_proj.weight == 0).all(0), gone[0])


def test_find_mlps_in_sequential_and_transformer_encoder():
    chain = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 1))
    assert [(m.name, m.up, m.down, m.gate) for m in find_mlps(chain)] == [
        ("", chain[0], chain[2], None),
        ("", chain[2], chain[5], None),
    ]
    assert find_mlps(nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1), nn.Linear(3, 1))) == []  # mixes neurons
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    assert [m.name for m in find_mlps(encoder)] == ["layers.0", "layers.1"]
    gated = Gated()
    assert find_mlps(gated)[0].linears == (gated.up_proj, gated.down_proj, gated.gate_proj)
    glu = nn.ModuleDict({"fc1": nn.Linear(4, 16), "fc2": nn.Linear(8, 4)})  # up makes its gate too
    assert find_mlps(glu) == []


def test_neurons_of_a_chain_are_chosen_on_the_dense_weights():
    chain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    gone = [torch.from_numpy(smallest(chain[i].weight.detach().norm(dim=1).numpy(), 4)) for i in (0, 2)]
    report = sparsify_(chain, Magnitude(0.5, "neuron"))
    assert torch.equal((chain[2].weight == 0), gone[1][:, None] | gone[0])
    assert [row.name for row in report.layers] == ["0", "2", "4"]


def test_calibration_reaches_the_linears_of_a_transformer_encoder():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    report = sparsify_(encoder, Wanda(0.5), [{"src": x, "src_key_padding_mask": padding}])
    assert [row.name for row in report.layers] == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert all(row.after == 0.5 for row in report.layers)
    assert bool((encoder.layers[0].self_attn.out_proj.weight != 0).all())


class TiedLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.out, self.lm_head = nn.Linear(8, 9, bias=False), nn.Linear(8, 9)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.b(torch.relu(self.a(self.embed(ids))) * torch.logspace(-3, 3, 8))
        return self.out(x) + self.lm_head(x)


def test_tied_weights_are_pruned_once_and_output_embeddings_not_at_all():
    model = TiedLM()
    ids = torch.arange(9)
    x_a = model.embed(ids).detach()
    x_b = (torch.relu(model.a(x_a)) * torch.logspace(-3, 3, 8)).detach()
    scores = model.a.weight.detach().abs() * torch.cat([x_a, x_b]).norm(dim=0)  # over what both uses multiply
    report = sparsify_(model, Wanda(0.5), [ids])
    assert [row.name for row in report.layers] == ["a"]
    assert model.a.weight is model.b.weight
    expected = np.stack([smallest(row.numpy(), 4) for row in scores])
    assert np.array_equal((model.a.weight == 0).numpy(), expected)
    assert bool((model.embed.weight != 0).all())
    assert bool((model.lm_head.weight != 0).all())


def test_filter_fn_decides():
    model, seen = TiedLM(), []

    def only_head(module, name):
        seen.append((type(module), name))
        return name == "lm_head"

    report = sparsify_(model, Magnitude(0.5), filter_fn=only_head)
    assert [row.name for row in report.layers] == ["lm_head"]
    assert seen == [(nn.Linear, name) for name in ("a", "b", "out", "lm_head")]
    model = nn.Sequential(mlp(), mlp())
    sparsify_(model, Magnitude(0.5, "neuron"), filter_fn=lambda module, name: name != "1.3")
    assert [detect_pattern(model[i][0].weight) for i in (0, 1)] == ["neuron rows", "dense"]


def test_tied_mlps_are_pruned_once():
    model = nn.Sequential(Gated(), Gated())
    for part in ("up_proj", "gate_proj", "down_proj"):
        getattr(model[1], part).weight = getattr(model[0], part).weight
    report = sparsify_(model, NeuronActivation(0.5), [torch.randn(4, 6)])
    assert [row.name for row in report.layers] == ["0.up_proj", "0.down_proj", "0.gate_proj"]
    assert report.total == 0.5


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_leave_with_their_group_only(kv_heads):
    model = Attention(4, kv_heads, 3, num_heads=4)
    for h, scale in enumerate((1.0, 2.0, 0.5, 0.1)):  # heads 2 and 3 go, together a group of two
        for weight in (model.q_proj.weight.data, model.o_proj.weight.data.t()):
            weight[3 * h : 3 * h + 3] *= scale
    for weight in (model.k_proj.weight.data, model.v_proj.weight.data):
        weight *= 0.01
    sparsify_(model, Magnitude(0.5, "head"))
    gone = torch.tensor([False, False, True, True]).repeat_interleave(3)
    shared = {1: [False], 2: [False, True], 4: [False, False, True, True]}[kv_heads]
    kv_gone = torch.tensor(shared).repeat_interleave(3)
    for layer, rows in ((model.q_proj, gone), (model.k_proj, kv_gone), (model.v_proj, kv_gone)):
        assert torch.equal((layer.weight == 0).all(1), rows)
        assert torch.equal(layer.bias == 0, rows)
        assert bool((layer.weight[~rows] != 0).all())
    assert torch.equal((model.o_proj.weight == 0).all(0), gone)
    assert bool((model.o_proj.bias != 0).all())


def test_head_score_is_the_norm_of_its_weights():
    model = Attention(6, 2, 4, n_heads=6)
    square = {name: getattr(model, name).weight.detach().double().square() for name in ("q_proj", "k_proj", "v_proj")}
    scores = [model.o_proj.weight.detach().double().square()[:, 4 * h : 4 * h + 4].sum() for h in range(6)]
    for h in range(6):
        scores[h] += square["q_proj"][4 * h : 4 * h + 4].sum()
        scores[h] += sum(square[name][4 * (h // 3) : 4 * (h // 3) + 4].sum() for name in ("k_proj", "v_proj"))
    sparsify_(model, Magnitude(0.5, "head"))
    gone = (model.o_proj.weight == 0).all(0)[::4].numpy()
    assert np.array_equal(gone, smallest(np.array(scores), 3))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (Attention(4, 4, 2), "^0: expected one of num_heads, .* on the module, its config or model.config, got none"),
        (Attention(4, 4, 2, num_heads=3), "^0: expected rows of q, k and v for 3 heads and an output of K = 8"),
        (Attention(4, 3, 2, num_heads=4), "^0: expected rows .* got 0.q_proj with 8 rows, 0.k_proj with 6 rows"),
        (
            nn.ModuleDict({"query_key_value": nn.Linear(8, 12), "dense": nn.Linear(8, 8)}),  # multi-query
            "^0: expected rows of q, k and v for 4 heads .* got 0.query_key_value with 12 rows",
        ),
        (
            nn.ModuleDict({"c_attn": nn.Linear(8, 24), "c_proj": nn.Linear(8, 8)}),
            "^0.c_attn: expected Conv1D, got nn.Linear",
        ),
    ],
)
def test_head_errors(attention, message):
    model = nn.Sequential(attention)
    if isinstance(attention, nn.ModuleDict):
        attention.num_heads = 4
    with pytest.raises(ValueError, match=message):
        sparsify_(model, Magnitude(0.5, "head"))


def tiny(architecture: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "max_position_embeddings": 32}
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes}
    if architecture == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=50, n_positions=32)
    elif architecture == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **llama)
    elif architecture == "qwen2":  # biases on q, k, v
        config = transformers.Qwen2Config(num_key_value_heads=2, **llama)
    elif architecture == "gpt_neox":
        config = transformers.GPTNeoXConfig(**llama)
    else:
        config = transformers.OPTConfig(
            hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16, **sizes
        )
    config.use_cache = False
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases start at zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


TINY = {  # architecture: linears a layer, (mlp, down), (attention output, its input's owner)
    "gpt2": (4, "transformer.h.{}.mlp", "c_proj", "transformer.h.{}.attn.c_proj"),
    "llama": (7, "model.layers.{}.mlp", "down_proj", "model.layers.{}.self_attn.o_proj"),
    "qwen2": (7, "model.layers.{}.mlp", "down_proj", "model.layers.{}.self_attn.o_proj"),
    "gpt_neox": (4, "gpt_neox.layers.{}.mlp", "dense_4h_to_h", "gpt_neox.layers.{}.attention.dense"),
    "opt": (6, "model.decoder.layers.{}", "fc2", "model.decoder.layers.{}.self_attn.out_proj"),
}


def matrix(layer: nn.Module) -> torch.Tensor:
    return layer.weight.detach().t() if type(layer).__name__ == "Conv1D" else layer.weight.detach()


@pytest.mark.parametrize("architecture", TINY)
def test_transformers_models(architecture):
    linears, mlp_path, down, output = TINY[architecture]
    model, ids = tiny(architecture), torch.randint(0, 50, (2, 7))
    assert [m.name for m in find_mlps(model)] == [mlp_path.format(i) for i in (0, 1)]
    dense, heads, neurons = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    embedding = model.get_input_embeddings().weight.detach().clone()

    report = sparsify_(model, Wanda(0.5), [{"input_ids": ids}])
    assert len(report.layers) == 2 * linears
    assert all(row.after == 0.5 for row in report.layers)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert bool((model.get_output_embeddings().weight != 0).all())

    # Removing neurons or heads is exactly silencing them: the dense model, its columns' inputs zeroed, says the same.
    for pruned, config, names in (
        (neurons, NeuronActivation(0.25), [f"{mlp_path.format(i)}.{down}" for i in (0, 1)]),
        (heads, Magnitude(0.5, "head"), [output.format(i) for i in (0, 1)]),
    ):
        report = sparsify_(pruned, config, [ids])
        silenced = copy.deepcopy(dense)
        for name in names:
            gone = (matrix(pruned.get_submodule(name)) == 0).all(0)
            assert gone.float().mean() == config.sparsity
            silenced.get_submodule(name).register_forward_pre_hook(lambda m, a, gone=gone: (a[0].masked_fill(gone, 0),))
        assert not torch.allclose(pruned(ids).logits, dense(ids).logits, atol=1e-4)
        torch.testing.assert_close(pruned(ids).logits, silenced(ids).logits)
        rows_or_columns = {detect_pattern(matrix(pruned.get_submodule(row.name))) for row in report.layers}
        assert rows_or_columns <= {"neuron rows", "neuron cols", "dense", "unstructured"}


def test_conv1d_is_pruned_by_output_row():
    model = tiny("gpt2")
    layer = model.transformer.h[0].mlp.c_fc  # weight [K, N] = [16, 64]
    assert tuple(layer.weight.shape) == (16, 64)
    report = sparsify_(model, Wanda(0.25), [torch.randint(0, 50, (1, 8))])
    assert bool(((layer.weight == 0).sum(0) == 4).all())
    row = next(row for row in report.layers if row.name == "transformer.h.0.mlp.c_fc")
    assert row.shape == (64, 16)
    sparsify_(model, Magnitude(0.5, "2:4"))
    assert detect_pattern(layer.weight.t()) == "2:4"
    assert bool(((layer.weight != 0).view(4, 4, 64).sum(1) <= 2).all())


def test_masks_are_folded():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    torch_prune.l1_unstructured(model[0], "weight", 0.25)
    torch_prune.random_unstructured(model[0], "weight", 0.5)  # a second mask on the first
    torch_prune.l1_unstructured(model[2], "bias", 0.5)
    x = torch.randn(3, 8)
    expected, parameter, masked = model(x), model[0].weight_orig, int((model[0].weight_mask == 0).sum())
    assert fold_masks_(model) == ["0.weight", "2.bias"]
    assert torch.equal(model(x), expected)
    assert model[0].weight is parameter
    assert list(model.state_dict()) == ["0.bias", "0.weight", "2.weight", "2.bias"]
    assert not model[0]._forward_pre_hooks
    assert fold_masks_(model) == []
    torch_prune.custom_from_mask(model[0], "weight", model[0].weight != 0)
    report = sparsify_(model, Magnitude(0.8))
    assert report.layers[0].zeros_before == masked
    assert report.layers[0].zeros_after == round(0.8 * 64)
    assert isinstance(model[0].weight, nn.Parameter)


def test_masks_of_torch_ao_are_folded():
    pruning = pytest.importorskip("torch.ao.pruning")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    sparsifier = pruning.WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    x = torch.randn(3, 8)
    expected = model(x)
    assert fold_masks_(model) == ["0.weight"]
    assert torch.equal(model(x), expected)
    assert (model[0].weight == 0).float().mean() == 0.5
    assert type(model[0]) is nn.Linear


def test_masks_on_shared_parameters():
    both = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    both[1].weight = both[0].weight
    same, unmasked = copy.deepcopy(both), copy.deepcopy(both)
    mask = torch.rand(4, 4) > 0.5
    for model, masks in ((both, (mask, ~mask)), (same, (mask, mask)), (unmasked, (mask,))):
        for layer, m in zip(model, masks, strict=False):
            torch_prune.custom_from_mask(layer, "weight", m)
    for model in (both, unmasked):
        with pytest.raises(ValueError, match=r"^0.weight_orig is masked, but 1.weight\w* shares the parameter"):
            fold_masks_(model)
    assert fold_masks_(same) == ["0.weight", "1.weight"]
    assert same[0].weight is same[1].weight
    assert torch.equal(same[0].weight != 0, mask)


def keep(*mask: str) -> torch.Tensor:
    return torch.tensor([[float(c) for c in row] for row in mask])


@pytest.mark.parametrize(
    ("weight", "pattern"),
    [
        (keep("1111", "1111"), "dense"),
        (torch.zeros(0, 4), "dense"),
        (keep("1111", "0000", "1111"), "neuron rows"),
        (keep("1011", "1011"), "neuron cols"),
        (keep("1011", "0000", "1011"), "neuron rows+cols"),
        (torch.zeros(2, 4), "neuron rows+cols"),
        (keep("1100", "0110", "1001"), "2:4"),
        (keep("1100", "0110", "0100", "0000"), "2:4"),  # some groups keep fewer, where a weight was zero already
        (keep("11000000", "00100000", "00000100", "10000000"), "unstructured"),  # 2:4 by chance: few non-zeros
        (keep("11110000", "01010101"), "4:8"),
        (keep("1111111100000000", "0101010101010101"), "8:16"),
        (keep("1111111110000000", "0101010101010101"), "unstructured"),
        (keep("110", "011"), "unstructured"),  # K = 3 fits no group
    ],
)
def test_detect_pattern(weight, pattern):
    assert detect_pattern(weight) == pattern


def test_detect_pattern_wants_a_matrix():
    with pytest.raises(ValueError, match=r"expected weight \[N, K\], got shape \(4,\)"):
        detect_pattern(torch.ones(4))


@pytest.mark.parametrize("pattern", N_OF_M)
def test_detect_pattern_finds_what_sparsify_made(pattern):
    layer = nn.Linear(64, 32)
    sparsify_(layer, Magnitude(0.5, pattern))
    assert detect_pattern(layer.weight) == pattern
    assert (layer.weight != 0).sum() == layer.weight.numel() // 2


def test_report_reads_as_a_table():
    model = nn.Sequential(linear(torch.ones(4, 8)), linear(torch.ones(2, 4)))
    model[0].weight.data[0] = 0
    report = sparsify_(model, Magnitude(0.5))
    assert str(report).splitlines() == [
        "layer  shape  before  after  pattern       score",
        "0        4x8   25.0%  50.0%  unstructured  Magnitude",
        "1        2x4    0.0%  50.0%  unstructured  Magnitude",
        "total          20.0%  50.0%",
    ]
    assert report.total == 0.5
    assert (report.layers[0].before, report.layers[0].after) == (0.25, 0.5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("config", [Magnitude(0.5), Magnitude(0.5, scope="global"), Magnitude(0.5, "2:4"), Wanda(0.5)])
def test_empty_layers_work(config):
    model = nn.Sequential(linear(torch.ones(3, 4)), linear(torch.zeros(0, 3)))
    if config.pattern == "2:4":
        model = nn.Sequential(linear(torch.ones(4, 4)), linear(torch.zeros(0, 4)))
    report = sparsify_(model, config, [torch.ones(2, 4)])
    assert report.layers[0].after == 0.5
    assert (report.layers[1].zeros_after, report.layers[1].after) == (0, 0.0)


def test_sparsity_counts_round_half_to_even():
    layer = linear(torch.arange(1.0, 6.0)[None])
    assert sparsify_(layer, Magnitude(0.5)).layers[0].zeros_after == round(2.5) == 2


def test_gradients_and_optimizers_keep_their_parameters():
    layer = nn.Linear(8, 8)
    parameter = layer.weight
    sparsify_(layer, Magnitude(0.5))
    assert layer.weight is parameter
    assert parameter.requires_grad
    assert parameter.is_leaf
    layer(torch.ones(1, 8)).sum().backward()
    assert parameter.grad is not None


def test_adapters_are_not_pruned():
    model = nn.Sequential(BaseTunerLayer(nn.Linear(8, 8)))
    with pytest.warns(UserWarning, match="call merge_and_unload"):
        report = sparsify_(model, Magnitude(0.5))
    assert [layer.name for layer in report.layers] == ["0.base_layer"]
    assert detect_pattern(model[0].lora_A["default"].weight) == "dense"
