"""pack and PackedWeight: every bit comes back, sizes are what they say, and no corruption passes validate."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fasticl
from fasticl import PackedWeight, pack
from fasticl.bits import count_bits, expand_bits, pack_bits, true_positions
from fasticl.device_layouts import DeviceLayouts
from fasticl.formats import DTYPES, FORMATS, PATTERNS, SLICED_MAX_K, from_portable

BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
N_OF_M = {"2:4": (2, 4), "4:8": (4, 8), "8:16": (8, 16)}
ANY_WEIGHT = ["bitmap", "sliced", "compact"]  # formats without a pattern


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(BITS[t.dtype])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def random_bits(N: int, K: int, dtype: torch.dtype) -> Tensor:
    """Every bit pattern is as likely as any other: NaN with payloads, infinities and denormals are among them."""
    info = torch.iinfo(BITS[dtype])
    return torch.randint(info.min, info.max, (N, K), dtype=BITS[dtype]).view(dtype)


def pruned(N: int, K: int, density: float, pattern: str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    keep = torch.rand(N, K) < density
    if pattern:
        n, m = N_OF_M[pattern]
        keep &= (torch.rand(N, K // m, m).argsort(-1).argsort(-1) < n).view(N, K)
    return torch.randn(N, K).to(dtype).masked_fill(~keep, 0.0)


def stored_bits(weight: Tensor) -> dict[tuple[int, int], int]:
    """``{(row, column): the 16 bits of its value}`` of all but zeros."""
    found = bits(weight)
    return {(n, k): int(found[n, k]) & 0xFFFF for n, k in found.nonzero().tolist()}


def special_values(dtype: torch.dtype) -> Tensor:
    """-0.0, the smallest denormal, extremes, infinities, and NaN: quiet, signalling, negative, with a payload."""
    info = torch.finfo(dtype)
    numbers = torch.tensor([-0.0, info.tiny, info.max, -info.max, float("inf"), -float("inf")], dtype=torch.float64)
    infinity = int(bits(torch.tensor([float("inf")], dtype=dtype)))
    sign = torch.iinfo(BITS[dtype]).min
    quiet = int(bits(torch.tensor([float("nan")], dtype=dtype)))
    patterns = [1, sign + 1, infinity + 1, quiet, quiet + 5, sign + quiet + 5]
    return torch.cat((numbers.to(dtype), torch.tensor(patterns, dtype=BITS[dtype]).view(dtype)))


def layout_weights(dtype: torch.dtype) -> Iterator[Tensor]:
    """Of random bits, of any size and density; and one of zeros and special values."""
    sizes = [(1, 1, 1.0), (33, 75, 0.5), (16, 64, 1.0), (7, 1500, 0.02), (7, 1500, 0.05), (40, 700, 0.0)]
    for N, K, density in [*sizes, (0, 9, 1.0), (5, 0, 1.0)]:
        yield random_bits(N, K, dtype).masked_fill(torch.rand(N, K) >= density, 0.0)
    weight, special = torch.zeros(18, 70, dtype=dtype), special_values(dtype)
    weight.view(-1)[torch.randperm(weight.numel())[: len(special)]] = special
    weight[17, 69] = -0.0
    yield weight


def assert_validate_compares(packed: PackedWeight, name: str, layout: Any) -> None:
    """What the layout ``name`` holds with what the weight gives; and its bytes are counted."""
    held = dataclasses.replace(packed, layouts=DeviceLayouts(**{name: layout})).validate()
    assert held.bytes == packed.bytes + held.bytes_read
    assert held.bytes_read == sum(t.nbytes for t in layout.tensors)
    for field, t in vars(layout).items():
        if isinstance(t, Tensor):
            wrong = t.clone()
            wrong.view(-1)[0] += 1
            layouts = DeviceLayouts(**{name: dataclasses.replace(layout, **{field: wrong})})
            with pytest.raises(ValueError, match=rf"{name}\.{field}: expected what the portable form gives"):
                dataclasses.replace(packed, layouts=layouts).validate()


@pytest.mark.parametrize("K", [0, 1, 8, 13])
def test_bits(K: int) -> None:
    keep = torch.rand(40, K) < 0.5
    rows = keep.tolist()
    bitmask = [[sum(row[8 * i + j] << j for j in range(min(8, K - 8 * i))) for i in range(-(-K // 8))] for row in rows]
    assert pack_bits(keep).tolist() == bitmask
    assert torch.equal(expand_bits(pack_bits(keep), K), keep)
    assert count_bits(pack_bits(keep)).tolist() == [sum(row) for row in rows]
    assert true_positions(keep).tolist() == [n * K + k for n in range(40) for k in range(K) if rows[n][k]]


# ---- int8 values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["bitmap", "sliced", "dense", "auto"])
def test_int8_values_are_the_nearest(format: str, dtype: torch.dtype) -> None:
    weight = pruned(300, 96, 0.5, dtype=dtype) * (2.0 ** torch.randint(-8, 9, (300, 1))).to(dtype)
    weight[7], weight[8, 1:], weight[8, 0] = 0, 0, -3.0
    packed = pack(weight, format, values="int8").validate()
    q, scales = packed.unpack_values(), packed.scales.double()[:, None]
    assert packed.values.dtype == torch.int8
    assert packed.scales.dtype == packed.dtype == dtype
    assert q.abs().max() == 127
    error = (weight.double() - q.double() * scales).abs()
    assert (error <= scales / 2 * (1 + 1e-6)).all()
    assert (scales <= weight.double().abs().amax(1, keepdim=True) / 127 * (1 + torch.finfo(dtype).eps))[q.any(1)].all()
    wide = torch.promote_types(dtype, torch.float32)
    assert same_bits(packed.unpack(), (q.to(wide) * packed.scales.to(wide)[:, None]).to(dtype))
    assert not q[weight == 0].any()
    assert not packed.unpack()[7].any()
    if format != "dense":
        assert torch.equal(packed.keep, weight != 0)  # also where q is 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_values_at_the_ends_of_a_dtype(dtype: torch.dtype) -> None:
    """A scale of few bits, a denormal even, is never so small that the largest element lies beyond 127.5 of it."""
    info = torch.finfo(dtype)
    smallest = torch.tensor(1, dtype=BITS[dtype]).view(dtype)  # the smallest denormal
    powers = torch.logspace(-6, 0, 500, dtype=torch.float64).to(dtype)
    largest = torch.cat((smallest * torch.arange(1, 400).to(dtype), powers, torch.tensor([info.max / 2], dtype=dtype)))
    weight = largest[:, None] * torch.tensor([1.0, -1.0, 0.5, 0.25]).to(dtype)
    packed = pack(weight, "dense", values="int8")
    assert packed.scales.isfinite().all()
    assert (packed.scales > 0).all()
    error = (weight.double() - packed.values.double() * packed.scales.double()[:, None]).abs()
    assert (error <= packed.scales.double()[:, None] / 2 * (1 + 1e-5)).all()  # the quotient is rounded to float32


def test_auto_with_int8_values() -> None:
    def chosen(weight: Tensor) -> str:
        return pack(weight, values="int8").validate().format

    assert chosen(torch.randn(32, 64)) == chosen(pruned(64, 64, 0.95)) == "dense"
    assert chosen(pruned(64, 64, 0.6)) == "bitmap"
    assert chosen(pruned(64, 64, 1.0, "2:4")) == "nm"
    assert chosen(pruned(64, 64, 0.1)) == "sliced"
    rows_gone = torch.randn(32, 64)
    rows_gone[::2] = 0
    assert chosen(rows_gone) == "bitmap"  # not compact
    for shape in ((0, 8), (8, 0), (0, 0)):
        assert pack(torch.zeros(shape), values="int8").validate().unpack().shape == shape
        assert pack(torch.zeros(shape), "dense", values="int8").validate().unpack().shape == shape


def test_sizes_with_int8_values() -> None:
    N, K = 64, 128
    weight = pruned(N, K, 0.5, "2:4", torch.bfloat16)
    values, offsets, scales, mask = N * K // 2, 8 * (N + 1), 2 * N, N * K // 8
    packed = pack(weight, "nm", values="int8")
    assert (packed.bytes, packed.bytes_read) == (values + mask + offsets + scales, values + mask + scales)
    assert packed.dense_bytes == 2 * N * K
    dense = pack(weight, "dense", values="int8")
    assert dense.bytes == dense.bytes_read == N * K + scales
    assert dense.density == 1
    assert "values='int8'" in repr(dense)
    sliced = pack(weight, "sliced", values="int8")
    assert sliced.sliced.values.dtype == torch.int8
    assert sliced.bytes_read == sum(t.nbytes for t in vars(sliced.sliced).values()) + scales


def test_int8_values_are_refused_where_they_cannot_be() -> None:
    weight = torch.randn(4, 8)
    for wrong in ("int4", "bfloat16", torch.int8):
        with pytest.raises(ValueError, match="values: expected None or 'int8', got"):
            pack(weight, values=wrong)
    with pytest.raises(ValueError, match=r"format: expected 'dense' for int8 values only, .* got 'dense'"):
        pack(weight, "dense")
    with pytest.raises(ValueError, match=r"format: .* 'compact' for others, got 'compact'"):
        pack(weight, "compact", values="int8")
    for special in ("nan", "inf", "-inf"):
        weight[2, 5] = float(special)
        with pytest.raises(
            ValueError, match=r"weight: expected finite elements for int8 values, got (nan|inf) in row 2"
        ):
            pack(weight, "bitmap", values="int8")


def test_validate_of_int8_values() -> None:
    packed, dense = (pack(pruned(6, 16, 0.5), format, values="int8") for format in ("bitmap", "dense"))
    for broken, message in [
        (dataclasses.replace(packed, scales=None), "values: expected dtype float32, .* got torch.int8"),
        (dataclasses.replace(packed, values=packed.values.short()), "values: expected torch.int8 with scales, got"),
        (dataclasses.replace(packed, scales=packed.scales[1:]), r"scales: expected torch.float32 \[6\], got"),
        (
            dataclasses.replace(packed, scales=packed.scales.long()),
            "values: expected dtype float32, .* got torch.int64",
        ),
        (dataclasses.replace(dense, values=dense.values[:, 1:].contiguous()), r"values: expected torch.int8 \[6, 16\]"),
        (dataclasses.replace(dense, values=dense.unpack(), scales=None), "scales: expected a tensor with format dense"),
        (dataclasses.replace(pack(torch.ones(6, 16), "compact"), scales=packed.scales), "values: expected torch.int8"),
        (dataclasses.replace(dense, scales=dense.scales.to("meta")), "tensors: expected all on cpu, got meta"),
    ]:
        with pytest.raises(ValueError, match=f"^PackedWeight: {message}"):
            broken.validate()


# ---- the round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [*ANY_WEIGHT, "auto"])
def test_every_bit_comes_back(format: str, dtype: torch.dtype) -> None:
    for N, K, density in [(1, 1, 1.0), (33, 75, 0.5), (16, 64, 0.05), (7, 130, 1.0), (5, 3, 0.0)]:
        weight = random_bits(N, K, dtype).masked_fill(torch.rand(N, K) >= density, 0.0)
        packed = pack(weight, format).validate()
        assert same_bits(packed.unpack(), weight)
        assert packed.shape == (N, K)
        assert packed.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [*ANY_WEIGHT, "nm"])
def test_special_values_are_stored(format: str, dtype: torch.dtype) -> None:
    special = special_values(dtype)
    assert special.isnan().sum() == 4
    weight = torch.zeros(len(special), 16, dtype=dtype)
    weight[:, 3] = special
    packed = pack(weight, format).validate()
    assert same_bits(packed.unpack(), weight)
    if format in ("bitmap", "sliced"):
        assert packed.values.numel() == len(special)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nm_stores_zeros_where_a_group_has_fewer(pattern: str) -> None:
    n, m = N_OF_M[pattern]
    for density in (0.0, 0.3, 1.0):
        weight = pruned(40, 4 * m, density, pattern)
        for dtype in DTYPES:
            packed = pack(weight.to(dtype), "nm", pattern=pattern).validate()
            assert packed.pattern == pattern
            assert torch.equal(packed.row_offsets, torch.arange(41) * 4 * n)
            keep = expand_bits(packed.bitmask, 4 * m)
            assert torch.equal(keep.view(40, 4, m).sum(-1), torch.full((40, 4), n))
            assert same_bits(packed.unpack(), weight.to(dtype))
    assert pack(pruned(4, 4 * m, 0.2, pattern), "nm", pattern=pattern).values.eq(0).any()


@given(data=st.data())
def test_any_weight_comes_back(data: st.DataObject) -> None:
    N, K = data.draw(st.integers(0, 40), "N"), data.draw(st.integers(0, 100), "K")
    dtype, format = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.sampled_from([*ANY_WEIGHT, "auto"]))
    weight = random_bits(N, K, dtype)
    rows = data.draw(st.lists(st.sampled_from([0.0, 0.02, 0.5, 1.0]), min_size=N, max_size=N), "densities")
    empty_columns = torch.rand(K) < data.draw(st.sampled_from([0.0, 0.5]), "empty columns")
    keep = (torch.rand(N, K) < torch.tensor(rows).view(N, 1)) & ~empty_columns
    weight = weight.masked_fill(~keep, 0.0)
    packed = pack(weight, format).validate()
    assert same_bits(packed.unpack(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 8), (17, 75), (4, 64)])
def test_portable_form_is_numpys(N: int, K: int, dtype: torch.dtype) -> None:
    """Bits by numpy.packbits, values in row-major order: what compressed-tensors' sparse-bitmask holds."""
    weight = random_bits(N, K, dtype).masked_fill(torch.rand(N, K) < 0.5, 0.0)
    keep = bits(weight).numpy() != 0
    for format in ("bitmap", "sliced"):
        packed = pack(weight, format)
        np.testing.assert_array_equal(packed.bitmask.numpy(), np.packbits(keep, axis=1, bitorder="little"))
        np.testing.assert_array_equal(bits(packed.values).numpy(), bits(weight).numpy()[keep])
        np.testing.assert_array_equal(packed.row_offsets.numpy(), np.concatenate(([0], keep.sum(1).cumsum())))
        assert packed.bitmask.dtype == torch.uint8
        assert packed.row_offsets.dtype == torch.int64


