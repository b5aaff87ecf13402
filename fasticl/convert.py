"""Replaces the pruned layers of a model by packed ones where that is faster, and says layer by layer what was found."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasticl import blocks, formats
from fasticl.architectures import TOLERANCE, Block, block_of, layers_of
from fasticl.checkpoint import make_serializable
from fasticl.layers import MLP, fold_masks_, is_linear
from fasticl.nn import SparseLinear, SparseMLP, dense_weight
from fasticl.ops.bitmap_linear import implementation as implementation_of_bitmap
from fasticl.ops.nm_linear import implementation as implementation_of_nm
from fasticl.ops.sliced_linear import implementation as implementation_of_sliced
from fasticl.prune import detect_pattern
from fasticl.replaceable import (
    MLPModule,
    linears_of,
    mlp_modules,
    obstacle,
    part_linear,
    plain_linear,
    variant_of,
    weight_readers,
)
from fasticl.timing import interleaved

SKIP = ("lm_head",)
TOKENS = (1, 128)  # decoding one sequence, and a prompt
MIN_SPARSITY = 0.05  # below it no format is smaller than the dense weight by more than its bitmask
PACKED_LAYERS = 8  # of one kind, at most, are packed to be timed
COLD_BYTES = 3 << 27  # of dense weights are read in turn: more than the last-level cache of nearly every CPU
MAX_COPIES = 256  # of small layers: each is called once before timing begins
SECONDS = 0.08  # of timing for each contender and number of tokens
NOISE = 0.05
WORTH, LOSS = 1.25, 0.25  # so much faster in the mean, a layer may be so much slower at one number of tokens
BORDER, LONGER = 1.25, 5  # within this factor of the speed that decides, a contender is timed so many times longer

Replacements = dict[nn.Module, nn.Module]


@dataclass(frozen=True)
class LayerDecision:
    """A linear, an MLP or a block: what it is, what was measured, what was chosen.

    Times are in milliseconds, by number of tokens.
    ``shape`` is [N outputs, K inputs]; of an MLP [H hidden neurons, K inputs], as they were before any were removed; of
    a block [D, D].
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    sparsity: float
    pattern: str
    kernel: str  # "dense", or a packed format, " int8" behind it for such values; of an MLP "fused_mlp", or "unfused";
    # of a block "decoder_block", or "modules"; of an LM head "dense by rows" too
    reason: str
    ms_dense: dict[int, float] = field(default_factory=dict)
    ms_sparse: dict[int, float] = field(default_factory=dict)

    @property
    def speedup(self) -> dict[int, float]:
        return {tokens: self.ms_dense[tokens] / ms for tokens, ms in self.ms_sparse.items()}


@dataclass(frozen=True)
class ConversionReport:
    """``model`` is the converted model: the same object, or what replaced it if it was itself a linear or an MLP.

    ``layers`` has a decision for each linear, ``mlps`` for each MLP that could run as one op, ``blocks`` for each block
    of a language model whose architecture is known; ``head`` is that of its LM head, if that stays dense and its weight
    has 16 bits.
    """

    model: nn.Module
    layers: list[LayerDecision]
    mlps: list[LayerDecision]
    blocks: list[LayerDecision] = field(default_factory=list)
    head: LayerDecision | None = None

    @property
    def converted(self) -> list[LayerDecision]:
        return [layer for layer in self.layers if layer.kernel != "dense"]

    @property
    def fused_mlps(self) -> list[str]:
        return [mlp.name for mlp in self.mlps if mlp.kernel == "fused_mlp"]

    @property
    def fused_blocks(self) -> list[str]:
        return [block.name for block in self.blocks if block.kernel == "decoder_block"]

    def __str__(self) -> str:
        head = f"{len(self.converted)} of {len(self.layers)} linears run packed, {len(self.fused_mlps)} MLPs as one op"
        if self.blocks:
            head += f", {len(self.fused_blocks)} of {len(self.blocks)} blocks decode in C++"
        return f"{head}\n{table([*self.layers, *self.mlps, *self.blocks, *filter(None, [self.head])])}"


