"""The lane-stream layout: every bit comes back, and what a chunk needs fits the ring."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_formats import assert_validate_compares, layout_weights, pruned, random_bits, same_bits, stored_bits
from torch import Tensor

import fasticl
from fasticl import lane_stream
from fasticl.device_layouts import DeviceLayouts
from fasticl.lane_stream import LaneStream, from_lanes, to_lanes

DTYPES = lane_stream.DTYPES


def lanes_of(weight: Tensor, splits: int | None = None, blocks: int = 1) -> LaneStream:
    return to_lanes(fasticl.pack(weight, "bitmap"), splits, blocks)


def decoded(lanes: LaneStream, K: int) -> dict[tuple[int, int], int]:
    """``{(row, column): the 16 bits of its value}``, read lane by lane as the text of lane_stream.py says, in plain
    Python: it shares no line with the code that it checks.
    """
    halves = lanes.values.view(torch.int16).view(-1, 32, 2).tolist()
    masks, starts, order = lanes.masks.tolist(), lanes.starts.tolist(), lanes.row_order.tolist()
    strips, chunks = len(masks), -(-K // 64)
    found = {}
    for strip in range(strips):
        for split in range(lanes.splits):
            first, last = chunks * split // lanes.splits, chunks * (split + 1) // lanes.splits
            for lane in range(32):
                begin, at = starts[strip * chunks + first], 0
                for chunk in range(first, last):
                    at = max(at, 2 * (starts[strip * chunks + chunk] - begin - lane_stream.LAG))
                    for bit in range(32):
                        if masks[strip][chunk][lane] >> bit & 1:
                            row = order[strip * 16 + lane // 4 + bit // 4 % 2 * 8]
                            column = chunk * 64 + lane % 4 * 16 + bit // 8 * 4 + bit % 4
                            found[row, column] = halves[begin + at // 2][lane][at % 2] & 0xFFFF
                            at += 1
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("splits", "blocks"), [(1, 1), (2, 2), (5, 1), (8, 1), (12, 3)])
def test_every_bit_comes_back(splits: int, blocks: int, dtype: torch.dtype) -> None:
    for weight in layout_weights(dtype):
        assert same_bits(from_lanes(lanes_of(weight, splits, blocks), *weight.shape, dtype), weight)


@given(data=st.data())
def test_any_weight_is_as_the_text_says(data: st.DataObject) -> None:
    N, K = data.draw(st.integers(0, 40), "N"), data.draw(st.integers(0, 300), "K")
    dtype, splits = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.integers(1, 8), "splits")
    rows = data.draw(st.lists(st.sampled_from([0.0, 0.05, 0.5, 1.0]), min_size=N, max_size=N), "rows")
    keep = torch.rand(N, K) < torch.tensor(rows).view(N, 1)
    weight = random_bits(N, K, dtype).masked_fill(~keep, 0.0)
    lanes = lanes_of(weight, splits)
    assert decoded(lanes, K) == stored_bits(weight)
    assert same_bits(from_lanes(lanes, N, K, dtype), weight)


@pytest.mark.parametrize("slab", [1, 1 << 15])
def test_strips_are_packed_by_slabs(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one strip, and of two; rows out of order, lanes that skip, and nothing but zeros where no value belongs."""
    weight = random_bits(75, 700, torch.float16).masked_fill(torch.rand(75, 700) >= torch.rand(75, 1), 0.0)
    weight[:, torch.arange(700) % 64 // 16 == 2] = 0.0
    monkeypatch.setattr(lane_stream, "_SLAB", slab)
    lanes = lanes_of(weight, 2)
    assert decoded(lanes, 700) == stored_bits(weight)
    assert int(lanes.values.view(torch.int16).count_nonzero()) == len(stored_bits(weight))
    assert not torch.equal(lanes.row_order[:75], torch.arange(75, dtype=torch.int32))


@pytest.mark.parametrize("structure", ["dense", "one_lane", "turns", "random", "growing"])
def test_the_ring_holds_what_is_under_way(structure: str) -> None:
    """While a chunk is decoded: from the row that the last lane may read to the one that arrives for the deepest."""
    keep = (
        torch.rand(32, 64 * 40) < torch.linspace(0, 1, 64 * 40)
        if structure == "growing"
        else torch.rand(32, 2560) < 0.6
    )
    if structure == "dense":
        keep = torch.ones(32, 2560, dtype=torch.bool)
    elif structure == "one_lane":
        keep = (torch.arange(2560) % 64 // 16 == 1).expand(32, -1)
    elif structure == "turns":
        keep = (torch.arange(2560) % 64 // 16 == torch.arange(2560) // 640).expand(32, -1)
    weight = torch.ones(32, 2560, dtype=torch.bfloat16).masked_fill(~keep, 0.0)
    for splits in (1, 3):
        lanes = lanes_of(weight, splits)
        starts, chunks = lanes.starts.tolist(), 40
        for strip in range(2):
            for first, last in lane_stream.shares(chunks, splits):
                rows = [starts[strip * chunks + chunk] for chunk in range(first, last + 1)]
                for i in range(last - first):
                    arrived = -(-(rows[min(i + lanes.depth + 1, last - first)] - rows[0]) // 4) * 4  # by quads
                    oldest = max(0, rows[i] - rows[0] - lane_stream.LAG)
                    assert arrived - oldest <= lane_stream.RING
                    assert rows[i + 1] - rows[i] <= 16


def test_depth_follows_density() -> None:
    assert lanes_of(pruned(64, 2048, 0.1, dtype=torch.bfloat16), 1).depth == 8
    assert lanes_of(pruned(64, 2048, 1.0, dtype=torch.bfloat16), 1).depth == 4


def test_rows_are_reordered_where_that_saves_bytes() -> None:
    even = lanes_of(pruned(256, 2048, 0.5, dtype=torch.bfloat16), 1)
    assert torch.equal(even.row_order, torch.arange(256, dtype=torch.int32))
    weight = torch.randn(256, 2048).bfloat16().masked_fill(torch.rand(256, 2048) >= torch.rand(256, 1), 0.0)
    skewed = lanes_of(weight, 1)
    assert sorted(skewed.row_order.tolist()) == list(range(256))
    assert not torch.equal(skewed.row_order, torch.arange(256, dtype=torch.int32))
    values = int(weight.count_nonzero())
    assert skewed.values.numel() * 2 < 1.15 * values, "padding of more than 15 %"
    assert even.values.numel() * 2 < 1.12 * 256 * 2048 * 0.5


H200, A100, RTX4090 = (132, 232448), (108, 163 << 10), (128, 99 << 10)  # multiprocessors, shared bytes a block


@pytest.mark.parametrize(
    ("N", "K", "gpu", "expected", "why"),
    [
        (4096, 4096, H200, (6, 1), "two blocks of 6 warps fill a multiprocessor: nobody needs to meet"),
        (2048, 4096, H200, (12, 2), "a block a multiprocessor would have 8 warps, two have 12"),
        (1024, 4096, H200, (16, 2), "half of the multiprocessors would idle"),
        (1024, 8192, H200, (24, 4), "and here there is enough for twice the blocks"),
        (1024, 1024, H200, (4, 1), "shares as short as they may be: blocks would meet for nothing"),
        (16, 14336, H200, (56, 7), "one strip: as many as can have it"),
        (256, 256, H200, (1, 1), "a share must not be shorter"),
        (1024, 4096, A100, (12, 3), "8 warps fill a multiprocessor"),
        (1024, 4096, RTX4090, (10, 2), "5 warps do, which is also a block's most"),
    ],
)
def test_the_split_follows_shapes_and_gpu(
    N: int, K: int, gpu: tuple[int, int], expected: tuple[int, int], why: str
) -> None:
    assert lane_stream.choose_split(-(-N // 16), -(-K // 64), *gpu) == expected, why


@pytest.mark.parametrize("gpu", [H200, A100, RTX4090, (1, 99 << 10)])
def test_any_split_is_possible_and_long_enough(gpu: tuple[int, int]) -> None:
    for strips in (0, 1, 3, 48, 132, 133, 1000, 10**6):
        for chunks in (0, 1, 7, 8, 64, 500):
            splits, blocks = lane_stream.choose_split(strips, chunks, *gpu)
            assert 1 <= blocks <= lane_stream.MAX_BLOCKS
            assert splits % blocks == 0
            assert splits == 1 or chunks >= splits * lane_stream.MIN_SHARE
            warps = splits // blocks
            assert lane_stream.TABLE_BYTES + warps * lane_stream.WARP_BYTES <= gpu[1]
            assert warps <= lane_stream.MAX_WARPS


def test_a_packed_weight_is_split_so() -> None:
    packed = fasticl.pack(torch.ones(64, 4096, dtype=torch.bfloat16), "bitmap")
    lanes = to_lanes(packed, multiprocessors=H200[0], shared_bytes=H200[1])
    assert lanes.plan[:2] == [*lane_stream.choose_split(4, 64, *H200)] == [16, 2]
    assert to_lanes(packed, multiprocessors=1).plan[:2] == [3, 1]


def test_errors_name_expected_and_got() -> None:
    weight = torch.ones(16, 64)
    with pytest.raises(TypeError, match=r"expected values of dtype bfloat16 or float16, got torch\.float32"):
        to_lanes(fasticl.pack(weight, "bitmap"))
    with pytest.raises(ValueError, match="expected format bitmap, sliced or nm, got compact"):
        to_lanes(fasticl.pack(weight.half(), "compact"))
    for splits in (0, 9):
        with pytest.raises(ValueError, match=f"expected 1 to 8 splits, got {splits}"):
            to_lanes(fasticl.pack(weight.half(), "bitmap"), splits)
    for splits in (2, 25, 27):
        with pytest.raises(ValueError, match=f"expected 1 to 24 splits, divisible by the 3 blocks, got {splits}"):
            to_lanes(fasticl.pack(weight.half(), "bitmap"), splits, 3)
    for blocks in (0, 9):
        with pytest.raises(ValueError, match=f"expected 1 to 8 blocks, got {blocks}"):
            to_lanes(fasticl.pack(weight.half(), "bitmap"), 1, blocks)


def test_validate_sees_a_layout_that_is_not_the_weights() -> None:
    packed = fasticl.pack(pruned(20, 100, 0.5, dtype=torch.float16), "bitmap")
    lanes = to_lanes(packed)
    assert_validate_compares(packed, "lanes", lanes)
    with pytest.raises(ValueError, match=r"lanes\.depth: expected 8, got 4"):
        dataclasses.replace(packed, layouts=DeviceLayouts(dataclasses.replace(lanes, depth=4))).validate()
