"""What training does to the models: where attention goes, how far projections carry, two kinds of neurons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fasticl.icl.data import ICLData, Patterns, Prompts, check_integer
from fasticl.icl.gpt2 import ICLGPT2
from fasticl.icl.model import ICLTransformer

PruningOrder = Literal["W_O", "W_O W_V", "random", "largest first", "small, then random"]
PRUNING_ORDERS: tuple[PruningOrder, ...] = ("W_O", "W_O W_V", "random", "largest first", "small, then random")


@dataclass(frozen=True)
class Projections:
    """Mean Euclidean norms over prompts; each starts at ``delta`` times the norm of its input.

    Attributes:
        query: ``||W_Q p_query||``.
        query_relevant: ``||W_Q [mu; 0]||``, of the query's relevant pattern alone.
        key: ``||W_K p_i||`` over context columns.
        key_relevant: ``||W_K [mu; 0]||``, of their relevant patterns alone.
    """

    query: float
    query_relevant: float
    key: float
    key_relevant: float


@dataclass(frozen=True)
class RowGeometry:
    """The rows of ``W_O W_V`` ``[m, d]``, each cut into its feature part ``[d_x]`` and its label part ``[d_y]``.

    Attributes:
        feature: ``[m]``, norm of the feature part.
        label: ``[m]``, norm of the label part.
        feature_angle: ``[m]``, radians between the feature part and the mean of the relevant patterns.
        label_angle: ``[m]``, radians between the label part and ``sign(a) q``; 0 is where theory sends it.
    """

    feature: Tensor
    label: Tensor
    feature_angle: Tensor
    label_angle: Tensor


@dataclass(frozen=True)
class Clusters:
    """Scores cut in two at the widest gap of their logarithms.

    Attributes:
        small: ``[n]`` int64, indices of the small ones, smallest first.
        large: ``[m - n]`` int64, indices of the others, smallest first.
        gap: smallest of the large over largest of the small; infinite if all small ones are 0.
    """

    small: Tensor
    large: Tensor
    gap: float

    @property
    def small_fraction(self) -> float:
        """``n / m``."""
        return len(self.small) / (len(self.small) + len(self.large))


@torch.no_grad()
def projections(model: ICLTransformer, data: ICLData, prompts: Prompts) -> Projections:
    """How far W_Q and W_K carry what they see; ``prompts`` are of ``data``'s own patterns."""
    prompts = prompts.to(model.W_Q.device, model.W_Q.dtype)
    # Patterns are orthogonal of norm beta: products with mu give the coefficients of the relevant part.
    mu = data.patterns.relevant.to(model.W_Q)

    def relevant(columns: Tensor) -> Tensor:
        """``[..., d]`` with nothing left but the relevant pattern."""
        x = columns[..., : data.d_x]
        part = x @ mu.T @ mu / data.beta**2
        return torch.cat([part, torch.zeros_like(columns[..., data.d_x :])], dim=-1)

    def norm(columns: Tensor, weight: Tensor) -> float:
        return (columns @ weight.T).norm(dim=-1).mean().item()

    return Projections(
        query=norm(prompts.query, model.W_Q),
        query_relevant=norm(relevant(prompts.query), model.W_Q),
        key=norm(prompts.context, model.W_K),
        key_relevant=norm(relevant(prompts.context), model.W_K),
    )


@torch.no_grad()
def row_geometry(model: ICLTransformer, data: ICLData) -> RowGeometry:
    """Lengths and directions of the rows of ``W_O W_V``, through which neurons see the attended context."""
    feature, label = (model.W_O @ model.W_V).cpu().double().split([data.d_x, data.d_y], dim=1)
    mean = data.patterns.relevant.double().mean(dim=0)
    target = model.a.cpu().double().sign().unsqueeze(1) * data.q.double()
    return RowGeometry(feature.norm(dim=1), label.norm(dim=1), _angle(feature, mean), _angle(label, target))


def clusters(scores: Tensor) -> Clusters:
    """Cuts scores, e.g. ``model.neuron_scores()``, in two at the largest ratio of neighbours in sorted order.

    Args:
        scores: ``[m]``, finite, not negative, m at least 2, not all 0.

    Raises:
        ValueError: they are not.
    """
    if scores.dim() != 1 or len(scores) < 2:
        raise ValueError(f"scores: expected [m] with m >= 2, got {list(scores.shape)}")
    values, order = scores.double().cpu().sort(stable=True)
    if not bool(values.isfinite().all()) or values[0] < 0 or values[-1] == 0:
        raise ValueError("scores: expected finite, not negative, and not all 0")
    ratios = values[1:] / values[:-1]  # x / 0 is infinite, 0 / 0 NaN: no gap
    cut = int(ratios.nan_to_num(nan=1.0, posinf=math.inf).argmax())
    return Clusters(order[: cut + 1], order[cut + 1 :], ratios[cut].item())


def pruning_order(
    model: ICLTransformer, by: PruningOrder = "W_O", *, generator: torch.Generator | None = None
) -> Tensor:
    """``[m]`` int64, neurons in the order in which they go, for :func:`fasticl.icl.pruning_curve`.

    Args:
        model: whose neurons are ranked.
        by: ``"W_O"`` and ``"W_O W_V"``, smallest row norm first; ``"random"``; ``"largest first"``, by W_O; ``"small,
            then random"``, the small cluster of ``W_O W_V`` first, the large one in random order: the theorem's R.
        generator: draws random orders; on the CPU; None takes torch's default one.

    Raises:
        ValueError: ``by`` is none of these.
    """
    if by not in PRUNING_ORDERS:
        raise ValueError(f"by: expected one of {', '.join(map(repr, PRUNING_ORDERS))}, got {by!r}")
    if by == "random":
        return torch.randperm(len(model.W_O), generator=generator)
    if by == "small, then random":
        found = clusters(model.neuron_scores("W_O W_V"))
        return torch.cat([found.small, found.large[torch.randperm(len(found.large), generator=generator)]])
    scores = model.neuron_scores("W_O W_V" if by == "W_O W_V" else "W_O").cpu()
    return scores.argsort(descending=by == "largest first", stable=True)


@torch.no_grad()
def attention_by_layer(
    model: ICLGPT2 | ICLTransformer,
    data: ICLData,
    *,
    n: int = 1000,
    length: int = 20,
    alpha: float = 0.8,
    tasks: Tensor | None = None,
    patterns: Patterns | None = None,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Mean attention on the context columns that carry the query's pattern, of each layer; one entry for one layer.

    Arguments as for :func:`fasticl.icl.evaluate`.
    """
    check_integer("n", n, least=1)
    weight = next(model.parameters())
    prompts = data.sample(n, length, alpha, tasks=tasks, patterns=patterns, generator=generator)
    prompts = prompts.to(weight.device, weight.dtype)
    attention = model.attention(prompts.context, prompts.query)  # [B, L] or [layers, B, L]
    mass = (attention * prompts.same_pattern).sum(dim=-1).mean(dim=-1)
    return [mass.item()] if mass.dim() == 0 else mass.tolist()


def _angle(rows: Tensor, direction: Tensor) -> Tensor:
    """Radians between each row and ``direction``, pi/2 for a row of zeros."""
    cosine = torch.nn.functional.cosine_similarity(rows, direction.expand_as(rows), dim=1)
    return cosine.clamp(-1, 1).acos()
