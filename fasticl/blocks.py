"""Whole blocks of a transformers model in C++ while it decodes, under transformers' own ``generate``.

A block of a dozen modules takes Python longer than a pruned block's arithmetic takes the machine. Here a block is two
calls (csrc/decoder.cpp): its queries, keys and values; then, when transformers' cache has taken those in, whatever kind
of cache it is, the attention over what the cache returns, and all that follows.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fasticl import _C
from fasticl.architectures import Block, Native, block_of
from fasticl.nn import SparseLinear
from fasticl.ops._registry import DTYPES

MAX_TOKENS = 8  # at once: what reads a weight once
_REMEMBERED = 8  # arguments that blocks share: models have up to two masks and two kinds of angles


class Shared(threading.local):
    """What layers make of the arguments that transformers hands to all of them, worked out by the first.

    Each thread has its own.
    """

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Any, Any, set[int]]] = {}

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        return Shared, ()

    def of(self, layer: nn.Module, given: Any, more: tuple[int, ...], make: Callable[[], Any]) -> Any:
        """``make()``, or what it gave other layers for the same object ``given`` and numbers ``more``.

        A layer that asks again is in the model's next pass, for which ``given`` may have been written over.
        """
        key = (id(given), *more)
        if key not in self._made or id(layer) in self._made[key][2]:
            self._made.pop(key, None)
            if len(self._made) == _REMEMBERED:
                del self._made[next(iter(self._made))]
            self._made[key] = given, make(), set()  # held, so that no other object gets its id
        _, made, asked = self._made[key]
        asked.add(id(layer))
        return made


def _angles(given: tuple[Tensor, Tensor] | None, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin, float32 ``[M or 1, rotary / 2]``, and ``[2, M]`` each token's row there and its key's slot."""
    places = torch.zeros(2, M, dtype=torch.long, device="cpu")
    if given is None:
        return torch.empty(M, 0), torch.empty(M, 0), places
    cos, sin = (x[:, -1, : x.shape[-1] // 2].float().contiguous() for x in given)
    if len(cos) == M:
        places[0] = torch.arange(M, device="cpu")
    return cos, sin, places


def seen_positions(mask: Tensor, M: int) -> Tensor | None:
    """``[2, M]``, the positions from which and to which each token attends; None if ``mask`` has holes."""
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, M):
        return None
    allowed = mask[:, 0, -1].expand(M, -1).to(torch.uint8)
    begins, counts = allowed.argmax(1), allowed.sum(1)
    ends = allowed.shape[1] - allowed.flip(1).argmax(1)
    return torch.stack([begins, ends]) if bool(((ends - begins == counts) & (counts > 0)).all()) else None


class _Fused:
    """Mixed into the class of a module with a faster way for a few tokens; copies and pickles as the module does."""

    most_tokens: int

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_native"}
        return _empty, (type(self).__bases__[0], _plain_class(self)), state


class FusedHead(_Fused):
    """Mixed into the class of a dense linear of 16-bit weights: of a few tokens the product is made row by row.

    PyTorch's own, where the CPU does not multiply bfloat16 itself, reads the weight more slowly. The weight stays what
    and where it is, an embedding's too.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight
        if (
            not torch.compiler.is_compiling()
            and 0 < x.numel() <= self.most_tokens * weight.shape[1]
            and type(weight) in _PLAIN
            and weight.is_cpu
            and weight.is_contiguous()
            and x.dtype == weight.dtype
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        ):
            return torch.ops.fasticl.nm_linear(x, weight, None, self.bias, None, None)
        return super().forward(x)  # type: ignore[misc]


class FusedBlock(_Fused):
    """Mixed into the class of a block: a ``forward`` in C++ for one token each of a few sequences.

    Whatever it does not know (prompts, gradients, hooks, another attention than "sdpa", masks with holes, compiling)
    goes the way of the class itself.
    """

    shared: Shared
    _types: list[type]
    _native: _NativeBlock | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(hidden_states) <= self.most_tokens:
            if self._native is None:
                self._native = _NativeBlock(self)
            out = self._native(hidden_states, args, kwargs, self.shared)
            if out is not None:
                return out
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


@cache
def _fused_class(kind: Any, plain: Any) -> Any:
    return type(plain.__name__, (kind, plain), {"__module__": plain.__module__, "__qualname__": plain.__qualname__})


def _plain_class(layer: Any) -> Any:
    return type(layer).__bases__[1] if isinstance(layer, _Fused) else type(layer)


def _empty(kind: Any, plain: Any) -> Any:
    made = _fused_class(kind, plain)
    return made.__new__(made)


def fuse_head(head: nn.Linear, most_tokens: int) -> None:
    """Lets a dense linear of 16-bit weights multiply up to so many tokens by rows, as :func:`fuse` does a block."""
    head.__class__ = _fused_class(FusedHead, _plain_class(head))
    head.most_tokens = most_tokens  # type: ignore[assignment]


def fuse(layer: nn.Module, most_tokens: int, shared: Shared) -> None:
    """Lets a block run in C++ for up to so many tokens at once; ``shared`` is one for all blocks of a model.

    Its class changes, to a subclass of the same name; its modules, parameters and their names stay.
    """
    if not isinstance(layer, FusedBlock):
        layer.__class__ = _fused_class(FusedBlock, _plain_class(layer))
    layer.most_tokens, layer.shared, layer._native = most_tokens, shared, None  # type: ignore[assignment]
    layer._types = list(map(type, _parts(layer)))  # type: ignore[assignment]


def unfuse(layer: nn.Module) -> None:
    """Takes :func:`fuse` or :func:`fuse_head` back."""
    if isinstance(layer, _Fused):
        layer.__class__ = _plain_class(layer)
        for name in ("most_tokens", "shared", "_types", "_native"):
            layer.__dict__.pop(name, None)


def _parts(layer: nn.Module) -> list[nn.Module]:
    return list(layer.modules())[1:]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward.

    Hooks that transformers leaves for ever in a model that was asked for its hidden states or attentions do not count:
    a block's own are called, and those within it record nothing of attention by "sdpa".
    """
    own = vars(module)
    hooks = [hook for kind in ("_forward_hooks", "_forward_pre_hooks") if own[kind] for hook in own[kind].values()]
    known = "transformers.utils.output_capturing"
    return "forward" in own or any(getattr(hook, "__module__", None) != known for hook in hooks)


class _NativeBlock:
    """The C++ twin of a block; remade when a tensor or a module of the block is another one, or has changed."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._names = tuple(inspect.signature(_plain_class(layer).forward).parameters)[2:]
        self._modules: list[tuple[dict[str, Any], str, Any]] = []  # and what else is no plain tensor
        self._tensors: list[tuple[dict[str, Any], str, Tensor, int, int | None]] = []  # with address and version
        self._made: tuple[Block, Any, Native] | None = None

    def __call__(self, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], shared: Shared) -> Tensor | None:
        """What the block computes, ``[M, 1, D]``; None if it must go its own way."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        past = given.get("past_key_values", given.get("layer_past"))
        mask, M = given.get("attention_mask"), x.shape[0]
        if (
            past is None
            or x.shape[1] != 1
            or not x.is_cpu
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or self._layer.training
            or given.get("encoder_hidden_states") is not None
            or hasattr(past, "is_updated")  # the cache of an encoder too
        ):
            return None
        angles = given.get("position_embeddings")
        cos, sin, places = shared.of(self._layer, angles, (M,), partial(_angles, angles, M))
        like = x.dtype, x.shape[2], 2 * cos.shape[1]
        if self._changed():
            self._make(*like)
        if self._made is None or like != self._like or self._bypassed():
            return None
        block, native, _ = self._made
        if _implementation(block.attention.config) not in ("sdpa", "fasticl"):
            return None
        seen = None if mask is None else shared.of(self._layer, mask, (M,), partial(seen_positions, mask, M))
        if mask is not None and seen is None:
            return None

        threads, x = torch.get_num_threads(), x.contiguous()
        outputs = x.new_empty(native.output_floats(M), dtype=torch.float32)
        keys = x.new_empty(M, block.groups, 1, block.head_dim)
        values = torch.empty_like(keys)
        native.start(
            x.data_ptr(), M, cos.data_ptr(), sin.data_ptr(), places.data_ptr(), outputs.data_ptr(), rows_of(keys),
            rows_of(values), threads,
        )  # fmt: skip
        keys, values = past.update(keys, values, block.attention.layer_idx)
        if seen is None:
            length = keys.shape[2]
            seen = shared.of(self._layer, None, (M, length), lambda: places.new_tensor([[0] * M, [length] * M]))
        elif mask is not None and mask.shape[-1] != keys.shape[2]:
            raise ValueError(f"attention_mask: expected {keys.shape[2]} positions, as cached, got {mask.shape[-1]}")
        if not (lies_by_rows(keys) and lies_by_rows(values) and keys.dtype == values.dtype == x.dtype):
            keys, values = keys.to(x.dtype).contiguous(), values.to(x.dtype).contiguous()
        out = torch.empty_like(x)
        native.finish(
            x.data_ptr(), M, outputs.data_ptr(), rows_of(keys), rows_of(values), seen.data_ptr(), out.data_ptr(),
            threads,
        )  # fmt: skip
        return out

    def _bypassed(self) -> bool:
        """Whether calling a module would do more than its class's forward, or its class is one never compared."""
        for (module, own, hooks, pre_hooks), compared in zip(self._parts, self._layer._types, strict=False):
            if type(module) is not compared:
                return True
            if (hooks or pre_hooks or "forward" in own) and has_hooks(module):
                return True
        return len(self._parts) != len(self._layer._types)

    def _changed(self) -> bool:
        if not self._tensors:
            return True
        for held, name, found in self._modules:
            if held.get(name) is not found:
                return True
        for held, name, tensor, address, version in self._tensors:
            if held.get(name) is not tensor or tensor.data_ptr() != address:
                return True
            if version is not None and tensor._version != version:
                return True
        return False

    def _make(self, dtype: torch.dtype, D: int, rotary: int) -> None:
        parts = _parts(self._layer)
        self._parts = [(m, vars(m), m._forward_hooks, m._forward_pre_hooks) for m in parts]
        self._like, self._made = (dtype, D, rotary), None
        modules = [self._layer, *parts]
        held = [(vars(m)[kind], *at) for m in modules for kind in _KINDS for at in vars(m)[kind].items()]
        plain = [at for at in held if type(at[2]) in _PLAIN]
        if (
            dtype in DTYPES
            and len(plain) == sum(isinstance(at[2], Tensor) for at in held)  # of others, only they know what lies where
            and not any(isinstance(m, SparseLinear) and m.format == "compact" for m in modules)  # no kernel for it
        ):
            native = Native()
            native.held += [at[2].detach() for at in plain]  # so that nothing else gets the address of what was copied
            try:
                block = block_of(self._layer)
                own = native.block(block, D, rotary, window=0, cos=0, sin=0, keys=(0, 0, 0), cached_values=(0, 0, 0))
                self._made = block, _C.Decoder(D, block.head_dim, DTYPES[dtype], [own], None, None), native
            except (AttributeError, KeyError, TypeError, ValueError):  # a layer is not what its architecture has there
                pass
        self._modules = [at for at in held if type(at[2]) not in _PLAIN]
        self._tensors = [  # at last: other threads may look
            (*at, at[2].data_ptr(), None if at[2].is_inference() else at[2]._version)  # which those do not count
            for at in plain
        ]


_KINDS = ("_parameters", "_buffers", "_modules")
_PLAIN = (Tensor, nn.Parameter)


def _implementation(config: Any) -> str:
    """``config._attn_implementation``, sooner: of every attribute transformers asks whether layers differ in it."""
    known: str | None = vars(config).get("_attn_implementation_internal")
    return known or config._attn_implementation


def lies_by_rows(states: Tensor) -> bool:
    """Whether ``[B, G, n, d]`` states may be read where they are: the last two dimensions close."""
    return states.stride()[2:] == (states.shape[3], 1)


def rows_of(states: Tensor) -> tuple[int, int, int]:
    """Such states as C++ takes them: address, and strides of a sequence and of a head."""
    return states.data_ptr(), states.stride(0), states.stride(1)


class _Cached:
    """In place of transformers' cache: always the same past, and the new keys and values behind it."""

    def __init__(self, past: Tensor) -> None:
        self._past = past

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *more: Any) -> tuple[Tensor, Tensor]:
        old_keys, old_values = self._past
        return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)


