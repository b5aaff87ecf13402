"""What the language models of transformers are made of, architecture by architecture, for the decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasticl.nn import SparseLinear, SparseMLP, dense_bias, dense_weight
from fasticl.ops._registry import ACTIVATIONS, VALUE_DTYPES

_ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
# By what may change in the rounding of a model in this dtype: its results against ours, relative to the largest.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
_ATTENTIONS = ("self_attn", "attn", "attention")  # what a block calls its attention
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length of the text


@dataclass(frozen=True)
class Block:
    """One block's modules; see DecoderBlock in csrc/decoder.h."""

    module: nn.Module  # the block itself
    attention: Any  # its module
    heads: int
    groups: int  # heads of keys and of values
    head_dim: int
    scale: float  # of q . k
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
    mlp: SparseMLP | None = None  # that up, gate and down belong to
    window: int | None = None
    layer_type: str | None = None  # of rotary_emb, where it has angles for several


@dataclass(frozen=True)
class Parts:
    """What surrounds the blocks."""

    blocks: list[Block]
    norm: nn.Module
    embedding: nn.Embedding
    positions: nn.Embedding | None = None  # learned ones
    first_position: int = 0  # the row of `positions` that belongs to position 0
    rotary: nn.Module | None = None


class Native:
    """Modules as csrc/decoder.cpp takes them: dicts of addresses and sizes.

    Attributes:
        held: the tensors that the addresses belong to, which must live as long; norms and biases are float32 copies.
    """

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def address(self, x: Tensor) -> int:
        self.held.append(x)
        return x.data_ptr()

    def _float(self, x: Tensor | None) -> int:
        return 0 if x is None else self.address(x.detach().float().contiguous())

    def norm(self, norm: Any, size: int) -> dict[str, Any] | None:
        if norm is None:
            return None
        weight, bias, eps = norm_of(norm)
        if weight.numel() != size:
            raise ValueError(f"model: expected a norm of {size}, got {weight.numel()}")
        return {"weight": self._float(weight), "bias": self._float(bias), "eps": eps,
                "centred": isinstance(norm, nn.LayerNorm)}  # fmt: skip

    def linear(self, linear: nn.Module) -> dict[str, Any]:
        scales, bitmask, offsets = None, 0, 0
        if isinstance(linear, SparseLinear) and linear.format != "compact":
            packed = linear.packed
            (N, K), values, scales = packed.shape, packed.values, packed.scales
            if packed.format != "dense":
                bitmask = self.address(packed.bitmask)
            if packed.format not in ("dense", "nm"):
                offsets = self.address(packed.row_offsets)
        else:
            values = dense_weight(linear).detach().contiguous()
            N, K = values.shape
        bias = dense_bias(linear)
        if bias is not None and bias.numel() != N:
            raise ValueError(f"model: expected a bias of {N}, got {bias.numel()}")
        return {
            "values": self.address(values), "bitmask": bitmask, "row_offsets": offsets, "N": N, "K": K,
            "row_values": values.numel() // max(1, N), "dtype": VALUE_DTYPES[values.dtype],
            "scales": self._float(scales), "bias": self._float(bias),
        }  # fmt: skip

    def block(self, block: Block, D: int, rotary: int, **own: Any) -> dict[str, Any]:
        """``rotary``: leading dimensions of a head that positions turn; ``own``: what else the caller sets.

        Raises:
            ValueError: a weight has not the shape that the model's configuration says.
        """
        heads, groups, d = block.heads, block.groups, block.head_dim
        step, sizes = (3 * d, (0, d, 2 * d)) if block.interleaved else (d, (0, heads * d, (heads + groups) * d))
        check_shapes(block, D)
        linears = {name: self.linear(getattr(block, name)) for name in ("out", "up", "down")}
        return {
            **{name: self.norm(getattr(block, name), D) for name in ("norm", "out_norm", "mlp_norm", "mlp_out_norm")},
            **{name: self.norm(getattr(block, name), d) for name in ("q_norm", "k_norm")},
            **linears,
            "gate": None if block.gate is None else self.linear(block.gate),
            "qkv": [self.linear(part) for part in block.qkv],
            "q": (heads, sizes[0], step),
            "k": (groups, sizes[1], step),
            "v": (groups, sizes[2], step),
            "scale": block.scale,
            "rotary": rotary,
            "parallel": block.parallel,
            "activation": ACTIVATIONS[block.activation],
            **own,
        }


