"""A SmolLM2-135M-shaped model with random weights: a prompt, and one more token by transformers and by fasticl.Decoder.

Beside them, where it is installed, llama.cpp on the same weights in 4 bits.
Its LM head is its embedding: 21 % of the weights, which stay dense, in the model's dtype or (int8) in int8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial

import llama_cpp_baseline
import torch
from bench_model import decode, nonzeros, prefill, weight_bytes
from common import DTYPES, Case, Contender, Truth, generator
from torch import Tensor, nn

import fasticl

LLAMA_CPP_TOLERANCE = 0.05  # of its logits: it rounds what it multiplies its weights with to 8 bits
TOKENS = 128  # before the one that is decoded
PROMPT = 512
SPARSITIES = (0.5, 0.8)
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


@lru_cache(maxsize=1)
def models(dtype: torch.dtype, **sizes: int) -> dict[tuple[str, float], nn.Module]:
    """The dense model; and for each sparsity the masked one, and converted with values of its own dtype and int8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, **sizes})).to(dtype).eval().requires_grad_(False)
    found: dict[tuple[str, float], nn.Module] = {("torch", 0.0): dense}
    for sparsity in SPARSITIES:
        pruned = copy.deepcopy(dense)
        fasticl.sparsify_(pruned, fasticl.Magnitude(sparsity))
        found["masked", sparsity] = pruned
        found["fasticl", sparsity] = fasticl.convert(copy.deepcopy(pruned)).model
        found["fasticl+int8", sparsity] = fasticl.convert(copy.deepcopy(pruned), values="int8", skip=()).model
    return found


def step(model: nn.Module) -> Callable[[], Tensor]:
    """Logits ``[vocabulary]`` of the token after so many, by a Decoder; overwritten by the next call."""
    tokens = torch.randint(model.config.vocab_size, (TOKENS + 1,), generator=generator(TOKENS + 1))
    decoder = fasticl.Decoder(model, length=2 * TOKENS)
    decoder.prefill(tokens[:-1])

    def call() -> Tensor:
        decoder.position = TOKENS
        return decoder.step(int(tokens[-1]))

    return call


def llama_cpp(model: nn.Module, exact: Callable[[nn.Module], Callable[[], Tensor]], count: int) -> Contender:
    """``count`` tokens by llama.cpp: those of a prompt, or one behind it."""
    length = TOKENS + 1 if count == 1 else count
    tokens = torch.randint(model.config.vocab_size, (length,), generator=generator(length)).tolist()
    theirs = llama_cpp_baseline.LlamaCpp(model)
    truth = Truth(exact(theirs.rounded.double())(), LLAMA_CPP_TOLERANCE)
    call = theirs.after(tokens[:-count], tokens[-count:])
    return Contender("llama_cpp_q4_1", [call], truth, theirs.bytes, 2 * nonzeros(model) * count, own_pool=True)


def decoder_case(
    shape: str, dtype: str, ways: dict[str, Callable[[nn.Module], Callable[[], Tensor]]], tokens: int, **sizes: int
) -> Case:
    """``ways`` of computing logits with a model, by what they add to its name; the first also gives the truth."""
    exact = next(iter(ways.values()))

    def build() -> list[Contender]:
        found = []
        truths: dict[tuple[bool, float], Truth] = {}
        every = models(DTYPES[dtype], **sizes)
        for (impl, sparsity), model in every.items():
            int8 = impl == "fasticl+int8"
            if (int8, sparsity) not in truths:  # torch's and the masked model come first, int8 has weights of its own
                expected, own = exact(copy.deepcopy(model).double())(), exact(model)()
                truths[int8, sparsity] = Truth.against(expected, own)
            truth = truths[int8, sparsity]
            count = 2 * nonzeros(every["masked", sparsity] if sparsity else model) * tokens
            pattern = "unstructured" if sparsity else "dense"
            for added, way in ways.items():
                if impl == "masked" and added:
                    continue
                row = (truth, weight_bytes(model), count, sparsity, pattern)
                name = (impl.replace("torch", "fasticl") if added else impl) + added
                found.append(Contender(name, [way(model)], *row, dense=name == "torch"))
        if dtype == "bfloat16" and llama_cpp_baseline.available():
            found.append(llama_cpp(every["torch", 0.0], exact, tokens))
        return found

    return Case("decoder", dtype, f"smollm2-135M-{shape}", 1, build, "cold", "headline")


def cases(quick: bool) -> list[Case]:
    if quick:
        return []
    return [
        decoder_case(name, dtype, ways, tokens)
        for dtype in ("bfloat16", "float32")
        for name, ways, tokens in (
            (f"decode{TOKENS}", {"": decode, "+decoder": step}, 1),
            (f"prefill{PROMPT}", {"": partial(prefill, length=PROMPT)}, PROMPT),
        )
    ]
