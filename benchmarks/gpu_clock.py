"""Timing on a GPU: each contender's calls are captured in a CUDA graph, and events measure its replays.

Launching may cost the host more than a small kernel costs the device, and calls one by one would time the host. A graph
holds every copy of the data in turn, for several rounds. Replays of the contenders are interleaved, in an order that
turns round every time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from fasticl.timing import Timing

Replay = Callable[[], float]  # replays once; milliseconds on the device
CALLS = 20  # in a graph, at least


def capture(calls: Sequence[Callable[[], object]]) -> tuple[Replay, int]:
    """The replay of a graph of ``calls``, whole rounds of them, and how many calls it holds."""
    rounds = -(-CALLS // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or allocated once
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return replay, rounds * len(calls)


def interleaved(
    contenders: Mapping[str, Sequence[Callable[[], object]]],
    *,
    seconds: float,
    min_samples: int,
    capture: Callable[[Sequence[Callable[[], object]]], tuple[Replay, int]] = capture,
) -> dict[str, Timing]:
    """Times each contender; its samples are replays, divided by the calls in them."""
    replays = {name: capture(calls) for name, calls in contenders.items()}
    for replay, _ in replays.values():
        replay()
    samples: dict[str, list[float]] = {name: [] for name in replays}
    order = list(replays)
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_samples or time.perf_counter() < stop:
        for name in order:
            replay, calls = replays[name]
            samples[name].append(replay() / calls)
        order.reverse()
        rounds += 1
    timings = {}
    for name, taken in samples.items():
        p20, p50, p80 = np.percentile(taken, [20, 50, 80])
        timings[name] = Timing(float(p50), float(p20), float(p80), len(taken), replays[name][1])
    return timings
