"""Which decoder blocks lose more of their weights than others, at the same sparsity in all."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasticl.calibration import call, hooked
from fasticl.layers import Layer, distinct_layers, split_by_block
from fasticl.scores import zero_of_rows

# Between the sparsest and the densest block, as in Yin et al., "Outlier Weighed Layerwise Sparsity", 2024.
SPREAD = 0.16
_POSITIONS = 512  # whose distributions are compared


def by_sensitivity(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    layers: Sequence[Layer],
    norms: Mapping[Hashable, Tensor],
    sparsity: float,
    batch: Any,
) -> dict[Hashable, float]:
    """A sparsity for each weight, by ``Layer.key``: blocks that the model misses more keep more.

    ``D_b`` is the mean over positions of ``KL(p || p_b)``: p is what the model says of the next token, ``p_b`` what it
    says with block b alone pruned by Wanda to ``sparsity``. ``r_b`` is ``D_b``, the smallest brought to 0 and the
    largest to 1; then ``sparsity_b = sparsity + 0.16 * (mean(r) - r_b)``, the mean over weights. Above 84 % sparsity
    (below 16 %) the spread is what is left to 100 % (to 0 %). Layers in no block, or with a weight that is read from
    several places, get ``sparsity``. Takes a pass for each block.

    Args:
        model: left as it was.
        blocks: of :func:`fasticl.layers.find_blocks`.
        norms: by ``Layer.key``, of each layer's inputs ``[K]``, up to a factor.
        batch: of the calibration; a mapping's ``logits_to_keep`` is left out.

    Raises:
        TypeError: the model returns neither a tensor nor ``logits``.
        ValueError: there are no blocks, or what the model returns is not finite.
    """
    own = [distinct_layers(some) for some in split_by_block(blocks, layers)[0]]
    own = [some for some in own if some]
    if not own:
        raise ValueError("expected a model of decoder blocks for allocation 'sensitivity', got none")
    sparsities = {layer.key: sparsity for layer in layers}
    if sparsity == 0:
        return sparsities
    losses = []
    with hooked(model, []):
        before = _log_probabilities(model, batch)
        for some in own:
            weights = [layer.weight.clone() for layer in some]
            try:
                for layer in some:
                    zero_of_rows(layer.weight, sparsity, norms[layer.key])
                after = _log_probabilities(model, batch)
            finally:
                for layer, weight in zip(some, weights, strict=True):
                    layer.weight.copy_(weight)
            losses.append(float((before.exp() * (before - after)).sum(-1).mean()))
    if not all(map(math.isfinite, losses)):
        raise ValueError("expected a model that says finite logits on the calibration, got NaN or inf")
    width = max(losses) - min(losses)
    ranks = [(loss - min(losses)) / width if width > 0 else 0.0 for loss in losses]
    sizes = [sum(layer.weight.numel() for layer in some) for some in own]
    mean = sum(rank * size for rank, size in zip(ranks, sizes, strict=True)) / sum(sizes)
    spread = min(SPREAD, sparsity, 1 - sparsity)
    for rank, some in zip(ranks, own, strict=True):
        sparsities.update({layer.key: sparsity + spread * (mean - rank) for layer in some})
    return sparsities


def _log_probabilities(model: nn.Module, batch: Any) -> Tensor:
    """``[P, V]`` of the first positions, float32 or wider."""
    if isinstance(batch, Mapping):
        batch = {name: value for name, value in batch.items() if name != "logits_to_keep"}
    output = call(model, batch)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"expected a model that returns logits for allocation 'sensitivity', got {type(output).__name__}"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits.reshape(-1, logits.shape[-1])[:_POSITIONS], -1, dtype=wide)
