"""Turns torch's errors about a CUDA device into the two kinds that the engine handles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from loraplex_model.base.refusal import Refusal

from loraplex_server.engine.runner.protocol import DeviceLost, OutOfDeviceMemory

T = TypeVar("T")

_NO_MEMORY = "out of memory"
"""Part of the message of an error for lack of memory outside of torch's allocator, such as that
of a kernel that is loaded. The allocator itself raises `torch.OutOfMemoryError`."""


@dataclass(frozen=True, slots=True)
class DeviceErrors:
    """Replaces errors of work on `device`. Without effect on other devices than CUDA.

    Attributes:
        probe: waits for the device and raises if it cannot be used. An error that makes a context
            unusable, such as an illegal address or a failed assertion, is reported by every later
            call; any other error is not.
        empty_cache: returns the allocator's unused memory to the device.
    """

    device: torch.device
    probe: Callable[[torch.device], object] = torch.cuda.synchronize
    empty_cache: Callable[[], object] = torch.cuda.empty_cache

    def replace(self, work: Callable[[], T]) -> T:
        """The result of `work`.

        Raises:
            OutOfDeviceMemory: there was too little device memory for `work`.
            DeviceLost: `work` failed, and the device cannot be used by this process any more.
        """
        if self.device.type != "cuda":
            return work()
        try:
            return work()
        except (Refusal, OutOfDeviceMemory):
            raise
        except Exception as error:
            if not _lacks_memory(error):
                self._need_device(error)
                raise
            text = str(error)
        # Only after the handler: until it ends, the exception refers to the frames of `work`, and
        # so to the memory that `work` allocated.
        self.empty_cache()
        raise OutOfDeviceMemory(text)

    def _need_device(self, error: Exception) -> None:
        try:
            self.probe(self.device)
        except Exception:
            raise DeviceLost(f"the device {self.device} cannot be used any more") from error


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY in str(error)
    )
