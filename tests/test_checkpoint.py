"""Checkpoints: what is saved comes back bit for bit, in the layout of compressed-tensors; what is broken is refused."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fasticl
from fasticl import checkpoint, formats
from fasticl.nn import SparseLinear, SparseMLP
from fasticl.timing import Timing

transformers = pytest.importorskip("transformers", minversion="5")
AutoModelForCausalLM = transformers.AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:Magnitude:UserWarning")
Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], object]


def untimed(contenders: Mapping[str, Sequence[Any]], **_: object) -> dict[str, Timing]:
    """Stands in for the timing: what is packed is fast."""
    return {name: Timing(*[2.0 if name == "dense" else 1.0] * 3, 1, 1) for name in contenders}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("fasticl.convert"), "interleaved", untimed)
        transformers.utils.logging.disable_progress_bar()
        yield


def make(family: str, tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of two layers; its hidden sizes are no multiple of 8 where the class allows it."""
    common = {"hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "vocab_size": 90, "tie_word_embeddings": tied, "head_dim": 18}  # fmt: skip
    if family == "llama":
        config = transformers.LlamaConfig(**common)
    elif family == "qwen2":  # biases in q, k and v
        config = transformers.Qwen2Config(**common)
    elif family == "gpt_neox":  # whose head is stored under another name
        common = {name: common[name] for name in list(common)[:4]} | {"vocab_size": 90, "tie_word_embeddings": tied}
        config = transformers.GPTNeoXConfig(**common)
    else:  # Conv1D
        config = transformers.GPT2Config(n_embd=36, n_layer=2, n_head=2, n_inner=44, vocab_size=90, n_positions=64,
                                         bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # model.to(dtype) would round rotary frequencies
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def pruned(family: str = "llama", config: Any = None, *, skip: tuple[str, ...] = ("lm_head",), **kwargs: Any) -> Any:
    """A converted model; every layer with zeros is packed."""
    format, values = kwargs.pop("format", "auto"), kwargs.pop("values", None)
    model = make(family, **kwargs)
    accept = None if "lm_head" in skip else lambda module, name: True
    fasticl.sparsify_(model, config or fasticl.Magnitude(0.5), [tokens()], filter_fn=accept)
    fasticl.convert(model, min_speedup=0, tokens=(1,), skip=skip, format=format, values=values)
    return model


def tokens() -> Tensor:
    return torch.arange(14).view(2, 7) * 6


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


def packed(model: nn.Module) -> dict[str, fasticl.PackedWeight]:
    return {name: module.packed for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)))


