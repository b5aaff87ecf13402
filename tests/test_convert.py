"""convert and explain: which layers change, that answers do not, and that the report says why."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import BaseTunerLayer, assert_close_to_truth
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fasticl
from fasticl.layers import find_mlps
from fasticl.nn import SparseLinear, SparseMLP
from fasticl.timing import Timing

transformers = pytest.importorskip("transformers")
convert_module = importlib.import_module("fasticl.convert")  # fasticl.convert is the function

Gain = Callable[[str, int], float]


class Clock:
    """Stands in for the timing: ``gain(contender, tokens)`` times as fast as dense. Calls every contender once."""

    def __init__(self) -> None:
        self.gain: Gain = lambda contender, tokens: 2.0
        self.timed: list[tuple[tuple[str, ...], int, int]] = []  # contenders, copies, tokens

    def __call__(self, contenders: Mapping[str, Sequence[partial]], **_: object) -> dict[str, Timing]:
        timings = {}
        for name, calls in contenders.items():
            for call in calls:
                call()
            tokens = calls[0].args[0].shape[0]
            ms = 1.0 if name == "dense" else 1 / self.gain(name, tokens)
            timings[name] = Timing(ms, ms, ms, 1, 1)
        self.timed.append((tuple(contenders), len(calls), tokens))
        return timings


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    torch.set_num_threads(1)
    clock = Clock()
    monkeypatch.setattr(convert_module, "interleaved", clock)
    return clock


@pytest.mark.parametrize(
    ("at_1", "at_128", "packed"),
    [
        (1.5, 0.97, True),  # a loss within the noise of timing, outweighed
        (1.5, 0.9, False),  # a loss
        (2.1, 0.76, True),  # a loss that the gain is worth
        (4.0, 0.74, False),  # a loss that no gain is worth
        (1.01, 0.97, False),  # slower in the mean
    ],
)
def test_a_loss_within_the_noise_must_be_outweighed(clock: Clock, at_1: float, at_128: float, packed: bool) -> None:
    clock.gain = lambda contender, tokens: at_1 if tokens == 1 else at_128
    model = nn.Sequential(nn.Linear(64, 48))
    fasticl.sparsify_(model, fasticl.Magnitude(0.5))
    assert bool(fasticl.convert(model, format="bitmap").converted) == packed


@pytest.mark.parametrize(("gain", "times"), [(3.0, 1), (1.1, 2), (0.9, 2), (0.3, 1)])
def test_what_is_near_the_border_is_timed_again(clock: Clock, gain: float, times: int) -> None:
    clock.gain = lambda contender, tokens: gain
    model = nn.Sequential(nn.Linear(64, 48))
    fasticl.sparsify_(model, fasticl.Magnitude(0.5))
    fasticl.convert(model, format="bitmap", tokens=(4,))
    assert len(clock.timed) == times


def make_llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=96, tie_word_embeddings=True,
        )
    )  # fmt: skip


def make_gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def make_opt() -> nn.Module:
    config = transformers.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                                    vocab_size=96, max_position_embeddings=64, word_embed_proj_dim=32)  # fmt: skip
    return transformers.OPTForCausalLM(config)


def make_gpt_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, vocab_size=96)  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


FAMILIES = {  # and the linears and MLPs of one of their two layers
    "llama": (make_llama, 7, 1),
    "gpt2": (make_gpt2, 4, 1),
    "opt": (make_opt, 6, 0),  # its fc1 and fc2 stand beside the attention
    "gpt_neox": (make_gpt_neox, 4, 1),
}


def zero_half_(model: nn.Module) -> None:
    """Half of each linear's weights, at random."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) or hasattr(module, "nf"):
                module.weight.view(-1)[torch.randperm(module.weight.numel())[::2]] = 0


def pruned_linear(k: int, n: int, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(k, n, bias)
    zero_half_(linear)
    return linear


def kernels(report: fasticl.ConversionReport) -> dict[str, str]:
    return {layer.name: layer.kernel for layer in report.layers}


def reasons(report: fasticl.ConversionReport) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.layers}


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = model(x)
    return y if isinstance(y, Tensor) else y.logits


# Models of transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_answer_the_same(family: str, dtype: torch.dtype) -> None:
    make, linears, mlps = FAMILIES[family]
    model = make().eval()
    zero_half_(model)
    model.to(dtype)
    ids = torch.randint(0, 96, (2, 7))
    truth, expected = answer(copy.deepcopy(model).double(), ids), answer(model, ids)
    report = fasticl.convert(model)
    assert report.model is model
    assert len(report.converted) == 2 * linears
    assert len(report.fused_mlps) == 2 * mlps
    assert sum(isinstance(module, SparseMLP) for module in model.modules()) == 2 * mlps
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 2 * linears
    assert_close_to_truth(answer(model, ids), truth, expected)


