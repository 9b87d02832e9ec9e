"""Memory for large tensors that come and go: each in a mapping of its own.

A general allocator keeps freed memory for later use. With tensors of many megabytes and different
sizes that come and go for hours, as adapters do, its heap has ever more gaps that nothing fits
into: glibc raises the size from which it uses mappings of its own with every large block that is
freed, up to 32 MiB. What is allocated here is returned to the system with the last reference to it.
"""

from __future__ import annotations

import mmap

import torch

_LARGE = 1 << 17
"""Bytes from which a tensor gets a mapping of its own; smaller ones fill the heap's gaps."""
_LINE = 64
"""Bytes of a cache line."""
_HUGE_PAGE = 1 << 21
"""Bytes of a huge page, where there are any."""


def zeros(nbytes: int) -> torch.Tensor:
    """Zeros, uint8 [nbytes], on the host. Raises OSError if there is no memory.

    Large pages are used if the system has them, since weights are read with scattered access.
    """
    if nbytes < _LARGE:
        return torch.zeros(nbytes, dtype=torch.uint8)
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor on the host in memory from `zeros`."""
    copy = zeros(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


class Arena:
    """One mapping for tensors that live equally long, on large pages if possible."""

    def __init__(self, nbytes: int) -> None:
        """`nbytes` is the total of `room` of all tensors. Raises OSError if there is no memory."""
        self._memory = zeros(nbytes)
        self._used = 0

    @staticmethod
    def room(nbytes: int) -> int:
        """Bytes that a tensor of `nbytes` takes: it begins at a cache line."""
        return -(-nbytes // _LINE) * _LINE

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros, [count]."""
        end = self._used + count * dtype.itemsize
        assert end <= len(self._memory), "an arena is used up"
        taken = self._memory[self._used : end].view(dtype)
        self._used += self.room(count * dtype.itemsize)
        return taken
