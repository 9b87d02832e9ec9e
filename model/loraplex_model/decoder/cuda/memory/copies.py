"""Copies of adapters to the device, made while passes run.

    prepare(a)   takes a range of the arena and begins to copy on a stream of its own;
                 later calls say whether the copy has ended
    take(a)      the adapter on the device, to be published
    free(p)      gives back the range of an adapter that was removed

One adapter is copied at a time. Passes are launched before their predecessors have ended, so a pass
that is still running may read a range after the range was given back. The copy stream therefore
waits, on the device, for all passes launched so far before it writes to a range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex_model.adapters.pack import PackedAdapter
from loraplex_model.decoder.cuda.memory.arena import DeviceArena


class Copy(Protocol):
    """A copy to the device that was begun."""

    def has_ended(self) -> bool:
        """Whether the bytes have arrived. Does not wait."""

    def join(self) -> None:
        """Makes everything that is launched from now on wait, on the device, for the copy."""


class CopyStream(Protocol):
    """Where copies are made."""

    def begin(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        """Begins to copy `source` on the host to `target`, after all passes launched so far.

        Both must stay alive until the copy has ended.
        """


class CudaCopies:
    """Copies on a CUDA stream of their own; passes are computed on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        """See `CopyStream`."""
        self._stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return _CudaCopy(event, target.device)


@dataclass(frozen=True, slots=True)
class _CudaCopy:
    event: torch.cuda.Event
    device: torch.device

    def has_ended(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


@dataclass(slots=True)
class _Preparation:
    source: PackedAdapter
    placed: PackedAdapter
    copy: Copy


class DeviceAdapters:
    """The memory of the adapters on one device. Called between passes, on one thread."""

    def __init__(self, arena: DeviceArena, stream: CopyStream) -> None:
        self._arena = arena
        self._stream = stream
        self._preparation: _Preparation | None = None

    @property
    def arena(self) -> DeviceArena:
        """The arena, for statistics."""
        return self._arena

    def prepare(self, adapter: PackedAdapter) -> bool:
        """Begins or continues to copy an adapter; True once it is on the device.

        If another adapter was prepared before and not taken, its range is freed. Raises
        `ArenaFull`.
        """
        return self._prepared(adapter).copy.has_ended()

    def take(
        self, adapter: PackedAdapter, on_move: Callable[[PackedAdapter], None]
    ) -> PackedAdapter:
        """The adapter on the device. Without `prepare` the next passes wait for the copy.

        `on_move` is called with the adapter at its new place whenever it is moved. Raises
        `ArenaFull`.
        """
        preparation, self._preparation = self._prepared(adapter), None
        preparation.copy.join()
        self._arena.watch(preparation.placed, on_move)
        return preparation.placed

    def free(self, placed: PackedAdapter) -> None:
        """Frees the range of an adapter that no pass launched from now on uses."""
        self._arena.free(placed)

    def _prepared(self, adapter: PackedAdapter) -> _Preparation:
        if self._preparation is None or self._preparation.source is not adapter:
            self._abandon()
            # What is moved to make room is moved by the stream that computes, so the copy waits for
            # the moves as it waits for the passes.
            placed = self._arena.place(adapter, self._follow)
            try:
                copy = self._stream.begin(placed.data, adapter.data)
            except BaseException:
                self._arena.free(placed)
                raise
            self._preparation = _Preparation(adapter, placed, copy)
        return self._preparation

    def _follow(self, moved: PackedAdapter) -> None:
        assert self._preparation is not None, "an adapter that nobody uses was moved"
        self._preparation.placed = moved

    def _abandon(self) -> None:
        given_up, self._preparation = self._preparation, None
        if given_up is not None:
            # The range may be overwritten next, by a move on the computing stream.
            given_up.copy.join()
            self._arena.free(given_up.placed)