def convert(
    model: nn.Module,
    *,
    format: str = "auto",
    values: str | None = None,
    skip: Sequence[str] = SKIP,
    min_speedup: float = 1.0,
    tokens: Sequence[int] = TOKENS,
) -> ConversionReport:
    """Packs every pruned linear of ``model`` that runs faster packed; in place, for inference.

    Masks of ``torch.nn.utils.prune`` are folded in first. Then, dense and sparse timed interleaved on the layers' own
    weights, and replaced where the sparse one is at least ``min_speedup`` times as fast, in the geometric mean over the
    numbers of tokens and, but for the noise of timing (5 %), at each of them; if 1.25 times so fast in the mean, it may
    lose up to a quarter at one of them:

    1. an MLP module with dead hidden neurons, by a :class:`fasticl.nn.SparseMLP` without them;
    2. each linear (``nn.Linear``, GPT-2's Conv1D) with zeros, by a :class:`fasticl.nn.SparseLinear`; with
       ``values="int8"`` also each without;
    3. an MLP module of which a linear was packed, by one :class:`fasticl.nn.SparseMLP`.

    Of a Hugging Face language model on the CPU in evaluation mode (architectures as for :class:`fasticl.Decoder`), the
    blocks, packed or dense, decode in C++ then, if that is so much faster at those numbers of ``tokens`` that are at
    most 8: one token each of up to so many sequences, behind a cache of any kind. Their modules stay, and everything
    else goes through them. A dense LM head of 16-bit weights, skipped or not, keeps its weight, and multiplies so few
    tokens by this package's kernel for rows where that is faster.

    A module counts as an MLP if a small copy of it, on random tokens in eval mode, computes just that. Layers with
    hooks, and those whose weight their owner's ``forward`` reads, stay. Layers alike in shape, dtype, pattern and
    sparsity (to 5 %) are timed together. Run the model under ``torch.inference_mode()``: where gradients are wanted,
    packed layers compute through their reference, which is slow. ``save_pretrained`` of a Hugging Face model
    then writes its layers packed; see :func:`fasticl.save_pretrained`.

    Args:
        model: any module; its parameters stay where they are (CPU or GPU).
        format: ``"auto"`` times those that suit the zeros; or ``"bitmap"``, ``"sliced"``, ``"nm"``, ``"compact"``, or,
            of int8 values only, ``"dense"``.
        values: None, or ``"int8"``, which changes the model's answers: see :func:`fasticl.pack`. Layers that are packed
            already stay what they are.
        skip: names, whole or last component, of modules that are left alone, with all that is in them; ``()`` for none.
            An LM head that is packed shares its weight with the embedding no longer.
        min_speedup: 0 converts every linear with zeros (with int8 values every linear), whatever its speed.
        tokens: batch sizes that the layers will see: positions times sequences.

    Raises:
        TypeError: ``model`` is no nn.Module, or an argument of another type.
        ValueError: ``format`` or ``values`` is unknown, ``min_speedup`` negative, ``tokens`` not positive, or a masked
            parameter is shared with a module that does not mask it.
    """
    _check(model, format, values, skip, min_speedup, tokens)
    fold_masks_(model)
    report, smaller, packed = _plan(model, format, values, skip, min_speedup, tokens)
    report = replace(report, model=_replace(_replace(model, smaller), packed))
    if smaller or packed:
        make_serializable(report.model)
    report = replace(report, blocks=_fuse_blocks(report.model, min_speedup, tokens))
    return replace(report, head=_fuse_head(report.model, min_speedup, tokens))


def explain(model: nn.Module, *, tokens: Sequence[int] = TOKENS) -> str:
    """Prints, and returns, one line a linear: shape, sparsity, pattern, kernel, ms dense and packed, and the reason.

    For a model that :func:`convert` has not seen yet it says what convert would do, but for whole blocks, which can be
    timed only when they are packed; the model is not changed.

    Raises:
        TypeError, ValueError: as :func:`convert`.
    """
    _check(model, "auto", None, SKIP, 1.0, tokens)
    report = _plan(model, "auto", None, SKIP, 1.0, tokens)[0]
    fused = [(name, block_of(layer)) for name, layer in model.named_modules() if isinstance(layer, blocks.FusedBlock)]
    already = [_block_decision(name, block, "decoder_block", "already in C++") for name, block in fused]
    text = str(replace(report, blocks=already))
    print(text)
    return text


