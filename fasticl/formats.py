"""Storage of pruned weights.

The *portable* form is a bitmask and the stored values by rows, the tensors of compressed-tensors' ``sparse-bitmask``:

    bitmask      uint8 [N, ceil(K / 8)]; bit k % 8 of bitmask[n, k // 8] says that W[n, k] is stored; tail bits are 0
    values       [nnz] in the weight's dtype, row by row; or int8
    scales       [N] in the weight's dtype, of int8 values only: row n is scales[n] times its values
    row_offsets  int64 [N + 1]; row n is values[row_offsets[n] : row_offsets[n + 1]]

On the CPU the row kernels run on this form as it is: it streams a row's values once and needs a bit per position,
``4 d + 1/8`` bytes for float32 at density ``d``, and one copy serves one token and a thousand. On a GPU a weight is
held in the order of its kernels too, ``PackedWeight.layouts`` (fasticl/device_layouts.py): a bitmap weight in that of
the tensor cores, a bitmap or sliced weight of density below 1/4 as lists for up to eight tokens, and a 2:4 weight in
the order of the sparse tensor cores, and where the GPU's table says so in cuSPARSELt's. Formats:

    bitmap   any zeros
    nm       exactly n values in every m consecutive columns; zeros are stored where a group has fewer
    sliced   bitmap and, derived from it, a list of indexed values for one to eight tokens; pays above about 75 % zeros
    compact  whole rows or columns are gone: the dense rest and which ones it kept
    dense    every element, as int8 values [N, K] and no bitmask
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fasticl import _C
from fasticl.bits import count_bits, expand_bits, pack_bits, true_positions
from fasticl.device_layouts import DeviceLayouts

FORMATS = ("auto", "bitmap", "sliced", "nm", "compact", "dense")
VALUES = (None, "int8")  # how values are stored: in the weight's dtype, or quantized
PATTERNS = ("2:4", "4:8", "8:16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SLICED_MIN_SPARSITY = 0.8  # "auto" derives the sliced layout from here on
SLICED_MAX_K = 65535  # its windows start at 16-bit columns
STEP_BYTES = 20  # lane mask (2), window (2), an index a lane (16)
NM_MIN_DENSITY = 0.45  # "auto" takes an n:m pattern from here on: a sparser weight may fit one by chance
BITMAP_MAX_DENSITY = 7 / 8  # of int8 values: beyond, a bitmask is larger than the zeros that it spares
COMPACT_MIN_FILL = 0.9  # "auto" takes compact if so many of the rest's elements are not zero
# Elements are tested, copied and compared as integers: -0.0 is no zero then, and a NaN keeps its payload.
_INTEGERS = {
    torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class SlicedLayout:
    """One non-zero a row and step, for slices of 16 rows (csrc/sliced_linear_cpu.cpp).

    values: the stored values, step by step; steps: uint8 [steps, 20]; slice_offsets: int64 [slices + 1, 2], first step
    and first value; row_order: int32 [ceil(N / 16) * 16], -1 for none.
    """

    values: Tensor
    steps: Tensor
    slice_offsets: Tensor
    row_order: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [self.values, self.steps, self.slice_offsets, self.row_order]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A pruned weight ``[N, K]``; made by :func:`pack`, read by the ops. Immutable; ``.to`` returns another one.

    ``compact`` keeps ``values`` as the dense ``[len(rows), len(columns)]`` rest and ``dense`` as ``[N, K]``, both
    without a bitmask; the other formats keep the portable form.
    """

    format: str
    shape: tuple[int, int]
    values: Tensor
    bitmask: Tensor
    row_offsets: Tensor
    pattern: str | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    sliced: SlicedLayout | None = None
    scales: Tensor | None = None  # of int8 values
    layouts: DeviceLayouts | None = None  # of its GPU's kernels

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, and of the x that it multiplies; int8 values have it in their scales."""
        return (self.values if self.scales is None else self.scales).dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def density(self) -> float:
        """Stored values over positions; explicit zeros count as stored."""
        return self.values.numel() / max(1, self.shape[0] * self.shape[1])

    @property
    def bytes(self) -> int:
        """Memory held, in bytes: the portable form and what was derived from it."""
        return _bytes(self._tensors())

    @property
    def bytes_read(self) -> int:
        """What one product with one token reads of the weight, in bytes: the numerator of the roofline."""
        layouts = self.layouts or DeviceLayouts()
        if (first := layouts.gather or layouts.lanes) is not None:
            return _bytes(first.tensors)
        if layouts.fragments is not None:
            return _bytes([layouts.fragments])
        scales = [] if self.scales is None else [self.scales]
        if self.sliced is not None:
            return _bytes([*self.sliced.tensors, *scales])
        if self.format == "nm":  # rows are equally long
            return _bytes([self.values, self.bitmask, *scales])
        return self.bytes

    @property
    def dense_bytes(self) -> int:
        """What the dense weight would take, in bytes."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def _tensors(self) -> list[Tensor]:
        own = [self.values, self.scales, self.bitmask, self.row_offsets, self.rows, self.columns]
        derived = self.sliced.tensors if self.sliced is not None else []
        derived += self.layouts.tensors if self.layouts is not None else []
        return [t for t in own + derived if t is not None]

    def __repr__(self) -> str:
        pattern = f", pattern={self.pattern!r}" if self.pattern else ""
        values = "" if self.scales is None else ", values='int8'"
        return (
            f"PackedWeight(format={self.format!r}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"density={self.density:.3f}, bytes={self.bytes}{pattern}{values})"
        )

    @property
    def keep(self) -> Tensor:
        """Where a value is stored: bool ``[N, K]``; not of a compact or dense weight."""
        return expand_bits(self.bitmask, self.shape[1])

    def unpack(self) -> Tensor:
        """The dense ``[N, K]`` weight, bit for bit what was packed.

        Of int8 values ``values * scales``, rounded to :attr:`dtype`; the ops multiply by the unrounded product.
        """
        if self.scales is not None:
            wide = torch.promote_types(self.dtype, torch.float32)
            return (self.unpack_values().to(wide) * self.scales.to(wide)[:, None]).to(self.dtype)
        return self.unpack_values()

    def unpack_values(self) -> Tensor:
        """``values`` in their places, ``[N, K]`` in their own dtype; scales are not applied."""
        if self.format == "dense":
            return self.values.clone()
        dense = torch.zeros(self.shape, dtype=self.values.dtype, device=self.device)
        if self.format == "compact":
            assert self.rows is not None
            assert self.columns is not None
            dense[self.rows[:, None], self.columns] = self.values
        else:
            _as_integers(dense).view(-1).index_copy_(0, true_positions(self.keep), _as_integers(self.values))
        return dense

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""

        def moved(fields: dict[str, Any]) -> dict[str, Any]:
            return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in fields.items()}

        sliced = None if self.sliced is None else SlicedLayout(**moved(vars(self.sliced)))
        return _with_layouts(PackedWeight(**moved({**vars(self), "sliced": sliced, "layouts": None})))

    def index_select(self, dim: int, index: Tensor) -> PackedWeight:
        """Some rows (``dim`` 0) or columns (1): what unpacks to ``unpack().index_select(dim, index)``, bit for bit.

        Of the same format, except that n:m columns among which a group no longer has n values become a bitmap. Stored
        values are copied as they are: int8 values keep the scales of their rows.

        Args:
            index: int64, ascending.

        Raises:
            ValueError: ``dim`` or ``index`` is out of range, or not ascending.
        """
        _expect(dim in (0, 1), "dim", "0 or 1", dim)
        index = _check_ascending("index", index.to(self.device), self.shape[dim])
        N, K = (index.numel(), self.shape[1]) if dim == 0 else (self.shape[0], index.numel())
        inside = torch.zeros(self.shape[dim], dtype=torch.bool, device=self.device)
        inside[index] = True
        scales = self.scales[index] if dim == 0 and self.scales is not None else self.scales
        if self.format == "dense":
            values = self.values.index_select(dim, index)
            return dataclasses.replace(self, shape=(N, K), values=values, scales=scales)
        if self.format == "compact":
            name = ("rows", "columns")[dim]
            kept: Tensor = getattr(self, name)
            chosen = inside[kept].nonzero().squeeze(1)
            places = torch.searchsorted(index, kept[chosen])
            values = self.values.index_select(dim, chosen)
            return dataclasses.replace(self, shape=(N, K), values=values, **{name: places})  # type: ignore[arg-type]
        format, pattern = self.format, self.pattern
        if dim == 0:
            bitmask, chosen = self.bitmask[index], inside.repeat_interleave(self.row_offsets.diff())
        else:
            keep = self.keep
            chosen, keep = inside.expand_as(keep)[keep], keep[:, index]
            bitmask = pack_bits(keep)
            if pattern is not None and not _has_pattern(keep, pattern):
                format, pattern = "bitmap", None
        row_offsets = torch.zeros(N + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(count_bits(bitmask), 0, out=row_offsets[1:])
        return from_portable(format, (N, K), self.values[chosen], bitmask, row_offsets, pattern, scales)

    def validate(self) -> PackedWeight:
        """Checks everything that a kernel relies on; returns self.

        Raises:
            ValueError: naming the tensor, what was expected and what was found.
        """
        N, K = self.shape
        _expect(self.format in FORMATS[1:], "format", f"one of {', '.join(FORMATS[1:])}", repr(self.format))
        _expect(N >= 0 and K >= 0, "shape", "sizes >= 0", [N, K])
        _expect(self.dtype in DTYPES, "values", f"dtype {_names(DTYPES)}", self.dtype)
        if self.scales is not None:
            _expect(self.values.dtype == torch.int8, "values", "torch.int8 with scales", self.values.dtype)
            _expect_tensor("scales", self.scales, self.dtype, [N])
        for tensor in self._tensors():
            _expect(tensor.is_contiguous(), "tensors", "contiguous", f"strides {tensor.stride()}")
            _expect(tensor.device == self.device, "tensors", f"all on {self.device}", tensor.device)
        if self.format == "compact":
            _expect(self.scales is None, "scales", "None with format compact", "a tensor")
            self._validate_compact()
            return self
        if self.format == "dense":
            _expect(self.scales is not None, "scales", "a tensor with format dense", None)
            _expect_tensor("values", self.values, torch.int8, [N, K])
            return self
        self._validate_portable()
        if self.format == "nm":
            self._validate_groups()
        if self.format == "sliced":
            self._validate_sliced()
        if self.layouts is not None:
            held, rebuilt = self.layouts.parts, self.layouts.anew(self).parts
            if "compressed" in held:  # its bytes are the library's, and some of them nobody's
                expected = rebuilt.pop("compressed")
                _expect_tensor("compressed", held["compressed"], expected.dtype, list(expected.shape))
            self._validate_derived("", held, rebuilt)
        return self

    def _validate_compact(self) -> None:
        sizes = []
        for name, kept, size in (("rows", self.rows, self.shape[0]), ("columns", self.columns, self.shape[1])):
            sizes.append(_check_ascending(name, kept, size).numel())
        _expect_tensor("values", self.values, self.dtype, sizes)

    def _validate_portable(self) -> None:
        N, K = self.shape
        _expect_tensor("bitmask", self.bitmask, torch.uint8, [N, -(-K // 8)])
        _expect_tensor("row_offsets", self.row_offsets, torch.int64, [N + 1])
        if K % 8 and N:
            tail = (self.bitmask[:, -1] >> (K % 8)).nonzero()
            if tail.numel():
                _fail(f"bitmask[{int(tail[0])}]", f"no bits at columns >= {K}", "some")
        offsets = torch.zeros_like(self.row_offsets)
        torch.cumsum(count_bits(self.bitmask), 0, out=offsets[1:])
        wrong = (offsets != self.row_offsets).nonzero()
        if wrong.numel():
            n = int(wrong[0])
            _fail(f"row_offsets[{n}]", f"{int(offsets[n])} (bits before it)", int(self.row_offsets[n]))
        _expect_tensor("values", self.values, self.values.dtype, [int(offsets[-1])])  # a value for each bit

    def _validate_groups(self) -> None:
        N, K = self.shape
        if self.pattern not in PATTERNS:
            _fail("pattern", f"one of {', '.join(PATTERNS)}", repr(self.pattern))
        n, m = _nm(self.pattern)
        _expect(K % m == 0, "shape", f"columns divisible by {m}", K)
        counts = expand_bits(self.bitmask, K).view(N, K // m, m).sum(-1)
        wrong = (counts != n).nonzero()
        if wrong.numel():
            row, group = wrong[0].tolist()
            where = f"bitmask[{row}], columns {group * m} to {group * m + m - 1}"
            _fail(where, f"{n} bits ({self.pattern})", int(counts[row, group]))

    def _validate_sliced(self) -> None:
        if self.sliced is None:
            _fail("sliced", "the derived layout", None)
        rebuilt = _slice(self.values, self.bitmask, self.row_offsets, self.shape[1])
        self._validate_derived("sliced.", vars(self.sliced), vars(rebuilt))

    @staticmethod
    def _validate_derived(prefix: str, held: dict[str, Any], rebuilt: dict[str, Any]) -> None:
        for name, expected in rebuilt.items():
            what, found = prefix + name, held[name]
            if not isinstance(expected, Tensor):
                _expect(found == expected, what, expected, found)
                continue
            _expect_tensor(what, found, expected.dtype, list(expected.shape))
            wrong = (_as_integers(found) != _as_integers(expected)).flatten().nonzero()
            if wrong.numel():
                _fail(what, "what the portable form gives", f"another value at flat index {int(wrong[0])}")


def pack(
    weight: Tensor, format: str = "auto", *, pattern: str | None = None, values: str | None = None
) -> PackedWeight:
    """Stores a pruned weight without its zeros.

    Args:
        weight: ``[N, K]``, float32, bfloat16, float16 or float64, any strides. Elements whose bits are all zero are
            dropped; -0.0, denormals, NaN and infinities are kept, and ``pack(w).unpack()`` is ``w`` bit for bit. Masks
            are therefore applied by ``w.masked_fill(~mask, 0)``: ``w * mask`` leaves -0.0 where w was negative.
        format: ``"bitmap"``, ``"sliced"``, ``"nm"``, ``"compact"`` (see the module), or ``"auto"``: ``compact`` if
            whole rows or columns are zero and 90 % of the rest is not, ``nm`` if a pattern holds and 45 % are not zero,
            ``sliced`` from 80 % zeros on, else ``bitmap``. With int8 values ``"dense"`` is one too, and takes the place
            of ``compact``: auto chooses it where fewer than an eighth are zero.
        pattern: ``"2:4"``, ``"4:8"`` or ``"8:16"``, for ``format="nm"`` only; None takes the first that holds.
        values: None, or ``"int8"``: row n of W becomes ``s_n q``, the integers q in [-127, 127] and ``s_n`` the row's
            largest magnitude over 127, rounded to the weight's dtype; ``|W - s_n q| <= s_n / 2``. What is stored does
            not change: q may be 0. Activations are not quantized.

    Raises:
        TypeError: ``weight`` is no dense tensor of those dtypes.
        ValueError: it is no matrix, the format is unknown or not for these values, the weight does not have the
            pattern, or it is to become int8 and not finite.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a torch.Tensor, got {type(weight).__name__}")
    if weight.layout != torch.strided:
        raise TypeError(f"weight: expected a dense (torch.strided) tensor, got {weight.layout}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight: expected dtype {_names(DTYPES)}, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [N, K], got {list(weight.shape)}")
    check_format(format, values)
    if pattern is not None and (format != "nm" or pattern not in PATTERNS):
        expected = f"one of {', '.join(PATTERNS)} with format 'nm'"
        raise ValueError(f"pattern: expected {expected}, got {pattern!r} with {format!r}")
    weight = weight.detach().contiguous()
    keep = _as_integers(weight) != 0
    scales = None

    if format == "auto":
        format = _choose(keep, values)
    if format == "compact":
        return _pack_compact(weight, keep)
    if values == "int8":
        weight, scales = quantize(weight)
    if format == "dense":
        assert scales is not None  # check_format lets no others through
        return from_dense(weight, scales)
    if format == "nm":
        pattern = pattern or _find_pattern(keep)
        if pattern is None:
            raise ValueError(f"weight: expected one of the patterns {', '.join(PATTERNS)}, got none of them")
        keep = _complete_groups(keep, pattern)
    N, K = weight.shape
    stored = _select(weight, keep)
    bitmask = pack_bits(keep)
    row_offsets = torch.zeros(N + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(count_bits(bitmask), 0, out=row_offsets[1:])
    sliced = _slice(stored, bitmask, row_offsets, K) if format == "sliced" else None
    return _with_layouts(
        PackedWeight(format, (N, K), stored, bitmask, row_offsets, pattern=pattern, sliced=sliced, scales=scales)
    )


def check_format(format: str, values: str | None) -> None:
    """Raises ValueError unless :func:`pack` knows the format and can store such values in it."""
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if values not in VALUES:
        raise ValueError(f"values: expected None or 'int8', got {values!r}")
    if (format, values) in (("dense", None), ("compact", "int8")):
        raise ValueError(f"format: expected 'dense' for int8 values only, 'compact' for others, got {format!r}")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q int8 ``[N, K]`` and s ``[N]`` in the weight's dtype, so that ``|weight[n] - s[n] q[n]| <= s[n] / 2``.

    ``s[n]`` is the row's largest magnitude over 127, rounded to the dtype before q is found; 1 where that is 0.

    Raises:
        ValueError: an element is NaN or infinite.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    if not bool(largest.isfinite().all()):
        n = int(largest.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"weight: expected finite elements for int8 values, got {float(largest[n])} in row {n}")
    scales = (largest / 127).to(weight.dtype)
    # Rounded down, a scale of few bits may leave the largest element beyond 127.5: the next number up is taken then.
    scales.view(_INTEGERS[scales.dtype]).add_(largest / scales.to(wide.dtype) > 127.5)
    scales.masked_fill_(largest == 0, 1)
    return (wide / scales.to(wide.dtype)[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def from_portable(
    format: str,
    shape: tuple[int, int],
    values: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor,
    pattern: str | None = None,
    scales: Tensor | None = None,
) -> PackedWeight:
    """The packed weight of tensors stored in the portable form: validates them and derives what the format needs.

    Raises:
        ValueError: the format is not bitmap, sliced or nm, a pattern is given for another format than nm, or the
            tensors are not a portable form of that shape.
    """
    if format not in ("bitmap", "sliced", "nm"):
        raise ValueError(f"format: expected 'bitmap', 'sliced' or 'nm', got {format!r}")
    if pattern is not None and format != "nm":
        raise ValueError(f"pattern: expected None with format {format!r}, got {pattern!r}")
    N, K = shape
    packed = PackedWeight("bitmap", (N, K), values, bitmask, row_offsets, scales=scales)
    packed.validate()  # before any of it is used
    if format == "nm":
        return _with_layouts(dataclasses.replace(packed, format=format, pattern=pattern).validate())
    if format == "sliced":
        sliced = _slice(values, bitmask, row_offsets, K)
        return _with_layouts(dataclasses.replace(packed, format=format, sliced=sliced))
    return _with_layouts(packed)


def from_dense(values: Tensor, scales: Tensor) -> PackedWeight:
    """The weight of format dense with these int8 values ``[N, K]`` and scales ``[N]``, which it validates."""
    empty = torch.empty(0, dtype=torch.uint8, device=values.device)
    shape = (values.shape[0], values.shape[1])
    return PackedWeight("dense", shape, values, empty, empty.long(), scales=scales).validate()


def _select(weight: Tensor, keep: Tensor) -> Tensor:
    if weight.device.type != "cpu":
        return weight.masked_select(keep)
    # A third of masked_select's time. As integers: numpy has no bfloat16.
    integers = _as_integers(weight).numpy()
    return torch.from_numpy(np.compress(keep.numpy().ravel(), integers.ravel())).view(weight.dtype)


def _nm(pattern: str) -> tuple[int, int]:
    n, m = pattern.split(":")
    return int(n), int(m)


def _find_pattern(keep: Tensor) -> str | None:
    N, K = keep.shape
    for pattern in PATTERNS:
        n, m = _nm(pattern)
        if K % m == 0 and bool((keep.view(N, K // m, m).sum(-1, dtype=torch.uint8) <= n).all()):
            return pattern
    return None


def _has_pattern(keep: Tensor, pattern: str) -> bool:
    """Whether each group of m columns has n values."""
    n, m = _nm(pattern)
    N, K = keep.shape
    return K % m == 0 and bool((keep.view(N, K // m, m).sum(-1) == n).all())


def _complete_groups(keep: Tensor, pattern: str) -> Tensor:
    """``keep`` with the first unset columns of each group added until every group of m has n."""
    n, m = _nm(pattern)
    N, K = keep.shape
    if K % m:
        raise ValueError(f"weight: expected columns divisible by {m} for {pattern}, got {K}")
    groups = keep.reshape(-1, m)
    counts = groups.sum(1, dtype=torch.uint8)
    most = int(counts.max()) if counts.numel() else 0
    if most > n:
        raise ValueError(f"weight: expected at most {n} of every {m} columns for {pattern}, got {most}")
    short = (counts < n).nonzero().squeeze(1)
    if short.numel():
        groups = groups.clone()
        free = ~groups[short]
        groups[short] |= free & (free.cumsum(1) <= (n - counts[short].long())[:, None])
    return groups.view(N, K)


def _choose(keep: Tensor, values: str | None) -> str:
    N, K = keep.shape
    stored, total = int(keep.count_nonzero()), N * K
    rest = int(keep.any(1).sum()) * int(keep.any(0).sum())
    if values is None and (rest < total or total == 0) and stored >= COMPACT_MIN_FILL * rest:
        return "compact"
    if NM_MIN_DENSITY * total <= stored < total and _find_pattern(keep) is not None:
        return "nm"
    if stored <= (1 - SLICED_MIN_SPARSITY) * total and K <= SLICED_MAX_K:
        return "sliced"
    return "bitmap" if values is None or stored <= BITMAP_MAX_DENSITY * total else "dense"


def _pack_compact(weight: Tensor, keep: Tensor) -> PackedWeight:
    rows, columns = keep.any(1).nonzero().squeeze(1), keep.any(0).nonzero().squeeze(1)
    empty = torch.empty(0, dtype=torch.uint8, device=weight.device)
    N, K = weight.shape
    values = weight[rows][:, columns].contiguous()
    return PackedWeight("compact", (N, K), values, empty, empty.long(), rows=rows, columns=columns)


def _slice(values: Tensor, bitmask: Tensor, row_offsets: Tensor, K: int) -> SlicedLayout:
    if K > SLICED_MAX_K:
        raise ValueError(f"weight: expected at most {SLICED_MAX_K} columns for format 'sliced', got {K}; use 'bitmap'")
    device = values.device
    values, bitmask, row_offsets = values.cpu(), bitmask.cpu(), row_offsets.cpu()
    N = bitmask.shape[0]
    slices = -(-N // 16)
    # Rows of about equal length share a slice, so that its lanes end together.
    order = torch.full((slices * 16,), -1, dtype=torch.int32)
    order[:N] = torch.argsort(row_offsets.diff(), descending=True, stable=True).int()
    offsets = torch.zeros((slices + 1, 2), dtype=torch.int64)
    sources = (bitmask.data_ptr(), row_offsets.data_ptr(), order.data_ptr(), slices, K)
    _C.count_slices(*sources, offsets.data_ptr())
    steps = torch.empty((int(offsets[-1, 0]), STEP_BYTES), dtype=torch.uint8)
    sliced_values = torch.empty_like(values)
    _C.fill_slices(*sources, values.data_ptr(), values.element_size(), steps.data_ptr(), sliced_values.data_ptr())
    return SlicedLayout(*(t.to(device) for t in (sliced_values, steps, offsets, order)))


def _with_layouts(packed: PackedWeight) -> PackedWeight:
    return dataclasses.replace(packed, layouts=DeviceLayouts.derive(packed))


def _as_integers(t: Tensor) -> Tensor:
    return t.view(_INTEGERS[t.dtype]) if t.dtype.is_floating_point else t


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(most)} or {last}"


def _fail(what: str, expected: object, got: object) -> NoReturn:
    raise ValueError(f"PackedWeight: {what}: expected {expected}, got {got}")


def _expect(condition: bool, what: str, expected: object, got: object) -> None:
    if not condition:
        _fail(what, expected, got)


def _check_ascending(what: str, index: Tensor | None, size: int) -> Tensor:
    if index is None or index.dtype != torch.int64 or index.dim() != 1:
        _fail(what, "int64 indices", index if index is None else f"{index.dtype} {list(index.shape)}")
    previous = torch.cat((index.new_tensor([-1]), index[:-1]))
    wrong = ((index <= previous) | (index >= size)).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        _fail(f"{what}[{i}]", f"ascending, in ({int(previous[i])}, {size})", int(index[i]))
    return index


def _expect_tensor(what: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    found = f"{tensor.dtype} {list(tensor.shape)}"
    _expect(tensor.dtype == dtype and list(tensor.shape) == shape, what, f"{dtype} {shape}", found)