def test_weight_with_strides_or_gradient() -> None:
    weight = pruned(20, 12, 0.5)
    for view in (weight.T, weight[:, 1::2], weight[3:, 2:], weight.requires_grad_()):
        packed = pack(view, "bitmap").validate()
        assert torch.equal(packed.unpack(), view)
        assert not packed.values.requires_grad


def test_packed_weight_is_a_copy() -> None:
    for format in ("bitmap", "compact"):
        weight = torch.ones(4, 8)
        packed = pack(weight, format)
        weight.zero_()
        assert torch.equal(packed.unpack(), torch.ones(4, 8))


# ---- what "auto" chooses ---------------------------------------------------------------------------------------------


def without(weight: Tensor, rows: slice = slice(0), columns: slice = slice(0)) -> Tensor:
    weight = weight.clone()
    weight[rows] = 0
    weight[:, columns] = 0
    return weight


@pytest.mark.parametrize(
    ("make", "format", "pattern"),
    [
        pytest.param(lambda: torch.randn(32, 64), "bitmap", None, id="no_zeros"),
        pytest.param(lambda: pruned(32, 64, 0.5), "bitmap", None, id="half"),
        pytest.param(lambda: pruned(32, 64, 0.25), "bitmap", None, id="75_percent_zeros"),
        pytest.param(lambda: pruned(32, 64, 0.15), "sliced", None, id="85_percent_zeros"),
        pytest.param(lambda: pruned(32, 64, 1.0, "2:4"), "nm", "2:4", id="2:4"),
        pytest.param(lambda: pruned(64, 64, 1.0, "4:8"), "nm", "4:8", id="4:8"),
        pytest.param(lambda: pruned(128, 64, 1.0, "8:16"), "nm", "8:16", id="8:16"),
        pytest.param(lambda: pruned(64, 64, 0.95, "2:4"), "nm", "2:4", id="2:4_with_a_few_more_zeros"),
        pytest.param(lambda: pruned(64, 64, 0.1, "2:4"), "sliced", None, id="sparse_that_fits_2:4"),
        pytest.param(lambda: without(torch.randn(32, 64), rows=slice(3, 9)), "compact", None, id="without_rows"),
        pytest.param(lambda: without(torch.randn(32, 64), columns=slice(5)), "compact", None, id="without_columns"),
        pytest.param(
            lambda: without(torch.randn(32, 64), slice(30), slice(9)), "compact", None, id="without_rows_and_columns"
        ),
        pytest.param(lambda: without(pruned(32, 64, 0.95), slice(8)), "compact", None, id="almost_full_rest"),
        pytest.param(lambda: without(pruned(32, 64, 0.5), slice(4)), "bitmap", None, id="rest_with_zeros"),
        pytest.param(lambda: torch.zeros(32, 64), "compact", None, id="all_zero"),
        pytest.param(lambda: torch.full((32, 64), -0.0), "bitmap", None, id="all_negative_zero"),
        pytest.param(lambda: torch.zeros(0, 64), "compact", None, id="no_rows"),
        pytest.param(lambda: torch.zeros(32, 0), "compact", None, id="no_columns"),
    ],
)
def test_auto(make: Callable[[], Tensor], format: str, pattern: str | None) -> None:
    weight = make()
    packed = pack(weight).validate()
    assert (packed.format, packed.pattern) == (format, pattern)
    assert same_bits(packed.unpack(), weight)


