"""Wall-clock timing of several callables against each other, in one process and interleaved."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle

import numpy as np

try:
    import resource
except ImportError:  # Windows: preempted samples cannot be told from the others
    resource = None  # type: ignore[assignment]

Contender = Callable[[], object]
CALIBRATION_SAMPLES = 3
LONG_CALL_SECONDS = 0.02  # beside which it does not matter that threads have to wake


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, 20th and 80th percentile over ``samples`` samples of ``repeats`` calls each."""

    ms_p50: float
    ms_p20: float
    ms_p80: float
    samples: int
    repeats: int

    def __str__(self) -> str:
        return f"{self.ms_p50:.4g} ms ({self.ms_p20:.4g} to {self.ms_p80:.4g})"


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


@contextmanager
def workers_apart() -> Iterator[None]:
    """While it lasts, this thread keeps to its first CPU and the process's other threads to the others (Linux).

    A scheduler may wake the worker of a thread pool on the CPU where the caller spins until it is done, and leave it
    there for milliseconds. Threads that start in between stay with their parent: run what starts a pool once before.
    Does nothing where this thread may use one CPU only, as with ``OMP_PROC_BIND``. Affinities are restored.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cpus) < 2:
        yield
        return
    here = threading.get_native_id()
    before: dict[int, set[int]] = {}
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError):  # it has ended
            before[thread] = os.sched_getaffinity(thread)
            os.sched_setaffinity(thread, cpus[:1] if thread == here else cpus[1:])
    try:
        yield
    finally:
        for thread, affinity in before.items():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, affinity)


def _sample(calls: Sequence[Contender], synchronize: Contender | None) -> float:
    """Seconds for all ``calls``, one after the other."""
    start = time.perf_counter()
    for call in calls:
        call()
    if synchronize is not None:
        synchronize()
    return time.perf_counter() - start


def _quickest(next_call: Iterator[Contender], count: int, synchronize: Contender | None) -> float:
    """Seconds for ``count`` calls: the least of some samples, since a single one may be a hundred times too long."""
    return min(_sample([next(next_call) for _ in range(count)], synchronize) for _ in range(CALIBRATION_SAMPLES))


def interleaved(
    contenders: Mapping[str, Contender | Sequence[Contender]],
    *,
    seconds: float = 1.0,
    sample_ms: float = 1.0,
    min_samples: int = 5,
    synchronize: Contender | None = None,
) -> dict[str, Timing]:
    """Times each contender; quote ``result["a"].ms_p50 / result["b"].ms_p50``, the ratio of medians.

    Each round takes one sample of every contender, in an order that turns round every time, so that a slow second of a
    shared machine falls on all of them. One sample is as many calls as take ``sample_ms``, at least one; before it an
    untimed call wakes the contender's threads, if calls are so short that this matters. Samples in which the scheduler
    interrupted the process are left out where ``min_samples`` others remain.

    Args:
        contenders: name to callable; or to several callables that do the same on their own copies of the data, called
            in turn, so that a copy has left the cache when it is used again.
        seconds: for all contenders together, after the warm-up; slow contenders overrun it to reach ``min_samples``.
        sample_ms: the shortest sample.
        min_samples: samples of each contender, at least.
        synchronize: called at the end of each sample; waits for a device that runs asynchronously.

    Raises:
        ValueError: no contender, a name without a callable, or a limit that is not positive.
    """
    if not contenders:
        raise ValueError("contenders: expected at least one callable, got none")
    if not (seconds > 0 and sample_ms > 0 and min_samples > 0):
        raise ValueError(
            f"seconds, sample_ms and min_samples: expected positive, got {seconds}, {sample_ms} and {min_samples}"
        )
    turns: dict[str, list[Contender]] = {}
    for name, calls in contenders.items():
        turns[name] = [calls] if callable(calls) else list(calls)
        if not turns[name]:
            raise ValueError(f"contenders[{name!r}]: expected a callable or several, got an empty sequence")

    for calls in turns.values():
        _sample(calls, synchronize)  # first calls allocate, compile and start threads
    with workers_apart():
        taken, repeats = _take(turns, seconds, sample_ms, min_samples, synchronize)

    result = {}
    for name, samples in taken.items():
        quiet = [ms for ms, undisturbed in samples if undisturbed]
        kept = quiet if len(quiet) >= min_samples else [ms for ms, _ in samples]
        p20, p50, p80 = np.percentile(kept, [20, 50, 80])
        result[name] = Timing(float(p50), float(p20), float(p80), len(kept), repeats[name])
    return result


def _take(
    turns: Mapping[str, Sequence[Contender]],
    seconds: float,
    sample_ms: float,
    min_samples: int,
    synchronize: Contender | None,
) -> tuple[dict[str, list[tuple[float, bool]]], dict[str, int]]:
    """Of each contender the samples, (ms per call, whether undisturbed), and the number of calls in each."""
    next_call = {name: cycle(calls) for name, calls in turns.items()}
    repeats: dict[str, int] = {}
    waking: dict[str, bool] = {}
    for name in turns:
        count = 1
        while (took := _quickest(next_call[name], count, synchronize)) * 1e3 < sample_ms:
            count = max(count + 1, min(count * 8, int(count * 1.2 * sample_ms / (took * 1e3 + 1e-9))))
        repeats[name], waking[name] = count, took < LONG_CALL_SECONDS

    taken: dict[str, list[tuple[float, bool]]] = {name: [] for name in turns}
    order = list(turns)
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_samples or time.perf_counter() < stop:
        for name in order:
            if waking[name]:
                _sample([next(next_call[name])], synchronize)
            calls = [next(next_call[name]) for _ in range(repeats[name])]
            before = _preemptions()
            took = _sample(calls, synchronize)
            taken[name].append((took * 1e3 / len(calls), _preemptions() == before))
        order.reverse()
        rounds += 1
    return taken, repeats
