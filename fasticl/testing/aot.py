"""Triton kernels compiled for a GPU that is not there: what they use and the machine code that they became.

Inside :func:`compiling` a launch compiles its kernel for the given architecture, specialised on its very arguments as
on a GPU, and runs nothing. Tensors may lie on the CPU. The disassembler is the one in Triton's wheel.
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
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448}  # the most that a program may have, by architecture


@dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    Attributes:
        registers: of one thread.
        stack_bytes: of one thread in local memory, spilled registers among them; any is a defect here.
        shared_bytes: of one program.
        sass: the machine code as text.
    """

    kernel: str
    arch: int
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
        name, most = f"{self.kernel} for sm_{self.arch}", SHARED_BYTES[self.arch]
        local = self.count("LDL") + self.count("STL")
        assert not local, f"{name}: {local} instructions access local memory ({self.stack_bytes} bytes of stack)"
        assert self.shared_bytes <= most, f"{name}: expected at most {most} bytes shared, got {self.shared_bytes}"


def _binary(kernel: str, arch: int, compiled: Any) -> Binary:
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
def compiling(arch: int) -> Iterator[list[Binary]]:
    """Launches within it add to the list, one entry for each launch, in order.

    Args:
        arch: compute capability times ten: 80, 90.

    Raises:
        RuntimeError: this process interprets kernels (TRITON_INTERPRET).
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected unset for compiling, got it set")
    binaries: list[Binary] = []
    stub = SimpleNamespace(
        get_current_device=lambda: f"sm_{arch}",  # a key of Triton's cache of compiled kernels
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
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
