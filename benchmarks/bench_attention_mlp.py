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
# the paper's own size, half precision; then Q queries of each prompt, where one is given
SHAPES = (
    ((64, 512, 64, 256), None, "float32", "headline"),
    ((1024, 16, 128, 512), None, "float32", "headline"),
    ((1, 512, 64, 256), None, "float32", "sweep"),
    ((16, 512, 256, 256), None, "float32", "sweep"),
    ((128, 20, 60, 64), None, "float32", "sweep"),
    ((64, 512, 64, 256), None, "bfloat16", "sweep"),
    ((1, 512, 64, 256), 64, "float32", "sweep"),
    ((1, 512, 64, 256), 64, "bfloat16", "sweep"),
)


def eager(context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor) -> Tensor:
    """``aᵀ ReLU(W Σ p_i softmax_i(p_iᵀ A p_query))``.

    context ``[B, L, d]``, query ``[B, d]``, A ``[d, d]``, W ``[m, d]``, a ``[m]``.
    """
    scores = torch.bmm(context, (query @ A.T).unsqueeze(2)).squeeze(2)
    mixed = torch.bmm(torch.softmax(scores, 1).unsqueeze(1), context).squeeze(1)
    return torch.relu(mixed @ W.T) @ a


def eager_many(context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor) -> Tensor:
    """The same of several queries of each prompt, ``[B, Q, d]``."""
    scores = torch.bmm(query @ A.T, context.mT)
    return torch.relu(torch.bmm(torch.softmax(scores, 2), context) @ W.T) @ a


def separately(context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor) -> Tensor:
    """A call of the op for each of Q queries."""
    return torch.stack([fasticl.ops.attention_mlp(context, q, A, W, a) for q in query.unbind(1)], 1)


def attention_case(
    shape: tuple[int, int, int, int], dtype: str, tier: str, *, compiled: bool, Q: int | None = None
) -> Case:
    """``Q``: queries of each prompt; None is one, ``[B, d]``."""
    B, L, d, m = shape
    N, dense = B * (Q or 1), eager_many if Q else eager

    def build() -> list[Contender]:
        random = generator(B + L)

        def gaussian(*size: int) -> Tensor:
            return torch.randn(size, generator=random, device=device()).to(DTYPES[dtype])

        tensors = [gaussian(B, L, d), gaussian(*((B, Q, d) if Q else (B, d))), gaussian(d, d) / d,
                   gaussian(m, d) / d**0.5, gaussian(m) / m]  # fmt: skip
        # On a GPU the prompts come from memory; on a CPU they stay where one copy of them stays.
        count = copies_of(bytes_of(tensors[0]), "cold" if device() == "cuda" else "hot")
        copies = [tensors] + [[tensors[0].clone(), *tensors[1:]] for _ in range(count - 1)]
        truth = Truth.of(dense, *tensors)
        size = bytes_of(*tensors) + N * tensors[0].element_size()
        flops = 2 * N * (2 * L * d + d * d + m * d + m)

        def contender(impl: str, call: Callable[..., Tensor], is_dense: bool) -> Contender:
            held_to = truth.loose() if impl == "torch_compile" else truth
            return Contender(impl, [partial(call, *each) for each in copies], held_to, size, flops, dense=is_dense)

        found = [contender("torch", dense, True), contender("fasticl", fasticl.ops.attention_mlp, False)]
        if Q:
            found.append(contender("fasticl+separate", separately, False))
        if compiled:
            try:
                torch.compiler.reset()
                compile_ = torch.compile(dense, dynamic=False)
                compile_(*tensors)
                found.append(contender("torch_compile", compile_, True))
            except Exception as error:  # no compiler, no headers: inductor says so in a class of its own
                warnings.warn(f"torch.compile is not measured: {error}", stacklevel=2)
        return found

    return Case(
        "attention_mlp",
        dtype,
        f"L{L}-d{d}-m{m}" + (f"-Q{Q}" if Q else ""),
        B,
        build,
        "hot",
        tier,
        3,
        15.0 if compiled else 0.0,
    )


def cases(quick: bool) -> list[Case]:
    return [attention_case(shape, dtype, tier, compiled=not quick, Q=Q) for shape, Q, dtype, tier in SHAPES]
