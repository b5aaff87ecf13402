"""The gather layout: every bit comes back, lists are as its text says, and groups are dealt out evenly."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_formats import assert_validate_compares, layout_weights, pruned, random_bits, same_bits, stored_bits
from torch import Tensor

import fasticl
from fasticl import gather_layout
from fasticl.gather_layout import GatherLayout, choose_plan, dealt, from_gather, share_bounds, to_gather

DTYPES = gather_layout.DTYPES


def layout_of(weight: Tensor, plan: tuple[int, int, int] | None = None) -> GatherLayout:
    return to_gather(fasticl.pack(weight, "bitmap"), plan)


def decoded(layout: GatherLayout, K: int) -> dict[tuple[int, int], int]:
    """``{(row, column): the 16 bits of its value}``, read lane by lane as the text of gather_layout.py says, in plain
    Python: it shares no line with the code that it checks. Entries of value 0 are checked for what they may be.
    """
    words, starts, order = (t.tolist() for t in (layout.records, layout.starts, layout.row_order))
    groups, eights = len(order) // 4, -(-K // 8)
    found = {}
    for share in range(layout.shares):
        for group in range(groups):
            first, last = starts[share * groups + group], starts[share * groups + group + 1]
            assert last > first, "a list of no record"
            fullest = 0
            for lane in range(32):
                begin, end = (eights * border // layout.shares for border in (share, share + 1))
                row, j, count, filled = order[4 * group + lane // 8], begin, 0, False
                for record in words[first:last]:
                    for e in range(6):
                        value = record[lane][e // 2] >> 16 * (e % 2) & 0xFFFF
                        step = record[lane][3] >> 5 * e & 31
                        j += step
                        if value:
                            assert not filled, "a value behind the list's end"
                            assert (row, 8 * j + lane % 8) not in found
                            found[row, 8 * j + lane % 8] = value
                        else:
                            filled |= step == 0
                            assert step in (0, 31)
                        count += not filled
                    assert record[lane][3] >> 30 in (0, -1), "bits that no step has"
                assert j < max(begin + 1, end), "a read behind the share, which has eight columns at least"
                fullest = max(fullest, count)
            assert last - first == max(1, -(-fullest // 6)), "records that no lane needs"
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", [None, (1, 1, 1), (2, 3, 2), (5, 1, 3)])
def test_every_bit_comes_back(plan: tuple[int, int, int] | None, dtype: torch.dtype) -> None:
    for weight in layout_weights(dtype):
        assert same_bits(from_gather(layout_of(weight, plan), *weight.shape, dtype), weight)


@given(data=st.data())
def test_any_weight_is_as_the_text_says(data: st.DataObject) -> None:
    N, K = data.draw(st.integers(0, 20), "N"), data.draw(st.integers(0, 900), "K")
    dtype, plan = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.tuples(*[st.integers(1, 4)] * 3), "plan")
    rows = data.draw(st.lists(st.sampled_from([0.0, 0.004, 0.05, 0.5, 1.0]), min_size=N, max_size=N), "rows")
    weight = random_bits(N, K, dtype).masked_fill(torch.rand(N, K) >= torch.tensor(rows).view(N, 1), 0.0)
    layout = layout_of(weight, plan)
    assert decoded(layout, K) == stored_bits(weight)
    assert same_bits(from_gather(layout, N, K, dtype), weight)


@pytest.mark.parametrize("gap", [30, 31, 32, 33, 62, 63, 64, 93, 94, 120])
def test_gaps_that_no_step_has(gap: int) -> None:
    """Of columns 8 j + 3, at the start of a list and within it."""
    weight = torch.zeros(1, 8 * 250, dtype=torch.float16)
    weight[0, [8 * gap + 3, 8 * (2 * gap) + 3, 8 * (2 * gap) + 7]] = 1.0
    layout = layout_of(weight, (1, 1, 1))
    assert decoded(layout, weight.shape[1]) == stored_bits(weight)
    values = layout.records.view(torch.int16).view(-1, 32, 8)[..., :6]
    steps = layout.records[..., 3, None] >> 5 * torch.arange(6) & 31
    assert int(((values == 0) & (steps == 31)).sum()) == 2 * ((gap - 1) // 31) + (2 * gap - 1) // 31


@pytest.mark.parametrize("slab", [1, 1 << 14])
def test_rows_are_packed_by_slabs(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_bits(75, 700, torch.float16).masked_fill(torch.rand(75, 700) >= torch.rand(75, 1) ** 3, 0.0)
    monkeypatch.setattr(gather_layout, "_SLAB", slab)
    layout = layout_of(weight, (2, 2, 3))
    assert decoded(layout, 700) == stored_bits(weight)
    assert sorted(layout.row_order.tolist()) == [-1, *range(75)]


def test_rows_of_equal_length_share_a_group() -> None:
    """So that records are little more than values, of skewed rows as of even ones."""
    for density, most in ((torch.full((256, 1), 0.2), 3.2), (torch.rand(256, 1) * 0.4, 3.4)):
        weight = torch.randn(256, 4096).bfloat16().masked_fill(torch.rand(256, 4096) >= density, 0.0)
        layout = layout_of(weight, (1, 8, 4))
        assert layout.records.numel() * 4 < most * int(weight.count_nonzero())


@pytest.mark.parametrize(("groups", "workers"), [(0, 3), (1, 5), (7, 3), (24, 8), (100, 7)])
def test_groups_are_dealt_by_turns(groups: int, workers: int) -> None:
    """Every worker has as long ones as the others: the sums of ranks differ by less than a turn's."""
    order = dealt(groups, workers)
    assert sorted(order.tolist()) == list(range(groups))
    bounds = share_bounds(groups, workers)
    for first, last in itertools.pairwise(bounds):
        for turn, group in enumerate(order[first:last].tolist()):
            assert turn * workers - workers < group < (turn + 1) * workers


