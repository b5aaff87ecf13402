"""decoder_block's Triton kernels: parity with float64, attention split and merged, nothing out of bounds, no race."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linear_cases import ACTIVATIONS, DTYPES
from test_decoder_block import FORMS, SHAPES, Inputs, assert_right, make
from torch import Tensor
from triton_device import DEVICE

from fasticl.kernels import decoder_block as kernel
from fasticl.testing.interpreter import checked

# Beside those of the CPU's tests, all of one token but "tiles_of_sequences" and "long"; as there: B, d, H, G, D, L, m
MORE = {
    "rows_of_no_multiple": (1, 67, 3, 3, 5, 7, 41),
    "several_tiles": (1, 150, 2, 1, 24, 30, 140),
    "split": (1, 24, 6, 2, 12, 200, 20),
    "wide_heads": (1, 20, 4, 2, 130, 90, 12),
    "tiles_of_sequences": (33, 40, 2, 1, 8, 6, 24),
    "long": (2, 16, 3, 1, 8, 700, 8),
}
shapes = pytest.mark.parametrize("shape", [*SHAPES, *MORE])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows enough that the interpreter, which takes a millisecond for each step of each program, is done soon."""
    monkeypatch.setattr(kernel, "PROGRAMS", 1)
    monkeypatch.setattr(kernel, "MAX_ROWS", 16)


def launch(inputs: Inputs) -> Tensor:
    """Writes the caches of ``inputs`` as the op does."""
    flat = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in inputs.flat()]
    with checked():
        y = kernel.launch(*flat)
    inputs.keys.copy_(flat[1])
    inputs.values.copy_(flat[2])
    return y.cpu()


