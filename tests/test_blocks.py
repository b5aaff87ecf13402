"""Blocks in C++ under transformers' generate: the model's own logits behind any cache, or by its own modules."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decoder import MODELS, error, exact_logits, make, prune
from torch import Tensor, nn

import fasticl
from fasticl import blocks
from fasticl.nn import SparseLinear

transformers = pytest.importorskip("transformers", minversion="5")

pytestmark = pytest.mark.filterwarnings("ignore:Magnitude:UserWarning")


class Calls(list[bool]):
    """Of each call of a fused block, whether C++ computed it."""


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    monkeypatch.setattr(importlib.import_module("fasticl.convert"), "SECONDS", 1e-4)
    made, call = Calls(), blocks._NativeBlock.__call__

    def counted(self: Any, *args: Any) -> Tensor | None:
        out = call(self, *args)
        made.append(out is not None)
        return out

    monkeypatch.setattr(blocks._NativeBlock, "__call__", counted)
    return made


def fused(model: Any, tokens: tuple[int, ...] = (1, 3)) -> Any:
    """A converted copy, whose blocks are fused however long that takes."""
    report = fasticl.convert(copy.deepcopy(model), min_speedup=0, tokens=tokens)
    assert len(report.fused_blocks) == 3, report
    return report.model


def generated(model: Any, tokens: Tensor, count: int = 6, **options: Any) -> Any:
    return model.generate(
        tokens, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=94,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip


def assert_alike(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert error(ours, theirs.double()) < tolerance


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_is_the_models(name: str, cache: str, calls: Calls) -> None:
    model, tokens = make(name), torch.randint(1, 94, (1, 7))
    model_fused = fused(model)
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    calls.clear()
    assert_alike(generated(model_fused, tokens, **options), generated(model, tokens, **options))
    # All tokens but the prompt's, in all blocks; a static cache with a window says little before it is full.
    assert sum(calls) >= (4 if name == "mistral" else 5) * 3


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "phi"])
def test_a_padded_batch(name: str, calls: Calls, isa: str) -> None:
    model, tokens = make(name), torch.randint(1, 94, (3, 7))
    mask = torch.ones_like(tokens)
    mask[0, :4] = mask[2, :1] = 0
    model_fused = fused(model)
    calls.clear()
    assert_alike(generated(model_fused, tokens, attention_mask=mask), generated(model, tokens, attention_mask=mask))
    assert sum(calls) == 5 * 3


def test_more_sequences_than_were_timed_go_through_the_modules(calls: Calls) -> None:
    model, tokens = make(), torch.randint(1, 94, (2, 7))
    model_fused = fused(model, (1,))
    calls.clear()
    assert_alike(generated(model_fused, tokens), generated(model, tokens))
    assert not calls


def test_beams(calls: Calls) -> None:
    """Which the cache reorders between the steps."""
    model, tokens = make(), torch.randint(1, 94, (1, 7))
    model_fused = fused(model)
    calls.clear()
    found, expected = (m.generate(tokens, num_beams=3, max_new_tokens=6, pad_token_id=0) for m in (model_fused, model))
    assert torch.equal(found, expected)
    assert any(calls)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("values", [None, "int8"])
def test_packed_blocks(name: str, values: str | None, calls: Calls) -> None:
    model = prune(make(name))
    report = fasticl.convert(copy.deepcopy(model), values=values, min_speedup=0)
    assert len(report.fused_blocks) == 3, report
    converted = report.model
    assert any(isinstance(module, SparseLinear) for module in converted.modules())
    by_modules = copy.deepcopy(converted)
    for layer in by_modules.modules():
        blocks.unfuse(layer)
    tokens = torch.randint(1, 94, (1, 7))
    calls.clear()
    assert_alike(generated(converted, tokens), generated(by_modules, tokens), 1e-4)
    assert sum(calls) == 5 * 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_half_precision(dtype: torch.dtype, tolerance: float, calls: Calls) -> None:
    model, tokens = make("llama", dtype), torch.randint(95, (12,))
    expected = exact_logits(model, tokens)[-1]
    with torch.no_grad():
        rounded = model(input_ids=tokens[None]).logits[0, -1]
        model_fused = fused(model)
        past = model_fused(input_ids=tokens[None, :-1], use_cache=True).past_key_values
        calls.clear()
        found = model_fused(input_ids=tokens[None, -1:], past_key_values=past).logits[0, -1]
    assert all(calls)
    assert error(found, expected) < max(tolerance / 10, 2 * error(rounded, expected))
    assert error(found, expected) < tolerance


@pytest.mark.parametrize(("name", "packs"), [("gemma3", True), ("gpt2", True), ("gemma3", False)])
def test_norms_of_another_dtype(name: str, packs: bool, calls: Calls) -> None:
    """What is left of a packed block's parameters then says nothing of what the block is given."""
    model = make(name, torch.bfloat16)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.float()
    model_fused = fused(prune(model) if packs else model)
    tokens = torch.randint(1, 94, (1, 7))
    calls.clear()
    with torch.no_grad():
        found, expected = decoded(model_fused, tokens), decoded(model, tokens)
    assert calls[-3:] == [True] * 3
    assert error(found, expected.double()) < 0.05


