"""Decoding's attention for models whose blocks fasticl does not know, by transformers' ``AttentionInterface``.

``model.set_attn_implementation("fasticl")`` is "sdpa" but for one token each of any number of sequences on the CPU:
there C++ reads keys and values where they lie, once for all heads of a group (csrc/decoder.cpp).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasticl import _C
from fasticl.blocks import Shared, lies_by_rows, rows_of, seen_positions
from fasticl.ops._registry import DTYPES

NAME = "fasticl"
_shared = Shared()


def register() -> None:
    """Adds it to transformers' registries; its masks are those of "sdpa"."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scaling q k^T + mask) v``, ``[B, L, H, d]``, of query ``[B, H, L, d]`` and key, value ``[B, G, n, d]``.

    Query head h attends to group ``h G // H``. float32, bfloat16, float16; sums in float32. What C++ does not take
    (prompts, gradients, masks with holes or of scores) goes to "sdpa".
    """
    M, heads, length, d = query.shape
    more = any(value is not None for name, value in kwargs.items() if name in ("position_bias", "cache", "softcap"))
    plain = (
        length == 1 and query.is_cpu and query.dtype in DTYPES and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape and key.shape[3] == d and heads % key.shape[1] == 0
        and not more and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    )  # fmt: skip
    seen = None
    if plain and attention_mask is None:
        n = key.shape[2]
        seen = _shared.of(module, None, (M, n), lambda: torch.tensor([[0] * M, [n] * M]))
    elif plain and attention_mask is not None and attention_mask.shape[-1] == key.shape[2]:
        seen = _shared.of(module, attention_mask, (M,), partial(seen_positions, attention_mask, M))
    if seen is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query = query.contiguous()
    key, value = (x if lies_by_rows(x) else x.contiguous() for x in (key, value))
    out = torch.empty(M, 1, heads, d, dtype=query.dtype)
    _C.decode_attention(
        query.data_ptr(), M, heads, key.shape[1], d, d**-0.5 if scaling is None else scaling, rows_of(key),
        rows_of(value), seen.data_ptr(), out.data_ptr(), DTYPES[query.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out, None