def test_generation_is_the_same() -> None:
    model = make_llama().eval()
    zero_half_(model)
    prompt = torch.randint(1, 96, (1, 5))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **settings)
    fasticl.convert(model)
    assert torch.equal(model.generate(prompt, **settings), expected)


@pytest.mark.parametrize("skip", [("lm_head",), ()])
def test_tied_head(skip: tuple[str, ...]) -> None:
    model = make_llama().eval()
    zero_half_(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.randint(0, 96, (2, 7))
    embedding, expected = model.model.embed_tokens.weight.detach().clone(), answer(model, ids)
    report = fasticl.convert(model, skip=skip)
    assert kernels(report)["lm_head"] == ("dense" if skip else "bitmap")
    assert not skip or reasons(report)["lm_head"] == "skipped by name"
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(answer(model, ids), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_dead_neurons_are_removed(family: str) -> None:
    model = FAMILIES[family][0]().eval()
    with torch.no_grad():
        for mlp in find_mlps(model):
            rows = mlp.down.weight.T if isinstance(mlp.down, nn.Linear) else mlp.down.weight
            rows[::3] = 0  # one entry, or row, a hidden neuron
    ids = torch.randint(0, 96, (2, 7))
    expected = answer(model, ids)
    report = fasticl.convert(model)
    mlps = [module for module in model.modules() if isinstance(module, SparseMLP)]
    hidden = mlps[0].up.out_features + (report.mlps[0].shape[0] + 2) // 3
    assert len(mlps) == 2
    assert hidden == report.mlps[0].shape[0]
    assert f"{(hidden + 2) // 3} of {hidden} neurons removed; 2.00x at 1, 2.00x at 128 tokens" == report.mlps[0].reason
    inside = [layer for layer in report.layers if layer.reason.startswith("neurons removed; ")]
    assert {layer.reason for layer in inside} == {"neurons removed; no zeros"}
    assert len(inside) == sum(len(list(mlp.children())) for mlp in mlps)
    torch.testing.assert_close(answer(model, ids), expected)


def test_a_weight_that_lost_neurons_is_packed_too() -> None:
    model = nn.Sequential(pruned_linear(32, 64), nn.ReLU(), pruned_linear(64, 32)).eval()
    with torch.no_grad():
        model[2].weight[:, :20] = 0
    x = torch.randn(5, 32)
    expected = answer(model, x)
    report = fasticl.convert(model)
    assert isinstance(report.model, SparseMLP)  # the model itself was the MLP
    assert report.model.up.out_features == 44
    assert kernels(report) == {"up": "bitmap", "down": "bitmap"}
    assert reasons(report)["up"] == "neurons removed; 2.00x at 1, 2.00x at 128 tokens"
    torch.testing.assert_close(answer(report.model, x), expected)


@pytest.mark.parametrize("format", ["auto", "compact"])
def test_parts_of_an_mlp_are_never_compact(format: str) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        model[2].weight[:, :20] = 0  # dead neurons
        model[0].weight[:, ::2] = 0  # and inputs that nobody reads
    x = torch.randn(5, 32)
    expected = answer(model, x)
    report = fasticl.convert(model, format=format)
    assert kernels(report)["up"] == ("dense" if format == "compact" else "bitmap")
    torch.testing.assert_close(answer(report.model, x), expected)


# Int8 values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_models_answer_nearly_the_same(family: str, dtype: torch.dtype) -> None:
    """Right is the same model with its weights rounded, layer by layer, to what int8 values hold."""
    make, linears, mlps = FAMILIES[family]
    model = make().eval()
    zero_half_(model)
    model.to(dtype)
    rounded, ids = copy.deepcopy(model).double(), torch.randint(0, 96, (2, 7))
    report = fasticl.convert(model, values="int8")
    assert len(report.converted) == 2 * linears
    assert set(kernels(report).values()) == {"bitmap int8", "dense"}
    assert len(report.fused_mlps) == 2 * mlps
    layers = {name: layer for name, layer in rounded.named_modules() if dict(kernels(report)).get(name) != "dense"}
    with torch.no_grad():
        for name, layer in layers.items():
            if isinstance(layer, nn.Linear) or hasattr(layer, "nf"):
                weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
                packed = fasticl.pack(weight.to(dtype), "bitmap", values="int8")
                assert name == "lm_head" or (weight - packed.unpack()).abs().max() > 0
                weight.copy_(packed.unpack_values().double() * packed.scales.double()[:, None])
    head = rounded.get_output_embeddings()
    head.weight = nn.Parameter(model.get_output_embeddings().weight.detach().double())
    rounded.get_input_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.detach().double())
    truth = answer(rounded, ids)
    assert_close_to_truth(answer(model, ids), truth, answer(copy.deepcopy(rounded).to(dtype), ids), factor=4.0)


@pytest.mark.parametrize("format", ["auto", "dense"])
def test_linears_without_zeros_become_dense_int8(clock: Clock, format: str) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64), nn.LayerNorm(64), pruned_linear(64, 96))
    x = torch.randn(5, 64)
    expected = answer(model, x)
    clock.gain = lambda contender, tokens: {"dense int8": 2.0}.get(contender, 3.0)
    report = fasticl.convert(model, values="int8", format=format)
    zeros = "dense int8" if format == "dense" else "bitmap int8"
    assert kernels(report) == {"0": "dense int8", "2": "dense int8", "4": zeros}
    assert [module.values.dtype for module in model.modules() if isinstance(module, SparseLinear)] == [torch.int8] * 3
    assert (answer(model, x) - expected).abs().max() < 0.05 * expected.abs().max()
    assert kernels(fasticl.convert(model, values="int8")) == kernels(report)  # already packed
    assert "2.00x" in reasons(report)["0"]


