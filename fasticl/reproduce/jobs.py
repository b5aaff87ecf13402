"""What is computed for the figures: functions of JSON arguments and a seed, run side by side by the runner.

Each starts from nothing but its arguments. A training that diverges raises; one that stays at chance says so in
``"at_chance"``, and figures leave it out and count it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasticl.doctor import diagnose
from fasticl.icl import (
    BASELINES,
    ICLGPT2,
    Evaluation,
    ICLData,
    ICLTransformer,
    Patterns,
    attention_by_layer,
    baseline_errors,
    clusters,
    evaluate,
    projections,
    pruning_curve,
    pruning_order,
    row_geometry,
    train,
)
from fasticl.icl.lm import measure_language_model
from fasticl.icl.speed import inference_times

GPT2_S1 = (0.5, 0.7, 0.9, 1.1, 1.3)
LENGTH = 20  # context columns, l
OOD_PATTERNS, OOD_S1 = 3, 1.2  # M1' and the sum of coefficients, unless a figure is about S1
NEGLIGIBLE = 0.005  # extra hinge error that counts as none: half a percent of what a silent model has


def one_layer(
    *, seed: int, m: int, steps: int, lengths: Sequence[int], rates: Sequence[float], n: int, device: str = "cpu"
) -> dict[str, Any]:
    """The recipe's model: what training does to it, its errors over l, alpha' and S1, and pruned in five orders.

    ``lr`` is m/64. Errors are from ``n`` prompts each.
    """
    data, generator = ICLData(seed=seed), torch.Generator().manual_seed(seed)
    model = ICLTransformer(data.d_x, data.d_y, m, generator=generator).to(device)
    shifted = data.out_of_domain(OOD_PATTERNS, OOD_S1, generator=generator)
    probe = data.sample(1000, LENGTH, 0.8, tasks=data.unseen_tasks, generator=generator)

    def look() -> dict[str, Any]:
        kinds: dict[str, dict[str, Any]] = {
            "in_domain": {"tasks": data.unseen_tasks},
            "out_of_domain": {"patterns": shifted},
        }
        attention = {
            domain: attention_by_layer(model, data, generator=_generator(seed + 6), **kind)[0]
            for domain, kind in kinds.items()
        }
        return {"attention": attention, "projections": asdict(projections(model, data, probe)), "rows": rows_of(model)}

    def rows_of(model: ICLTransformer) -> Tensor:
        """``[4, m]``: feature norm, label norm and both angles of each row."""
        found = row_geometry(model, data)
        return torch.stack([found.feature, found.label, found.feature_angle, found.label_angle])

    training = train(model, data, steps=steps, lr=m / 64, length=LENGTH, generator=generator, measure=look)
    found = clusters(model.neuron_scores("W_O W_V"))
    trace = []
    for step, seen in training.measurements:
        kinds = {}
        for kind, neurons in (("large", found.large), ("small", found.small)):
            part = seen["rows"][:, neurons]
            # The mean over rows; a mean of unit vectors would hide that single ones point elsewhere.
            kinds[kind] = dict(
                zip(("feature", "label", "feature_angle", "label_angle"), part.mean(1).tolist(), strict=True)
            )
        trace.append({"step": step, "attention": seen["attention"], "projections": seen["projections"], **kinds})

    generator = _generator(seed + 1)
    contexts = [
        {"length": length, "alpha": alpha, "domain": domain, **_errors(evaluation)}
        for alpha in (0.4, 0.6, 0.8, 0.9, 1.0)
        for domain, patterns in (("in_domain", None), ("out_of_domain", shifted))
        for length in lengths
        for evaluation in [
            evaluate(model, data, n=n, length=length, alpha=alpha, patterns=patterns, generator=generator)
        ]
    ]
    control = []
    for S1 in (-1.0, 0.0, 0.5, 0.7, 0.9, 1.1, 1.3):
        patterns = data.out_of_domain(OOD_PATTERNS, S1, generator=_generator(seed + 2))
        control.append({"S1": S1, **_errors(evaluate(model, data, n=n, patterns=patterns, generator=generator))})
    return {
        "at_chance": training.at_chance,
        "losses": training.losses,
        "trace": trace,
        "contexts": contexts,
        "control": control,
        "norms": model.neuron_scores("W_O W_V").sort().values.tolist(),
        "small_fraction": found.small_fraction,
        "gap": found.gap,
        "small_norm": model.neuron_scores("W_O W_V")[found.small].mean().item(),
        "large_norm": model.neuron_scores("W_O W_V")[found.large].mean().item(),
        "pruning": _pruning(model, data, shifted, rates, (0.6, 0.8, 1.0), n, seed),
    }


def regime(
    *,
    seed: int,
    m: int,
    xi: float,
    kappa: float,
    label_noise: float,
    tasks_per_pattern: int,
    stop_below: float,
    ood_patterns: int,
    alpha: float,
    alphas: Sequence[float],
    rates: Sequence[float],
    n: int,
    steps: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """One point of the search: a model trained until its loss is below ``stop_below``, then pruned in two orders.

    Args:
        ood_patterns: M1', the relevant patterns out of domain.
        alpha: alpha' of the test prompts that the point stands for, one of ``alphas``.
    """
    data = ICLData(kappa=kappa, label_noise=label_noise, tasks_per_pattern=tasks_per_pattern, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    model = ICLTransformer(data.d_x, data.d_y, m, xi=xi, generator=generator).to(device)
    training = train(model, data, steps=steps, lr=m / 64, length=LENGTH, stop_below=stop_below, generator=generator)
    shifted = data.out_of_domain(ood_patterns, OOD_S1, generator=generator)
    found = clusters(model.neuron_scores("W_O W_V"))
    return {
        "at_chance": training.at_chance,
        "alpha": alpha,
        "steps": len(training.losses),
        "small_fraction": found.small_fraction,
        "gap": found.gap,
        "norms": model.neuron_scores("W_O W_V").sort().values.tolist(),
        "pruning": _pruning(model, data, shifted, rates, alphas, n, seed, orders=("W_O W_V", "random")),
    }


def baselines(
    *,
    seed: int,
    m: int,
    steps: int,
    kappa: float,
    alphas: Sequence[float],
    lengths: Sequence[int],
    n: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """The one-layer model and classical learners on the same out-of-domain prompts."""
    data, generator = ICLData(kappa=kappa, seed=seed), torch.Generator().manual_seed(seed)
    model = ICLTransformer(data.d_x, data.d_y, m, generator=generator).to(device)
    training = train(model, data, steps=steps, lr=m / 64, length=LENGTH, generator=generator)
    shifted = data.out_of_domain(OOD_PATTERNS, OOD_S1, generator=generator)
    rows = []
    for alpha in alphas:
        for length in lengths:
            prompts = data.sample(n, length, alpha, patterns=shifted, generator=generator)
            with torch.no_grad():
                F = model(prompts.context.to(device), prompts.query.to(device)).cpu()
            wrong = ~(prompts.target * F > 0)
            errors = {"ICL": wrong.double().mean().item(), **baseline_errors(prompts, data.d_x, BASELINES)}
            rows += [
                {"learner": name, "alpha": alpha, "length": length, "zero_one": error} for name, error in errors.items()
            ]
    return {"at_chance": training.at_chance, "rows": rows}


def gpt2(
    *,
    seed: int,
    steps: int,
    kappa: float,
    lr: float,
    batch: int,
    lengths: Sequence[int],
    n: int,
    checkpoint: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """The 3-layer GPT-2: same-pattern attention of each layer and OOD errors over training; OOD errors over l and S1.

    Args:
        checkpoint: a folder where training is kept while it runs, and goes on from if it was stopped.
    """
    data, generator = ICLData(kappa=kappa, seed=seed), torch.Generator().manual_seed(seed)
    model = ICLGPT2(data.d_x + data.d_y, generator=generator).to(device)
    patterns = {
        S1: data.out_of_domain(OOD_PATTERNS, S1, generator=_generator(seed + 2)) for S1 in (0.5, 0.7, 0.9, 1.1, 1.3)
    }
    shifted = data.out_of_domain(OOD_PATTERNS, OOD_S1, generator=_generator(seed + 2))

    def look() -> dict[str, Any]:
        errors = {
            f"{S1:g}": evaluate(
                model, data, n=n // 2, patterns=found, attention=False, generator=_generator(seed + 3)
            ).zero_one
            for S1, found in patterns.items()
        }
        attention = attention_by_layer(model, data, n=500, patterns=shifted, generator=_generator(seed + 3))
        return {"attention": attention, "zero_one": errors}

    file = None if checkpoint is None else Path(checkpoint) / f"gpt2-{seed}-{steps}-{kappa}-{lr}.pt"
    training = train(
        model,
        data,
        steps=steps,
        batch=batch,
        lr=lr,
        length=LENGTH,
        optimizer="adam",
        generator=generator,
        measure=look,
        measure_every=max(steps // 20, 1),
        checkpoint=file,
    )
    errors = [
        {
            "S1": S1,
            "length": length,
            **_errors(evaluate(model, data, n=n, length=length, patterns=found, attention=False, generator=generator)),
        }
        for S1, found in patterns.items()
        for length in lengths
    ]
    unseen = _errors(evaluate(model, data, n=n, attention=False, generator=generator))
    if file is not None:
        file.unlink()  # the result says it all, and other code must not go on from here
    return {"at_chance": training.at_chance, "trace": training.measurements, "errors": errors, "in_domain": unseen}


def theorem(
    *, seed: int, m: int, M1: int, M2: int, steps: int, rates: Sequence[float], n: int, device: str = "cpu"
) -> dict[str, Any]:
    """What removing all small neurons costs, the share that is free, and the cost of a fraction R of the large ones."""
    data = ICLData(M1, M2, M1 + M2, tasks_per_pattern=M1 // 2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    model = ICLTransformer(data.d_x, data.d_y, m, generator=generator).to(device)
    training = train(model, data, steps=steps, lr=m / 64, length=LENGTH, stop_below=0.03, generator=generator)
    shifted = data.out_of_domain(min(OOD_PATTERNS, M1 - 1), 1.0, generator=generator)
    found = clusters(model.neuron_scores("W_O W_V"))
    settings: dict[str, Any] = {"out_of_domain": shifted, "n": n, "length": LENGTH}
    sorted_curve = pruning_curve(
        model, data, rates, order=pruning_order(model, "W_O W_V").to(device), generator=_generator(seed + 1), **settings
    )
    dense = sorted_curve[0].out_of_domain.hinge
    free = max(point.rate for point in sorted_curve if point.out_of_domain.hinge - dense < NEGLIGIBLE)
    fractions = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]  # R
    small, large = len(found.small), len(found.large)
    curve = pruning_curve(
        model,
        data,
        [0.0, *((small + R * large) / m for R in fractions)],
        order=pruning_order(model, "small, then random", generator=generator).to(device),
        generator=_generator(seed + 1),
        **settings,
    )
    return {
        "at_chance": training.at_chance,
        "steps": len(training.losses),
        "small_fraction": found.small_fraction,
        "gap": found.gap,
        "hinge": dense,
        "free_fraction": free,
        "small_cost": curve[1].out_of_domain.hinge - curve[0].out_of_domain.hinge,
        "large_cost": [
            {"R": R, "hinge": point.out_of_domain.hinge - curve[0].out_of_domain.hinge}
            for R, point in zip(fractions, curve[1:], strict=True)
        ],
    }


def language_model(
    *,
    seed: int,
    model: str | None,
    rates: Sequence[float],
    prompts: int,
    attention_prompts: int,
    windows: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """The one-layer model's measurements on a pretrained language model; calibration is Python's documentation."""
    from fasticl.demo import Settings
    from fasticl.demo.lm import load, token_windows
    from fasticl.demo.texts import calibration_text

    settings = Settings(model=None if model is None else Path(model), device=device)
    found, tokenizer, name = load(settings)
    calibration = token_windows(tokenizer, calibration_text(), windows, 128).to(device)
    result = measure_language_model(
        found,
        tokenizer,
        [{"input_ids": batch, "use_cache": False} for batch in calibration.split(2)],
        rates=rates,
        prompts=prompts,
        attention_prompts=attention_prompts,
        seed=seed,
    )
    accuracy = {order: list(curve.items()) for order, curve in result.accuracy.items()}  # JSON has no keys of numbers
    return {**asdict(result), "accuracy": accuracy, "model": name}


def time(*, seed: int, m: int, rates: Sequence[float], seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Inference time over the pruning rate, on all CPUs of this process."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    data, generator = ICLData(seed=seed), torch.Generator().manual_seed(seed)
    model = ICLTransformer(data.d_x, data.d_y, m, generator=generator).to(device)
    train(model, data, lr=m / 64, length=LENGTH, generator=generator)
    torch.set_num_threads(threads)
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else None
    rows = inference_times(
        model, data, rates, length=LENGTH, seconds=seconds, synchronize=synchronize, generator=generator
    )
    where = torch.cuda.get_device_name(device) if synchronize else diagnose()["cpu"]["model"]
    return {"rows": rows, "threads": threads, "cpu": where}


def _pruning(
    model: ICLTransformer,
    data: ICLData,
    shifted: Patterns,
    rates: Sequence[float],
    alphas: Sequence[float],
    n: int,
    seed: int,
    orders: Sequence[Any] = ("W_O", "W_O W_V", "random", "largest first", "small, then random"),
) -> list[dict[str, Any]]:
    """Errors over the pruning rate for each order and alpha'; the same prompts for all orders."""
    rows = []
    for alpha in alphas:
        for by in orders:
            order = pruning_order(model, by, generator=_generator(seed + 4))
            curve = pruning_curve(
                model,
                data,
                rates,
                out_of_domain=shifted,
                order=order.to(model.W_O.device),
                n=n,
                length=LENGTH,
                alpha=alpha,
                generator=_generator(seed + 5),
            )
            rows += [
                {"order": by, "alpha": alpha, "rate": point.rate, "domain": domain, **_errors(getattr(point, domain))}
                for point in curve
                for domain in ("in_domain", "out_of_domain")
            ]
    return rows


def _errors(evaluation: Evaluation) -> dict[str, float]:
    return {"hinge": evaluation.hinge, "zero_one": evaluation.zero_one}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
