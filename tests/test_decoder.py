"""The decoder in C++ against transformers: the same logits for every architecture, format and dtype that it takes."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from helpers import BaseTunerLayer
from torch import Tensor, nn

import fasticl
from fasticl import Decoder
from fasticl.architectures import TOLERANCE
from fasticl.nn import SparseLinear

transformers = pytest.importorskip("transformers", minversion="5")

pytestmark = pytest.mark.filterwarnings("ignore:Magnitude:UserWarning")

SIZES = {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 10, "vocab_size": 95, "max_position_embeddings": 64}  # fmt: skip
OWN_HEADS = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
# By name: the configuration's class and what it is made with.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "llama3 angles": ("LlamaConfig", {**SIZES, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "llama with biases": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", {name: size for name, size in SIZES.items() if name != "head_dim"}),
    "qwen3": ("Qwen3Config", SIZES),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "sliding_window": 5, "query_pre_attn_scalar": 24,
                                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gpt2": ("GPT2Config", {"n_embd": 36, "n_layer": 3, "n_head": 3, "vocab_size": 95, "n_positions": 64}),
    "gpt2 by layer": ("GPT2Config", {"n_embd": 36, "n_layer": 3, "n_head": 3, "vocab_size": 95, "n_positions": 64,
                                     "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("GPTNeoXConfig", {**OWN_HEADS, "use_parallel_residual": True}),
    "gpt_neox in turn": ("GPTNeoXConfig", {**OWN_HEADS, "use_parallel_residual": False}),
    "opt": ("OPTConfig", {"hidden_size": 36, "ffn_dim": 52, "num_hidden_layers": 3, "num_attention_heads": 3,
                          "vocab_size": 95, "max_position_embeddings": 64, "word_embed_proj_dim": 36}),
    "phi": ("PhiConfig", {**OWN_HEADS, "num_attention_heads": 3, "partial_rotary_factor": 0.5,
                          "num_key_value_heads": 3}),
    "phi with norms": ("PhiConfig", {**OWN_HEADS, "num_attention_heads": 3, "num_key_value_heads": 3,
                                     "qk_layernorm": True}),
}  # fmt: skip


def make(name: str = "llama", dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    """A random model whose norms and biases are random too, in evaluation mode."""
    kind, arguments = MODELS[name]
    config = getattr(transformers, kind)(**{**arguments, **changed})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def exact_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The model's own, in float64: ``[n, vocabulary]``."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(input_ids=tokens[None], use_cache=False).logits[0]


def stepwise(decoder: Decoder, tokens: Tensor, prompt: int) -> Tensor:
    """Logits after each token from the end of the prompt on: ``[n - prompt + 1, vocabulary]``."""
    logits = [decoder.prefill(tokens[:prompt]).clone()]
    for token in tokens[prompt:].tolist():
        # What lies behind this position, and where logits are written, must not be read.
        decoder._cache[:, :, :, :, decoder.position + 1 :] = torch.nan
        decoder._logits.fill_(torch.nan)
        logits.append(decoder.step(token).clone())
    return torch.stack(logits)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def prune(model: nn.Module, sparsity: float = 0.5, pattern: Any = "unstructured") -> Any:
    fasticl.sparsify_(model, fasticl.Magnitude(sparsity, pattern))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", [1, 7])
def test_logits_are_the_models(name: str, prompt: int, isa: str) -> None:
    model, tokens = make(name), torch.randint(95, (16,))
    expected = exact_logits(model, tokens)[prompt - 1 :]
    found = stepwise(Decoder(model), tokens, prompt)
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=["bfloat16", "float16"]
)
def test_half_precision_is_at_least_as_exact_as_the_model(
    name: str, dtype: torch.dtype, tolerance: float, isa: str
) -> None:
    model, tokens = make(name, dtype), torch.randint(95, (16,))
    expected = exact_logits(model, tokens)
    decoder = Decoder(model)
    found = stepwise(decoder, tokens, 1)
    with torch.no_grad():
        rounded = model(input_ids=tokens[None], use_cache=False).logits[0]
    assert error(found, expected) < min(tolerance, 1.5 * error(rounded, expected))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What convert times does not matter here."""
    monkeypatch.setattr(importlib.import_module("fasticl.convert"), "SECONDS", 1e-4)


