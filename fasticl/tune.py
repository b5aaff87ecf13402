"""Measures launch configurations on the GPU at hand and writes the table that :mod:`fasticl.tuned` reads.

Of each problem one setting after the other is varied, all its values interleaved with the best so far; what is best in
the end replaces the default if it is faster by ``MARGIN``, both timed once more. Calls run in CUDA graphs, on copies of
the weights that together exceed the L2 cache.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fasticl
from fasticl import cusparselt, lane_stream, ops, tuned
from fasticl.ops.bitmap_linear import has_cuda_kernel
from fasticl.timing import interleaved
from fasticl.tuned import SPACE, Bucket, Config

MARGIN = 0.03
SECONDS = 0.05  # of timing, for each contender
CALLS = 16  # in a graph, at least
COPIES = 32  # of weights, at most
# (N, K) of linears, (H, K) of MLPs: one of each bucket that models of one to eight billion parameters have
LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 2048), (2048, 8192), (3072, 768))
MLPS = ((14336, 4096), (8192, 2048), (3072, 768))
PROMPTS = ((512, 64, 1024), (512, 256, 1024), (20, 60, 1024), (4096, 64, 1))  # L, d, prompts
NEURONS = 256  # of attention_mlp
BATCHES = (1, 16, 64, 256)
PREFILL = 1024  # tokens: bitmap_linear and nm_linear have implementations for many
DENSITIES = {"bitmap_linear": (0.5, 0.2), "sliced_linear": (0.2, 0.1), "nm_linear": (0.5,)}


@dataclass(frozen=True)
class Problem:
    """``calls()`` makes what is timed, one callable for each copy of the data."""

    op: str
    N: int
    K: int
    batch: int
    dtype: torch.dtype
    density: float
    calls: Callable[[], Sequence[Callable[[], Tensor]]]

    @property
    def bucket(self) -> Bucket:
        return tuned.bucket(self.op, self.N, self.K, self.batch, self.dtype, self.density)

    def __str__(self) -> str:
        return f"{self.op} {self.N}x{self.K}, batch {self.batch}, {self.dtype}, density {self.density:g}"


# Milliseconds of a call under each configuration
Timer = Callable[[Problem, Sequence[Callable[[], Tensor]], Sequence[Config]], list[float]]


def problems(op_names: Sequence[str], dtype: torch.dtype, device: str = "cuda") -> list[Problem]:
    """What is tuned of these ops, at most one problem of a bucket."""
    found: dict[Bucket, Problem] = {}

    def add(op: str, N: int, K: int, batch: int, density: float, make: Callable[..., Any]) -> None:
        problem = Problem(op, N, K, batch, dtype, density, partial(make, op, N, K, batch, density, dtype, device))
        found.setdefault(problem.bucket, problem)

    for op in op_names:
        if op == "attention_mlp":
            for L, d, prompts in PROMPTS:
                add(op, L, d, prompts, 1.0, _attention_calls)
        elif op == "fused_mlp":
            for H, K in MLPS:
                for batch in BATCHES:
                    add(op, H, K, batch, 1.0, _mlp_calls)
        else:
            batches = BATCHES[:2] if op == "sliced_linear" else (*BATCHES, PREFILL)
            for density in DENSITIES[op]:
                for N, K in LAYERS:
                    for batch in batches:
                        add(op, N, K, min(batch, 8) if op == "sliced_linear" else batch, density, _linear_calls)
    return list(found.values())


def _normal(*size: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(size))
    return torch.randn(size, generator=generator, device=device).to(dtype)


def _copies(data: Any, size: int, device: str) -> list[Any]:
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device != "cpu" else 0
    count = max(1, min(COPIES, math.ceil(1.25 * cache / max(1, size))))
    return [data, *(copy.deepcopy(data) for _ in range(count - 1))]


def _linear_calls(
    op: str, N: int, K: int, batch: int, density: float, dtype: torch.dtype, device: str
) -> list[Callable[[], Tensor]]:
    weight, x = _normal(N, K, dtype=dtype, device=device), _normal(batch, K, dtype=dtype, device=device)
    if op == "nm_linear":
        dropped = weight.view(N, K // 4, 4).abs().argsort(2)[..., :2]
        weight = weight.view(N, K // 4, 4).scatter(2, dropped, 0).view(N, K)
        with tuned.forced(op, {"implementation": cusparselt.NAME}):  # for the copy that it takes
            packed = fasticl.pack(weight, "nm", pattern="2:4")
    else:
        chance = torch.rand(N, K, generator=torch.Generator(device).manual_seed(0), device=device)
        packed = fasticl.pack(weight.masked_fill(chance >= density, 0), op.removesuffix("_linear"))
    return [partial(getattr(ops, op), x, each) for each in _copies(packed, packed.bytes_read, device)]


def _mlp_calls(
    op: str, H: int, K: int, batch: int, density: float, dtype: torch.dtype, device: str
) -> list[Callable[[], Tensor]]:
    x, up = _normal(batch, K, dtype=dtype, device=device), _normal(H, K, dtype=dtype, device=device) / K**0.5
    down = _normal(K, H, dtype=dtype, device=device) / H**0.5
    copies = _copies((up, down), 2 * up.nbytes, device)
    return [partial(ops.fused_mlp, x, *each, activation="gelu") for each in copies]


def _attention_calls(
    op: str, L: int, d: int, prompts: int, density: float, dtype: torch.dtype, device: str
) -> list[Callable[[], Tensor]]:
    normal = partial(_normal, dtype=dtype, device=device)
    context, query, A = normal(prompts, L, d), normal(prompts, d), normal(d, d) / d
    W, a = normal(NEURONS, d) / d**0.5, normal(NEURONS) / NEURONS
    return [partial(ops.attention_mlp, each, query, A, W, a) for each in _copies(context, context.nbytes, device)]


def time_in_graphs(
    problem: Problem, calls: Sequence[Callable[[], Tensor]], configs: Sequence[Config]
) -> list[float]:  # fmt: skip
    replays: dict[str, Callable[[], object]] = {}
    count = len(calls) * -(-CALLS // len(calls))
    for index, config in enumerate(configs):
        graph = torch.cuda.CUDAGraph()
        with tuned.forced(problem.op, config), torch.cuda.graph(graph):
            for call in [*calls] * (count // len(calls)):
                call()
        replays[str(index)] = graph.replay
    timings = interleaved(replays, seconds=SECONDS * len(configs), synchronize=torch.cuda.synchronize)
    return [timings[str(index)].ms_p50 / count for index in range(len(configs))]


def search(problem: Problem, time: Timer = time_in_graphs) -> dict[str, Any]:
    """The table's entry: the problem's bucket, the configuration that won (empty: the default), and both times in ms.

    A configuration counts that computes on every copy what the default does, up to rounding.
    """
    calls = problem.calls()
    with tuned.forced(problem.op, {}):
        expected = [call() for call in calls]

    def agrees(config: Config) -> bool:
        with suppress(Exception), tuned.forced(problem.op, config):  # some want more shared memory than there is
            return all(_close(call(), truth) for call, truth in zip(calls, expected, strict=True))
        return False

    space = dict(SPACE[problem.op])
    implementations = [name for name in space.pop("implementation", ()) if _runs(name, problem.dtype)]
    # The settings are Triton's, which is tried at its best; CUDA C++, where it is there, is the default.
    best: dict[str, Any] = {"implementation": "Triton"} if len(implementations) > 1 else {}
    if agrees(best):
        for name, values in space.items():
            tried = [best, *(c for value in values if agrees(c := {**best, name: value}))]
            ms = time(problem, calls, tried)
            best = dict(tried[ms.index(min(ms))])
    between = [name for name in implementations if name not in ("CUDA C++", "Triton")]
    others: list[Config] = [*({"implementation": name} for name in between), best]
    finalists: list[Config] = [{}, *(config for config in others if config and agrees(config))]
    ms = time(problem, calls, finalists)
    chosen = ms.index(min(ms))
    chosen = chosen if ms[chosen] * (1 + MARGIN) <= ms[0] else 0
    config = dict(finalists[chosen])
    if "CUDA C++" in implementations and not config:
        config["implementation"] = "CUDA C++"
    names = ("op", "N", "K", "batch", "value_bytes", "density")
    return {
        **dict(zip(names, problem.bucket, strict=True)),
        "config": config, "ms": round(ms[chosen], 6), "default_ms": round(ms[0], 6),
    }  # fmt: skip


def _runs(implementation: str, dtype: torch.dtype) -> bool:
    if implementation == cusparselt.NAME:
        return dtype in cusparselt.DTYPES and torch.cuda.is_available() and cusparselt.runs_on(_current_device())
    return implementation == "Triton" or (has_cuda_kernel and dtype in lane_stream.DTYPES)


def _current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _close(y: Tensor, expected: Tensor) -> bool:
    """A rounding of the dtype, and what float32 sums in another order differ by."""
    tolerance = 2 * torch.finfo(y.dtype).eps + 32 * torch.finfo(torch.float32).eps
    largest = float(expected.double().abs().max())
    return float((y.double() - expected.double()).abs().max()) <= tolerance * largest  # NaN is not


@torch.inference_mode()
def tune(found: Iterable[Problem], say: Callable[[str], object], time: Timer = time_in_graphs) -> list[dict[str, Any]]:
    """The entries of these problems; ``say`` is told each."""
    entries = []
    for problem in found:
        entry = search(problem, time)
        gain = entry["default_ms"] / entry["ms"]
        say(f"{problem}: {entry['config'] or 'default'}, {entry['ms']:.4g} ms, {gain:.2f}x the default")
        entries.append(entry)
    return entries


def write(path: Path, entries: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> None:
    """Writes the table, and checks that it reads; entries of other problems that the file has stay."""
    key = ("op", "N", "K", "batch", "value_bytes", "density")
    kept: list[Mapping[str, Any]] = []
    if path.exists():
        tuned.read(path)
        new = {tuple(entry[name] for name in key) for entry in entries}
        before = json.loads(path.read_text())["entries"]
        kept = [entry for entry in before if tuple(entry[name] for name in key) not in new]
    lines = ",\n  ".join(json.dumps(entry) for entry in sorted([*kept, *entries], key=lambda e: [e[n] for n in key]))
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(f'{{\n "about": {json.dumps(dict(about))},\n "entries": [\n  {lines}\n ]\n}}\n')
    tuned.read(partial_path)
    partial_path.replace(path)


def about() -> dict[str, str]:
    """Of the table: where and with what it was measured."""
    triton = importlib.metadata.version("triton")
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton,
        "fasticl": fasticl.__version__,
    }  # fmt: skip
