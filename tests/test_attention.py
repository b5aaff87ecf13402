"""The attention named "fasticl" among transformers' own: a softmax's float64 value, and every model's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close_to_truth
from test_blocks import assert_alike, generated
from test_decoder import SIZES, make
from torch import Tensor, nn

import fasticl  # noqa: F401 - registers it

transformers = pytest.importorskip("transformers", minversion="5")


def native(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each call of the kernel."""
    import fasticl.attention as module

    calls: list[int] = []
    compute = module._C.decode_attention
    monkeypatch.setattr(module._C, "decode_attention", lambda *args: (calls.append(1), compute(*args))[1])
    return calls


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = scale * query @ key.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(3) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "H", "G", "n", "d"),
    [
        (1, 9, 3, 128, 64),  # SmolLM2
        (3, 4, 4, 1, 10),  # one position; a width that is no multiple of a vector
        (2, 6, 1, 300, 80),  # one group; blocks of the softmax
        (5, 8, 2, 37, 256),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_softmax(
    B: int, H: int, G: int, n: int, d: int, dtype: torch.dtype, masked: bool, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasticl.attention import attention

    query = torch.randn(B, H, 1, d).to(dtype)
    key, value = torch.randn(2, B, G, n + 3, d).to(dtype)[:, :, :, 3:]  # rows close, heads apart
    mask = None
    if masked:
        begins, ends = torch.randint(0, n, (B, 1)), torch.randint(0, n, (B, 1))
        at = torch.arange(n)
        mask = ((at >= begins.minimum(ends)) & (at <= begins.maximum(ends)))[:, None, None]
    calls = native(monkeypatch)
    with torch.inference_mode():
        out, weights = attention(nn.Module(), query, key, value, mask, scaling=0.3)
    assert calls
    assert weights is None
    truth = reference(query.double(), key.double(), value.double(), mask, 0.3)
    assert_close_to_truth(out, truth, reference(query, key, value, mask, 0.3))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_generate(name: str, cache: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=3)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        model = make(name)
    tokens, mask = torch.randint(1, 94, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
    expected = generated(model, tokens, attention_mask=mask, **cache)
    model.set_attn_implementation("fasticl")
    calls = native(monkeypatch)
    assert_alike(generated(model, tokens, attention_mask=mask, **cache), expected)
    assert len(calls) == 5 * 3


def test_what_it_leaves_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasticl.attention import attention

    calls = native(monkeypatch)
    query, (key, value) = torch.randn(1, 4, 1, 16), torch.randn(2, 1, 2, 5, 16)
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    holes = torch.tensor([True, False, True, True, False])[None, None, None]
    with torch.no_grad():
        for mask in (holes, torch.where(holes, 0.0, -torch.inf)):
            out = attention(module, query, key, value, mask)[0]
            torch.testing.assert_close(out, reference(query, key, value, holes, 0.25))
        long = torch.randn(1, 4, 3, 16)
        causal = torch.ones(3, 5, dtype=torch.bool).tril(2)[None, None]
        torch.testing.assert_close(
            attention(module, long, key, value, causal)[0], reference(long, key, value, causal, 0.25)
        )
    query.requires_grad_()
    attention(module, query, key, value, None)[0].sum().backward()
    assert query.grad is not None
    assert not calls
