"""The decoder of GPUs: its step on CPU tensors against transformers, a double of CUDA graphs, and a GPU where there is.

The double (:class:`FakeCuda`) captures as real graphs do: operations are recorded with their tensors, what they return
is overwritten, nothing may look at a tensor's elements, and a replay runs them on those tensors again.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_decoder import MODELS, error, exact_logits, make, prune
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fasticl
from fasticl import decoder_cuda
from fasticl.architectures import parts_of
from fasticl.nn import SparseLinear, SparseMLP

transformers = pytest.importorskip("transformers", minversion="5")

pytestmark = pytest.mark.filterwarnings("ignore:Magnitude:UserWarning")

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)], ids=["float32", "bfloat16"]
)
ONE_OP = {"llama", "llama3 angles", "llama with biases", "qwen2", "gpt2", "gpt_neox in turn", "opt"}


class Recording(TorchDispatchMode):
    """What a CUDA graph holds: each operation, its arguments, and the tensors that it wrote to."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if op in (aten.item.default, aten._local_scalar_dense.default, aten.nonzero.default):
            raise RuntimeError(f"{op}: operation not permitted when stream is capturing")
        out = op(*args, **kwargs)
        self.ops.append((op, args, kwargs, out))
        return out

    def outputs(self) -> Iterator[tuple[Any, Any, Any, Tensor, bool]]:
        """With whether the output is a tensor of the operation's own, neither written in place nor a view."""
        for op, args, kwargs, out in self.ops:
            given = {t.untyped_storage().data_ptr() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
            for each in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(each, Tensor):
                    yield op, args, kwargs, each, each.untyped_storage().data_ptr() not in given


class FakeGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.recording, self.replays = Recording(), 0

    def pool(self) -> int:
        return 7

    def replay(self) -> None:
        self.replays += 1
        for op, args, kwargs, out in self.recording.ops:
            found = op(*args, **kwargs)
            if isinstance(out, Tensor):
                found, out = (found,), (out,)
            for new, old in zip(found or (), out or (), strict=True):
                if isinstance(new, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        assert isinstance(other, FakeStream)
        assert other is not self


class FakeCuda:
    """In place of torch.cuda, as far as :class:`fasticl.decoder_cuda.Graphs` uses it."""

    Stream, CUDAGraph = FakeStream, FakeGraph

    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []
        self.pools: list[Any] = []
        self.side = False
        self.current = FakeStream()

    def device(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def current_stream(self) -> FakeStream:
        return self.current

    def set_stream(self, stream: FakeStream) -> None:
        self.current = stream

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.side = True  # a warm-up
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, pool: Any, stream: FakeStream) -> Iterator[None]:
        assert self.side, "captured without a warm-up on a side stream"
        self.side = False
        self.pools.append(pool)
        before, self.current = self.current, stream
        with graph.recording:
            yield
        self.current = before  # as in torch, not where capturing has failed
        for *_, out, own in graph.recording.outputs():  # capturing computes nothing
            if own and out.is_floating_point():
                out.fill_(torch.nan)
        self.graphs.append(graph)


class StaticDecoder(fasticl.Decoder):
    """As on a GPU, but on CPU tensors."""

    def _make_native(self, model: Any) -> None:
        self._make_static(model)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Graphs are captured and replayed by the double."""
    fake = FakeCuda()
    monkeypatch.setattr(decoder_cuda, "cuda", fake)
    return fake


@pytest.fixture(autouse=True)
def eager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the double every step runs itself; what convert times does not matter."""
    if "cuda" not in request.fixturenames:
        monkeypatch.setattr(fasticl.decoder, "Graphs", lambda run, device: run)
    monkeypatch.setattr(importlib.import_module("fasticl.convert"), "SECONDS", 1e-4)


def one_ops(decoder: StaticDecoder) -> list[bool]:
    return [isinstance(layer, decoder_cuda._OneOp) for layer, _ in decoder._static._layers]


def stepwise(decoder: StaticDecoder, tokens: Tensor, prompt: int) -> Tensor:
    """Logits after each token from the end of the prompt on; what lies behind a position counts nothing."""
    logits = [decoder.prefill(tokens[:prompt]).clone()]
    for token in tokens[prompt:].tolist():
        decoder._cache[:, :, :, :, decoder.position :] = 1e4
        decoder._static.logits.fill_(torch.nan)
        logits.append(decoder.step(token).clone())
    return torch.stack(logits)


@pytest.mark.parametrize("name", MODELS)
@DTYPES
def test_logits_are_the_models(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, tokens = make(name, dtype), torch.randint(95, (14,))
    expected = exact_logits(model, tokens)[3:]
    decoder = StaticDecoder(model)
    assert one_ops(decoder) == [name in ONE_OP] * 3 or name == "gpt2 by layer"
    found = stepwise(decoder, tokens, 4)
    assert error(found, expected) < tolerance
    native = fasticl.Decoder(model)
    native.prefill(tokens[:-1])
    assert error(found[-1], native.step(int(tokens[-1])).double()) < tolerance


@pytest.mark.parametrize(
    ("sparsity", "pattern", "format", "values"),
    [
        (0.5, "unstructured", "bitmap", None),
        (0.9, "unstructured", "sliced", None),
        (0.5, "2:4", "nm", None),
        (0.5, "unstructured", "compact", None),
        (0.5, "neuron", "auto", None),
        (0.5, "unstructured", "auto", "int8"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_layers(name: str, sparsity: float, pattern: str, format: str, values: str | None) -> None:
    model, tokens = prune(make(name), sparsity, pattern), torch.randint(95, (9,))
    converted = fasticl.convert(model, format=format, values=values, min_speedup=0.0, skip=()).model
    packed = [module for module in converted.modules() if isinstance(module, SparseLinear)]
    assert packed or any(isinstance(module, SparseMLP) for module in converted.modules())
    expected = exact_logits(converted, tokens)[4:]
    decoder = StaticDecoder(converted)
    assert one_ops(decoder) == [pattern == "neuron" and name in ONE_OP] * 3  # dead neurons leave smaller dense linears
    assert error(stepwise(decoder, tokens, 5), expected) < 2e-5


def test_packed_mlps_run_as_their_op(monkeypatch: pytest.MonkeyPatch) -> None:
    converted, calls = fasticl.convert(prune(make()), format="bitmap", min_speedup=0.0).model, []
    assert all(isinstance(layer.mlp, SparseMLP) for layer in converted.model.layers)
    decoder, forward = StaticDecoder(converted), SparseMLP.forward
    monkeypatch.setattr(SparseMLP, "forward", lambda self, x: calls.append(self) or forward(self, x))
    decoder.step(3)
    assert calls == [layer.mlp for layer in converted.model.layers]


def test_blocks_that_lost_all_neurons_or_weights() -> None:
    model, tokens = make("llama with biases"), torch.randint(95, (9,))
    with torch.no_grad():
        for linear in (model.model.layers[1].mlp.up_proj, model.model.layers[2].self_attn.o_proj):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    expected = exact_logits(model, tokens)[2:]
    converted = fasticl.convert(model, min_speedup=0.0).model
    assert converted.model.layers[1].mlp.up.out_features == 0
    decoder = StaticDecoder(converted)
    assert not one_ops(decoder)[1]
    assert error(stepwise(decoder, tokens, 3), expected) < 1e-5


def test_a_window_as_long_as_the_cache_is_none() -> None:
    model, tokens = make("mistral"), torch.randint(95, (5,))
    decoder = StaticDecoder(model, length=5)
    assert all(one_ops(decoder))
    assert error(stepwise(decoder, tokens, 2), exact_logits(model, tokens)[1:]) < 1e-5


def test_norms_that_differ_are_not_one_op() -> None:
    model, tokens = make(), torch.randint(95, (7,))
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 0.7
    decoder = StaticDecoder(model)
    assert one_ops(decoder) == [True, False, True]
    assert error(stepwise(decoder, tokens, 3), exact_logits(model, tokens)[2:]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_which_weights_are_copied(name: str) -> None:
    model = make(name)
    held = StaticDecoder(model)._static._layers[0][0]._weights
    own = {parameter.data_ptr() for parameter in model.parameters()}
    shared = {part for part, t in vars(held).items() if isinstance(t, Tensor) and t.dim() == 2 and t.data_ptr() in own}
    assert shared == ({"out", "up", "gate", "down"} if name == "llama" else set())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@DTYPES
def test_sequences_together_are_each_by_itself(name: str, dtype: torch.dtype, tolerance: float, cuda: FakeCuda) -> None:
    """Of any lengths, by replays of one graph, whatever lies elsewhere in the cache."""
    model, prompts = make(name, dtype), [torch.randint(95, (n,)) for n in (3, 9, 1)]
    tokens = torch.randint(95, (4, 3))
    together = StaticDecoder(model, length=13, sequences=3)
    together._cache.fill_(-1e4)
    for i in (2, 0, 1):
        together.prefill(prompts[i], sequence=i)
    for row in tokens:
        together._static.logits.fill_(torch.nan)
        found = together.step(row.tolist())
        prompts = [torch.cat([prompt, token[None]]) for prompt, token in zip(prompts, row, strict=True)]
        for logits, whole in zip(found, prompts, strict=True):
            assert error(logits, exact_logits(model, whole)[-1]) < tolerance
    assert together.positions == [7, 13, 5]
    assert [graph.replays for graph in cuda.graphs] == [4, 4]  # of one sequence, when it was made, and of three


def test_a_batch_of_texts_is_each_text(cuda: FakeCuda) -> None:
    """Where one text has ended, and no other waits, or sequences are out of their order."""
    model = make()
    prompts = [torch.randint(95, (n,)).tolist() for n in (3, 9, 1, 5, 2, 4)]
    native = fasticl.Decoder(model, length=16)
    stop = [list(native.generate(prompts[3], max_new_tokens=2, stop=[]))[1]]
    expected = [list(native.generate(prompt, max_new_tokens=8, stop=stop)) for prompt in prompts]
    assert len({len(text) for text in expected}) > 1
    for sequences in (1, 2, 4):
        several = StaticDecoder(model, length=16, sequences=sequences)
        assert several.generate_batch(prompts, max_new_tokens=8, stop=stop) == expected
        assert several.generate_batch(prompts[::-1], max_new_tokens=8, stop=stop) == expected[::-1]
    assert set(cuda.pools) == {None, 7}  # the first graph of a decoder makes the pool of all


def test_a_sequence_that_is_not_decoded_stays_as_it_is(cuda: FakeCuda) -> None:
    """Though it takes part in the step, at the end of the cache too."""
    model, texts = make("qwen3"), torch.randint(95, (3, 8))
    decoder = StaticDecoder(model, length=8, sequences=3)
    for i, read in enumerate((8, 5, 2)):
        decoder.prefill(texts[i, :read], sequence=i)
    for _ in range(2):
        decoder._step((2,), (3,))
    assert decoder.positions == [8, 5, 4]
    logits = decoder._step((2, 1), (texts[2, 4], int(texts[1, 5])))
    assert error(logits[1], exact_logits(model, texts[1, :6])[-1]) < 1e-5
    whole = torch.cat([texts[2, :2], torch.tensor([3, 3]), texts[2, 4:5]])
    assert error(logits[0], exact_logits(model, whole)[-1]) < 1e-5
    decoder.prefill(texts[0, :3])
    logits = decoder._step((1, 0), (int(texts[1, 6]), int(texts[0, 3])))  # all up to the last, but out of order
    for row, whole in zip(logits, (texts[1, :7], texts[0, :4]), strict=True):
        assert error(row, exact_logits(model, whole)[-1]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_prompt_appended(name: str, cuda: FakeCuda) -> None:
    model, tokens = make(name), torch.randint(95, (14,))
    expected, decoder = exact_logits(model, tokens), StaticDecoder(model)
    decoder.prefill(tokens[:3])
    decoder.step(int(tokens[3]))
    assert error(decoder.prefill(tokens[4:10], append=True), expected[9]) < 1e-5
    for i in range(10, 14):
        assert error(decoder.step(int(tokens[i])), expected[i]) < 1e-5


def test_generation_sampling_and_conversations_are_those_of_the_cpu(cuda: FakeCuda) -> None:
    model, first, second = make(), torch.randint(95, (6,)).tolist(), torch.randint(95, (4,)).tolist()
    texts = []
    for kind in (fasticl.Decoder, StaticDecoder):
        decoder = kind(model)
        options = {"max_new_tokens": 8, "stop": [], "temperature": 1.0, "top_k": 20, "top_p": 0.9}
        texts.append(list(decoder.generate(first, **options, generator=torch.Generator().manual_seed(1))))
        texts.append(list(decoder.generate(second, max_new_tokens=8, stop=[], append=True)))
    assert texts[:2] == texts[2:]


def test_what_another_text_left_does_not_spoil_the_next() -> None:
    model, tokens = make("qwen3"), torch.randint(95, (9,))
    decoder = StaticDecoder(model)
    decoder._cache.fill_(torch.inf)
    assert error(stepwise(decoder, tokens, 3)[0], exact_logits(model, tokens)[2]) < 1e-5
    decoder._cache.fill_(torch.inf)
    decoder.prefill(tokens[:3])
    assert error(decoder.step(int(tokens[3])), exact_logits(model, tokens)[3]) < 1e-5


def test_bad_arguments_and_models_are_refused_as_on_the_cpu() -> None:
    decoder = StaticDecoder(make(), length=8)
    decoder.prefill([1] * 8)
    with pytest.raises(ValueError, match=r"position: expected 0 to 7 \(length\), got 8"):
        decoder.step(1)
    with pytest.raises(ValueError, match=r"tokens: expected 0 to 94, got 95"):
        decoder.step(95)
    for name in ("llama", "qwen3"):
        model = make(name)
        out = model.model.layers[1].self_attn.o_proj
        out.weight = nn.Parameter(out.weight[:, :50].clone())
        with pytest.raises(ValueError, match=r"layer 1: expected a weight of \[36, 60\] by its config.*, got \[36, 50"):
            StaticDecoder(model)
        model = make(name)
        mlp = model.model.layers[0].mlp
        forward = mlp.forward
        mlp.forward = lambda x, forward=forward: 1.5 * forward(x)
        with pytest.raises(ValueError, match=r"ForCausalLM computes something that fasticl.Decoder does not: logits"):
            StaticDecoder(model)
    model = make()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match="model: expected on the CPU or on one CUDA device, got cpu and meta"):
        fasticl.Decoder(model)


@pytest.mark.parametrize("name", [*MODELS, "opt without weights of norms"])
def test_all_is_on_the_device_of_the_model(name: str) -> None:
    """On one whose tensors have no elements to look at, and mix with no other's."""
    model = make(name) if name in MODELS else make("opt", layer_norm_elementwise_affine=False)
    made = StaticDecoder(model, sequences=3)
    model, cache = made.model.to("meta"), made._cache.to("meta")
    angles = {kind: (cos.to("meta"), sin.to("meta")) for kind, (cos, sin) in made._tables.items()}
    with torch.inference_mode():
        step = decoder_cuda.Step(model, parts_of(model), cache, angles)
        step.run(2)
    held = [step.inputs, step.logits, step._count, *(table for tables in step._turns.values() for table in tables)]
    assert {tensor.device.type for tensor in held} == {"meta"}


def test_a_step_that_waits_for_the_device_is_refused(cuda: FakeCuda) -> None:
    model = make("qwen3")
    down = model.model.layers[2].mlp.down_proj
    down.forward = lambda x: nn.functional.linear(x, down.weight) * (2.0 if x.sum().item() == 1e9 else 1.0)
    before = cuda.current_stream()
    with pytest.raises(RuntimeError, match=r"model: expected a step that a CUDA graph can capture, got: .*capturing"):
        StaticDecoder(model)
    assert cuda.current_stream() is before


def test_the_double_forgets_nothing_and_computes_nothing_early(cuda: FakeCuda) -> None:
    """What it is for: a number that was taken from a tensor, or a tensor that was replaced, would be found."""
    static, out, calls = torch.zeros(2), torch.zeros(2), []

    def run(M: int) -> None:
        calls.append(M)
        out[:M].copy_(static[:M] * 2 + len(calls))

    graphs = decoder_cuda.Graphs(run, torch.device("cpu"))
    for step, M in enumerate((1, 2, 1, 2)):
        static.fill_(step)
        out.fill_(torch.nan)
        graphs(M)
        assert out[:M].tolist() == [2 * step + 2.0 * M] * M  # the warm-up was the one call before
    assert calls == [1, 1, 2, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "gpt_neox", "phi"])
@pytest.mark.parametrize("packed", [False, True])
@DTYPES
def test_on_a_gpu(name: str, packed: bool, dtype: torch.dtype, tolerance: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(fasticl.decoder, "Graphs", decoder_cuda.Graphs)
    model, prompts = make(name, dtype).cuda(), [torch.randint(95, (n,)) for n in (3, 9, 1)]
    if packed:
        model = fasticl.convert(prune(model), min_speedup=0.0).model
    exact, decoder = copy.deepcopy(model).cpu().double(), fasticl.Decoder(model, length=16, sequences=3)
    for i, prompt in enumerate(prompts):
        decoder.prefill(prompt, sequence=i)
    for row in torch.randint(95, (4, 3)):
        found = decoder.step(row.tolist())
        prompts = [torch.cat([prompt, token[None]]) for prompt, token in zip(prompts, row, strict=True)]
        for logits, whole in zip(found.cpu(), prompts, strict=True):
            with torch.no_grad():
                expected = exact(input_ids=whole[None], use_cache=False).logits[0, -1]
            assert error(logits, expected) < (1e-3 if dtype == torch.float32 else tolerance)
    drawn = decoder.generate_batch([prompt[:4] for prompt in prompts], max_new_tokens=3, temperature=1.0)
    assert all(1 <= len(text) <= 3 for text in drawn)
