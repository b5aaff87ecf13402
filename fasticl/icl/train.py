"""Trains the in-context learner, and measures it: hinge loss, 0/1 error and attention, also over pruning rates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fasticl.icl.data import ICLData, Patterns, Prompts, check_integer
from fasticl.icl.model import FusedICLTransformer, ICLTransformer

_CHUNK = 2048  # prompts at once when measuring: 10 MB of columns at the default sizes


def hinge_loss(F: Tensor, target: Tensor) -> Tensor:
    """``max(0, 1 - z F)`` of each prompt, ``[B]``."""
    return torch.relu(1 - target * F)


def train(
    model: ICLTransformer,
    data: ICLData,
    *,
    steps: int = 400,
    batch: int = 128,
    lr: float = 1.0,
    length: int = 20,
    alpha: float = 0.8,
    generator: torch.Generator | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Plain SGD on the mean hinge loss of fresh prompts from ``data.training_tasks``; ``a`` stays. In place.

    The defaults train ``ICLTransformer()`` on ``ICLData()``. The loss stays near 1 for most of the steps, then falls at
    once. ``a = +-1/m``, so ``lr`` grows with m: 1 at 64, 4 at 256.

    Args:
        steps: updates.
        batch: prompts of each.
        lr: learning rate.
        length: context columns of each prompt.
        alpha: fraction of them that tell about the task.
        generator: draws the prompts; None takes torch's default one.
        progress: called as ``progress(step, loss)`` after each step, 1 to ``steps``, with the batch's loss before it.

    Returns:
        The mean hinge loss of each step's batch, before its update.

    Raises:
        FloatingPointError: the loss or a weight stopped being finite; the model is then unusable.
        ValueError: a parameter is out of its range.
    """
    check_integer("steps", steps, least=1)
    check_integer("batch", batch, least=1)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: expected finite and positive, got {lr}")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for step in range(1, steps + 1):
        prompts = data.sample(batch, length, alpha, tasks=data.training_tasks, generator=generator)
        prompts = prompts.to(model.W_O.device, model.W_O.dtype)
        loss = hinge_loss(model(prompts.context, prompts.query), prompts.target).mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"training diverged: the loss is {losses[-1]} at step {step} with lr={lr}; lower lr"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step, losses[-1])
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise FloatingPointError(f"training diverged: a weight is not finite after step {steps} with lr={lr}; lower lr")
    return losses


@dataclass(frozen=True)
class Evaluation:
    """Means over ``n`` independent prompts, each with its standard error ``_se`` (sample deviation / sqrt(n)).

    Attributes:
        n: prompts.
        hinge: ``max(0, 1 - z F)``.
        zero_one: 1 unless ``z F > 0``; F = 0 answers nothing and counts as wrong.
        attention: attention on the context columns that carry the query's pattern.
    """

    n: int
    hinge: float
    hinge_se: float
    zero_one: float
    zero_one_se: float
    attention: float
    attention_se: float


@dataclass(frozen=True)
class PruningPoint:
    """Errors of a model after pruning; the same prompts at every rate of a curve."""

    rate: float
    neurons: int
    in_domain: Evaluation
    out_of_domain: Evaluation


def evaluate(
    model: ICLTransformer | FusedICLTransformer,
    data: ICLData,
    *,
    n: int = 10_000,
    length: int = 20,
    alpha: float = 0.8,
    tasks: Tensor | None = None,
    patterns: Patterns | None = None,
    generator: torch.Generator | None = None,
) -> Evaluation:
    """Errors on ``n`` fresh prompts.

    Args:
        n: prompts, at least 2.
        length: context columns of each, which need not be what training saw.
        alpha: the fraction of them that tell about the task, alpha' in the theory.
        tasks: ``[T, 2]``; None is ``data.unseen_tasks`` in the domain, all ordered pairs of ``patterns`` out of it.
        patterns: None is in the domain; else e.g. ``data.out_of_domain()``.
        generator: draws the prompts; None takes torch's default one.

    Raises:
        ValueError: a parameter is out of its range.
    """
    return _measure(model, _fresh_prompts(data, n, length, alpha, tasks, patterns, generator))


