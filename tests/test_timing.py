"""Interleaved timing: who is slower by how much, copies in turn, and refused arguments."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter

import pytest

from fasticl.timing import CALIBRATION_SAMPLES, interleaved, workers_apart


def busy(ms: float) -> None:
    end = time.perf_counter() + ms / 1e3
    while time.perf_counter() < end:
        pass


def test_ratio_of_known_durations() -> None:
    timings = interleaved({"short": lambda: busy(0.4), "long": lambda: busy(2.0)}, seconds=0.2)
    assert timings["short"].ms_p50 == pytest.approx(0.4, rel=0.2)
    assert timings["long"].ms_p50 / timings["short"].ms_p50 == pytest.approx(5, rel=0.2)
    assert timings["short"].repeats >= 2  # one sample takes at least a millisecond
    assert timings["long"].repeats == 1
    for timing in timings.values():
        assert timing.ms_p20 <= timing.ms_p50 <= timing.ms_p80
        assert timing.samples >= 5


def test_contenders_take_turns() -> None:
    order: list[str] = []
    interleaved({name: lambda name=name: (order.append(name), busy(1.1)) for name in "ab"}, seconds=0.02)
    timed = order[2 * (1 + CALIBRATION_SAMPLES) :]  # after the warm-up and the calibrating calls of each
    assert timed[::2] == timed[1::2]  # a sample is one call here, and one before it wakes the threads
    assert sorted(timed[:4:2]) == sorted(timed[4:8:2]) == ["a", "b"]
    assert timed[:4] == timed[4:8][::-1]  # the order turns round


def test_copies_are_used_evenly() -> None:
    calls: Counter[int] = Counter()
    copies = [lambda i=i: (calls.update([i]), busy(0.2)) for i in range(3)]
    interleaved({"copies": copies}, seconds=0.05)
    assert set(calls) == {0, 1, 2}
    assert max(calls.values()) - min(calls.values()) <= 1


def test_slow_contenders_get_their_samples() -> None:
    calls: list[None] = []
    timings = interleaved({"slow": lambda: (calls.append(None), busy(25))}, seconds=1e-3, min_samples=3)
    assert len(calls) == 1 + CALIBRATION_SAMPLES + 3  # warm-up, calibration and three samples
    assert timings["slow"].ms_p50 > 24  # more where other processes run


def test_one_slow_calibrating_call_does_not_shorten_the_samples() -> None:
    calls: list[None] = []

    def call() -> None:
        calls.append(None)
        busy(10 if len(calls) == 2 else 0.05)  # the first call is the warm-up

    timing = interleaved({"call": call}, seconds=0.02)["call"]
    assert timing.repeats * 0.05 > 0.5  # of the millisecond that a sample is to take


def test_synchronize_ends_each_sample() -> None:
    waits: list[None] = []
    timing = interleaved({"launch": lambda: None}, seconds=0.02, synchronize=lambda: (waits.append(None), busy(1.0)))
    assert waits
    assert timing["launch"].ms_p50 * timing["launch"].repeats >= 1.0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads have no affinity here")
def test_workers_apart_keeps_threads_off_the_callers_cpu_and_restores_them() -> None:
    stop = threading.Event()
    worker = threading.Thread(target=stop.wait)
    worker.start()
    try:
        threads = (0, worker.native_id)
        before = [os.sched_getaffinity(thread) for thread in threads]
        with workers_apart():
            caller, other = (os.sched_getaffinity(thread) for thread in threads)
        assert [os.sched_getaffinity(thread) for thread in threads] == before
    finally:
        stop.set()
        worker.join()
    if len(before[0]) == 1:
        assert [caller, other] == before
    else:
        assert len(caller) == 1
        assert caller | other == before[0]
        assert not caller & other


@pytest.mark.parametrize(
    ("contenders", "limits", "message"),
    [
        ({}, {}, "at least one"),
        ({"a": []}, {}, "'a'"),
        ({"a": list}, {"seconds": 0}, "positive"),
        ({"a": list}, {"sample_ms": -1}, "positive"),
        ({"a": list}, {"min_samples": 0}, "positive"),
    ],
)
def test_refused(contenders: dict, limits: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interleaved(contenders, **limits)
