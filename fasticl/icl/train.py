"""Trains the in-context learner, and measures it: hinge loss, 0/1 error and attention, also over pruning rates."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fasticl.icl.data import ICLData, Patterns, Prompts, check_integer
from fasticl.icl.gpt2 import ICLGPT2
from fasticl.icl.model import FusedICLTransformer, ICLTransformer

_CHUNK = 2048  # prompts at once when measuring: 10 MB of columns at the default sizes


def hinge_loss(F: Tensor, target: Tensor) -> Tensor:
    """``max(0, 1 - z F)`` of each prompt, ``[B]``."""
    return torch.relu(1 - target * F)


@dataclass
class Training:
    """What a training did.

    Attributes:
        losses: the mean hinge loss of each step's batch, before its update.
        measurements: pairs (step, what ``measure`` returned), step 0 before the first update.
    """

    losses: list[float] = field(default_factory=list)
    measurements: list[tuple[int, Any]] = field(default_factory=list)

    @property
    def at_chance(self) -> bool:
        """Whether the last 20 losses average above 0.9: a model that answers nothing has 1."""
        return sum(self.losses[-20:]) > 0.9 * len(self.losses[-20:])


def train(
    model: nn.Module,
    data: ICLData,
    *,
    steps: int = 400,
    batch: int = 128,
    lr: float = 1.0,
    length: int = 20,
    alpha: float = 0.8,
    optimizer: Literal["sgd", "adam"] = "sgd",
    stop_below: float = 0.0,
    generator: torch.Generator | None = None,
    progress: Callable[[int, float], None] | None = None,
    measure: Callable[[], Any] | None = None,
    measure_every: int = 10,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
) -> Training:
    """Minimises the mean hinge loss of fresh prompts from ``data.training_tasks``. In place.

    The defaults train ``ICLTransformer()`` on ``ICLData()``: plain SGD on all but ``a``, as in the paper. The loss
    stays near 1 for most of the steps, then falls at once. ``a = +-1/m``, so ``lr`` grows with m: 1 at 64, 4 at 256.

    Args:
        model: :class:`ICLTransformer`, :class:`ICLGPT2`, or any module with ``model(context, query) -> F``.
        steps: updates.
        batch: prompts of each.
        lr: learning rate.
        length: context columns of each prompt.
        alpha: fraction of them that tell about the task.
        optimizer: plain SGD, or Adam with torch's defaults.
        stop_below: training ends early once the mean loss of the last 20 steps is less.
        generator: draws the prompts; None takes torch's default one.
        progress: called as ``progress(step, loss)`` after each step, 1 to ``steps``, with the batch's loss before it.
        measure: called before the first step, after every ``measure_every`` steps and after the last one; what it
            returns must be JSON's if there is a checkpoint.
        checkpoint: a file, written every ``checkpoint_every`` steps and at the end. Where it exists, training goes on
            from it as if it had never stopped; ``generator`` is then set, and must be given.

    Returns:
        Losses and measurements, those of the checkpoint included.

    Raises:
        FloatingPointError: training diverged: the loss or a weight stopped being finite, or the mean loss of ten
            steps passed 10, ten times that of a model that answers nothing; the model is then unusable.
        ValueError: a parameter is out of its range, or the checkpoint belongs to another training.
    """
    counts = {"steps": steps, "batch": batch, "measure_every": measure_every, "checkpoint_every": checkpoint_every}
    for name, count in counts.items():
        check_integer(name, count, least=1)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: expected finite and positive, got {lr}")
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer: expected 'sgd' or 'adam', got {optimizer!r}")
    if checkpoint is not None and generator is None:
        raise ValueError("generator: expected one with a checkpoint, which keeps its state, got None")
    weight = next(model.parameters())
    updates = (torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam)(model.parameters(), lr=lr)
    recipe = {"batch": batch, "lr": lr, "length": length, "alpha": alpha, "optimizer": optimizer, "data": repr(data)}
    done = Training()
    if checkpoint is not None and checkpoint.exists():
        done = _resume(checkpoint, recipe, model, updates, generator)
    elif measure is not None:
        done.measurements.append((0, measure()))

    def low_enough() -> bool:
        return len(done.losses) >= 20 and sum(done.losses[-20:]) < 20 * stop_below

    for step in range(steps + 1 if low_enough() else len(done.losses) + 1, steps + 1):
        prompts = data.sample(batch, length, alpha, tasks=data.training_tasks, generator=generator)
        prompts = prompts.to(weight.device, weight.dtype)
        loss = hinge_loss(model(prompts.context, prompts.query), prompts.target).mean()
        value = loss.item()
        if not math.isfinite(value) or sum([*done.losses[-9:], value]) > 10 * min(step, 10):
            raise FloatingPointError(
                f"training diverged: the loss is {value:.4g} at step {step} with lr={lr}; lower lr"
            )
        done.losses.append(value)
        updates.zero_grad(set_to_none=True)
        loss.backward()
        updates.step()
        if progress is not None:
            progress(step, value)
        last = step == steps or low_enough()
        if measure is not None and (last or step % measure_every == 0):
            done.measurements.append((step, measure()))
        if checkpoint is not None and (last or step % checkpoint_every == 0):
            _save(checkpoint, recipe, model, updates, generator, done)
        if last:
            break
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise FloatingPointError(f"training diverged: a weight is not finite after step {steps} with lr={lr}; lower lr")
    return done


def _save(
    path: Path,
    recipe: dict[str, Any],
    model: nn.Module,
    updates: torch.optim.Optimizer,
    generator: torch.Generator | None,
    done: Training,
) -> None:
    """Written beside, then renamed: a file that exists is whole."""
    assert generator is not None
    state = {
        "recipe": json.dumps(recipe, sort_keys=True),
        "done": json.dumps([done.losses, done.measurements]),
        "model": model.state_dict(),
        "optimizer": updates.state_dict(),
        "generator": generator.get_state(),
    }
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def _resume(
    path: Path,
    recipe: dict[str, Any],
    model: nn.Module,
    updates: torch.optim.Optimizer,
    generator: torch.Generator | None,
) -> Training:
    assert generator is not None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        saved = json.loads(state["recipe"])
        losses, measurements = json.loads(state["done"])
        model.load_state_dict(state["model"])
        updates.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    except (RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint: {path} does not hold a training of this model: {error}") from error
    if saved != recipe:
        raise ValueError(f"checkpoint: expected one of {recipe}, got one of {saved} in {path}")
    return Training(losses, [(step, value) for step, value in measurements])


def same_pattern_attention(attention: Tensor, prompts: Prompts) -> Tensor:
    """Attention on the context columns that carry the query's pattern, ``[B]``.

    Args:
        attention: ``[B, L]``, or ``[layers, B, L]``, which is averaged over layers.
        prompts: whose ``same_pattern`` is ``[B, L]``.
    """
    mass = (attention * prompts.same_pattern).sum(dim=-1)
    return mass if mass.dim() == 1 else mass.mean(dim=0)


@dataclass(frozen=True)
class Evaluation:
    """Means over ``n`` independent prompts, each with its standard error ``_se`` (sample deviation / sqrt(n)).

    Attributes:
        n: prompts.
        hinge: ``max(0, 1 - z F)``.
        zero_one: 1 unless ``z F > 0``; F = 0 answers nothing and counts as wrong.
        attention: attention on the context columns that carry the query's pattern; the mean over layers.
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
    model: ICLTransformer | FusedICLTransformer | ICLGPT2,
    data: ICLData,
    *,
    n: int = 10_000,
    length: int = 20,
    alpha: float = 0.8,
    tasks: Tensor | None = None,
    patterns: Patterns | None = None,
    attention: bool = True,
    generator: torch.Generator | None = None,
) -> Evaluation:
    """Errors on ``n`` fresh prompts.

    Args:
        n: prompts, at least 2.
        length: context columns of each, which need not be what training saw.
        alpha: the fraction of them that tell about the task, alpha' in the theory.
        tasks: ``[T, 2]``; None is ``data.unseen_tasks`` in the domain, all ordered pairs of ``patterns`` out of it.
        patterns: None is in the domain; else e.g. ``data.out_of_domain()``.
        attention: whether to measure it too, in a second forward pass; else it is NaN.
        generator: draws the prompts; None takes torch's default one.

    Raises:
        ValueError: a parameter is out of its range.
    """
    return _measure(model, _fresh_prompts(data, n, length, alpha, tasks, patterns, generator), attention)


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
def _measure(
    model: ICLTransformer | FusedICLTransformer | ICLGPT2, chunks: Iterable[Prompts], attention: bool = True
) -> Evaluation:
    scores = []
    weight = next(chain(model.parameters(), model.buffers()))
    for chunk in chunks:
        prompts = chunk.to(weight.device, weight.dtype)
        F = model(prompts.context, prompts.query)
        wrong = ~(prompts.target * F > 0)
        on_pattern = torch.full_like(F, math.nan)
        if attention:
            on_pattern = same_pattern_attention(model.attention(prompts.context, prompts.query), prompts)
        scores.append(torch.stack([hinge_loss(F, prompts.target), wrong.to(F.dtype), on_pattern]).double())
    score = torch.cat(scores, dim=1)  # [3, n]
    n = score.shape[1]
    means, errors = score.mean(dim=1).tolist(), (score.std(dim=1) / math.sqrt(n)).tolist()
    return Evaluation(n, *chain.from_iterable(zip(means, errors, strict=True)))