def test_a_block_that_fails_is_left_as_it_is() -> None:
    model = make("llama", torch.bfloat16)
    model.model.norm.float()
    model.model.layers[1].input_layernorm.float()  # Llama's then hands float32 on
    report = fasticl.convert(prune(model), min_speedup=0)
    assert report.converted
    assert not report.fused_blocks
    assert "model.layers.1 fails by itself" in report.blocks[0].reason
    assert report.blocks[0].dtype == torch.bfloat16
    assert not any(isinstance(module, blocks.FusedBlock) for module in report.model.modules())


def decoded(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Logits after the last token, which comes after the others by itself."""
    past = model(input_ids=tokens[:, :-1], use_cache=True).past_key_values
    logits: Tensor = model(input_ids=tokens[:, -1:], past_key_values=past, **options).logits[:, -1]
    return logits


def test_what_a_mask_leaves_out_in_the_middle(calls: Calls) -> None:
    model, tokens = make(), torch.randint(1, 94, (1, 7))
    model_fused = fused(model)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
    calls.clear()
    with torch.no_grad():
        found, expected = (decoded(m, tokens, attention_mask=mask) for m in (model_fused, model))
    assert error(found, expected.double()) < 1e-5
    assert calls
    assert not any(calls)


@pytest.mark.parametrize("change", ["weight", "norm", "load", "module", "double"])
def test_a_changed_block_computes_what_it_has_become(change: str, calls: Calls) -> None:
    model, tokens = make(), torch.randint(1, 94, (1, 7))
    model_fused, other = fused(model), make()
    with torch.no_grad():
        decoded(model_fused, tokens)
        for each in (model, model_fused):
            layer = each.model.layers[1]
            if change == "weight":
                layer.mlp.up_proj.weight.mul_(2)
            elif change == "norm":
                layer.input_layernorm.weight.data = torch.full_like(layer.input_layernorm.weight, 3)
            elif change == "load":
                each.load_state_dict(other.state_dict())
            elif change == "module":
                layer.self_attn.k_proj = copy.deepcopy(other.model.layers[0].self_attn.k_proj)
            else:
                each.double()
        calls.clear()
        found, expected = (decoded(m, tokens) for m in (model_fused, model))
    assert error(found, expected.double()) < 1e-5
    assert all(call == (change != "double") for call in calls[-3:])  # float64 has no kernel


@pytest.mark.parametrize("change", ["adapter", "class", "forward", "activation", "tensor", "heads"])
def test_what_is_put_into_a_block_is_called(change: str, calls: Calls) -> None:
    """C++ does not compute what it has not been compared with, and reads no weight of another shape."""
    model, tokens = make(), torch.randint(1, 94, (1, 7))
    model_fused = fused(model)
    with torch.no_grad():
        decoded(model_fused, tokens)
        for each in (model, model_fused):
            change_block(each.model.layers[1], change)
        calls.clear()
        found, expected = (decoded(m, tokens) for m in (model_fused, model))
    assert error(found, expected.double()) < 1e-5
    assert calls[-3:] == [True, False, True]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def change_block(layer: Any, change: str) -> None:
    mlp, attention = layer.mlp, layer.self_attn
    if change == "adapter":  # as the layers of PEFT, it has a weight of its own
        mlp.up_proj = Doubled(36, 52, bias=False)
        mlp.up_proj.weight.fill_(0.1)
    elif change == "class":
        mlp.up_proj.__class__ = Doubled
    elif change == "forward":
        forward = mlp.forward
        mlp.forward = lambda x: 2 * forward(x)
    elif change == "activation":
        mlp.act_fn = nn.Tanh()
    elif change == "tensor":
        mlp.up_proj.weight = nn.Parameter(Wrapped(mlp.up_proj.weight.data), requires_grad=False)
    else:  # 3 of 6, and 1 of 2 of keys and values
        for linear, kept in ((attention.q_proj, 30), (attention.k_proj, 10), (attention.v_proj, 10)):
            linear.weight = nn.Parameter(linear.weight[:kept].clone())
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :30].clone())


class Wrapped(Tensor):
    """Without memory of its own, as quantised weights are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype)  # type: ignore[attr-defined]

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        plain = [arg.held if isinstance(arg, Wrapped) else arg for arg in args]
        out = op(*plain, **(kwargs or {}))
        return Wrapped(out) if op is torch.ops.aten.detach.default else out


