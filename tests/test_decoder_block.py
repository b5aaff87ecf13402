"""decoder_block: Llama's and GPT-2's block against float64 and transformers' own, and what it leaves in the cache."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_close_to_truth, guarded
from linear_cases import ACTIVATIONS, DTYPES, activate
from torch import Tensor
from torch.nn import functional as F

from fasticl.ops import BlockWeights, decoder_block
from fasticl.ops.decoder_block import reference

# B sequences, width d, H heads, G of keys and values, head dimension D, L positions, m neurons
SHAPES = {
    "one_of_each": (1, 1, 1, 1, 1, 1, 1),
    "one_sequence": (1, 64, 4, 2, 16, 40, 96),
    "ragged": (3, 70, 6, 2, 10, 37, 52),
    "heads_that_share_one": (2, 36, 5, 1, 12, 9, 40),
    "more_heads_than_a_tile": (2, 24, 17, 1, 6, 33, 20),
    "equal_heads": (5, 48, 3, 3, 16, 20, 100),
    "heads_pruned": (2, 40, 3, 1, 20, 11, 9),  # H D is more than d
    "one_neuron": (2, 18, 2, 1, 6, 5, 1),
    "many_sequences": (19, 32, 4, 2, 8, 12, 40),
}
FORMS = ("llama", "gpt2", "all")
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Inputs(NamedTuple):
    """Arguments of the op."""

    x: Tensor
    weights: BlockWeights
    keys: Tensor
    values: Tensor
    positions: Tensor
    cos: Tensor | None
    sin: Tensor | None

    def flat(self) -> list[Any]:
        """As the registered operator takes them."""
        x, weights, *rest = self
        return [x, *rest, *vars(weights).values()]

    def clone(self) -> Inputs:
        return self._replace(keys=self.keys.clone(), values=self.values.clone())

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """``function`` of every floating-point tensor."""

        def one(t: Any) -> Any:
            return function(t) if isinstance(t, Tensor) and t.is_floating_point() else t

        weights = BlockWeights(**{name: one(t) for name, t in vars(self.weights).items()})
        return Inputs(one(self.x), weights, *map(one, self[2:]))


def make(
    shape: tuple[int, ...], form: str = "llama", dtype: torch.dtype = torch.float32, activation: str | None = None
) -> Inputs:
    """Tokens of random positions, 0 and the last among them; of the cache, what no token has seen yet is NaN.

    Forms: "llama"; "gpt2"; "all" has biases everywhere, a gate, LayerNorm, and angles for a part of each head.
    """
    B, d, H, G, D, L, m = shape
    gated, biased = form != "gpt2", form != "llama"

    def weight(*size: int) -> Tensor:
        return (torch.randn(size) / max(1, size[-1]) ** 0.5).to(dtype)

    def bias(size: int, there: bool = True) -> Tensor | None:
        return torch.randn(size).to(dtype) if biased and there else None

    heads = (H + 2 * G) * D
    weights = BlockWeights(
        norm=(1 + torch.randn(d) / 4).to(dtype), qkv=weight(heads, d), out=weight(d, H * D),
        mlp_norm=(1 + torch.randn(d) / 4).to(dtype), up=weight(m, d), down=weight(d, m),
        activation=activation or ("gelu_tanh" if form == "gpt2" else "silu"), eps=1e-5,
        gate=weight(m, d) if gated else None, norm_bias=bias(d), qkv_bias=bias(heads), out_bias=bias(d),
        mlp_norm_bias=bias(d), up_bias=bias(m), gate_bias=bias(m, gated), down_bias=bias(d), layer_norm=biased,
    )  # fmt: skip
    positions = torch.randint(0, L, (B,))
    positions[-1:], positions[:1] = 0, L - 1
    cache = torch.randn(2, B, G, L, D).to(dtype)
    for b, position in enumerate(positions.tolist()):
        cache[:, b, :, position:] = torch.nan
    half = {"llama": D // 2, "gpt2": 0, "all": D // 4}[form]
    angles = torch.randn(L, half)
    tables = (None, None) if form == "gpt2" else (angles.cos(), angles.sin())
    return Inputs(torch.randn(B, d).to(dtype), weights, *cache.unbind(), positions, *tables)


def pytorch(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own y and caches, sequence by sequence, in the dtype of x: of float64 arguments the truth."""
    x, w, keys, values, positions, cos, sin = inputs.clone()
    (B, d), (_, G, _, D) = x.shape, keys.shape

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if w.layer_norm:
            return F.layer_norm(x, (d,), weight, bias, w.eps)
        x = F.rms_norm(x, (d,), weight, w.eps)
        return x if bias is None else x + bias

    def turned(x: Tensor, t: int) -> Tensor:
        if cos is None:
            return x
        half = cos.shape[1]
        c, s = (torch.cat([table[t], table[t]]).to(x.dtype) for table in (cos, sin))
        head, rest = x[:, : 2 * half], x[:, 2 * half :]
        return torch.cat([head * c + torch.cat([-head[:, half:], head[:, :half]], 1) * s, rest], 1)

    contexts = []
    for b, t in enumerate(positions.tolist()):
        heads = F.linear(norm(x[b], w.norm, w.norm_bias), w.qkv, w.qkv_bias).view(-1, D)
        H = len(heads) - 2 * G
        keys[b, :, t], values[b, :, t] = turned(heads[H : H + G], t), heads[H + G :]
        q = turned(heads[:H], t).unsqueeze(1)
        seen = [cache[b, :, : t + 1].repeat_interleave(H // G, 0) for cache in (keys, values)]
        contexts.append(F.scaled_dot_product_attention(q, *seen).reshape(H * D))
    r = x + F.linear(torch.stack(contexts) if B else x.new_empty(0, w.out.shape[1]), w.out, w.out_bias)
    n = norm(r, w.mlp_norm, w.mlp_norm_bias)
    hidden = F.linear(n, w.up, w.up_bias)
    gate = None if w.gate is None else F.linear(n, w.gate, w.gate_bias)
    hidden = activate(hidden, w.activation) if gate is None else activate(gate, w.activation) * hidden
    return r + F.linear(hidden, w.down, w.down_bias), keys, values


def assert_right(function: Callable[[Inputs], Tensor], *cases: Inputs) -> None:
    """y, and the caches: what is written, and that nothing else is. All cases are judged together."""
    results = []
    for inputs in cases:
        truth, theirs, ours = pytorch(inputs.map(Tensor.double)), pytorch(inputs), inputs.clone()
        y = function(ours)
        assert y.is_contiguous()
        results.append([(y, truth[0], theirs[0])])
        every = torch.arange(len(inputs.x))
        for found, before, exact, pytorch_result in zip(ours[2:4], inputs[2:4], truth[1:], theirs[1:], strict=True):
            written = (every, slice(None), inputs.positions.long())
            results[-1].append((found[written], exact[written], pytorch_result[written]))
            found[written] = before[written] = 0
            assert torch.equal(found.nan_to_num(7), before.nan_to_num(7)), "another position was written"
    for parts in zip(*results, strict=True):
        assert_close_to_truth(*map(torch.cat, zip(*parts, strict=True)))


def several(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> list[Inputs]:
    """One, or of the smallest shape so many that PyTorch has not all right by chance."""
    return [make(shape, form, dtype) for _ in range(16 if shape == SHAPES["one_of_each"] else 1)]


def op(inputs: Inputs) -> Tensor:
    return decoder_block(*inputs)


def by_reference(inputs: Inputs) -> Tensor:
    return reference(*inputs.flat())


# ---- parity with the float64 truth -----------------------------------------------------------------------------------


@dtypes
@forms
@shapes
def test_parity(isa: str, shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    assert_right(op, *several(shape, form, dtype))


@dtypes
@forms
@shapes
def test_reference(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    assert_right(by_reference, *several(shape, form, dtype))


@forms
def test_float64_runs_the_reference(form: str) -> None:
    inputs = make(SHAPES["ragged"], form, torch.float64)
    expected, *caches = pytorch(inputs)
    torch.testing.assert_close(op(inputs), expected, rtol=1e-12, atol=1e-12)
    for found, cache in zip(inputs[2:4], caches, strict=True):
        torch.testing.assert_close(found, cache, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation: str | None) -> None:
    for form in FORMS:
        inputs = make(SHAPES["ragged"], form)
        weights = dataclasses.replace(inputs.weights, activation=activation)
        for function in (op, by_reference):
            assert_right(function, inputs._replace(weights=weights))


def test_both_norms_with_and_without_bias() -> None:
    for form in FORMS:
        inputs = make(SHAPES["ragged"], form)
        inputs = inputs._replace(x=100 + inputs.x)
        for changed in ({}, {"layer_norm": form == "llama"}, {"norm_bias": None, "mlp_norm_bias": None}):
            weights = dataclasses.replace(inputs.weights, **changed)
            for function in (op, by_reference):
                assert_right(function, inputs._replace(weights=weights))


def test_int32_positions() -> None:
    inputs = make(SHAPES["ragged"])
    assert_right(op, inputs._replace(positions=inputs.positions.int()))


# ---- several steps, pruned blocks ------------------------------------------------------------------------------------


@forms
def test_steps_are_one_causal_pass(form: str) -> None:
    """Each step sees what the steps before it wrote."""
    inputs = make((4, 40, 4, 2, 10, 9, 24), form)
    inputs.keys.fill_(torch.nan)
    inputs.values.fill_(torch.nan)
    tokens, clean = torch.randn(9, 4, 40), inputs.map(Tensor.double).clone()
    for t in range(9):
        now = {"x": tokens[t], "positions": torch.full((4,), t)}
        expected, keys, values = pytorch(clean._replace(**{**now, "x": tokens[t].double()}))
        clean = clean._replace(keys=keys, values=values)
        torch.testing.assert_close(op(inputs._replace(**now)).double(), expected, rtol=1e-4, atol=1e-4)


def test_removed_heads_and_neurons_are_as_if_zero() -> None:
    B, d, H, G, D, L, m = 2, 40, 6, 3, 8, 12, 30
    inputs = make((B, d, H, G, D, L, m), "llama")
    w = inputs.weights
    kept = torch.tensor([0, 1, 4, 5])  # heads; with the middle group their keys and values go
    groups = torch.tensor([0, 2])
    rows = (torch.cat([kept, H + groups, H + G + groups])[:, None] * D + torch.arange(D)).flatten()
    columns, neurons = (kept[:, None] * D + torch.arange(D)).flatten(), torch.arange(0, m, 3)
    smaller = BlockWeights(
        w.norm, w.qkv[rows], w.out[:, columns], w.mlp_norm, w.up[neurons], w.down[:, neurons], w.activation, w.eps,
        w.gate[neurons],
    )  # fmt: skip
    zeroed = dataclasses.replace(w, out=torch.zeros_like(w.out), down=torch.zeros_like(w.down))
    zeroed.out[:, columns], zeroed.down[:, neurons] = smaller.out, smaller.down
    small = inputs._replace(weights=smaller, keys=inputs.keys[:, groups], values=inputs.values[:, groups])
    torch.testing.assert_close(op(small), op(inputs._replace(weights=zeroed)))


def test_no_neurons_and_no_sequences() -> None:
    inputs = make((2, 18, 2, 1, 6, 5, 0), "all")
    assert_right(op, inputs)
    assert op(make((0, 18, 2, 1, 6, 5, 4))).shape == (0, 18)


# ---- strides, threads, memory ----------------------------------------------------------------------------------------


@forms
def test_strides(isa: str, form: str) -> None:
    inputs = make(SHAPES["ragged"], form)
    expected, kept = op(kept := inputs.clone()), kept
    strided = inputs.map(lambda t: torch.stack([t, t], -1)[..., 0])  # of x and weights; a cache must lie close
    B, G, L, D = inputs.keys.shape
    cache = torch.zeros(G, 2, B, L + 3, D)[:, :, :, 3:]  # by heads, keys beside values, with room before
    keys, values = cache.permute(1, 2, 0, 3, 4)
    keys.copy_(inputs.keys)
    values.copy_(inputs.values)
    tables = [None if t is None else t.contiguous() for t in strided[5:]]
    result = op(strided._replace(keys=keys, values=values, cos=tables[0], sin=tables[1]))
    assert torch.equal(result, expected)
    torch.testing.assert_close(keys, kept.keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, kept.values, rtol=0, atol=0, equal_nan=True)


def test_result_does_not_depend_on_threads(isa: str) -> None:
    inputs = make((3, 140, 6, 2, 20, 300, 260), "all")
    torch.set_num_threads(1)
    expected = op(inputs.clone())
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(op(inputs.clone()), expected)


@dtypes
@pytest.mark.parametrize("shift", [0, 1])
def test_between_guards(isa: str, shift: int, dtype: torch.dtype) -> None:
    checks = []

    def guard(t: Tensor) -> Tensor:
        copy, check = guarded(t, shift=shift)
        checks.append(check)
        return copy

    for form in FORMS:
        inputs = make(SHAPES["ragged"], form, dtype)
        assert torch.equal(op(inputs.map(guard)), op(inputs))
    for check in checks:
        check()


def test_a_nan_stays_in_its_sequence() -> None:
    for which in ("x", "keys", "values"):
        inputs = make(SHAPES["equal_heads"])
        getattr(inputs, which)[0].view(-1)[0] = torch.nan  # of a token at the last position
        assert op(inputs).isnan().any(1).tolist() == [True, False, False, False, False]


# ---- transformers ----------------------------------------------------------------------------------------------------


def randomized(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def llama() -> tuple[Any, BlockWeights, Callable[[Tensor], Tensor], tuple[Tensor, Tensor], tuple[int, int, int]]:
    """A layer, its weights, the layer on a whole text, tables of angles, and G, D, d."""
    transformers = pytest.importorskip("transformers", minversion="5")
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=36, intermediate_size=52, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    layer, rotary = randomized(LlamaDecoderLayer(config, 0)), LlamaRotaryEmbedding(config)
    attention, mlp = layer.self_attn, layer.mlp
    weights = BlockWeights(
        layer.input_layernorm.weight,
        torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
        attention.o_proj.weight, layer.post_attention_layernorm.weight, mlp.up_proj.weight, mlp.down_proj.weight,
        "silu", config.rms_norm_eps, mlp.gate_proj.weight,
    )  # fmt: skip

    def whole(x: Tensor) -> Tensor:
        n = x.shape[1]
        mask = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        angles = rotary(x, torch.arange(n)[None])
        return copy.deepcopy(layer).to(x.dtype)(x, attention_mask=mask, position_embeddings=angles)

    cos, sin = (table[0, :, :5].contiguous() for table in rotary(torch.empty(0), torch.arange(16)[None]))
    return layer, weights, whole, (cos, sin), (2, 10, 36)


def gpt2() -> tuple[Any, BlockWeights, Callable[[Tensor], Tensor], tuple[None, None], tuple[int, int, int]]:
    transformers = pytest.importorskip("transformers", minversion="5")
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    layer = randomized(GPT2Block(transformers.GPT2Config(n_embd=36, n_head=3, attn_implementation="eager"), 0))
    attention, mlp = layer.attn, layer.mlp
    weights = BlockWeights(
        layer.ln_1.weight, attention.c_attn.weight.T, attention.c_proj.weight.T, layer.ln_2.weight, mlp.c_fc.weight.T,
        mlp.c_proj.weight.T, "gelu_tanh", layer.ln_1.eps, None, layer.ln_1.bias, attention.c_attn.bias,
        attention.c_proj.bias, layer.ln_2.bias, mlp.c_fc.bias, None, mlp.c_proj.bias, layer_norm=True,
    )  # fmt: skip

    def whole(x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        out = copy.deepcopy(layer).to(x.dtype)(x, attention_mask=mask)
        return out[0] if isinstance(out, tuple) else out

    return layer, weights, whole, (None, None), (3, 12, 36)


@pytest.mark.parametrize("model", [llama, gpt2])
@torch.no_grad()
def test_is_the_block_of_transformers(model: Callable[[], Any]) -> None:
    """A text token by token, against the layer on all of it."""
    _, weights, whole, tables, (G, D, d) = model()
    x, cache = torch.randn(3, 16, d), torch.full((2, 3, G, 16, D), torch.nan)
    expected = whole(x.double())
    found = [decoder_block(x[:, t], weights, *cache, torch.full((3,), t), *tables) for t in range(16)]
    assert_close_to_truth(torch.stack(found, 1), expected, whole(x))


# ---- autograd, compilers ---------------------------------------------------------------------------------------------


def test_a_gradient_is_refused() -> None:
    inputs = make(SHAPES["ragged"])
    x = inputs.x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"expected torch.no_grad\(\) or no tensor that requires grad"):
        op(inputs._replace(x=x))
    with torch.no_grad():
        assert torch.equal(op(inputs._replace(x=x)), op(inputs))


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck(form: str, dtype: torch.dtype) -> None:
    inputs = make(SHAPES["ragged"], form, dtype)
    inputs.keys.nan_to_num_(0)  # NaN is no equal of itself
    inputs.values.nan_to_num_(0)
    torch.library.opcheck(torch.ops.fasticl.decoder_block.default, inputs.flat())


@forms
def test_compiles_to_one_graph(form: str) -> None:
    torch.compiler.reset()
    inputs = make(SHAPES["ragged"], form)
    weights = inputs.weights

    def function(x: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
        y = decoder_block(2 * x, weights, keys, values, *rest)
        return y + keys[:, 0, 0, :1]  # the cache is read after it was written

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found, expected = inputs.clone(), inputs.clone()
        x, _, *rest = expected
        y = function(x, *rest)
        x, _, *rest = found
        torch.testing.assert_close(compiled(x, *rest), y, rtol=0, atol=0, equal_nan=True)
        for cache in ("keys", "values"):
            pair = getattr(found, cache), getattr(expected, cache)
            torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)
        inputs = make(SHAPES["ragged"], form)._replace(weights=weights)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [-1, 37])
def test_a_position_out_of_range_writes_nothing(position: int) -> None:
    for function in (op, by_reference):
        inputs = make(SHAPES["ragged"])
        inputs.positions[1] = position
        before = inputs.clone()
        with pytest.raises(ValueError, match=rf"positions: expected in \[0, 37\), got {position}"):
            function(inputs)
        torch.testing.assert_close(inputs.keys, before.keys, rtol=0, atol=0, equal_nan=True)


def test_errors_name_expected_and_got() -> None:
    inputs = make(SHAPES["ragged"], "all")  # B 3, d 70, H 6, G 2, D 10, L 37, m 52
    x, w, keys, values, positions, cos, sin = inputs
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "weights: expected BlockWeights, got dict", {"weights": vars(w)}),
        (TypeError, "x: expected a torch.Tensor, got int", {"x": 1}),
        (TypeError, "x: expected dtype torch.float32, got torch.float16", {"x": x.half()}),
        (ValueError, r"x: expected shape \[B, 70\], got \[3, 69\]", {"x": x[:, 1:]}),
        (ValueError, r"x: expected shape \[B, 70\], got \[3, 1, 70\]", {"x": x[:, None]}),
        (ValueError, "x: expected on cpu .*, got meta", {"x": x.to("meta")}),
        (TypeError, "keys: expected dtype torch.float32, got torch.bfloat16", {"keys": keys.bfloat16()}),
        (ValueError, r"keys: expected shape \[3, G, L, D\], got \[2, 2, 37, 10\]", {"keys": keys[:2]}),
        (ValueError, r"values: expected shape \[3, 2, 37, 10\], got \[3, 2, 36, 10\]", {"values": values[:, :, :-1]}),
        (ValueError, "values: expected on cpu .*, got meta", {"values": values.to("meta")}),
        (ValueError, "keys: expected G, L and D of at least 1, got",
         {"keys": keys[:, :, :0], "values": values[:, :, :0]}),
        (ValueError, r"keys: expected the last two dimensions contiguous, got strides \(740, 10, 20, 1\)",
         {"keys": keys.transpose(1, 2).contiguous().transpose(1, 2)}),
        (ValueError, "values: expected the last two dimensions contiguous", {"values": values.mT.contiguous().mT}),
        (ValueError, r"out: expected shape \[d, H D\] with D = 9 .* G = 2, as in the cache, got \[70, 60\]",
         {"keys": keys[..., :9].contiguous(), "values": values[..., :9].contiguous()}),
        (ValueError, r"out: expected shape \[d, H D\] with D = 10 and H a multiple of G = 4",
         {"keys": keys.repeat(1, 2, 1, 1), "values": keys.repeat(1, 2, 1, 1)}),
        (ValueError, r"qkv: expected shape \[80, 70\], got \[100, 70\]",
         {"keys": keys[:, :1], "values": values[:, 1:]}),
        (TypeError, "positions: expected dtype torch.int64, got torch.float32", {"positions": positions.float()}),
        (TypeError, "positions: expected a torch.Tensor, got list", {"positions": [0, 1, 2]}),
        (ValueError, r"positions: expected shape \[3\], got \[1\]", {"positions": positions[:1]}),
        (ValueError, "cos and sin: expected both or neither, got one", {"sin": None}),
        (TypeError, "cos: expected dtype torch.float32, got torch.float64", {"cos": cos.double()}),
        (ValueError, r"cos: expected shape \[37, R / 2\], got \[36, 2\]", {"cos": cos[1:]}),
        (ValueError, r"cos: expected at most 5 columns \(D / 2\), got 6", {"cos": cos.repeat(1, 3)}),
        (ValueError, r"sin: expected shape \[37, 2\], got \[37, 1\]", {"sin": sin[:, :1]}),
    ]  # fmt: skip
    for error, message, changed in cases:
        with pytest.raises(error, match=f"decoder_block: {message}"):
            op(inputs._replace(**changed))


def test_errors_of_weights_name_expected_and_got() -> None:
    w = make(SHAPES["ragged"], "all").weights
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "norm: expected a floating-point dtype, got torch.int64", {"norm": w.norm.long()}),
        (ValueError, r"norm: expected shape \[d\], got \[1, 70\]", {"norm": w.norm[None]}),
        (TypeError, "qkv: expected a torch.Tensor, got NoneType", {"qkv": None}),
        (ValueError, r"qkv: expected shape \[\(H \+ 2 G\) D, 70\], got \[100, 69\]", {"qkv": w.qkv[:, 1:]}),
        (ValueError, r"out: expected shape \[70, H D\], got \[69, 60\]", {"out": w.out[1:]}),
        (ValueError, r"mlp_norm: expected shape \[70\], got \[69\]", {"mlp_norm": w.mlp_norm[1:]}),
        (TypeError, "mlp_norm: expected a torch.Tensor, got NoneType", {"mlp_norm": None}),
        (TypeError, "down: expected a torch.Tensor, got NoneType", {"down": None}),
        (ValueError, r"up: expected shape \[m, 70\], got \[52, 69\]", {"up": w.up[:, 1:]}),
        (ValueError, r"down: expected shape \[70, 52\], got \[70, 51\]", {"down": w.down[:, 1:]}),
        (ValueError, r"gate: expected shape \[52, 70\], got \[51, 70\]", {"gate": w.gate[1:]}),
        (TypeError, "gate: expected dtype torch.float32, got torch.float16", {"gate": w.gate.half()}),
        (ValueError, "down: expected on cpu .*, got meta", {"down": w.down.to("meta")}),
        (ValueError, "gate_bias: expected None without a gate, got a tensor", {"gate": None}),
        (ValueError, "activation: expected one of None, .*got 'swiglu'", {"activation": "swiglu"}),
    ]
    sizes = {"norm": 70, "qkv": 100, "out": 70, "mlp_norm": 70, "up": 52, "gate": 52, "down": 70}
    for name, size in sizes.items():
        message = rf"{name}_bias: expected shape \[{size}\], got \[3\]"
        cases.append((ValueError, message, {f"{name}_bias": torch.zeros(3)}))
    for error, message, changed in cases:
        with pytest.raises(error, match=message):
            dataclasses.replace(w, **changed)
