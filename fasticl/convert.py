"""Replaces the pruned layers of a model by packed ones where that is faster, and says layer by layer what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fasticl import formats
from fasticl.nn import SparseLinear, SparseMLP, dense_weight
from fasticl.ops._registry import ACTIVATIONS, apply_activation
from fasticl.prune import MLP, detect_pattern, find_mlps, fold_masks_
from fasticl.timing import interleaved

TOKENS = (1, 128)  # decoding one sequence, and a prompt
MIN_SPARSITY = 0.05  # below it no format is smaller than the dense weight by more than its bitmask
COPIES = 8  # layers of one shape that are timed in turn, so that weights come from beyond the cache as in a model
SECONDS = 0.08  # per timed group


@dataclass(frozen=True)
class LayerDecision:
    """One linear: what it is, what was measured, what was chosen. Times in milliseconds, by number of tokens."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    sparsity: float
    pattern: str
    kernel: str  # "dense" or a format
    reason: str
    ms_dense: dict[int, float] = field(default_factory=dict)
    ms_sparse: dict[int, float] = field(default_factory=dict)

    @property
    def speedup(self) -> dict[int, float]:
        return {tokens: self.ms_dense[tokens] / ms for tokens, ms in self.ms_sparse.items()}


@dataclass(frozen=True)
class ConversionReport:
    """``model`` is the converted model (the same object); ``layers`` one decision per linear."""

    model: nn.Module
    layers: list[LayerDecision]
    fused_mlps: list[str]

    @property
    def converted(self) -> list[LayerDecision]:
        return [layer for layer in self.layers if layer.kernel != "dense"]

    def __str__(self) -> str:
        head = f"{len(self.converted)} of {len(self.layers)} linears run packed, {len(self.fused_mlps)} MLPs as one op"
        return f"{head}\n{table(self.layers)}"


def convert(
    model: nn.Module,
    *,
    format: str = "auto",
    skip: Sequence[str] = ("lm_head",),
    min_speedup: float = 1.0,
    tokens: Sequence[int] = TOKENS,
) -> ConversionReport:
    """Packs every pruned linear of ``model`` that runs faster packed; in place.

    Masks of ``torch.nn.utils.prune`` are folded in first. Each linear (``nn.Linear``, GPT-2's Conv1D) with zeros is timed
    dense and packed, interleaved, on the layers' own weights. It is replaced if the packed one is at least ``min_speedup``
    times as fast at every number of tokens, and stays dense otherwise. An MLP module of which a linear was packed, or
    whose pruned neurons can be removed, becomes one :class:`fasticl.nn.SparseMLP`, if a probe shows that the module
    computes nothing else.

    Args:
        model: any module; its parameters stay where they are (CPU or GPU).
        format: ``"auto"`` times the formats that suit the zeros; or ``"bitmap"``, ``"sliced"``, ``"nm"``, ``"compact"``.
        skip: names, whole or last component, of modules that are left alone, with all that is in them.
        min_speedup: 0 converts every linear with zeros, whatever its speed.
        tokens: batch sizes that the layers will see: positions times sequences.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: ``format`` is unknown, ``min_speedup`` negative, or ``tokens`` not positive.
    """
    _check(model, format, skip, min_speedup, tokens)
    fold_masks_(model)
    model = _replace(model, removed := _remove_neurons(model, skip))
    decisions = _decide(model, format, skip, min_speedup, tokens)
    packed: dict[nn.Module, nn.Module] = {}
    for name, linear in _linears(model):
        if decisions[name].kernel != "dense" and not isinstance(linear, SparseLinear):
            packed[linear] = SparseLinear.from_linear(linear, decisions[name].kernel)
    fused = _fuse_mlps(model, packed, skip)
    names = {module: name for name, module in model.named_modules()}
    for module in removed.values():
        for part in ("up", "gate", "down"):
            layer = decisions.get(f"{names[module]}.{part}")
            if layer is not None and layer.kernel == "dense":
                decisions[layer.name] = replace(layer, reason=f"neurons removed; {layer.reason}")
    fused_names = [names[module] for module in [*removed.values(), *fused]]
    model = _replace(model, packed | fused)
    return ConversionReport(model, list(decisions.values()), sorted(fused_names))