def test_more_columns_than_sliced_can_index() -> None:
    columns = torch.arange(SLICED_MAX_K + 1)
    weight = torch.zeros(12, len(columns))
    weight[columns % 12, columns] = 1
    assert pack(weight[:, :-1]).format == "sliced"
    assert pack(weight).format == "bitmap"
    with pytest.raises(ValueError, match=f"at most {SLICED_MAX_K} columns for format 'sliced', got {SLICED_MAX_K + 1}"):
        pack(weight, "sliced")


def test_nm_finds_the_first_pattern_that_holds() -> None:
    for pattern in PATTERNS:
        assert pack(pruned(128, 64, 1.0, pattern), "nm").pattern == pattern
    fits_all = torch.zeros(2, 16)
    assert pack(fits_all, "nm").pattern == "2:4"
    assert pack(fits_all, "nm", pattern="8:16").values.numel() == 16


def test_compact_keeps_what_has_values() -> None:
    weight = torch.zeros(6, 5)
    weight[1, 2], weight[4, 2], weight[4, 0] = 1.0, float("nan"), -0.0
    packed = pack(weight, "compact").validate()
    assert packed.rows is not None
    assert packed.columns is not None
    assert packed.rows.tolist() == [1, 4]
    assert packed.columns.tolist() == [0, 2]
    assert same_bits(packed.values, weight[[1, 4]][:, [0, 2]])
    for shape in ((0, 7), (7, 0), (0, 0), (3, 4)):
        packed = pack(torch.zeros(shape), "compact").validate()
        assert packed.values.shape == (0, 0)
        assert torch.equal(packed.unpack(), torch.zeros(shape))


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_by_hand(dtype: torch.dtype) -> None:
    N, K, size = 20, 30, torch.finfo(dtype).bits // 8
    weight = pruned(N, K, 0.3, dtype=dtype)
    stored = int(weight.count_nonzero())
    portable = stored * size + N * 4 + 8 * (N + 1)  # values, ceil(30 / 8) bytes of mask a row, offsets

    bitmap = pack(weight, "bitmap")
    assert bitmap.bytes == bitmap.bytes_read == portable
    assert bitmap.density == stored / (N * K)
    assert bitmap.dense_bytes == N * K * size

    sliced = pack(weight, "sliced")
    assert sliced.sliced is not None
    steps, slices = len(sliced.sliced.steps), 2
    assert sliced.bytes_read == stored * size + 20 * steps + 16 * (slices + 1) + 4 * 16 * slices
    assert sliced.bytes == portable + sliced.bytes_read
    assert sliced.density == bitmap.density

    compact = pack(without(torch.ones(N, K, dtype=dtype), slice(5), slice(10)), "compact")
    assert compact.bytes == compact.bytes_read == 15 * 20 * size + 8 * (15 + 20)
    assert compact.density == 0.5

    nm = pack(pruned(N, 32, 0.8, "2:4", dtype), "nm")
    assert nm.bytes_read == N * 16 * size + N * 4  # rows are equally long: their offsets are not read
    assert nm.bytes == nm.bytes_read + 8 * (N + 1)
    assert nm.density == 0.5  # stored zeros count

    assert pack(torch.zeros(0, 5), "bitmap").density == 0.0


