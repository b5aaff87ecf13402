"""Blocks that the model misses more keep more, at the same sparsity in all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasticl.prune import SparseGPT, Wanda, sparsify_


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, hidden), nn.Linear(hidden, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Three blocks of different sizes, of which the second matters most."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, (16, 32, 48)))
        self.head = nn.Linear(16, 16)
        self.blocks[1].down.weight.data.mul_(8)

    def forward(self, x: Tensor, logits_to_keep: int = 0) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x[..., -logits_to_keep:, :])


def divergences(model: nn.Module, x: Tensor, batches: list[Any], sparsity: float) -> list[float]:
    """With each block alone pruned, as the definition says."""
    p, found = model(x).double().softmax(-1), []
    for i in range(3):
        some = copy.deepcopy(model)
        sparsify_(some, Wanda(sparsity), batches, filter_fn=lambda module, name, i=i: name.startswith(f"blocks.{i}."))
        q = some(x).double().softmax(-1)
        found.append(float((p * (p.log() - q.log())).sum(-1).mean()))
    return found


def zeros(report: Any, prefix: str) -> float:
    rows = [row for row in report.layers if row.name.startswith(prefix)]
    return sum(row.zeros_after for row in rows) / sum(row.shape[0] * row.shape[1] for row in rows)


@torch.no_grad()
@pytest.mark.parametrize(("sparsity", "spread"), [(0.6, 0.16), (0.9, 0.1), (0.05, 0.05)])
def test_sparsities_are_as_defined(sparsity: float, spread: float) -> None:
    model, x = Model(), torch.randn(4, 30, 16)
    batches = [{"x": x, "logits_to_keep": 1}, {"x": torch.randn(4, 30, 16)}]
    losses = divergences(model, x, batches, sparsity)
    assert losses[1] == max(losses)
    ranks = [(loss - min(losses)) / (max(losses) - min(losses)) for loss in losses]
    sizes = [512, 1024, 1536]
    mean = sum(rank * size for rank, size in zip(ranks, sizes, strict=True)) / sum(sizes)
    before = copy.deepcopy(model.state_dict())
    report = sparsify_(model, SparseGPT(sparsity, allocation="sensitivity"), iter(batches))
    for i, rank in enumerate(ranks):
        assert zeros(report, f"blocks.{i}.") == pytest.approx(sparsity + spread * (mean - rank), abs=2e-3)
    assert zeros(report, "blocks.") == pytest.approx(sparsity, abs=1e-3)
    assert zeros(report, "head") == pytest.approx(sparsity, abs=4e-3)
    assert report.total == pytest.approx(sparsity, abs=2e-3)
    model.load_state_dict(before)
    report = sparsify_(model, Wanda(sparsity, allocation="sensitivity"), batches)
    for i, rank in enumerate(ranks):
        assert zeros(report, f"blocks.{i}.") == pytest.approx(sparsity + spread * (mean - rank), abs=0.5 / 16)


@torch.no_grad()
def test_equal_blocks_and_no_sparsity_are_uniform() -> None:
    model, x = Model(), torch.randn(4, 30, 16)
    before = copy.deepcopy(model.state_dict())
    assert sparsify_(model, Wanda(0.0, allocation="sensitivity"), [x]).total == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for block in model.blocks:
        block.down.weight.zero_()
        block.down.bias.zero_()
        block.up.weight.copy_(torch.randn_like(block.up.weight))
    report = sparsify_(model, SparseGPT(0.5, allocation="sensitivity"), [x])
    assert [zeros(report, f"blocks.{i}.up") for i in range(3)] == [0.5] * 3


class Wordless(Model):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"hidden": super().forward(x)}


class Failing(Model):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if not bool(self.blocks[1].up.weight.all()):
            raise RuntimeError("out of luck")
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(16, 4), ValueError, "a model of decoder blocks for allocation 'sensitivity', got none"),
        (Wordless(), TypeError, "a model that returns logits for allocation 'sensitivity', got dict"),
        (
            nn.Sequential(Block(4), Block(4), nn.Threshold(9e9, torch.inf)),
            ValueError,
            "finite logits .* got NaN or inf",
        ),
        (Failing(), RuntimeError, "out of luck"),
    ],
)
def test_refusals_change_nothing(model: nn.Module, error: type[Exception], message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    for config in (Wanda(0.5, allocation="sensitivity"), SparseGPT(0.5, allocation="sensitivity")):
        with pytest.raises(error, match=message):
            sparsify_(model, config, [torch.randn(3, 5, 16)])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
