"""fused_mlp's Triton kernels: in one pass, in two, and of packed weights, against float64."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close_to_truth
from linear_cases import ACTIVATIONS, DTYPES, double
from test_fused_mlp import MIXES, flattened, make, mlp
from torch import Tensor
from triton_device import DEVICE

from fasticl import PackedWeight
from fasticl.kernels import fused_mlp as kernel
from fasticl.testing.interpreter import checked

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
passes = pytest.mark.parametrize("one_pass", [True, False], ids=["one_pass", "two_passes"])


@pytest.fixture(autouse=True)
def _one_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums may be any share of the small weights here, or none."""
    if "one_pass" in request.fixturenames:
        monkeypatch.setattr(kernel, "ONE_PASS_SHARE", 1e9 if request.getfixturevalue("one_pass") else 0)


def tensors(weight: Tensor | PackedWeight) -> list[Tensor]:
    return [t.to(DEVICE) for t in flattened(weight)]


def assert_as_unfused(
    x: Tensor, kinds: tuple[str, str, str], H: int, N: int, activation: str | None, *, gated: bool, biased: bool = True
) -> None:
    dtype, K = x.dtype, x.shape[-1]
    (up, dense_up), (gate, dense_gate) = make(kinds[0], H, K, dtype), make(kinds[1], H, K, dtype)
    down, dense_down = make(kinds[2], N, H, dtype)
    biases = [torch.randn(size).to(dtype) if biased else None for size in (H, N, H)]
    if not gated:
        gate = dense_gate = biases[2] = None
    dense = (dense_up, dense_down, dense_gate)
    on_device = [None if b is None else b.to(DEVICE) for b in biases]
    with checked():
        result = kernel.launch(
            x.to(DEVICE), tensors(up), tensors(down), None if gate is None else tensors(gate), *on_device, activation
        )
    truth = mlp(x.double(), *map(double, dense), activation, *map(double, biases))
    assert_close_to_truth(result.cpu(), truth, mlp(x, *dense, activation, *biases))


@dtypes
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("M", [1, 5])
@passes
def test_dense_weights(one_pass: bool, M: int, gated: bool, dtype: torch.dtype) -> None:
    x = torch.randn(M, 72).to(dtype)
    assert_as_unfused(x, MIXES["all_dense"], 100, 45, "silu" if gated else "gelu", gated=gated)


@dtypes
@pytest.mark.parametrize("M", [17, 70])
def test_more_tokens_than_one_pass_takes(M: int, dtype: torch.dtype) -> None:
    assert_as_unfused(torch.randn(M, 40).to(dtype), MIXES["all_dense"], 70, 20, "relu", gated=True)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@passes
def test_activations_and_biases(one_pass: bool, activation: str | None) -> None:
    for biased in (False, True):
        assert_as_unfused(torch.randn(3, 20), MIXES["all_dense"], 40, 24, activation, gated=biased, biased=biased)


@pytest.mark.parametrize(
    ("K", "H", "N"),
    [
        pytest.param(1, 1, 1, id="all_one"),
        pytest.param(5, 7, 3, id="within_a_tile"),
        pytest.param(67, 129, 140, id="of_no_multiple"),
        pytest.param(20, 1030, 10, id="more_programs_than_are_summed_at_once"),
    ],
)
@passes
def test_shapes(one_pass: bool, K: int, H: int, N: int) -> None:
    assert_as_unfused(torch.randn(2, K), MIXES["all_dense"], H, N, "relu", gated=False)


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "all_dense" and "int8" not in mix])
def test_packed_weights(mix: str) -> None:
    for M, gated in ((1, True), (20, False)):
        assert_as_unfused(torch.randn(M, 40).bfloat16(), MIXES[mix], 60, 24, "silu", gated=gated)


@passes
def test_strides_and_batch_dimensions(one_pass: bool) -> None:
    x, up, down = (t.to(DEVICE) for t in (torch.randn(2, 3, 50), torch.randn(24, 36).T, torch.randn(12, 72)[:, ::2]))
    x = x[..., 1:25]
    arguments = ([down], None, None, None, None, "relu")
    result = kernel.launch(x, [up], *arguments)
    assert result.shape == (2, 3, 12)
    expected = kernel.launch(x.contiguous(), [up.contiguous()], [down.contiguous()], *arguments[1:])
    torch.testing.assert_close(result, expected)


@passes
def test_empty_sizes(one_pass: bool) -> None:
    bias = torch.randn(3).to(DEVICE)
    for M, K, H in ((2, 8, 0), (2, 0, 8), (0, 8, 8)):
        x, up, down = (torch.randn(*size).to(DEVICE) for size in ((M, K), (H, K), (3, H)))
        result = kernel.launch(x, [up], [down], None, None, bias, None, "silu")
        assert torch.equal(result, bias.expand(M, 3))


@passes
def test_a_nan_stays_in_its_token(one_pass: bool) -> None:
    x, up, down = torch.randn(4, 20), torch.rand(70, 20), torch.rand(9, 70)
    x[2, 7] = torch.nan
    result = kernel.launch(*(t.to(DEVICE) for t in (x,)), [up.to(DEVICE)], [down.to(DEVICE)], *[None] * 4, "relu")
    assert result.isnan().any(1).tolist() == [False, False, True, False]
    assert result[2].isnan().all()