def test_repr_says_what_it_is() -> None:
    packed = pack(pruned(8, 16, 1.0, "2:4"), "nm")
    assert repr(packed) == (
        "PackedWeight(format='nm', shape=[8, 16], dtype=torch.float32, device=cpu, density=0.500, "
        f"bytes={packed.bytes}, pattern='2:4')"
    )


# ---- sliced: the layout by its definition ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "K", "density"), [(1, 1, 1.0), (16, 40, 0.2), (35, 300, 0.1), (50, 33, 1.0), (20, 64, 0)]
)
def test_sliced_steps_replay_the_weight(N: int, K: int, density: float) -> None:
    """Interprets the steps in Python: which value lies in which row and column."""
    weight = pruned(N, K, density)
    layout = pack(weight, "sliced").sliced
    assert layout is not None
    rebuilt, order = torch.zeros(N, K), layout.row_order.tolist()
    assert sorted(row for row in order if row >= 0) == list(range(N))
    assert layout.slice_offsets[-1].tolist() == [len(layout.steps), len(layout.values)]
    values = iter(layout.values.tolist())
    for s, (first, end) in enumerate(zip(layout.slice_offsets[:-1, 0], layout.slice_offsets[1:, 0], strict=True)):
        assert (end - first) % 4 == 0  # the kernel takes four steps at a time
        for step in layout.steps[first:end].numpy():
            (mask, window), indices = step[:4].view(np.uint16).tolist(), step[4:].tolist()
            for lane, index in enumerate(indices):
                if mask >> lane & 1:
                    assert index < 32
                    rebuilt[order[16 * s + lane], window + index] += next(values)
    assert next(values, None) is None
    assert torch.equal(rebuilt, weight)