def test_int8_is_measured_too(clock: Clock) -> None:
    clock.gain = lambda contender, tokens: 0.5
    model = nn.Sequential(nn.Linear(64, 48), pruned_linear(48, 64))
    report = fasticl.convert(model, values="int8")
    assert kernels(report) == {"0": "dense", "1": "dense"}
    assert reasons(report)["0"] == "dense int8 would be 0.50x at 1, 0.50x at 128 tokens"


def test_int8_parts_beside_dead_neurons() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        model[2].weight[:, :20] = 0
    x = torch.randn(5, 32)
    expected = answer(model, x)
    report = fasticl.convert(model, values="int8")
    assert kernels(report) == {"up": "dense int8", "down": "dense int8"}
    assert report.model.up.out_features == 44
    assert (answer(report.model, x) - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_tied_head_in_int8() -> None:
    model = make_llama().eval()
    embedding = model.model.embed_tokens.weight.detach().clone()
    report = fasticl.convert(model, values="int8", skip=())
    assert kernels(report)["lm_head"] == "dense int8"
    assert model.lm_head.values.dtype == torch.int8
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.equal(model.lm_head.packed.unpack(), fasticl.pack(embedding, "dense", values="int8").unpack())


# Which modules


class Custom(nn.Module):
    """An MLP of the usual names that does a little more."""

    def __init__(self, extra: str = "nothing", activation: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = pruned_linear(32, 64), pruned_linear(64, 32)
        self.act = activation or nn.GELU()
        self.extra = extra
        if extra == "scale":
            self.scale = nn.Parameter(torch.tensor(1.0))  # a parameter, whatever its value is now
        if extra == "norm":
            self.norm = nn.LayerNorm(32)
        self.seen: list[torch.Size] = []
        if extra in ("hook", "inner hook"):
            watched = self if extra == "hook" else self.act
            watched.register_forward_hook(lambda module, inputs, output: self.seen.append(output.shape))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(self.act(self.fc1(x)))
        if self.extra == "residual":
            return x + y
        if self.extra == "clamp":
            return y.clamp(-20, 20)
        if self.extra == "scale":
            return y * self.scale
        if self.extra == "norm":
            return self.norm(y)
        if self.extra == "mixes tokens":
            return y.cumsum(-2)
        if self.extra == "mixes sequences":
            return y + y.mean(0)
        if self.extra == "twice":
            return self.fc2(self.act(self.fc1(y)))
        if self.extra == "tuple":
            return y, None
        return y


class WithArguments(Custom):
    def forward(self, x: Tensor, offset: float = 0.0) -> Tensor:
        return super().forward(x) + offset


@pytest.mark.parametrize(
    "extra", ["residual", "clamp", "scale", "norm", "mixes tokens", "mixes sequences", "twice", "hook", "inner hook"]
)
def test_what_is_more_than_an_mlp_is_not_fused(extra: str) -> None:
    model = nn.Sequential(Custom(extra)).eval()
    x = torch.randn(2, 5, 32)
    expected = answer(model, x)
    report = fasticl.convert(model)
    assert kernels(report) == {"0.fc1": "bitmap", "0.fc2": "bitmap"}
    assert report.fused_mlps == []
    assert isinstance(model[0], Custom)
    torch.testing.assert_close(answer(model, x), expected)
    assert len(model[0].seen) == (2 if "hook" in extra else 0), "a hook was lost, or called by convert"


@pytest.mark.parametrize(
    "module",
    [WithArguments(), Custom("tuple"), Custom(activation=nn.Tanh()), Custom(activation=nn.ReLU6())],
    ids=["arguments", "tuple", "tanh", "relu6"],
)
def test_what_no_op_computes_is_not_fused(module: nn.Module) -> None:
    assert fasticl.convert(nn.Sequential(module)).fused_mlps == []


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(), "silu")],
)
def test_the_activation_is_recognised(activation: nn.Module, name: str) -> None:
    tiny = Custom(activation=activation)
    with torch.no_grad():
        tiny.fc1.weight.mul_(1e-3)  # where all activations look alike
    model = nn.Sequential(tiny, Custom(activation=activation)).bfloat16()
    report = fasticl.convert(model)
    assert report.fused_mlps == ["0", "1"]
    assert [mlp.activation for mlp in model] == [name, name]


