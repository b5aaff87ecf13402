"""Scores of weights, and which are the smallest: of all, of each row, of each group of m; exact whatever the ties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

N_OF_M = {"2:4": (2, 4), "4:8": (4, 8), "8:16": (8, 16)}  # n of every m consecutive inputs stay
_BLOCK = 1 << 22  # scores held at once: 16 MiB of float32


def row_blocks(weight: Tensor) -> tuple[Tensor, ...]:
    """Views of ``weight [N, K]``: blocks of rows ``[R, K]``."""
    return weight.split(max(1, _BLOCK // max(weight.shape[1], 1)))


def scored(
    weight: Tensor, norm: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows ``[R, K]`` and their scores ``|W| * norm``, contiguous, in ``dtype`` or wider."""
    dtype = torch.promote_types(weight.dtype, dtype)
    for block in row_blocks(weight):
        scores = block.abs().to(dtype).contiguous()
        yield block, scores if norm is None else scores.mul_(norm.to(scores))


def kth_smallest(blocks: Callable[[], Iterable[Tensor]], k: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The k-th smallest of the scores (k >= 1), and how many equal to it are not among the k smallest.

    The bits of floats >= 0 order as the floats do, so histograms of 16 bits, from the highest down, find it: two passes
    over float32, four over float64, in memory that does not grow with the number of scores, as ``kthvalue``'s does.
    """
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    top = torch.finfo(dtype).bits - 16
    prefix, rank, count = 0, k, 0  # the leading bits so far, and the rank among the scores that begin with them
    for shift in range(top, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for scores in blocks():
            keys = scores.flatten().view(bits) >> shift
            if shift < top:
                keys = keys[keys >> 16 == prefix] & 0xFFFF
            histogram += torch.bincount(keys, minlength=1 << 16).cpu()
        upto = histogram.cumsum(0)
        bucket = int(torch.searchsorted(upto, rank))
        count = int(histogram[bucket])
        rank -= int(upto[bucket]) - count
        prefix = prefix << 16 | bucket
    return torch.tensor(prefix, dtype=bits).view(dtype), count - rank


def smallest_of_rows(scores: Tensor, k: int) -> Tensor:
    """True at the k smallest of each row of ``scores [R, K]``."""
    if k == 0 or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    largest = scores.kthvalue(k, dim=1, keepdim=True).values  # [R, 1]
    mask = scores <= largest
    stay = mask.sum(1) - k  # [R]: how many too many, all tied
    rows = stay.nonzero().squeeze(1)
    if len(rows):
        tied = scores[rows] == largest[rows]
        mask[rows] &= ~(tied & (tied.cumsum(1) <= stay[rows, None]))
    return mask


def all_but_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """False at the n largest of every m consecutive entries of ``scores [R, K]``."""
    lanes = (
        scores.view(-1, m).t().contiguous()
    )  # [m, R * K / m]: comparing whole lanes is faster than sorting m at a time
    better = torch.zeros_like(lanes, dtype=torch.uint8)  # how many of its group are better
    for i in range(m):
        for j in range(i + 1, m):
            first_wins = lanes[i] >= lanes[j]
            better[j] += first_wins
            better[i] += ~first_wins
    return (better >= n).t().reshape(scores.shape)


def zero_of_rows(weight: Tensor, share: float | tuple[int, int], norm: Tensor | None = None) -> None:
    """Zero a share of each output row by ``|W| * norm``, or all but n of every m consecutive inputs."""
    for block, scores in scored(weight, norm):
        if isinstance(share, tuple):
            block.masked_fill_(all_but_n_of_m(scores, *share), 0)
        else:
            block.masked_fill_(smallest_of_rows(scores, round(share * scores.shape[1])), 0)
