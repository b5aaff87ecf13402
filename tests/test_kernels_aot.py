"""The Triton kernels compiled for sm_80 and sm_90, as their launches launch them: no spills, the instructions meant."""

from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from fasticl.kernels import attention_mlp

from fasticl.testing.aot import Binary, compiling

archs = pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}


def compiled(arch: int, launch, *arguments) -> dict[str, Binary]:
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
        (torch.bfloat16, (2048, 512, 64, 256), 1),
        (torch.float32, (2048, 512, 64, 256), 1),
        (torch.bfloat16, (2048, 512, 1024, 256), 3),
        (torch.float16, (3, 4096, 60, 200), 3),
        (torch.bfloat16, (2048, 512, 61, 40), 1),
        (torch.float32, (2048, 512, 1024, 256), 3),
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
    if kernels == 3 and dtype == torch.bfloat16:
        assert found["key_kernel"].count(TENSOR_CORES[arch])
        assert found["readout_kernel"].count("HMMA")  # of fewer rows than HGMMA multiplies
