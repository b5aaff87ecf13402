"""The 3-layer, 2-head GPT-2 of the paper's experiments, reading the same prompts as the one-layer model."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fasticl.icl.data import check_integer


class ICLGPT2(nn.Module):
    """A causal GPT-2 over a prompt's columns ``p_1 ... p_L, p_query``; F is read off the query's position.

    Columns are embedded by a linear layer, F is another one of the last hidden state. Blocks are transformers' own
    (extra ``hf``), without dropout. The paper names layers and heads; width and positions are ours.

    Args:
        d: dimension of a column, ``d_x + d_y``.
        n_embd: width; a multiple of ``n_head``.
        n_layer: blocks.
        n_head: heads of each.
        max_length: the longest context, L.
        generator: seeds the initial weights; None takes torch's default one.

    Raises:
        ImportError: transformers is missing.
        ValueError: a size is out of its range.
    """

    def __init__(
        self,
        d: int = 60,
        n_embd: int = 64,
        *,
        n_layer: int = 3,
        n_head: int = 2,
        max_length: int = 40,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d": d, "n_embd": n_embd, "n_layer": n_layer, "n_head": n_head, "max_length": max_length}
        for name, size in sizes.items():
            check_integer(name, size, least=1)
        if n_embd % n_head:
            raise ValueError(f"n_embd: expected a multiple of n_head={n_head}, got {n_embd}")
        if find_spec("transformers") is None:
            raise ImportError("ICLGPT2 needs transformers: pip install 'fasticl[hf]'")
        from transformers import GPT2Config, GPT2Model

        config = GPT2Config(
            vocab_size=1,  # columns are embedded by ``read``; the token embedding is not used
            bos_token_id=None,
            eos_token_id=None,
            n_positions=max_length + 1,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one op rather than eight
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        with torch.random.fork_rng(devices=[]):  # GPT2Model draws from the global generator
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            self.read = nn.Linear(d, n_embd)
            self.blocks = GPT2Model(config)
            self.write = nn.Linear(n_embd, 1)
        self.blocks.set_attn_implementation("eager")  # the one that returns its attention
        self.blocks.wte.weight.requires_grad_(False)

    def forward(self, context: Tensor, query: Tensor) -> Tensor:
        """F of each prompt, ``[B]``.

        Args:
            context: ``[B, L, d]``.
            query: ``[B, d]``.

        Raises:
            ValueError: a shape does not fit.
        """
        hidden = self.blocks(inputs_embeds=self._embed(context, query)).last_hidden_state  # [B, L+1, n_embd]
        return self.write(hidden[:, -1]).squeeze(1)

    def attention(self, context: Tensor, query: Tensor) -> Tensor:
        """``[n_layer, B, L]``: attention of the query's position on the context, the mean over heads.

        What it pays to itself is left out and the rest scaled to sum to 1, as in the one-layer model's softmax.
        """
        found = self.blocks(inputs_embeds=self._embed(context, query), output_attentions=True).attentions
        paid = torch.stack([layer[:, :, -1, :-1].mean(dim=1) for layer in found])
        return paid / paid.sum(dim=-1, keepdim=True)

    def _embed(self, context: Tensor, query: Tensor) -> Tensor:
        """``[B, L+1, n_embd]``."""
        d, longest = self.read.in_features, self.blocks.config.n_positions - 1
        if query.dim() != 2 or query.shape[1] != d:
            raise ValueError(f"query: expected [B, d={d}], got {list(query.shape)}")
        if context.dim() != 3 or len(context) != len(query) or context.shape[2] != d:
            raise ValueError(f"context: expected [B={len(query)}, L, d={d}], got {list(context.shape)}")
        if context.shape[1] > longest:
            raise ValueError(f"context: expected at most max_length={longest} columns, got {context.shape[1]}")
        return self.read(torch.cat([context, query.unsqueeze(1)], dim=1))