def test_dropout_is_left_out() -> None:
    model = nn.Sequential(nn.Sequential(pruned_linear(32, 64), nn.ReLU(), nn.Dropout(0.5), pruned_linear(64, 32)))
    model.train()
    assert fasticl.convert(model).fused_mlps == ["0"]
    assert model[0].training
    x = torch.randn(2, 32)
    assert torch.equal(model(x), model.eval()(x))


def test_sequential_of_more_is_packed_not_fused() -> None:
    model = nn.Sequential(pruned_linear(32, 64), nn.ReLU(), pruned_linear(64, 64), nn.ReLU(), pruned_linear(64, 8))
    x = torch.randn(2, 32)
    expected = answer(model, x)
    report = fasticl.convert(model)
    assert set(kernels(report).values()) == {"bitmap"}
    assert report.fused_mlps == []
    torch.testing.assert_close(answer(model, x), expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_transformer_layers_stay(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, dropout=0.0)
    zero_half_(layer)
    model = nn.Sequential(layer, pruned_linear(32, 16)).eval()
    x = torch.randn(2, 5, 32)
    expected = answer(model, x)
    with torch.enable_grad():
        slow = model(x)
    report = fasticl.convert(model)
    assert kernels(report) == {
        "0.self_attn.out_proj": "dense",
        "0.linear1": "dense",
        "0.linear2": "dense",
        "1": "bitmap",
    }
    assert reasons(report)["0.self_attn.out_proj"] == "MultiheadAttention reads its weight without calling it"
    assert reasons(report)["0.linear1"] == "TransformerEncoderLayer reads its weight without calling it"
    torch.testing.assert_close(answer(model, x), expected)
    torch.testing.assert_close(model(x), slow)


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"wi": pruned_linear(32, 32)})
        self.wo, self.free = pruned_linear(32, 32), pruned_linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.wo(x.to(self.wo.weight.dtype)))


class Derived(ReadsWeight):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("kind", [ReadsWeight, Derived])
def test_layers_whose_weight_is_read_stay(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind())
    x = torch.randn(2, 32)
    expected = answer(model, x)
    report = fasticl.convert(model)
    assert kernels(report) == {"0.inner.wi": "bitmap", "0.wo": "dense", "0.free": "bitmap"}
    assert reasons(report)["0.wo"] == f"{kind.__name__} reads its weight without calling it"
    torch.testing.assert_close(answer(model, x), expected)


def test_hooks_stay_and_run() -> None:
    model = nn.Sequential(pruned_linear(32, 32), pruned_linear(32, 32), pruned_linear(32, 32))
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append("hook"))
    model[1].forward = lambda x: seen.append("own forward") or nn.Linear.forward(model[1], x)
    report = fasticl.convert(model)
    assert list(kernels(report).values()) == ["dense", "dense", "bitmap"]
    assert reasons(report)["0"] == reasons(report)["1"] == "has hooks, or a forward of its own"
    assert not seen, "convert called a layer that it may not replace"
    model(torch.randn(2, 32))
    assert seen == ["hook", "own forward"]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_subclasses_that_compute_something_else_stay() -> None:
    inner = Doubled(32, 64)
    zero_half_(inner)
    mlp = nn.Sequential(inner, nn.ReLU(), pruned_linear(64, 32))
    with torch.no_grad():
        mlp[2].weight[:, :9] = 0
    model = nn.Sequential(mlp)
    x = torch.randn(2, 32)
    expected = answer(model, x)
    report = fasticl.convert(model)
    assert reasons(report)["0.0"] == "Doubled may compute more than a linear"
    assert kernels(report)["0.2"] == "bitmap"
    assert report.fused_mlps == []
    torch.testing.assert_close(answer(model, x), expected)


