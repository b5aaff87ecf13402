"""What a measurement is worth nothing without: the machine, the versions, the sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import fasticl

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """Columns that are the same for all rows of a run."""

    device: str
    threads: int
    torch: str
    triton: str
    fasticl: str
    git: str

    @classmethod
    def current(cls, device: str, threads: int) -> Environment:
        return cls(device, threads, torch.__version__, _version("triton"), fasticl.__version__, source_version())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def source_version(root: Path = ROOT) -> str:
    """The commit; with ``+`` and a digest of the sources where they differ from it; empty outside of a git checkout,
    or where there is no git."""
    sources = ("fasticl", "csrc", "kernels", "setup.py", "benchmarks/*.py")

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", "-C", str(root), *arguments), capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else ""

    if shutil.which("git") is None:
        return ""
    files = git("ls-files", "-co", "--exclude-standard", "--", *sources).splitlines()
    commit = git("rev-parse", "--short=10", "HEAD").strip()
    if not files or (commit and not git("status", "--porcelain", "--", *sources)):
        return commit
    digest = hashlib.sha1(usedforsecurity=False)
    for file in sorted(name for name in files if (root / name).is_file()):
        digest.update(file.encode() + b"\0" + (root / file).read_bytes())
    return f"{commit}+{digest.hexdigest()[:8]}"


def cpu_slug(threads: int) -> str:
    """Names this CPU: model name, family and model number, threads; ``intel-xeon-family6-model207-2threads``."""
    info: dict[str, str] = {}
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    name = info.get("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*|\d+-Core", " ", name, flags=re.IGNORECASE)
    parts = [name] + [
        f"{key}{info[column]}" for key, column in (("family", "cpu family"), ("model", "model")) if column in info
    ]
    return re.sub(r"[^a-z0-9]+", "-", " ".join([*parts, f"{threads}threads"]).lower()).strip("-")


def gpu_slug() -> str:
    """Names this GPU: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def last_level_cache_bytes(device: str = "cpu") -> int:
    """Of the first CPU, 32 MiB where the system does not say; on cuda the L2 cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [int(text[:-1]) * units[text[-1]] for path in sizes if (text := path.read_text().strip())[-1:] in units]
    return max(found, default=32 << 20)


def cold_bytes(device: str = "cpu") -> int:
    """Of what is read over and over and yet comes from memory: 1.25 times the cache, on a CPU at least 256 MiB.

    A small cache that does not replace its oldest lines first keeps some of what is twice its size.
    """
    return max(last_level_cache_bytes(device) * 5 // 4, 0 if device == "cuda" else 256 << 20)
