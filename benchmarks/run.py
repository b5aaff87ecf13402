"""Measures the kernels against the dense ones: ``python benchmarks/run.py``, one CSV row per measurement.

Each case is written when it is done; one that the file has, from the same sources and torch, is not measured again.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
import warnings
from pathlib import Path

import gpu_cases
import torch
from common import DTYPES, Case, Results, WrongResult, measure, nvtx_ranges, trace, use
from environment import ROOT, Environment, cpu_slug, gpu_slug
from threadpoolctl import threadpool_limits

# For the estimate of a GPU's run, which is printed beside what it took: seconds of building, checking and capturing a
# contender, and of the compilers in the first cases.
CONTENDER_SECONDS, FIRST_SECONDS = 0.25, 60.0
GPU_MINUTES = 8.0
CPU_OPS = ("bandwidth", "bitmap_linear", "sliced_linear", "nm_linear", "fused_mlp", "attention_mlp", "model", "decoder")
OPS = (*CPU_OPS, "decoder_block")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--op", choices=OPS, action="append", help="only this one; repeat for more")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only this one; repeat for more")
    parser.add_argument("--quick", action="store_true", help="the headline cases with few samples; not for quoting")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="of the weights and inputs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.csv; --quick: runs/bench/")
    parser.add_argument("--force", action="store_true", help="measure again what the file has")
    parser.add_argument(
        "--minutes",
        type=float,
        help="start no case after so many; run again for the rest (default: 8 on cuda, else none)",
    )
    parser.add_argument("--nvtx", action="store_true", help="ranges around each case and contender, for a profiler")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a chrome trace of a call of each; time nothing"
    )
    return parser.parse_args(arguments)


def estimate(cases: list[Case], seconds: float) -> float:
    """Seconds that the cases will take on a GPU, about."""
    first = FIRST_SECONDS if cases else 0.0
    return first + sum(seconds + case.contenders * CONTENDER_SECONDS + case.extra_seconds for case in cases)


def selected(options: argparse.Namespace) -> list[Case]:
    """Headline cases first, on a CPU in the order of ``CPU_OPS``."""
    cases: list[Case] = []
    if options.device == "cuda":
        cases = [case for case in gpu_cases.cases(options.quick) if options.op is None or case.op in options.op]
    else:
        for op in CPU_OPS:
            if options.op is None or op in options.op:
                cases += importlib.import_module(f"bench_{op}").cases(options.quick)
    cases = [case for case in cases if options.dtype is None or case.dtype in options.dtype]
    if options.quick:
        cases = [case for case in cases if case.tier == "headline"]
    if len({str(case) for case in cases}) != len(cases):
        raise ValueError("cases: expected each of them once, got two with the same columns")
    return sorted(cases, key=lambda case: case.tier != "headline")


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a result was wrong, a case failed, or nothing was selected."""
    options = parse(arguments)
    if options.threads < 1:
        raise SystemExit(f"--threads: expected at least 1, got {options.threads}")
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads, user_api="blas")  # NumPy's OpenBLAS
    folder = ROOT / ("runs/bench" if options.quick else "benchmarks/results")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: expected cpu on a machine without a CUDA device, got cuda")
    use(options.device)
    machine = gpu_slug() if options.device == "cuda" else f"cpu-{cpu_slug(options.threads)}"
    results = Results(options.out or folder / f"{machine}.csv")
    environment = Environment.current(options.device, options.threads)
    seconds, min_samples = (0.2, 3) if options.quick else (0.3 if options.device == "cuda" else 1.0, 15)

    cases = selected(options)
    if not cases:
        print("no case fits --op and --dtype", file=sys.stderr)
        return 1
    start = time.perf_counter()
    if options.trace:
        with torch.no_grad():
            trace(cases, options.trace)
        print(f"{options.trace}: {len(cases)} cases, {time.perf_counter() - start:.0f} s")
        return 0
    left = [case for case in cases if options.force or not results.has(case, environment)]
    minutes = GPU_MINUTES if options.device == "cuda" else float("inf")
    limit = 60 * (minutes if options.minutes is None else options.minutes)
    expected = f"of about {estimate(left, seconds):.0f} s" if options.device == "cuda" else ""
    print(f"{len(left)} of {len(cases)} cases to measure {expected}; limit {limit:.0f} s", flush=True)
    mark = nvtx_ranges() if options.nvtx else None
    wrong = 0
    for index, case in enumerate(cases, 1):
        head = f"[{index}/{len(cases)}, {time.perf_counter() - start:.0f} s] {case}"
        if not options.force and results.has(case, environment):
            print(f"{head}: already measured", flush=True)
            continue
        if time.perf_counter() - start > limit:
            print(f"{head}: past {limit:.0f} s; run again for the rest", flush=True)
            break
        print(head, flush=True)
        try:
            with torch.no_grad():
                rows = measure(case, environment, seconds=seconds, min_samples=min_samples, mark=mark)
        except WrongResult as error:
            print(f"    WRONG, not timed: {error}", flush=True)
            wrong += 1
            continue
        except Exception as error:  # a refusal of the device, say: the other cases are worth their time all the same
            traceback.print_exc(limit=-4, file=sys.stdout)
            print(f"    FAILED, not timed: {type(error).__name__}", flush=True)
            wrong += 1
            continue
        for row in rows:
            speedup = f"{float(row['speedup']):6.2f}x {row['baseline']}" if row["speedup"] else f"{row['gbps']:>6} GB/s"
            print(
                f"    {row['impl']:14} {row['pattern']:12} {row['sparsity']:>4}  {float(row['ms_p50']):10.4f} ms"
                f"  {speedup}  error {row['rel_err']}",
                flush=True,
            )
        results.put(rows)
    print(f"{results.path}: {len(results.rows)} rows, {time.perf_counter() - start:.0f} s {expected}")
    return 1 if wrong else 0


if __name__ == "__main__":
    warnings.simplefilter("default")
    sys.exit(main())