def read(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(folder: Path, edit: Edit) -> None:
    from safetensors.torch import save_file

    tensors = read(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


# --- one weight ------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_layout_of_one_weight(data: st.DataObject) -> None:
    """Against the layout written out with NumPy, one position at a time."""
    N, K = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 37))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    weight = torch.randn(N, K, dtype=dtype) * (torch.rand(N, K) < data.draw(st.floats(0, 1)))
    tensors = checkpoint.to_bitmask(fasticl.pack(weight, data.draw(st.sampled_from(["bitmap", "sliced", "compact"]))))
    bitmask, offsets, values = np.zeros((N, -(-K // 8)), np.uint8), [], []
    for n in range(N):
        offsets.append(len(values))
        for k in range(K):
            if weight[n, k] != 0 or (weight[n, k] == 0 and weight[n, k].signbit()):
                bitmask[n, k // 8] |= 1 << k % 8
                values.append(weight[n, k])
    assert list(tensors) == ["shape", "compressed", "bitmask", "row_offsets"]
    assert torch.equal(tensors["shape"], torch.tensor([N, K]))
    assert torch.equal(tensors["bitmask"], torch.from_numpy(bitmask))
    assert torch.equal(tensors["row_offsets"], torch.tensor(offsets, dtype=torch.int64))
    assert same_bits(tensors["compressed"], torch.tensor(values, dtype=dtype))
    restored = checkpoint.from_bitmask(tensors, (N, K), "sparse-bitmask", "auto", None)
    assert same_bits(restored.validate().unpack(), weight)


@pytest.mark.parametrize("pattern", formats.PATTERNS)
def test_zeros_stored_in_a_pattern_stay_stored(pattern: str) -> None:
    weight = torch.zeros(3, 48)
    weight[0, ::16] = 1
    packed = fasticl.pack(weight, "nm", pattern=pattern)
    restored = checkpoint.from_bitmask(checkpoint.to_bitmask(packed), (3, 48), "sparse-bitmask", "nm", pattern)
    assert (restored.format, restored.pattern) == ("nm", pattern)
    assert torch.equal(restored.bitmask, packed.bitmask)
    assert same_bits(restored.values, packed.values)


def test_24_layout_of_one_weight() -> None:
    weight = torch.tensor([[0, 1, 0, 2, 3, 0, 0, 0], [0, 0, 0, 0, 5, 6, 0, 0]]).float()
    tensors = checkpoint.to_24_bitmask(weight)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "shape": [2, 1], "compressed": [2, 4], "bitmask": [2, 1]}  # fmt: skip
    assert tensors["shape"].dtype == torch.int64
    assert tensors["compressed"].count_nonzero() == 5
    assert tensors["bitmask"][0, 0] & 0b11111 == 0b11010
    restored = checkpoint.from_bitmask(tensors, (2, 8), "sparse-24-bitmask", "auto", None)
    assert (restored.format, restored.pattern) == ("nm", "2:4")
    assert torch.equal(restored.unpack(), weight)
    with pytest.raises(ValueError, match="at most 2 of every 4 columns for 2:4, got more"):
        checkpoint.to_24_bitmask(torch.tensor([[1.0, 2, 3, 0]]))
    with pytest.raises(ValueError, match="columns divisible by 4 for 2:4, got 6"):
        checkpoint.to_24_bitmask(torch.zeros(2, 6))


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_model_comes_back(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pruned(family, tied=tied, dtype=dtype)
    before = copy.deepcopy(model.config.to_dict())
    fasticl.save_pretrained(model, tmp_path / "model")
    assert model.config.to_dict() == before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert len(packed(loaded)) >= 8
    assert str(loaded) == str(model)
    state = model.state_dict()
    assert set(loaded.state_dict()) == set(state)
    assert all(same_bits(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert not loaded.training


@pytest.mark.parametrize(
    ("family", "values", "tied"),
    [("llama", None, True), ("qwen2", None, False), ("gpt2", None, True), ("gpt_neox", None, False),
     ("llama", "int8", True)],
)  # fmt: skip
def test_compressed_files_hold_the_same(family: str, values: str | None, tied: bool, tmp_path: Path) -> None:
    model = pruned(family, tied=tied, dtype=torch.bfloat16, values=values)
    fasticl.save_pretrained(model, tmp_path / "plain", max_shard_size="20KB")
    fasticl.save_pretrained(model, tmp_path / "coded", compress=True, max_shard_size="20KB")
    names = set(read(tmp_path / "coded"))
    assert {name for name in names if name.endswith(".mantissas")}
    assert not {name for name in read(tmp_path / "plain") if name.endswith((".mantissas", ".exponents"))}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "coded")
    state, expected = loaded.state_dict(), model.state_dict()
    assert set(state) == set(expected)
    assert all(same_bits(tensor, expected[name]) for name, tensor in state.items())
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "coded", dtype=torch.float32)
    assert all(tensor.dtype != torch.bfloat16 for tensor in wide.state_dict().values())
    assert torch.equal(wide.get_input_embeddings().weight, model.get_input_embeddings().weight.float())
    loaded.save_pretrained(tmp_path / "again")  # as it is asked for, not as it came
    assert set(read(tmp_path / "again")) == set(read(tmp_path / "plain"))


def test_a_dense_model_may_be_compressed(tmp_path: Path) -> None:
    model = make("llama", dtype=torch.bfloat16)
    fasticl.save_pretrained(model, tmp_path / "dense", compress=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert all(same_bits(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    sizes = [(tmp_path / "dense" / "model.safetensors").stat().st_size]
    model.save_pretrained(tmp_path / "plain")
    assert sizes[0] < 0.9 * (tmp_path / "plain" / "model.safetensors").stat().st_size
    base = transformers.AutoModel.from_pretrained(tmp_path / "dense")  # whose names lack a prefix
    assert same_bits(base.embed_tokens.weight, model.model.embed_tokens.weight)
    model.float()
    fasticl.save_pretrained(model, tmp_path / "wide", compress=True)  # nothing of it is bfloat16
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "wide")), logits(model))


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("{}.compressed.exponents", lambda t: t[:-2], r"q_proj\.compressed\.exponents: expected a zlib stream of"),
        ("{}.compressed.exponents", lambda t: t.flip(0), r"q_proj\.compressed\.exponents: expected a whole zlib"),
        ("{}.compressed.mantissas", lambda t: t[:-1], r"q_proj\.compressed\.exponents: expected a zlib stream of"),
        ("{}.compressed.mantissas", lambda t: t.int(), r"q_proj\.compressed\.mantissas: expected U8, got I32"),
        ("{}.compressed.exponents", lambda t: t[None], r"q_proj\.compressed\.exponents: expected U8, got U8 \[1,"),
        ("{}.compressed.exponents", None, r"q_proj\.compressed\.exponents: expected U8, got no such tensor"),
        ("model.embed_tokens.weight.mantissas", None, r"tokens\.weight\.mantissas: expected U8, got no such tensor"),
        ("model.embed_tokens.weight.exponents", lambda t: t[:9], r"embed_tokens\.weight\.exponents: expected a zlib"),
    ],
)  # fmt: skip
def test_corrupted_compressed_tensors(
    name: str, function: Callable[[Tensor], Tensor] | None, message: str, tmp_path: Path
) -> None:
    fasticl.save_pretrained(pruned(dtype=torch.bfloat16), tmp_path / "model", compress=True)
    name = name.format(LAYER)

    def edit(tensors: Tensors) -> None:
        tensor = tensors.pop(name)
        tensors["other" if function is None else name] = tensor if function is None else function(tensor).contiguous()

    rewrite(tmp_path / "model", edit)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "format", "pattern"),
    [
        (fasticl.Magnitude(0.5), "bitmap", None),
        (fasticl.Magnitude(0.9), "sliced", None),
        (fasticl.Magnitude(0.5, "2:4"), "nm", "2:4"),
        (fasticl.Magnitude(0.5), "compact", None),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_formats_come_back(family: str, config: Any, format: str, pattern: str | None, tmp_path: Path) -> None:
    model = pruned(family, config, format=format)
    expected = packed(model)
    assert {(p.format, p.pattern) for p in expected.values()} == {(format, pattern)}
    fasticl.save_pretrained(model, tmp_path / "model")
    loaded = packed(fasticl.from_pretrained(tmp_path / "model"))
    assert list(loaded) == list(expected)
    for name, weight in loaded.items():
        assert (weight.format, weight.pattern) == (format, pattern)
        weight.validate()
        assert same_bits(weight.values, expected[name].values)
        assert same_bits(weight.unpack(), expected[name].unpack())


@pytest.mark.parametrize(
    ("config", "format", "pattern"),
    [
        (fasticl.Magnitude(0.5), "bitmap", None),
        (fasticl.Magnitude(0.9), "sliced", None),
        (fasticl.Magnitude(0.5, "2:4"), "nm", "2:4"),
        (fasticl.Magnitude(0.5), "dense", None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_int8_values_come_back(
    family: str, dtype: torch.dtype, config: Any, format: str, pattern: str | None, tmp_path: Path
) -> None:
    model = pruned(family, config, format=format, values="int8", dtype=dtype, skip=())
    expected = packed(model)
    assert {(p.format, p.pattern, p.values.dtype) for p in expected.values()} == {(format, pattern, torch.int8)}
    fasticl.save_pretrained(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert list(packed(loaded)) == list(expected)
    for name, weight in packed(loaded).items():
        weight.validate()
        assert (weight.format, weight.pattern) == (format, pattern)
        assert torch.equal(weight.values, expected[name].values)
        assert same_bits(weight.scales, expected[name].scales)
    assert torch.equal(logits(loaded), logits(model))
    stored = read(tmp_path / "model")
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith(".compressed")} == {torch.int8}
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float16)
    assert {(p.values.dtype, p.dtype) for p in packed(again).values()} == {(torch.int8, torch.float16)}


@pytest.mark.parametrize("layout", ["sparse-bitmask", "sparse-24-bitmask"])
def test_int8_values_have_no_place_in_compressed_tensors(layout: str, tmp_path: Path) -> None:
    model = pruned(config=fasticl.Magnitude(0.5, "2:4"), values="int8")
    message = rf"q_proj: expected values of dtype torch.float32 with {layout}, got int8; save as fasticl"
    with pytest.raises(ValueError, match=message):
        fasticl.save_pretrained(model, tmp_path / "model", format=layout)
    assert list(tmp_path.iterdir()) == []


INT8_CORRUPTIONS = {
    "scales": (lambda t: t[:-1], r"scales: expected .* \[36\], got F32 \[35\]"),
    "compressed": (lambda t: t.float(), r"compressed: expected I8 .*, got F32"),
    "shape": (lambda t: t + 1, r"shape: expected \[36, 36\], got \[37, 37\]"),
}


@pytest.mark.parametrize("part", INT8_CORRUPTIONS)
@pytest.mark.parametrize("format", ["bitmap", "dense"])
def test_corrupted_int8_tensors(format: str, part: str, tmp_path: Path) -> None:
    fasticl.save_pretrained(pruned("qwen2", format=format, values="int8"), tmp_path / "model")
    function, message = INT8_CORRUPTIONS[part]
    rewrite(tmp_path / "model", change(part, function))
    with pytest.raises(ValueError, match=rf"q_proj.*{message}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_widths_after_neuron_pruning(family: str, tmp_path: Path) -> None:
    model = make(family)
    fasticl.sparsify_(model, fasticl.Magnitude(0.3, "neuron", scope="global"))
    fasticl.convert(model, min_speedup=0, tokens=(1,))
    widths = [module.up.out_features for module in model.modules() if isinstance(module, SparseMLP)]
    assert len(set(widths)) == 2
    fasticl.save_pretrained(model, tmp_path / "model")
    stored = read(tmp_path / "model")
    assert not any(".mlp.up." in name for name in stored)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert [module.up.out_features for module in loaded.modules() if isinstance(module, SparseMLP)] == widths
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_widths_that_another_tool_changed(tmp_path: Path) -> None:
    """Layers cut by hand stay separate nn.Linear modules, and are saved under their own names."""
    model = make("llama")
    mlp = model.model.layers[1].mlp
    for name in ("up_proj", "gate_proj", "down_proj"):
        linear = getattr(mlp, name)
        weight = linear.weight.data[:, :10] if name == "down_proj" else linear.weight.data[:10]
        setattr(mlp, name, _linear(weight))
    fasticl.save_pretrained(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert list(loaded.model.layers[1].mlp.up_proj.weight.shape) == [10, 36]
    assert torch.equal(logits(loaded), logits(model))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    return linear


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_packed_head_is_no_longer_tied(family: str, tmp_path: Path) -> None:
    model = pruned(family, skip=())
    assert isinstance(model.get_output_embeddings(), SparseLinear)
    fasticl.save_pretrained(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(logits(loaded), logits(model))
    rewrite_config(
        tmp_path / "model", lambda config: config.update(tie_word_embeddings=True)
    )  # as another tool may say
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(model))


def test_shards(tmp_path: Path) -> None:
    model = pruned()
    fasticl.save_pretrained(model, tmp_path / "model", max_shard_size=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert torch.equal(logits(fasticl.from_pretrained(tmp_path / "model")), logits(model))


def test_a_layer_in_two_places(tmp_path: Path) -> None:
    model = make("llama")
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    fasticl.sparsify_(model, fasticl.Magnitude(0.5))
    fasticl.convert(model, min_speedup=0, tokens=(1,))
    fasticl.save_pretrained(model, tmp_path / "model")
    assert torch.equal(logits(fasticl.from_pretrained(tmp_path / "model")), logits(model))


def test_the_base_of_a_model(tmp_path: Path) -> None:
    model = pruned()
    fasticl.save_pretrained(model, tmp_path / "model")
    base = transformers.AutoModel.from_pretrained(tmp_path / "model")
    assert len(packed(base)) == 14
    with torch.inference_mode():
        assert torch.equal(base(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)


def test_another_dtype_on_loading(tmp_path: Path) -> None:
    model = pruned()
    fasticl.save_pretrained(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {weight.dtype for weight in packed(loaded).values()} == {torch.bfloat16}
    rounded = copy.deepcopy(model).bfloat16()
    assert all(same_bits(tensor, loaded.state_dict()[name]) for name, tensor in rounded.state_dict().items())
    assert logits(loaded.float()).dtype == torch.float32


def test_transformers_own_save(tmp_path: Path) -> None:
    """What convert returns, model.save_pretrained writes; a model with nothing packed is written as ever."""
    model = pruned()
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(model))
    dense = make("llama")
    dense.save_pretrained(tmp_path / "theirs")
    fasticl.save_pretrained(dense, tmp_path / "ours")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_a_class_with_names_of_older_versions(tmp_path: Path) -> None:
    """Which transformers writes, while the names in config.json are those of the modules."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**sizes, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 90},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=80,
    )  # fmt: skip
    kind, tokens = transformers.Gemma3ForConditionalGeneration, torch.randint(70, (1, 7))
    model = kind(config).eval()
    fasticl.sparsify_(model, fasticl.Magnitude(0.5))
    fasticl.convert(model, min_speedup=0)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "packed")
    fasticl.save_pretrained(model, tmp_path / "foreign", format="sparse-bitmask")  # in which those names belong
    fasticl.save_pretrained(model, tmp_path / "again")
    assert any(name.startswith("language_model.model.") for name in read(tmp_path / "foreign"))
    for folder in ("packed", "again"):
        loaded = kind.from_pretrained(tmp_path / folder).eval()
        assert packed(loaded).keys() == packed(model).keys()
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_smaller_file(tmp_path: Path) -> None:
    fasticl.save_pretrained(make("llama"), tmp_path / "dense")
    fasticl.save_pretrained(pruned(), tmp_path / "packed")
    sizes = {name: sum(t.nbytes for t in read(tmp_path / name).values()) for name in ("dense", "packed")}
    assert sizes["packed"] < 0.75 * sizes["dense"]


@pytest.mark.parametrize("first", ["fasticl", "transformers.quantizers.auto"])
def test_plain_from_pretrained_in_a_fresh_process(first: str, tmp_path: Path) -> None:
    """``import fasticl`` registers the plug-in, before transformers or after it, without importing it."""
    fasticl.save_pretrained(model := pruned(), tmp_path / "model")
    script = f"""
import sys, importlib
importlib.import_module({first!r})
import torch, fasticl
assert {first!r} != "fasticl" or "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.inference_mode():
    print(model(input_ids=torch.arange(14).view(2, 7) * 6, use_cache=False).logits.double().sum().item().hex())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == logits(model).double().sum().item().hex()


# --- compressed-tensors ----------------------------------------------------------------------------------------------

FOREIGN = [("sparse-bitmask", fasticl.Magnitude(0.5)), ("sparse-24-bitmask", fasticl.Magnitude(0.5, "2:4"))]


@pytest.mark.parametrize(("layout", "config"), FOREIGN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_agree(layout: str, config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Files written here hold what the package compressed-tensors makes, bit for bit, and it reads them back.

    Release 0.14.0 asks for transformers < 5 and 0.15.0 has lost these layouts, so no extra installs it: to run this
    test, ``pip install --no-deps compressed-tensors==0.14.0 loguru``.
    """
    compressors = pytest.importorskip("compressed_tensors.compressors.sparse_compressors")
    configs = pytest.importorskip("compressed_tensors.config")
    model = pruned(config=config, dtype=dtype)
    attention = model.model.layers[0].self_attn
    weight = attention.q_proj.packed.unpack()
    attention.q_proj = SparseLinear(fasticl.pack(torch.where(weight == 0, -0.0, weight), "bitmap"))
    dense = {f"{name}.weight": weight.unpack() for name, weight in packed(model).items()}
    dense = {name.replace(".mlp.up.", ".mlp.up_proj."): weight for name, weight in dense.items()}
    dense = {name.replace(".mlp.down.", ".mlp.down_proj."): weight for name, weight in dense.items()}
    dense = {name.replace(".mlp.gate.", ".mlp.gate_proj."): weight for name, weight in dense.items()}
    fasticl.save_pretrained(model, tmp_path / "model", format=layout)
    if layout == "sparse-bitmask":
        theirs = compressors.BitmaskCompressor(config=configs.BitmaskConfig())
    else:
        theirs = compressors.Sparse24BitMaskCompressor(config=configs.Sparse24BitMaskConfig())
    expected = theirs.compress(dense, {name.removesuffix(".weight") for name in dense})
    stored = read(tmp_path / "model")
    assert len(dense) == 14
    assert len(expected) == 14 * len(checkpoint.LAYOUTS[layout])
    assert all(same_bits(stored[name], tensor) for name, tensor in expected.items())
    for name, weight in theirs.decompress(str(tmp_path / "model")):
        if name in dense:
            assert same_bits(weight, dense[name] + 0.0)


def write_foreign(folder: Path, layout: str, model: Any, *, old_names: bool = False) -> Tensors:
    """A checkpoint as the package wrote it; returns the dense weights of its packed layers."""
    fasticl.save_pretrained(model, folder, format=layout)
    tensors = read(folder)
    keys = [name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")]
    if old_names:
        parts = checkpoint.LAYOUTS[layout]

        def rename(tensors: Tensors) -> None:
            for key in keys:
                tensors.update({f"{key}.weight.{part}": tensors.pop(f"{key}.{part}") for part in parts})

        rewrite(folder, rename)
    weights = {}
    for key in keys:
        shape = tensors[f"{key}.shape"].flatten().tolist()
        bits = np.unpackbits(tensors[f"{key}.bitmask"].numpy(), axis=1, bitorder="little")[:, : shape[1]]
        weights[key] = torch.zeros(shape, dtype=tensors[f"{key}.compressed"].dtype)
        weights[key][torch.from_numpy(bits).bool()] = tensors[f"{key}.compressed"].flatten()
    return weights


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize(("layout", "config"), FOREIGN)
def test_foreign_checkpoints_load(layout: str, config: Any, old_names: bool, tmp_path: Path) -> None:
    model = pruned("qwen2", config)
    weights = write_foreign(tmp_path / "model", layout, model, old_names=old_names)
    loaded = fasticl.from_pretrained(tmp_path / "model")
    found = packed(loaded)
    assert set(found) == set(weights)
    assert len(found) == 14
    assert all(same_bits(found[name].unpack(), weight) for name, weight in weights.items())
    assert {weight.format for weight in found.values()} == {"nm" if layout == "sparse-24-bitmask" else "bitmap"}
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["sparsity_config", "compression_config"])
def test_older_configs_load(place: str, tmp_path: Path) -> None:
    model = pruned()
    write_foreign(tmp_path / "model", "sparse-bitmask", model)

    def edit(config: dict[str, Any]) -> None:
        sparsity = config.pop("quantization_config")["sparsity_config"]
        config[place] = sparsity if place == "sparsity_config" else {"sparsity_config": sparsity}

    rewrite_config(tmp_path / "model", edit)
    loaded = fasticl.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    fasticl.save_pretrained(loaded, tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)


def test_foreign_conv1d(tmp_path: Path) -> None:
    """The matrix of a Conv1D lies there as the parameter does, inputs by outputs."""
    model = make("gpt2")
    fasticl.sparsify_(model, fasticl.Magnitude(0.5))
    fasticl.save_pretrained(model, tmp_path / "model")

    def compress(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))]:
            parts = checkpoint.to_bitmask(fasticl.pack(tensors.pop(name), "bitmap"))
            tensors.update({f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()})

    rewrite(tmp_path / "model", compress)
    sparsity = {"format": "sparse-bitmask"}
    rewrite_config(tmp_path / "model", lambda config: config.update(sparsity_config=sparsity))
    loaded = fasticl.from_pretrained(tmp_path / "model")
    assert len(packed(loaded)) == 8
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_foreign_formats_that_do_not_fit(tmp_path: Path) -> None:
    model = pruned()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\w+\.\w+: expected at most 2 of every 4 columns for 2:4"):
        fasticl.save_pretrained(model, tmp_path / "model", format="sparse-24-bitmask")
    with pytest.raises(ValueError, match=r"expected a packed nn.Linear for sparse-bitmask, got none"):
        fasticl.save_pretrained(make("llama"), tmp_path / "model", format="sparse-bitmask")
    neurons = make("llama")
    fasticl.sparsify_(neurons, fasticl.Magnitude(0.3, "neuron"))
    fasticl.sparsify_(neurons, fasticl.Magnitude(0.5), filter_fn=lambda module, name: "self_attn" in name)
    fasticl.convert(neurons, min_speedup=0, tokens=(1,))
    with pytest.raises(
        ValueError, match=r"mlp\.\w+_proj: expected \[44, 36\] as in config.json with sparse-bitmask, got"
    ):
        fasticl.save_pretrained(neurons, tmp_path / "model", format="sparse-bitmask")
    with pytest.raises(
        ValueError, match="format: expected one of fasticl, sparse-bitmask, sparse-24-bitmask, got 'csr'"
    ):
        fasticl.save_pretrained(model, tmp_path / "model", format="csr")
    with pytest.raises(ValueError, match="compress: expected format 'fasticl', got 'sparse-bitmask'"):
        fasticl.save_pretrained(model, tmp_path / "model", format="sparse-bitmask", compress=True)
    assert list(tmp_path.iterdir()) == []


# --- what is refused -------------------------------------------------------------------------------------------------

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    fasticl.save_pretrained(pruned("qwen2"), folder / "model")
    return folder / "model"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be broken."""
    (tmp_path / "model").mkdir()
    for file in saved.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "model"


def change(part: str, function: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors: tensors.update({f"{LAYER}.{part}": function(tensors[f"{LAYER}.{part}"]).contiguous()})


def flip(tensor: Tensor) -> Tensor:
    tensor.view(-1)[3] ^= 4
    return tensor


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(f"{LAYER}.row_offsets"), r"expected \d+ tensors in the checkpoint's files, got"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"expected \d+ tensors in the checkpoint's files, got"),
        (lambda tensors: tensors.update(other=tensors.pop(f"{LAYER}.bitmask")), r"bitmask: expected U8 .* got no such"),
        (change("bitmask", flip), rf"{LAYER}: PackedWeight: row_offsets\[\d+\]: expected"),
        (change("bitmask", lambda t: t | 0x80), rf"{LAYER}: PackedWeight: bitmask\[0\]: expected no bits at columns"),
        (change("bitmask", lambda t: t.to(torch.int8)), r"q_proj\.bitmask: expected U8 \[36, 5\], got I8"),
        (change("bitmask", lambda t: t[:, :4]), r"q_proj\.bitmask: expected U8 \[36, 5\], got U8 \[36, 4\]"),
        (change("row_offsets", lambda t: t.flip(0)), rf"{LAYER}: PackedWeight: row_offsets\[0\]: expected 0"),
        (change("row_offsets", lambda t: t - 1), rf"{LAYER}: PackedWeight: row_offsets\[0\]: expected 0"),
        (change("row_offsets", lambda t: t.int()), r"q_proj\.row_offsets: expected I64 \[36\], got I32"),
        (change("compressed", lambda t: t[:-1]), rf"{LAYER}: PackedWeight: row_offsets\[36\]: expected"),
        (change("compressed", lambda t: t[None]), r"q_proj\.compressed: expected .* got F32 \[1, \d+\]"),
        (change("compressed", lambda t: torch.zeros(36 * 36 + 1)), r"q_proj\.compressed: expected .* got F32 \[1297\]"),
        (change("compressed", lambda t: t.to(torch.float8_e4m3fn)), r"q_proj\.compressed: expected .* got F8_E4M3"),
        (change("shape", lambda t: t + 1), rf"{LAYER}: shape: expected \[36, 36\], got \[37, 37\]"),
        (change("shape", lambda t: t[:, None]), r"q_proj\.shape: expected I64 \[2\], got I64 \[2, 1\]"),
        (change("bias", lambda t: t[:-1]), r"q_proj\.bias: expected .* \[36\], got F32 \[35\]"),
    ],
)  # fmt: skip
def test_corrupted_tensors(folder: Path, edit: Edit, message: str) -> None:
    rewrite(folder, edit)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def layer(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"]["layers"][LAYER].update(changes)


def quantization(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (layer(format="os.system"), "q_proj: format: expected one of auto, bitmap, .*, dense, got 'os.system'"),
        (layer(format=["bitmap"]), r"q_proj: format: expected one of auto, bitmap, .* got \['bitmap'\]"),
        (layer(format="nm"), "q_proj: PackedWeight: pattern: expected one of 2:4, 4:8, 8:16, got None"),
        (layer(format="dense"), r"q_proj\.weight: expected .* \[36, 36\], got no such tensor"),
        (layer(pattern="1:2"), "q_proj: pattern: expected one of None, 2:4, 4:8, 8:16, got '1:2'"),
        (layer(pattern="2:4"), "q_proj: pattern: expected None with format 'bitmap', got '2:4'"),
        (layer(layout="marlin-24"), "layout: expected one of sparse-bitmask, .*int8-dense, got 'marlin-24'"),
        (layer(layout="int8-bitmask"), r"q_proj\.compressed: expected I8 .*, got F32"),
        (layer(layout="int8-dense"), "q_proj: expected format dense with layout int8-dense, got bitmap, int8-dense"),
        (layer(layout="int8-bitmask", format="dense"), "q_proj: expected format dense with layout int8-dense"),
        (layer(layout="int8-dense", format="dense"), r"q_proj\.compressed: expected I8 \[36, 36\], got F32"),
        (layer(shape=[1 << 40, 1 << 40]), r"q_proj\.bias: expected .* \[1099511627776\], got F32 \[36\]"),
        (layer(shape=[36, -36]), r"q_proj: shape: expected \[N, K\], got \[36, -36\]"),
        (layer(shape=[36, 36.0]), r"q_proj: shape: expected \[N, K\], got \[36, 36.0\]"),
        (layer(key="other"), "q_proj: key: expected the layer's or its weight's name, got 'other'"),
        (layer(run="rm"), "q_proj: expected keys format, key, layout, pattern, shape, got run"),
        (quantization(layers={"model.norm": {"format": "bitmap"}}), "norm: expected a linear of Qwen2.*, got Qwen2R"),
        (quantization(layers={"model.layers.9": {"format": "dense"}}), "layers.9: expected a layer of Qwen2For"),
        (quantization(layers=[LAYER]), "layers: expected a mapping, got list"),
        (quantization(mlps={"model.layers.0.mlp": {"activation": "eval"}}), "mlp: expected an activation of .*eval"),
        (quantization(mlps={"model.norm": {"activation": "relu"}}), "model.norm: expected an MLP of Qwen2ForCausalLM"),
        (quantization(tensors="12"), "tensors: expected a number, got '12'"),
        (quantization(code="x"), "quantization_config: expected no key 'code'"),
    ],
)  # fmt: skip
def test_hostile_configs(folder: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite_config(folder, edit)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors: expected a whole safetensors file, got"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_files_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "elsewhere" / "model.safetensors")
    (folder / "shard.safetensors").write_bytes((tmp_path / "elsewhere" / "model.safetensors").read_bytes())
    names = sorted(read(folder))
    index = dict.fromkeys(names, "shard.safetensors") | {names[0]: "../elsewhere/model.safetensors"}
    index_file = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    with pytest.raises(ValueError, match=r"expected files in .*, got .*\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_nothing_is_unpickled(folder: Path) -> None:
    torch.save(read(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model.bin: expected a safetensors file, which cannot run code"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ({"format": "marlin-24"}, "format: expected one of sparse-bitmask, sparse-24-bitmask, got 'marlin-24'"),
        ({"format": "__import__('os')"}, "format: expected one of sparse-bitmask, sparse-24-bitmask, got "),
        ({"format": ["sparse-bitmask"]}, r"format: expected one of .* got \['sparse-bitmask'\]"),
        ({}, "format: expected one of sparse-bitmask, sparse-24-bitmask, got None"),
    ],
)
def test_foreign_formats_are_matched(folder: Path, sparsity: dict[str, Any], message: str) -> None:
    edit = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    rewrite_config(folder, lambda config: config.update(quantization_config=edit))
    with pytest.raises(ValueError, match=message):
        fasticl.from_pretrained(folder)


def test_broken_foreign_folders(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_foreign(folder, "sparse-bitmask", pruned())
    good = (folder / "config.json").read_text()
    groups = {"group_0": {"weights": {"num_bits": 4}}}
    rewrite_config(folder, lambda config: config["quantization_config"].update(config_groups=groups))
    with pytest.raises(ValueError, match="config_groups: expected sparse weights that are not quantized"):
        fasticl.from_pretrained(folder)
    (folder / "config.json").write_text(good[:-20])
    with pytest.raises(ValueError, match=r"config.json: expected JSON, got"):
        fasticl.from_pretrained(folder)
    (folder / "config.json").write_text(good)
    index = {"metadata": {}, "weight_map": {"x": "../../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected names of files in the folder, got '../../model.safetensors'"):
        fasticl.from_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    rewrite(folder, change("bitmask", flip))
    with pytest.raises(ValueError, match=rf"{LAYER}: PackedWeight: row_offsets"):
        fasticl.from_pretrained(folder)


# --- writing ---------------------------------------------------------------------------------------------------------


class FullDisk:
    """A tokenizer that fails after the weights were written."""

    def save_pretrained(self, folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()
        raise OSError("No space left on device")


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    model = pruned()
    quantizer, config = model.hf_quantizer, model.config
    with pytest.raises(OSError, match="No space left"):
        fasticl.save_pretrained(model, tmp_path / "new" / "model", tokenizer=FullDisk())
    assert list((tmp_path / "new").iterdir()) == []
    assert model.hf_quantizer is quantizer
    assert model.config is config
    assert torch.equal(logits(model), logits(model))


def test_folders(tmp_path: Path) -> None:
    model = pruned()
    (tmp_path / "empty").mkdir()
    fasticl.save_pretrained(model, tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o777 & ~_umask()
    before = (tmp_path / "empty" / "config.json").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="folder: expected a new or empty folder, got"):
        fasticl.save_pretrained(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").stat().st_mtime_ns == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="folder: expected a new or empty folder, got"):
        fasticl.save_pretrained(model, tmp_path / "file")


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model: expected a transformers.PreTrainedModel, got Linear"):
        fasticl.save_pretrained(nn.Linear(2, 2), tmp_path / "model")
    model = make("llama")
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="expected one that is not quantized, got one of object"):
        fasticl.save_pretrained(model, tmp_path / "model")
    model = pruned()
    model.model.layers[0].extra = nn.Linear(4, 4)
    with pytest.raises(
        ValueError, match=r"model.layers.0.extra: expected a linear of LlamaForCausalLM, which has none"
    ):
        fasticl.save_pretrained(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_loading_refuses(folder: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint that FastICL saved"):
        AutoModelForCausalLM.from_pretrained(
            folder, config=make("qwen2").config, quantization_config=fasticl.huggingface.FastICLConfig()
        )
    with pytest.raises(ValueError, match="device_map: expected one device for a packed model, got cpu, disk"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"model": "cpu", "lm_head": "disk"})


def test_transformers_without_the_plug_in_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fasticl.huggingface", None)
    monkeypatch.delattr(fasticl, "huggingface")
    with pytest.warns(UserWarning, match="transformers cannot load FastICL's checkpoints"):
        checkpoint._register("transformers.quantizers.auto")


def test_one_device_may_be_named(saved: Path) -> None:
    for device_map in ("cpu", {"": "cpu"}):
        assert len(packed(AutoModelForCausalLM.from_pretrained(saved, device_map=device_map))) == 14
