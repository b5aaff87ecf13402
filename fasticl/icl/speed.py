"""Inference time of the one-layer model over the pruning rate, eager and on FastICL's kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fasticl.icl.data import ICLData
from fasticl.icl.model import ICLTransformer
from fasticl.timing import interleaved


@torch.inference_mode()
def inference_times(
    model: ICLTransformer,
    data: ICLData,
    rates: Iterable[float],
    *,
    length: int = 20,
    batch: int = 256,
    dtype: torch.dtype = torch.float32,
    seconds: float = 4.0,
    synchronize: Callable[[], object] | None = None,
    generator: torch.Generator | None = None,
) -> list[dict[str, Any]]:
    """Microseconds per prompt of the eager forward and of ``compile_for_inference()``, checked, then interleaved.

    Args:
        model: pruned copies of it are timed, on its device, in ``dtype``.
        rates: fractions of its neurons that go, smallest first.
        length: context columns of each prompt.
        batch: prompts of each call.
        seconds: for all measurements together.
        synchronize: called before the clock is read, e.g. ``torch.cuda.synchronize``.
        generator: draws the prompts; None takes torch's default one.

    Returns:
        For each rate: ``rate``, ``neurons``, ``eager_us``, ``fasticl_us``, ``speedup``, and ``max_relative_error``, the
        fused model's largest error against float64 over the largest score, with the ``tolerance`` it should keep to.
    """
    rates = list(rates)
    prompts = data.sample(batch, length, 0.8, generator=generator).to(model.W_O.device, dtype)
    contenders, rows = {}, []
    for rate in rates:
        exact = copy.deepcopy(model).prune_neurons_(rate).to(dtype)
        fused = exact.compile_for_inference()
        contenders[f"eager {rate}"] = lambda model=exact: model(prompts.context, prompts.query)
        contenders[f"fasticl {rate}"] = lambda model=fused: model(prompts.context, prompts.query)

        truth = copy.deepcopy(exact).double()(prompts.context.double(), prompts.query.double())
        scale = truth.abs().max().item()
        eager_error = (contenders[f"eager {rate}"]() - truth).abs().max().item() / scale
        error = (contenders[f"fasticl {rate}"]() - truth).abs().max().item() / scale
        # Folding W_K, W_Q and W_O, W_V rounds two products to the dtype once more than the unfolded weights do.
        tolerance = 4 * eager_error + 4 * torch.finfo(dtype).eps
        rows.append({"rate": rate, "neurons": len(exact.W_O), "max_relative_error": error, "tolerance": tolerance})
    timings = interleaved(contenders, seconds=seconds, synchronize=synchronize)
    for row in rows:
        eager_ms, fasticl_ms = (timings[f"{name} {row['rate']}"].ms_p50 for name in ("eager", "fasticl"))
        row.update(eager_us=eager_ms * 1e3 / batch, fasticl_us=fasticl_ms * 1e3 / batch, speedup=eager_ms / fasticl_ms)
    return rows
