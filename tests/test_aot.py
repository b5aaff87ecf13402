"""fasticl.testing.aot: what it reports of kernels whose machine code is known, and the defects that it catches."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import triton.language as tl  # noqa: E402

from fasticl.testing.aot import SHARED_BYTES, Binary, compiling  # noqa: E402


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, K, K_STEP: tl.constexpr, SIZE: tl.constexpr):
    rows, inner = tl.arange(0, SIZE), tl.arange(0, K_STEP)
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, K_STEP):
        a = tl.load(a_ptr + rows[:, None] * K + (k + inner)[None, :])
        b = tl.load(b_ptr + (k + inner)[:, None] * SIZE + rows[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rows[:, None] * SIZE + rows[None, :], acc)


def matmul(size: int, num_warps: int = 4, num_stages: int = 3) -> None:
    a, b = torch.zeros(size, 256, dtype=torch.bfloat16), torch.zeros(256, size, dtype=torch.bfloat16)
    matmul_kernel[(1,)](
        a, b, torch.zeros(size, size), 256, K_STEP=64, SIZE=size, num_warps=num_warps, num_stages=num_stages
    )


@pytest.mark.parametrize(("arch", "instruction"), [(80, "HMMA"), (90, "HGMMA")])
def test_a_matmul_is_pipelined_on_tensor_cores(arch: int, instruction: str) -> None:
    with compiling(arch) as binaries:
        matmul(64)
    (binary,) = binaries
    binary.check()
    assert (binary.kernel, binary.arch) == ("matmul_kernel", arch)
    assert binary.count(instruction) > 0
    assert binary.count("LDGSTS") > 0
    assert 16 <= binary.registers <= 255
    assert binary.shared_bytes >= 2 * 2 * 64 * 64 * 2  # two stages of a and b at least


def test_for_amd() -> None:
    pytest.importorskip("triton.backends.amd")
    with compiling("gfx942") as binaries:
        matmul(64)
    binaries[0].check()
    assert binaries[0].arch == "gfx942"
    assert binaries[0].count("v_mfma_f32_32x32x8_bf16") >= 8
    assert 16 <= binaries[0].registers <= 512
    assert binaries[0].shared_bytes >= 2 * 64 * 64
    spilling, count = re.subn(r"(\.vgpr_spill_count:\s*)0", r"\g<1>7", binaries[0].sass)
    assert count == 1
    with pytest.raises(AssertionError, match=r"matmul_kernel for gfx942: 28 bytes of scratch, spilled \{'vgpr': 7, "):
        replace(binaries[0], stack_bytes=28, sass=spilling).check()
    with pytest.raises(AssertionError, match=r"gfx942: spilled \{'vgpr': 7, "):
        replace(binaries[0], sass=spilling).check()
    with pytest.raises(AssertionError, match="gfx942: expected at most 65536 bytes shared, got 65537"):
        replace(binaries[0], shared_bytes=65537).check()


@pytest.mark.parametrize("arch", [81, "gfx1"])
def test_an_unknown_architecture_is_refused(arch: int | str) -> None:
    with pytest.raises(ValueError, match=f"arch: expected one of 80, 86, 89, 90.*, got {arch}"), compiling(arch):
        pass


def test_spills_are_caught() -> None:
    with compiling(80) as binaries:
        matmul(128, num_warps=1)  # 512 float32 accumulators for each thread
    with pytest.raises(AssertionError, match=r"matmul_kernel for sm_80: \d+ instructions access local"):
        binaries[0].check()


def test_too_much_shared_memory_is_caught() -> None:
    with pytest.raises(AssertionError, match="expected at most 166912 bytes shared, got 166913"):
        Binary("kernel", 80, 32, 0, SHARED_BYTES[80] + 1, "").check()


def test_launches_are_specialised_as_on_a_gpu() -> None:
    """A size that is no multiple of 16 forbids wide loads."""
    wide = []
    for K in (256, 255):
        a = torch.zeros(64 * 256, dtype=torch.bfloat16)
        with compiling(80) as binaries:
            matmul_kernel[(1,)](a, a, torch.zeros(64 * 64), K, K_STEP=64, SIZE=64, num_stages=1)
        wide.append(binaries[0].sass.count("LDG.E.128"))
    assert wide[0] > wide[1]


def test_nothing_is_left_behind() -> None:
    run, driver = triton.runtime.jit.JITFunction.run, triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), compiling(90):
        raise ZeroDivisionError
    assert triton.runtime.jit.JITFunction.run is run
    assert triton.runtime.driver._active is driver


def test_an_interpreting_process_is_refused() -> None:
    code = "from fasticl.testing.aot import compiling\nwith compiling(80): pass"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "RuntimeError: TRITON_INTERPRET: expected unset for compiling, got it set" in done.stderr
