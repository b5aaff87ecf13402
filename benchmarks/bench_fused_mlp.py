"""``fused_mlp``: the MLP of GPT-2 (GELU) and of SmolLM2-135M (SiLU-gated), neurons removed or weights packed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from common import Case, Contender, Truth, device
from linear import bytes_of, inputs, pruned
from torch import Tensor

import fasticl

SPARSITIES = (0.3, 0.5, 0.8)
# hidden width H, model width K, activation, gated
MLPS = ((3072, 768, "gelu_tanh", False), (1536, 576, "silu", True))
BATCHES = {"float32": (1, 4, 16, 64, 128), "bfloat16": (1, 16, 64)}
TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
NUMPY_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)))
    ),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def dense_mlp(activation: str, x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None = None) -> Tensor:
    """``down(act(up x))``, or ``down(act(gate x) * up x)``; up and gate ``[H, K]``, down ``[K, H]``."""
    act = TORCH_ACTIVATIONS[activation]
    return F.linear(act(F.linear(x, up)) if gate is None else act(F.linear(x, gate)) * F.linear(x, up), down)


def numpy_mlp(
    activation: str, x: np.ndarray, up: np.ndarray, down: np.ndarray, gate: np.ndarray | None = None
) -> Tensor:
    act = NUMPY_ACTIVATIONS[activation]
    hidden = act(x @ up.T) if gate is None else act(x @ gate.T) * (x @ up.T)
    return torch.from_numpy(hidden @ down.T)


def weights(H: int, K: int, gated: bool, sparsity: float, pattern: str, dtype: str) -> list[Tensor]:
    """up ``[H, K]``, down ``[K, H]`` and, if gated, gate ``[H, K]``; pattern "neuron" makes H smaller."""
    if pattern == "neuron":
        H, pattern, sparsity = H - round(sparsity * H), "dense", 0.0
    up = pruned(H, K, sparsity, pattern, dtype)
    return [up, pruned(K, H, sparsity, pattern, dtype), *([up.roll(1, 0)] if gated else [])]


def mlp_case(
    H: int, K: int, activation: str, gated: bool, batch: int, dtype: str, sparsities: tuple, tier: str
) -> Case:
    def build() -> list[Contender]:
        x = inputs(batch, K, dtype)
        dense = partial(dense_mlp, activation)

        def contender(impl: str, call: Callable, sparsity: float, pattern: str, **options) -> Contender:
            tensors = [w.to(device()) for w in weights(H, K, gated, sparsity, pattern, dtype)]
            stored = (
                [fasticl.pack(w, "bitmap") for w in tensors]
                if impl == "fasticl" and pattern == "unstructured"
                else tensors
            )
            return Contender(
                impl,
                [partial(call, x, *stored)],
                Truth.of(dense, x, *tensors),
                sum(w.bytes_read if isinstance(w, fasticl.PackedWeight) else bytes_of(w) for w in stored)
                + 2 * bytes_of(x),
                2 * batch * sum(int(torch.count_nonzero(w)) for w in tensors),
                sparsity,
                pattern,
                **options,
            )

        def numpy_call(*tensors: Tensor) -> Tensor:
            return numpy_mlp(activation, *(tensor.numpy() for tensor in tensors))

        fused = partial(fasticl.ops.fused_mlp, activation=activation)
        found = [contender("torch", dense, 0.0, "dense", dense=True)]
        if dtype == "float32" and device() == "cpu":
            found.append(contender("numpy", numpy_call, 0.0, "dense", dense=True, own_pool=True))
        for sparsity in sparsities:
            found.append(contender("torch_smaller", dense, sparsity, "neuron"))
            found.append(contender("fasticl", fused, sparsity, "neuron"))
            found.append(contender("fasticl", fused, sparsity, "unstructured"))
        return found

    shape = f"{H}x{K}-{'gated-' if gated else ''}{activation}"
    return Case("fused_mlp", dtype, shape, batch, build, "hot", tier, 1 + 3 * len(sparsities))


def cases(quick: bool) -> list[Case]:
    sparsities = (0.5,) if quick else SPARSITIES
    return [
        mlp_case(*mlp, batch, dtype, sparsities, "headline" if dtype == "float32" and batch in (1, 64) else "sweep")
        for mlp in MLPS
        for dtype, batches in BATCHES.items()
        for batch in batches
    ]