def norm_of(norm: Any) -> tuple[Tensor, Tensor | None, float]:
    """Weight, bias and eps of a LayerNorm, or of what is an RMSNorm otherwise."""
    weight = norm.weight if norm.weight is not None else torch.ones(norm.normalized_shape)
    if type(norm).__name__.startswith("Gemma"):
        weight = 1 + weight.float()
    return weight, getattr(norm, "bias", None), norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def size_of(linear: nn.Module) -> tuple[int, int]:
    """[N outputs, K inputs].

    Raises:
        TypeError: it is no linear.
    """
    if isinstance(linear, SparseLinear):
        return linear.out_features, linear.in_features
    N, K = dense_weight(linear).shape
    return N, K


def check_shapes(block: Block, D: int) -> None:
    """Raises ValueError where a weight of a block of width D has not the shape that the configuration says."""
    heads, groups, d, inner = block.heads, block.groups, block.head_dim, size_of(block.up)[0]
    rows = (heads * d, groups * d, groups * d) if len(block.qkv) == 3 else ((heads + 2 * groups) * d,)
    shapes = [(D, heads * d), (inner, D), (D, inner), (inner, D), *((n, D) for n in rows)]
    for linear, (N, K) in zip((block.out, block.up, block.down, block.gate, *block.qkv), shapes, strict=True):
        if linear is not None and (found := list(size_of(linear))) != [N, K]:
            where = f"layer {block.attention.layer_idx}"
            raise ValueError(f"model: {where}: expected a weight of [{N}, {K}] by its configuration, got {found}")


def block_of(layer: Any) -> Block:
    """What a block of a Hugging Face causal language model is made of.

    Raises:
        ValueError: its architecture is not known, or a variant that computes something else.
    """
    attention = next((found for name in _ATTENTIONS if (found := getattr(layer, name, None)) is not None), None)
    config = getattr(attention, "config", None)
    kind = getattr(config, "model_type", type(layer).__name__)
    if kind not in _BLOCKS:
        raise ValueError(f"model: expected one of {', '.join(_BLOCKS)}, got model_type {kind!r}")
    return _BLOCKS[kind](layer, config)


def layers_of(model: Any) -> Iterable[nn.Module]:
    """The blocks of a Hugging Face causal language model, in their order.

    Raises:
        ValueError: its architecture is not known.
    """
    kind = model.config.get_text_config().model_type
    if kind not in _BLOCKS:
        raise ValueError(f"model: expected one of {', '.join(_BLOCKS)}, got model_type {kind!r}")
    base: Any = model.get_decoder()
    layers: Iterable[nn.Module] = base.h if kind == "gpt2" else base.layers
    return layers


def parts_of(model: Any) -> Parts:
    """What a Hugging Face causal language model is made of.

    Raises:
        ValueError: its architecture is not known, or a variant that computes something else.
    """
    return _parts(model, [block_of(layer) for layer in layers_of(model)], model.config.get_text_config())


def check_static_angles(config: Any) -> None:
    """Raises ValueError where the angles of rotary positions depend on the length of the text."""
    parameters: Mapping[str, Any] = config.rope_parameters
    nested = [each for each in parameters.values() if isinstance(each, Mapping)]
    for each in nested or [parameters]:
        if each.get("rope_type", "default") not in _STATIC_ROPE:
            raise ValueError(f"model: expected a rope_type of {', '.join(_STATIC_ROPE)}, got {each['rope_type']!r}")