def pruning_curve(
    model: ICLTransformer,
    data: ICLData,
    rates: Iterable[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    *,
    out_of_domain: Patterns | None = None,
    order: Tensor | None = None,
    n: int = 4_000,
    length: int = 20,
    alpha: float = 0.8,
    generator: torch.Generator | None = None,
) -> list[PruningPoint]:
    """Errors over pruning rates, in and out of the domain; copies of ``model`` are pruned, not the model itself.

    Args:
        rates: fractions of the neurons that go, each in [0, 1], rounded to whole neurons.
        out_of_domain: None is ``data.out_of_domain(generator=generator)``.
        order: ``[m]``, the neurons in the order in which they go; None is smallest ``model.neuron_scores()`` first.
            A random order, the usual control, is ``torch.randperm(m)``.
        n: prompts, in the domain as well as out of it, the same for every rate.
        length: context columns of each.
        alpha: the fraction of them that tell about the task.
        generator: draws prompts and patterns; None takes torch's default one.

    Raises:
        ValueError: a parameter is out of its range.
    """
    m = len(model.W_O)
    order = model.neuron_scores().argsort(stable=True) if order is None else order
    if order.dim() != 1 or order.dtype != torch.int64 or not order.sort().values.cpu().equal(torch.arange(m)):
        raise ValueError(f"order: expected an int64 permutation of 0..{m - 1}, got {order.dtype} {list(order.shape)}")
    rates = list(rates)
    for rate in rates:
        if not 0 <= rate <= 1:
            raise ValueError(f"rates: expected fractions in [0, 1], got {rate}")
    shifted = data.out_of_domain(generator=generator) if out_of_domain is None else out_of_domain
    prompts_in = list(_fresh_prompts(data, n, length, alpha, None, None, generator))
    prompts_out = list(_fresh_prompts(data, n, length, alpha, None, shifted, generator))

    points = []
    for rate in rates:
        pruned = copy.deepcopy(model).prune_neurons_(order[: round(rate * m)])
        points.append(PruningPoint(rate, len(pruned.W_O), _measure(pruned, prompts_in), _measure(pruned, prompts_out)))
    return points


def _fresh_prompts(
    data: ICLData,
    n: int,
    length: int,
    alpha: float,
    tasks: Tensor | None,
    patterns: Patterns | None,
    generator: torch.Generator | None,
) -> Iterator[Prompts]:
    """``n`` prompts in chunks."""
    check_integer("n", n, least=2)
    if tasks is None and patterns is None:
        tasks = data.unseen_tasks
    for start in range(0, n, _CHUNK):
        yield data.sample(min(_CHUNK, n - start), length, alpha, tasks=tasks, patterns=patterns, generator=generator)


@torch.no_grad()
def _measure(model: ICLTransformer | FusedICLTransformer, chunks: Iterable[Prompts]) -> Evaluation:
    scores = []
    for chunk in chunks:
        prompts = chunk.to(model.a.device, model.a.dtype)
        F = model(prompts.context, prompts.query)
        wrong = ~(prompts.target * F > 0)
        on_pattern = (model.attention(prompts.context, prompts.query) * prompts.same_pattern).sum(dim=1)
        scores.append(torch.stack([hinge_loss(F, prompts.target), wrong.to(F.dtype), on_pattern]).double())
    score = torch.cat(scores, dim=1)  # [3, n]
    n = score.shape[1]
    hinge, zero_one, attention = score.mean(dim=1).tolist()
    hinge_se, zero_one_se, attention_se = (score.std(dim=1) / math.sqrt(n)).tolist()
    return Evaluation(n, hinge, hinge_se, zero_one, zero_one_se, attention, attention_se)