def explain(model: nn.Module, *, tokens: Sequence[int] = TOKENS) -> str:
    """Prints, and returns, one line a linear: shape, sparsity, pattern, kernel, ms dense and packed, and the reason.

    For a model that :func:`convert` has not seen yet it says what convert would do; the model is not changed.
    """
    _check(model, "auto", (), 1.0, tokens)
    text = table(_decide(model, "auto", (), 1.0, tokens).values())
    print(text)
    return text


def table(layers: Iterable[LayerDecision]) -> str:
    """Decisions as aligned text."""
    rows = [("layer", "shape", "zeros", "pattern", "kernel", "ms dense", "ms packed", "reason")]
    for d in layers:
        dense = " / ".join(f"{ms:.3f}" for ms in d.ms_dense.values())
        packed = " / ".join(f"{ms:.3f}" for ms in d.ms_sparse.values())
        shape = f"{d.shape[0]}x{d.shape[1]}"
        rows.append((d.name, shape, f"{d.sparsity:.1%}", d.pattern, d.kernel, dense or "-", packed or "-", d.reason))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _check(model: object, format: str, skip: Sequence[str], min_speedup: float, tokens: Sequence[int]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if format not in formats.FORMATS:
        raise ValueError(f"format: expected one of {', '.join(formats.FORMATS)}, got {format!r}")
    if isinstance(skip, str):
        raise TypeError(f"skip: expected a sequence of names, got the string {skip!r}")
    if not min_speedup >= 0:
        raise ValueError(f"min_speedup: expected a number >= 0, got {min_speedup}")
    if not tokens or any(not isinstance(m, int) or m < 1 for m in tokens):
        raise ValueError(f"tokens: expected positive integers, got {list(tokens)}")


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts each value of ``new`` where its key stands, in all places; returns the model, or what replaced it."""
    places = [(parent, name) for parent in model.modules() for name, child in parent.named_children() if child in new]
    for parent, name in places:
        setattr(parent, name, new[getattr(parent, name)])
    return new.get(model, model)


def _decide(
    model: nn.Module, format: str, skip: Sequence[str], min_speedup: float, tokens: Sequence[int]
) -> dict[str, LayerDecision]:
    decisions: dict[str, LayerDecision] = {}
    groups: dict[tuple[object, ...], list[tuple[str, nn.Module]]] = {}
    by_weight = _used_by_weight(model)
    for name, linear in _linears(model):
        weight = dense_weight(linear).detach()
        zeros = 1 - weight.count_nonzero().item() / max(1, weight.numel())
        pattern = detect_pattern(weight)
        N, K = weight.shape
        why_dense = None
        if _skipped(name, skip):
            why_dense = "skipped by name"
        elif name in by_weight:
            why_dense = f"{by_weight[name]} reads its weight without calling it"
        elif weight.dtype not in formats.DTYPES:
            why_dense = f"dtype {weight.dtype} has no kernel"
        elif zeros < MIN_SPARSITY:
            why_dense = "hardly any zeros" if zeros else "no zeros"
        decisions[name] = LayerDecision(name, (N, K), weight.dtype, zeros, pattern, "dense", why_dense or "")
        if why_dense is None:
            key = (N, K, weight.dtype, weight.device, round(zeros, 2), pattern, isinstance(linear, SparseLinear))
            groups.setdefault(key, []).append((name, linear))
    for group in groups.values():
        kernel, reason, ms_dense, ms_sparse = _measure([linear for _, linear in group], format, min_speedup, tokens)
        for name, linear in group:
            d = decisions[name]
            kept = linear.format if isinstance(linear, SparseLinear) else kernel
            decisions[name] = LayerDecision(
                name, d.shape, d.dtype, d.sparsity, d.pattern, kept, reason, ms_dense, ms_sparse.get(kept, {})
            )
    return decisions


def _measure(
    linears: list[nn.Module], format: str, min_speedup: float, tokens: Sequence[int]
) -> tuple[str, str, dict[int, float], dict[str, dict[int, float]]]:
    """The kernel for linears of one shape and sparsity, why, and ms by tokens: dense, and of each kernel looked at."""
    some = linears[:COPIES]
    weights = [dense_weight(linear).detach().contiguous() for linear in some]
    biases = [getattr(linear, "bias", None) for linear in some]
    if isinstance(some[0], SparseLinear):
        candidates = [some[0].format]
    else:
        candidates = _candidates(weights[0]) if format == "auto" else [format]
    packed: dict[str, list[nn.Module]] = {}
    for name in candidates:
        try:
            packed[name] = [SparseLinear(formats.pack(w, name), b) for w, b in zip(weights, biases, strict=True)]
        except ValueError as error:
            if format != "auto":
                return "dense", str(error), {}, {}
    ms: dict[str, dict[int, float]] = {name: {} for name in ["dense", *packed]}
    for m in tokens:
        x = torch.randn(m, weights[0].shape[1], device=weights[0].device).to(weights[0].dtype)
        contenders: dict[str, list[Callable[[], object]]] = {
            "dense": [_call(nn.functional.linear, x, w, b) for w, b in zip(weights, biases, strict=True)]
        }
        contenders |= {name: [_call(module, x) for module in modules] for name, modules in packed.items()}
        synchronize = torch.cuda.synchronize if x.is_cuda else None
        with torch.inference_mode():
            timings = interleaved(contenders, seconds=SECONDS * len(contenders), synchronize=synchronize)
        for name, timing in timings.items():
            ms[name][m] = timing.ms_p50
    dense = ms.pop("dense")
    gains = {name: [dense[m] / by_tokens[m] for m in tokens] for name, by_tokens in ms.items()}
    best = max(gains, key=lambda name: math.prod(gains[name]))
    text = ", ".join(f"{gain:.2f}x at {m}" for gain, m in zip(gains[best], tokens, strict=True)) + " tokens"
    fits = [name for name in gains if min(gains[name]) >= min_speedup]
    if not fits:
        return "dense", f"{best} would be {text}", dense, ms
    chosen = max(fits, key=lambda name: math.prod(gains[name]))
    text = ", ".join(f"{gain:.2f}x at {m}" for gain, m in zip(gains[chosen], tokens, strict=True)) + " tokens"
    return chosen, text, dense, ms


def _call(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


def _candidates(weight: Tensor) -> list[str]:
    """Formats worth timing: what pack chooses, and its neighbour where the border is near."""
    chosen = formats.pack(weight).format
    sparse = weight.count_nonzero().item() < 0.35 * weight.numel() and weight.shape[1] <= formats.SLICED_MAX_K
    return list(dict.fromkeys([chosen, "bitmap", *(["sliced"] if sparse else [])]))


def _linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = []
    for name, module in model.named_modules():
        try:
            dense = module.packed.values if isinstance(module, SparseLinear) else dense_weight(module)
        except TypeError:
            continue
        if not dense.is_meta:
            found.append((name, module))
    return found


def _skipped(name: str, skip: Sequence[str]) -> bool:
    parts = name.split(".")
    return any(part in skip for part in parts) or any(".".join(parts[:i]) in skip for i in range(1, len(parts) + 1))


def _used_by_weight(model: nn.Module) -> dict[str, str]:
    """Linears whose owners pass ``linear.weight`` to a function: replacing the module would break or bypass them."""
    found = {}
    for name, module in model.named_modules():
        owned = {nn.MultiheadAttention: ("out_proj",), nn.TransformerEncoderLayer: ("linear1", "linear2")}
        for kind, children in owned.items():
            if isinstance(module, kind):
                found |= {f"{name}.{child}" if name else child: kind.__name__ for child in children}
    return found


def _remove_neurons(model: nn.Module, skip: Sequence[str]) -> dict[nn.Module, nn.Module]:
    """MLP modules with hidden neurons that are all zero, and what replaces them: a smaller MLP."""
    new: dict[nn.Module, nn.Module] = {}
    for mlp, module, activation in _whole_mlps(model, skip):
        smaller = SparseMLP.from_linears(mlp.up, mlp.down, mlp.gate, activation=activation)
        if smaller.up.out_features < _width(mlp) and _computes_the_same(module, smaller, mlp):
            new[module] = smaller.train(module.training)
    return new


def _fuse_mlps(
    model: nn.Module, packed: Mapping[nn.Module, nn.Module], skip: Sequence[str]
) -> dict[nn.Module, nn.Module]:
    """MLP modules of which a linear is packed, and the one op that replaces them."""
    new: dict[nn.Module, nn.Module] = {}
    for mlp, module, activation in _whole_mlps(model, skip):
        if any(part in packed for part in mlp.linears):
            gate = None if mlp.gate is None else _part(mlp.gate, packed)
            candidate = SparseMLP(_part(mlp.up, packed), _part(mlp.down, packed), gate, activation=activation)
            if _computes_the_same(module, candidate, mlp):
                new[module] = candidate.train(module.training)
    return new


def _whole_mlps(model: nn.Module, skip: Sequence[str]) -> list[tuple[MLP, nn.Module, str]]:
    """MLPs that are a module of their own, with dense linears and an activation that the kernels have."""
    found = []
    for mlp in find_mlps(model):
        module = model.get_submodule(mlp.name)
        activation = None if isinstance(module, SparseMLP) or _skipped(mlp.name, skip) else _activation(module)
        if activation is not None and not any(isinstance(part, SparseLinear) for part in mlp.linears):
            found.append((mlp, module, activation))
    return found


def _width(mlp: MLP) -> int:
    """Hidden neurons of an MLP."""
    return dense_weight(mlp.up).shape[0]


def _part(linear: nn.Module, packed: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A linear of a SparseMLP: the packed one, or the dense one as nn.Linear."""
    if linear in packed:
        return packed[linear]
    if isinstance(linear, nn.Linear):
        return linear
    weight = dense_weight(linear).detach()
    dense = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
    dense.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    dense.bias = linear.bias  # type: ignore[assignment]
    return dense


def _activation(module: nn.Module) -> str | None:
    """The activation that an MLP module holds, recognised by what it computes."""
    probe = torch.linspace(-6, 6, 97)
    for name in ("act_fn", "act", "activation_fn", "activation", "activation_function"):
        function = getattr(module, name, None)
        if not callable(function):
            continue
        try:
            with torch.no_grad():
                result = function(probe)
        except Exception:  # whatever it is, it is no elementwise function of a tensor
            return None
        for known in ACTIVATIONS:
            if known is not None and torch.allclose(result, apply_activation(probe, known), rtol=1e-5, atol=1e-6):
                return known
    return None


def _computes_the_same(module: nn.Module, candidate: SparseMLP, mlp: MLP) -> bool:
    """Whether the module, in eval mode, is the MLP and nothing else; shown on random tokens."""
    weight = dense_weight(mlp.up)
    x = torch.randn(1, 3, weight.shape[1], device=weight.device).to(weight.dtype)
    training = module.training
    try:
        with torch.no_grad():
            expected, got = module.eval()(x), candidate(x)
    except (TypeError, AttributeError, ValueError, RuntimeError):  # needs other arguments: not an MLP alone
        return False
    finally:
        module.train(training)
    tolerance = 64 * torch.finfo(weight.dtype).eps * expected.abs().max().item() if isinstance(expected, Tensor) else 0
    return isinstance(expected, Tensor) and expected.shape == got.shape and bool(
        ((expected - got).abs() <= tolerance).all()
    )