def test_shared_modules_are_replaced_wherever_they_stand() -> None:
    shared = pruned_linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, nn.Tanh()))
    model.again = shared
    x = torch.randn(2, 32)
    expected = answer(model, x)
    report = fasticl.convert(model)
    assert list(kernels(report)) == ["0"]
    assert isinstance(model[0], SparseLinear)
    assert model[0] is model[2][0] is model.again
    torch.testing.assert_close(answer(model, x), expected)


def test_a_shared_mlp_is_fused_wherever_it_stands() -> None:
    mlp = Custom()
    model = nn.ModuleList([mlp, nn.ModuleList([mlp])])
    assert fasticl.convert(model).fused_mlps == ["0"]
    assert isinstance(model[0], SparseMLP)
    assert model[0] is model[1][0]


def test_a_lone_linear() -> None:
    linear = pruned_linear(32, 16)
    report = fasticl.convert(linear)
    assert isinstance(report.model, SparseLinear)
    assert torch.equal(report.model.packed.unpack(), linear.weight)
    assert "(model)" in str(report)


@pytest.mark.parametrize(("skip", "left"), [(("b",), {"a.b"}), (("a.b",), {"a.b"}), (("a",), {"a.b", "a.c"}),
                                            (("b.a", "x"), set())])  # fmt: skip
def test_skip_takes_names_and_last_components(skip: tuple[str, ...], left: set[str]) -> None:
    inner = nn.ModuleDict({"b": pruned_linear(32, 32), "c": pruned_linear(32, 32)})
    report = fasticl.convert(nn.ModuleDict({"a": inner, "d": pruned_linear(32, 32)}), skip=skip)
    assert {name for name, kernel in kernels(report).items() if kernel == "dense"} == left


def test_a_skipped_part_keeps_its_mlp() -> None:
    model = nn.Sequential(Custom())
    report = fasticl.convert(model, skip=("fc2",))
    assert kernels(report) == {"0.fc1": "bitmap", "0.fc2": "dense"}
    assert isinstance(model[0], Custom)
    assert isinstance(model[0].fc2, nn.Linear)


def test_weights_that_cannot_be_packed_stay() -> None:
    quantized = nn.Linear(8, 8)
    quantized.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    model = nn.ModuleList([quantized, nn.Linear(8, 8, device="meta"), nn.LazyLinear(8), nn.Linear(8, 8)])
    report = fasticl.convert(model)
    assert reasons(report) == {"0": "dtype torch.int8 has no kernel", "3": "no zeros"}  # others hold no data


# Masks


def masked_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16), nn.Linear(16, 16)).eval()
    prune.l1_unstructured(model[0], "weight", 0.6)
    prune.random_unstructured(model[2], "weight", 0.5)
    prune.random_unstructured(model[2], "bias", 0.5)
    prune.ln_structured(model[3], "weight", 0.5, n=2, dim=0)
    return model


def test_masks_are_folded() -> None:
    model = masked_model()
    x = torch.randn(3, 32)
    expected = answer(model, x)
    report = fasticl.convert(model)
    assert kernels(report) == {"0": "bitmap", "2": "bitmap", "3": "compact"}
    assert model[0].values.numel() == model[0].packed.unpack().count_nonzero()  # no -0.0 among them
    assert not any(name.endswith(("_mask", "_orig")) for name in model.state_dict())
    torch.testing.assert_close(answer(model, x), expected)


def test_masked_mlps_are_fused() -> None:
    model = nn.Sequential(Custom(), nn.Linear(32, 32))
    for linear in (model[0].fc1, model[0].fc2):
        prune.random_unstructured(linear, "weight", 0.5)
    x = torch.randn(3, 32)
    expected = answer(model, x)
    planned = fasticl.explain(model)
    report = fasticl.convert(model)
    assert str(report) == planned
    assert report.fused_mlps == ["0"]
    torch.testing.assert_close(answer(model, x), expected)


def test_a_mask_shared_with_an_unmasked_module_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    prune.random_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="untie them"):
        fasticl.convert(model)


def test_other_parametrizations_are_taken_as_they_are() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = nn.Sequential(pruned_linear(32, 32))
    parametrize.register_parametrization(model[0], "weight", Halved())
    x = torch.randn(2, 32)
    expected = answer(model, x)
    assert kernels(fasticl.convert(model)) == {"0": "bitmap"}
    torch.testing.assert_close(answer(model, x), expected)


# What is measured, and what it decides


