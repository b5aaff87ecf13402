"""``attention_mlp``: the one-layer in-context learner, F = aᵀ ReLU(W Σ p_i softmax_i(p_iᵀ A p_query))."""

from __future__ import annotations

import torch
from torch import Tensor

from fasticl import _C
from fasticl.ops import _registry as registry


def attention_mlp(
    context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """``F_b = aᵀ ReLU(W c_b)`` with ``c_b = sum_{i < lengths_b} p_i softmax_i(p_iᵀ A q_b)``, ``p_i = context[b, i]``.

    With several queries for each prompt, the same for every ``q_bj``: ``F_bj = aᵀ ReLU(W c_bj)``.

    A prompt is read once, by tiles of queries: scores, softmax and sum run over blocks of its columns that stay in the
    L1 cache, or on a GPU's chip.

    Args:
        context: ``[B, L, d]``, L at least 1; float32, bfloat16 or float16, any strides (a copy only where the last
            dimension is strided); float64, and on CUDA d above 8192, runs the reference.
        query: ``[B, d]``, or ``[B, Q, d]``, Q queries of each prompt; of ``context``'s dtype, as are the following.
        A: ``[d, d]``, the product W_Kᵀ W_Q of the attention layer.
        W: ``[m, d]``, the product W_O W_V; a pruned neuron is a row that is not there.
        a: ``[m]``.
        lengths: int64 ``[B]`` in [1, L], the columns of each prompt; what lies behind them is not read. None: all L.

    Returns:
        ``[B]``, or ``[B, Q]``, in ``context.dtype``; products accumulate in float32, the result is rounded once. It
        does not depend on the number of threads.

    Raises:
        TypeError: dtypes differ, or are not floating-point (lengths: not int64).
        ValueError: shapes or devices do not fit, L is 0, or a length is out of range. On CUDA that would have to wait
            for the device: there the F of such a prompt is NaN.
    """
    _check(context, query, A, W, a, lengths)
    if registry.needs_grad(context, query, A, W, a):
        return reference(context, query, A, W, a, lengths)
    return torch.ops.fasticl.attention_mlp(context, query, A, W, a, lengths)


def reference(context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor, lengths: Tensor | None) -> Tensor:
    dtype, wide = context.dtype, torch.promote_types(context.dtype, torch.float32)
    context, query, A, W, a = (t.to(wide) for t in (context, query, A, W, a))
    queries = query if query.dim() == 3 else query.unsqueeze(1)  # [B, Q, d]
    scores = (queries @ A.T) @ context.mT  # [B, Q, L]
    if lengths is not None:
        _check_range(lengths, context.shape[1])
        absent = torch.arange(context.shape[1], device=context.device) >= lengths.unsqueeze(1)
        scores = scores.masked_fill(absent.unsqueeze(1), -torch.inf)
        context = context.masked_fill(absent.unsqueeze(2), 0)  # 0 * NaN behind a prompt would be NaN
    mixed = torch.softmax(scores, dim=2) @ context  # [B, Q, d]
    return (torch.relu(mixed @ W.T) @ a).view(query.shape[:-1]).to(dtype)


def _fake(context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor, lengths: Tensor | None) -> Tensor:
    return context.new_empty(query.shape[:-1])


def _cpu(context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor, lengths: Tensor | None) -> Tensor:
    (B, L, d), m = context.shape, W.shape[0]
    if context.dtype not in registry.DTYPES or d == 0:
        return reference(context, query, A, W, a, lengths)
    out = context.new_empty(query.shape[:-1])
    Q = query.shape[1] if query.dim() == 3 else 1
    query, _, query_stride = registry.rows(query)
    context, A, W, a = (t if t.stride(-1) == 1 else t.contiguous() for t in (context, A, W, a))
    if lengths is not None:
        _check_range(lengths, L)
        lengths = lengths.contiguous()
    _C.attention_mlp(
        context.data_ptr(), B, L, d, context.stride(0), context.stride(1), query.data_ptr(), Q, query_stride,
        A.data_ptr(), A.stride(0), W.data_ptr(), m, W.stride(0), a.data_ptr(), registry.address(lengths),
        out.data_ptr(), registry.DTYPES[context.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _check(context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor, lengths: Tensor | None) -> None:
    registry.check_dtype("attention_mlp: context", context)
    if context.dim() != 3:
        registry.check_shape("attention_mlp: context", context, ("B", "L", "d"))
    B, L, d = context.shape
    if L == 0:
        raise ValueError(f"attention_mlp: context: expected at least one column, got shape {list(context.shape)}")
    m = W.shape[0] if isinstance(W, Tensor) and W.dim() else 0
    Q = (query.shape[1],) if isinstance(query, Tensor) and query.dim() == 3 else ()
    _check_tensor("query", query, (B, *Q, d), context.dtype, context.device)
    _check_tensor("A", A, (d, d), context.dtype, context.device)
    _check_tensor("W", W, (m, d), context.dtype, context.device)
    _check_tensor("a", a, (m,), context.dtype, context.device)
    if lengths is not None:
        _check_tensor("lengths", lengths, (B,), torch.int64, context.device)


def _check_tensor(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    # Comparisons alone where all fits: the full checks of five tensors take 10 us, as long as a small prompt does.
    if not isinstance(x, Tensor) or (x.shape, x.dtype, x.device, x.layout) != (shape, dtype, device, torch.strided):
        registry.check_dtype(f"attention_mlp: {name}", x, dtype)
        registry.check_device(f"attention_mlp: {name}", x, device)
        registry.check_shape(f"attention_mlp: {name}", x, shape)


def _check_range(lengths: Tensor, L: int) -> None:
    """Part of the implementations, not of the door: values are not known while torch.compile traces."""
    if lengths.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(lengths))
    if low < 1 or high > L:
        raise ValueError(f"attention_mlp: lengths: expected in [1, {L}], got {low if low < 1 else high}")


registry.define(
    "attention_mlp(Tensor context, Tensor query, Tensor A, Tensor W, Tensor a, Tensor? lengths) -> Tensor",
    reference=reference,
    fake=_fake,
    cpu=_cpu,
    triton=True,
)
