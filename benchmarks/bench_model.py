"""A GPT-2-124M-shaped model with random weights: a prompt of 128 tokens, and one more token after it.

Twice: as transformers runs it, and as a plain module without what transformers does around the layers (masks, cache
objects, hooks).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from itertools import chain

import torch
import torch.nn.functional as F
from common import Case, Contender, Truth, generator
from linear import bytes_of
from torch import Tensor, nn

import fasticl

PROMPT_TOKENS = 128
SPARSITIES = (0.5, 0.8)
GPT2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}


class Attention(nn.Module):
    """Causal attention of one sequence, whose keys and values stay in place: ``[2, heads, positions, d]``."""

    def __init__(self, n_embd: int, n_head: int, n_positions: int) -> None:
        super().__init__()
        self.heads = n_head
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.register_buffer("cache", torch.zeros(2, n_head, n_positions, n_embd // n_head), persistent=False)

    def forward(self, x: Tensor, first: int) -> Tensor:
        """``x [tokens, n_embd]``, the first of them at position ``first``."""
        end = first + len(x)
        q, k, v = self.c_attn(x).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        self.cache[0, :, first:end], self.cache[1, :, first:end] = k, v
        keys, values = self.cache[:, None, :, :end]
        y = F.scaled_dot_product_attention(q[None], keys, values, is_causal=first == 0 and end > 1)
        return self.c_proj(y[0].transpose(0, 1).flatten(1))


class MLP(nn.Module):
    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, n_positions: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn, self.mlp = Attention(n_embd, n_head, n_positions), MLP(n_embd)

    def forward(self, x: Tensor, first: int) -> Tensor:
        x = x + self.attn(self.ln_1(x), first)
        return x + self.mlp(self.ln_2(x))


class PlainGPT2(nn.Module):
    """GPT-2 for one sequence. A prompt starts at position 0; what follows it comes token by token."""

    def __init__(self, vocab_size: int, n_positions: int, n_embd: int, n_layer: int, n_head: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(n_positions, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head, n_positions) for _ in range(n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, tokens: Tensor, first: int) -> Tensor:
        """Logits ``[vocab_size]`` after the last of ``tokens [n]``, which stand at positions ``first`` and on."""
        x = self.wte(tokens) + self.wpe.weight[first : first + len(tokens)]
        for block in self.h:
            x = block(x, first)
        return self.lm_head(self.ln_f(x[-1:]))[0]


@lru_cache(maxsize=1)
def models(library: str, **sizes: int) -> dict[tuple[str, float], nn.Module]:
    """GPT-2 of ``library`` ("plain" or "transformers") in ``sizes`` other than its own, by (impl, sparsity).

    The dense model; and for each sparsity the pruned one with masked dense layers, and converted without and with its
    LM head.
    """
    sizes = {**GPT2, **sizes}
    if library == "plain":
        dense: nn.Module = PlainGPT2(**sizes)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        # The embedding stays dense when the LM head is pruned.
        dense = GPT2LMHeadModel(GPT2Config(tie_word_embeddings=False, **sizes))
    dense = dense.eval().requires_grad_(False)
    found: dict[tuple[str, float], nn.Module] = {("torch", 0.0): dense}
    for sparsity in SPARSITIES:
        pruned = copy.deepcopy(dense)
        fasticl.sparsify_(pruned, fasticl.Magnitude(sparsity), filter_fn=lambda module, name: True)
        found["masked", sparsity] = pruned
        found["fasticl", sparsity] = fasticl.convert(copy.deepcopy(pruned)).model
        found["fasticl+head", sparsity] = fasticl.convert(copy.deepcopy(pruned), skip=()).model
    return found


def prefill(model: nn.Module, length: int = PROMPT_TOKENS) -> Callable[[], Tensor]:
    """Logits ``[vocabulary]`` after a prompt of so many tokens."""
    tokens = _tokens(model, length)

    def call() -> Tensor:
        with torch.inference_mode():
            if isinstance(model, PlainGPT2):
                return model(tokens[0], 0)
            return model(tokens, use_cache=True, logits_to_keep=1).logits[0, -1]

    return call


def decode(model: nn.Module) -> Callable[[], Tensor]:
    """Logits ``[vocabulary]`` of the token after the prompt, whose keys and values are cached."""
    tokens = _tokens(model, PROMPT_TOKENS + 1)
    if isinstance(model, PlainGPT2):
        with torch.inference_mode():
            model(tokens[0, :-1], 0)

        def plain() -> Tensor:
            with torch.inference_mode():
                return model(tokens[0, -1:], PROMPT_TOKENS)

        return plain

    with torch.inference_mode():
        cache = model(tokens[:, :-1], use_cache=True).past_key_values

    def call() -> Tensor:
        with torch.inference_mode():
            logits = model(tokens[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1]
            cache.crop(-1)
            return logits

    return call


def _tokens(model: nn.Module, length: int) -> Tensor:
    """``[1, length]``."""
    return torch.randint(model.lm_head.out_features, (1, length), generator=generator(length))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights as stored, embeddings excepted: of those a token reads one row."""
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding | Attention)]  # its cache
    tensors = chain.from_iterable(chain(m.parameters(recurse=False), m.buffers(recurse=False)) for m in layers)
    return bytes_of(*tensors)


def nonzeros(model: nn.Module) -> int:
    """Weights of the linears that are not zero."""
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    weights = [m.weight for m in layers if isinstance(getattr(m, "weight", None), Tensor) and m.weight.ndim == 2]
    return sum(int(torch.count_nonzero(weight)) for weight in weights)


def model_case(
    library: str, name: str, run: Callable[[nn.Module], Callable[[], Tensor]], tokens: int, **sizes: int
) -> Case:
    def build() -> list[Contender]:
        truths, counts = {}, {}
        for (impl, sparsity), model in models(library, **sizes).items():
            if impl in ("torch", "masked"):
                expected = run(copy.deepcopy(model).double())()
                counts[sparsity] = nonzeros(model)
                truths[sparsity] = Truth.against(expected, run(model)())
        found = []
        for (impl, sparsity), model in models(library, **sizes).items():
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

    shape = f"gpt2-124M-{name}" if library == "plain" else f"gpt2-124M-{library}-{name}"
    return Case("model", "float32", shape, 1, build, "cold", "headline")


def cases(quick: bool) -> list[Case]:
    if quick:
        return []
    return [
        model_case(library, name, run, tokens)
        for library in ("plain", "transformers")
        for name, run, tokens in ((f"prefill{PROMPT_TOKENS}", prefill, PROMPT_TOKENS), ("decode", decode, 1))
    ]