@pytest.mark.parametrize(
    ("sparsity", "pattern", "format"),
    [
        (0.5, "unstructured", "bitmap"),
        (0.95, "unstructured", "bitmap"),
        (0.9, "unstructured", "sliced"),
        (0.5, "2:4", "nm"),
        (0.5, "neuron", "auto"),
        (0.5, "unstructured", "compact"),
    ],
)
@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)], ids=["llama", "gpt2"])
def test_packed_layers(name: str, sparsity: float, pattern: str, format: str, dtype: torch.dtype, isa: str) -> None:
    model = prune(make(name, dtype), sparsity, pattern)
    tokens = torch.randint(95, (12,))
    expected = exact_logits(model, tokens)[4:]
    converted = fasticl.convert(model, format=format, min_speedup=0.0).model
    assert any(isinstance(module, SparseLinear | fasticl.nn.SparseMLP) for module in converted.modules())
    found = stepwise(Decoder(converted), tokens, 5)
    assert error(found, expected) < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_int8_values(name: str, dtype: torch.dtype, isa: str) -> None:
    """All linears, the LM head included; against the model with the weights that they stand for."""
    model, tokens = prune(make(name, dtype)), torch.randint(95, (12,))
    converted = fasticl.convert(model, values="int8", min_speedup=0.0, skip=()).model
    packed = {each: module.packed for each, module in converted.named_modules() if isinstance(module, SparseLinear)}
    assert {weight.values.dtype for weight in packed.values()} == {torch.int8}
    assert packed["lm_head"].format == "dense"
    exact = copy.deepcopy(converted).double()
    with torch.no_grad():
        expected = exact(input_ids=tokens[None].long(), use_cache=False).logits[0, 4:]
    found = stepwise(Decoder(converted), tokens, 5)
    assert error(found, expected) < (1e-5 if dtype == torch.float32 else 0.03)


def test_blocks_that_lost_all_neurons_or_weights() -> None:
    """They then add nothing, or their biases."""
    model = make("llama with biases")
    with torch.no_grad():
        for parameter in (
            *model.model.layers[1].mlp.up_proj.parameters(),
            model.model.layers[2].self_attn.o_proj.weight,
        ):
            parameter.zero_()
    tokens = torch.randint(95, (9,))
    expected = exact_logits(model, tokens)[2:]
    converted = fasticl.convert(model, min_speedup=0.0).model
    assert converted.model.layers[1].mlp.up.out_features == 0
    assert error(stepwise(Decoder(converted), tokens, 3), expected) < 1e-5


def test_results_do_not_depend_on_threads() -> None:
    model, tokens = prune(make("qwen3")), torch.randint(95, (12,))
    decoder = Decoder(fasticl.convert(model, min_speedup=0.0).model)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        decoder.prefill(tokens[:1])  # whose own threads may round otherwise
        results.append(stepwise_from(decoder, tokens))
    for other in results[1:]:
        assert torch.equal(results[0], other)


