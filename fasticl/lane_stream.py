"""The lane-stream layout: a bitmap weight as the tensor cores of a GPU take it (csrc/bitmap_linear_cuda.cu, and on
Hopper csrc/bitmap_linear_wgmma_cuda.cu, whose warps take four strips of a warpgroup's 64 outputs).

16 outputs are a strip, 64 columns a chunk. Lane ``l = 4 g + t`` of a warp holds, of a strip and chunk, the outputs
``g`` and ``g + 8`` and the columns ``16 t`` to ``16 t + 15``: 32 positions, in the order in which operand A of
``mma.m16n8k16`` takes them: four columns of output g, the same four of g + 8, the next four of g, and so on. That its
steps take columns 16 t + 4 s + i where the instruction counts 2 t + i is no matter, as long as x is taken alike.

    masks      int32 [strips, chunks, 32]; bit 8 s + 4 h + i of a word: whether the lane's output g + 8 h has a value
               in its column 4 s + i
    values     int32 [rows, 32]; column l is the stream of lane l: its values in the order of the bits, two to a word,
               the first in the lower half. A lane reads from its own bank of shared memory, wherever it stands
    starts     int32 [strips * chunks + 1]; the row that no lane has reached when a chunk begins
    row_order  int32 [strips * 16]; the row of W that an output of a strip is, -1 for none

K is cut into ``splits`` shares of whole chunks, one for each warp of the ``blocks`` that share a strip, and the streams
of a share begin at one row. Within it a lane's stream runs on from chunk to chunk, except that it never lags more than
``LAG`` rows behind the leading one: a lane that would skips ahead. So a ring of ``RING`` rows in shared memory is
enough for any weight. Rows are ordered by their counts where that saves bytes: lanes of rows about equally long end
together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fasticl.bits import expand_bits, true_positions

if TYPE_CHECKING:
    from fasticl.formats import PackedWeight

DTYPES = (torch.bfloat16, torch.float16)
STRIP, CHUNK, LANES = 16, 64, 32  # outputs, columns, lanes
LAG, RING, QUAD = 28, 112, 4  # rows; they are copied by four
DEPTHS = (8, 4)  # chunks under way: the ring holds 4 of any weight, 8 where all chunks are sparse enough
WARP_BYTES, TABLE_BYTES = 18432, 128  # shared memory of a warp, and of a block besides
BLOCK_BYTES = 1024  # shared memory that CUDA takes of each block, and a multiprocessor has beyond a block's most
MAX_WARPS, MAX_BLOCKS = 8, 8  # warps a block, blocks that share a strip
WARPS = 12  # that a multiprocessor should have: how finely K is split
MIN_SHARE = 4  # chunks: those that a warp fetches ahead at least
PADDING = 0.37  # of a share of c chunks of density 1/2 over sqrt(c): the longest of 32 lanes is 2 sigma above the mean
MEETING = (
    20  # chunks that a multiprocessor decodes while blocks meet: 0.7 us for four trips to L2, computed for an H200
)
MIN_SAVED = 0.02  # of the rows of values, for which outputs are reordered and y is written in pieces
_SLAB = 1 << 20  # positions that are packed at a time: they stay in a core's cache, and memory is bounded


@dataclass(frozen=True)
class LaneStream:
    """A weight ``[N, K]`` in the lane-stream layout; see the module."""

    values: Tensor
    masks: Tensor
    starts: Tensor
    row_order: Tensor
    splits: int
    blocks: int  # that share a strip, splits / blocks warps each
    depth: int  # chunks that are fetched ahead

    @property
    def tensors(self) -> list[Tensor]:
        return [self.values, self.masks, self.starts, self.row_order]

    @property
    def plan(self) -> list[int]:
        return [self.splits, self.blocks, self.depth]


def to_lanes(
    packed: PackedWeight,
    splits: int | None = None,
    blocks: int = 1,
    *,
    multiprocessors: int = 132,
    shared_bytes: int = 232448,
) -> LaneStream:
    """The lane-stream layout of a weight in the portable form, on its device.

    Args:
        packed: of format bitmap, sliced or nm; bfloat16 or float16.
        splits: warps that share K; None chooses them, and the blocks, for a GPU of ``multiprocessors`` and
            ``shared_bytes`` a block (by default an H200's): :func:`choose_split`.
        blocks: 1 to 8 that they are in, 1 to 8 each.

    Raises:
        TypeError: the weight is of another dtype.
        ValueError: it is compact or too large, or splits or blocks are out of range.
    """
    if packed.values.dtype not in DTYPES:
        raise TypeError(f"lane streams: expected values of dtype bfloat16 or float16, got {packed.values.dtype}")
    if packed.format == "compact":
        raise ValueError("lane streams: expected format bitmap, sliced or nm, got compact")
    N, K = packed.shape
    strips, chunks = -(-N // STRIP), -(-K // CHUNK)
    if strips * chunks >= 2**27 or K >= 2**31:  # a chunk adds up to 16 rows, which are counted in int32
        raise ValueError(f"lane streams: expected K < 2**31 and fewer than 2**27 strips times chunks, got {N} x {K}")
    if splits is None:
        splits, blocks = choose_split(strips, chunks, multiprocessors, shared_bytes)
    if not 1 <= blocks <= MAX_BLOCKS:
        raise ValueError(f"lane streams: expected 1 to {MAX_BLOCKS} blocks, got {blocks}")
    most = blocks * _most_warps(shared_bytes)
    if not 1 <= splits <= most or splits % blocks:
        several = "" if blocks == 1 else f", divisible by the {blocks} blocks"
        raise ValueError(f"lane streams: expected 1 to {most} splits{several}, got {splits}")

    dense = packed.unpack().view(torch.int16)
    row_order, masks, counts, advance, starts = _lay_out(packed, splits)
    first_rows = torch.zeros(strips * chunks + 1, dtype=torch.int64, device=dense.device)
    torch.cumsum(advance.flatten(), 0, out=first_rows[1:])
    starts = starts + 2 * _share_rows(first_rows, strips, chunks, splits)[..., None]  # since the first row of all
    ends = first_rows[chunks * torch.arange(strips + 1, device=dense.device)].tolist()  # rows before each strip
    values = torch.zeros((ends[-1] + QUAD, LANES), dtype=torch.int32, device=dense.device)
    size = max(1, _SLAB // (STRIP * CHUNK * max(1, chunks)))
    for first in range(0, strips, size):
        some = slice(first, min(strips, first + size))
        rows = slice(ends[some.start], ends[some.stop])
        outputs = row_order[STRIP * some.start : STRIP * some.stop].clamp(min=0)  # of -1 nothing is kept
        elements = dense.index_select(0, outputs)
        if K % CHUNK:
            elements = pad(elements, (0, -K % CHUNK))
        _fill(values[rows], elements, masks[some], counts[some], starts[some] - 2 * rows.start)
    depth = next(depth for depth in DEPTHS if depth == DEPTHS[-1] or _fits(advance, splits, depth))
    return LaneStream(values, masks, first_rows.int(), row_order.int(), splits, blocks, depth)


def from_lanes(lanes: LaneStream, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """The dense ``[N, K]`` weight, decoded as the kernel does it: from starts, masks and streams alone."""
    strips, chunks, _ = lanes.masks.shape
    device = lanes.masks.device
    kept = (lanes.masks[..., None] >> torch.arange(32, device=device) & 1).bool()
    starts = _positions(kept.sum(-1), lanes.starts.long().diff().view(strips, chunks), lanes.splits)
    position = starts[..., None] + kept.cumsum(-1) - 1
    rows = _share_rows(lanes.starts.long(), strips, chunks, lanes.splits)[..., None, None] + position // 2
    lane = torch.arange(LANES, device=device)[:, None].expand_as(rows)
    halves = lanes.values.view(torch.int16).view(-1, LANES, 2)
    elements = torch.zeros_like(kept, dtype=torch.int16)
    elements[kept] = halves[rows[kept], lane[kept], (position % 2)[kept]]
    # [strip, chunk, g, t, step, half, column] -> [strip, half, g, chunk, t, step, column]
    by_rows = (
        elements.view(strips, chunks, 8, 4, 4, 2, 4)
        .permute(0, 5, 2, 1, 3, 4, 6)
        .reshape(strips * STRIP, chunks * CHUNK)
    )
    dense = torch.zeros((N, K), dtype=torch.int16, device=device)
    there = lanes.row_order >= 0
    dense[lanes.row_order[there].long()] = by_rows[there, :K]
    return dense.view(dtype)


def shares(chunks: int, splits: int) -> list[tuple[int, int]]:
    """First and last + 1 chunk of each share of K."""
    return [(chunks * i // splits, chunks * (i + 1) // splits) for i in range(splits)]


def choose_split(strips: int, chunks: int, multiprocessors: int, shared_bytes: int) -> tuple[int, int]:
    """``(splits, blocks)`` for a weight of ``strips`` times ``chunks``: those that take the least time by a model.

    The busiest multiprocessor has ``ceil(strips * blocks / multiprocessors)`` blocks, works on as many at a time as its
    shared memory holds, and decodes at full speed with ``WARPS`` warps, in proportion with fewer. Shorter shares have
    more padding (``PADDING``), and blocks that share a strip meet at their end (``MEETING``). Nothing
    but shapes and the GPU counts, so that a weight is split alike, and its sums are rounded alike, every time. The
    constants are computed, not measured.
    """
    best = (math.inf, 1, 1)
    for blocks in range(1, MAX_BLOCKS + 1):
        for warps in range(1, _most_warps(shared_bytes) + 1):
            splits = warps * blocks
            if splits > 1 and chunks < splits * MIN_SHARE:
                break
            resident = (shared_bytes + BLOCK_BYTES) // (TABLE_BYTES + warps * WARP_BYTES + BLOCK_BYTES)
            rounds, rest = divmod(-(-strips * blocks // multiprocessors), resident)
            turns = rounds * max(resident, WARPS / warps) + (max(rest, WARPS / warps) if rest else 0)
            padding = PADDING / math.sqrt(max(1, chunks) / splits)
            meetings = rounds + (rest > 0) if blocks > 1 else 0
            time = turns * chunks / blocks * (1 + padding) + MEETING * meetings
            best = min(best, (time, splits, blocks))
    return best[1:]


def _most_warps(shared_bytes: int) -> int:
    return min(MAX_WARPS, (shared_bytes - TABLE_BYTES) // WARP_BYTES)


def _lay_out(packed: PackedWeight, splits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The better order of rows; for it the masks, their bits' counts, and advance and starts of :func:`_positions`."""
    N, K = packed.shape
    strips, chunks = -(-N // STRIP), -(-K // CHUNK)
    bitmask = pad(packed.bitmask, (0, CHUNK // 8 * chunks - packed.bitmask.shape[1]))
    as_is = torch.full((strips * STRIP,), -1, dtype=torch.int64, device=bitmask.device)
    as_is[:N] = torch.arange(N, device=bitmask.device)
    by_count = as_is.clone()
    by_count[:N] = torch.argsort(packed.row_offsets.diff(), descending=True, stable=True)
    paired = by_count.view(strips, 2, 8)
    by_count = torch.stack((paired[:, 0], paired[:, 1].flip(1)), 1).flatten()  # a lane has a longer and a shorter row
    laid_out = []
    for order in (as_is, by_count):
        masks = _masks(bitmask, order)
        counts = _count_bits(masks)
        advance = counts.new_zeros(strips, chunks)
        laid_out.append((order, masks, counts, advance, _positions(counts, advance, splits, fill=True)))
    used = [int(advance.sum()) for _, _, _, advance, _ in laid_out]
    return laid_out[used[1] < (1 - MIN_SAVED) * used[0]]


def _masks(bitmask: Tensor, order: Tensor) -> Tensor:
    """The masks ``[strips, chunks, 32]`` of a bitmask ``[N, 8 chunks]`` whose rows are taken in that order."""
    strips, chunks = len(order) // STRIP, bitmask.shape[1] // 8
    rows = bitmask.index_select(0, order.clamp(min=0)).masked_fill(order[:, None] < 0, 0)
    low, high = rows.view(strips, 2, 8, chunks, 8).unbind(1)  # outputs g and g + 8; a byte holds two steps of each
    steps = torch.stack((low & 15 | high << 4, low >> 4 | high & 240), -1)  # [strip, g, chunk, byte, step]
    return steps.transpose(1, 2).reshape(strips, chunks, LANES * 4).view(torch.int32)


def _count_bits(masks: Tensor) -> Tensor:
    """Set bits of each word, int32."""
    pairs = masks - (masks >> 1 & 0x55555555)
    nibbles = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    return (nibbles + (nibbles >> 4) & 0x0F0F0F0F) * 0x01010101 >> 24


def _fill(values: Tensor, elements: Tensor, masks: Tensor, counts: Tensor, starts: Tensor) -> None:
    """Writes the rows of values of some strips, zero so far.

    ``elements`` int16 ``[16 strips, 64 chunks]`` are the strips' outputs, ``starts`` count from the first of the rows.
    """
    strips, chunks, _ = masks.shape
    # A quad of columns is an int64: [strip, half, g, chunk, t, step] -> [g, t, strip, chunk, step, half]
    quads = elements.flatten().view(torch.int64).view(strips, 2, 8, chunks, 4, 4).permute(2, 4, 0, 3, 5, 1)
    lane = torch.arange(LANES, device=values.device)
    counts, starts = (t.permute(2, 0, 1).flatten() for t in (counts, starts + 2 * len(values) * lane))
    # Values in the order of lane, strip, chunk, bit have the places of their streams but for what those skip.
    source = true_positions(expand_bits(masks.permute(2, 0, 1).reshape(1, -1).view(torch.uint8), elements.numel()))
    skipped = starts - counts.cumsum(0) + counts
    place = skipped.index_select(0, source >> 5) + torch.arange(len(source), device=values.device)
    streams = torch.zeros(2 * values.numel(), dtype=torch.int16, device=values.device)
    streams.index_copy_(0, place, quads.reshape(-1).view(torch.int16).index_select(0, source))
    values.copy_(streams.view(torch.int32).view(LANES, -1).T)


def _positions(counts: Tensor, advance: Tensor, splits: int, fill: bool = False) -> Tensor:
    """Positions ``[strips, chunks, 32]``, in values since the share began, of the streams where a chunk begins.

    ``counts [strips, chunks, 32]`` are the values of the lanes, ``advance [strips, chunks]`` the rows that the leading
    lane adds; with ``fill`` it is written, else read.
    """
    starts = torch.zeros_like(counts)
    for first, last in shares(counts.shape[1], splits):
        position = counts.new_zeros(counts.shape[0], LANES)
        ahead = torch.zeros_like(advance[:, :1])  # the row that no lane has reached
        for chunk in range(first, last):
            position = torch.maximum(position, 2 * (ahead - LAG))
            starts[:, chunk] = position
            position = position + counts[:, chunk]
            if fill:
                reached = (position.amax(1, keepdim=True) + 1) // 2
                advance[:, chunk, None] = (reached - ahead).clamp(min=0)
            ahead = ahead + advance[:, chunk, None]
    return starts


def _share_rows(first_rows: Tensor, strips: int, chunks: int, splits: int) -> Tensor:
    """The row of values ``[strips, chunks]`` at which the share of a chunk begins."""
    begin = torch.zeros(chunks, dtype=torch.int64, device=first_rows.device)
    for first, last in shares(chunks, splits):
        begin[first:last] = first
    return first_rows[:-1].view(strips, chunks)[:, begin]


def _fits(advance: Tensor, splits: int, depth: int) -> bool:
    """Whether the ring holds, while a chunk is decoded, the lag, that chunk and ``depth`` more, and a quad's rest."""
    for first, last in shares(advance.shape[1], splits):
        ahead = pad(advance[:, first:last].cumsum(1), (1, 0))  # rows before each chunk
        latest = torch.arange(depth + 1, depth + 1 + last - first, device=advance.device).clamp(max=last - first)
        oldest = (ahead[:, :-1] - LAG).clamp(min=0)
        if (ahead[:, latest] - oldest + QUAD - 1 > RING).any():
            return False
    return True