def test_zero_converts_all_with_zeros_and_a_huge_one_none(clock: Clock) -> None:
    clock.gain = lambda contender, tokens: 0.01
    nearly_dense = nn.Linear(64, 64)
    with torch.no_grad():
        nearly_dense.weight[0, 0] = 0
    model = nn.Sequential(Custom(), nn.Linear(32, 64), nearly_dense)
    before = [type(module) for module in model.modules()]
    for impossible in (1e9, float("inf")):
        report = fasticl.convert(model, min_speedup=impossible)
        assert report.converted == []
        assert report.fused_mlps == []
        assert [type(module) for module in model.modules()] == before
    assert reasons(report)["2"] == "hardly any zeros"
    assert reasons(report)["0.fc1"] == "bitmap would be 0.01x at 1, 0.01x at 128 tokens"
    assert report.layers[0].speedup == pytest.approx({1: 0.01, 128: 0.01})
    report = fasticl.convert(model, min_speedup=0)
    assert kernels(report) == {"0.fc1": "bitmap", "0.fc2": "bitmap", "1": "dense", "2": "bitmap"}
    assert report.fused_mlps == ["0"]


def test_a_loss_at_one_number_of_tokens_keeps_dense(clock: Clock) -> None:
    clock.gain = lambda contender, tokens: {1: 5.0, 16: 0.7, 64: 5.0}[tokens]
    model = nn.Sequential(pruned_linear(32, 32))
    report = fasticl.convert(model, tokens=(1, 16, 64))
    assert kernels(report) == {"0": "dense"}
    assert reasons(report)["0"] == "bitmap would be 5.00x at 1, 0.70x at 16, 5.00x at 64 tokens"
    assert isinstance(model[0], nn.Linear)
    assert kernels(fasticl.convert(model, tokens=(1, 64))) == {"0": "bitmap"}


@pytest.mark.parametrize("faster", ["bitmap", "sliced"])
def test_the_faster_format_is_chosen(clock: Clock, faster: str) -> None:
    clock.gain = lambda contender, tokens: 3.0 if contender == faster else 2.0
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(64, 64) < 0.1)
    report = fasticl.convert(model)
    assert kernels(report) == {"0": faster}
    assert model[0].format == faster
    assert report.layers[0].ms_sparse == pytest.approx({1: 1 / 3, 128: 1 / 3})
    assert report.layers[0].ms_dense == {1: 1.0, 128: 1.0}


def test_a_format_that_loses_somewhere_is_passed_over(clock: Clock) -> None:
    clock.gain = lambda contender, tokens: {"sliced": {1: 50.0, 128: 0.5}, "bitmap": {1: 2.0, 128: 1.1}}[contender][
        tokens
    ]
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(64, 64) < 0.1)
    assert kernels(fasticl.convert(model)) == {"0": "bitmap"}


def test_a_slow_fused_op_leaves_the_packed_parts(clock: Clock) -> None:
    clock.gain = lambda contender, tokens: 0.5 if contender == "fused_mlp" else 2.0
    model = nn.Sequential(Custom())
    x = torch.randn(2, 32)
    expected = answer(model, x)
    report = fasticl.convert(model)
    assert kernels(report) == {"0.fc1": "bitmap", "0.fc2": "bitmap"}
    assert [(mlp.name, mlp.kernel, mlp.reason) for mlp in report.mlps] == [
        ("0", "unfused", "one op would be 0.50x at 1, 0.50x at 128 tokens")
    ]
    assert isinstance(model[0], Custom)
    torch.testing.assert_close(answer(model, x), expected)


def test_dead_neurons_stay_where_removing_them_is_slower(clock: Clock) -> None:
    clock.gain = lambda contender, tokens: 0.5
    model = nn.Sequential(Custom())
    with torch.no_grad():
        model[0].fc2.weight[:, :16] = 0
    report = fasticl.convert(model)
    assert report.mlps[0].reason == "16 of 64 neurons are dead; one op would be 0.50x at 1, 0.50x at 128 tokens"
    assert isinstance(model[0], Custom)


def test_layers_alike_are_timed_together(clock: Clock) -> None:
    small, large = [pruned_linear(64, 64) for _ in range(20)], [pruned_linear(64, 96) for _ in range(3)]
    fasticl.convert(nn.ModuleList([*small, *large]))
    # As many copies as fill the memory that the model's 392 KiB take; eight where 128 tokens share a weight's reading.
    kinds = ("dense", "bitmap")
    assert clock.timed == [(kinds, 24, 1), (kinds, 8, 128), (kinds, 16, 1), (kinds, 8, 128)]