H200, A100, RTX4090 = (132, 232448), (108, 163 << 10), (128, 99 << 10)  # multiprocessors, shared bytes a block


@pytest.mark.parametrize(
    ("N", "K", "gpu", "expected", "why"),
    [
        (4096, 4096, H200, (1, 132, 8), "a group a warp"),
        (14336, 4096, H200, (1, 132, 14), "two turns of 14 warps, not of 16 and 12"),
        (4096, 14336, H200, (1, 132, 8), "x fits into shared memory"),
        (4096, 14336, A100, (2, 54, 10), "and here it does not"),
        (4096, 14336, RTX4090, (3, 42, 13), "and here less of it"),
        (1024, 4096, H200, (4, 33, 8), "as many shares as may be, of 1024 columns each"),
        (256, 256, H200, (1, 64, 1), "a share must not be shorter"),
        (128256, 4096, H200, (1, 132, 16), "many turns"),
    ],
)
def test_the_plan_follows_shapes_and_gpu(
    N: int, K: int, gpu: tuple[int, int], expected: tuple[int, int, int], why: str
) -> None:
    assert choose_plan(-(-N // 4), -(-K // 8), *gpu) == expected, why


@pytest.mark.parametrize("gpu", [H200, A100, RTX4090, (1, 99 << 10)])
def test_any_plan_is_possible(gpu: tuple[int, int]) -> None:
    for groups in (0, 1, 3, 131, 133, 1000, 10**6):
        for eights in (0, 1, 512, 1793, 20000):
            shares, blocks, warps = choose_plan(groups, eights, *gpu)
            assert -(-eights // shares) * gather_layout.EIGHT_BYTES <= gpu[1]
            assert 1 <= shares <= gather_layout.MAX_SHARES
            assert blocks >= 1
            assert 1 <= warps <= gather_layout.MAX_WARPS
            assert shares * blocks <= max(gpu[0], shares), "blocks that must wait for others"


def test_errors_name_expected_and_got() -> None:
    weight = torch.ones(16, 64)
    with pytest.raises(TypeError, match=r"expected values of dtype bfloat16 or float16, got torch\.float32"):
        to_gather(fasticl.pack(weight, "bitmap"))
    with pytest.raises(ValueError, match="expected format bitmap, sliced or nm, got compact"):
        to_gather(fasticl.pack(weight.half(), "compact"))
    for plan in ((0, 1, 1), (33, 1, 1), (1, 0, 1), (1, 1, 17)):
        got = "got {}, {} and {}".format(*plan)
        with pytest.raises(ValueError, match=f"expected 1 to 32 shares, 1 or more blocks and 1 to 16 warps, {got}"):
            to_gather(fasticl.pack(weight.half(), "bitmap"), plan)
    wide = dataclasses.replace(fasticl.pack(weight.half(), "bitmap"), shape=(2**21, 2**14))
    with pytest.raises(ValueError, match=r"expected fewer than 2\*\*34 positions .*, got 2097152 x 16384"):
        to_gather(wide)
    with pytest.raises(ValueError, match=r"expected at most 32 shares of x of 101376 bytes, got 1000000 columns"):
        choose_plan(1, 125000, 132, 99 << 10)


def test_a_weight_of_any_portable_format_has_it() -> None:
    weight = pruned(20, 128, 0.2, dtype=torch.bfloat16).masked_fill(torch.arange(128) % 4 > 1, 0.0)
    for format in ("sliced", "nm"):  # 2:4 stores zeros too
        layout = to_gather(fasticl.pack(weight, format))
        assert same_bits(from_gather(layout, 20, 128, torch.bfloat16), weight)
        assert format == "nm" or decoded(layout, 128) == stored_bits(weight)


def test_validate_sees_a_layout_that_is_not_the_weights() -> None:
    packed = fasticl.pack(pruned(20, 100, 0.2, dtype=torch.float16), "bitmap")
    assert_validate_compares(packed, "gather", to_gather(packed))
