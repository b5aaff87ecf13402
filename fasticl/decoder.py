"""Text generation without Python between the layers: a language model's decoding step as one call into C++.

transformers runs a token through some hundred Python modules, which at one token take longer than the arithmetic of a
pruned model. :class:`Decoder` reads the prompt with the model itself, takes over its keys and values, and then decodes
on the weights of the same model, packed or dense, which it shares (csrc/decoder.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasticl import _C
from fasticl.nn import SparseLinear, SparseMLP, dense_bias, dense_weight
from fasticl.ops._registry import ACTIVATIONS, DTYPES, VALUE_DTYPES
from fasticl.parallel import check_whole

LENGTH = 2048  # positions that a Decoder has room for, unless the model has fewer or the caller wants another number
# By what may change in the rounding of a model in this dtype: its logits against ours, relative to the largest.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
_ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length of the text


@dataclass(frozen=True)
class _Block:
    """One block's modules; see DecoderBlock in csrc/decoder.h."""

    norm: nn.Module
    qkv: tuple[nn.Module, ...]  # (q, k, v), or one linear with the outputs of all
    out: nn.Module
    mlp_norm: nn.Module
    up: nn.Module
    down: nn.Module
    activation: str
    gate: nn.Module | None = None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    out_norm: nn.Module | None = None
    mlp_out_norm: nn.Module | None = None
    parallel: bool = False
    interleaved: bool = False  # one linear whose outputs are q, k and v of head 0, then of head 1, ...
    window: int | None = None
    scale: float | None = None  # None: d ** -0.5
    layer_type: str | None = None  # of rotary_emb, where it has angles for several


@dataclass(frozen=True)
class _Model:
    """What surrounds the blocks."""

    blocks: list[_Block]
    norm: nn.Module
    embedding: nn.Embedding
    positions: nn.Embedding | None = None  # learned ones
    first_position: int = 0  # the row of `positions` that belongs to position 0
    rotary: nn.Module | None = None