# ---- moving, storing, loading ----------------------------------------------------------------------------------------


def example(format: str, dtype: torch.dtype = torch.float32) -> PackedWeight:
    weight = pruned(20, 32, 0.9, "2:4", dtype)
    weight[:, :4] = 0
    return pack(weight, format, values="int8" if format == "dense" else None)


def tensors_of(packed: PackedWeight) -> dict[str, Tensor]:
    own = {name: t for name, t in vars(packed).items() if isinstance(t, Tensor)}
    layout = vars(packed.sliced) if packed.sliced else {}
    return own | {f"sliced.{name}": t for name, t in layout.items()}


@pytest.mark.parametrize("format", FORMATS[1:])
def test_to_moves_every_tensor(format: str) -> None:
    packed = example(format)
    there = packed.to("meta")
    assert tensors_of(there).keys() == tensors_of(packed).keys()
    for name, tensor in tensors_of(there).items():
        assert tensor.device.type == "meta", name
        assert tensor.shape == tensors_of(packed)[name].shape
    assert (there.format, there.shape, there.pattern) == (packed.format, packed.shape, packed.pattern)
    assert there.device == torch.device("meta")
    same = packed.to("cpu").validate()
    assert same_bits(same.unpack(), packed.unpack())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["bitmap", "sliced", "nm"])
def test_from_portable_rebuilds_all(format: str, dtype: torch.dtype) -> None:
    packed = example(format, dtype)
    loaded = from_portable(format, packed.shape, packed.values, packed.bitmask, packed.row_offsets, packed.pattern)
    assert loaded.validate().format == format
    assert tensors_of(loaded).keys() == tensors_of(packed).keys()
    for name, tensor in tensors_of(loaded).items():
        assert torch.equal(tensor, tensors_of(packed)[name]), name
    assert loaded.bytes == packed.bytes


