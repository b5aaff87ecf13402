"""Triton kernels compiled for a GPU that is not there: what they use and the machine code that they became.

Inside :func:`compiling` a launch compiles its kernel for the given architecture, specialised on its very arguments as
on a GPU, and runs nothing. Tensors may lie on the CPU. The disassembler is the one in Triton's wheel; for AMD the
compiler's own assembly is read.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

Arch = int | str  # compute capability times ten, or of AMD its name
# The most that a program may have
SHARED_BYTES: dict[Arch, int] = {80: 166912, 86: 101376, 89: 101376, 90: 232448, "gfx942": 65536}


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        registers: of one thread.
        stack_bytes: of one thread in local memory, spilled registers among them; more than an address is a defect here.
        shared_bytes: of one program.
        sass: the machine code as text, on AMD with the assembler's metadata.
    """

    kernel: str
    arch: Arch
    registers: int
    stack_bytes: int
    shared_bytes: int
    sass: str

    def count(self, opcode: str) -> int:
        """How often an instruction stands in the code, modifiers ignored: HMMA, HGMMA, LDGSTS, PRMT, ..."""
        return len(re.findall(rf"\b{opcode}\b", self.sass))

    def check(self) -> None:
        """
        Raises:
            AssertionError: it spills registers, or wants more shared memory than the architecture has.
        """
        amd, most = isinstance(self.arch, str), SHARED_BYTES[self.arch]
        name = f"{self.kernel} for {self.arch if amd else f'sm_{self.arch}'}"
        if amd:
            spilled = {kind: _amd_number(self.sass, f"{kind}_spill_count") for kind in ("vgpr", "sgpr")}
            assert not self.stack_bytes, f"{name}: {self.stack_bytes} bytes of scratch, spilled {spilled}"
            assert not spilled["vgpr"], f"{name}: spilled {spilled}"
            # Not to memory, but to lanes of a vector register
            assert spilled["sgpr"] <= 4, f"{name}: spilled {spilled}"
        local = self.count("LDL") + self.count("STL")
        # ptxas may park one address to stay below a number of registers that lets more programs run.
        parked = self.stack_bytes <= 8 and self.registers < 128
        assert not local or parked, (
            f"{name}: {local} instructions access local memory ({self.stack_bytes} bytes of stack)"
        )
        assert self.shared_bytes <= most, f"{name}: expected at most {most} bytes shared, got {self.shared_bytes}"


def _amd_number(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    if found is None:
        raise RuntimeError(f"amdgcn assembly: expected .{name}, got none")
    return int(found[1])


def _binary(kernel: str, arch: Arch, compiled: Any) -> Binary:
    if isinstance(arch, str):
        text = compiled.asm["amdgcn"]
        registers, stack = (_amd_number(text, name) for name in ("vgpr_count", "private_segment_fixed_size"))
        return Binary(kernel, arch, registers, stack, compiled.metadata.shared, text)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            return done.stdout + done.stderr

        usage, sass = dump("-res-usage"), dump("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage: expected REG and STACK, got {usage!r}")
    return Binary(kernel, arch, int(found[1]), int(found[2]), compiled.metadata.shared, sass)


@contextmanager
def compiling(arch: Arch) -> Iterator[list[Binary]]:
    """Launches within it add to the list, one entry for each launch, in order.

    Args:
        arch: compute capability times ten (80, 90), or of AMD its name: gfx942 (MI300).

    Raises:
        ValueError: the architecture is unknown, or Triton's wheel lacks its compiler.
        RuntimeError: this process interprets kernels (TRITON_INTERPRET).
    """
    backend, vendor, warp = ("hip", "amd", 64) if isinstance(arch, str) else ("cuda", "nvidia", 32)
    if arch not in SHARED_BYTES or vendor not in backends:
        known = [known for known in SHARED_BYTES if ("amd" if isinstance(known, str) else "nvidia") in backends]
        raise ValueError(f"arch: expected one of {', '.join(map(str, known))}, got {arch}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected unset for compiling, got it set")
    binaries: list[Binary] = []
    stub = SimpleNamespace(
        get_current_device=lambda: str(arch),  # a key of Triton's cache of compiled kernels
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget(backend, arch, warp),
    )
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        binaries.append(_binary(self.fn.__name__, arch, compiled))
        return compiled

    before = driver._active
    driver.set_active(stub)
    jit.JITFunction.run = compile_only
    try:
        yield binaries
    finally:
        jit.JITFunction.run = run
        driver._active = before