class Decoder:
    """Decodes one sequence at a time with a Hugging Face causal language model on the CPU.

    Every step computes, for the token at position n, ``logits = head(norm(block_L(... block_1(embedding))))`` with
    attention over the keys and values of positions 0..n; activations are float32, keys and values have the model's
    dtype. The model's weights are used where they lie, packed (:func:`fasticl.convert`) or dense, int8 values included:
    change none of them while a Decoder lives.

    Architectures: Llama, Mistral, Qwen2, Qwen3, Gemma 3, GPT-2, GPT-NeoX, OPT, Phi. Making one compares its logits with
    the model's own on a few tokens, so a variant that computes something else is refused, not approximated.

        decoder = fasticl.Decoder(fasticl.convert(model).model)
        for token in decoder.generate(tokenizer(prompt)["input_ids"], max_new_tokens=64):
            print(tokenizer.decode(token), end="", flush=True)

    Args:
        model: in evaluation mode, on the CPU, in float32, bfloat16 or float16.
        length: positions to have room for; None is the smaller of 2048 and what the model takes.

    Attributes:
        position: number of tokens read so far.

    Raises:
        TypeError: ``model`` is not such a module.
        ValueError: its architecture is not known, or computes something else; it is one process's part of a model
            (:func:`fasticl.parallelize`); ``length`` is out of range.
    """

    def __init__(self, model: Any, *, length: int | None = None) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(f"model: expected a Hugging Face causal language model, got {type(model).__name__}")
        config: Any = model.config
        text = config.get_text_config()
        if (family := _FAMILIES.get(text.model_type)) is None:
            raise ValueError(f"model: expected one of {', '.join(_FAMILIES)}, got model_type {text.model_type!r}")
        check_whole(model, "to decode with")
        if model.training:
            raise ValueError("model: expected evaluation mode, got training mode; call model.eval()")
        limit = getattr(text, "max_position_embeddings", LENGTH)
        length = min(LENGTH, limit) if length is None else length
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= limit:
            raise ValueError(f"length: expected 1 to {limit} positions, which the model takes, got {length!r}")
        self.model, self.length, self.position = model, length, 0
        self._parts = family(model, text)
        embedding = self._parts.embedding.weight
        if embedding.device.type != "cpu":
            raise ValueError(f"model: expected on the CPU, got {embedding.device}")
        self._dtype = embedding.dtype
        if self._dtype not in DTYPES:
            raise TypeError(f"model: expected float32, bfloat16 or float16, got {self._dtype}")
        self._held: list[Tensor] = []  # whose addresses C++ has
        with torch.no_grad():
            self._make(model, text)
            self._check(model, text)

    def _make(self, model: Any, config: Any) -> None:
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        D = self._parts.embedding.weight.shape[1]
        d = getattr(config, "head_dim", None) or D // heads
        shape = (2, len(self._parts.blocks), groups, self.length, d)
        self._cache = torch.zeros(shape, dtype=self._dtype)
        self._tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        blocks = []
        for block, keys, values in zip(self._parts.blocks, *self._cache, strict=True):
            step, sizes = (3 * d, (0, d, 2 * d)) if block.interleaved else (d, (0, heads * d, (heads + groups) * d))
            cos, sin = self._angles(block.layer_type)
            blocks.append(
                {
                    **{name: self._norm(getattr(block, name)) for name in ("norm", "q_norm", "k_norm", "out_norm")},
                    **{name: self._norm(getattr(block, name)) for name in ("mlp_norm", "mlp_out_norm")},
                    **{name: self._linear(getattr(block, name)) for name in ("out", "up", "down")},
                    "gate": None if block.gate is None else self._linear(block.gate),
                    "qkv": [self._linear(part) for part in block.qkv],
                    "q": (heads, sizes[0], step),
                    "k": (groups, sizes[1], step),
                    "v": (groups, sizes[2], step),
                    "scale": d**-0.5 if block.scale is None else block.scale,
                    "window": block.window or 0,
                    "cos": cos.data_ptr(),
                    "sin": sin.data_ptr(),
                    "rotary": 2 * cos.shape[1],
                    "keys": keys.data_ptr(),
                    "cached_values": values.data_ptr(),
                    "parallel": block.parallel,
                    "activation": ACTIVATIONS[block.activation],
                }
            )
        head = self._linear(model.get_output_embeddings())
        norm = self._norm(self._parts.norm)
        self._x, self._logits = torch.empty(D), torch.empty(head["N"])
        self._decoder = _C.Decoder(D, d, self.length, DTYPES[self._dtype], blocks, norm, head)

    def _hold(self, x: Tensor) -> int:
        self._held.append(x)
        return x.data_ptr()

    def _float(self, x: Tensor | None) -> int:
        return 0 if x is None else self._hold(x.detach().float().contiguous())

    def _norm(self, norm: Any) -> dict[str, Any] | None:
        if norm is None:
            return None
        centred = isinstance(norm, nn.LayerNorm)
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        weight = norm.weight if norm.weight is not None else torch.ones(norm.normalized_shape)
        if type(norm).__name__.startswith("Gemma"):
            weight = 1 + weight.float()
        return {"weight": self._float(weight), "bias": self._float(getattr(norm, "bias", None)), "eps": eps,
                "centred": centred}  # fmt: skip

    def _linear(self, linear: nn.Module) -> dict[str, Any]:
        scales, bitmask, offsets = None, 0, 0
        if isinstance(linear, SparseLinear) and linear.format != "compact":
            packed = linear.packed
            (N, K), values, scales = packed.shape, packed.values, packed.scales
            if packed.format != "dense":
                bitmask = self._hold(packed.bitmask)
            if packed.format not in ("dense", "nm"):
                offsets = self._hold(packed.row_offsets)
        else:
            values = dense_weight(linear).detach().contiguous()
            N, K = values.shape
        return {
            "values": self._hold(values), "bitmask": bitmask, "row_offsets": offsets, "N": N, "K": K,
            "row_values": values.numel() // max(1, N), "dtype": VALUE_DTYPES[values.dtype],
            "scales": self._float(scales), "bias": self._float(dense_bias(linear)),
        }  # fmt: skip

    def _angles(self, layer_type: str | None) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 ``[length, rotary / 2]``."""
        if layer_type not in self._tables:
            cos = sin = torch.empty(self.length, 0)
            if (rotary := self._parts.rotary) is not None:
                where = torch.arange(self.length)[None]
                extra = () if layer_type is None else (layer_type,)
                cos, sin = (angle[0, :, : angle.shape[-1] // 2] for angle in rotary(torch.empty(0), where, *extra))
            self._tables[layer_type] = cos.contiguous(), sin.contiguous()
        return self._tables[layer_type]

    def _check(self, model: nn.Module, config: Any) -> None:
        tokens = torch.arange(min(4, self.length)) * 7919 % config.vocab_size
        expected = model(input_ids=tokens[None], use_cache=False).logits[0, -1].float()
        for token in tokens.tolist():
            logits = self.step(token)
        self.position = 0
        error = (logits - expected).abs().max().item() / expected.abs().max().item()
        if not error <= _TOLERANCE[self._dtype]:  # the negation refuses NaN too
            raise ValueError(
                f"model: {type(model).__name__} computes something that fasticl.Decoder does not: logits differ by "
                f"{error:.2g} of the largest, expected at most {_TOLERANCE[self._dtype]:g} in {self._dtype}"
            )

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Forgets what was read, and reads a prompt of ``[n]`` or ``[1, n]`` tokens with the model itself.

        Returns:
            float32 ``[vocabulary]``, the logits of the token after it.

        Raises:
            ValueError: there is no token, more than ``length``, or one that is not in the vocabulary.
        """
        row = torch.as_tensor(tokens).reshape(-1)
        if not 1 <= row.numel() <= self.length:
            raise ValueError(f"tokens: expected 1 to {self.length} (length), got {row.numel()}")
        self._check_tokens(int(row.min()), int(row.max()))
        output = self.model(input_ids=row[None].long(), use_cache=True, logits_to_keep=1)
        for layer, keys, values in zip(output.past_key_values.layers, *self._cache, strict=True):
            kept = layer.keys.shape[2]  # fewer than all if the layer looks through a window
            keys[:, row.numel() - kept : row.numel()] = layer.keys[0]
            values[:, row.numel() - kept : row.numel()] = layer.values[0]
        self.position = row.numel()
        return output.logits[0, -1].float()

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Reads one more token.

        Returns:
            float32 ``[vocabulary]``, the logits of the token after it; overwritten by the next step.

        Raises:
            ValueError: there is no room, or the token is not in the vocabulary.
        """
        if self.position >= self.length:
            raise ValueError(f"position: expected less than {self.length} (length), got {self.position}")
        self._check_tokens(token, token)
        parts = self._parts
        scale = getattr(parts.embedding, "scalar_embed_scale", None)
        self._x.copy_(parts.embedding.weight[token])
        if scale is not None:
            self._x.mul_(scale)
        if parts.positions is not None:
            self._x.add_(parts.positions.weight[parts.first_position + self.position])
        self._decoder.step(self._x.data_ptr(), self.position, self._logits.data_ptr(), torch.get_num_threads())
        self.position += 1
        return self._logits

    def _check_tokens(self, least: int, most: int) -> None:
        vocabulary = self._parts.embedding.weight.shape[0]
        if least < 0 or most >= vocabulary:
            raise ValueError(f"tokens: expected 0 to {vocabulary - 1}, got {least if least < 0 else most}")

    def generate(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """Tokens after a prompt, one by one as they are decoded; the last may be one of ``stop``.

        Ends too where there is no room for more (``length``).

        Args:
            tokens: the prompt, ``[n]`` or ``[1, n]``.
            temperature: 0 always takes the likeliest; else a token is drawn from softmax(logits / temperature).
            top_k: only among so many of the likeliest; None is all.
            top_p: only among the likeliest whose probabilities add up to this.
            stop: None is the model's end-of-text tokens; empty is none.
            generator: on the CPU; None is torch's default one.

        Raises:
            ValueError: an argument is out of its range; see :meth:`prefill`.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        choose = _sampler(temperature, top_k, top_p, generator)
        ends = set(_end_tokens(self.model) if stop is None else stop)
        logits = self.prefill(tokens)
        return self._decode(logits, max_new_tokens, choose, ends)

    def _decode(self, logits: Tensor, count: int, choose: Callable[[Tensor], int], ends: set[int]) -> Iterator[int]:
        for left in range(count, 0, -1):
            token = choose(logits)
            yield token
            if token in ends or left == 1 or self.position == self.length:
                return
            logits = self.step(token)


