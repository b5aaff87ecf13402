"""A GPT-2-124M-shaped model with random weights: a prompt of 128 tokens, and one more token after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from itertools import chain

import torch
from common import Case, Contender, Truth, generator
from linear import bytes_of
from torch import Tensor, nn

import fasticl

PROMPT_TOKENS = 128
SPARSITIES = (0.5, 0.8)


@lru_cache(maxsize=1)
def models(**sizes: int) -> dict[tuple[str, float], nn.Module]:
    """GPT-2 in ``sizes`` other than its own, by (impl, sparsity).

    The dense model; and for each sparsity the pruned one with masked dense layers, and converted without and with its
    LM head.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(tie_word_embeddings=False, **sizes)  # the embedding stays dense when the LM head is pruned
    dense = GPT2LMHeadModel(config).eval().requires_grad_(False)
    found: dict[tuple[str, float], nn.Module] = {("torch", 0.0): dense}
    for sparsity in SPARSITIES:
        pruned = copy.deepcopy(dense)
        fasticl.sparsify_(pruned, fasticl.Magnitude(sparsity), filter_fn=lambda module, name: True)
        found["masked", sparsity] = pruned
        found["fasticl", sparsity] = fasticl.convert(copy.deepcopy(pruned)).model
        found["fasticl+head", sparsity] = fasticl.convert(copy.deepcopy(pruned), skip=()).model
    return found


def prefill(model: nn.Module) -> Callable[[], Tensor]:
    """Logits ``[vocabulary]`` after a prompt."""
    tokens = _tokens(model, PROMPT_TOKENS)

    def call() -> Tensor:
        with torch.inference_mode():
            return model(tokens, use_cache=True, logits_to_keep=1).logits[0, -1]

    return call


def decode(model: nn.Module) -> Callable[[], Tensor]:
    """Logits ``[vocabulary]`` of the token after the prompt, whose keys and values are cached."""
    tokens = _tokens(model, PROMPT_TOKENS + 1)
    with torch.inference_mode():
        cache = model(tokens[:, :-1], use_cache=True).past_key_values

    def call() -> Tensor:
        with torch.inference_mode():
            logits = model(tokens[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1]
            cache.crop(-1)
            return logits

    return call


def _tokens(model: nn.Module, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, length), generator=generator(length))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers as stored, embeddings excepted: of those a token reads one row."""
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    tensors = chain.from_iterable(chain(m.parameters(recurse=False), m.buffers(recurse=False)) for m in layers)
    return bytes_of(*tensors)


def nonzeros(model: nn.Module) -> int:
    """Weights of the linears that are not zero."""
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    weights = [m.weight for m in layers if isinstance(getattr(m, "weight", None), Tensor) and m.weight.ndim == 2]
    return sum(int(torch.count_nonzero(weight)) for weight in weights)


def model_case(name: str, run: Callable[[nn.Module], Callable[[], Tensor]], tokens: int, **sizes: int) -> Case:
    def build() -> list[Contender]:
        truths, counts = {}, {}
        for (impl, sparsity), model in models(**sizes).items():
            if impl in ("torch", "masked"):
                expected = run(copy.deepcopy(model).double())()
                counts[sparsity] = nonzeros(model)
                truths[sparsity] = Truth.against(expected, run(model)())
        found = []
        for (impl, sparsity), model in models(**sizes).items():
            found.append(
                Contender(
                    impl,
                    [run(model)],
                    truths[sparsity],
                    weight_bytes(model),
                    2 * counts[sparsity] * tokens,
                    sparsity,
                    "unstructured" if sparsity else "dense",
                    dense=impl == "torch",
                )
            )
        return found

    return Case("model", "float32", f"gpt2-124M-{name}", 1, build, "cold", "headline")


def cases(quick: bool) -> list[Case]:
    if quick:
        return []
    return [model_case(f"prefill{PROMPT_TOKENS}", prefill, PROMPT_TOKENS), model_case("decode", decode, 1)]