def test_from_portable_refuses() -> None:
    bitmap, nm = example("bitmap"), example("nm")

    def load(format: str, packed: PackedWeight, pattern: str | None = None, **changed: object) -> None:
        fields = {name: getattr(packed, name) for name in ("shape", "values", "bitmask", "row_offsets")}
        from_portable(format, **(fields | changed), pattern=pattern)

    cases = [
        ("expected 'bitmap', 'sliced' or 'nm', got 'compact'", "compact", bitmap, None, {}),
        ("pattern: expected None with format 'bitmap', got '2:4'", "bitmap", bitmap, "2:4", {}),
        ("pattern: expected one of 2:4, 4:8, 8:16, got None", "nm", nm, None, {}),
        ("pattern: expected one of 2:4, 4:8, 8:16, got '1:2'", "nm", nm, "1:2", {}),
        (r"bitmask\[0\], columns 0 to 3: expected 2 bits \(2:4\), got 0", "nm", bitmap, "2:4", {}),
        (r"values: expected .*\[320\], got .*\[319\]", "sliced", nm, None, {"values": nm.values[1:]}),
        (r"bitmask: expected torch.uint8 \[20, 5\], got torch.uint8 \[20, 4\]", "nm", nm, "2:4", {"shape": (20, 40)}),
    ]
    for message, format, packed, pattern, changed in cases:
        with pytest.raises(ValueError, match=message):
            load(format, packed, pattern, **changed)
    six_columns = pack(torch.ones(2, 6), "bitmap")
    with pytest.raises(ValueError, match="shape: expected columns divisible by 4, got 6"):
        load("nm", six_columns, "2:4")


# ---- validate --------------------------------------------------------------------------------------------------------


def changed(tensor: Tensor | None, index: int | tuple[int, ...], value: int) -> Tensor:
    assert tensor is not None
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def corruption(format: str, field: str, change: Callable[[PackedWeight], object], message: str) -> object:
    return pytest.param(
        format, field, change, message, id=f"{format}-{field}-{re.sub(r'[^a-z0-9]+', '_', message)}"[:70]
    )


ODD = (20, 30)  # K no multiple of 8: a mask with tail bits


