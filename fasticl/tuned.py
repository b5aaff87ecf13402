"""Launch configurations that were measured: ``fasticl/data/<architecture>.json``, written by ``fasticl bench --tune``.

A GPU op looks its problem up (:func:`lookup`) and launches with what the table says; what the table does not say, and
everything where there is none, is the kernel's own default. Nothing but the device chooses the table. Problems are told
apart by buckets: a size counts as the next bound of ``BOUNDS``, or as the last.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]
Bucket = tuple[str, int, int, int, int, float]  # op, N, K, batch, bytes of a value, density

_WARPS, _STAGES = (1, 2, 4, 8), (1, 2, 3, 4)
_PACKED = {"BLOCK_N": (8, 16, 32, 64, 128), "BYTES": (4, 8, 16, 32), "num_warps": _WARPS, "num_stages": _STAGES}
# What may be tuned, by op, and the values that it may have. In a table N and K are outputs and inputs of a linear,
# hidden neurons and inputs of fused_mlp, columns L and width d of attention_mlp. "CUDA C++" is the kernel that
# fasticl/ops/bitmap_linear.py and _linear.py name for the tokens and density; "lane stream" takes any, "wgmma" too, on
# Hopper, and is "CUDA C++" elsewhere; "PyTorch" multiplies by the unpacked weight. Of nm_linear "CUDA C++" is the
# default, which beyond 64 tokens is Triton.
SPACE: dict[str, dict[str, tuple[Any, ...]]] = {
    "bitmap_linear": {"implementation": ("CUDA C++", "lane stream", "wgmma", "PyTorch", "Triton"), **_PACKED},
    "nm_linear": {"implementation": ("CUDA C++", "cuSPARSELt", "Triton"), **_PACKED},
    "sliced_linear": {"implementation": ("CUDA C++", "Triton"), "STEPS": (8, 16, 32, 64, 128), "num_warps": _WARPS},
    "fused_mlp": {
        "BLOCK_H": (16, 32, 64, 128), "BLOCK_K": (16, 32, 64, 128), "num_warps": _WARPS, "num_stages": _STAGES,
    },
    "attention_mlp": {"TILE": (1024, 2048, 4096, 8192), "PROGRAMS": (256, 512, 1024), "STAGES": (2, 3, 4)},
}  # fmt: skip
SIZES = (512, 1024, 2048, 4096, 8192, 16384)
BOUNDS = {
    "N": SIZES, "K": (64, 128, 256, *SIZES), "batch": (1, 16, 64, 256, 1024), "density": (0.1, 0.25, 0.6, 1.0),
}  # fmt: skip
FOLDER = Path(__file__).parent / "data"
_forced: dict[str, Config] = {}


def bucket(op: str, N: int, K: int, batch: int, dtype: torch.dtype, density: float = 1.0) -> Bucket:
    def bound(name: str, value: float) -> Any:
        bounds = BOUNDS[name]
        return bounds[min(bisect_left(bounds, value), len(bounds) - 1)]

    return op, bound("N", N), bound("K", K), bound("batch", batch), dtype.itemsize, bound("density", density)


def lookup(op: str, x: Tensor, N: int, K: int, batch: int, density: float = 1.0) -> Config:
    """What the table of x's device says of the problem, whose values are of x's dtype; empty where it says nothing."""
    if _forced:
        return _forced.get(op, {})
    if not x.is_cuda:
        return {}
    return _measured(x.get_device(), op, N, K, batch, x.dtype, density)


def picks(op: str, implementation: str, x: Tensor, N: int, K: int, density: float) -> bool:
    """Whether the table of x's device names this implementation at any number of tokens."""
    found = (lookup(op, x, N, K, int(batch), density) for batch in BOUNDS["batch"])
    return any(config.get("implementation") == implementation for config in found)


@contextmanager
def forced(op: str, config: Config) -> Iterator[None]:
    """``lookup`` finds this configuration, and no other, meanwhile."""
    _forced[op] = config
    try:
        yield
    finally:
        del _forced[op]


@lru_cache(maxsize=4096)
def _measured(device: int, op: str, N: int, K: int, batch: int, dtype: torch.dtype, density: float) -> Config:
    return _table(architecture(device)).get(bucket(op, N, K, batch, dtype, density), {})


@lru_cache(maxsize=16)
def _table(architecture: str) -> dict[Bucket, Config]:
    path = FOLDER / f"{architecture}.json"
    return read(path) if path.exists() else {}


def architecture(device: int) -> str:
    """``sm_90``, or on AMD ``gfx942``: the name of a table."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def read(path: Path) -> dict[Bucket, Config]:
    """The table in ``path``.

    Raises:
        ValueError: it is no table, or has an op, a bucket, a setting or a value that this release does not know.
    """
    try:
        entries = json.loads(path.read_text())["entries"]
        table = {
            (e["op"], e["N"], e["K"], e["batch"], e["value_bytes"], e["density"]): e["config"] for e in entries
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a table of fasticl bench --tune, got {error!r}") from error
    for (op, N, K, batch, _, density), config in table.items():
        if op not in SPACE:
            raise ValueError(f"{path}: op: expected one of {', '.join(SPACE)}, got {op!r}")
        for name, value in (("N", N), ("K", K), ("batch", batch), ("density", density)):
            if value not in BOUNDS[name]:
                raise ValueError(f"{path}: {op}: {name}: expected one of {BOUNDS[name]}, got {value!r}")
        check(f"{path}: {op}", op, config)
    return table


def check(where: str, op: str, config: Config) -> None:
    """
    Raises:
        ValueError: a setting or a value of ``config`` is unknown.
    """
    for name, value in config.items():
        if name not in SPACE[op]:
            raise ValueError(f"{where}: expected settings among {', '.join(SPACE[op])}, got {name!r}")
        if value not in SPACE[op][name]:
            raise ValueError(f"{where}: {name}: expected one of {SPACE[op][name]}, got {value!r}")