def _sampler(
    temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Callable[[Tensor], int]:
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected in (0, 1], got {top_p}")
    if temperature == 0:
        return lambda logits: int(logits.argmax())

    def draw(logits: Tensor) -> int:
        count = logits.numel() if top_k is None else min(top_k, logits.numel())
        best, tokens = (logits / temperature).topk(count)
        chances = best.softmax(0)
        if top_p < 1:  # the first always stays
            chances = torch.where(chances.cumsum(0) - chances < top_p, chances, 0)
        return int(tokens[torch.multinomial(chances, 1, generator=generator)])

    return draw


def _end_tokens(model: Any) -> list[int]:
    found = getattr(model, "generation_config", model.config).eos_token_id
    if found is None:
        return []
    return list(found) if isinstance(found, (list, tuple)) else [found]


# --- architectures ---------------------------------------------------------------------------------------------------


def _mlp(module: nn.Module, activation: str, names: tuple[str, ...]) -> dict[str, Any]:
    """up, down, gate and activation of an MLP's module, or of the SparseMLP that took its place."""
    if isinstance(module, SparseMLP):
        return {"up": module.up, "down": module.down, "gate": module.gate, "activation": module.activation}
    if activation not in _ACTIVATIONS:
        raise ValueError(f"model: expected an activation of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    parts = [getattr(module, name) for name in names]
    return {**dict(zip(("up", "down", "gate"), parts, strict=False)), "activation": _ACTIVATIONS[activation]}


def _rotary(module: Any, config: Any) -> nn.Module:
    parameters: Mapping[str, Any] = config.rope_parameters
    nested = [each for each in parameters.values() if isinstance(each, Mapping)]
    for each in nested or [parameters]:
        if each.get("rope_type", "default") not in _STATIC_ROPE:
            raise ValueError(f"model: expected a rope_type of {', '.join(_STATIC_ROPE)}, got {each['rope_type']!r}")
    return module


def _llama(model: Any, config: Any) -> _Model:
    """Llama and what is built like it: Mistral, Qwen2, Qwen3, Gemma 3."""
    base = model.get_decoder()
    gemma = config.model_type == "gemma3_text"
    blocks = []
    for layer in base.layers:
        attention = layer.self_attn
        norms = {"mlp_norm": layer.post_attention_layernorm}
        if gemma:
            norms = {
                "out_norm": layer.post_attention_layernorm,
                "mlp_norm": layer.pre_feedforward_layernorm,
                "mlp_out_norm": layer.post_feedforward_layernorm,
            }
        window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
        blocks.append(
            _Block(
                norm=layer.input_layernorm,
                qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
                out=attention.o_proj,
                q_norm=getattr(attention, "q_norm", None),
                k_norm=getattr(attention, "k_norm", None),
                **norms,
                **_mlp(
                    layer.mlp,
                    config.hidden_activation if gemma else config.hidden_act,
                    ("up_proj", "down_proj", "gate_proj"),
                ),
                window=window,
                scale=attention.scaling,
                layer_type=attention.layer_type if gemma else None,
            )
        )
    return _Model(blocks, base.norm, base.embed_tokens, rotary=_rotary(base.rotary_emb, config))


def _gpt2(model: Any, config: Any) -> _Model:
    base = model.transformer
    blocks = [
        _Block(
            norm=layer.ln_1, qkv=(layer.attn.c_attn,), out=layer.attn.c_proj, mlp_norm=layer.ln_2,
            **_mlp(layer.mlp, config.activation_function, ("c_fc", "c_proj")),
        )
        for layer in base.h
    ]  # fmt: skip
    return _Model(blocks, base.ln_f, base.wte, base.wpe)


def _gpt_neox(model: Any, config: Any) -> _Model:
    base = model.gpt_neox
    blocks = [
        _Block(
            norm=layer.input_layernorm, qkv=(layer.attention.query_key_value,), out=layer.attention.dense,
            mlp_norm=layer.post_attention_layernorm, parallel=config.use_parallel_residual, interleaved=True,
            **_mlp(layer.mlp, config.hidden_act, ("dense_h_to_4h", "dense_4h_to_h")),
        )
        for layer in base.layers
    ]  # fmt: skip
    return _Model(blocks, base.final_layer_norm, base.embed_in, rotary=_rotary(base.rotary_emb, config))


def _opt(model: Any, config: Any) -> _Model:
    base = model.model.decoder
    if not config.do_layer_norm_before or base.project_in is not None or base.final_layer_norm is None:
        raise ValueError("model: expected an OPT with its norms before the layers and no projected embedding")
    blocks = [
        _Block(
            norm=layer.self_attn_layer_norm, out=layer.self_attn.out_proj, mlp_norm=layer.final_layer_norm,
            qkv=(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            **_mlp(layer, config.activation_function, ("fc1", "fc2")),
        )
        for layer in base.layers
    ]  # fmt: skip
    positions = base.embed_positions
    return _Model(blocks, base.final_layer_norm, base.embed_tokens, positions, positions.offset)


def _phi(model: Any, config: Any) -> _Model:
    base = model.model
    blocks = [
        _Block(
            norm=layer.input_layernorm, out=layer.self_attn.dense, mlp_norm=layer.input_layernorm, parallel=True,
            qkv=(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            q_norm=getattr(layer.self_attn, "q_layernorm", None), k_norm=getattr(layer.self_attn, "k_layernorm", None),
            **_mlp(layer.mlp, config.hidden_act, ("fc1", "fc2")),
        )
        for layer in base.layers
    ]  # fmt: skip
    return _Model(blocks, base.final_layernorm, base.embed_tokens, rotary=_rotary(base.rotary_emb, config))


_FAMILIES: dict[str, Callable[[Any, Any], _Model]] = {
    "llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _llama, "gemma3_text": _llama,
    "gpt2": _gpt2, "gpt_neox": _gpt_neox, "opt": _opt, "phi": _phi,
}  # fmt: skip
