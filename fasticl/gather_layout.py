"""The gather layout: a weight of few non-zeros as a list for each lane of a GPU (csrc/sliced_linear_cuda.cu).

Four rows are a group, and a warp's lane ``l = 8 r + c`` has the columns ``8 j + c`` of its row r: sliced ELLPACK whose
rows are cut in eight. K is cut into ``shares`` of whole eights of columns, :func:`share_bounds`. A lane's list, of a
group and share, names its values by ascending column: each as the step from the last one's j, which begins at the
share's first. A step is 5 bits; where it is greater than 31, entries of value 0 and step 31 go before. Six entries are
a word of steps and three of values, 16 bytes; the lists of a warp are as long as the longest, at least one such record,
and filled with entries of value 0 and step 0.

    records    int32 [records, 32, 4], of lane l: words 0 to 2 the values of entries 0 to 5, two to a word, the first in
               the lower half; word 3 their steps, that of entry e in bits 5 e to 5 e + 4
    starts     int32 [shares * groups + 1]; the first record of a group in a share
    row_order  int32 [groups * 4]; the row of W that a row of a group is, -1 for none

Rows are ordered by the length of their lists, so that four of about equal length are a group, and groups are dealt out
to the ``blocks * warps`` warps that work on a share, each of which has consecutive ones, :func:`dealt`.

Bytes. A value takes 16 / 6 = 2.67; what fills lists up depends on the spread of their lengths. For random masks,
computed: K = 4096 at density 0.2 3.1 bytes a value in all, at 0.1 3.4; K = 14336 2.9 and 3.1. Steps of 4 bits, eight to
20 bytes, would take 3.0 and 3.8, 2.8 and 3.5: gaps beyond 15 are a fifth of all at density 0.1, beyond 31 a thirtieth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fasticl.bits import true_positions

if TYPE_CHECKING:
    from fasticl.formats import PackedWeight

DTYPES = (torch.bfloat16, torch.float16)
GROUP, CLASSES, LANES = 4, 8, 32  # rows; columns of different remainders, each a lane's; lanes
ENTRIES, STEP_BITS = 6, 5  # of a record of a lane; of an entry
MAX_STEP = 2**STEP_BITS - 1
EIGHT_BYTES = 128  # of shared memory for eight columns of x
MAX_TOKENS = 8  # that the kernel takes
MAX_WARPS, MAX_SHARES = 16, 32  # warps a block, shares of K
WARPS = 6  # that a multiprocessor should have: 24 KiB under way, 0.7 us of its share of 4.3 TB/s
MIN_SHARE = 128  # eights of columns: shorter lists differ too much in length
MAX_DENSITY = 0.25  # from which on the lane stream is faster, computed: csrc/sliced_linear_cuda.cu
MAX_EIGHTS = 2**31  # of columns, in all rows: records are counted in int32
_SLAB = 1 << 20  # positions that are packed at a time: memory is bounded


@dataclass(frozen=True)
class GatherLayout:
    """A weight ``[N, K]`` in the gather layout; see the module."""

    records: Tensor
    starts: Tensor
    row_order: Tensor
    shares: int
    blocks: int  # that work on a share
    warps: int  # of a block

    @property
    def tensors(self) -> list[Tensor]:
        return [self.records, self.starts, self.row_order]

    @property
    def plan(self) -> list[int]:
        return [self.shares, self.blocks, self.warps]


def to_gather(
    packed: PackedWeight,
    plan: tuple[int, int, int] | None = None,
    *,
    multiprocessors: int = 132,
    shared_bytes: int = 232448,
) -> GatherLayout:
    """The gather layout of a weight in the portable form, on its device.

    Args:
        packed: of format bitmap, sliced or nm; bfloat16 or float16.
        plan: shares, blocks and warps; None chooses them for a GPU of ``multiprocessors`` and ``shared_bytes`` a block
            (by default an H200's): :func:`choose_plan`.

    Raises:
        TypeError: the weight is of another dtype.
        ValueError: it is compact or too large, or the plan is out of range.
    """
    if packed.values.dtype not in DTYPES:
        raise TypeError(f"gather layout: expected values of dtype bfloat16 or float16, got {packed.values.dtype}")
    if packed.format == "compact":
        raise ValueError("gather layout: expected format bitmap, sliced or nm, got compact")
    N, K = packed.shape
    groups, eights = -(-N // GROUP), -(-K // CLASSES)
    if N * max(1, eights) >= MAX_EIGHTS:
        raise ValueError(f"gather layout: expected fewer than 2**34 positions and 2**31 rows, got {N} x {K}")
    plan = choose_plan(groups, eights, multiprocessors, shared_bytes) if plan is None else plan
    shares, blocks, warps = plan
    if not (1 <= shares <= MAX_SHARES and blocks >= 1 and 1 <= warps <= MAX_WARPS):
        expected = f"1 to {MAX_SHARES} shares, 1 or more blocks and 1 to {MAX_WARPS} warps"
        raise ValueError(f"gather layout: expected {expected}, got {shares}, {blocks} and {warps}")

    device = packed.device
    bounds = torch.tensor(share_bounds(eights, shares), device=device)
    keep, dense = packed.keep, packed.unpack().view(torch.int16)
    rows_at_once = max(1, _SLAB // max(1, eights * CLASSES))
    slabs = [slice(first, first + rows_at_once) for first in range(0, N, rows_at_once)]
    pieces = [_records(keep[some], dense[some], bounds) for some in slabs]
    counts = torch.cat([torch.zeros((0, shares), dtype=torch.int64, device=device), *(count for count, _ in pieces)])

    row_order = torch.full((groups * GROUP,), -1, dtype=torch.int64, device=device)
    row_order[:N] = torch.argsort(counts.sum(1), descending=True, stable=True)
    row_order = row_order.view(groups, GROUP)[dealt(groups, blocks * warps).to(device)].flatten()
    there = (row_order >= 0).nonzero().squeeze(1)
    place = torch.empty(N, dtype=torch.int64, device=device)  # of a row in the order
    place[row_order[there]] = there
    longest = pad(counts, (0, 0, 0, 1))[row_order].view(groups, GROUP, shares).amax(1)  # of -1: the row of zeros
    starts = torch.zeros(shares * groups + 1, dtype=torch.int64, device=device)
    torch.cumsum(longest.T.flatten(), 0, out=starts[1:])
    records = torch.zeros((int(starts[-1]) * GROUP, CLASSES * 4), dtype=torch.int32, device=device)
    begin = starts[:-1].view(shares, groups).T[place // GROUP] * GROUP + (place % GROUP)[:, None]  # [N, shares]
    for some, (count, piece) in zip(slabs, pieces, strict=True):
        ends = count.flatten().cumsum(0)
        index = GROUP * torch.arange(len(piece), device=device)  # a record of a row's eight lanes after the other
        index += torch.repeat_interleave(begin[some].flatten() - GROUP * (ends - count.flatten()), count.flatten())
        records.index_copy_(0, index, piece)
    return GatherLayout(records.view(-1, LANES, 4), starts.int(), row_order.int(), shares, blocks, warps)


def takes(packed: PackedWeight, shared_bytes: int) -> bool:
    """Whether the kernel is the one for a bitmap or sliced weight: of density below ``MAX_DENSITY``, not too large."""
    N, eights = packed.shape[0], -(-packed.shape[1] // CLASSES)
    fits = N * eights < MAX_EIGHTS and eights <= MAX_SHARES * (shared_bytes // EIGHT_BYTES)
    return fits and packed.density < MAX_DENSITY


def from_gather(layout: GatherLayout, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """The dense ``[N, K]`` weight, decoded as the kernel does it: from starts, steps and values alone."""
    device, groups = layout.records.device, len(layout.row_order) // GROUP
    steps = layout.records[..., 3, None] >> STEP_BITS * torch.arange(ENTRIES, device=device) & MAX_STEP
    values = layout.records.view(torch.int16).view(-1, LANES, 8)[..., :ENTRIES]
    j = steps.permute(1, 0, 2).flatten(1).cumsum(1).view(LANES, -1, ENTRIES).permute(1, 0, 2)  # [record, lane, entry]
    starts = layout.starts.long()
    before = pad(j[:, :, -1], (0, 0, 1, 0))[starts[:-1]]
    bounds = torch.tensor(share_bounds(-(-K // CLASSES), layout.shares), device=device)
    begin = torch.repeat_interleave(bounds[:-1], groups)[:, None] - before  # [list, lane]
    lists = torch.repeat_interleave(torch.arange(len(begin), device=device), starts.diff())
    lane = torch.arange(LANES, device=device)[:, None]
    columns = (j + begin[lists][..., None]) * CLASSES + lane % CLASSES
    rows = layout.row_order.long()[(lists % max(1, groups))[:, None, None] * GROUP + lane // CLASSES].expand_as(columns)
    stored = values != 0
    dense = torch.zeros((N, K), dtype=torch.int16, device=device)
    dense[rows[stored], columns[stored]] = values[stored]
    return dense.view(dtype)


def share_bounds(eights: int, shares: int) -> list[int]:
    """The first eight columns of each share, and behind the last one's."""
    return [eights * i // shares for i in range(shares + 1)]


def dealt(groups: int, workers: int) -> Tensor:
    """Which group, counted from the longest, stands at each place, int64 ``[groups]``.

    Worker v has the places ``groups * v // workers`` on to the next one's; the workers take groups by turns.
    """
    first = groups * torch.arange(workers + 1) // workers
    worker = torch.repeat_interleave(torch.arange(workers), first.diff())
    turn = torch.arange(groups) - first[worker]
    order = torch.empty(groups, dtype=torch.int64)
    order[torch.argsort(turn * workers + worker)] = torch.arange(groups)
    return order


def choose_plan(groups: int, eights: int, multiprocessors: int, shared_bytes: int) -> tuple[int, int, int]:
    """``(shares, blocks, warps)`` for a weight of so many groups and eights of columns.

    A block holds a share of x in shared memory, which says how few shares there may be; there are more where groups
    alone would leave a multiprocessor fewer than ``WARPS``. All blocks run at once, one a multiprocessor. Nothing but
    shapes and the GPU counts, so that sums are rounded alike every time.

    Raises:
        ValueError: more than ``MAX_SHARES`` would be needed.
    """
    shares = max(1, -(-eights // (shared_bytes // EIGHT_BYTES)))
    if shares > MAX_SHARES:
        expected = f"at most {MAX_SHARES} shares of x of {shared_bytes} bytes"
        raise ValueError(f"gather layout: expected {expected}, got {eights * CLASSES} columns of 16 bytes")
    while groups * shares < WARPS * multiprocessors and eights >= MIN_SHARE * (shares + 1) and shares < MAX_SHARES:
        shares += 1
    blocks = max(1, min(groups, multiprocessors // shares))
    each = max(1, -(-groups // blocks))
    return shares, blocks, -(-each // -(-each // MAX_WARPS))


def _by_classes(t: Tensor) -> Tensor:
    """``[n, K]`` as ``[n, 8, ceil(K / 8)]``, columns of one remainder side by side."""
    if t.shape[1] % CLASSES:
        t = pad(t, (0, -t.shape[1] % CLASSES))
    return t.view(t.shape[0], -1, CLASSES).transpose(1, 2).contiguous()


def _records(keep: Tensor, dense: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The records of some rows, by row, share and place: how many ``[rows, shares]``, and int32 ``[records, 32]``, four
    words for each of a row's eight lanes.
    """
    flags, device = _by_classes(keep), keep.device
    rows, _, eights = flags.shape
    shares = len(bounds) - 1
    source = true_positions(flags)
    values = _by_classes(dense).flatten().index_select(0, source)
    begin = (torch.arange(rows * CLASSES, device=device)[:, None] * eights + bounds[:-1]).flatten()  # of the lists
    offsets = torch.searchsorted(source, torch.cat((begin, begin.new_tensor([flags.numel()]))))
    lengths = offsets.diff()
    gaps = source.diff(prepend=source.new_zeros(1)).int()
    some = lengths.nonzero().squeeze(1)
    gaps[offsets[some]] = (source[offsets[some]] - begin[some]).int()
    if bool((gaps > MAX_STEP).any()):  # entries of value 0 go before
        more = gaps.sub(1).clamp_(min=0).div_(MAX_STEP, rounding_mode="floor")
        ends = pad(more.cumsum(0), (1, 0))
        lengths = lengths + ends[offsets].diff()
        index = torch.arange(len(source), device=device) + ends[1:]
        sizes = int(lengths.sum())
        values = values.new_zeros(sizes).index_copy_(0, index, values)
        gaps = gaps.new_full((sizes,), MAX_STEP).index_copy_(0, index, gaps - MAX_STEP * more)
    lengths = lengths.view(rows, CLASSES, shares)
    count = (-(-lengths.amax(1) // ENTRIES)).clamp(min=1)
    most = int(count.max())
    there = torch.arange(most * ENTRIES, device=device) < lengths[..., None]
    held = torch.zeros(there.shape, dtype=torch.int16, device=device).masked_scatter_(there, values)
    steps = torch.zeros(there.shape, dtype=torch.uint8, device=device).masked_scatter_(there, gaps.to(torch.uint8))
    halves = torch.zeros((rows, shares, most, CLASSES, 8), dtype=torch.int16, device=device)
    halves[..., :ENTRIES] = held.view(rows, CLASSES, shares, most, ENTRIES).permute(0, 2, 3, 1, 4)
    words = halves.view(torch.int32)
    steps = steps.view(rows, CLASSES, shares, most, ENTRIES)
    packed_steps = steps[..., 0].int()
    for e in range(1, ENTRIES):
        packed_steps |= steps[..., e].int() << STEP_BITS * e
    words[..., 3] = packed_steps.permute(0, 2, 3, 1)
    return count, words.flatten(3)[torch.arange(most, device=device) < count[..., None]]