@pytest.mark.parametrize(
    ("format", "field", "change", "message"),
    [
        corruption("bitmap", "format", lambda p: "csr",
                   "format: expected one of bitmap, sliced, nm, compact, dense, got 'csr'"),
        corruption("bitmap", "format", lambda p: "auto", "format: expected one of .*, got 'auto'"),
        corruption("bitmap", "shape", lambda p: (-1, 30), r"shape: expected sizes >= 0, got \[-1, 30\]"),
        corruption("bitmap", "shape", lambda p: (21, 30), r"bitmask: expected .*\[21, 4\], got .*\[20, 4\]"),
        corruption("bitmap", "shape", lambda p: (20, 33), r"bitmask: expected .*\[20, 5\], got .*\[20, 4\]"),
        corruption("bitmap", "shape", lambda p: (20, 29),
                   r"bitmask\[\d+\]: expected no bits at columns >= 29, got some"),
        # values
        corruption("bitmap", "values", lambda p: p.values.long(), "values: expected dtype float32, .*got torch.int64"),
        corruption("bitmap", "values", lambda p: p.values[:-1], r"values: expected torch.float32 \[\d+\], got"),
        corruption("bitmap", "values", lambda p: torch.cat((p.values, p.values[:1])), r"values: expected .*, got"),
        corruption("bitmap", "values", lambda p: p.values[None], r"values: expected torch.float32 \[\d+\], got .*\[1,"),
        corruption("bitmap", "values", lambda p: p.values.repeat(2)[::2],
                   r"tensors: expected contiguous, got strides \(2"),
        corruption("bitmap", "values", lambda p: p.values.to("meta"), "tensors: expected all on meta, got cpu"),
        # bitmask
        corruption("bitmap", "bitmask", lambda p: p.bitmask.to("meta"), "tensors: expected all on cpu, got meta"),
        corruption("bitmap", "bitmask", lambda p: p.bitmask.char(), "bitmask: expected torch.uint8 .*got torch.int8"),
        corruption("bitmap", "bitmask", lambda p: p.bitmask[1:], r"bitmask: expected .*\[20, 4\], got .*\[19, 4\]"),
        corruption("bitmap", "bitmask", lambda p: p.bitmask.flatten(), r"bitmask: expected .*\[20, 4\], got .*\[80\]"),
        corruption("bitmap", "bitmask", lambda p: p.bitmask.T.contiguous().T, "tensors: expected contiguous"),
        corruption("bitmap", "bitmask", lambda p: changed(p.bitmask, (7, 3), 0x40), r"bitmask\[7\]: expected no bits"),
        corruption("bitmap", "bitmask", lambda p: p.bitmask ^ 1, r"row_offsets\[1\]: expected \d+ \(bits before it\)"),
        corruption("sliced", "bitmask", lambda p: changed(p.bitmask, (9, 0), 0), r"row_offsets\[10\]: expected \d+"),
        # row_offsets
        corruption("bitmap", "row_offsets", lambda p: p.row_offsets.int(), "row_offsets: expected torch.int64"),
        corruption("bitmap", "row_offsets", lambda p: p.row_offsets[:-1],
                   r"row_offsets: expected .*\[21\], got .*\[20\]"),
        corruption("bitmap", "row_offsets", lambda p: changed(p.row_offsets, 0, 1),
                   r"row_offsets\[0\]: expected 0 .*got 1"),
        corruption("bitmap", "row_offsets", lambda p: changed(p.row_offsets, 5, -1), r"row_offsets\[5\]: .*got -1"),
        corruption("bitmap", "row_offsets", lambda p: changed(p.row_offsets, 5, 10**12),
                   r"row_offsets\[5\]: .*got 10{12}"),
        corruption("bitmap", "row_offsets", lambda p: p.row_offsets.flip(0), r"row_offsets\[0\]: expected 0"),
        corruption("bitmap", "row_offsets", lambda p: p.row_offsets + 1, r"row_offsets\[0\]: expected 0 .*, got 1"),
        corruption("bitmap", "row_offsets", lambda p: changed(p.row_offsets, -1, 9), r"row_offsets\[20\]: .*got 9"),
        # nm
        corruption("nm", "pattern", lambda p: None, "pattern: expected one of 2:4, 4:8, 8:16, got None"),
        corruption("nm", "pattern", lambda p: "3:4", "pattern: expected one of 2:4, 4:8, 8:16, got '3:4'"),
        corruption("bitmap", "format", lambda p: "nm", "pattern: expected one of 2:4, 4:8, 8:16, got None"),
        corruption("nm", "bitmask", lambda p: changed(p.bitmask, (3, 1), 0x17),
                   r"bitmask\[3\], columns 8 to 11: expected 2 bits"),
        # sliced
        corruption("sliced", "sliced", lambda p: None, "sliced: expected the derived layout, got None"),
        corruption("sliced", "values", lambda p: -p.values, "sliced.values: expected what the portable form gives"),
        # compact
        corruption("compact", "rows", lambda p: None, "rows: expected int64 indices, got None"),
        corruption("compact", "rows", lambda p: p.rows.int(), r"rows: expected int64 indices, got torch.int32 \[15\]"),
        corruption("compact", "rows", lambda p: p.rows[None],
                   r"rows: expected int64 indices, got torch.int64 \[1, 15\]"),
        corruption("compact", "rows", lambda p: changed(p.rows, 14, 20),
                   r"rows\[14\]: expected ascending, in \(18, 20\), got 20"),
        corruption("compact", "rows", lambda p: changed(p.rows, 0, -1),
                   r"rows\[0\]: expected ascending, in \(-1, 20\), got -1"),
        corruption("compact", "rows", lambda p: p.rows[:-1], r"values: expected .*\[14, 20\], got .*\[15, 20\]"),
        corruption("compact", "columns", lambda p: changed(p.columns, 3, 12),
                   r"columns\[3\]: expected ascending, in \(12, 30\), got 12"),
        corruption("compact", "columns", lambda p: p.columns.flip(0),
                   r"columns\[1\]: expected ascending, in \(29, 30\), got 28"),
        corruption("compact", "columns", lambda p: p.columns.to("meta"), "tensors: expected all on cpu, got meta"),
        corruption("compact", "values", lambda p: p.values.T, "tensors: expected contiguous"),
        corruption("compact", "values", lambda p: p.values[:, 1:].contiguous(),
                   r"values: expected .*\[15, 20\], got .*\[15, 19\]"),
    ],
)  # fmt: skip
def test_validate_sees(format: str, field: str, change: Callable[[PackedWeight], object], message: str) -> None:
    if format == "compact":
        weight = without(torch.randn(ODD), slice(5), slice(10))
    else:
        weight = (
            pruned(20, 32, 1.0, "2:4") if format == "nm" else torch.randn(ODD).masked_fill(torch.rand(ODD) < 0.5, 0)
        )
        weight[:, 0] = 1  # bit 0 is set in every row
        if format == "nm":
            weight[:, 1:4] = 0
            weight[:, 8:12] = torch.tensor([0.0, 1.0, 0.0, 1.0])
            weight[:, 12:16] = torch.tensor([1.0, 1.0, 0.0, 0.0])
        else:
            weight[:, 28:] = 1
    packed = pack(weight, format).validate()
    broken = dataclasses.replace(packed, **{field: change(packed)})
    with pytest.raises(ValueError, match=f"^PackedWeight: {message}"):
        broken.validate()


@pytest.mark.parametrize("name", ["values", "steps", "slice_offsets", "row_order"])
def test_validate_sees_a_corrupted_layout(name: str) -> None:
    packed = pack(pruned(40, 100, 0.2), "sliced")
    assert packed.sliced is not None
    tensor = getattr(packed.sliced, name)
    for wrong, message in (
        (changed(tensor.flatten(), 3, 99).view(tensor.shape), "what the portable form gives, got .* at flat index 3"),
        (tensor[:-1], f"{tensor.dtype} .*, got {tensor.dtype}"),
        (tensor.double(), f"{tensor.dtype} .*, got torch.float64"),
    ):
        broken = dataclasses.replace(packed, sliced=dataclasses.replace(packed.sliced, **{name: wrong}))
        with pytest.raises(ValueError, match=f"sliced.{name}: expected {message}"):
            broken.validate()


