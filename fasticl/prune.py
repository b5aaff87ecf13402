"""Which weights go: ``sparsify_(model, config)`` sets the least important ones to zero, or removes experts, in place.

A score says how much a weight (or a neuron, or a head) matters, a pattern says which sets of weights may go together:

====================  ==========================================================  =================================
config                score                                                       pattern
====================  ==========================================================  =================================
``Magnitude``         ``|W_ij|``; neuron: ``||W_up[i]||``; head: its weights' norm  unstructured, N:M, neuron, head
``Wanda``             ``|W_ij| * ||X_j||_2`` over the calibration tokens          unstructured per output row, N:M
``SparseGPT``         ``W_ij^2 / [H^-1]_jj``, H = XᵀX; what stays is moved to     unstructured, N:M
                      make up for what goes
``NeuronActivation``  ``mean|h_i| * ||W_down[:, i]||``                            neuron
``RouterNorm``        ``||w_s|| - ||w_s before fine-tuning||``, w_s the router's  expert
                      row of expert s
====================  ==========================================================  =================================

Everywhere: N outputs, K inputs, ``W [N, K]`` (the ``[K, N]`` weight of GPT-2's Conv1D is read transposed). Of n scores
exactly ``round(sparsity * n)`` go (half to even, as in :mod:`torch.nn.utils.prune`), whatever ties there are: of equal
scores the earlier ones stay. Zeros score 0, so what was already pruned goes first. Shared weights are pruned once.
:mod:`fasticl.layers` finds the layers, neurons and heads, :mod:`fasticl.experts` the experts, and
:mod:`fasticl.reconstruct` is SparseGPT's arithmetic.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, tee
from typing import Any

import torch
from torch import Tensor, nn

from fasticl.allocation import by_sensitivity
from fasticl.calibration import input_means, run
from fasticl.experts import (
    find_moe_layers,
    pretrained_routers,
    remove_experts_,
    router_norm_changes,
    stacked_weights,
)
from fasticl.layers import (
    Filter,
    Group,
    Layer,
    default_filter,
    distinct_groups,
    distinct_layers,
    find_blocks,
    find_heads,
    find_layers,
    find_neurons,
    fold_masks_,
    is_adapter,
)
from fasticl.reconstruct import BlockCalls, reconstruct, reconstruct_layers_
from fasticl.scores import N_OF_M, kth_smallest, row_blocks, scored, smallest_of_rows, zero_of_rows


@dataclass(frozen=True)
class Magnitude:
    """The smallest weights go: the score of the paper, which prunes the neurons with the smallest row norm.

    Args:
        sparsity: fraction to remove, in [0, 1); N:M patterns fix it (2:4 is 0.5).
        pattern: ``unstructured`` (single weights), ``2:4``, ``4:8``, ``8:16`` (n of every m consecutive inputs stay),
            ``neuron`` (an MLP's hidden unit, by the norm of its row of the up projection; warns on gated MLPs, for
            which :class:`NeuronActivation` is made) or ``head`` (an attention head, by the norm of its query, key and
            value rows and output columns; keys and values that several query heads share go with the last of them).
        scope: ``layer`` compares scores inside a layer, ``global`` over all layers (one may then lose everything).
    """

    sparsity: float
    pattern: str = "unstructured"
    scope: str = "layer"

    def __post_init__(self) -> None:
        _check_config(self.sparsity, self.pattern, ("unstructured", *N_OF_M, "neuron", "head"))
        if self.scope not in ("layer", "global"):
            raise ValueError(f"expected scope 'layer' or 'global', got {self.scope!r}")
        if self.scope == "global" and self.pattern in N_OF_M:
            raise ValueError(f"expected scope 'layer' with pattern {self.pattern!r}, which compares inside each group")


@dataclass(frozen=True)
class Wanda:
    """Weights times the norm of what they multiply, ``|W_ij| * ||X_j||_2``, compared inside each output row.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023. One pass of the dense model
    gives the norms of all layers; the paper prunes block after block and runs each on its pruned predecessors' output.
    Padding tokens count like others.

    Args:
        sparsity: fraction of each output row to remove, in [0, 1).
        pattern: ``unstructured``, ``2:4``, ``4:8`` or ``8:16``.
        allocation: ``uniform``, or ``sensitivity``: decoder blocks that the model misses more keep more, at the same
            sparsity in all, by the first batch (:func:`fasticl.allocation.by_sensitivity`); for unstructured only.
    """

    sparsity: float
    pattern: str = "unstructured"
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        _check_config(self.sparsity, self.pattern, ("unstructured", *N_OF_M))
        _check_allocation(self.allocation, self.pattern)


@dataclass(frozen=True)
class SparseGPT:
    """The weights go that cost a layer's outputs least, and those that stay are moved to make up for it.

    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023. Each layer's
    ``||X Wᵀ - X W'ᵀ||²`` over the calibration tokens X is kept small, decoder block after decoder block, with the
    inputs that the pruned blocks before it give. Blocks are the members of the outermost ``nn.ModuleList`` or
    ``nn.Sequential`` of which several hold layers, if each is called once with what the one before returned; the layers
    of other models are pruned together. Takes about three passes of the model and ``N K² + K³`` flops a layer, and as
    memory the inputs of a block and a float64 ``[K, K]`` for each of its layers. Padding tokens count like others.

    Args:
        sparsity: fraction of each layer to remove, in [0, 1).
        pattern: ``unstructured``, ``2:4``, ``4:8`` or ``8:16``.
        allocation: as of :class:`Wanda`.
        damping: of the mean of ``XᵀX``'s diagonal, added to it; positive. Fewer tokens than inputs may want more.
    """

    sparsity: float
    pattern: str = "unstructured"
    allocation: str = "uniform"
    damping: float = 0.01

    def __post_init__(self) -> None:
        _check_config(self.sparsity, self.pattern, ("unstructured", *N_OF_M))
        _check_allocation(self.allocation, self.pattern)
        if not 0 < self.damping < math.inf:
            raise ValueError(f"expected damping > 0, got {self.damping}")


@dataclass(frozen=True)
class NeuronActivation:
    """MLP neurons that say little go: ``mean|h_i| * ||W_down[:, i]||``, h the down projection's input.

    The one to use on gated MLPs. The mean is over all calibration tokens, in one pass of the dense model.

    Args:
        sparsity: fraction of each MLP's neurons to remove, in [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        _check_config(self.sparsity, "neuron", ("neuron",))


