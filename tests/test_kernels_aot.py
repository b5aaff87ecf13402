"""The Triton kernels compiled as their launches launch them: no spills, the instructions meant.

For sm_80, sm_90 and, where Triton's wheel has AMD's compiler, gfx942 (MI300).
"""

from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from fasticl.kernels import attention_mlp, bitmap_linear, decoder_block, fused_mlp, nm_linear, sliced_linear
from fasticl.testing.aot import Binary, compiling

F32, BF16 = torch.float32, torch.bfloat16
archs = pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}
MFMA = re.compile(r"\bv_mfma_f32_")


def compiled(arch: int | str, launch, *arguments) -> dict[str, Binary]:
    """Of each kernel that was launched its binary, free of spills."""
    with compiling(arch) as binaries:
        launch(*arguments)
    for binary in binaries:
        binary.check()
    return {binary.kernel: binary for binary in binaries}


@archs
@pytest.mark.parametrize(
    ("dtype", "shape", "kernels"),
    [
        (BF16, (2048, 512, 64, 256), 1),
        (F32, (2048, 512, 64, 256), 1),
        (BF16, (2048, 512, 1024, 256), 3),
        (torch.float16, (3, 4096, 60, 200), 3),
        (BF16, (2048, 512, 61, 40), 1),
        (F32, (2048, 512, 1024, 256), 3),
        (BF16, (2400, 512, 1000, 40), 3),
        (F32, (2400, 512, 1000, 40), 3),
    ],
    ids=str,
)
def test_attention_mlp(arch: int, dtype: torch.dtype, shape: tuple[int, int, int, int], kernels: int) -> None:
    B, L, d, m = shape
    tensors = [torch.empty(size, dtype=dtype, device="meta") for size in ((B, L, d), (B, d), (d, d), (m, d), (m,))]
    found = compiled(arch, attention_mlp.launch, *tensors, None)
    assert len(found) == kernels
    if d != 61:  # a prompt's rows are copied ahead of their use, in words as wide as their alignment
        width = r"\.128" if d % 8 == 0 else ""
        assert len(re.findall(rf"\bLDGSTS\S*{width}\b", found["attention_kernel"].sass)) >= 3
    if kernels == 3 and dtype == BF16 and d == 1024:
        assert found["key_kernel"].count(TENSOR_CORES[arch])
        assert found["readout_kernel"].count("HMMA")  # of fewer rows than HGMMA multiplies


