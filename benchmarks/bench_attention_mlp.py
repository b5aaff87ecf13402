"""``attention_mlp``: the one-layer model of the paper, against eager torch and ``torch.compile``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from common import DTYPES, Case, Contender, Truth, copies_of, device, generator
from linear import bytes_of
from torch import Tensor

import fasticl

# B prompts, L columns each, width d, m neurons; tier: long prompts, many short ones, one prompt alone, a wide model,
# the paper's own size, half precision
SHAPES = (
    ((64, 512, 64, 256), "float32", "headline"),
    ((1024, 16, 128, 512), "float32", "headline"),
    ((1, 512, 64, 256), "float32", "sweep"),
    ((16, 512, 256, 256), "float32", "sweep"),
    ((128, 20, 60, 64), "float32", "sweep"),
    ((64, 512, 64, 256), "bfloat16", "sweep"),
)


def eager(context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor) -> Tensor:
    """``aᵀ ReLU(W Σ p_i softmax_i(p_iᵀ A p_query))``.

    context ``[B, L, d]``, query ``[B, d]``, A ``[d, d]``, W ``[m, d]``, a ``[m]``.
    """
    scores = torch.bmm(context, (query @ A.T).unsqueeze(2)).squeeze(2)
    mixed = torch.bmm(torch.softmax(scores, 1).unsqueeze(1), context).squeeze(1)
    return torch.relu(mixed @ W.T) @ a


def attention_case(shape: tuple[int, int, int, int], dtype: str, tier: str, *, compiled: bool) -> Case:
    B, L, d, m = shape

    def build() -> list[Contender]:
        random = generator(B + L)

        def gaussian(*size: int) -> Tensor:
            return torch.randn(size, generator=random).to(device(), DTYPES[dtype])

        tensors = [gaussian(B, L, d), gaussian(B, d), gaussian(d, d) / d, gaussian(m, d) / d**0.5, gaussian(m) / m]
        # On a GPU the prompts come from memory; on a CPU they stay where one copy of them stays.
        count = copies_of(bytes_of(tensors[0]), "cold" if device() == "cuda" else "hot")
        copies = [tensors] + [[tensors[0].clone(), *tensors[1:]] for _ in range(count - 1)]
        truth = Truth.of(eager, *tensors)
        size = bytes_of(*tensors) + B * tensors[0].element_size()
        flops = 2 * B * (2 * L * d + d * d + m * d + m)

        def contender(impl: str, call: Callable[..., Tensor], dense: bool) -> Contender:
            held_to = truth.loose() if impl == "torch_compile" else truth
            return Contender(impl, [partial(call, *each) for each in copies], held_to, size, flops, dense=dense)

        found = [contender("torch", eager, True), contender("fasticl", fasticl.ops.attention_mlp, False)]
        if compiled:
            try:
                torch.compiler.reset()
                compile_ = torch.compile(eager, dynamic=False)
                compile_(*tensors)
                found.append(contender("torch_compile", compile_, True))
            except Exception as error:  # no compiler, no headers: inductor says so in a class of its own
                warnings.warn(f"torch.compile is not measured: {error}", stacklevel=2)
        return found

    return Case("attention_mlp", dtype, f"L{L}-d{d}-m{m}", B, build, "hot", tier)


def cases(quick: bool) -> list[Case]:
    return [attention_case(shape, dtype, tier, compiled=not quick) for shape, dtype, tier in SHAPES]
