"""attention_mlp's Triton kernels: parity with float64 on both paths, softmax at its edges, nothing out of bounds."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close_to_truth
from test_attention_mlp import DTYPES, Inputs, inputs, pytorch, strided_last, strided_rows, truth
from torch import Tensor
from triton_device import DEVICE

from fasticl.kernels import attention_mlp as kernel
from fasticl.testing.interpreter import checked

# B, L, d, m; small, since the interpreter takes a millisecond for each step of each program
SHAPES = {
    "one_of_each": (1, 1, 1, 1),
    "below_one_tile": (3, 5, 5, 3),
    "paper": (4, 20, 60, 64),
    "d_a_power_of_two": (2, 130, 64, 48),
    "several_tiles_of_a_prompt": (2, 200, 24, 20),
    "several_tiles_of_neurons": (2, 9, 100, 75),
    "d_in_several_steps": (2, 9, 200, 10),
    "no_neurons": (3, 4, 5, 0),
    "widest_in_one_launch": (2, 5, 256, 9),
    "too_wide_for_one_launch": (3, 6, 260, 40),
    "wide_rows_with_more_warps": (2, 3, 1030, 5),
    "split_in_two": (2, 515, 20, 30),
    "split_in_many": (2, 1300, 40, 100),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def launch(tensors: Inputs, lengths: Tensor | None = None) -> Tensor:
    on_device = [x.to(DEVICE) for x in tensors]
    on_device_lengths = None if lengths is None else lengths.to(DEVICE)
    with checked():
        return kernel.launch(*on_device, on_device_lengths).cpu()


def assert_right(result: Tensor, tensors: Inputs, lengths: Tensor | None = None) -> None:
    assert_close_to_truth(result, truth(tensors, lengths), pytorch(*tensors, lengths))


@dtypes
@shapes
def test_parity(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tensors = inputs(*shape, dtype)
    assert_right(launch(tensors), tensors)
    lengths = torch.randint(1, shape[1] + 1, shape[:1])
    lengths[0] = 1
    assert_right(launch(tensors, lengths), tensors, lengths)


@pytest.mark.parametrize("shape", [(20, 9, 30, 20), (67, 3, 17, 70)], ids=str)
@dtypes
def test_batches_in_three_launches(shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch) -> None:
    """As where A and W are too large to be read again for each prompt."""
    monkeypatch.setattr(kernel, "REREAD_BYTES", 0)
    tensors, lengths = inputs(*shape, dtype), torch.randint(1, shape[1] + 1, shape[:1])
    assert_right(launch(tensors), tensors)
    assert_right(launch(tensors, lengths), tensors, lengths)


def test_the_way_of_splitting_does_not_decide_the_result(monkeypatch) -> None:
    tensors, lengths = inputs(2, 300, 40, 20), torch.tensor([300, 1])
    for rows in (1, 16, 100, 400):
        monkeypatch.setattr(kernel, "SPLIT_ROWS", rows)
        assert_right(launch(tensors), tensors)
        assert_right(launch(tensors, lengths), tensors, lengths)


def test_tf32_where_torch_allows_it() -> None:
    """Products of a 10-bit mantissa: worse than float32, no worse than of inputs that were rounded to it."""
    tensors = inputs(3, 6, 260, 70)
    exact = launch(tensors)
    torch.set_float32_matmul_precision("high")
    try:
        result = launch(tensors)
    finally:
        torch.set_float32_matmul_precision("highest")
    rounded = [x.bfloat16().float() for x in tensors]
    assert not torch.equal(result, exact)
    assert_close_to_truth(result, truth(tensors), pytorch(*rounded))


def both_paths(monkeypatch):
    for rows in (kernel.SPLIT_ROWS, 32):
        monkeypatch.setattr(kernel, "SPLIT_ROWS", rows)
        yield


@dtypes
def test_large_scores(dtype: torch.dtype, monkeypatch) -> None:
    context, query, _, W, a = inputs(6, 100, 24, 30, dtype)
    tensors = [context, query * 40, torch.eye(24).to(dtype) * 50, W, a]
    for _ in both_paths(monkeypatch):
        assert_right(launch(tensors), tensors)


@pytest.mark.parametrize("first", [0, 1, 100])
def test_scores_of_minus_infinity(first: int, monkeypatch) -> None:
    context, query, _, W, a = inputs(2, 200, 16, 20)
    A = torch.eye(16)
    query[:, 0] = 1e20
    context[:, :, 0] = 0
    context[:, first : first + 100, 0] = -1e20
    rest = torch.cat([context[:, :first], context[:, first + 100 :]], dim=1)
    for _ in both_paths(monkeypatch):
        assert_right(launch([context, query, A, W, a]), [rest, query, A, W, a])


def test_scores_that_are_all_minus_infinity_give_nan(monkeypatch) -> None:
    context, query, _, W, a = inputs(2, 80, 16, 20)
    context[0, :, 0], query[0, 0] = -1e20, 1e20
    for _ in both_paths(monkeypatch):
        assert launch([context, query, torch.eye(16), W, a]).isnan().tolist() == [True, False]


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_special_values_reach_their_prompt_only(value: float, monkeypatch) -> None:
    tensors = inputs(3, 90, 20, 30)
    lengths = torch.tensor([90, 90, 89])
    for _ in both_paths(monkeypatch):
        clean = launch(tensors)
        special = [x.clone() for x in tensors]
        special[0][1, 0, 3] = special[0][2, 89, 19] = value
        result = launch(special)
        assert result.isnan().tolist() == [False, True, True]
        assert result[0] == clean[0]
        assert launch(special, lengths)[2].isfinite()


@pytest.mark.parametrize("name", ["query", "A", "W", "a"])
def test_nan_in_other_inputs_propagates(name: str, monkeypatch) -> None:
    tensors = dict(zip(("context", "query", "A", "W", "a"), inputs(3, 40, 20, 10), strict=True))
    tensors["a"].fill_(1.0)
    tensors["context"] += 1  # some neuron of each prompt is active
    tensors["W"].abs_()
    tensors[name].view(-1)[0] = torch.nan
    for _ in both_paths(monkeypatch):
        assert launch(list(tensors.values())).isnan().tolist() == [b == 0 or name != "query" for b in range(3)]


@pytest.mark.parametrize("shape", [(3, 30, 20, 20), (3, 6, 260, 20)], ids=["one_launch", "three"])
@pytest.mark.parametrize("view", [strided_last, strided_rows])
def test_strides(view, shape: tuple[int, int, int, int]) -> None:
    tensors = inputs(*shape)
    on_device = [view(x.to(DEVICE)) for x in tensors]
    assert not on_device[0].is_contiguous()
    assert_right(kernel.launch(*on_device, None).cpu(), tensors)
    context, *others = (x.to(DEVICE) for x in tensors)
    shared = context[:1].expand_as(context)  # many queries of one prompt
    assert torch.equal(kernel.launch(shared, *others, None), kernel.launch(shared.clone(), *others, None))


def test_what_lies_behind_a_prompt_is_not_read() -> None:
    tensors, lengths = inputs(4, 50, 20, 30), torch.tensor([1, 50, 16, 33])
    expected = launch(tensors, lengths)
    for b, length in enumerate(lengths.tolist()):
        tensors[0][b, length:] = torch.nan
    assert torch.equal(launch(tensors, lengths), expected)
    assert torch.equal(launch(tensors, lengths.repeat_interleave(2)[::2]), expected)


@pytest.mark.parametrize("split_rows", [16, 256])
def test_a_length_out_of_range_gives_nan(split_rows: int, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "SPLIT_ROWS", split_rows)
    tensors = inputs(5, 40, 20, 30)
    lengths = torch.tensor([0, 41, 40, -1, 2**32 + 1])
    assert launch(tensors, lengths).isnan().tolist() == [True, True, False, True, True]


def test_no_prompts() -> None:
    assert launch(inputs(0, 4, 5, 6)).shape == (0,)
