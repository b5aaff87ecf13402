"""What every benchmark shares: a case, its contenders, the check before the clock, and the CSV that the rows go to."""

from __future__ import annotations

import csv
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from math import ceil
from pathlib import Path

import gpu_clock
import torch
from environment import Environment, cold_bytes
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from fasticl.timing import interleaved

# fmt: off
COLUMNS = (
    "op", "impl", "device", "dtype", "shape", "sparsity", "pattern", "batch", "ms_p50", "ms_p20", "ms_p80", "gbps",
    "tflops", "rel_err", "baseline", "speedup", "torch", "triton", "fasticl", "git", "utc", "threads", "cache",
)
# fmt: on
CASE_COLUMNS = ("op", "device", "dtype", "shape", "batch", "cache", "threads")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A thread pool goes on spinning after its last job, and would take a core from the contender that runs next on
# another pool. The process has settled when for so long it used little more than the one core that waits.
SETTLED_SECONDS = 0.012
# Long enough to be about calls in a row, as in a decoding loop, not about the first ones after a pause.
SAMPLE_MS = 15.0
Mark = Callable[[str], AbstractContextManager[object]]
_device = "cpu"


def use(device: str) -> None:
    """Where cases put their tensors from now on."""
    global _device
    _device = device


def nvtx_ranges() -> Mark:
    """Opens a range in the profiles of NVIDIA's tools; does nothing where the package nvtx is absent."""
    try:
        import nvtx
    except ImportError:
        return nullcontext
    return nvtx.annotate


def device() -> str:
    return _device


def generator(salt: int) -> torch.Generator:
    """Random numbers that depend on ``torch.manual_seed`` and ``salt`` alone, not on which cases ran before."""
    return torch.Generator(device()).manual_seed(torch.initial_seed() % (1 << 62) + salt)


def normal(*size: int, salt: int) -> Tensor:
    """Gaussian, float32, on the device."""
    return torch.randn(size, generator=generator(salt), device=device())


class WrongResult(RuntimeError):
    """A contender's output is further from the float64 result than its tolerance; it is not timed."""


def relative_error(output: Tensor, expected: Tensor) -> float:
    """``max |output - expected| / max |expected|``, in float64; NaN where either has one.

    Raises:
        ValueError: if the shapes differ.
    """
    if output.shape != expected.shape:
        raise ValueError(f"output: expected shape {tuple(expected.shape)}, got {tuple(output.shape)}")
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((output.double() - expected.double()).abs().max() / scale)


@dataclass(frozen=True)
class Truth:
    """The float64 result and the largest relative error that passes for it."""

    expected: Tensor
    tolerance: float

    @classmethod
    def of(cls, function: Callable[..., Tensor], *tensors: Tensor) -> Truth:
        """``function`` at float64, and torch's own error in the tensors' dtype."""
        return cls.against(function(*(tensor.double() for tensor in tensors)), function(*tensors))

    @classmethod
    def against(cls, expected: Tensor, output: Tensor) -> Truth:
        """``expected`` at float64; tolerated is twice the error of torch's ``output``, plus one unit of its dtype."""
        return cls(expected, 2 * relative_error(output, expected) + torch.finfo(output.dtype).eps)

    def loose(self) -> Truth:
        """For what is there to be compared with: held to the order of torch's error, not to twice it."""
        return Truth(self.expected, 10 * self.tolerance)

    def check(self, output: Tensor, name: str) -> float:
        """The relative error of ``output``.

        Raises:
            WrongResult: if it passes the tolerance, or is NaN.
        """
        error = relative_error(output, self.expected)
        if not error <= self.tolerance:
            raise WrongResult(f"{name}: expected a relative error of at most {self.tolerance:.2e}, got {error:.2e}")
        return error


