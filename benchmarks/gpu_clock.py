"""Timing on a GPU: each contender's calls are captured in a CUDA graph, and events measure its replays.

Launching may cost the host more than a small kernel costs the device, and calls one by one would time the host. A graph
holds every copy of the data in turn, for several rounds. Replays of the contenders are interleaved, in an order that
turns round every time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from fasticl.timing import Timing

Replay = Callable[[], float]  # replays once; milliseconds on the device
CALLS = 20  # in a graph, at least, unless
REPLAY_MS = 10.0  # that many take longer than this


def capture(calls: Sequence[Callable[[], object]]) -> tuple[Replay, int]:
    """The replay of a graph of ``calls``, whole rounds of them, and how many calls it holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        for call in calls:  # what is compiled or allocated once
            call()
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
    torch.cuda.current_stream().wait_stream(stream)
    rounds = rounds_of(len(calls), begin.elapsed_time(end))
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for call in [*calls] * rounds:
                call()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own stream as the current one

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return replay, rounds * len(calls)


def rounds_of(calls: int, ms: float) -> int:
    """Rounds of so many calls, which take ``ms``, in a graph; launching from the host may have taken part of it."""
    return max(1, min(-(-CALLS // calls), int(REPLAY_MS / max(ms, 1e-3))))


def interleaved(
    contenders: Mapping[str, Sequence[Callable[[], object]]],
    *,
    seconds: float,
    min_samples: int,
    capture: Callable[[Sequence[Callable[[], object]]], tuple[Replay, int]] = capture,
    optional: Collection[str] = (),
    mark: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Times each contender; its samples are replays, divided by the calls in them.

    ``mark`` opens a range around each replay. The second result is why contenders in ``optional`` were not captured.
    """
    replays: dict[str, tuple[Replay, int]] = {}
    refused: dict[str, Exception] = {}
    for name in sorted(contenders, key=lambda name: name in optional):  # a failed capture may spoil those behind it
        try:
            replays[name] = capture(contenders[name])
            replays[name][0]()
        except Exception as error:
            if name not in optional:
                raise
            replays.pop(name, None)
            refused[name] = error
    samples: dict[str, list[float]] = {name: [] for name in replays}
    order = list(replays)
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_samples or time.perf_counter() < stop:
        for name in order:
            replay, calls = replays[name]
            with mark(name):
                samples[name].append(replay() / calls)
        order.reverse()
        rounds += 1
    timings = {}
    for name, taken in samples.items():
        p20, p50, p80 = np.percentile(taken, [20, 50, 80])
        timings[name] = Timing(float(p50), float(p20), float(p80), len(taken), replays[name][1])
    return timings, refused