def stepwise_from(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits after each token, all of them read by C++."""
    decoder.position = 0
    return torch.stack([decoder.step(token).clone() for token in tokens.tolist()])


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_greedy_generation_is_that_of_transformers(name: str) -> None:
    model, tokens = make(name), torch.randint(95, (9,))
    with torch.no_grad():
        expected = model.generate(tokens[None], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = list(Decoder(model).generate(tokens, max_new_tokens=20, stop=[]))
    assert found == expected[0, 9:].tolist()
    again = list(Decoder(model).generate(tokens.tolist(), max_new_tokens=20, stop=found[3:4]))
    assert again == found[: found.index(found[3]) + 1]


def test_generation_stops_where_the_model_says_and_where_room_ends() -> None:
    model, tokens = make(), torch.randint(95, (9,))
    found = list(Decoder(model).generate(tokens, max_new_tokens=5, stop=[]))
    model.generation_config.eos_token_id = [found[1], 94]
    assert list(Decoder(model).generate(tokens, max_new_tokens=5)) == found[: found.index(found[1]) + 1]
    model.generation_config.eos_token_id = None
    short = Decoder(model, length=11)
    assert list(short.generate(tokens, max_new_tokens=5)) == found[:3]
    assert short.position == 11
    assert list(short.generate(tokens[:4], max_new_tokens=1)) == list(
        Decoder(model).generate(tokens[:4], max_new_tokens=1)
    )


def test_sampling_follows_the_probabilities() -> None:
    model, tokens = make(), torch.randint(95, (6,))
    decoder = Decoder(model)
    best = next(decoder.generate(tokens, max_new_tokens=1))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        options = {"temperature": 1.0, **narrow}
        assert next(decoder.generate(tokens, max_new_tokens=1, **options)) == best
    probabilities = (decoder.prefill(tokens) / 2.0).softmax(0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(
        [
            next(decoder._decode(torch.log(probabilities), 1, choose, set()))
            for choose in [fasticl.decoder._sampler(1.0, None, 1.0, generator)]
            for _ in range(4000)
        ]
    )
    counts = torch.bincount(drawn, minlength=95).double()
    expected = 4000 * probabilities.double()
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 1).all()
    few = {int(fasticl.decoder._sampler(1.0, 3, 1.0, generator)(torch.log(probabilities))) for _ in range(200)}
    assert few == set(probabilities.topk(3).indices.tolist())
    kept = probabilities.sort(descending=True).values.cumsum(0)
    nucleus = int((kept < 0.5).sum()) + 1
    seen = {int(fasticl.decoder._sampler(1.0, None, 0.5, generator)(torch.log(probabilities))) for _ in range(1000)}
    assert seen <= set(probabilities.topk(nucleus).indices.tolist())
    assert len(seen) > nucleus / 2


def test_a_seed_gives_the_same_text() -> None:
    decoder, tokens = Decoder(make()), torch.randint(95, (6,))

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return list(decoder.generate(tokens, max_new_tokens=12, temperature=1.0, generator=generator, stop=[]))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("name", MODELS)
def test_sequences_together_are_each_by_itself(name: str, isa: str) -> None:
    """Of any lengths, in any order, with what lies elsewhere in the cache not read."""
    model, prompts = make(name), [torch.randint(95, (n,)) for n in (3, 9, 1)]
    tokens = torch.randint(95, (4, 3))
    together = Decoder(model, length=14, sequences=3)
    together._cache.fill_(torch.nan)
    for i in (2, 0, 1):
        together.prefill(prompts[i], sequence=i)
    for row in tokens:
        together._logits.fill_(torch.nan)
        found = together.step(row.tolist())
        for i, prompt in enumerate(prompts):
            prompts[i] = torch.cat([prompt, row[i : i + 1]])
    for i, whole in enumerate(prompts):
        assert error(found[i], exact_logits(model, whole)[-1]) < 1e-5
        assert together.positions[i] == len(whole)


@pytest.mark.parametrize("values", [None, "int8"])
def test_many_packed_sequences_together(values: str | None, isa: str) -> None:
    model, prompts = prune(make()), torch.randint(95, (11, 5))
    converted = fasticl.convert(model, values=values, min_speedup=0).model
    together, alone = Decoder(converted, sequences=11), Decoder(converted)
    for i, prompt in enumerate(prompts):
        together.prefill(prompt[:4], sequence=i)
    found = together.step(prompts[:, 4].tolist())
    for logits, prompt in zip(found, prompts, strict=True):
        alone.prefill(prompt[:4])
        assert error(logits, alone.step(int(prompt[4])).double()) < 1e-5


def test_a_batch_of_texts_is_each_text() -> None:
    model = make()
    prompts = [torch.randint(95, (n,)).tolist() for n in (3, 9, 1, 5, 2)]
    one = Decoder(model, length=16)
    stop = [list(one.generate(prompts[3], max_new_tokens=2, stop=[]))[1]]
    expected = [list(one.generate(prompt, max_new_tokens=8, stop=stop)) for prompt in prompts]
    assert len({len(text) for text in expected}) > 1
    for sequences in (1, 2, 5):
        several = Decoder(model, length=16, sequences=sequences)
        assert several.generate_batch(prompts, max_new_tokens=8, stop=stop) == expected


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "opt"])
def test_a_prompt_appended(name: str) -> None:
    model, tokens = make(name), torch.randint(95, (16,))
    expected = exact_logits(model, tokens)
    decoder = Decoder(model, sequences=2)
    decoder.prefill(tokens[:7], sequence=1)
    assert error(decoder.prefill(tokens[7:9], sequence=1, append=True), expected[8]) < 1e-5
    decoder.prefill(tokens[:3])
    decoder.step(int(tokens[3]))
    assert error(decoder.prefill(tokens[4:10], append=True), expected[9]) < 1e-5
    for i in range(10, 16):
        assert error(decoder.step(int(tokens[i])), expected[i]) < 1e-5


def test_torchs_default_dtype_does_not_matter() -> None:
    model, tokens = make(), torch.randint(95, (9,))
    expected = stepwise(Decoder(model), tokens, 3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = stepwise(Decoder(model), tokens, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert error(found, expected) < 0.01  # transformers rounds the prompt's angles by it


def test_a_conversation_goes_on_behind_a_batch() -> None:
    model, first, second = make(), torch.randint(95, (6,)).tolist(), torch.randint(95, (4,)).tolist()
    decoder = Decoder(model, sequences=2)
    said = decoder.generate_batch([first, second], max_new_tokens=3, stop=[])[0]
    found = list(decoder.generate(second, max_new_tokens=3, stop=[], append=True))
    assert found == list(Decoder(model).generate([*first, *said, *second], max_new_tokens=3, stop=[]))
    assert decoder.position == len([*first, *said, *second]) + 2  # all but what was said last


@pytest.mark.parametrize("turns", [2, 1])
def test_a_conversation_goes_on_behind_what_was_generated(turns: int) -> None:
    model, first, second = make(), torch.randint(95, (6,)).tolist(), torch.randint(95, (4,)).tolist()
    decoder = Decoder(model)
    said = list(decoder.generate(first, max_new_tokens=3, stop=[]))
    found = list(decoder.generate(second, max_new_tokens=3, stop=[], append=True))
    assert found == list(Decoder(model).generate([*first, *said, *second], max_new_tokens=3, stop=[]))
    if turns == 1:  # a new prompt forgets
        found = list(decoder.generate(first, max_new_tokens=3, stop=[]))
        assert found == said


@pytest.fixture
def decoder() -> Decoder:
    return Decoder(make(), length=8)


def test_bad_arguments_are_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match=r"tokens: expected 1 to 8 \(length\), got 9"):
        decoder.prefill(torch.zeros(9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"tokens: expected 1 to 8 \(length\), got 0"):
        decoder.prefill([])
    with pytest.raises(ValueError, match=r"tokens: expected 0 to 94, got 95"):
        decoder.prefill([3, 95])
    with pytest.raises(ValueError, match=r"tokens: expected 0 to 94, got -1"):
        decoder.step(-1)
    for wrong, error, message in (
        ([[1, 2], [3, 4]], ValueError, r"tokens: expected one prompt, \[n\] or \[1, n\], got \[2, 2\]"),
        (1, ValueError, r"tokens: expected one prompt, \[n\] or \[1, n\], got \[\]"),
        ([1.5, 2.0], TypeError, "tokens: expected integers, got torch.float32"),
        ([True], TypeError, "tokens: expected integers, got torch.bool"),
        ("text", TypeError, r"tokens: expected numbers \(input_ids\), got str"),
        (transformers.BatchEncoding({"input_ids": [1, 2]}), TypeError, "tokens: expected numbers .* got BatchEncoding"),
    ):
        for call in (decoder.prefill, lambda tokens: decoder.generate(tokens, max_new_tokens=1)):
            with pytest.raises(error, match=message):
                call(wrong)
        with pytest.raises(error, match=message):
            decoder.generate_batch([wrong], max_new_tokens=1)
    decoder.position = -1
    with pytest.raises(ValueError, match=r"position: expected 0 to 7 \(length\), got -1"):
        decoder.step(1)
    decoder.prefill([1] * 8)
    with pytest.raises(ValueError, match=r"position: expected 0 to 7 \(length\), got 8"):
        decoder.step(1)
    with pytest.raises(ValueError, match=r"tokens: expected 1 to 0 \(length\) behind the 8 read, got 1"):
        decoder.prefill([1], append=True)
    with pytest.raises(ValueError, match=r"sequence: expected 0 to 0, got 1"):
        decoder.prefill([1], sequence=1)
    for several in ([1, 1], []):
        with pytest.raises(ValueError, match=r"token: expected 1 to 1 \(sequences\), got"):
            decoder.step(several)
    with pytest.raises(ValueError, match=r"sequences: expected at least 1, got 0"):
        Decoder(make(), sequences=0)
    for wrong, message in (
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p: expected in \(0, 1\], got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.generate([1], **{"max_new_tokens": 4, **wrong})
        with pytest.raises(ValueError, match=message):
            decoder.generate_batch([[1]], **{"max_new_tokens": 4, **wrong})


def test_models_that_it_cannot_run_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a Hugging Face causal language model, got Linear"):
        Decoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected one of llama, .*, got model_type 'bloom'"):
        Decoder(transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2)).eval())
    with pytest.raises(ValueError, match=r"model: expected evaluation mode, got training mode"):
        Decoder(make().train())
    with pytest.raises(TypeError, match=r"model: expected float32, bfloat16 or float16, got torch.float64"):
        Decoder(make(dtype=torch.float64))
    for length in (0, 65, True):
        with pytest.raises(ValueError, match=r"length: expected 1 to 64 positions, which the model takes, got"):
            Decoder(make(), length=length)
    with pytest.raises(ValueError, match="rope_type of default, linear, llama3, yarn, got 'dynamic'"):
        Decoder(make(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}))
    with pytest.raises(ValueError, match=r"expected an activation of .*, got 'tanh'"):
        Decoder(make(hidden_act="tanh"))
    with pytest.raises(ValueError, match="causal attention whose scores are not capped"):
        Decoder(make("gemma3", attn_logit_softcapping=50.0))
    with pytest.raises(ValueError, match=r"logits are not capped \(final_logit_softcapping\)"):
        Decoder(make("gemma3", final_logit_softcapping=30.0))
    model = make()
    out = model.model.layers[1].self_attn.o_proj
    out.weight = nn.Parameter(out.weight[:, :50].clone())
    with pytest.raises(
        ValueError, match=r"layer 1: expected a weight of \[36, 60\] by its configuration, got \[36, 50"
    ):
        Decoder(model)
    model = make()
    model.model.layers[1].self_attn.q_proj = BaseTunerLayer(model.model.layers[1].self_attn.q_proj)
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj: expected no adapter, .* merge_and_unload"):
        Decoder(model)
    with pytest.raises(ValueError, match="norms before the layers"):
        Decoder(make("opt", do_layer_norm_before=False))


def test_a_model_that_rounds_wildly_is_held_to_its_weights() -> None:
    model = make("llama", torch.bfloat16, num_hidden_layers=16)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight.mul_(12)
    tokens = torch.arange(4) * 7919 % 95  # as the check has
    with torch.no_grad():
        exact, rounded = exact_logits(model, tokens)[-1], model(input_ids=tokens[None]).logits[0, -1]
    assert error(rounded, exact) > 1.5 * TOLERANCE[torch.bfloat16]
    decoder = Decoder(model)
    assert error(stepwise_from(decoder, tokens)[-1], exact) < 1.5 * error(rounded, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_computes_something_else_is_refused(dtype: torch.dtype) -> None:
    model = make("llama", dtype)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 1.5 * forward(x)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM computes something that fasticl.Decoder does not: logits"):
        Decoder(model)
