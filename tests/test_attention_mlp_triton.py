"""attention_mlp's Triton kernels: parity with float64 on both paths, softmax at its edges, nothing out of bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_close_to_truth
from test_attention_mlp import DTYPES, Inputs, inputs, many, pytorch, strided_last, strided_rows, truth
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
MANY = {  # B, Q queries of each prompt, L, d, m
    "one_of_each": (1, 1, 1, 1, 1),
    "two_queries": (3, 2, 5, 5, 3),
    "paper": (2, 20, 20, 60, 64),
    "tiles_of_queries": (2, 70, 40, 64, 20),
    "several_tiles_of_a_prompt": (2, 17, 150, 24, 10),
    "d_in_wide_tiles": (1, 33, 20, 200, 10),
    "unaligned": (2, 5, 33, 61, 10),
    "too_wide_for_a_tile": (2, 3, 9, 260, 10),
    "split_in_two": (2, 18, 515, 20, 30),
    "no_neurons": (2, 18, 4, 5, 0),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
shapes_of_many = pytest.mark.parametrize("shape", MANY.values(), ids=MANY)
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


@dtypes
@shapes_of_many
def test_parity_of_many_queries(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    tensors = many(*shape, dtype)
    assert_right(launch(tensors), tensors)
    lengths = torch.randint(1, shape[2] + 1, shape[:1])
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
    lengths = torch.tensor([300, 1])
    for tensors in (inputs(2, 300, 40, 20), many(2, 3, 300, 40, 20)):
        for rows in (1, 16, 100, 400):
            monkeypatch.setattr(kernel, "SPLIT_ROWS", rows)
            assert_right(launch(tensors), tensors)
            assert_right(launch(tensors, lengths), tensors, lengths)


@pytest.mark.parametrize(
    "tensors", [lambda: inputs(3, 6, 260, 70), lambda: many(2, 20, 40, 60, 70)], ids=["one", "many"]
)
def test_tf32_where_torch_allows_it(tensors: Callable[[], Inputs]) -> None:
    """Products of a 10-bit mantissa: worse than float32, no worse than of inputs that were rounded to it."""
    tensors = tensors()
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
    together = [context[:1], tensors[1].unsqueeze(0), *tensors[2:]]  # the queries to one prompt
    for _ in both_paths(monkeypatch):
        assert_right(launch(tensors), tensors)
        assert_right(launch(together), together)


@dtypes
def test_tiles_of_queries_round_neither_keys_nor_weights(dtype: torch.dtype) -> None:
    """Two columns whose scores, 256 + x and 256, and weights differ by less than half precision can tell apart."""
    x = 1.5 * 2**-8
    context = torch.tensor([[1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    query, A = torch.tensor([256.0, x, 0.0]), torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    W, a = torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1)
    result = launch([t.to(dtype) for t in (context[None], query.expand(1, 2, 3), A, W, a)])
    expected = torch.full((1, 2), x / 2, dtype=torch.float64).tanh()
    torch.testing.assert_close(result.double(), expected, rtol=max(1e-4, torch.finfo(dtype).eps), atol=0)


def test_a_key_beyond_the_range_of_float16() -> None:
    """Of a query in float16; PyTorch's own scores overflow there."""
    context, query, _, W, a = many(2, 3, 40, 24, 30, torch.float16)
    tensors = [context / 4096, query * 400, torch.eye(24).half() * 1000, W * 4096, a]
    assert (tensors[1].float() * 1000).abs().max() > 65504
    result, expected = launch(tensors), truth(tensors)
    assert (result.double() - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("first", [0, 1, 100])
def test_scores_of_minus_infinity(first: int, monkeypatch) -> None:
    context, query, _, W, a = inputs(2, 200, 16, 20)
    A = torch.eye(16)
    query[:, 0] = 1e20
    context[:, :, 0] = 0
    context[:, first : first + 100, 0] = -1e20
    rest = torch.cat([context[:, :first], context[:, first + 100 :]], dim=1)
    queries = query.unsqueeze(1).repeat(1, 3, 1)
    for _ in both_paths(monkeypatch):
        assert_right(launch([context, query, A, W, a]), [rest, query, A, W, a])
        assert_right(launch([context, queries, A, W, a]), [rest, queries, A, W, a])


def test_scores_that_are_all_minus_infinity_give_nan(monkeypatch) -> None:
    context, query, _, W, a = inputs(2, 80, 16, 20)
    context[0, :, 0], query[0, 0] = -1e20, 1e20
    for _ in both_paths(monkeypatch):
        assert launch([context, query, torch.eye(16), W, a]).isnan().tolist() == [True, False]
        queries = torch.stack([query, query * 0], 1)
        assert launch([context, queries, torch.eye(16), W, a]).isnan().tolist() == [[True, False], [False, False]]


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


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_special_values_reach_their_prompt_and_query_only(value: float, monkeypatch) -> None:
    for _ in both_paths(monkeypatch):
        tensors = many(3, 20, 90, 20, 30)
        clean = launch(tensors)
        tensors[0][1, 89, 3] = tensors[1][2, 4, 0] = value
        special = torch.zeros(3, 20, dtype=torch.bool)
        special[1] = special[2, 4] = True
        result = launch(tensors)
        assert torch.equal(result.isnan(), special)
        assert torch.equal(result[~special], clean[~special])
        assert launch(tensors, torch.tensor([90, 89, 90]))[1].isfinite().all()


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


@pytest.mark.parametrize("view", [strided_last, strided_rows, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)])
def test_strides_of_many_queries(view) -> None:
    tensors = many(3, 17, 30, 20, 20)
    context, query, *weights = (x.to(DEVICE) for x in tensors)
    assert_right(kernel.launch(view(context), view(query), *weights, None).cpu(), tensors)


@pytest.mark.parametrize("Q", [None, 3])
def test_what_lies_behind_a_prompt_is_not_read(Q: int | None) -> None:
    tensors, lengths = inputs(4, 50, 20, 30) if Q is None else many(4, Q, 50, 20, 30), torch.tensor([1, 50, 16, 33])
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
    expected = torch.tensor([True, True, False, True, True])
    assert torch.equal(launch(tensors, lengths).isnan(), expected)
    assert torch.equal(launch(many(5, 3, 40, 20, 30), lengths).isnan(), expected.unsqueeze(1).expand(5, 3))


def test_no_prompts_and_no_queries() -> None:
    assert launch(inputs(0, 4, 5, 6)).shape == (0,)
    assert launch(many(0, 3, 4, 5, 6)).shape == (0, 3)
    assert launch(many(3, 0, 4, 5, 6)).shape == (3, 0)