@dataclass(frozen=True)
class Contender:
    """One implementation of a case.

    Attributes:
        impl: its name in the CSV.
        calls: computes the result; one callable per copy of the weights, used in turn.
        truth: what every call must return.
        bytes: read and written by one call, at least: weights as stored, inputs, outputs.
        flops: of one call, two per stored weight and token; zeros that are not stored count nothing.
        pattern: of its zeros; "dense" has none, "none" multiplies no weights and gets no speed-up.
        dense: whether it may be the *best dense* that speed-ups are relative to.
        own_pool: whether it runs on a thread pool other than torch's.
        optional: a baseline that this torch or device may refuse, at any point; then a line says so.
    """

    impl: str
    calls: Sequence[Callable[[], Tensor]]
    truth: Truth
    bytes: int
    flops: int
    sparsity: float = 0.0
    pattern: str = "dense"
    dense: bool = False
    own_pool: bool = False
    optional: bool = False

    @property
    def name(self) -> str:
        return f"{self.impl} {self.pattern} {self.sparsity:g}"


def optional(impl: str, make: Callable[[], Contender]) -> list[Contender]:
    """The baseline that ``make`` makes; none, and a line, where this torch or device refuses to."""
    try:
        return [replace(make(), optional=True)]
    except Exception as error:
        _say_refused(impl, error)
        return []


def _say_refused(name: str, error: Exception) -> None:
    reason = next(iter(str(error).strip().splitlines()), "")
    print(f"    {name} is not measured: {type(error).__name__}: {reason[:160]}", flush=True)


@dataclass(frozen=True)
class Case:
    """Contenders that do the same job and are timed against each other; ``build`` makes them, at the time of need."""

    op: str
    dtype: str
    shape: str
    batch: int
    build: Callable[[], list[Contender]]
    cache: str = "hot"  # "cold": the weights come from memory; "hot": from where one copy of each fits
    tier: str = "sweep"  # "headline": run by --quick and first
    contenders: int = 1  # about; for an estimate of how long the case takes
    extra_seconds: float = 0.0  # the same: of compilers, and of building what is large

    def __str__(self) -> str:
        return f"{self.op} {self.shape} batch {self.batch} {self.dtype} {self.cache}"


def key(case: Case, environment: Environment) -> tuple[str, ...]:
    """The values of ``CASE_COLUMNS``."""
    return (
        case.op, environment.device, case.dtype, case.shape, str(case.batch), case.cache, str(environment.threads),
    )  # fmt: skip


def copies_of(weight_bytes: int, cache: str) -> int:
    """How many copies of the weights a contender rotates: one when hot; when cold as many as leave the cache."""
    return 1 if cache == "hot" else min(128, max(2, ceil(cold_bytes(device()) / weight_bytes)))


def checked(case: Case) -> dict[str, tuple[Contender, float]]:
    """The contenders by name, each with the largest relative error of its copies.

    Raises:
        WrongResult: if a contender is wrong that is not optional.
    """
    found = {}
    for contender in case.build():
        name = f"{case}, {contender.name}"
        try:
            error = max(contender.truth.check(call(), name) for call in contender.calls)
        except Exception as refusal:
            if not contender.optional:
                raise
            _say_refused(contender.name, refusal)
        else:
            found[contender.name] = contender, error
    return found


def measure(
    case: Case, environment: Environment, *, seconds: float = 1.0, min_samples: int = 15, mark: Mark | None = None
) -> list[dict[str, str]]:
    """Checks every copy of every contender, then times them against each other.

    ``mark`` opens a range around the case, and one around every call, or every replay, of each contender.

    Returns:
        one row of ``COLUMNS`` per contender.

    Raises:
        WrongResult: if any contender is wrong that is not optional; then nothing was timed.
    """
    with (mark or nullcontext)(str(case)):
        return _measure(case, environment, seconds, min_samples, mark)


