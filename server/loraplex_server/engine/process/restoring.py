"""The adapters of a lost engine that are restored in its replacement."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

from loraplex_server.engine.messages import (
    AdapterRef,
    AdapterStatus,
    Control,
    Load,
    Merge,
    SetPinned,
)

log = logging.getLogger(__name__)


class Restoration:
    """Loads, pins and merges to repeat. What was being loaded or merged is never repeated.

    Attributes:
        merged: digests of the adapters that are merged by order.
    """

    def __init__(self) -> None:
        self.merged: set[str] = set()
        self._wanted: dict[str, bool] = {}
        self._refs: dict[str, AdapterRef] = {}
        self._open: dict[int, str] = {}

    def on_lost(self, table: Iterable[AdapterStatus], is_unsafe: Callable[[str], bool]) -> None:
        """Notes what a lost engine held, without adapters that are unsafe to load.

        If that engine was lost before all orders were repeated, the remaining orders are kept.
        """
        # Not yet repeated, as they were when the engine before was lost.
        waiting = {digest: self._wanted[digest] for digest in self._open.values()}
        refs = {digest: self._refs[digest] for digest in waiting}
        for status in table:
            if status.state == "resident":
                waiting[status.digest] = status.pinned or waiting.get(status.digest, False)
                refs[status.digest] = AdapterRef(status.digest, status.path)
        self._wanted = {d: pinned for d, pinned in waiting.items() if not is_unsafe(d)}
        self._refs = {digest: refs[digest] for digest in self._wanted}
        self.merged.intersection_update(self._wanted)
        self._open = {}

    def orders(self, ops: Iterator[int]) -> list[Control]:
        """Orders for a new engine, pins first, so that no adapter is evicted for a pinned one."""
        orders: list[Control] = []
        for digest, pinned in sorted(self._wanted.items(), key=lambda item: not item[1]):
            ref = self._refs[digest]
            order = SetPinned(next(ops), ref, pinned=True) if pinned else Load(next(ops), ref)
            orders.append(order)
            self._open[order.op] = digest
            if digest in self.merged:
                orders.append(Merge(next(ops), ref))
        return orders

    def drop(self, digest: str) -> None:
        """Removes an adapter that is unloaded while there is no engine that holds it."""
        self._wanted.pop(digest, None)
        self._refs.pop(digest, None)
        self.merged.discard(digest)
        self._open = {op: each for op, each in self._open.items() if each != digest}

    def unpin(self, digest: str) -> None:
        """Has an adapter restored without its pin."""
        if digest in self._wanted:
            self._wanted[digest] = False

    def done(self, op: int) -> None:
        """Notes that an order was answered."""
        self._open.pop(op, None)
