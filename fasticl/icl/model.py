"""The one-layer Transformer of the in-context learning theory, as it is trained and as it is run."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fasticl.icl.data import check_integer
from fasticl.ops.attention_mlp import attention_mlp


class ICLTransformer(nn.Module):
    """``F = aᵀ ReLU(W_O sum_i W_V p_i attn_i)`` with ``attn_i = softmax_i((W_K p_i)ᵀ W_Q p_query)``; predicts sign F.

    One head, one layer; no bias, residual, norm or scale. Softmax and sum run over the L context columns only.
    A neuron is a row of ``W_O`` with its entry of ``a``. Source: Li et al., ICML 2024 (arXiv 2402.15607).

    ``W_Q`` and ``W_K`` start as delta times the identity on the input's coordinates (the first ``d_x`` of d) and 0 on
    the label's, ``W_V`` as delta times the identity, ``W_O`` normal with standard deviation xi; ``a`` is +1/m or -1/m
    at random and stays: a buffer. The defaults are those that :func:`fasticl.icl.train` is tuned for.

    Args:
        d_x: input dimension.
        d_y: label dimension; ``d = d_x + d_y``.
        m: neurons.
        m_a: rows of W_Q and W_K; None is d.
        m_b: rows of W_V; None is d.
        delta: scale of the identities.
        xi: standard deviation of W_O. Small, so that trained neurons end in two clusters, large and removable.
        generator: draws W_O and a; on the CPU; None takes torch's default one.

    Shapes:
        W_Q, W_K ``[m_a, d]``; W_V ``[m_b, d]``; W_O ``[m, m_b]``; a ``[m]``. ``m`` shrinks as neurons are pruned.
    """

    a: Tensor

    def __init__(
        self,
        d_x: int = 30,
        d_y: int = 30,
        m: int = 64,
        *,
        m_a: int | None = None,
        m_b: int | None = None,
        delta: float = 0.2,
        xi: float = 0.02,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d = d_x + d_y
        m_a = d if m_a is None else m_a
        m_b = d if m_b is None else m_b
        for name, size in (("d_x", d_x), ("d_y", d_y), ("m", m), ("m_a", m_a), ("m_b", m_b)):
            check_integer(name, size, least=1)
        for name, scale in (("delta", delta), ("xi", xi)):
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"{name}: expected finite and positive, got {scale}")

        def parameter(initial: Tensor) -> nn.Parameter:
            return nn.Parameter(initial.to(device=device, dtype=dtype))

        input_identity = torch.eye(m_a, d)
        input_identity[:, d_x:] = 0
        self.W_Q = parameter(delta * input_identity)
        self.W_K = parameter(delta * input_identity)
        self.W_V = parameter(delta * torch.eye(m_b, d))
        self.W_O = parameter(xi * torch.randn(m, m_b, generator=generator))
        signs = 2 * torch.randint(2, (m,), generator=generator) - 1
        self.register_buffer("a", (signs / m).to(device=device, dtype=self.W_O.dtype))

    def forward(self, context: Tensor, query: Tensor, lengths: Tensor | None = None) -> Tensor:
        """F of each prompt.

        Args:
            context: ``[B, L, d]``, columns ``p_i = [x_i; y_i]``.
            query: ``[B, d]``, ``p_query = [x_query; 0]``.
            lengths: ``[B]`` int64 or int32 in 0..L: prompt b has the columns ``context[b, :lengths[b]]``, whatever the
                others hold; None is L for all. A prompt with no columns has F = 0.

        Returns:
            ``[B]``.

        Raises:
            TypeError: a dtype differs from the weights', or lengths are not integers.
            ValueError: a shape does not fit, or a length is outside 0..L.
        """
        _check_prompts(context, query, lengths, self.W_Q)
        context, attention = _attend(context, self._key(query), lengths)
        value = _weighted_sum(attention, context) @ self.W_V.T  # [B, m_b]; sums first: L times less work than W_V p_i
        return torch.relu(value @ self.W_O.T) @ self.a

    def attention(self, context: Tensor, query: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``attn_i``, ``[B, L]``: 0 past ``lengths``, else positive with sum 1. Arguments as for :meth:`forward`."""
        _check_prompts(context, query, lengths, self.W_Q)
        return _attend(context, self._key(query), lengths)[1]

    def neuron_scores(self, weight: Literal["W_O", "W_O W_V"] = "W_O") -> Tensor:
        """``[m]``, the Euclidean norms of the rows of ``W_O``, or of ``W_O W_V``, through which a neuron sees a prompt.

        After training from a small W_O (``xi``) both separate the large neurons from the idle ones.

        Raises:
            ValueError: ``weight`` is neither.
        """
        if weight not in ("W_O", "W_O W_V"):
            raise ValueError(f"weight: expected 'W_O' or 'W_O W_V', got {weight!r}")
        rows = self.W_O.detach()
        return torch.linalg.vector_norm(rows if weight == "W_O" else rows @ self.W_V.detach(), dim=1)

    @torch.no_grad()
    def prune_neurons_(
        self, neurons: float | Tensor | list[int], *, weight: Literal["W_O", "W_O W_V"] = "W_O"
    ) -> ICLTransformer:
        """Removes neurons: their rows of ``W_O`` and entries of ``a`` are gone, and ``m`` is smaller. In place.

        ``W_O`` becomes a new parameter without a gradient: make optimizers anew. No neurons at all is F = 0.

        Args:
            neurons: a float, the fraction in [0, 1] that goes, smallest ``neuron_scores(weight)`` first, rounded to
                whole neurons; or the indices of those that go, a list of int or an integer tensor ``[n]``.
            weight: what is scored; without effect on indices.

        Returns:
            self.

        Raises:
            TypeError: ``neurons`` is neither a float nor integers.
            ValueError: a fraction outside [0, 1], an index outside 0..m-1, or weights that are not finite.
        """
        m = len(self.W_O)
        if isinstance(neurons, float):
            if not 0 <= neurons <= 1:
                raise ValueError(f"neurons: expected a fraction in [0, 1], got {neurons}")
            scores = self.neuron_scores(weight)
            if not bool(scores.isfinite().all()):
                raise ValueError("neurons: expected finite weights to rank, got NaN or infinity in neuron_scores()")
            removed = scores.argsort(stable=True)[: round(neurons * m)]
        else:
            removed = _indices(neurons, m).to(self.W_O.device)
        kept = torch.ones(m, dtype=torch.bool, device=self.W_O.device)
        kept[removed] = False
        self.W_O = nn.Parameter(self.W_O[kept], requires_grad=self.W_O.requires_grad)
        self.a = self.a[kept]
        return self

    @torch.no_grad()
    def compile_for_inference(self) -> FusedICLTransformer:
        """The same function with ``A = W_Kᵀ W_Q`` and ``W = W_O W_V`` folded (in float64, on the CPU), for inference.

        A copy: later changes to this module do not reach it.
        """
        W_Q, W_K, W_V, W_O = (weight.detach().cpu().double() for weight in (self.W_Q, self.W_K, self.W_V, self.W_O))
        like = self.W_O
        fused = FusedICLTransformer((W_K.T @ W_Q).to(like), (W_O @ W_V).to(like), self.a.detach().clone())
        return fused.train(self.training)

    def _key(self, query: Tensor) -> Tensor:
        """``W_Kᵀ W_Q p_query``, ``[B, d]``: attention scores are its products with p_i, without a key per column."""
        return query @ self.W_Q.T @ self.W_K

    def extra_repr(self) -> str:
        (m_a, d), (m, m_b) = self.W_Q.shape, self.W_O.shape
        return f"d={d}, m_a={m_a}, m_b={m_b}, m={m}"


