"""The paper's one-layer model: trained, its neurons pruned smallest first, error and inference time over the rate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from fasticl.icl import ICLData, ICLTransformer, pruning_curve, train
from fasticl.icl.speed import inference_times

if TYPE_CHECKING:
    from fasticl.demo import Settings
    from fasticl.stages import Stages

_LENGTH = 20  # context columns, L
_TRAINED_HINGE = 0.1  # the loss starts at 1 and ends below .03; between lies a training that did not converge


def run(settings: Settings, stages: Stages, failures: list[str]) -> dict[str, Any]:
    """Trains, prunes, measures; what went wrong is added to ``failures``. Returns JSON-ready numbers."""
    m, lr = (64, 1.0) if settings.quick else (256, 4.0)
    steps = 400
    generator = torch.Generator().manual_seed(settings.seed)
    data = ICLData(seed=settings.seed)
    model = ICLTransformer(data.d_x, data.d_y, m, generator=generator).to(settings.device)
    with stages.stage(f"train the one-layer model, {m} neurons", total=steps) as advance, _one_thread():
        training = train(
            model, data, steps=steps, lr=lr, length=_LENGTH, generator=generator, progress=lambda *_: advance()
        )

    rates = [i / 10 for i in range(10)] if settings.quick else [i / 40 for i in range(40)]
    prompts = 1000 if settings.quick else 4000
    shifted = data.out_of_domain(generator=generator)
    orders = {"smallest first": model.neuron_scores().argsort(stable=True)}
    orders["random order"] = torch.randperm(m, generator=generator).to(settings.device)
    with stages.stage("prune its neurons", total=len(orders)) as advance, _one_thread():
        curves = {}
        for name, order in orders.items():
            points = pruning_curve(
                model, data, rates, out_of_domain=shifted, order=order, n=prompts, length=_LENGTH, generator=generator
            )
            curves[name] = [asdict(point) for point in points]
            advance()
    unpruned = curves["smallest first"][0]
    for domain in ("in_domain", "out_of_domain"):
        if not unpruned[domain]["hinge"] < _TRAINED_HINGE:
            failures.append(
                f"the one-layer model did not learn: {domain} hinge error {unpruned[domain]['hinge']:.3f}, "
                f"expected below {_TRAINED_HINGE}; try another --seed"
            )

    with stages.stage("time its inference"):
        timings = inference_times(
            model,
            data,
            [0.0, 0.5, 0.9] if settings.quick else [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
            length=_LENGTH,
            dtype=settings.dtype,
            seconds=0.5 if settings.quick else 4.0,
            synchronize=settings.synchronize,
            generator=torch.Generator().manual_seed(settings.seed),
        )
    failures += [
        f"the fused one-layer model is off by {row['max_relative_error']:.2e} of the largest score at pruning rate "
        f"{row['rate']}, expected at most {row['tolerance']:.2e}"
        for row in timings
        if not row["max_relative_error"] <= row["tolerance"]  # NaN does not pass
    ]
    return {
        "neurons": m,
        "steps": steps,
        "lr": lr,
        "prompt_length": _LENGTH,
        "test_prompts": prompts,
        "losses": training.losses,
        "row_norms": model.neuron_scores().sort().values.tolist(),
        "pruning": curves,
        "time": timings,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps of microseconds: more threads lose to their own hand-over, by far where something else uses a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
