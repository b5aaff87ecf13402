"""How kernel tests judge a result: against the float64 truth, by what PyTorch achieves, between guard bytes.

And a tiny language model for tests of what runs on folders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

# Every byte of a guard. As float64, float32, float16 and bfloat16 it reads as NaN, so that a read past the end shows in
# the result, as a write past it shows in the guard.
GUARD = 0xFF
GUARD_BYTES = 256


def assert_close_to_truth(actual: Tensor, truth: Tensor, pytorch_result: Tensor, factor: float = 2.0) -> None:
    """``max|actual - truth| <= factor * max|pytorch_result - truth| + slack``.

    No tolerance is chosen by hand: a kernel may lose ``factor`` times what PyTorch loses on the same inputs in the same
    dtype. The rule, the factor and a slack of about one rounding are those of flash-attention's tests
    (hopper/test_flash_attn.py). Errors are compared by their maximum, since one wrong element is a wrong kernel.

    ``slack = (eps(dtype) / 2 + 4 * eps(float32)) * max|truth|``. Where PyTorch happens to be exact (short sums, small
    integers) a right kernel may still round: once to the output dtype, and a few times in its float32 accumulator.

    Args:
        actual: what the kernel returned.
        truth: the reference computed in float64 from the same (already rounded) inputs; same shape.
        pytorch_result: PyTorch's own result from the same inputs; shape and dtype that ``actual`` must have.
        factor: how many times PyTorch's error is allowed.

    Raises:
        AssertionError: naming the worst element. Elements that PyTorch makes NaN or infinite must be the same in
            ``actual``; all others must be finite.
    """
    assert truth.dtype == torch.float64, f"truth: expected float64, got {truth.dtype}"
    assert actual.shape == truth.shape == pytorch_result.shape, (
        f"shape: expected {list(truth.shape)}, got {list(actual.shape)} (PyTorch: {list(pytorch_result.shape)})"
    )
    assert actual.dtype == pytorch_result.dtype, f"dtype: expected {pytorch_result.dtype}, got {actual.dtype}"
    if actual.numel() == 0:
        return

    finite = pytorch_result.isfinite()
    special, expected = actual[~finite], pytorch_result[~finite]
    assert torch.equal(special.isnan(), expected.isnan()), "NaN: not at the elements where PyTorch has it"
    assert torch.equal(special[~special.isnan()], expected[~expected.isnan()]), "infinity: not as PyTorch has it"
    assert actual[finite].isfinite().all(), f"{(~actual[finite].isfinite()).sum()} elements are NaN or infinite"
    if not finite.any():
        return

    ours = (actual.double() - truth).abs().masked_fill(~finite, 0.0)
    theirs = (pytorch_result.double() - truth).abs().masked_fill(~finite, 0.0)
    scale = truth[finite].abs().max().item()
    slack = (torch.finfo(actual.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps) * scale
    allowed = factor * theirs.max().item() + slack
    worst = int(ours.argmax())
    assert ours.max().item() <= allowed, (
        f"error {ours.max().item():.3g}, allowed {allowed:.3g} = {factor:g} * {theirs.max().item():.3g} (PyTorch's) "
        f"+ {slack:.3g}; {int((ours > allowed).sum())} of {ours.numel()} elements exceed it, worst at flat index "
        f"{worst}: got {actual.flatten()[worst].item():.9g}, truth {truth.flatten()[worst].item():.9g}"
    )


def guarded(tensor: Tensor, *, shift: int = 0) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous copy of ``tensor`` between guard bytes, and the check that they are untouched.

    A kernel that reads past either end computes with NaN (or, for integers, with all ones); one that writes there fails
    the check. For reads whose result is thrown away use a plain tensor: its allocation ends with its last element, and
    AddressSanitizer sees the first byte past it.

    Args:
        tensor: CPU tensor of any dtype.
        shift: moves the copy by this many elements off the 64-byte alignment that torch gives.
    """
    begin = GUARD_BYTES + shift * tensor.element_size()
    end = begin + tensor.numel() * tensor.element_size()
    storage = torch.full((end + GUARD_BYTES,), GUARD, dtype=torch.uint8)
    copy = storage[begin:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def check() -> None:
        before, after = storage[:begin], storage[end:]
        assert (before == GUARD).all(), "a write before the first element"
        assert (after == GUARD).all(), "a write past the last element"

    return copy, check


def save_tiny_model(folder: Path, *, chat_template: str | None = None) -> None:
    """A random Llama of two layers, and a tokenizer of single bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


class BaseTunerLayer(nn.Module):
    """As the layers of PEFT that hold a linear and an adapter, by their class's name: ``base(x) + B A x``."""

    def __init__(self, linear: nn.Linear, *, reads_weight: bool = False) -> None:
        super().__init__()
        self.base_layer, self.lora_variant = linear, {"default": "dora"} if reads_weight else {}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, linear.out_features, bias=False)})
        self.to(linear.weight.dtype)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A["default"], self.lora_B["default"]
        y = self.base_layer(x.to(a.weight.dtype)) + b(a(x))
        if self.lora_variant:
            return y * self.weight.square().sum(1).rsqrt()
        return y


BaseTunerLayer.__module__ = "peft.tuners.lora.layer"