def test_large_layers_are_copied_less(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "COLD_BYTES", 3 * 64 * 64 * 4 + 1)
    fasticl.convert(nn.ModuleList(pruned_linear(64, 64) for _ in range(5)), tokens=(2,))
    assert clock.timed == [(("dense", "bitmap"), 3, 2)]
    clock.timed.clear()
    monkeypatch.setattr(convert_module, "COLD_BYTES", 1)
    fasticl.convert(nn.ModuleList(pruned_linear(64, 64) for _ in range(5)), tokens=(2,))
    assert clock.timed == [(("dense", "bitmap"), 1, 2)]


def test_the_clock_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(convert_module, "SECONDS", 0.01)
    model = nn.Sequential(nn.Linear(1024, 1024))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(1024, 1024) < 0.02)
    report = fasticl.convert(model, tokens=(1,))
    layer = report.layers[0]
    assert layer.ms_dense.keys() == layer.ms_sparse.keys() == {1}
    assert layer.ms_sparse[1] < layer.ms_dense[1]  # a fiftieth of the weights
    assert isinstance(model[0], SparseLinear)


@pytest.mark.parametrize("format", ["bitmap", "sliced"])
def test_a_format_that_was_asked_for(format: str) -> None:
    model = nn.Sequential(Custom(), pruned_linear(32, 32))
    x = torch.randn(2, 32)
    expected = answer(model, x)
    report = fasticl.convert(model, format=format)
    assert set(kernels(report).values()) == {format}
    torch.testing.assert_close(answer(model, x), expected)


def test_layers_that_do_not_fit_the_format_say_so() -> None:
    model = nn.ModuleList(nn.Linear(64, 16) for _ in range(12))
    with torch.no_grad():
        for i, linear in enumerate(model):
            kept = torch.zeros(16, 64)
            kept[:, ::16] = 1
            kept[0, 0] = 0
            if i >= 10:  # in the same group, but not among the eight that are packed to be timed
                kept[1, 1:9] = 1
            linear.weight.mul_(kept)
    report = fasticl.convert(model, format="nm")
    assert [layer.kernel for layer in report.layers] == ["nm"] * 10 + ["dense"] * 2
    assert "expected one of the patterns" in report.layers[-1].reason
    unstructured = fasticl.convert(nn.ModuleList([pruned_linear(64, 64)]), format="nm")
    assert unstructured.layers[0].kernel == "dense"
    assert "expected one of the patterns" in unstructured.layers[0].reason


def test_patterns_are_found() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.view(32, 8, 4)[::2, :, :2] = 0
        model[0].weight.view(32, 8, 4)[1::2, :, 2:] = 0
        model[1].weight[::2] = 0
    report = fasticl.convert(model)
    assert [layer.pattern for layer in report.layers] == ["2:4", "neuron rows", "dense"]
    assert [layer.kernel for layer in report.layers] == ["nm", "compact", "dense"]


# Reports


def test_report_is_a_table() -> None:
    model = nn.Sequential(Custom(), nn.Linear(32, 8))
    text = str(fasticl.convert(model))
    head, columns, *rows = text.splitlines()
    assert head == "2 of 3 linears run packed, 1 MLPs as one op"
    assert columns.split("  ")[0] == "layer"
    assert "ms dense at 1 / 128 tokens" in columns
    assert [row.split()[0] for row in rows] == ["0.fc1", "0.fc2", "1", "0"]
    for part in (
        "64x32",
        "bitmap",
        "unstructured",
        "1.000 / 1.000",
        "0.500 / 0.500",
        "2.00x at 1, 2.00x at 128 tokens",
    ):
        assert part in rows[0]
    assert rows[2].split() == ["1", "8x32", "0.0%", "dense", "dense", "-", "-", "no", "zeros"]
    assert "fused_mlp" in rows[3]


def test_a_model_without_linears() -> None:
    report = fasticl.convert(nn.Sequential(nn.ReLU()))
    assert report.layers == []
    assert str(report).startswith("0 of 0 linears")


def test_converting_twice_changes_nothing() -> None:
    model = nn.Sequential(Custom(), pruned_linear(32, 32), nn.Linear(32, 8)).eval()
    first = fasticl.convert(model)
    modules, x = list(model.modules()), torch.randn(2, 32)
    expected = answer(model, x)
    again = fasticl.convert(model, min_speedup=1e9)  # not unpacked either
    assert list(model.modules()) == modules
    assert torch.equal(answer(model, x), expected)
    assert again.fused_mlps == first.fused_mlps == ["0"]
    assert kernels(again) == {"0.up": "bitmap", "0.down": "bitmap", "1": "bitmap", "2": "dense"}
    assert reasons(again)["1"] == "already packed; 2.00x at 1, 2.00x at 128 tokens"
    assert again.mlps[0].reason == "already one op"
    assert [layer.sparsity for layer in again.layers] == [layer.sparsity for layer in first.layers]


