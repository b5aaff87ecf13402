"""attention_mlp: parity with float64, softmax at its edges, prompts of any length and layout, and every error."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import assert_close_to_truth, guarded
from torch import Tensor

import fasticl
from fasticl import _C
from fasticl.ops import _registry as registry
from fasticl.ops import attention_mlp
from fasticl.ops.attention_mlp import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # B, L, d, m
    "one_of_each": (1, 1, 1, 1),
    "below_one_vector": (9, 21, 5, 3),
    "whole_vectors": (4, 130, 32, 64),
    "paper": (24, 20, 60, 64),
    "headline_smaller": (33, 200, 64, 48),
    "few_prompts_as_rows": (8, 19, 20, 40),
    "last_panel_of_one_register": (9, 11, 20, 33),
    "last_panel_of_three_registers": (64 + 35, 6, 24, 40),
    "second_batch": (1024 + 3, 2, 16, 17),
    "long_prompt_in_chunks": (1, 3001, 20, 8),
    "chunks_of_few_prompts": (3, 1500, 40, 8),
    "two_tiles_of_columns": (20, 3, 150, 50),
    "rows_larger_than_a_block": (2, 9, 1030, 5),
}
MANY = {  # B, Q queries of each prompt, L, d, m
    "one_of_each": (1, 1, 1, 1, 1),
    "few_queries_as_rows": (3, 8, 21, 20, 6),
    "one_register_below_one_vector": (3, 9, 35, 5, 3),
    "two_registers": (2, 17, 40, 16, 64),
    "three_registers": (2, 37, 33, 60, 64),
    "whole_panel": (2, 64, 70, 64, 48),
    "panels_and_one_query": (3, 129, 20, 24, 17),
    "long_prompt_in_chunks": (1, 20, 3001, 20, 8),
    "second_batch_of_queries": (2, 1024 + 40, 3, 17, 5),
    "second_batch_of_prompts": (20, 100, 3, 16, 5),
    "rows_larger_than_a_block": (2, 20, 9, 1030, 5),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
shapes_of_many = pytest.mark.parametrize("shape", MANY.values(), ids=MANY)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

Inputs = list[Tensor]


def inputs(B: int, L: int, d: int, m: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """context, query, A, W, a with scores and activations of order one."""
    random = (torch.randn(B, L, d), torch.randn(B, d), torch.randn(d, d) / d, torch.randn(m, d) / d**0.5)
    return [x.to(dtype) for x in (*random, torch.randn(m))]


def many(B: int, Q: int, L: int, d: int, m: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """The same with Q queries of each prompt."""
    context, _, *weights = inputs(B, L, d, m, dtype)
    return [context, torch.randn(B, Q, d).to(dtype), *weights]


def pytorch(context: Tensor, query: Tensor, A: Tensor, W: Tensor, a: Tensor, lengths: Tensor | None = None) -> Tensor:
    """What one writes without this package, in the inputs' dtype."""
    if query.dim() == 3:
        return torch.stack([pytorch(context, q, A, W, a, lengths) for q in query.unbind(1)], 1)
    scores = torch.bmm(context, (query @ A.T).unsqueeze(2)).squeeze(2)
    if lengths is not None:
        scores = scores.masked_fill(torch.arange(context.shape[1]) >= lengths.unsqueeze(1), -torch.inf)
    mixed = torch.bmm(torch.softmax(scores, 1).unsqueeze(1), context).squeeze(1)
    return torch.relu(mixed @ W.T) @ a


def truth(tensors: Inputs, lengths: Tensor | None = None) -> Tensor:
    return reference(*(x.double() for x in tensors), lengths)


def assert_right(result: Tensor, tensors: Inputs, lengths: Tensor | None = None) -> None:
    assert_close_to_truth(result, truth(tensors, lengths), pytorch(*tensors, lengths))


def test_reference_is_the_formula() -> None:
    context, query, A, W, a = (x.double() for x in inputs(3, 4, 5, 6))
    lengths = torch.tensor([4, 1, 3])
    expected = []
    for P, q, length in zip(context, query, lengths.tolist(), strict=True):
        e = [torch.exp(p @ A @ q) for p in P[:length]]
        c = sum(w * p for w, p in zip(e, P, strict=False)) / sum(e)
        expected.append(sum(a_i * max(0.0, float(w @ c)) for a_i, w in zip(a.tolist(), W, strict=True)))
    torch.testing.assert_close(reference(context, query, A, W, a, lengths), torch.tensor(expected, dtype=torch.float64))