@given(data=st.data())
def test_no_flipped_bit_of_the_structure_passes(data: st.DataObject) -> None:
    """One flipped bit anywhere in mask or offsets is seen: only values are free."""
    packed = pack(pruned(9, 21, 0.5), data.draw(st.sampled_from(["bitmap", "sliced"])))
    name = data.draw(st.sampled_from(["bitmask", "row_offsets"]))
    tensor = getattr(packed, name).clone()
    raw = tensor.view(torch.uint8).view(-1)
    bit = data.draw(st.integers(0, raw.numel() * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="PackedWeight"):
        dataclasses.replace(packed, **{name: tensor}).validate()


# ---- rows and columns of a packed weight -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("format", ["bitmap", "sliced", "nm", "compact", "dense"])
def test_index_select(format: str, values: str | None, dtype: torch.dtype) -> None:
    """Bit for bit what indexing the dense weight gives, in a weight that passes validate() and owns its tensors."""
    if (format, values) in (("dense", None), ("compact", "int8")):
        pytest.skip("no such format")
    weight = pruned(37, 48, 0.4, "4:8" if format == "nm" else None, dtype)
    if format == "compact":
        weight[::3], weight[:, 5:9] = 0, 0
    if values is None and format != "nm":
        weight[1, :10] = special_values(dtype)[:10]
    packed = pack(weight, format, values=values)
    for dim, size in enumerate(weight.shape):
        chunks = torch.arange(size).chunk(5)  # of 8 rows, and of 10 columns, which cut groups of n:m
        picked = torch.rand(size).lt(0.5).nonzero().squeeze(1)
        for index in (*chunks, picked, torch.arange(size), torch.arange(0), torch.arange(8, 24)):
            part = packed.index_select(dim, index).validate()
            assert same_bits(part.unpack(), packed.unpack().index_select(dim, index))
            if values is not None:
                assert torch.equal(part.unpack_values(), packed.unpack_values().index_select(dim, index))
                assert same_bits(part.scales, packed.scales[index] if dim == 0 else packed.scales)
            assert part.format == format or (format == "nm" and dim == 1)
            for tensor in part._tensors():
                assert tensor.untyped_storage().nbytes() == tensor.nbytes  # none holds on to the whole weight
    if format == "nm":
        assert packed.index_select(1, torch.arange(8, 24)).format == "nm"
        assert packed.index_select(1, torch.arange(10)).format == "bitmap"


def test_index_select_refuses() -> None:
    packed = pack(pruned(4, 6, 0.5))
    for dim, index, message in (
        (2, torch.arange(2), "dim: expected 0 or 1, got 2"),
        (0, torch.tensor([1, 1]), r"index\[1\]: expected ascending, in \(1, 4\), got 1"),
        (0, torch.tensor([4]), r"index\[0\]: expected ascending, in \(-1, 4\), got 4"),
        (1, torch.tensor([-1]), r"index\[0\]: expected ascending, in \(-1, 6\), got -1"),
        (1, torch.tensor([0.5]), "index: expected int64 indices, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            packed.index_select(dim, index)


# ---- errors of pack --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "weight: expected a torch.Tensor, got list", ([[1.0]],), {}),
        (TypeError, "weight: expected dtype float32, bfloat16, float16 or float64, got torch.int64",
         (torch.ones(2, 2).long(),), {}),
        (TypeError, "weight: expected dtype .*, got torch.complex64", (torch.ones(2, 2) + 0j,), {}),
        (TypeError, "weight: expected a dense .*, got torch.sparse_coo", (torch.ones(2, 2).to_sparse(),), {}),
        (ValueError, r"weight: expected shape \[N, K\], got \[4\]", (torch.ones(4),), {}),
        (ValueError, r"weight: expected shape \[N, K\], got \[1, 2, 3\]", (torch.ones(1, 2, 3),), {}),
        (ValueError, "format: expected one of auto, bitmap, .*, got 'csr'", (torch.ones(2, 2), "csr"), {}),
        (ValueError, "format: expected one of auto, bitmap, .*, got None", (torch.ones(2, 2), None), {}),
        (ValueError, "pattern: expected one of 2:4, 4:8, 8:16 with format 'nm', got '1:2' with 'nm'",
         (torch.ones(2, 4), "nm"), {"pattern": "1:2"}),
        (ValueError, "pattern: expected .*, got '2:4' with 'bitmap'", (torch.ones(2, 4), "bitmap"), {"pattern": "2:4"}),
        (ValueError, "pattern: expected .*, got '2:4' with 'auto'", (torch.ones(2, 4),), {"pattern": "2:4"}),
        (ValueError, "expected columns divisible by 8 for 4:8, got 12", (torch.zeros(2, 12), "nm"), {"pattern": "4:8"}),
        (ValueError, "expected at most 2 of every 4 columns for 2:4, got 3",
         (torch.tensor([[1.0, 1, 1, 0]]), "nm"), {"pattern": "2:4"}),
        (ValueError, "expected one of the patterns 2:4, 4:8, 8:16, got none of them", (torch.ones(2, 16), "nm"), {}),
        (ValueError, "expected one of the patterns 2:4, 4:8, 8:16, got none of them", (torch.zeros(2, 6), "nm"), {}),
    ],
)  # fmt: skip
def test_pack_refuses(error: type[Exception], message: str, arguments: tuple, options: dict) -> None:
    with pytest.raises(error, match=message):
        fasticl.pack(*arguments, **options)
