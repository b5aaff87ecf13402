"""What a model's linears see while it runs on calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasticl.layers import Layer


def call(model: nn.Module, batch: Any) -> Any:
    """What ``model`` returns for a tensor (``model(x)``), a tuple or list (``model(*x)``) or a mapping (``**x``)."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    raise TypeError(f"expected each batch to be a tensor, tuple, list or mapping, got {type(batch).__name__}")


def run(model: nn.Module, batches: Iterable[Any]) -> None:
    """Calls ``model`` on each batch."""
    for batch in batches:
        call(model, batch)


def input_means(
    model: nn.Module, layers: list[Layer], run: Callable[[], object], statistic: Callable[[Tensor], Tensor]
) -> dict[Hashable, Tensor]:
    """``statistic(x) / T`` of the T tokens ``x [T, K]`` that each layer reads while ``run()`` runs, in float64.

    Keyed by ``Layer.key``: layers that share a weight share the mean over all that it multiplies.

    Args:
        model: holds the layers; in evaluation mode meanwhile.
        statistic: a sum over tokens, of ``x`` in float32 or wider.

    Raises:
        ValueError: a layer reads no token, or its statistic is not finite.
    """
    sums: dict[Hashable, tuple[Tensor | float, int]] = {}
    last: tuple[Tensor, int, Tensor] | None = None  # input, version, statistic: queries, keys and values read the same

    def observe(key: Hashable) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            nonlocal last
            x = args[0] if args else next(iter(kwargs.values()))
            if last is None or x is not last[0] or x.is_inference() or x._version != last[1]:
                tokens = x.reshape(-1, x.shape[-1])
                found = statistic(tokens.to(torch.promote_types(x.dtype, torch.float32))).double()
                last = x, 0 if x.is_inference() else x._version, found
            total, count = sums.get(key, (0.0, 0))
            sums[key] = total + last[2], count + x.shape[:-1].numel()

        return hook

    with hooked(model, [(layer.module, observe(layer.key)) for layer in layers]):
        run()

    means = {}
    for layer in layers:
        total, count = sums.get(layer.key, (0.0, 0))
        if not isinstance(total, Tensor) or count == 0:
            raise ValueError(
                f"{layer.name}: expected calibration that reaches this layer, got no token; exclude it by filter_fn"
            )
        if not bool(total.isfinite().all()):
            raise ValueError(f"{layer.name}: expected finite layer inputs on the calibration, got NaN or inf")
        means[layer.key] = total / count
    return means


@contextmanager
def hooked(model: nn.Module, hooks: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Evaluation mode with forward pre-hooks, and everything as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    fastpath = torch.backends.mha.get_fastpath_enabled()  # would pass nn.TransformerEncoder's linears by
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fastpath)