def test_reference_of_many_queries_is_that_of_each() -> None:
    context, query, *weights = (x.double() for x in many(3, 5, 4, 6, 7))
    lengths = torch.tensor([4, 1, 3])
    expected = [reference(context, query[:, j], *weights, lengths) for j in range(5)]
    torch.testing.assert_close(reference(context, query, *weights, lengths), torch.stack(expected, 1))


def assert_parity(draw: Callable[[], Inputs], results: int) -> None:
    """Of drawn arguments, with at least 16 results together: of a few PyTorch may have all right by chance."""
    drawn = [draw() for _ in range(-(-16 // results))]
    parts = [(attention_mlp(*each), truth(each[:5], *each[5:]), pytorch(*each)) for each in drawn]
    assert_close_to_truth(*map(torch.cat, zip(*parts, strict=True)))


@dtypes
@shapes
def test_parity(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_parity(lambda: inputs(*shape, dtype), shape[0])


@dtypes
@shapes
def test_parity_with_lengths(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    lengths = torch.randint(1, shape[1] + 1, shape[:1])
    lengths[0], lengths[-1] = 1, shape[1]
    assert_parity(lambda: [*inputs(*shape, dtype), lengths], shape[0])


@dtypes
@shapes_of_many
def test_parity_of_many_queries(isa: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    lengths = torch.randint(1, shape[2] + 1, shape[:1])
    lengths[: shape[0] // 2] = 1  # not all, as then no query matters
    assert_parity(lambda: many(*shape, dtype), shape[0] * shape[1])
    assert_parity(lambda: [*many(*shape, dtype), lengths], shape[0] * shape[1])


def test_one_query_is_the_same_in_either_shape(isa: str) -> None:
    context, query, *weights = inputs(5, 30, 20, 10)
    result = attention_mlp(context, query.unsqueeze(1), *weights)
    assert torch.equal(result, attention_mlp(context, query, *weights).unsqueeze(1))


@pytest.mark.parametrize("shape", [(70, 90, 20, 40), (3, 1500, 40, 100), (1, 9000, 24, 8), (130, 2, 64, 200)], ids=str)
def test_threads_do_not_change_a_bit(isa: str, shape: tuple[int, int, int, int]) -> None:
    """Each shape has work for four threads; a long prompt is shared by them."""
    lengths = torch.randint(1, shape[1] + 1, shape[:1])
    for tensors in (inputs(*shape), many(shape[0], 65, *shape[1:])):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.stack([attention_mlp(*tensors), attention_mlp(*tensors, lengths)]))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        assert_right(results[2][0], tensors)


@pytest.mark.parametrize("Q", [None, 5, 20])
def test_what_lies_behind_a_prompt_is_not_read(isa: str, Q: int | None) -> None:
    context, *others = inputs(7, 50, 20, 30) if Q is None else many(7, Q, 50, 20, 30)
    lengths = torch.tensor([1, 50, 16, 17, 33, 2, 49])
    expected = attention_mlp(context, *others, lengths)
    for b, length in enumerate(lengths.tolist()):
        context[b, length:] = torch.nan
    assert torch.equal(attention_mlp(context, *others, lengths), expected)
    assert torch.equal(attention_mlp(context, *others, lengths.repeat_interleave(2)[::2]), expected)
    assert_close_to_truth(reference(context, *others, lengths), truth([context, *others], lengths), expected)


# ---- softmax at its edges ----------------------------------------------------------------------------------


@dtypes
def test_large_scores(isa: str, dtype: torch.dtype) -> None:
    """Scores up to about 1e4 in size, far beyond the range of exp."""
    context, query, _, W, a = inputs(40, 150, 24, 30, dtype)
    tensors = [context, query * 40, torch.eye(24).to(dtype) * 50, W, a]
    together = [context[:1], tensors[1].unsqueeze(0), *tensors[2:]]  # the queries to one prompt
    largest = torch.bmm(context.float(), (tensors[1].float() @ tensors[2].float().T).unsqueeze(2)).abs().max()
    assert 5e3 < largest < 6e4
    assert_right(attention_mlp(*tensors), tensors)
    assert_right(attention_mlp(*together), together)


def test_equal_scores_average(isa: str) -> None:
    context, query, A, W, a = inputs(6, 77, 20, 30)
    assert_right(attention_mlp(context, query, A * 0, W, a), [context, query, A * 0, W, a])
    expected = torch.relu(context.double().mean(1) @ W.double().T) @ a.double()
    torch.testing.assert_close(attention_mlp(context, query, A * 0, W, a), expected.float())


@pytest.mark.parametrize("first", [0, 1, 128, 1500], ids=lambda n: f"from_row_{n}")
def test_scores_of_minus_infinity(isa: str, first: int) -> None:
    """Rows whose score overflows to -inf weigh nothing, even where they fill whole blocks or chunks of a prompt."""
    context, query, _, W, a = inputs(2, 2000, 16, 20)
    A = torch.eye(16)
    query[:, 0] = 1e20
    context[:, :, 0] = 0
    context[:, first : first + 400, 0] = -1e20
    result = attention_mlp(context, query, A, W, a)
    rest = torch.cat([context[:, :first], context[:, first + 400 :]], dim=1)
    assert_right(result, [rest, query, A, W, a])
    queries = query.unsqueeze(1) * torch.cat([torch.ones(20, 1), torch.linspace(-1, 1, 20 * 15).view(20, 15)], 1)
    assert_right(attention_mlp(context, queries, A, W, a), [rest, queries, A, W, a])


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_special_values_reach_their_prompt_only(isa: str, value: float) -> None:
    """As in PyTorch: an infinite or NaN element makes F of its prompt NaN; a length that ends before it saves it."""
    tensors = inputs(5, 300, 20, 30)
    clean = attention_mlp(*tensors)
    tensors[0][1, 0, 3] = value
    tensors[0][3, 299, 19] = value
    result = attention_mlp(*tensors)
    expected = pytorch(*tensors)
    assert expected.isnan().any()
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result[[0, 2, 4]], clean[[0, 2, 4]])
    saved = attention_mlp(*tensors, torch.tensor([300, 300, 300, 299, 300]))
    assert saved[3].isfinite()


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_special_values_reach_their_prompt_and_query_only(isa: str, value: float) -> None:
    tensors = many(3, 20, 70, 20, 30)
    clean = attention_mlp(*tensors)
    tensors[0][1, 69, 3] = value
    tensors[1][2, 4, 0] = value
    special = torch.zeros(3, 20, dtype=torch.bool)
    special[1] = special[2, 4] = True
    for result in (attention_mlp(*tensors), reference(*tensors, None)):
        assert torch.equal(result.isnan(), special)
    assert torch.equal(attention_mlp(*tensors)[~special], clean[~special])
    assert attention_mlp(*tensors, torch.tensor([70, 69, 70]))[1].isfinite().all()


@pytest.mark.parametrize("name", ["query", "A", "W", "a"])
@pytest.mark.parametrize("B", [3, 20])
def test_nan_in_other_inputs_propagates(isa: str, name: str, B: int) -> None:
    tensors = dict(zip(("context", "query", "A", "W", "a"), inputs(B, 30, 20, 10), strict=True))
    tensors["a"].fill_(1.0)
    tensors["context"] += 1  # some neuron of each prompt is active
    tensors["W"].abs_()
    tensors[name].view(-1)[0] = torch.nan
    result = attention_mlp(*tensors.values())
    assert result.isnan().tolist() == [b == 0 or name != "query" for b in range(B)]


def test_scores_that_are_all_minus_infinity_give_nan(isa: str) -> None:
    context, query, _, W, a = inputs(2, 40, 16, 20)
    context[0, :, 0], query[0, 0] = -1e20, 1e20
    result = attention_mlp(context, query, torch.eye(16), W, a)
    assert result.isnan().tolist() == [True, False]
    queries = torch.randn(2, 20, 16)
    queries[0, 3, 0] = 1e20
    queries[:, :3, 0] = queries[:, 4:, 0] = 0
    result = attention_mlp(context, queries, torch.eye(16), W, a)
    assert result.isnan().nonzero().tolist() == [[0, 3]]


# ---- sizes, layouts, memory --------------------------------------------------------------------------------


def test_no_prompts_and_no_neurons(isa: str) -> None:
    assert attention_mlp(*inputs(0, 4, 5, 6)).shape == (0,)
    assert attention_mlp(*inputs(0, 4, 5, 6), torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert attention_mlp(*many(0, 3, 4, 5, 6)).shape == (0, 3)
    assert attention_mlp(*many(3, 0, 4, 5, 6)).shape == (3, 0)
    assert torch.equal(attention_mlp(*many(2, 20, 4, 5, 0)), torch.zeros(2, 20))
    assert torch.equal(attention_mlp(*inputs(7, 4, 5, 0)), torch.zeros(7))
    assert torch.equal(attention_mlp(*inputs(7, 4, 0, 3)), torch.zeros(7))


def strided_last(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def strided_rows(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2]


@dtypes
@pytest.mark.parametrize("view", [strided_last, strided_rows])
@pytest.mark.parametrize("d", [5, 40])
def test_strided_inputs(isa: str, view: Callable[[Tensor], Tensor], d: int, dtype: torch.dtype) -> None:
    for tensors in (inputs(6, 30, d, 20, dtype), many(2, 20, 30, d, 20, dtype)):
        views = [view(x) for x in tensors]
        assert not views[0].is_contiguous()
        assert torch.equal(attention_mlp(*views), attention_mlp(*tensors))


def test_other_views(isa: str) -> None:
    context, query, A, W, a = inputs(6, 30, 40, 20)
    expected = attention_mlp(context, query, A, W, a)
    assert torch.equal(attention_mlp(context.transpose(0, 1).contiguous().transpose(0, 1), query, A, W, a), expected)
    assert torch.equal(attention_mlp(context, query, A.T.contiguous().T, W.T.contiguous().T, a), expected)
    one = context[:1].expand(6, 30, 40), query[:1].expand(6, 40)
    torch.testing.assert_close(attention_mlp(*one, A, W, a), expected[:1].expand(6))
    windows = context[0].view(-1)[:600].unfold(0, 40, 8).unsqueeze(0)  # rows that overlap
    assert torch.equal(attention_mlp(windows, query[:1], A, W, a), attention_mlp(windows.clone(), query[:1], A, W, a))
    queries = torch.randn(20, 6, 40)
    expected = attention_mlp(context, queries.transpose(0, 1).contiguous(), A, W, a)
    assert torch.equal(attention_mlp(context, queries.transpose(0, 1), A, W, a), expected)


@dtypes
@pytest.mark.parametrize(("B", "Q", "d"), list(itertools.product([1, 3, 19], [1, 18], [3, 16, 20, 60])))
def test_stays_within_its_memory(isa: str, B: int, Q: int, d: int, dtype: torch.dtype) -> None:
    """Inputs and output lie misaligned between guards: a value read there is NaN, one written is seen."""
    tensors = many(B, Q, 21, d, 18, dtype)
    expected = attention_mlp(*tensors)
    guards = [guarded(x, shift=1) for x in (*tensors, torch.full((B, Q), torch.nan, dtype=dtype))]
    context, query, A, W, a, out = (x for x, _ in guards)
    _C.attention_mlp(
        context.data_ptr(), B, 21, d, 21 * d, d, query.data_ptr(), Q, d, A.data_ptr(), d, W.data_ptr(), 18, d,
        a.data_ptr(), 0, out.data_ptr(), registry.DTYPES[dtype], 2,
    )  # fmt: skip
    for _, check in guards:
        check()
    assert torch.equal(out, expected)


# ---- PyTorch -----------------------------------------------------------------------------------------------


def test_float64_runs_the_reference() -> None:
    tensors = inputs(3, 7, 5, 4, torch.float64)
    assert torch.equal(attention_mlp(*tensors), reference(*tensors, None))
    assert fasticl.implementations()["attention_mlp"]["cpu"].startswith("C++")


def test_gradients_are_those_of_the_reference() -> None:
    tensors, lengths = inputs(3, 7, 5, 4, torch.float64), torch.tensor([7, 1, 3])
    for x in tensors:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: attention_mlp(*x, lengths), tensors)
    tensors = [x.detach().float().requires_grad_() for x in tensors]
    ours = torch.autograd.grad(attention_mlp(*tensors, lengths).sum(), tensors)
    expected = torch.autograd.grad(reference(*tensors, lengths).sum(), tensors)
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    with torch.no_grad():
        assert not attention_mlp(*tensors).requires_grad
    tensors = [x.double().requires_grad_() for x in many(3, 2, 7, 5, 4)]
    assert torch.autograd.gradcheck(lambda *x: attention_mlp(*x, lengths), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    for tensors in (inputs(3, 7, 5, 4, dtype), many(3, 10, 7, 5, 4, dtype)):
        torch.library.opcheck(torch.ops.fasticl.attention_mlp.default, (*tensors, None))
        torch.library.opcheck(torch.ops.fasticl.attention_mlp.default, (*tensors, torch.tensor([7, 1, 3])))


def test_compile() -> None:
    compiled = torch.compile(lambda *x: attention_mlp(*x) * 2, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([7, 1, 3])
    for tensors in (many(3, 10, 7, 5, 4), inputs(3, 7, 5, 4)):
        assert torch.equal(compiled(*tensors), attention_mlp(*tensors) * 2)
        assert torch.equal(compiled(*tensors, lengths), attention_mlp(*tensors, lengths) * 2)
    with pytest.raises(ValueError, match=r"lengths: expected in \[1, 7\], got 8"):
        compiled(*tensors, lengths + 1)


@pytest.mark.parametrize(
    ("position", "wrong", "error", "message"),
    [
        (0, [1.0], TypeError, "context: expected a torch.Tensor, got list"),
        (
            0,
            torch.zeros(3, 7, 5, dtype=torch.int32),
            TypeError,
            "context: expected a floating-point dtype, got torch.int32",
        ),
        (0, torch.zeros(7, 5), ValueError, r"context: expected shape \[B, L, d\], got \[7, 5\]"),
        (0, torch.zeros(3, 0, 5), ValueError, r"context: expected at least one column, got shape \[3, 0, 5\]"),
        (1, None, TypeError, "query: expected a torch.Tensor, got NoneType"),
        (1, torch.zeros(4, 5), ValueError, r"query: expected shape \[3, 5\], got \[4, 5\]"),
        (1, torch.zeros(3, 2, 6), ValueError, r"query: expected shape \[3, 2, 5\], got \[3, 2, 6\]"),
        (1, torch.zeros(1, 2, 5), ValueError, r"query: expected shape \[3, 2, 5\], got \[1, 2, 5\]"),
        (1, torch.zeros(3, 1, 2, 5), ValueError, r"query: expected shape \[3, 5\], got \[3, 1, 2, 5\]"),
        (1, torch.zeros(3, 5).half(), TypeError, "query: expected dtype torch.float32, got torch.float16"),
        (1, torch.zeros(3, 5, device="meta"), ValueError, "query: expected on cpu like the first argument, got meta"),
        (2, torch.eye(5).to_sparse(), TypeError, r"A: expected a dense \(torch.strided\) tensor, got torch.sparse_coo"),
        (2, torch.zeros(5, 6), ValueError, r"A: expected shape \[5, 5\], got \[5, 6\]"),
        (2, torch.zeros(5, 5).double(), TypeError, "A: expected dtype torch.float32, got torch.float64"),
        (3, torch.zeros(4, 6), ValueError, r"W: expected shape \[4, 5\], got \[4, 6\]"),
        (3, torch.zeros(5), ValueError, r"W: expected shape \[5, 5\], got \[5\]"),
        (3, "W", TypeError, "W: expected a torch.Tensor, got str"),
        (4, torch.zeros(5), ValueError, r"a: expected shape \[4\], got \[5\]"),
        (4, torch.zeros(4, 1), ValueError, r"a: expected shape \[4\], got \[4, 1\]"),
        (5, torch.ones(3), TypeError, "lengths: expected dtype torch.int64, got torch.float32"),
        (5, torch.ones(2, dtype=torch.int64), ValueError, r"lengths: expected shape \[3\], got \[2\]"),
        (5, torch.tensor([1, 0, 2]), ValueError, r"lengths: expected in \[1, 7\], got 0"),
        (5, torch.tensor([1, 8, 2]), ValueError, r"lengths: expected in \[1, 7\], got 8"),
        (5, [7, 7, 7], TypeError, "lengths: expected a torch.Tensor, got list"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
@pytest.mark.parametrize("gradients", [False, True], ids=["kernel", "reference"])
def test_errors(position: int, wrong: object, error: type[Exception], message: str, gradients: bool) -> None:
    arguments: list[object] = [*inputs(3, 7, 5, 4), None]
    arguments[2].requires_grad_(gradients)  # type: ignore[union-attr]
    arguments[position] = wrong
    with pytest.raises(error, match=f"attention_mlp: {message}"):
        attention_mlp(*arguments)  # type: ignore[arg-type]