def test_a_mask_that_is_written_over_between_steps(calls: Calls) -> None:
    model, tokens = make(), torch.randint(1, 94, (1, 8))
    model_fused, logits = fused(model), []
    for each in (model_fused, model):
        past = transformers.StaticCache(config=model.config, max_cache_len=12)
        mask = torch.ones(1, 1, 5, 12, dtype=torch.bool).tril()
        with torch.inference_mode():  # whose tensors do not count what is written to them
            each(input_ids=tokens[:, :5], past_key_values=past, attention_mask=mask)
            mask = torch.zeros(1, 1, 1, 12, dtype=torch.bool)
            mask[..., :5] = True
            calls.clear()
            for i in range(5, 8):
                mask[..., i] = True
                given = {"attention_mask": mask, "position_ids": torch.tensor([[i]])}
                output = each(input_ids=tokens[:, i : i + 1], past_key_values=past, **given)
        logits.append(output.logits[:, -1])
        assert all(calls)
    assert error(logits[0], logits[1].double()) < 1e-5


def test_torchs_default_dtype_and_device_do_not_matter() -> None:
    model, tokens = make("llama"), torch.randint(1, 94, (3, 7))
    model_fused = fused(model)
    with torch.no_grad():
        past = model_fused(input_ids=tokens[:, :6], use_cache=True).past_key_values
        expected = decoded(model_fused, tokens)
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = model_fused(input_ids=tokens[:, 6:], past_key_values=past).logits[:, -1]
        finally:
            torch.set_default_dtype(torch.float32)
        layer, native = model_fused.model.layers[0], blocks.ways(model_fused, model_fused.model.layers[0], 3)[1]
        out = native()
        with torch.device("meta"):
            assert torch.equal(native(), out)
    assert blocks.runs_native(layer)
    assert torch.equal(found, expected)


def test_threads_apart() -> None:
    model, tokens = make("gemma3"), torch.randint(1, 94, (4, 7))
    model_fused = fused(model)
    with torch.no_grad():
        expected = [decoded(model, row[None]) for row in tokens]

    @torch.no_grad()
    def run(i: int) -> float:
        return max(error(decoded(model_fused, tokens[i : i + 1]), expected[i].double()) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, range(4))) < 1e-5


def test_gradients_hooks_and_training_go_their_own_way(calls: Calls) -> None:
    model, tokens = make(), torch.randint(1, 94, (1, 7))
    model_fused = fused(model)
    calls.clear()
    decoded(model_fused, tokens).sum().backward()
    assert not any(calls)
    assert torch.count_nonzero(model_fused.model.layers[0].mlp.up_proj.weight.grad)
    seen: list[int] = []
    handle = model_fused.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        calls.clear()
        decoded(model_fused, tokens)
        assert len(seen) == 2
        assert calls[-3:] == [True, False, True]
        handle.remove()
        model_fused.train()
        calls.clear()
        decoded(model_fused, tokens)
    assert not any(calls)


def test_eager_attention_returns_attentions(calls: Calls) -> None:
    model, tokens = make(), torch.randint(1, 94, (1, 7))
    model_fused = fused(model)
    for each in (model, model_fused):
        each.set_attn_implementation("eager")
    calls.clear()
    found, expected = (generated(m, tokens, output_attentions=True) for m in (model_fused, model))
    assert not any(calls)
    torch.testing.assert_close(found.attentions[-1][0], expected.attentions[-1][0])


def test_hidden_states(calls: Calls) -> None:
    model, tokens = make(), torch.randint(1, 94, (1, 7))
    model_fused = fused(model)
    found, expected = (generated(m, tokens, output_hidden_states=True).hidden_states[-1] for m in (model_fused, model))
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    calls.clear()
    generated(model_fused, tokens)  # transformers' hooks are still there
    assert sum(calls) == 5 * 3
    fused(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_too_and_apart(copied: Any, calls: Calls) -> None:
    model, tokens = make(), torch.randint(1, 94, (1, 7))
    model_fused = fused(model)
    expected = generated(model_fused, tokens)
    other = copied(model_fused)
    with torch.no_grad():
        for parameter in model_fused.parameters():
            parameter.zero_()
    calls.clear()
    assert_alike(generated(other, tokens), expected)
    assert sum(calls) == 5 * 3


def test_names_and_files_stay(tmp_path: Path) -> None:
    model, tokens = make(), torch.randint(1, 94, (1, 7))
    model_fused = fused(model)
    assert model_fused.state_dict().keys() == model.state_dict().keys()
    assert isinstance(model_fused.model.layers[0], type(model.model.layers[0]))
    assert type(model_fused.model.layers[0]).__name__ == "LlamaDecoderLayer"
    model_fused.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_alike(generated(loaded, tokens), generated(model_fused, tokens))


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="transformers compiles on torch 2.7 and newer")
def test_torch_compile(calls: Calls) -> None:
    model, tokens = make(), torch.randint(1, 94, (1, 7))
    model_fused = fused(model)
    compiled = torch.compile(model_fused, backend="eager")
    with torch.no_grad():
        calls.clear()
        found = decoded(compiled, tokens)
        assert not any(calls)
        assert error(found, decoded(model, tokens).double()) < 1e-5