def _mlp(module: nn.Module, activation: str, names: tuple[str, ...]) -> dict[str, Any]:
    """up, down, gate and activation of an MLP's module, or of the SparseMLP that took its place."""
    if isinstance(module, SparseMLP):
        return {"mlp": module, **{name: getattr(module, name) for name in ("up", "down", "gate", "activation")}}
    if activation not in _ACTIVATIONS:
        raise ValueError(f"model: expected an activation of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    parts = [getattr(module, name) for name in names]
    return {**dict(zip(("up", "down", "gate"), parts, strict=False)), "activation": _ACTIVATIONS[activation]}


def _heads(attention: Any, config: Any) -> dict[str, Any]:
    heads = config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return {"heads": heads, "groups": groups, "head_dim": d, "scale": attention.scaling}


def _llama_block(layer: Any, config: Any) -> Block:
    """Of Llama and what is built like it: Mistral, Qwen2, Qwen3, Gemma 3."""
    attention = layer.self_attn
    gemma = config.model_type == "gemma3_text"
    norms = {"mlp_norm": layer.post_attention_layernorm}
    if gemma:
        if config.attn_logit_softcapping is not None or config.use_bidirectional_attention:
            raise ValueError("model: expected a Gemma 3 with causal attention whose scores are not capped")
        norms = {
            "out_norm": layer.post_attention_layernorm,
            "mlp_norm": layer.pre_feedforward_layernorm,
            "mlp_out_norm": layer.post_feedforward_layernorm,
        }
    activation = config.hidden_activation if gemma else config.hidden_act
    return Block(
        module=layer,
        attention=attention,
        **_heads(attention, config),
        norm=layer.input_layernorm,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        out=attention.o_proj,
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        **norms,
        **_mlp(layer.mlp, activation, ("up_proj", "down_proj", "gate_proj")),
        window=config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None),
        layer_type=attention.layer_type if gemma else None,
    )


def _gpt2_block(layer: Any, config: Any) -> Block:
    return Block(
        module=layer, attention=layer.attn, **_heads(layer.attn, config),
        norm=layer.ln_1, qkv=(layer.attn.c_attn,), out=layer.attn.c_proj, mlp_norm=layer.ln_2,
        **_mlp(layer.mlp, config.activation_function, ("c_fc", "c_proj")),
    )  # fmt: skip


def _gpt_neox_block(layer: Any, config: Any) -> Block:
    return Block(
        module=layer, attention=layer.attention, **_heads(layer.attention, config),
        norm=layer.input_layernorm, qkv=(layer.attention.query_key_value,), out=layer.attention.dense,
        mlp_norm=layer.post_attention_layernorm, parallel=config.use_parallel_residual, interleaved=True,
        **_mlp(layer.mlp, config.hidden_act, ("dense_h_to_4h", "dense_4h_to_h")),
    )  # fmt: skip


def _opt_block(layer: Any, config: Any) -> Block:
    if not config.do_layer_norm_before:
        raise ValueError("model: expected an OPT with its norms before the layers")
    attention = layer.self_attn
    return Block(
        module=layer, attention=attention, **_heads(attention, config),
        norm=layer.self_attn_layer_norm, out=attention.out_proj, mlp_norm=layer.final_layer_norm,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        **_mlp(layer, config.activation_function, ("fc1", "fc2")),
    )  # fmt: skip


def _phi_block(layer: Any, config: Any) -> Block:
    attention = layer.self_attn
    return Block(
        module=layer, attention=attention, **_heads(attention, config),
        norm=layer.input_layernorm, out=attention.dense, mlp_norm=layer.input_layernorm, parallel=True,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=getattr(attention, "q_layernorm", None), k_norm=getattr(attention, "k_layernorm", None),
        **_mlp(layer.mlp, config.hidden_act, ("fc1", "fc2")),
    )  # fmt: skip


_BLOCKS: dict[str, Callable[[Any, Any], Block]] = {
    "llama": _llama_block, "mistral": _llama_block, "qwen2": _llama_block, "qwen3": _llama_block,
    "gemma3_text": _llama_block, "gpt2": _gpt2_block, "gpt_neox": _gpt_neox_block, "opt": _opt_block,
    "phi": _phi_block,
}  # fmt: skip


def _parts(model: Any, blocks: list[Block], config: Any) -> Parts:
    base = model.get_decoder()
    if config.model_type == "gpt2":
        return Parts(blocks, base.ln_f, base.wte, base.wpe)
    if config.model_type == "gpt_neox":
        return Parts(blocks, base.final_layer_norm, base.embed_in, rotary=base.rotary_emb)
    if config.model_type == "opt":
        if base.project_in is not None or base.final_layer_norm is None:
            raise ValueError("model: expected an OPT with a final norm and no projected embedding")
        return Parts(
            blocks, base.final_layer_norm, base.embed_tokens, base.embed_positions, base.embed_positions.offset
        )
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise ValueError("model: expected a Gemma 3 whose logits are not capped (final_logit_softcapping)")
    norm = base.final_layernorm if config.model_type == "phi" else base.norm
    return Parts(blocks, norm, base.embed_tokens, rotary=base.rotary_emb)
