"""The CUDA kernels of csrc/ as a Python module that runs them on the CPU (csrc/testing/cuda_on_cpu.h).

The module has the functions of ``fasticl._C_cuda``, on CPU tensors, and ``set_seed``, which draws another order of
threads and of copies.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).parents[2] / "csrc"  # of a checkout
NAME = "_cuda_on_cpu"
CHECKS = ("-fsanitize=alignment,shift", "-fno-sanitize-recover=all")  # always: a GPU refuses misaligned addresses
# Without the checks that slow the compiler down and find nothing in kernels of raw pointers, as in setup.py.
SANITIZERS = (
    "-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow,vptr", "-g1",
    "-fno-omit-frame-pointer", "--param=asan-instrumentation-with-call-threshold=0",
)  # fmt: skip


def load(csrc: Path = CSRC) -> ModuleType:
    """Builds the module beside the sources, once for each state of them, and imports it.

    Where AddressSanitizer's runtime is loaded already (``make sanitize``), it is built with the sanitizers.

    Raises:
        FileNotFoundError: there are no sources: the package was not installed from a checkout.
        RuntimeError: the compiler refused them.
    """
    if not csrc.is_dir():
        raise FileNotFoundError(f"CUDA on the CPU: expected the sources in {csrc}, got no such folder")
    module = _build(csrc, sanitize="libasan" in os.environ.get("LD_PRELOAD", ""))
    spec = importlib.util.spec_from_file_location(NAME, module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _build(csrc: Path, sanitize: bool) -> Path:
    import pybind11

    includes = [f"-I{folder}" for folder in (csrc, pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DFASTICL_CUDA_ON_CPU", "-Wall", "-Wextra"]
    flags += ["-Wno-unknown-pragmas", *(SANITIZERS if sanitize else ()), *CHECKS]
    compiler = os.environ.get("CXX", "g++")
    digest = hashlib.sha256(repr((compiler, flags, sys.version)).encode())
    for path in sorted([*csrc.rglob("*.h"), *csrc.glob("*_cuda.*")]):
        digest.update(path.read_bytes())
    folder = csrc.parent / "build" / "cuda_on_cpu" / digest.hexdigest()[:16]
    module = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{os.getpid()}.so"
    sources = [str(path) for pattern in ("*_cuda.cu", "*_cuda.cpp") for path in sorted(csrc.glob(pattern))]
    command = [compiler, *flags, *includes, "-shared", "-x", "c++", *sources, "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"CUDA on the CPU: {' '.join(command)}\n{done.stderr}")
    made.replace(module)
    return module
