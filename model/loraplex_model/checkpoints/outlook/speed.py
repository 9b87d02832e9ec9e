"""The least time of a decode step, from what a device reads and multiplies in a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraplex_model.checkpoints.outlook.footprint import Footprint

_NUMBERS = 1 << 25  # float32, which no cache of a CPU holds
_SIDE = 1024
_TRIES = 4


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Speeds of a device, measured in a fraction of a second.

    Attributes:
        read: bytes that it read in a second.
        multiplied: products of two numbers that it computed in a second.
    """

    read: float
    multiplied: float

    def step_seconds(self, sizes: Footprint, rows: int, tokens: int, item_size: int) -> float:
        """Seconds of a decode step of `rows` sequences of `tokens` tokens, at the least.

        A step takes as long as reading its weights and its cache once, or as multiplying,
        whichever is longer (a roofline). Kernels do not reach that time.
        """
        read = sizes.read_in_step(rows, tokens, item_size) / self.read
        return max(read, sizes.multiplications(rows) / self.multiplied)


def measure(device: torch.device, dtype: torch.dtype, threads: int = 0) -> DeviceSpeed:
    """Measures a device, in about a third of a second; on a CPU with `threads` threads.

    A CPU multiplies in float32 whatever the compute type is.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        numbers = torch.zeros(_NUMBERS, device=device)
        factor = torch.zeros(
            _SIDE, _SIDE, device=device, dtype=torch.float32 if device.type == "cpu" else dtype
        )
        read = numbers.nbytes / _least_seconds(numbers.sum, device)
        multiplied = _SIDE**3 / _least_seconds(lambda: factor @ factor, device)
    finally:
        torch.set_num_threads(before)
    return DeviceSpeed(read, multiplied)


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of the fastest of several runs."""
    least = float("inf")
    for _ in range(_TRIES):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least