@pytest.mark.parametrize("make", [make_llama, masked_model, lambda: nn.Sequential(Custom("residual"), Custom())])
def test_explain_only_looks(make: Callable[[], nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    if make is make_llama:
        zero_half_(model)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[:, :8] = 0
    model.train()
    list(model.children())[-1].eval()  # flags differ
    state = copy.deepcopy(model.state_dict())
    modules = [(name, module, module.training) for name, module in model.named_modules()]
    generator = torch.get_rng_state()
    text = fasticl.explain(model)
    assert capsys.readouterr().out == text + "\n"
    assert [(name, module, module.training) for name, module in model.named_modules()] == modules
    assert torch.equal(torch.get_rng_state(), generator)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], t) for name, t in state.items())
    assert str(replace(fasticl.convert(model), blocks=[])) == text  # it said what convert does


def test_explain_of_a_converted_model() -> None:
    model = nn.Sequential(Custom())
    fasticl.convert(model)
    assert "already packed" in fasticl.explain(model)


@pytest.mark.parametrize("reads_weight", [False, True])
def test_adapters_are_left_alone(reads_weight: bool) -> None:
    """Only the linear beneath plain LoRA is packed: what reads weights is given no packed ones."""
    model = nn.Sequential(BaseTunerLayer(pruned_linear(32, 24), reads_weight=reads_weight), pruned_linear(24, 8)).eval()
    with torch.no_grad():
        model[0].lora_A["default"].weight[:, ::2] = 0
    x = torch.randn(5, 32)
    expected = model(x)
    report = fasticl.convert(model, min_speedup=0)
    kernels = {layer.name: layer.kernel != "dense" for layer in report.layers}
    assert kernels == {
        "0.base_layer": not reads_weight, "0.lora_A.default": False, "0.lora_B.default": False, "1": True,
    }  # fmt: skip
    assert "an adapter reads its weight" in next(layer.reason for layer in report.layers if "lora_A" in layer.name)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*Magnitude:UserWarning", "ignore:.*adapters.*:UserWarning")
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "loha"])
@pytest.mark.parametrize("merged", [False, True])
def test_adapters_of_peft(kind: str, merged: bool) -> None:
    peft = pytest.importorskip("peft")
    where = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = {
        "lora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **where),
        "dora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, use_dora=True, **where),
        "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], init_ia3_weights=False, **where),
        "loha": lambda: peft.LoHaConfig(r=2, init_weights=False, **where),
    }[kind]()
    llama = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(llama), config).eval()
    if merged:
        model = model.merge_and_unload()
    fasticl.sparsify_(model, fasticl.Magnitude(0.5))
    tokens, expected = torch.randint(50, (2, 7)), copy.deepcopy(model)
    report = fasticl.convert(model, min_speedup=0)
    assert report.converted
    assert bool(report.fused_blocks) == merged
    with torch.no_grad():
        found, wanted = (each(input_ids=tokens).logits for each in (report.model, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "gpt2"}, TypeError, r"model: expected a torch\.nn\.Module, got str"),
        ({"format": "csr"}, ValueError, "format: expected one of auto, bitmap, .*, got 'csr'"),
        ({"values": "int4"}, ValueError, "values: expected None or 'int8', got 'int4'"),
        ({"values": "int8", "format": "compact"}, ValueError, "format: .* got 'compact'"),
        ({"skip": "lm_head"}, TypeError, "skip: expected a sequence of names, got 'lm_head'"),
        ({"skip": [1]}, TypeError, "skip: expected a sequence of names"),
        ({"min_speedup": -1}, ValueError, "min_speedup: expected a number >= 0, got -1"),
        ({"min_speedup": float("nan")}, ValueError, "min_speedup: expected a number >= 0, got nan"),
        ({"min_speedup": "2x"}, TypeError, "min_speedup: expected a number, got str"),
        ({"tokens": ()}, ValueError, r"tokens: expected positive integers, got \[\]"),
        ({"tokens": (1, 0)}, ValueError, r"tokens: expected positive integers, got \[1, 0\]"),
        ({"tokens": 128}, TypeError, "tokens: expected a sequence of integers, got 128"),
        ({"tokens": (1.5,)}, TypeError, "tokens: expected a sequence of integers"),
    ],
)
def test_refused(arguments: dict, error: type[Exception], message: str) -> None:
    model = nn.Sequential(pruned_linear(8, 8))
    with pytest.raises(error, match=message):
        fasticl.convert(**{"model": model, **arguments})
    assert isinstance(model[0], nn.Linear)
    if arguments.keys() <= {"model", "tokens"}:
        with pytest.raises(error, match=message):
            fasticl.explain(**{"model": model, **arguments})