def test_decisions() -> None:
    model = make()
    report = fasticl.convert(model, min_speedup=1e9, tokens=(1, 128))
    assert not report.fused_blocks
    assert "decoder_block would be" in report.blocks[0].reason
    assert not any(isinstance(layer, blocks.FusedBlock) for layer in model.modules())
    report = fasticl.convert(model, min_speedup=0)
    assert report.fused_blocks == [f"model.layers.{i}" for i in range(3)]
    assert report.blocks[0].ms_dense.keys() == {1}
    assert "3 of 3 blocks decode in C++" in str(report)
    assert fasticl.explain(model).count("already in C++") == 3
    assert not fasticl.convert(model, tokens=(128,)).blocks
    assert not fasticl.convert(nn.Sequential(nn.Linear(4, 4)).eval()).blocks
    assert "training" in fasticl.convert(make().train(), min_speedup=0).blocks[0].reason


class Adapter(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x[..., :1]


@pytest.mark.parametrize("kind", ["adapter", "subclass"])
def test_blocks_that_compute_something_else_stay(kind: str) -> None:
    model = make()
    up = model.model.layers[2].mlp.up_proj
    if kind == "adapter":
        model.model.layers[2].mlp.up_proj = Adapter(up)
    else:
        up.__class__ = Doubled
    report = fasticl.convert(model, min_speedup=0)
    assert not report.fused_blocks
    assert "model.layers.2" in report.blocks[0].reason


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])  # phi's has a bias
def test_a_dense_head_by_rows(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name).to(dtype)
    report = fasticl.convert(copy.deepcopy(model), min_speedup=0, tokens=(1, 3))
    head = report.model.get_output_embeddings()
    assert report.head is not None
    assert (report.head.kernel, report.head.shape) == ("dense by rows", tuple(head.weight.shape))
    assert set(report.head.speedup) == {1, 3}
    assert "dense by rows" in str(report)
    plain = model.get_output_embeddings()
    by_torch = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: by_torch.append(None) or linear(*args))
    for tokens, expected in ((1, 0), (3, 0), (4, 1)):
        x = torch.randn(tokens, 1, head.in_features).to(dtype)
        with torch.inference_mode():
            found = head(x)
            assert len(by_torch) == expected
            exact = linear(x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double())
        assert found.shape == exact.shape
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)
    assert head(x[:1]).requires_grad  # where they are wanted, by PyTorch
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert head(x[:1].float()).dtype == torch.bfloat16


def test_a_head_by_rows_stays_what_it_is(tmp_path: Path) -> None:
    model = fasticl.convert(make("llama", torch.bfloat16, tie_word_embeddings=True), min_speedup=0).model
    tokens = torch.randint(1, 94, (1, 5))
    fasticl.save_pretrained(model, tmp_path / "saved")
    again = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fasticl.from_pretrained(tmp_path / "saved")]
    for other in again:
        head = other.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        assert type(head).__name__ == "Linear"
        assert isinstance(head, blocks.FusedHead) == (other is not again[2])  # files do not know how it ran
        assert head.weight is other.get_input_embeddings().weight
        assert torch.equal(generated(other, tokens).sequences, generated(model, tokens).sequences)
    assert fasticl.convert(model, min_speedup=1e9).head.kernel == "dense"
    assert type(model.get_output_embeddings()) is nn.Linear


def test_heads_that_are_left_alone() -> None:
    assert fasticl.convert(make("llama"), min_speedup=0).head is None  # PyTorch reads float32 as fast
    assert fasticl.convert(make("llama").bfloat16(), min_speedup=0, tokens=(64,)).head is None
    assert fasticl.convert(nn.Linear(8, 8).bfloat16(), min_speedup=0).head is None
    packed = make("llama").bfloat16()
    fasticl.sparsify_(packed, fasticl.Magnitude(0.5), filter_fn=lambda module, name: True)
    report = fasticl.convert(packed, min_speedup=0, skip=())
    assert isinstance(report.model.get_output_embeddings(), SparseLinear)
    assert report.head is None
    again = fasticl.convert(make("llama").bfloat16(), min_speedup=0).model
    fasticl.convert(again, min_speedup=0, skip=(), values="int8")
    assert isinstance(again.get_output_embeddings(), SparseLinear)  # by rows so far, and a linear like any other
    hooked = make("llama").bfloat16()
    hooked.lm_head.register_forward_hook(lambda *_: None)
    assert fasticl.convert(hooked, min_speedup=0).head is None