def _measure(
    case: Case, environment: Environment, seconds: float, min_samples: int, mark: Mark | None
) -> list[dict[str, str]]:
    found = checked(case)
    contenders, errors = [c for c, _ in found.values()], {name: error for name, (_, error) in found.items()}

    turns: dict[str, Sequence[Callable[[], object]]] = {}
    for contender in contenders:
        settle = contender.own_pool and environment.threads > 1 and environment.device == "cpu"
        if settle:
            turns[f"before {contender.name}"] = [_settle]
        turns[contender.name] = contender.calls
        if mark is not None and environment.device == "cpu":
            turns[contender.name] = [_marked(mark, contender.name, call) for call in contender.calls]
        if settle:
            turns[f"after {contender.name}"] = [_settle]
    if environment.device == "cuda":
        refusing = {c.name for c in contenders if c.optional}
        timings, refused = gpu_clock.interleaved(
            turns, seconds=seconds, min_samples=min_samples, optional=refusing, mark=mark or nullcontext
        )
        for name, refusal in refused.items():
            _say_refused(name, refusal)
        contenders = [contender for contender in contenders if contender.name in timings]
    else:
        timings = interleaved(turns, seconds=seconds, sample_ms=SAMPLE_MS, min_samples=min_samples)

    best = min((c for c in contenders if c.dense), key=lambda c: timings[c.name].ms_p50, default=None)
    utc = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    rows = []
    for contender in contenders:
        timing = timings[contender.name]
        compared = {}
        if best is not None and contender.pattern != "none":
            compared = {"baseline": best.impl, "speedup": f"{timings[best.name].ms_p50 / timing.ms_p50:.4g}"}
        rows.append(
            {
                **dict(zip(CASE_COLUMNS, key(case, environment), strict=True)),
                "impl": contender.impl,
                "sparsity": f"{contender.sparsity:g}",
                "pattern": contender.pattern,
                "ms_p50": f"{timing.ms_p50:.5g}",
                "ms_p20": f"{timing.ms_p20:.5g}",
                "ms_p80": f"{timing.ms_p80:.5g}",
                "gbps": f"{contender.bytes / timing.ms_p50 / 1e6:.4g}",
                "tflops": f"{contender.flops / timing.ms_p50 / 1e9:.4g}",
                "rel_err": f"{errors[contender.name]:.2e}",
                "baseline": "",
                "speedup": "",
                **compared,
                "torch": environment.torch,
                "triton": environment.triton,
                "fasticl": environment.fasticl,
                "git": environment.git,
                "utc": utc,
            }
        )
    return rows


def _marked(mark: Mark, name: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with mark(name):
            return call()

    return run


def trace(cases: Sequence[Case], path: Path) -> None:
    """Writes to ``path`` a chrome trace of one call of each contender, after the calls that check it; times nothing."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    merged: dict[str, object] = {}
    events: list[object] = []
    for case in cases:
        contenders = checked(case)
        with profile(activities=activities) as profiler, record_function(str(case)):
            for name, (contender, _) in contenders.items():
                with record_function(name):
                    contender.calls[0]()
                    if device() == "cuda":
                        torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(part))
            merged = json.loads(part.read_text())
        events += merged["traceEvents"]  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**merged, "traceEvents": events}))


def _settle() -> None:
    """Waits without sleeping: a virtual machine that falls idle may find its cores share a physical one afterwards."""
    for _ in range(40):
        start, before = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < SETTLED_SECONDS:
            pass
        if time.process_time() - before < 1.4 * SETTLED_SECONDS:
            return


class Results:
    """The CSV at ``path``: one block of rows per case, a block replaced when its case is measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path) if path.exists() else []

    def has(self, case: Case, environment: Environment) -> bool:
        """Whether the case is there, measured with these sources and this torch."""
        same = (environment.torch, environment.fasticl, environment.git)
        wanted = key(case, environment)
        return any(_key(row) == wanted and (row["torch"], row["fasticl"], row["git"]) == same for row in self.rows)

    def put(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Writes the rows of one case in place of its earlier ones."""
        keys = {_key(row) for row in rows}
        self.rows = [row for row in self.rows if _key(row) not in keys] + [dict(row) for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in CASE_COLUMNS)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a results file.

    Raises:
        ValueError: if its columns are not ``COLUMNS``.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected columns {','.join(COLUMNS)}, got {','.join(reader.fieldnames or ())}")
        return list(reader)
