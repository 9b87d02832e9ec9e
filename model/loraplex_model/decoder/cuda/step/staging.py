"""The numbers of a pass on their way to the device: one buffer, one copy.

A `Layout` says where each array lies in the buffer. Host memory is pinned and there are two buffers
that take turns, so that one can be filled while the device still reads the other. The device's
buffer has a fixed address, so that a graph can read from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 64

_TYPES: Mapping[str, torch.dtype] = {
    "i4": torch.int32,
    "i8": torch.int64,
    "f4": torch.float32,
    "f8": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Segment:
    """An array in the buffer.

    Attributes:
        kind: "i4", "i8", "f4" or "f8".
        size: number of elements that there is room for.
        fill: value of the elements behind those that a pass has.
    """

    kind: str
    size: int
    fill: int = 0


class Layout:
    """Places of named arrays in a buffer.

    The last array may be of any length up to its size, and nothing is written behind it.

    Attributes:
        segments: the arrays, by name, in the order of their places.
        nbytes: size of the buffer.
    """

    def __init__(self, segments: Mapping[str, Segment]) -> None:
        self.segments = dict(segments)
        *_, self._last = self.segments
        self._starts: dict[str, int] = {}
        end = 0
        for name, segment in segments.items():
            self._starts[name] = end
            size = segment.size * np.dtype(segment.kind).itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = end

    def nothing(self) -> dict[str, NDArray[Any]]:
        """Arrays without elements, whose segments then hold the fill values."""
        return {name: np.empty(0, segment.kind) for name, segment in self.segments.items()}

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays as views of a buffer, uint8 [>= nbytes], each with one dimension."""
        return {
            name: buffer[start : start + segment.size * np.dtype(segment.kind).itemsize].view(
                _TYPES[segment.kind]
            )
            for (name, segment), start in zip(
                self.segments.items(), self._starts.values(), strict=True
            )
        }

    def write(self, buffer: NDArray[np.uint8], arrays: Mapping[str, NDArray[Any]]) -> int:
        """Writes each segment's array to a buffer, flat, and the fill value behind it.

        Returns the number of bytes from the start of the buffer that must be copied: nothing
        is written behind the array of the last segment. Raises `KeyError` for a missing array, and
        `ValueError` for one that is larger than its segment.
        """
        used = 0
        for name, segment in self.segments.items():
            values = arrays[name]
            if values.size > segment.size:
                raise ValueError(f"{name} has {values.size} elements, and room for {segment.size}")
            start = self._starts[name]
            end = start + segment.size * np.dtype(segment.kind).itemsize
            target = buffer[start:end].view(segment.kind)
            target[: values.size] = values.reshape(-1)
            used = start + values.size * target.itemsize
            if name != self._last:
                target[values.size :] = segment.fill
        return used


class Transfers:
    """Copies between host and device on the current stream, counted.

    Attributes:
        copies_in: copies from the host.
        copies_out: copies to the host.
        synchronisations: times that the host waited for the device.
    """

    def __init__(self) -> None:
        self.copies_in = self.copies_out = self.synchronisations = 0

    def copy_in(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies `source`, on the host, to `target`; returns before the copy is done."""
        self.copies_in += 1
        target.copy_(source, non_blocking=True)

    def copy_out(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies `source` to `target`, on the host; returns before the copy is done."""
        self.copies_out += 1
        target.copy_(source, non_blocking=True)

    def mark(self, device: torch.device) -> torch.cuda.Event | None:
        """An event after everything launched so far; None on the CPU, which is never behind."""
        if device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Waits until the device has passed an event."""
        self.synchronisations += 1
        if event is not None:
            event.synchronize()


class Staging:
    """Buffers for the numbers of a pass on the host and on the device.

    Attributes:
        buffer: uint8 [capacity], on the device.
    """

    def __init__(self, device: torch.device, capacity: int, transfers: Transfers) -> None:
        """Allocates `capacity` bytes on the device, and twice as many on the host."""
        self._transfers = transfers
        self.buffer = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self._hosts = [_Host(capacity, device.type == "cuda") for _ in range(2)]

    @property
    def capacity(self) -> int:
        """Size of a buffer in bytes."""
        return self.buffer.numel()

    def send(self, layout: Layout, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Copies the arrays to the device's buffer, as `layout` says, in one copy.

        Waits if the last copy from the same buffer, two calls ago, has not ended.
        """
        assert layout.nbytes <= self.capacity
        self._hosts.reverse()
        host = self._hosts[0]
        if host.copied is not None and not host.copied.query():  # type: ignore[no-untyped-call]
            self._transfers.wait(host.copied)
        used = layout.write(host.bytes, arrays)
        self._transfers.copy_in(self.buffer[:used], host.tensor[:used])
        host.copied = self._transfers.mark(self.buffer.device)


class _Host:
    """A buffer on the host, and the event after the last copy from it."""

    def __init__(self, capacity: int, pin: bool) -> None:
        self.tensor = torch.zeros(capacity, dtype=torch.uint8, pin_memory=pin)
        self.bytes: NDArray[np.uint8] = self.tensor.numpy()
        self.copied: torch.cuda.Event | None = None