@dataclass(frozen=True)
class RouterNorm:
    """Experts that fine-tuning left alone go, each with its router vector: the smallest ``||w_s|| - ||w_s before||``.

    Chowdhury et al., "A Provably Effective Method for Pruning Experts in Fine-tuned Sparse Mixture-of-Experts", ICML
    2024, arXiv 2405.16646. ``w_s`` is row s of a router's weight. The change of its norm has a sign: a vector that
    shrank goes before one that stayed. Each MoE layer loses the same share. The weights are gone, not zero, and the
    model's config says so, so that what ``save_pretrained`` writes loads wherever the model did. The paper's proof and
    experiments are about vision models whose routers were fine-tuned; a router that was not ranks nothing, and is
    refused.

    Args:
        sparsity: fraction of each MoE layer's experts to remove, in [0, 1); at least as many stay as the router picks.
        pretrained: where fine-tuning began: the model, or its folder, of which only the routers are read.
    """

    sparsity: float
    pretrained: nn.Module | str | os.PathLike[str]

    def __post_init__(self) -> None:
        _check_config(self.sparsity, "expert", ("expert",))
        if not isinstance(self.pretrained, nn.Module | str | os.PathLike):
            raise TypeError(
                "expected pretrained to be the model that fine-tuning began with, or its folder, got "
                f"{type(self.pretrained).__name__}"
            )


@dataclass(frozen=True)
class LayerSparsity:
    """One weight of a :class:`SparsityReport`; ``shape`` is (N outputs, K inputs).

    Of RouterNorm, a layer's experts, shape (E experts, weights in each); removed weights count as zeros, and
    ``removed`` has the numbers that the removed experts had.
    """

    name: str
    shape: tuple[int, int]
    zeros_before: int
    zeros_after: int
    pattern: str
    score: str
    removed: tuple[int, ...] = ()

    @property
    def before(self) -> float:
        return self.zeros_before / max(self.shape[0] * self.shape[1], 1)

    @property
    def after(self) -> float:
        return self.zeros_after / max(self.shape[0] * self.shape[1], 1)


