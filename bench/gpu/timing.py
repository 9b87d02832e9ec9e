"""Durations on a device: median of repeated calls, or of replays of a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def synchronise(device: str) -> None:
    """Waits until the device has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Call, device: str, repeats: int = 20, warm_ups: int = 3) -> float:
    """Median duration of a call, the end of its work on the device included; host time counts."""
    if device != "cuda":
        warm_ups, repeats = 0, 1
    for _ in range(warm_ups):
        call()
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def replay_seconds(calls: Sequence[Call], device: str, repeats: int = 20) -> float:
    """Median duration of all calls in one CUDA graph: the device's time without the host's.

    The calls should use different weights, more of them than the L2 cache holds, as the layers of
    a model do. Without a device they are made once.
    """
    if device != "cuda":
        return seconds(lambda: [call() for call in calls], device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels and lets libraries allocate, before a capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