def table(decisions: Sequence[LayerDecision]) -> str:
    """Decisions as aligned text."""
    tokens = " / ".join(map(str, next((d.ms_dense for d in decisions if d.ms_dense), {})))
    at = f" at {tokens} tokens" if tokens else ""
    rows = [("layer", "shape", "zeros", "pattern", "kernel", f"ms dense{at}", "ms packed", "reason")]
    for d in decisions:
        dense = " / ".join(f"{ms:.3f}" for ms in d.ms_dense.values())
        packed = " / ".join(f"{ms:.3f}" for ms in d.ms_sparse.values())
        shape = f"{d.shape[0]}x{d.shape[1]}"
        name = d.name or "(model)"
        rows.append((name, shape, f"{d.sparsity:.1%}", d.pattern, d.kernel, dense or "-", packed or "-", d.reason))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _check(
    model: object, format: str, values: str | None, skip: Sequence[str], min_speedup: float, tokens: Sequence[int]
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    formats.check_format(format, values)
    if isinstance(skip, str) or not all(isinstance(name, str) for name in skip):
        raise TypeError(f"skip: expected a sequence of names, got {skip!r}")
    if isinstance(min_speedup, bool) or not isinstance(min_speedup, int | float):
        raise TypeError(f"min_speedup: expected a number, got {type(min_speedup).__name__}")
    if not min_speedup >= 0:
        raise ValueError(f"min_speedup: expected a number >= 0, got {min_speedup}")
    if not isinstance(tokens, Sequence) or any(isinstance(m, bool) or not isinstance(m, int) for m in tokens):
        raise TypeError(f"tokens: expected a sequence of integers, got {tokens!r}")
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens: expected positive integers, got {list(tokens)}")


def _replace(model: nn.Module, new: Replacements) -> nn.Module:
    """Puts each value of ``new`` where its key stands, in all places; returns the model, or what replaced it."""
    places = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    for parent, name, child in places:
        if child in new:
            setattr(parent, name, new[child])
    return new.get(model, model)


def _dense_bytes(linear: nn.Module) -> int:
    if isinstance(linear, SparseLinear):
        return linear.packed.dense_bytes
    return dense_weight(linear).nbytes


@dataclass(frozen=True)
class _Clock:
    """Times layers as a model runs them: with weights that other layers have driven out of the cache since."""

    tokens: Sequence[int]
    model_bytes: int  # of all dense weights: a small model stays in the cache, and so do the layers timed
    min_speedup: float  # contenders about so much faster than dense are timed longer

    def copies(self, dense_bytes: int) -> int:
        """How many layers of this size to call in turn."""
        return max(1, min(MAX_COPIES, min(COLD_BYTES, self.model_bytes) // max(1, dense_bytes)))

    def time(
        self, contenders: Mapping[str, Sequence[nn.Module]], weight: Tensor, dense_bytes: int
    ) -> dict[str, dict[int, float]]:
        """Milliseconds of each contender by number of tokens.

        Args:
            contenders: layers of one kind, as many for each name; copied until there are enough.
            weight: x [tokens, K] has its K, dtype and device.
            dense_bytes: weights of one layer when dense.
        """
        copies = self.copies(dense_bytes)
        layers = {
            name: [*some[:copies], *(copy.deepcopy(some[i % len(some)]) for i in range(len(some), copies))]
            for name, some in contenders.items()
        }
        ms: dict[str, dict[int, float]] = {name: {} for name in contenders}
        generator = torch.Generator().manual_seed(0)
        for m in self.tokens:
            x = torch.randn(m, weight.shape[1], generator=generator).to(weight)
            count = max(PACKED_LAYERS, copies // m)  # m tokens share the reading of a weight
            calls = {name: [partial(layer, x) for layer in those[:count]] for name, those in layers.items()}
            synchronize = torch.cuda.synchronize if x.is_cuda else None
            with torch.inference_mode():
                timings = interleaved(calls, seconds=SECONDS * len(calls), synchronize=synchronize)
                gains = [timings["dense"].ms_p50 / timing.ms_p50 for timing in timings.values()]
                if any(1 / BORDER < gain / max(self.min_speedup, 1e-9) < BORDER for gain in gains[1:]):
                    timings = interleaved(calls, seconds=LONGER * SECONDS * len(calls), synchronize=synchronize)
            for name, timing in timings.items():
                ms[name][m] = timing.ms_p50
        return ms


def _plan(
    model: nn.Module, format: str, values: str | None, skip: Sequence[str], min_speedup: float, tokens: Sequence[int]
) -> tuple[ConversionReport, Replacements, Replacements]:
    """What convert reports, and its replacements: of MLPs by smaller ones; then, with those in place, the rest."""
    clock = _Clock(tokens, sum(_dense_bytes(linear) for _, linear in linears_of(model, {})), min_speedup)
    whole = mlp_modules(model, skip)
    mlps = {
        name: _mlp_decision(name, module, "fused_mlp", "already one op")
        for name, module in model.named_modules()
        if isinstance(module, SparseMLP)
    }

    candidates = []
    for found in whole:
        up, down, gate = found.mlp.up, found.mlp.down, found.mlp.gate
        candidate = SparseMLP.from_linears(up, down, gate, activation=found.activation)
        if candidate.up.out_features < dense_weight(up).shape[0]:
            candidates.append((found, candidate))
    smaller, decisions = _choose_mlps(candidates, min_speedup, clock)
    mlps |= decisions

    layers = _choose_kernels(model, smaller, format, values, skip, clock)
    packed: Replacements = {}
    for name, linear in linears_of(model, smaller):
        if layers[name].kernel != "dense" and not isinstance(linear, SparseLinear):
            try:
                packed[linear] = SparseLinear.from_linear(linear, layers[name].kernel.removesuffix(" int8"), values)
            except ValueError as error:  # the layers timed fit the format that was asked for, this one does not
                layers[name] = replace(layers[name], kernel="dense", reason=str(error))

    candidates = []
    for found in whole:
        parts = [packed.get(linear) for linear in found.mlp.linears]
        formats_held = {part.format for part in parts if isinstance(part, SparseLinear)}
        if found.module not in smaller and formats_held and "compact" not in formats_held:
            linears = [packed.get(linear) or part_linear(linear) for linear in found.mlp.linears]
            candidates.append((found, SparseMLP(*linears, activation=found.activation)))  # type: ignore[arg-type]
    fused, decisions = _choose_mlps(candidates, min_speedup, clock)
    mlps |= decisions
    return ConversionReport(model, list(layers.values()), list(mlps.values())), smaller, packed | fused


def _choose_mlps(
    candidates: Sequence[tuple[MLPModule, SparseMLP]], min_speedup: float, clock: _Clock
) -> tuple[Replacements, dict[str, LayerDecision]]:
    """Which MLP modules are replaced by their candidates, and why; those alike are timed together."""
    chosen: Replacements = {}
    decisions: dict[str, LayerDecision] = {}
    groups: dict[tuple[object, ...], list[tuple[MLPModule, SparseMLP]]] = {}
    for found, candidate in candidates:
        parts = [part for part in (candidate.up, candidate.down, candidate.gate) if part is not None]
        weights = [dense_weight(linear) for linear in found.mlp.linears]
        held = sum((part.values if isinstance(part, SparseLinear) else part.weight).numel() for part in parts)
        kinds = [_kernel_of(part) for part in parts]
        shapes = [w.shape for w in weights]
        share = round(20 * held / max(1, sum(w.numel() for w in weights)))
        key = (*shapes, *kinds, weights[0].dtype, weights[0].device, found.activation, type(found.module), share)
        groups.setdefault(key, []).append((found, candidate))
    for group in groups.values():
        some, first = group[:PACKED_LAYERS], group[0][0].mlp
        contenders: dict[str, Sequence[nn.Module]] = {
            "dense": [variant_of(found.module, found.mlp, map(plain_linear, found.mlp.linears)) for found, _ in some],
            "fused_mlp": [candidate for _, candidate in some],
        }
        ms = clock.time(contenders, dense_weight(first.up), sum(map(_dense_bytes, first.linears)))
        gains = _gains(ms, "fused_mlp")
        kernel = "fused_mlp" if _pays(gains, min_speedup) else "unfused"
        reason = _gains_text(gains) if kernel == "fused_mlp" else f"one op would be {_gains_text(gains)}"
        for found, candidate in group:
            neurons = dense_weight(found.mlp.up).shape[0]
            dead = neurons - candidate.up.out_features
            why = f"{dead} of {neurons} neurons {'removed' if kernel == 'fused_mlp' else 'are dead'}; {reason}"
            decision = _mlp_decision(found.name, found.mlp, kernel, why if dead else reason)
            decisions[found.name] = replace(decision, ms_dense=ms["dense"], ms_sparse=ms["fused_mlp"])
            if kernel == "fused_mlp":
                chosen[found.module] = candidate
                candidate.train(found.module.training)
    return chosen, decisions


def _fuse_blocks(model: nn.Module, min_speedup: float, tokens: Sequence[int]) -> list[LayerDecision]:
    """Lets the blocks of a language model decode in C++ where that pays; a decision for each."""
    few = [m for m in tokens if m <= blocks.MAX_TOKENS]
    try:
        layers = {layer: block_of(layer) for layer in layers_of(model)}
    except (AttributeError, ValueError):  # no Hugging Face language model, or of another architecture
        return []
    names = {module: name for name, module in model.named_modules()}
    if not layers or not few or any(p.device.type != "cpu" for p in model.parameters()):
        return []

    def decide(kernel: str, reason: str, **ms: Any) -> list[LayerDecision]:
        return [_block_decision(names[layer], block, kernel, reason, **ms) for layer, block in layers.items()]

    if model.training:
        return decide("modules", "the model is in training mode: call eval() first")
    if any(blocks.has_hooks(module) for layer in layers for module in layer.modules()):
        return decide("modules", "has hooks, or a forward of its own")
    shared = blocks.Shared()
    ms: dict[str, dict[int, float]] = {"dense": {}, "decoder_block": {}}
    why = ""
    with torch.inference_mode():
        for layer in layers:
            blocks.fuse(layer, max(few), shared)
            try:
                plain, native = (way() for way in blocks.ways(model, layer, max(few)))
            except Exception as error:  # whatever modules raise whose dtypes do not fit together
                why = f"{names[layer]} fails by itself: {error}"
                break
            difference = (native - plain).abs().max().item() / max(plain.abs().max().item(), 1e-30)
            if not blocks.runs_native(layer):
                why = why or f"{names[layer]} has layers that C++ does not know"
            elif not difference <= TOLERANCE[native.dtype]:
                why = why or f"{names[layer]} computes something else"
        for m in few if not why else ():
            both = zip(*(blocks.ways(model, layer, m) for layer in layers), strict=True)
            calls = dict(zip(ms, map(list, both), strict=True))
            timings = interleaved(calls, seconds=LONGER * SECONDS)
            for name, timing in timings.items():
                ms[name][m] = timing.ms_p50
    gains = _gains(ms, "decoder_block")
    if not why and _pays(gains, min_speedup):
        return decide("decoder_block", _gains_text(gains), ms_dense=ms["dense"], ms_sparse=ms["decoder_block"])
    for layer in layers:
        blocks.unfuse(layer)
    why = why or f"decoder_block would be {_gains_text(gains)}"
    return decide("modules", why, ms_dense=ms["dense"], ms_sparse=ms["decoder_block"])


def _fuse_head(model: Any, min_speedup: float, tokens: Sequence[int]) -> LayerDecision | None:
    """Lets the dense LM head of a Hugging Face model on the CPU multiply a few tokens by rows where that pays."""
    few = [m for m in tokens if m <= blocks.MAX_TOKENS]
    try:
        layers_of(model)
        head = model.get_output_embeddings()
    except (AttributeError, ValueError):
        return None
    weight = getattr(head, "weight", None)
    if (
        not few
        or not isinstance(weight, Tensor)
        or not weight.is_cpu
        or weight.dtype not in (torch.bfloat16, torch.half)
    ):
        return None
    blocks.unfuse(head)
    if type(head) is not nn.Linear or blocks.has_hooks(head):
        return None
    ms: dict[str, dict[int, float]] = {"dense": {}, "dense by rows": {}}
    fused = copy.copy(head)
    blocks.fuse_head(fused, max(few))
    with torch.inference_mode():
        for m in few:
            x = torch.randn(m, weight.shape[1], generator=torch.Generator().manual_seed(m)).to(weight)
            calls = {"dense": [partial(head, x)], "dense by rows": [partial(fused, x)]}
            for name, timing in interleaved(calls, seconds=LONGER * SECONDS).items():
                ms[name][m] = timing.ms_p50
    gains = _gains(ms, "dense by rows")
    pays = _pays(gains, min_speedup)
    if pays:
        blocks.fuse_head(head, max(few))
    kernel, reason = ("dense by rows", "") if pays else ("dense", "by rows would be ")
    zeros = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
    name = next(name for name, module in model.named_modules() if module is head)
    N, K = weight.shape
    return LayerDecision(
        name, (N, K), weight.dtype, zeros, "head", kernel, reason + _gains_text(gains), ms["dense"], ms["dense by rows"]
    )


def _block_decision(name: str, block: Block, kernel: str, reason: str, **ms: Any) -> LayerDecision:
    parts = [linear for linear in (*block.qkv, block.out, block.up, block.gate, block.down) if linear is not None]
    weights = [dense_weight(linear) for linear in parts if is_linear(linear) or isinstance(linear, SparseLinear)]
    total = sum(w.numel() for w in weights)
    zeros = total - sum(int(w.count_nonzero()) for w in weights)
    D = block.attention.config.hidden_size
    dtype = weights[0].dtype if weights else next(block.module.parameters()).dtype
    return LayerDecision(name, (D, D), dtype, zeros / max(1, total), "block", kernel, reason, **ms)


def _mlp_decision(name: str, mlp: MLP | SparseMLP, kernel: str, reason: str) -> LayerDecision:
    weights = [dense_weight(linear) for linear in (mlp.up, mlp.down, mlp.gate) if linear is not None]
    total = sum(w.numel() for w in weights)
    zeros = total - sum(int(w.count_nonzero()) for w in weights)
    H, K = weights[0].shape
    return LayerDecision(name, (H, K), weights[0].dtype, zeros / max(1, total), "mlp", kernel, reason)


def _choose_kernels(
    model: nn.Module, smaller: Replacements, format: str, values: str | None, skip: Sequence[str], clock: _Clock
) -> dict[str, LayerDecision]:
    """A decision for each linear of the model in which ``smaller`` MLPs have taken their places."""
    decisions: dict[str, LayerDecision] = {}
    groups: dict[tuple[object, ...], list[tuple[str, nn.Module]]] = {}
    readers = weight_readers(model)
    in_mlp = {
        part
        for module in (*model.modules(), *smaller.values())
        if isinstance(module, SparseMLP)
        for part in module.children()
    }
    found = linears_of(model, smaller)
    for name, linear in found:
        weight = dense_weight(linear).detach()
        zeros = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
        pattern = detect_pattern(weight)
        N, K = weight.shape
        why_dense = obstacle(name, linear, readers, skip)
        if why_dense is None and not isinstance(linear, SparseLinear):
            if zeros == 0 and values is None:
                why_dense = "no zeros"
            elif zeros < MIN_SPARSITY and clock.min_speedup > 0 and values is None:
                why_dense = "hardly any zeros"
            elif format == "compact" and linear in in_mlp:
                why_dense = "part of a SparseMLP, which takes no compact layers"
        kernel = _kernel_of(linear)
        decisions[name] = LayerDecision(name, (N, K), weight.dtype, zeros, pattern, kernel, why_dense or "")
        if why_dense is None:
            kind = (kernel, linear in in_mlp, type(linear))
            key = (N, K, weight.dtype, weight.device, round(20 * zeros), pattern, kind)
            groups.setdefault(key, []).append((name, linear))
    for group in groups.values():
        kernel, reason, ms_dense, ms_sparse = _choose_kernel(
            [linear for _, linear in group], format, values, clock, group[0][1] in in_mlp
        )
        for name, _ in group:
            decisions[name] = replace(
                decisions[name], kernel=kernel, reason=reason, ms_dense=ms_dense, ms_sparse=ms_sparse
            )
    made = {part for module in smaller.values() for part in module.children()}
    for name, linear in found:
        if linear in made:
            decisions[name] = replace(decisions[name], reason=f"neurons removed; {decisions[name].reason}")
    return decisions


def _choose_kernel(
    linears: list[nn.Module], format: str, values: str | None, clock: _Clock, in_mlp: bool
) -> tuple[str, str, dict[int, float], dict[int, float]]:
    """The kernel for linears of one kind, why, and ms by tokens: dense, and of that kernel or the best that lost."""
    weight = dense_weight(linears[0]).detach()
    some = linears[: min(PACKED_LAYERS, clock.copies(weight.nbytes))]
    held = _kernel_of(linears[0]) if isinstance(linears[0], SparseLinear) else None
    packed: dict[str, Sequence[nn.Module]] = {}
    if held is not None:
        packed[held] = some
    else:
        try:
            for name in _candidates(weight, values, in_mlp) if format == "auto" else [format]:
                layers = [SparseLinear.from_linear(linear, name, values) for linear in some]
                packed[_kernel_of(layers[0])] = layers
        except ValueError as error:
            return "dense", str(error), {}, {}
    ms = clock.time({"dense": [plain_linear(linear) for linear in some], **packed}, weight, weight.nbytes)
    gains = {name: _gains(ms, name) for name in packed}

    fits = [name for name in packed if _pays(gains[name], clock.min_speedup)]
    best = max(fits or packed, key=lambda name: math.prod(gains[name].values()))
    text = _gains_text(gains[best]) + _implementations_text(packed[best][0], clock.tokens)
    if held is not None:
        return held, f"already packed; {text}", ms["dense"], ms[held]
    if not fits:
        return "dense", f"{best} would be {text}", ms["dense"], ms[best]
    return best, text, ms["dense"], ms[best]


def _kernel_of(linear: nn.Module) -> str:
    """As :class:`LayerDecision` names it."""
    if not isinstance(linear, SparseLinear):
        return "dense"
    return linear.format if linear.scales is None else f"{linear.format} int8"


def _candidates(weight: Tensor, values: str | None, in_mlp: bool) -> list[str]:
    """Formats worth timing: what pack chooses, and its neighbours where the border is near."""
    chosen = formats.pack(weight + 0.0, values=values).format
    if chosen == "dense":
        return [chosen]
    sparse = weight.count_nonzero().item() < 0.35 * weight.numel()
    names = [chosen, "bitmap"]
    if sparse and weight.shape[1] <= formats.SLICED_MAX_K:
        names.append("sliced")
    if values == "int8" and not sparse:
        names.append("dense")
    return [name for name in dict.fromkeys(names) if not (in_mlp and name == "compact")]


def _gains(ms: Mapping[str, dict[int, float]], name: str) -> dict[int, float]:
    return {m: ms["dense"][m] / taken for m, taken in ms[name].items()}


def _implementations_text(layer: nn.Module, tokens: Sequence[int]) -> str:
    """Which of its kernels a packed layer runs on a GPU, where there are several."""
    if not isinstance(layer, SparseLinear) or layer._layouts is None:
        return ""
    runs: Callable[..., str]
    has = {name: layout is not None for name, layout in vars(layer._layouts).items()}
    if has["lanes"]:
        runs = partial(implementation_of_bitmap, gather=has["gather"])
    elif has["gather"]:
        runs = implementation_of_sliced
    else:
        runs = partial(implementation_of_nm, fragments=has["fragments"], compressed=has["compressed"])
    names: dict[str, list[int]] = {}
    for M in tokens:
        names.setdefault(runs(layer.values, layer.out_features, layer.in_features, M), []).append(M)
    return "".join(f"; {name} at {' / '.join(map(str, some))}" for name, some in names.items())


def _pays(gains: Mapping[int, float], min_speedup: float) -> bool:
    mean = math.prod(gains.values()) ** (1 / len(gains))
    lost = LOSS if mean >= WORTH * min_speedup else NOISE
    return mean >= min_speedup and min(gains.values()) >= (1 - lost) * min_speedup


def _gains_text(gains: Mapping[int, float]) -> str:
    return ", ".join(f"{gain:.2f}x at {m}" for m, gain in gains.items()) + " tokens"
