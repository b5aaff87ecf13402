"""Which layers lose more of their weights than others, at the same sparsity in all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fasticl.layers import Layer, distinct_layers, split_by_block
from fasticl.scores import scored

OUTLIER = 5  # times the mean score
SPREAD = 0.16  # between the sparsest and the densest block


def outlier_weighted(
    blocks: Sequence[nn.Module], layers: Sequence[Layer], norms: Mapping[Hashable, Tensor], sparsity: float
) -> dict[Hashable, float]:
    """A sparsity for each weight, by ``Layer.key``: blocks with many outliers keep more.

    Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
    2024, with its settings for Llama: the share D_b of a block's Wanda scores ``|W_ij| * ||X_j||`` above five times
    their mean is brought to r_b in [0, 1] by the smallest and largest; then ``sparsity_b = sparsity + 0.16 * (mean(r) -
    r_b)``, the mean over weights. Above 84 % sparsity (below 16 %) the spread is what is left to 100 % (to 0 %). A
    layer in no block, or with a weight that several blocks read, is a block of its own.

    Args:
        blocks: of :func:`fasticl.layers.find_blocks`; maybe none.
        norms: by ``Layer.key``, of each layer's inputs ``[K]``, over the same number of tokens.
    """
    own, rest = split_by_block(blocks, layers)
    groups = [distinct_layers(some) for some in (*own, *([layer] for layer in distinct_layers(rest))) if some]
    shares = [_outliers(group, norms) for group in groups]
    sizes = [sum(layer.weight.numel() for layer in group) for group in groups]
    least, most = min(shares), max(shares)
    ranks = [(share - least) / (most - least) if most > least else 0.0 for share in shares]
    mean = sum(rank * size for rank, size in zip(ranks, sizes, strict=True)) / max(sum(sizes), 1)
    spread = min(SPREAD, sparsity, 1 - sparsity)
    return {
        layer.key: sparsity + spread * (mean - rank)
        for rank, group in zip(ranks, groups, strict=True)
        for layer in group
    }


def _outliers(layers: Sequence[Layer], norms: Mapping[Hashable, Tensor]) -> float:
    """The share of the scores of all ``layers`` above ``OUTLIER`` times their mean."""
    count = sum(layer.weight.numel() for layer in layers)
    if count == 0:
        return 0.0

    def total(function: Callable[[Tensor], Tensor]) -> float:
        return sum(
            float(function(scores).sum(dtype=torch.float64))
            for layer in layers
            for _, scores in scored(layer.weight, norms[layer.key])
        )

    mean = total(lambda scores: scores) / count
    return total(lambda scores: scores > OUTLIER * mean) / count