def ways(
    model: Any, layer: nn.Module, tokens: int, past: int = 64
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A fused block of ``model`` by its modules, and in C++: of one random token each of so many sequences.

    Raises:
        AttributeError, TypeError, ValueError: its architecture is not known.
    """
    block = block_of(layer)
    like = model.get_input_embeddings().weight  # norms may be of another dtype
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 1, block.attention.config.hidden_size, generator=generator).to(like)
    states = torch.randn(2, tokens, block.groups, past, block.head_dim, generator=generator).to(like)
    forward = _plain_class(layer).forward
    given: dict[str, Any] = {"attention_mask": None}
    given["layer_past" if "layer_past" in inspect.signature(forward).parameters else "past_key_values"] = _Cached(
        states
    )
    if (rotary := getattr(model.get_decoder(), "rotary_emb", None)) is not None:
        extra = () if block.layer_type is None else (block.layer_type,)
        given["position_embeddings"] = rotary(x, torch.full((tokens, 1), past), *extra)
    return partial(MethodType(forward, layer), x, **given), partial(layer.forward, x, **given)


def runs_native(layer: nn.Module) -> bool:
    """Whether the last call of a fused block found it to be what its architecture has there."""
    native = getattr(layer, "_native", None)
    return native is not None and native._made is not None