@dtypes
@shapes
def test_parity(shape: str, dtype: torch.dtype) -> None:
    """The form changes with shape and dtype: each dtype meets each, as does each kind of shape."""
    form = FORMS[([*SHAPES, *MORE].index(shape) + DTYPES.index(dtype)) % len(FORMS)]
    assert_right(launch, make({**SHAPES, **MORE}[shape], form, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_and_norms(activation: str | None) -> None:
    for B, form in ((1, "gpt2"), (2, "all"), (2, "gpt2")):
        inputs = make((B, 20, 2, 1, 8, 5, 12), form)
        weights = dataclasses.replace(inputs.weights, activation=activation, layer_norm=B == 1)
        assert_right(launch, inputs._replace(weights=weights))


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(
    ("programs", "rows", "tile", "split_programs", "splits"),
    [(512, 4, 16384, 256, 32), (10, 2, 1024, 1, 32), (4, 8, 2048, 5, 2)],
)
def test_programs_and_tiles_do_not_decide_the_result(
    programs: int, rows: int, tile: int, split_programs: int, splits: int, B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first are those of a GPU."""
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    monkeypatch.setattr(kernel, "MAX_ROWS", rows)
    monkeypatch.setattr(kernel, "TILE", tile)
    monkeypatch.setattr(kernel, "SPLIT_PROGRAMS", split_programs)
    monkeypatch.setattr(kernel, "MAX_SPLITS", splits)
    assert_right(launch, make((B, 36, 4, 2, 6, 150, 30), "all"))


@pytest.mark.parametrize("position", [0, 1, 63, 64, 65, 129, 255, 256, 299])
def test_every_way_of_splitting(position: int) -> None:
    """The token's own key is in the last split, alone in it or not; programs behind it do nothing."""
    inputs = make((1, 12, 4, 2, 6, 300, 8), "all")
    inputs.positions.fill_(position)
    for cache in inputs[2:4]:
        cache[:, :, :position] = torch.randn(1, 2, position, 6)
        cache[:, :, position:] = torch.nan
    assert_right(launch, inputs)


def test_the_same_bits_every_time() -> None:
    inputs = make((2, 20, 4, 2, 6, 400, 12), "all")
    expected = launch(inputs.clone())
    assert torch.equal(launch(inputs.clone()), expected)


def test_large_scores() -> None:
    """Whose softmax is all but one-hot, the largest in any split."""
    for B in (1, 3):
        inputs = make((B, 32, 4, 2, 16, 200, 20))
        weights = dataclasses.replace(inputs.weights, qkv=inputs.weights.qkv * 12)
        assert_right(launch, inputs._replace(weights=weights))


def test_scores_of_minus_infinity() -> None:
    """A whole split of them weighs nothing; a sequence that has no other score is NaN."""
    inputs = make((2, 16, 2, 1, 4, 200, 8), "gpt2")
    w = inputs.weights
    qkv_bias = w.qkv_bias.clone()
    qkv_bias[[0, 4]] = 1e20  # of both heads' first query dimension
    inputs = inputs._replace(weights=dataclasses.replace(w, qkv_bias=qkv_bias, qkv=w.qkv / 8))
    inputs.positions.fill_(199)
    for cache in inputs[2:4]:
        cache.copy_(torch.randn(cache.shape))
    inputs.keys[..., 0] = 0
    inputs.keys[0, :, 64:128, 0] = -1e20
    clean = inputs.clone()
    without = [torch.cat([cache[:, :, :64], cache[:, :, 128:]], 2) for cache in inputs[2:4]]
    result = launch(inputs)
    assert result.isfinite().all()
    alone = clean._replace(keys=without[0], values=without[1], positions=torch.full((2,), 135))
    # Of sequence 1 those positions count; sequence 0 has none of them.
    torch.testing.assert_close(result[0], launch(alone)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("B", [1, 3])
def test_a_position_out_of_range_gives_nan_and_writes_nothing(B: int) -> None:
    for position in (-1, 200):
        inputs = make((B, 24, 4, 2, 6, 200, 20), "all")
        clean = inputs.clone()
        inputs.positions[-1] = position
        result = launch(inputs)
        assert result.isnan().all(1).tolist() == [False] * (B - 1) + [True]
        assert torch.equal(inputs.keys[-1].isnan(), clean.keys[-1].isnan())
        assert torch.equal(inputs.keys[-1].nan_to_num(), clean.keys[-1].nan_to_num())
        assert torch.equal(result[:-1], launch(clean)[:-1])


def test_a_nan_stays_in_its_sequence() -> None:
    for which in ("x", "keys", "values"):
        inputs = make(SHAPES["equal_heads"])
        getattr(inputs, which)[0].view(-1)[0] = torch.nan  # of a token at the last position
        assert launch(inputs).isnan().any(1).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("B", [1, 4])
def test_strides(B: int) -> None:
    inputs = make((B, 40, 4, 2, 10, 80, 24), "all")
    expected = launch(kept := inputs.clone())
    strided = inputs.map(lambda t: torch.stack([t, t], -1)[..., 0])
    caches = torch.zeros(2, 2, B, 83, 10)[:, :, :, 3:]  # by heads, keys beside values, with room before
    keys, values = (cache.transpose(0, 1) for cache in caches)
    keys.copy_(inputs.keys)
    values.copy_(inputs.values)
    flat = strided._replace(keys=keys, values=values, positions=inputs.positions.int()).flat()
    tables = [t.contiguous().to(DEVICE) for t in inputs[5:]]
    on_device = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in flat]
    with checked():
        result = kernel.launch(*on_device[:4], *tables, *on_device[6:])
    assert torch.equal(result.cpu(), expected)
    for found, cache in zip(on_device[1:3], kept[2:4], strict=True):
        torch.testing.assert_close(found.cpu(), cache, rtol=0, atol=0, equal_nan=True)


def test_tf32_where_torch_allows_it() -> None:
    inputs = make(SHAPES["ragged"])
    exact = launch(inputs.clone())
    torch.set_float32_matmul_precision("high")
    try:
        result = launch(inputs.clone())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not torch.equal(result, exact)
    assert (result - exact).abs().max() < 0.02 * exact.abs().max()


def test_no_neurons_and_no_sequences() -> None:
    assert_right(launch, make((2, 18, 2, 1, 6, 5, 0), "all"))
    assert launch(make((0, 18, 2, 1, 6, 5, 4))).shape == (0, 18)