@archs
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (BF16, (256, 64, 512, 64, 256)),
        (BF16, (256, 8, 512, 64, 256)),
        (BF16, (8, 64, 4096, 128, 256)),
        (torch.float16, (64, 64, 512, 256, 256)),
        (F32, (256, 64, 512, 64, 256)),
        (F32, (64, 64, 512, 256, 256)),
    ],
    ids=str,
)
def test_attention_mlp_of_many_queries(arch: int, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    B, Q, L, d, m = shape
    sizes = ((B, L, d), (B, Q, d), (d, d), (m, d), (m,))
    tensors = [empty(*size, dtype=dtype) for size in sizes]
    found = compiled(arch, attention_mlp.launch, *tensors, empty(B, dtype=torch.int64))
    assert list(found) == ["key_kernel", "queries_kernel", "readout_kernel"]
    assert found["queries_kernel"].count("LDGSTS") >= 4
    if dtype != F32:  # of fewer than 64 rows HGMMA multiplies none
        assert found["queries_kernel"].count(TENSOR_CORES[arch] if Q == 64 and d <= 128 else "HMMA")


@archs
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(("Q", "d"), [(64, 61), (3, 255), (64, 255)])
def test_unaligned_tiles_of_queries(arch: int, Q: int, d: int, dtype: torch.dtype) -> None:
    tensors = [empty(*size, dtype=dtype) for size in ((8, 100, d), (8, Q, d), (d, d), (40, d), (40,))]
    assert len(compiled(arch, attention_mlp.launch, *tensors, None)) == 3


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@archs
@pytest.mark.parametrize(
    ("dtype", "M"),
    [(F32, 1), (F32, 64), (BF16, 1), (BF16, 8), (BF16, 64)],
)
@pytest.mark.parametrize("format", ["bitmap", "nm"])
def test_packed_linears(arch: int, format: str, dtype: torch.dtype, M: int) -> None:
    N = K = 4096
    x, values, bias = empty(M, K, dtype=dtype), empty(N * K // 2, dtype=dtype), empty(N, dtype=dtype)
    mask, offsets = empty(N, K // 8, dtype=torch.uint8), empty(N + 1, dtype=torch.int64)
    if format == "nm":
        found = compiled(arch, nm_linear.launch, x, values, mask, bias, "gelu")["packed_kernel"]
    else:
        found = compiled(arch, bitmap_linear.launch, x, values, mask, offsets, bias, "gelu")["packed_kernel"]
    assert found.count("POPC")
    if dtype == BF16:
        if M > 1:
            assert found.count("HMMA" if M == 8 else TENSOR_CORES[arch])
        if format == "nm":  # eight words of a group are permuted from four, which one load brings
            assert found.count("PRMT") >= 8
            assert re.search(r"\bLDG(STS)?\S*\.128\b", found.sass)


@archs
@pytest.mark.parametrize("M", [1, 8])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sliced_linear(arch: int, dtype: torch.dtype, M: int) -> None:
    N = K = 4096
    values, mask, offsets = empty(9, dtype=dtype), empty(N, K // 8, dtype=torch.uint8), empty(N + 1, dtype=torch.int64)
    steps, slices = empty(9, 20, dtype=torch.uint8), empty(N // 16 + 1, 2, dtype=torch.int64)
    order = empty(N, dtype=torch.int32)
    x = empty(M, K, dtype=dtype)
    found = compiled(arch, sliced_linear.launch, x, values, mask, offsets, values, steps, slices, order, None, "silu")
    assert list(found) == ["sliced_kernel"]
    assert found["sliced_kernel"].count("POPC")


@archs
@pytest.mark.parametrize(("dtype", "M"), [(F32, 1), (F32, 64), (BF16, 1), (BF16, 64)])
def test_fused_mlp(arch: int, dtype: torch.dtype, M: int) -> None:
    """Two gated layers of a decoder: in one pass for one token, else the hidden activations are written."""
    H, K = 8192, 2048
    up, down = [empty(H, K, dtype=dtype)], [empty(K, H, dtype=dtype)]
    found = compiled(arch, fused_mlp.launch, empty(M, K, dtype=dtype), up, down, up, None, None, None, "silu")
    assert list(found) == (["mlp_kernel", "sum_kernel"] if M == 1 else ["hidden_kernel"])
    first = next(iter(found.values()))
    assert first.count("LDGSTS")
    if dtype == BF16:
        assert first.count(TENSOR_CORES[arch] if M == 64 else "HMMA")


@archs
@pytest.mark.parametrize(("dtype", "M"), [(F32, 1), (F32, 64), (BF16, 1), (BF16, 64)])
def test_fused_mlp_of_unaligned_columns(arch: int, dtype: torch.dtype, M: int) -> None:
    up, down = [empty(1535, 100, dtype=dtype)], [empty(100, 1535, dtype=dtype)]
    assert compiled(arch, fused_mlp.launch, empty(M, 100, dtype=dtype), up, down, up, None, None, None, "silu")


@pytest.mark.parametrize("M", [1, 8, 64])
def test_linears_for_amd(M: int) -> None:
    """Bits are counted and bytes permuted without NVIDIA's assembly."""
    pytest.importorskip("triton.backends.amd")
    N = K = 4096
    x, values = empty(M, K, dtype=BF16), empty(N * K // 2, dtype=BF16)
    mask, offsets = empty(N, K // 8, dtype=torch.uint8), empty(N + 1, dtype=torch.int64)
    for found in (
        compiled("gfx942", nm_linear.launch, x, values, mask, None, "gelu"),
        compiled("gfx942", bitmap_linear.launch, x, values, mask, offsets, None, None),
    ):
        assert bool(MFMA.search(found["packed_kernel"].sass)) == (M > 1)
    if M <= 8:
        steps, slices = empty(9, 20, dtype=torch.uint8), empty(N // 16 + 1, 2, dtype=torch.int64)
        layout = values, steps, slices, empty(N, dtype=torch.int32)
        found = compiled("gfx942", sliced_linear.launch, x, values, mask, offsets, *layout, None, None)
        assert list(found) == ["sliced_kernel"]


@pytest.mark.parametrize(("dtype", "M"), [(BF16, 1), (BF16, 64), (F32, 64)], ids=str)
def test_fused_mlp_for_amd(dtype: torch.dtype, M: int) -> None:
    pytest.importorskip("triton.backends.amd")
    up, down = [empty(8192, 2048, dtype=dtype)], [empty(2048, 8192, dtype=dtype)]
    found = compiled("gfx942", fused_mlp.launch, empty(M, 2048, dtype=dtype), up, down, up, None, None, None, "silu")
    assert list(found) == (["mlp_kernel", "sum_kernel"] if M == 1 else ["hidden_kernel"])
    assert MFMA.search(next(iter(found.values())).sass)


@pytest.mark.parametrize(
    ("dtype", "Q", "d"), [(BF16, None, 64), (BF16, None, 1024), (F32, None, 1024), (BF16, 64, 64)], ids=str
)
def test_attention_mlp_for_amd(dtype: torch.dtype, Q: int | None, d: int) -> None:
    pytest.importorskip("triton.backends.amd")
    B = 256 if Q else 2048
    sizes = ((B, 512, d), (B, Q, d) if Q else (B, d), (d, d), (256, d), (256,))
    found = compiled("gfx942", attention_mlp.launch, *(empty(*size, dtype=dtype) for size in sizes), None)
    assert len(found) == (1 if (Q, d) == (None, 64) else 3)
    for name in found.keys() - {"attention_kernel"}:
        assert MFMA.search(found[name].sass)


def block(B: int, d: int, H: int, G: int, D: int, L: int, m: int, dtype: torch.dtype, *, llama: bool) -> list[object]:
    def tensor(*size: int, there: bool = True) -> torch.Tensor | None:
        return empty(*size, dtype=dtype) if there else None

    heads, angles = (H + 2 * G) * D, empty(L, D // 2, dtype=F32) if llama else None
    biases = [tensor(n, there=not llama and n > 0) for n in (d, heads, d, d, m, 0, d)]
    return [
        tensor(B, d), tensor(B, G, L, D), tensor(B, G, L, D), empty(B, dtype=torch.int64), angles, angles, tensor(d),
        tensor(heads, d), tensor(d, H * D), tensor(d), tensor(m, d), tensor(d, m), "silu" if llama else "gelu_tanh",
        1e-5, tensor(m, d, there=llama), *biases, not llama,
    ]  # fmt: skip


BLOCKS = {"llama-3.2-1b": (2048, 32, 8, 64, 4096, 8192), "gpt2": (768, 12, 12, 64, 1024, 3072)}


@archs
@pytest.mark.parametrize(
    ("model", "dtype", "B"), [("llama-3.2-1b", BF16, 1), ("llama-3.2-1b", BF16, 8), ("gpt2", BF16, 1), ("gpt2", F32, 1)]
)
def test_decoder_block(arch: int, model: str, dtype: torch.dtype, B: int) -> None:
    """Five launches; weights and cache come 16 bytes at a time, several of them at once."""
    arguments = block(B, *BLOCKS[model], dtype, llama=model != "gpt2")
    with compiling(arch) as binaries:
        decoder_block.launch(*arguments)
    qkv, attention, *others = binaries
    assert [binary.kernel for binary in binaries] == ["linear_kernel", "attention_kernel", *["linear_kernel"] * 3]
    for binary in binaries:
        binary.check()
    for linear in (qkv, *others):
        if B == 1:  # two tiles at once, of which the first is asked for before x is waited for
            assert len(re.findall(r"\bLDG\S*\.128\b", linear.sass)) >= 3
            assert not linear.count("LDGSTS")
        else:
            assert len(re.findall(r"\bLDGSTS\S*\.128\b", linear.sass)) >= 12
            assert linear.count("HMMA")
    assert len(re.findall(r"\bLDGSTS\S*\.128\b", attention.sass)) >= 8
    if dtype == BF16:
        assert attention.count("HMMA")
    # Each split's results are there before its atomic, and read anew after it.
    atomic = attention.sass.index("ATOMG")
    assert "MEMBAR" in attention.sass[:atomic]
    assert "BAR.SYNC" in attention.sass[:atomic]
    assert "CCTL.IVALL" in attention.sass[atomic:]


def test_decoder_block_of_any_number_of_neurons() -> None:
    """Rows of down begin anywhere then, in halves of a word."""
    with compiling(90) as binaries:
        decoder_block.launch(*block(1, *BLOCKS["gpt2"][:-1], 1535, BF16, llama=False))
    for binary in binaries:
        binary.check()


def test_sizes_of_one_compile() -> None:
    """Triton makes arguments of value one constants, whose types differ from those of tensors."""
    x, weight, mask = empty(1, 1, dtype=F32), empty(1, 1, dtype=F32), empty(1, 1, dtype=torch.uint8)
    offsets, lengths = empty(2, dtype=torch.int64), empty(1, dtype=torch.int64)
    steps, slices, order = empty(4, 20, dtype=torch.uint8), empty(2, 2, dtype=torch.int64), empty(16, dtype=torch.int32)
    vector = empty(1, dtype=F32)
    compiled(80, attention_mlp.launch, x[None], x, weight, weight, vector, lengths)
    compiled(80, attention_mlp.launch, x[None], x, weight, weight, vector, None)
    compiled(80, attention_mlp.launch, x[None], x.expand(1, 2, 1), weight, weight, vector, lengths)
    compiled(80, bitmap_linear.launch, x, vector, mask, offsets, vector, None)
    compiled(80, nm_linear.launch, x.expand(2, 1), vector, mask, None, "relu")
    compiled(80, sliced_linear.launch, x, vector, mask, offsets, vector, steps, slices, order, vector, None)
    compiled(80, fused_mlp.launch, x, [weight], [weight], None, vector, None, None, None)
    compiled(80, decoder_block.launch, *block(1, 1, 1, 1, 1, 1, 1, F32, llama=False))
    compiled(80, decoder_block.launch, *block(2, 1, 1, 1, 2, 1, 1, F32, llama=True))