@dataclass(frozen=True)
class SparsityReport:
    """What :func:`sparsify_` did: one row a weight; ``print`` it for a table."""

    layers: tuple[LayerSparsity, ...]

    @property
    def total(self) -> float:
        """Fraction of zeros over all listed weights, after pruning."""
        return self._fraction([row.zeros_after for row in self.layers])

    def _fraction(self, zeros: list[int]) -> float:
        return sum(zeros) / max(sum(row.shape[0] * row.shape[1] for row in self.layers), 1)

    def __str__(self) -> str:
        before = self._fraction([row.zeros_before for row in self.layers])
        cells = [
            ("layer", "shape", "before", "after", "pattern", "score"),
            *(
                (r.name, f"{r.shape[0]}x{r.shape[1]}", f"{r.before:.1%}", f"{r.after:.1%}", r.pattern, r.score)
                for r in self.layers
            ),
            ("total", "", f"{before:.1%}", f"{self.total:.1%}", "", ""),
        ]
        width = [max(len(row[i]) for row in cells) for i in range(6)]
        align = ("<", ">", ">", ">", "<", "<")
        return "\n".join(
            "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, width, strict=True)).rstrip() for row in cells
        )


def sparsify_(
    model: nn.Module,
    config: Magnitude | Wanda | SparseGPT | NeuronActivation | RouterNorm,
    calibration: Iterable[Any] | None = None,
    *,
    filter_fn: Filter | None = None,
    advance: Callable[[], None] | None = None,
) -> SparsityReport:
    """Set the least important weights of ``model`` to zero, in place; RouterNorm removes experts.

    Nothing is changed unless every check passes, except that masks are folded first (:func:`fold_masks_`), and that
    SparseGPT, stopped by a layer that it cannot reconstruct, leaves the blocks before it pruned.

    Args:
        model: any module. Layers are its ``nn.Linear`` and transformers ``Conv1D`` modules; neurons those of
            :func:`fasticl.layers.find_mlps`; heads those of attention modules with ``q_proj, k_proj, v_proj`` and
            ``o_proj`` or ``out_proj`` (Llama, OPT), ``c_attn`` and ``c_proj`` (GPT-2), ``query_key_value`` and
            ``dense`` (GPT-NeoX); experts those of transformers' Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE.
        config: :class:`Magnitude`, :class:`Wanda`, :class:`SparseGPT`, :class:`NeuronActivation` or
            :class:`RouterNorm`.
        calibration: batches of model inputs, each a tensor (``model(x)``), a tuple or list (``model(*x)``) or a mapping
            (``model(**x)``), already on the model's device. Unused by Magnitude and RouterNorm, needed by all others.
        filter_fn: ``(module, name) -> bool``, which layers may be pruned; a neuron or head goes only where it accepts
            all of the MLP's or attention's layers. Default: all but output embeddings (``lm_head``, and whatever shares
            the weight of an ``nn.Embedding``), the gate of a shared expert, the matrices of PEFT's adapters, and the
            ``out_proj`` of ``nn.MultiheadAttention``, which is never called. None with RouterNorm, whose layers stay of
            one size.
        advance: called after each decoder block that SparseGPT has pruned.

    Returns:
        The zeros before and after, one row a pruned weight, or of RouterNorm an MoE layer.

    Warns:
        UserWarning: for ``Magnitude(pattern="neuron")`` on gated MLPs, where a layer's experts are one parameter
            ``[E, N, K]``, not linears: all but RouterNorm leave them dense, and where PEFT's adapters are not merged.

    Raises:
        TypeError: for a model, config, batch or weight dtype that is not one of the above.
        ValueError: if no layer fits, a weight or a layer input is not finite, K is not a multiple of m, calibration is
            missing or does not reach a layer, SparseGPT's damping is too small for its tokens, there are no blocks to
            allocate sparsity to, or an attention's heads cannot be determined; with RouterNorm, if the model's experts
            are not of a known layout, ``pretrained`` does not fit or has the same routers, or too few experts stay.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, Magnitude | Wanda | SparseGPT | NeuronActivation | RouterNorm):
        raise TypeError(
            "expected config to be Magnitude, Wanda, SparseGPT, NeuronActivation or RouterNorm, got "
            f"{type(config).__name__}"
        )
    if isinstance(config, RouterNorm):
        if filter_fn is not None:
            raise ValueError("expected filter_fn None with RouterNorm, which leaves equally many experts in each layer")
        fold_masks_(model)
        return _remove_experts(model, config)
    if not isinstance(config, Magnitude):
        _check_calibration(config, calibration)
    if experts := stacked_weights(model):
        warnings.warn(
            f"{type(config).__name__} prunes no experts that are one parameter [E, N, K]: {experts:,} weights stay "
            "dense. RouterNorm removes experts",
            UserWarning,
            stacklevel=2,
        )
    if any(map(is_adapter, model.modules())):
        warnings.warn(
            "merging adapters into pruned weights fills in their zeros: call merge_and_unload() first, or never",
            UserWarning,
            stacklevel=2,
        )
    fold_masks_(model)
    accept = filter_fn or default_filter(model)
    with torch.no_grad():
        if isinstance(config, NeuronActivation) or config.pattern in ("neuron", "head"):
            return _sparsify_structured(model, config, calibration, accept)
        return _sparsify_weights(model, config, calibration, accept, advance or (lambda: None))


def detect_pattern(weight: Tensor) -> str:
    """The most regular pattern that the zeros of ``weight [N, K]`` fit.

    ``dense`` (no zero), ``neuron rows``, ``neuron cols``, ``neuron rows+cols`` (every zero lies in a row or column of
    zeros), ``2:4``, ``4:8``, ``8:16`` (at most n of every m consecutive inputs are not zero, in at least half of the
    groups n: a matrix with few non-zeros fits by chance), else ``unstructured``.
    """
    if weight.dim() != 2:
        raise ValueError(f"expected weight [N, K], got shape {tuple(weight.shape)}")
    kept = weight != 0
    count, rows, cols = (int(t.sum()) for t in (kept, kept.any(1), kept.any(0)))
    if count == weight.numel():
        return "dense"
    if count == rows * cols:  # all that is not in a row or column of zeros is kept
        return "neuron " + "+".join(["rows"] * (rows < len(weight)) + ["cols"] * (cols < weight.shape[1]))
    for pattern, (n, m) in N_OF_M.items():
        if weight.shape[1] % m == 0:
            groups = kept.unflatten(1, (-1, m)).sum(-1, dtype=torch.uint8)
            if int(groups.max()) <= n and 2 * int((groups == n).sum()) >= groups.numel():
                return pattern
    return "unstructured"


def _check_config(sparsity: float, pattern: str, patterns: tuple[str, ...]) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise TypeError(f"expected sparsity to be a number, got {type(sparsity).__name__}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"expected sparsity in [0, 1), got {sparsity}")
    if pattern not in patterns:
        raise ValueError(f"expected pattern to be one of {', '.join(patterns)}, got {pattern!r}")
    if pattern in N_OF_M:
        n, m = N_OF_M[pattern]
        if sparsity != 1 - n / m:
            raise ValueError(f"expected sparsity {1 - n / m} with pattern {pattern}, got {sparsity}")


def _check_allocation(allocation: str, pattern: str) -> None:
    if allocation not in ("uniform", "sensitivity"):
        raise ValueError(f"expected allocation 'uniform' or 'sensitivity', got {allocation!r}")
    if allocation != "uniform" and pattern in N_OF_M:
        raise ValueError(f"expected allocation 'uniform' with pattern {pattern!r}, which fixes it, got {allocation!r}")


def _check_calibration(config: Wanda | SparseGPT | NeuronActivation, calibration: Iterable[Any] | None) -> None:
    name = type(config).__name__
    if calibration is None:
        raise ValueError(f"expected calibration batches for {name}, got None")
    if isinstance(calibration, Tensor | Mapping) or not isinstance(calibration, Iterable):
        raise TypeError(f"expected an iterable of batches for {name}, such as a list, got {type(calibration).__name__}")


def _check_layers(layers: Iterable[Layer], m: int = 1) -> None:
    for layer in layers:
        if layer.weight.shape[1] % m:
            raise ValueError(f"{layer.name}: expected K to be a multiple of {m}, got K = {layer.weight.shape[1]}")
        if not all(bool(block.isfinite().all()) for block in row_blocks(layer.weight)):
            raise ValueError(f"{layer.name}: expected finite weights, got NaN or inf")


def _zeros(layers: Iterable[Layer]) -> list[int]:
    return [layer.weight.numel() - int(layer.weight.count_nonzero()) for layer in layers]


def _report(layers: list[Layer], zeros_before: list[int], pattern: str, score: str) -> SparsityReport:
    return SparsityReport(
        tuple(
            LayerSparsity(layer.name, (layer.weight.shape[0], layer.weight.shape[1]), before, after, pattern, score)
            for layer, before, after in zip(layers, zeros_before, _zeros(layers), strict=True)
        )
    )


def _sparsify_weights(
    model: nn.Module,
    config: Magnitude | Wanda | SparseGPT,
    calibration: Iterable[Any] | None,
    accept: Filter,
    advance: Callable[[], None],
) -> SparsityReport:
    found = find_layers(model, accept)
    if not found:
        raise ValueError("expected at least one nn.Linear or Conv1D that filter_fn accepts, got none")
    layers = distinct_layers(found)
    n_of_m = N_OF_M.get(config.pattern)
    _check_layers(layers, n_of_m[1] if n_of_m else 1)
    zeros_before = _zeros(layers)
    if not isinstance(config, Magnitude):
        _zero_by_inputs(model, config, found, calibration, advance)
    elif n_of_m is not None:
        for layer in layers:
            zero_of_rows(layer.weight, n_of_m)
    elif config.scope == "global":
        _zero_smallest([layer.weight for layer in layers], config.sparsity)
    else:
        for layer in layers:
            _zero_smallest([layer.weight], config.sparsity)
    return _report(layers, zeros_before, config.pattern, type(config).__name__)


def _zero_by_inputs(
    model: nn.Module,
    config: Wanda | SparseGPT,
    layers: list[Layer],
    calibration: Iterable[Any] | None,
    advance: Callable[[], None],
) -> None:
    """One pass of the dense model; after it Wanda zeroes all layers, and SparseGPT block after block."""
    blocks = find_blocks(model, layers)
    calls = BlockCalls(blocks if isinstance(config, SparseGPT) else [])
    batches, kept = tee(calibration or ())
    if isinstance(config, Wanda) and config.allocation == "uniform":
        kept = iter(())  # holds no batch
    with calls.recorded():
        squares = _means_of(model, layers, batches, torch.square)
    norms = {key: mean.sqrt() for key, mean in squares.items()}  # over sqrt(tokens), which no comparison sees
    sparsities = dict.fromkeys(norms, config.sparsity)
    if config.allocation == "sensitivity":
        first = next(kept)
        kept = chain([first], kept)
        sparsities = by_sensitivity(model, blocks, layers, norms, config.sparsity, first)
    n_of_m = N_OF_M.get(config.pattern)
    if isinstance(config, SparseGPT):
        damping = config.damping

        def prune(layer: Layer, gram: Tensor) -> Tensor:
            return reconstruct(layer.weight, gram, sparsities[layer.key], n_of_m, damping)

        reconstruct_layers_(model, layers, calls, kept, prune, advance)
        return
    for layer in distinct_layers(layers):
        zero_of_rows(layer.weight, n_of_m or sparsities[layer.key], norms[layer.key])


def _means_of(
    model: nn.Module, layers: list[Layer], batches: Iterable[Any], function: Callable[[Tensor], Tensor]
) -> dict[Hashable, Tensor]:
    """``mean over tokens of function(x) [K]`` in float64 for the input ``x [..., K]`` of each layer, in one pass."""
    return input_means(model, layers, partial(run, model, batches), lambda x: function(x).sum(0, dtype=torch.float64))


def _zero_smallest(weights: list[Tensor], sparsity: float) -> None:
    """Zero the ``round(sparsity * n)`` smallest of all n weights; scores live for one block of rows only."""
    count = round(sparsity * sum(weight.numel() for weight in weights))
    if count == 0:
        return
    dtype = torch.float32
    for weight in weights:
        dtype = torch.promote_types(dtype, weight.dtype)
    largest, stay = kth_smallest(lambda: (s for w in weights for _, s in scored(w, dtype=dtype)), count, dtype)
    for weight in weights:
        for block, scores in scored(weight, dtype=dtype):
            mask = scores <= largest
            if stay:
                tied = (scores == largest).flatten().nonzero().squeeze(1)[:stay]
                mask.view(-1)[tied] = False
                stay -= len(tied)
            block.masked_fill_(mask, 0)


def _sparsify_structured(
    model: nn.Module,
    config: Magnitude | Wanda | SparseGPT | NeuronActivation,
    calibration: Iterable[Any] | None,
    accept: Filter,
) -> SparsityReport:
    heads = isinstance(config, Magnitude) and config.pattern == "head"
    found = find_heads(model, accept) if heads else find_neurons(model, accept)
    if not found:
        what = "an attention module" if heads else "an MLP"
        raise ValueError(
            f"expected {what} of a known layout that filter_fn accepts, got none in {type(model).__name__}"
        )
    groups = distinct_groups(found)
    layers = distinct_layers(layer for group in groups for layer in group.layers)
    _check_layers(layers)
    zeros_before = _zeros(layers)
    if isinstance(config, NeuronActivation):
        scores = activation_scores(model, found, calibration)
    elif heads:
        scores = [_head_norms(group) for group in groups]
    else:
        if any(len(group.layers) == 3 for group in groups):
            warnings.warn(
                "Magnitude(pattern='neuron') destroys real language models with gated MLPs: at 10 % of neurons "
                "SmolLM2-135M's perplexity goes from 33 to 17775, with NeuronActivation, the one to use, to 39",
                UserWarning,
                stacklevel=3,
            )
        scores = [_norms(group.layers[0].weight) for group in groups]
    scores = [score.double().cpu() for score in scores]
    if isinstance(config, Magnitude) and config.scope == "global":
        pool = torch.cat(scores)
        masks = smallest_of_rows(pool[None], round(config.sparsity * len(pool)))[0].split([len(s) for s in scores])
    else:
        masks = tuple(smallest_of_rows(s[None], round(config.sparsity * len(s)))[0] for s in scores)
    for group, mask in zip(groups, masks, strict=True):
        group.zero_(mask)
    return _report(layers, zeros_before, "head" if heads else "neuron", type(config).__name__)


def _remove_experts(model: nn.Module, config: RouterNorm) -> SparsityReport:
    layers = find_moe_layers(model)
    changes = router_norm_changes(layers, pretrained_routers(config.pretrained))
    gone = [smallest_of_rows(change[None], round(config.sparsity * len(change)))[0] for change in changes]
    rows = []
    for layer, mask in zip(layers, gone, strict=True):
        E, size = len(mask), sum(part[0].numel() for part in layer.stacked)
        zeros = torch.stack([(part.flatten(1) == 0).sum(1).cpu() for part in layer.stacked]).sum(0)  # [E]
        after = int(zeros[~mask].sum()) + int(mask.sum()) * size
        removed = tuple(mask.nonzero().squeeze(1).tolist())
        rows.append(LayerSparsity(layer.name, (E, size), int(zeros.sum()), after, "expert", "RouterNorm", removed))
    remove_experts_(model, layers, gone)
    return SparsityReport(tuple(rows))


def activation_scores(model: nn.Module, mlps: list[Group], calibration: Iterable[Any] | None) -> list[Tensor]:
    """:class:`NeuronActivation`'s score of the neurons of each of ``distinct_groups(mlps)``, ``[H]``, in one pass.

    Args:
        model: called with each batch.
        mlps: of :func:`fasticl.layers.find_neurons`; where several share weights, means are over what all of them see.
        calibration: batches, as for :func:`sparsify_`.
    """
    means = _means_of(model, [group.layers[1] for group in mlps], calibration or (), torch.abs)
    downs = [group.layers[1] for group in distinct_groups(mlps)]
    return [means[down.key] * _norms(down.weight.t()) for down in downs]


def _norms(view: Tensor) -> Tensor:
    """The 2-norm of each entry of ``view [V, ...]``, ``[V]``, in float32 or wider."""
    dtype = torch.promote_types(view.dtype, torch.float32)
    return torch.linalg.vector_norm(view, dim=tuple(range(1, view.dim())), dtype=dtype)


def _head_norms(group: Group) -> Tensor:
    """``sqrt(||W_q[h]||^2 + ||W_k[h]||^2 + ||W_v[h]||^2 + ||W_o[:, h]||^2)``, ``[H]``."""
    squares = [_norms(view).square().repeat_interleave(group.size // len(view)) for view in group.weights]
    return torch.stack(squares).sum(0).sqrt()
