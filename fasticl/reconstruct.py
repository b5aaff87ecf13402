"""Pruning that makes up for what it removes: the weights still to come are moved so that a layer's outputs stay.

For each layer, given the mean ``H = XᵀX / T`` of its inputs ``X [T, K]``, weights ``W' [N, K]`` with zeros are wanted
that keep ``||X Wᵀ - X W'ᵀ||²`` small. Column after column, as in Frantar and Alistarh, "SparseGPT: Massive Language
Models Can Be Accurately Pruned in One-Shot", 2023: what a column loses is made up for, as well as it can be, by the
columns after it. Columns go in blocks, so that all but a block is updated by a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasticl.calibration import hooked, input_means, run
from fasticl.layers import Layer, distinct_layers, split_by_block
from fasticl.scores import all_but_n_of_m, smallest_of_rows

COLUMNS = 128  # of a block; a multiple of the m of every N:M pattern


def reconstruct(
    weight: Tensor, gram: Tensor, sparsity: float, n_of_m: tuple[int, int] | None, damping: float
) -> Tensor:
    """``W'`` of ``weight [N, K]``: the same shape and dtype, with zeros.

    With ``Uᵀ U = G⁻¹``, ``G = H + damping * mean(diag H) * I``, U upper triangular: where ``w_k`` of a row goes, each
    later ``w_l`` of it loses ``w_k U_kl / U_kk``. The weights with the smallest ``(w_k / U_kk)²`` go, which is what
    each costs, once the blocks before are done; as many of each block of columns as it has among the smallest
    ``w_k² G_kk`` of all. (The paper takes as many of each block, which costs much where one has the larger inputs.)
    Zeros stay zeros, and count.

    Args:
        weight: ``[N, K]``, any strides.
        gram: ``H [K, K]``, float64. The weights of an input that is always zero cost damping alone, and move nothing.
        sparsity: ``max(round(sparsity * N * K), zeros before)`` weights are zero afterwards.
        n_of_m: n of every m consecutive inputs stay, instead of ``sparsity``.
        damping: of the mean of H's diagonal, added to it, so that few tokens still make an H that can be inverted.
    """
    N, K = weight.shape
    if N == 0 or K == 0:
        return weight.clone()
    wide = torch.promote_types(weight.dtype, torch.float32)
    mean = gram.diagonal().mean()
    damped = gram.clone()
    damped.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))
    U = _inverse_factor(damped).to(wide)
    scale = U.diagonal()  # [K]
    W = weight.t().to(wide).contiguous()  # [K, N]: columns of the weight are rows in memory
    gone = weight.t() == 0  # [K, N]
    counts = [] if n_of_m else _shares(gone, W, damped.diagonal().rsqrt().to(wide), sparsity)
    for begin in range(0, K, COLUMNS):
        end = min(begin + COLUMNS, K)
        if n_of_m is None:
            _choose_(gone[begin:end], W[begin:end], scale[begin:end], counts[begin // COLUMNS])
        losses = torch.empty_like(W[begin:end])  # w_k / U_kk of what goes, else 0
        for k in range(begin, end):
            if n_of_m is not None and k % n_of_m[1] == 0:
                _choose_n_of_m_(gone[k : k + n_of_m[1]], W[k : k + n_of_m[1]], scale[k : k + n_of_m[1]], n_of_m)
            losses[k - begin] = (W[k] / scale[k]).masked_fill_(~gone[k], 0)
            W[k + 1 : end].addr_(U[k, k + 1 : end], losses[k - begin], alpha=-1)
        W[end:].addmm_(U[begin:end, end:].t(), losses, alpha=-1)
    return W.masked_fill_(gone, 0).t().to(weight.dtype)


def _inverse_factor(G: Tensor) -> Tensor:
    """Upper triangular ``U [K, K]`` with ``Uᵀ U = G⁻¹``.

    With the order of G reversed, a lower Cholesky factor is an upper one R of ``G = R Rᵀ``; then ``U = R⁻¹``, and no
    inverse of G is ever formed.
    """
    R = torch.linalg.cholesky(G.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)


def _shares(gone: Tensor, W: Tensor, scale: Tensor, sparsity: float) -> list[int]:
    """How many further weights each block of columns loses: as many as it has of the cheapest of ``W [K, N]``."""
    cheapest = gone.clone()
    _choose_(cheapest, W, scale, max(0, round(sparsity * gone.numel()) - int(gone.sum())))
    return [int(block.sum()) for block in (cheapest ^ gone).split(COLUMNS)]


def _choose_(gone: Tensor, W: Tensor, scale: Tensor, count: int) -> None:
    """Marks the ``count`` weights with the least ``(W / scale)²``, all ``[k, N]``, of those that are not gone yet."""
    costs = (W / scale[:, None]).square_().masked_fill_(gone, torch.inf)
    gone |= smallest_of_rows(costs.view(1, -1), count).view(costs.shape)


def _choose_n_of_m_(gone: Tensor, W: Tensor, scale: Tensor, n_of_m: tuple[int, int]) -> None:
    """Marks all but n of a group of m, ``[m, N]``."""
    costs = (W / scale[:, None]).square_().masked_fill_(gone, -1)
    gone |= all_but_n_of_m(costs.t().contiguous(), *n_of_m).t()


class BlockCalls:
    """What a chain of blocks is called with, batch by batch, so that each can run without the rest of the model.

    A chain: for each batch every block is called once, in order, its first argument what the one before returned (the
    first of a tuple). The further arguments (masks, positions) are kept for each block; caches of keys and values are
    not, for a block is called more than once.

    Args:
        blocks: of :func:`fasticl.layers.find_blocks`; maybe none.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = list(blocks)
        self._chained = len(set(blocks)) == len(self._blocks)
        self._turn = 0  # of the block to be called next
        self._output: Any = None
        self._others: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in blocks]
        self.inputs: list[Tensor] = []  # of the first block

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Calls of the blocks are recorded meanwhile."""
        handles = []
        for i, block in enumerate(self._blocks if self._chained else []):
            handles.append(block.register_forward_pre_hook(partial(self._enter, i), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leave))
        try:
            yield
        finally:
            self._output = None
            for handle in handles:
                handle.remove()

    @property
    def blocks(self) -> list[nn.Module]:
        """The chain; empty if what was recorded was none."""
        return self._blocks if self._chained and self._turn == 0 and self.inputs else []

    def run(self, i: int, inputs: list[Tensor]) -> list[Tensor]:
        """What block i makes of ``inputs``, one a batch."""
        calls = zip(inputs, self._others[i], strict=True)
        return [_first(self._blocks[i](x, *args, **kwargs)) for x, (args, kwargs) in calls]

    def _enter(self, i: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else None
        follows = i == self._turn and isinstance(x, Tensor) and (i == 0 or _same(x, self._output))
        self._chained = self._chained and follows
        if not isinstance(x, Tensor) or not self._chained:
            return
        if i == 0:
            self.inputs.append(x)
        others = tuple(None if _is_cache(value) else value for value in args[1:])
        self._others[i].append((others, {k: None if _is_cache(value) else value for k, value in kwargs.items()}))

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._output = _first(output)
        self._turn = (self._turn + 1) % len(self._blocks)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _same(x: Tensor, output: Any) -> bool:
    return isinstance(output, Tensor) and x.shape == output.shape and torch.equal(x, output.to(x.device))


def _is_cache(value: Any) -> bool:
    return callable(getattr(value, "get_seq_length", None))  # transformers, without importing it


def reconstruct_layers_(
    model: nn.Module,
    layers: list[Layer],
    calls: BlockCalls,
    batches: Iterable[Any],
    prune: Callable[[Layer, Tensor], Tensor],
    advance: Callable[[], None],
) -> None:
    """Prunes block after block, each by what the pruned ones before it make of the calibration.

    Layers in no block, or with a weight that is read elsewhere too, come last. H is held for those that are pruned
    together: one block's.

    Args:
        layers: to be pruned, all of those that share a weight.
        calls: recorded while the dense model ran on ``batches``.
        prune: a layer and ``H [K, K]`` -> its new weight ``[N, K]``.
        advance: called after each block.

    Raises:
        ValueError: an input of a layer, or a weight, is not finite any more, or H cannot be inverted; the blocks before
            are pruned by then.
    """

    def prune_(some: list[Layer], run: Callable[[], object]) -> None:
        grams = input_means(model, some, run, lambda x: x.t() @ x)
        for layer in distinct_layers(some):
            try:
                pruned = prune(layer, grams.pop(layer.key))
            except torch.linalg.LinAlgError as error:
                raise ValueError(f"{layer.name}: expected more damping, or more calibration tokens: {error}") from error
            if not bool(pruned.isfinite().all()):
                raise ValueError(f"{layer.name}: expected finite weights after reconstruction, got NaN or inf")
            layer.weight.copy_(pruned)

    own, rest = split_by_block(calls.blocks, layers)
    with hooked(model, []):
        inputs = calls.inputs
        for i, some in enumerate(own):
            if some:
                prune_(some, partial(calls.run, i, inputs))
            inputs = calls.run(i, inputs)
            advance()
        if rest:
            prune_(rest, lambda: run(model, batches))
