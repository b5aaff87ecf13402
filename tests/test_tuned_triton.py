"""Values that a tuned table may have compute what PyTorch does: the least and the largest of every setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton_device import DEVICE

import fasticl
from fasticl import ops, tuned
from fasticl.kernels import attention_mlp, bitmap_linear, fused_mlp, nm_linear, sliced_linear

LAUNCH = {
    "bitmap_linear": bitmap_linear.launch, "nm_linear": nm_linear.launch, "sliced_linear": sliced_linear.launch,
}  # fmt: skip


def extremes(op: str, end: int) -> dict[str, object]:
    return {name: values[end] for name, values in tuned.SPACE[op].items()}


@contextmanager
def forced(op: str, config: dict[str, object]) -> Iterator[None]:
    """Skips what is compiled and does not fit; the tuner passes it over."""
    try:
        with tuned.forced(op, config):
            yield
    except OutOfResources as error:
        pytest.skip(str(error))


def same(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end", [0, -1], ids=["least", "largest"])
@pytest.mark.parametrize(
    ("op", "M"),
    [("bitmap_linear", 1), ("bitmap_linear", 17), ("nm_linear", 1), ("nm_linear", 3), ("sliced_linear", 3)],
)
def test_packed_linears(op: str, M: int, end: int) -> None:
    N, K = 40, 72
    weight = torch.randn(N, K)
    if op == "nm_linear":
        weight.view(N, -1, 4).scatter_(2, weight.view(N, -1, 4).abs().argsort(2)[..., :2], 0)
    else:
        weight[torch.rand(N, K) < 0.6] = 0
    packed = fasticl.pack(weight, op.removesuffix("_linear")).to(DEVICE)
    operands = [packed.values, packed.bitmask, *([] if op == "nm_linear" else [packed.row_offsets])]
    operands += [] if packed.sliced is None else vars(packed.sliced).values()
    x = torch.randn(M, K)
    config = extremes(op, end)
    if M > 1 and "BLOCK_N" in config:
        config["BLOCK_N"] = max(16, config["BLOCK_N"])  # tl.dot takes no fewer rows; the compiler refuses them
    with forced(op, config):
        y = LAUNCH[op](x.to(DEVICE), *operands, None, None)
    same(y, x @ weight.T)


@pytest.mark.parametrize("end", [0, -1], ids=["least", "largest"])
@pytest.mark.parametrize("M", [1, 17])
def test_fused_mlp(M: int, end: int) -> None:
    x, up, down = torch.randn(M, 72), torch.randn(40, 72) / 8, torch.randn(24, 40) / 6
    with forced("fused_mlp", extremes("fused_mlp", end)):
        y = fused_mlp.launch(x.to(DEVICE), [up.to(DEVICE)], [down.to(DEVICE)], None, None, None, None, "relu")
    same(y, torch.relu(x @ up.T) @ down.T)


@pytest.mark.parametrize("end", [0, -1], ids=["least", "largest"])
def test_attention_mlp(end: int) -> None:
    tensors = [torch.randn(2, 70, 24), torch.randn(2, 24), torch.randn(24, 24) / 24, torch.randn(9, 24), torch.randn(9)]
    with forced("attention_mlp", extremes("attention_mlp", end)):
        y = attention_mlp.launch(*(tensor.to(DEVICE) for tensor in tensors), None)
    same(y, ops.attention_mlp(*tensors))