class FusedICLTransformer(nn.Module):
    """``F = aᵀ ReLU(W sum_i p_i softmax_i(p_iᵀ A p_query))`` in one pass over each prompt; no gradients to its weights.

    What :meth:`ICLTransformer.compile_for_inference` returns, computed by :func:`fasticl.ops.attention_mlp`.

    Args:
        A: ``[d, d]``, ``W_Kᵀ W_Q``.
        W: ``[m, d]``, ``W_O W_V``.
        a: ``[m]``.

    Raises:
        TypeError: the dtypes differ.
        ValueError: a shape does not fit.
    """

    A: Tensor
    W: Tensor
    a: Tensor

    def __init__(self, A: Tensor, W: Tensor, a: Tensor) -> None:
        super().__init__()
        if A.dim() != 2 or A.shape[0] != A.shape[1]:
            raise ValueError(f"A: expected a square matrix [d, d], got {list(A.shape)}")
        if W.dim() != 2 or W.shape[1] != A.shape[0]:
            raise ValueError(f"W: expected [m, d={A.shape[0]}], got {list(W.shape)}")
        if a.shape != W.shape[:1]:
            raise ValueError(f"a: expected [m={W.shape[0]}], got {list(a.shape)}")
        if not A.dtype == W.dtype == a.dtype:
            raise TypeError(f"A, W, a: expected one dtype, got {A.dtype}, {W.dtype}, {a.dtype}")
        self.register_buffer("A", A)
        self.register_buffer("W", W)
        self.register_buffer("a", a)

    def forward(self, context: Tensor, query: Tensor, lengths: Tensor | None = None) -> Tensor:
        """F of each prompt, ``[B]``. Arguments as for :meth:`ICLTransformer.forward`.

        Of ``query [B, Q, d]``, Q queries that share each prompt, F is ``[B, Q]``.
        """
        _check_prompts(context, query, lengths, self.A, many=True)
        if context.shape[1] == 0:
            return query.new_zeros(query.shape[:-1])
        if lengths is None:
            return attention_mlp(context, query, self.A, self.W, self.a)
        empty = lengths == 0  # of which the op knows nothing: its softmax is over at least one column
        F = attention_mlp(context, query, self.A, self.W, self.a, lengths.long().clamp(min=1))
        return F.masked_fill(empty if F.dim() == 1 else empty.unsqueeze(1), 0)

    def attention(self, context: Tensor, query: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The weights inside, ``[B, L]``, computed apart. As :meth:`ICLTransformer.attention`."""
        _check_prompts(context, query, lengths, self.A)
        return _attend(context, query @ self.A.T, lengths)[1]

    def extra_repr(self) -> str:
        return f"d={self.W.shape[1]}, m={self.W.shape[0]}"


def _attend(context: Tensor, key: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Context with its padding zeroed, and ``softmax_i(p_iᵀ key)`` ``[B, L]`` over what is not padding.

    Args:
        context: ``[B, L, d]``.
        key: ``[B, d]``.
        lengths: ``[B]`` or None.
    """
    if lengths is None:
        return context, torch.softmax(_scores(context, key), dim=1)
    present = torch.arange(context.shape[1], device=context.device) < lengths.unsqueeze(1)  # [B, L]
    context = context.masked_fill(~present.unsqueeze(-1), 0)  # 0 * NaN in the padding would be NaN
    # A finite mask, then a product: -inf makes the softmax of an empty prompt, and its gradient, NaN.
    scores = _scores(context, key).masked_fill(~present, torch.finfo(context.dtype).min)
    return context, torch.softmax(scores, dim=1) * present


def _scores(context: Tensor, key: Tensor) -> Tensor:
    return torch.bmm(context, key.unsqueeze(2)).squeeze(2)


def _weighted_sum(attention: Tensor, context: Tensor) -> Tensor:
    """``sum_i attention_i p_i``, ``[B, d]``."""
    return torch.bmm(attention.unsqueeze(1), context).squeeze(1)


def _check_prompts(context: Tensor, query: Tensor, lengths: Tensor | None, weight: Tensor, many: bool = False) -> None:
    """Raises unless the arguments of a forward fit each other and ``weight`` ``[*, d]``.

    Args:
        many: whether a prompt may have several queries, ``[B, Q, d]``.
    """
    d = weight.shape[1]
    if query.dim() not in (2, 3 if many else 2) or query.shape[-1] != d:
        expected = f"[B, d={d}] or [B, Q, d={d}]" if many else f"[B, d={d}]"
        raise ValueError(f"query: expected {expected}, got {list(query.shape)}")
    B = len(query)
    if context.dim() != 3 or len(context) != B or context.shape[2] != d:
        raise ValueError(f"context: expected [B={B}, L, d={d}] with query [B, d], got {list(context.shape)}")
    for name, columns in (("context", context), ("query", query)):
        if columns.dtype != weight.dtype:
            raise TypeError(f"{name}: expected {weight.dtype} as the weights, got {columns.dtype}")
        if columns.device != weight.device:
            raise ValueError(f"{name}: expected on {weight.device} as the weights, got on {columns.device}")
    if lengths is None:
        return
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths: expected int64 or int32, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"lengths: expected [B={B}], got {list(lengths.shape)}")
    if lengths.device != weight.device:
        raise ValueError(f"lengths: expected on {weight.device} as the weights, got on {lengths.device}")
    L = context.shape[1]
    if bool(((lengths < 0) | (lengths > L)).any()):
        raise ValueError(f"lengths: expected 0..L={L}, got {int(lengths.min())}..{int(lengths.max())}")


def _indices(neurons: Tensor | list[int], m: int) -> Tensor:
    """int64 ``[n]``, each in 0..m-1."""
    if not isinstance(neurons, (Tensor, list)):
        raise TypeError(f"neurons: expected a float or integer indices, got {neurons!r} ({type(neurons).__name__})")
    indices = torch.as_tensor(neurons)
    if indices.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise TypeError(f"neurons: expected integer indices [n], got {indices.dtype} {list(indices.shape)}")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= m:
        raise ValueError(f"neurons: expected indices in 0..{m - 1}, got {low}..{high}")
    return indices.long()
